"""What finetuning a stage would need, before anything is loaded: its step walked on tensors without memory."""

import contextlib
import functools
from importlib import import_module
from unittest import mock

import torch

from engine.config import CascadeConfig, FinetuneConfig, StageConfig
from engine.diffusion.loss import diffusion_loss
from engine.diffusion.schedule import COSINE, add_noise
from engine.errors import OutOfMemory
from engine.models.unet import Block, VideoUNet
from engine.runtime import stand_ins
from engine.runtime.memory import CARDS, GB, WORLDS, Need, Pass, Policy, best, fits, ladder, need, refuse
from engine.runtime.roofline import Meter, Offloaded

TEXT_TOKENS = 32        # of the prompt, which is short; attention to text is a few parts in a thousand of a pass
STAGES = ("base", "ssr1", "ssr2")


@contextlib.contextmanager
def _ops_of(device: str):
    """The engine's ops as they are on the device: on a GPU all are kernels, on the CPU the norm is."""
    resblock, attention, unet = (import_module(f"engine.models.{name}") for name in ("resblock", "attention", "unet"))
    spatial, temporal = import_module("dreamix_kernels.attention"), import_module("dreamix_kernels.temporal_conv")
    on_gpu = device == "cuda"
    norm = stand_ins.group_norm_silu if on_gpu else stand_ins.group_norm_silu_cpu
    changes = [(resblock, "group_norm_silu", norm), (unet, "group_norm_silu", norm), (temporal, "group_norm_silu", norm),
               (spatial, "_choose", lambda *args: "walk" if on_gpu else "sdpa")]
    if on_gpu:
        changes += [(resblock, "add_statistics", stand_ins.add_statistics),
                    (attention, "temporal_attention_packed", stand_ins.temporal_attention_packed),
                    (attention, "temporal_conv_block", stand_ins.temporal_conv_block)]
    with contextlib.ExitStack() as stack:
        for where, name, function in changes:
            stack.enter_context(mock.patch.object(where, name, function))
        stack.enter_context(mock.patch.dict(spatial._backends, {"walk": stand_ins.attention_backend}))
        if not on_gpu:
            from torch._subclasses.fake_tensor import FakeTensorMode

            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


@functools.lru_cache(256)
def walk(stage: StageConfig, independent: tuple[bool, ...], dtype: torch.dtype, device: str, recompute: bool, offload: bool,
         in_backward: int = 0) -> Pass:
    """One mixed step's forward and backward pass of the stage's network, for samples of these kinds (True: independent frames).

    device: "cuda" (the kernels' stand-ins) or "cpu" (PyTorch's own ops, on tensors of the CPU without memory). in_backward: 0, or how many
    fp32 copies the optimizer makes of a tensor that it steps in the second of two backward passes. The ops are exchanged for the
    time of the walk: not to be called beside a network that runs in another thread.
    """
    where = "meta" if device == "cuda" else "cpu"
    mask = stand_ins.Mask(independent, where)
    with _ops_of(device), torch.device(where):
        network = VideoUNet(stage.unet)
        for p in network.parameters():
            p.data = p.data.to(dtype)
        network.gradient_checkpointing = recompute
        parameters = list(network.parameters())
        video = torch.empty(len(independent), stage.frames, stage.height, stage.width, 3)
        text, text_mask = torch.empty(len(video), TEXT_TOKENS, stage.unet.text_dim), torch.empty(len(video), TEXT_TOKENS, dtype=torch.bool)
        meter = Meter()
        meter.hold([*parameters, video, text, text_mask])
        applying = False

        def complete(p):
            if not in_backward:
                meter.set_aside(p.grad)
            elif applying:
                beside = [torch.empty_like(p, dtype=torch.float32) for _ in range(in_backward)]
                p.grad = None
                del beside
            else:
                p.grad.float().norm()
                p.grad = None

        for p in parameters:
            p.register_post_accumulate_grad_hook(complete)
        hooks = Offloaded(parameters) if offload else contextlib.nullcontext()
        with meter, hooks:
            eps, time = torch.empty_like(video), video.new_empty(len(video))
            extra = {"lowres": torch.empty_like(video), "aug_level": time} if stage.unet.lowres else {}
            z = add_noise(video, eps, time, COSINE)
            before = meter.alive
            output = network(z, time, text, text_mask, independent_frames=mask, **extra)
            activations = meter.alive - before
            loss = diffusion_loss(output, video, eps, time, COSINE, weights=time.new_ones(len(video)))
            del output
            loss.backward(retain_graph=in_backward > 0)
            applying = True
            if in_backward:
                loss.backward()
        blocks = [sum(p.numel() for p in m.parameters()) for m in network.modules() if isinstance(m, Block)]
        return Pass(tuple(p.numel() for p in parameters), max(blocks), activations, meter.peak, meter.peak_with_aside,
                    hooks.bytes if offload else 0, meter.flops, meter.moved, meter.seconds)


