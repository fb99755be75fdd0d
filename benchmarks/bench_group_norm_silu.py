"""GroupNorm + FiLM + SiLU, statistics per frame: the prologue of every convolution.

The bound is one read and one write of x, and one more read where a frame does not stay in the cache between statistics and norm.
"""

import pytest
import torch

from benchmarks import peers
from benchmarks.harness import Peer
from benchmarks.stages import SPRITES, level, name
from dreamix_kernels import group_norm_silu
from dreamix_kernels.group_norm_silu import group_norm_silu_reference

FP32, BF16 = torch.float32, torch.bfloat16


def make(shape, dtype, device, film=True):
    N, _, _, C = shape
    x, weight, bias = (peers.randn(*s, dtype=dtype, device=device, seed=i) for i, s in enumerate((shape, (C,), (C,))))
    scale, shift = (peers.randn(N, C, dtype=dtype, device=device, seed=i, scale=0.3) for i in (3, 4)) if film else (None, None)
    return x, weight, bias, scale, shift


def competitors(x, groups, weight, bias, scale, shift, compiled):
    """Ours and PyTorch's own, NCHW and channels last, each given its own layout's memory."""
    first, last = peers.nchw(x), peers.channels_last(x)
    back = lambda out: out.permute(0, 2, 3, 1)                         # noqa: E731
    inductor = compiled(group_norm_silu_reference)
    native = peers.group_norm_film_silu
    return {
        "ours": lambda: group_norm_silu(x, groups, weight, bias, scale, shift),
        "native NCHW": Peer(lambda: native(first, groups, weight, bias, scale, shift), back),
        "native NCHW in place": Peer(lambda: native(first, groups, weight, bias, scale, shift, inplace=True), back),
        "native channels last": Peer(lambda: native(last, groups, weight, bias, scale, shift), back),
        **({"compiled": lambda: inductor(x, groups, weight, bias, scale, shift)} if inductor else {}),
    }


def reference(x, groups, *rest):
    return lambda: group_norm_silu_reference(*peers.wide(x), groups, *peers.wide(*rest))


CPU_SHAPES = {
    "c128": ((16, 24, 40, 128), 32), "c64": ((16, 24, 40, 64), 32), "sprites base": (level("base", 0, SPRITES), 8),
    "sprites base l1": (level("base", 1, SPRITES), 8), "sprites ssr1": (level("ssr1", 0, SPRITES), 8),
    "sprites ssr3": (level("ssr3", 0, SPRITES), 8),
}


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape, groups", CPU_SHAPES.values(), ids=CPU_SHAPES)
def bench_cpu(shape, groups, dtype, cpu, measure, compiled):
    x, *rest = make(shape, dtype, cpu)
    wanted = {"native NCHW": 1.0, "native channels last": 2.5}
    measure(f"gn_film_silu {name(shape)}", competitors(x, groups, *rest, compiled), reference=reference(x, groups, *rest), dtype=dtype,
            shape=shape, bytes_moved=2 * x.nbytes, **({"floor": wanted} if groups == 32 else {"goal": wanted}))


GPU_CASES = {   # case -> shape, crossings of memory that the bound allows, share of it to reach, ratio to the best peer
    "gn_film_silu_large ssr3 l0": (level("ssr3", 0), 3, 0.90, 1.0), "gn_film_silu_large ssr3 l2": (level("ssr3", 2), 3, 0.90, 1.0),
    "gn_film_silu_l2 ssr2 l0": (level("ssr2", 0), 2, 0.75, 1.3), "gn_film_silu_l2 ssr1 l0": (level("ssr1", 0), 2, 0.75, 1.3),
    "gn_film_silu_l2 base l0": (level("base", 0), 2, 0.75, 1.3),
}


@pytest.mark.parametrize("case", GPU_CASES)
def bench_gpu(case, gpu, measure, compiled):
    shape, crossings, share, best = GPU_CASES[case]
    x, *rest = make(shape, BF16, gpu)
    measure(case, competitors(x, 32, *rest, compiled), reference=reference(x, 32, *rest), dtype=BF16, shape=shape,
            bytes_moved=crossings * x.nbytes, floor={"native *": 1.0}, goal={"roofline": share, "compiled": best, "native *": 3.0})
