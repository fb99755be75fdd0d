"""A whole step of a U-Net, one forward pass: ours against the same network and weights in the formulation that users run today."""

import copy

import pytest
import torch

pytest.importorskip("pydantic")        # the networks' configs are the engine's

from benchmarks import peers
from benchmarks.harness import Peer
from benchmarks.rival_unet import RivalUNet, frames_last
from engine.cascade_folder import find_cascade
from engine.cascade_plan import TEXT_TOKENS, step_cost
from engine.config import StageConfig, UNetConfig
from engine.models.unet import VideoUNet
from engine.runtime import weights

FP32, BF16 = torch.float32, torch.bfloat16
# what a step of the paper's base looks like at a width two cores can run: its frames and size, heads of 64, attention on every level
WIDE = StageConfig(name="base", frames=16, height=24, width=40, fps=3, steps=1, unet=UNetConfig(
    channels=128, channel_mults=(1, 2), num_blocks=(1, 1), attention_levels=(0, 1), attention_every_block=True, temporal="attention",
    head_dim=64, groups=32, text_dim=128, context_dim=128, max_frames=16))


def random_network(config: UNetConfig, device: torch.device, dtype: torch.dtype) -> VideoUNet:
    """A network whose signals stay of the order of one and none of whose layers is zero; never in memory in another format."""
    network = weights.on_meta(lambda: VideoUNet(config)).to(dtype).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, value in network.named_parameters():
        value.normal_(0, 0.7 / max(1, value[0].numel()) ** 0.5 if value.ndim > 1 else 0.05, generator=generator)
        if "norm" in name and name.endswith("weight"):
            value.add_(1)
        if value.ndim == 4:
            value.data = value.data.contiguous(memory_format=torch.channels_last)
    return network


def inputs(stage: StageConfig, device: torch.device) -> tuple[tuple, dict]:
    """Arguments of `VideoUNet.forward`, in the sampler's fp32."""
    frames = min(stage.frames, stage.chunk_frames or stage.frames)
    video = (1, frames, stage.height, stage.width, 3)
    randn = lambda *shape, seed: peers.randn(*shape, dtype=FP32, device=device, seed=seed)              # noqa: E731
    mask = torch.ones(1, TEXT_TOKENS, dtype=torch.bool, device=device)
    extra = {}
    if stage.unet.lowres:
        extra = {"lowres": randn(*video, seed=2), "aug_level": torch.full((1,), stage.aug_level, device=device)}
    return (randn(*video, seed=0), torch.full((1,), 0.5, device=device), randn(1, TEXT_TOKENS, stage.unet.text_dim, seed=1), mask), extra


def step(case, stage, network, measure, compiled, device, dtype, **kwargs):
    """The reference is the rival in fp32, with the weights as the network has them, rounded as they are."""
    args, extra = inputs(stage, device)
    rival, wide = (RivalUNet(n).eval().requires_grad_(False) for n in (network, copy.deepcopy(network).float()))
    given = frames_last(args[0]), *args[1:]
    given_extra = {key: frames_last(value) if value.ndim == 5 else value for key, value in extra.items()}

    def theirs(run):
        return Peer(lambda: run(*given, **given_extra), lambda out: out.permute(0, 2, 3, 4, 1))
    competitors = {"ours": lambda: network(*args, **extra), "eager": theirs(rival)}
    if (fast := compiled(rival)) is not None:
        competitors["compiled"] = theirs(fast)
    reference = theirs(wide)
    measure(case, competitors, reference=lambda: reference.view(reference.run()), dtype=dtype,
            shape=(args[0].shape[1], stage.height, stage.width, stage.unet.channels), tolerance=2.5e-6 if dtype is FP32 else 3e-2,
            **kwargs)


# Ratios below which a case fails. In fp32 a step is bound by the processor's multiply-adds, which the rival's 3x3 convolutions reach too:
# what can be won lies between them, least in `base` and `wide`, of which linears and 3x3 convolutions are the most.
FLOORS = {("base", FP32): 1.0, ("wide", FP32): 1.0, ("ssr1", FP32): 1.1, ("ssr2", FP32): 1.1,
          ("base", BF16): 1.1, ("wide", BF16): 1.2, ("ssr1", BF16): 1.3, ("ssr2", BF16): 1.3}


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["base", "ssr1", "ssr2", "wide"])
def bench_cpu(name, dtype, cpu, measure, compiled):
    if name == "wide":
        stage, case = WIDE, "unet_step wide"
        network = random_network(stage.unet, cpu, dtype)
    else:
        folder, cascade = find_cascade("sprites")
        stage, case = cascade.stage(name), f"unet_step sprites {name}"
        network = weights.load(lambda: VideoUNet(stage.unet), folder / name, cpu, dtype)
    step(case, stage, network, measure, compiled, cpu, dtype, floor={"eager": FLOORS[name, dtype], "compiled": 1.0},
         goal={"eager": 1.5 if dtype is FP32 else 1.3}, seconds=2)


GPU_SHARE = {"base": 0.55, "tsr1": 0.55, "ssr1": 0.55, "ssr2": 0.55, "tsr2": 0.45, "tsr3": 0.45, "ssr3": 0.45}     # of 790 TFLOP/s


@pytest.mark.parametrize("name", GPU_SHARE)
def bench_gpu(name, gpu, measure, compiled):
    """The paper's stages at full size, random weights; ssr3 one chunk of 32 frames."""
    stage = find_cascade("imagen_video")[1].stage(name)
    network = random_network(stage.unet, gpu, BF16)
    flops = step_cost(stage, min(stage.frames, stage.chunk_frames or stage.frames))[1]
    step(f"unet_step {name}", stage, network, measure, compiled, gpu, BF16, flops=flops, floor={"eager": 1.0},
         goal={"eager": 1.6, "compiled": 1.1, "roofline": GPU_SHARE[name]}, seconds=2)
