"""The plan of a finetuning against what runs: bytes alive in a real step, a process's resident memory, the kernels' own saved tensors."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.cascade_folder import find_cascade
from engine.config import FinetuneConfig, StageConfig, UNetConfig
from engine.errors import OutOfMemory
from engine.finetune_plan import every_machine, fit, kinds_of, measure, plan, table, walk
from engine.runtime import stand_ins
from engine.runtime.memory import GB, WORLDS, Policy, Zero, best, fits, ladder
from engine.runtime.roofline import H200, Meter, Offloaded

ROOT = Path(__file__).parents[2]
ADAM, EIGHT = Policy(), Policy(optimizer="adamw8bit")
FRUGAL = Policy(optimizer="adamw8bit", master="stochastic", in_backward=True)


@pytest.fixture(scope="module")
def papers():
    return find_cascade("imagen_video")[1]


def shrunk(channels, mults=(1, 2), frames=4, height=8, width=12, **more) -> StageConfig:
    """The base stage's structure: spatial attention in every block, temporal attention."""
    unet = UNetConfig(channels=channels, channel_mults=mults, num_blocks=(1,) * len(mults), attention_levels=tuple(range(len(mults))),
                      attention_every_block=True, temporal="attention", max_frames=16, head_dim=32, groups=8, text_dim=128, context_dim=64)
    return StageConfig(name="base", frames=frames, height=height, width=width, fps=3, steps=4, unet=unet.model_copy(update=more))


# --- what a run takes

MEASURE = """
import ctypes, gc, json, sys, tempfile
from pathlib import Path
import torch
from safetensors.torch import save_file
from dreamix_kernels import attention, dispatch
from engine.config import FinetuneConfig, StageConfig
from engine.diffusion.loss import diffusion_loss
from engine.diffusion.schedule import COSINE, add_noise
from engine.models.unet import VideoUNet
from engine.runtime.roofline import Meter
from engine.runtime.weights import WEIGHTS_NAME
from engine.training.plain_engine import PlainEngine

torch.set_num_threads(1)
stage, config, dtype, metered = StageConfig(**json.loads(sys.argv[1])), FinetuneConfig(**json.loads(sys.argv[2])), sys.argv[3], sys.argv[4]
dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]

def finetune(folder, steps):
    engine = PlainEngine(lambda: VideoUNet(stage.unet), folder, config, torch.device("cpu"), dtype)
    text, mask = torch.zeros(2, 32, stage.unet.text_dim), torch.ones(2, 32, dtype=torch.bool)
    video = torch.zeros(2, stage.frames, stage.height, stage.width, 3)
    extra = {"lowres": video, "aug_level": torch.zeros(2)} if stage.unet.lowres else {}
    for _ in range(steps):
        eps, time = torch.randn(video.shape), torch.full((2,), 0.5)
        z, frames = add_noise(video, eps, time, COSINE), torch.tensor([False, True])
        output = engine.network(z, time, text, mask, independent_frames=frames, **extra)
        del z
        loss = diffusion_loss(output, video, eps, time, COSINE, weights=torch.tensor([0.35, 0.65]))
        del output
        engine.backward(loss)
        del loss
        engine.step(6e-6)

def status(key):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

def settle():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)

with tempfile.TemporaryDirectory() as folder:
    save_file({k: v.half() for k, v in VideoUNet(stage.unet).state_dict().items()}, Path(folder) / WEIGHTS_NAME)
    for grad in (False, True):                # what proves itself on first use does so before anything is recorded or measured
        attention._choose(torch.device("cpu"), dtype, stage.unet.head_dim, True, grad)
    dispatch.report(torch.device("cpu"), dtype)
    if metered == "live":
        with Meter() as meter:
            finetune(Path(folder), 2)
        print(meter.peak)
    else:
        finetune(Path(folder), 1)             # code and modules that are loaded on first use, compiled products
        settle()
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        finetune(Path(folder), 2)
        print(status("VmHWM") - before)
"""


def run(stage: StageConfig, policy: Policy, how: str) -> int:
    """Peak bytes of two mixed steps in a process of their own: "live" tensors, or resident memory above what there was before."""
    config = FinetuneConfig(optimizer=policy.optimizer, master=policy.master, in_backward=policy.in_backward,
                            gradient_checkpointing=policy.gradient_checkpointing)
    # a fixed threshold: what is freed goes back at once, so resident memory is what is alive
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "TRITON_INTERPRET": "0",
                                "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    result = subprocess.run([sys.executable, "-c", MEASURE, stage.model_dump_json(), config.model_dump_json(), policy.dtype, how],
                            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-2000:]
    return int(result.stdout.split()[-1])