def kinds_of(config: FinetuneConfig) -> tuple[bool, ...]:
    """The units of a step, True for a set of independent frames; with `sample_one` the dearer kind."""
    if config.sample_one:
        return (config.alpha == 0,) * config.draws
    return ((False,) * (config.alpha > 0) + (True,) * (config.alpha < 1)) * config.draws


def measure(stage: StageConfig, policy: Policy, world: int, *, kinds: tuple[bool, ...] = (False, True), accumulate: int = 1,
            on_cpu: bool = False) -> Need:
    """What the first rank needs for its share of a step's units, `kinds`, in `accumulate` passes."""
    units = kinds[::world]
    passes = min(accumulate, len(units))
    dtype = torch.bfloat16 if policy.dtype == "bf16" else torch.float32
    cost = walk(stage, units[: -(-len(units) // passes)], dtype, "cpu" if on_cpu else "cuda", policy.gradient_checkpointing,
                policy.activation_offload and not on_cpu, policy.step_tensors(on_cpu) if policy.in_backward else 0)
    return need(cost, policy, world, on_cpu=on_cpu, passes=passes)


def plan(cascade: CascadeConfig, stages=STAGES, *, world: int = 1, gpu_bytes: int | None = None, host_bytes: int | None = None,
         policy: Policy | None = None, kinds: tuple[bool, ...] = (False, True), accumulate: int = 1) -> list[dict]:
    """One record a stage: what its step needs on each of `world` ranks, and whether the machine has it.

    gpu_bytes: of one card; None: the run is on the CPU. host_bytes: of the machine, None: not asked. policy None: the best that fits, or
    the most frugal. kinds: the units of a step (Eq. 4), True for independent frames.
    Records: stage, policy, world, fits, and for each rank in bytes state, activations, working, gpu; host and disk over all ranks;
    ms of a step by the roofline of an H200 (None on the CPU), and its parts; `refusal`, a line, where it does not fit.
    """
    records = []
    for name in stages:
        stage = cascade.stage(name)
        asked = functools.partial(measure, stage, kinds=kinds, accumulate=accumulate, on_cpu=gpu_bytes is None)
        chosen = policy
        if chosen is None:
            found = best(asked, world, gpu_bytes, host_bytes)
            chosen = found[0] if found else ladder(world)[-2]
        what = asked(chosen, world)
        ok = fits(what, gpu_bytes, host_bytes)
        records.append({
            "stage": name, "policy": chosen, "world": world, "fits": ok, "state": what.state, "activations": what.activations,
            "working": what.working, "gpu": what.gpu, "host": what.host, "disk": what.disk,
            "ms": None if gpu_bytes is None else 1e3 * what.step_seconds,
            "parts_ms": {part: 1e3 * seconds for part, seconds in what.seconds.items()},
            "refusal": None if ok else str(refuse(name, asked, chosen, world, gpu_bytes, host_bytes))})
    return records


def fit(cascade: CascadeConfig, stages=STAGES, **machine) -> list[dict]:
    """`plan` of what is going to run.   Raises: OutOfMemory (one line, with the nearest that fits) if a stage does not fit."""
    records = plan(cascade, stages, **machine)
    for record in records:
        if not record["fits"]:
            raise OutOfMemory(record["refusal"])
    return records


def table(records: list[dict]) -> str:
    """The records as text for a terminal: GB of 10^9 bytes of each rank; host and disk of all ranks together."""
    lines = [f"{'stage':6} {'ranks':>5} {'state':>7} {'activ.':>7} {'all':>7} {'host':>7} {'disk':>7} {'ms/step':>9}  policy"]
    for r in records:
        figures = " ".join(f"{r[key] / GB:>7.1f}" for key in ("state", "activations", "gpu", "host", "disk"))
        lines.append(f"{r['stage']:6} {r['world']:>5} {figures} {'-' if r['ms'] is None else format(r['ms'], '.0f'):>9}  {r['policy']}"
                     + ("" if r["fits"] else ": DOES NOT FIT"))
    return "\n".join(lines)


def every_machine(cascade: CascadeConfig, stages=STAGES, *, host_bytes: int | None = None) -> list[dict]:
    """The plan on 1, 2, 4, 8 GPUs of 24, 48, 80, 141 GB, with the best policy for each."""
    return [record | {"card": card} for name in stages for card in CARDS for world in WORLDS
            for record in plan(cascade, (name,), world=world, gpu_bytes=card, host_bytes=host_bytes)]
