"""The 3x3 convolutions of every stage: not ours, but most of a step. What they reach calibrates every estimate; channels last must pay."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks import peers
from benchmarks.harness import Peer
from benchmarks.stages import FULL, SPRITES, level, name

FP32, BF16 = torch.float32, torch.bfloat16


def judge(case, shape, dtype, device, measure, **kwargs):
    C = shape[-1]
    x = peers.randn(*shape, dtype=dtype, device=device)
    weight = peers.randn(C, C, 3, 3, dtype=dtype, device=device, seed=1, scale=(9 * C) ** -0.5)
    bias = peers.randn(C, dtype=dtype, device=device, seed=2)
    first, last, weight_last = peers.nchw(x), peers.channels_last(x), weight.contiguous(memory_format=torch.channels_last)
    wide = peers.wide(last[:2], weight, bias)
    runs = {"ours": lambda: F.conv2d(last, weight_last, bias, padding=1), "NCHW": lambda: F.conv2d(first, weight, bias, padding=1)}
    # two frames are enough to tell a right convolution from a wrong one
    measure(case, {name: Peer(run, lambda out: out[:2]) for name, run in runs.items()}, reference=lambda: F.conv2d(*wide, padding=1),
            dtype=dtype, shape=shape, flops=18 * x.numel() * C, bytes_moved=2 * x.nbytes, **kwargs)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(16, 24, 40, 128), level("base", 0, SPRITES), level("ssr1", 0, SPRITES)], ids=name)
def bench_cpu(shape, dtype, cpu, measure):
    judge(f"conv3x3 {name(shape)}", shape, dtype, cpu, measure, goal={"NCHW": 1.0})


SHAPES = sorted({level(stage, n) for stage in FULL for n in range(4)})


@pytest.mark.parametrize("shape", SHAPES, ids=name)
def bench_gpu(shape, gpu, measure):
    judge(f"conv3x3 {name(shape)}", shape, BF16, gpu, measure, goal={"NCHW": 1.0, "roofline": 0.6})