def test_resident_memory_of_a_real_step():
    stage, policy = shrunk(64, (1, 1), frames=8, height=16, width=24), Policy(dtype="fp32")
    what = measure(stage, policy, 1, on_cpu=True)
    assert what.working > 0.5 * what.gpu                       # not a test of the parameters alone
    assert what.gpu == pytest.approx(run(stage, policy, "resident"), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["live", "resident"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", [False, True], ids=["eager", "recompute"])
def test_memory_of_a_shrunk_base(dtype, recompute, how):
    """27 M parameters, AdamW."""
    stage, policy = shrunk(128, (1, 2, 4), 8, 16, 24), Policy(dtype=dtype, gradient_checkpointing=recompute)
    assert measure(stage, policy, 1, on_cpu=True).gpu == pytest.approx(run(stage, policy, how), rel=0.1 if how == "resident" else 0.01)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [replace(EIGHT, gradient_checkpointing=True), replace(EIGHT, in_backward=True), FRUGAL,
                                    Policy(optimizer="fused", in_backward=True, gradient_checkpointing=True)], ids=str)
def test_memory_of_the_other_policies(policy):
    if policy.optimizer == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    stage = shrunk(128, (1, 2, 4), 4, 12, 20)
    assert measure(stage, policy, 1, on_cpu=True).gpu == pytest.approx(run(stage, policy, "resident"), rel=0.1)


@pytest.mark.slow
def test_memory_with_temporal_convolutions():
    unet = UNetConfig(channels=64, channel_mults=(1, 2), num_blocks=(1, 2), space_to_depth=2, attention_levels=(1,), head_dim=32, groups=8,
                      text_dim=128, context_dim=64, lowres=True)
    stage, policy = StageConfig(name="ssr1", frames=8, height=32, width=48, fps=6, steps=4, unet=unet), Policy(dtype="fp32")
    assert measure(stage, policy, 1, on_cpu=True).gpu == pytest.approx(run(stage, policy, "live"), rel=0.02)


# --- the meter and the stand-ins

def test_the_meter_counts_what_is_alive():
    for device in ("cpu", "meta"):
        with Meter() as meter:
            a = torch.empty(1000, device=device)
            b = a + 1
            assert meter.alive == meter.peak == 8000
            c = b.view(10, 100).t()
            assert meter.alive == 8000
            del a, b
            assert meter.alive == 4000 and meter.peak == 8000
            meter.set_aside(c)
            assert (meter.alive, meter.aside) == (0, 4000)
            del c
            assert (meter.alive, meter.aside) == (0, 0)
            x, w = torch.empty(3, 5, device=device), torch.empty(5, 7, device=device)
            flops, moved = meter.flops, meter.moved
            x @ w
            assert meter.flops - flops == 2 * 3 * 5 * 7 and meter.moved - moved == 4 * (15 + 35 + 21)
            assert meter.peak_with_aside == 8000


def test_offloaded_activations_are_gone_until_they_are_needed():
    def alive(offload):
        w = torch.empty(64, 64, device="meta", requires_grad=True)
        hooks = Offloaded([w], at_least=1)
        with Meter() as meter:
            meter.hold([w])
            x = torch.empty(1000, 64, device="meta")
            if offload:
                with hooks:
                    x = (x @ w).sin().exp()
            else:
                x = (x @ w).sin().exp()
            kept = meter.alive
            x.sum().backward()
            return kept, hooks.bytes, w.grad.shape

    each = 4 * 64 * 1000
    assert alive(False) == (3 * each, 0, (64, 64))              # the inputs of the product and of the sine, the result of exp
    assert alive(True) == (each, 3 * each, (64, 64))            # the result itself is still held


def saved_bytes(function, *inputs) -> int:
    """Bytes that autograd keeps of a call, its inputs apart; each storage once."""
    own, kept = {x.untyped_storage()._cdata for x in inputs if isinstance(x, Tensor)}, {}

    def pack(x):
        if x.untyped_storage()._cdata not in own:
            kept[x.untyped_storage()._cdata] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function(*inputs)
    return sum(x.untyped_storage().nbytes() for x in kept.values())


def test_stand_ins_keep_what_the_kernels_keep():
    """The Triton autograd functions, interpreted, against the stand-ins on tensors without memory."""
    pytest.importorskip("triton")
    from dreamix_kernels import group_norm_silu_triton, temporal_attention_triton, temporal_conv_triton

    mask, C = torch.tensor([False, True]), 32
    shapes = {"norm": [(4, 6, C), (C,), (C,), (4, C), (4, C)], "attention": [(2, 3, 4, 3, 2, 32), (2, 3, 3)],
              "conv": [(2, 3, 4, C), (C,), (C,), (C, C, 3), (C,)]}

    def kernels(kind, *x):
        if kind == "norm":
            return group_norm_silu_triton.group_norm_silu(x[0], 8, *x[1:], 1e-5, None)
        if kind == "attention":
            return temporal_attention_triton.temporal_attention_packed(*x, mask)
        return temporal_conv_triton.temporal_conv_block(x[0], 8, *x[1:], mask, 1e-5, None, 8, False)[0]

    def planned(kind, *x):
        if kind == "norm":
            return stand_ins.group_norm_silu(x[0], 8, *x[1:])
        if kind == "attention":
            return stand_ins.temporal_attention_packed(x[0].unflatten(2, (2, 2)), x[1], mask)
        video = stand_ins.Mask((False, True), "meta")
        return stand_ins.temporal_conv_block(x[0].unflatten(2, (2, 2)), 8, *x[1:], video, next_groups=8)[0]

    for kind, sizes in shapes.items():
        real, shape_only = ([torch.zeros(size, device=device, requires_grad=True) for size in sizes] for device in ("cpu", "meta"))
        found = saved_bytes(lambda *x, kind=kind: planned(kind, *x), *shape_only)
        wanted = saved_bytes(lambda *x, kind=kind: kernels(kind, *x), *real)
        assert found == pytest.approx(wanted, abs=len(mask)) and (kind == "attention" or wanted > 100), kind
        planned(kind, *shape_only).sum().backward()
        assert all(x.grad.shape == x.shape for x in shape_only)


def test_the_walk_leaves_the_ops_as_they_were():
    places = (("resblock", "group_norm_silu"), ("attention", "temporal_conv_block"))
    names = [(import_module(f"engine.models.{module}"), name) for module, name in places]
    before = [getattr(*name) for name in names]
    walk.__wrapped__(shrunk(32), (False,), torch.bfloat16, "cuda", False, False)
    assert before == [getattr(*name) for name in names]


def test_kinds_of_units_and_policies_change_the_walk():
    stage = shrunk(32)
    mixed, clip, frames = (walk(stage, kinds, torch.bfloat16, "cuda", False, False) for kinds in ((False, True), (False,), (True,)))
    assert mixed.activations == pytest.approx(2 * clip.activations, rel=0.02) and frames.activations <= clip.activations
    again = walk(stage, (False, True), torch.bfloat16, "cuda", True, False)
    away = walk(stage, (False, True), torch.bfloat16, "cuda", False, True)
    assert again.activations < 0.5 * mixed.activations and 1.2 < again.flops / mixed.flops < 4 / 3 + 0.01
    assert away.offloaded >= 0 and away.flops == mixed.flops
    assert kinds_of(FinetuneConfig()) == (False, True) and kinds_of(FinetuneConfig(draws=2, alpha=0.0)) == (True, True)
    assert kinds_of(FinetuneConfig(sample_one=True)) == (False,) and kinds_of(FinetuneConfig(alpha=1)) == (False,)


# --- arithmetic

def test_state_bytes_per_parameter():
    rounded = replace(EIGHT, in_backward=True, master="stochastic")
    found = [round(p.state_bytes_per_parameter) for p in (ADAM, EIGHT, replace(EIGHT, in_backward=True), rounded, Policy(dtype="fp32"))]
    assert found == [16, 10, 8, 4, 16]                          # PERFORMANCE 2.4, and fp32: no copy of what is fp32
    assert Policy(zero3=True).state_bytes_per_parameter == 18   # its gradients are summed in fp32
    with pytest.raises(ValueError, match="zero3"):
        Policy(offload_optimizer="host")
    with pytest.raises(ValueError, match="without zero3"):
        Policy(zero3=True, in_backward=True)


def test_the_defaults_are_those_of_the_settings():
    for name, where in (("zero3", ("none", "none")), ("zero3_offload", ("host", "host"))):
        settings = json.loads((ROOT / "configs" / "deepspeed" / f"{name}.json").read_text())
        policy = Policy.of(FinetuneConfig(optimizer="adamw8bit", gradient_checkpointing=True), "bf16", settings)
        assert policy.zero._replace(live=Zero().live) == Zero() and (policy.offload_optimizer, policy.offload_parameters) == where
        assert policy.zero3 and policy.gradient_checkpointing and policy.optimizer == "adamw8bit"
    assert policy.zero.live < Zero().live and Zero.of({}).live == 10**9
    assert Policy.of(FinetuneConfig(), "fp32") == Policy(dtype="fp32")


def test_the_papers_base_on_an_h200(papers):
    [record] = plan(papers, ("base",), gpu_bytes=141 * GB)
    assert record["policy"] == ADAM and record["fits"] and record["refusal"] is None
    assert record["state"] == pytest.approx(89.5e9, rel=0.01) and 8e9 < record["activations"] < 14e9
    assert record["gpu"] < record["state"] + record["activations"] + 2e9
    assert 99.4 + 39 < record["ms"] < 2 * (99.4 + 39)           # above the floor of the FLOPs and the optimizer
    halves = measure(papers.stage("base"), Policy(zero3=True), 2)
    assert halves.activations == pytest.approx(record["activations"] / 2, rel=0.01)
    assert table([record]).splitlines()[1].split()[:4] == ["base", "1", "89.5", f"{record['activations'] / GB:.1f}"]


def test_a_refusal_names_what_fits(papers):
    with pytest.raises(OutOfMemory) as caught:
        fit(papers, ("base",), gpu_bytes=80 * GB, policy=ADAM)
    text = str(caught.value)
    assert caught.value.exit_code == 8 and "\n" not in text and text.startswith("base: Adam, fp32 master needs 94")
    here, what = best(lambda policy, world: measure(papers.stage("base"), policy, world), 1, 80 * GB, None)
    assert f"{here} ({what.gpu / GB:.1f} GB)" in text and what.gpu < 80 * GB and "2 GPUs" in text and "141 GB" in text
    small = papers.model_copy(update={"stages": (shrunk(32), *papers.stages[1:])})
    [record] = plan(small, ("base",), gpu_bytes=10**9, host_bytes=10)
    assert not record["fits"] and "nothing" in record["refusal"] and "DOES NOT FIT" in table([record])


def test_the_ladder_only_gets_more_frugal():
    stage = shrunk(256, (1, 2), 8, 24, 40)

    def asked(policy, world):
        return measure(stage, policy, world)

    for world in (1, 2):
        sizes = [asked(policy, world).gpu for policy in ladder(world)]
        assert sizes[0] == max(sizes)
        cards = [min(sizes), *sorted(sizes)[2::4], max(sizes)]
        chosen = [ladder(world).index(best(asked, world, card, None)[0]) for card in cards]
        assert chosen == sorted(chosen, reverse=True) and chosen[-1] == 0        # a larger card never asks for more saving
        assert best(asked, world, min(sizes) - 1, None) is None
    for policy in (Policy(zero3=True), Policy(zero3=True, optimizer="adamw8bit", gradient_checkpointing=True)):
        sizes = [asked(policy, world).gpu for world in WORLDS]
        assert sizes == sorted(sizes, reverse=True)


def test_the_host_and_the_cpu(papers):
    base = papers.stage("base")
    away = Policy(zero3=True, gradient_checkpointing=True, offload_optimizer="host")
    what = measure(base, away, 1)
    assert what.host == pytest.approx(16 * 5.595e9, rel=0.01) and what.gpu < 16e9 and what.disk == 0
    assert fits(what, 24 * GB, 100 * GB) and not fits(what, 24 * GB, 64 * GB) and fits(what, 24 * GB, None)
    disk = measure(base, replace(away, offload_optimizer="disk"), 1)
    assert disk.disk == what.host and disk.host < what.host and disk.step_seconds > what.step_seconds > measure(base, ADAM, 1).step_seconds
    assert H200.seconds(790e12, 0) == pytest.approx(1 / H200.compute_efficiency)
    small = measure(shrunk(32), Policy(dtype="fp32"), 1, on_cpu=True)
    assert fits(small, None, small.gpu) and not fits(small, None, small.gpu - 1)


@pytest.mark.slow
def test_every_machine(papers):
    records = every_machine(papers)
    assert len(records) == 3 * 16 and all(record["fits"] for record in records)
    assert all(record["gpu"] <= record["card"] for record in records)
