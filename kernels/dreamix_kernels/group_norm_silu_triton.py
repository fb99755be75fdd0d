"""GroupNorm, FiLM and SiLU in Triton: two reads and a write of x, or one read and a write where its statistics are known already.

Forward: `statistics` (per channel, over parts of a frame) -> `merge` (per frame and group) -> `apply`. Backward: `gradient_partials` -> `gradient_sums`
-> `gradient_parameters`, `gradient_x`: x and dy are read twice, and nothing of x's size but x is kept. Inside, a frame is [P, C] and the arguments
are those that the door checked; `stats` fp32 [N, groups, 2] holds (mean, biased variance), a cache of a function of x with no gradient of its own.
"""

import math

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import group_norm_silu_triton_kernels as kernels
from .aot import TYPES, Case
from .dispatch import require_agreement
from .group_norm_silu import group_norm_silu_reference

PROGRAMS_PER_FRAME = 128               # wanted, where a frame has the pixels: one frame alone then fills the GPU
LARGEST_MERGE = 4096                   # entries at a time


def _channel_block(C: int) -> int:
    """128 or 64 where they divide C, else what covers it with masks."""
    return next((block for block in (128, 64) if C % block == 0), min(128, triton.next_power_of_2(C)))


def config(kind: str, P: int, C: int, dtype: torch.dtype) -> dict[str, int]:
    """Sizes and launch options of a kernel that walks over pixels. They depend on the frame alone, so a frame's bits do not on those beside it.

    A thread holds 32 numbers per tensor and tile in kernels of one input, 16 in the others: four or more 16-byte loads in flight, no spills.
    """
    block_c = _channel_block(C)
    elements = {"statistics": 8192, "apply": 8192, "gradient_partials": 4096, "gradient_x": 4096}[kind]
    block_p = min(triton.next_power_of_2(P), elements // block_c)
    tiles = math.ceil(P * math.ceil(C / block_c) / (block_p * PROGRAMS_PER_FRAME))
    tiles = min(max(tiles, 8192 * 2 // elements), 8 if kind in ("statistics", "gradient_partials") else 4)
    return {"UNIT": math.gcd(C, 16), "BLOCK_P": block_p, "BLOCK_C": block_c, "TILES": tiles, "num_warps": min(max(block_p * block_c // 1024, 1), 8)}


def _merge_config(entries: int) -> dict[str, int]:
    block = min(triton.next_power_of_2(entries), LARGEST_MERGE)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 8)}


def _sums_config(parts: int, size: int) -> dict[str, int]:
    block_c = min(triton.next_power_of_2(size), 64)
    block_p = min(triton.next_power_of_2(parts), 2048 // block_c)
    return {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": min(max(block_p * block_c // 512, 1), 4)}


def _launch(kernel, like: Tensor, programs: int, *args, **config) -> None:
    with torch.cuda.device_of(like):   # Triton launches on the current GPU, whichever the tensors' is
        kernel[(programs,)](*args, **config)


def _walk(kind: str, x: Tensor) -> tuple[dict[str, int], int, int, int, int]:
    """For a kernel over the pixels of x: its config, C in units, the number of parts, of channel blocks and of programs."""
    N, P, C = x.shape
    chosen = config(kind, P, C, x.dtype)
    parts, blocks = math.ceil(P / (chosen["BLOCK_P"] * chosen["TILES"])), math.ceil(C / chosen["BLOCK_C"])
    return chosen, C // chosen["UNIT"], parts, blocks, N * parts * blocks


def _rows(scale: Tensor | None) -> tuple[Tensor | None, int]:
    """scale or shift as the kernels read it, and the distance of its rows: a half of a wider tensor is not copied."""
    if scale is not None and scale.stride(-1) != 1:
        scale = scale.contiguous()
    return scale, 0 if scale is None else scale.stride(0)


def _statistics(x: Tensor, b: Tensor | None, groups: int) -> tuple[Tensor, Tensor]:
    """(x, its statistics), or (x + b, its statistics)."""
    N, P, C = x.shape
    chosen, units, parts, blocks, programs = _walk("statistics", x)
    partials = x.new_empty(N, parts, C, 2, dtype=torch.float32)
    out = x if b is None else torch.empty_like(x)
    _launch(kernels.statistics, x, programs, x, b, None if b is None else out, partials, P, units, parts, blocks, **chosen)
    return out, merge_statistics(partials, chosen["BLOCK_P"] * chosen["TILES"], P, groups)


def frame_statistics(x: Tensor, groups: int) -> Tensor:
    """Mean and biased variance of every frame and group.   x [N, P, C], contiguous -> fp32 [N, groups, 2]"""
    return _statistics(x, None, groups)[1]


def merge_statistics(partials: Tensor, pixels_per_part: int, P: int, groups: int) -> Tensor:
    """Statistics from those of the parts of each frame, in a fixed order (Chan, Golub & LeVeque 1983).

    Shapes: partials fp32 [N, parts, C, 2], contiguous: (mean, M2 = sum of squared distances from it) of each channel over a part's pixels; every part
    has pixels_per_part of the frame's P pixels, the last one what is left -> fp32 [N, groups, 2].
    """
    N, parts, C, _ = partials.shape
    stats = partials.new_empty(N, groups, 2)
    _launch(kernels.merge, partials, N * groups, partials, stats, P, pixels_per_part, parts, groups, C // groups,
            **_merge_config(parts * C // groups))
    return stats


def fold(stats: Tensor, groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """(gain, offset), fp32 [N, C]: silu(x * gain + offset) is the op.   stats [N, groups, 2]; weight, bias [C]; scale, shift [N, C] or None"""
    N, C = stats.shape[0], weight.shape[0]
    (scale, scale_stride), (shift, shift_stride) = _rows(scale), _rows(shift)
    gain, offset = stats.new_empty(N, C), stats.new_empty(N, C)
    block = min(triton.next_power_of_2(C), 256)
    blocks = math.ceil(C / block)
    _launch(kernels.fold, stats, N * blocks, stats, weight, bias, scale, shift, gain, offset, blocks, groups, C // groups, scale_stride, shift_stride,
            eps, BLOCK_C=block, num_warps=2)
    return gain, offset


def _apply(x, stats, groups, weight, bias, scale, shift, eps) -> Tensor:
    chosen, units, parts, blocks, programs = _walk("apply", x)
    (scale, scale_stride), (shift, shift_stride) = _rows(scale), _rows(shift)
    y = torch.empty_like(x)
    _launch(kernels.apply, x, programs, x, stats, weight, bias, scale, shift, y, x.shape[1], units, parts, blocks, groups, x.shape[2] // groups,
            scale_stride, shift_stride, eps, **chosen)
    return y


def backward(x: Tensor, dy: Tensor, stats: Tensor, groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float,
             add: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Every gradient of the op at x, given the output's; u and the normalised x are recomputed.

    Shapes: x, dy, add [N, P, C], contiguous; stats [N, groups, 2]; weight, bias [C]; scale, shift [N, C] or None
    -> dx like x (with `add`, another path's gradient, summed in before it is rounded), dweight, dbias [C], dscale, dshift [N, C] or None.
    """
    N, P, C = x.shape
    size = C // groups
    (scale, scale_stride), (shift, shift_stride) = _rows(scale), _rows(shift)
    chosen, units, parts, blocks, programs = _walk("gradient_partials", x)
    partials = stats.new_empty(N, parts, C, 2)
    _launch(kernels.gradient_partials, x, programs, x, dy, stats, weight, bias, scale, shift, partials, P, units, parts, blocks, groups, size,
            scale_stride, shift_stride, eps, **chosen)
    sums, terms = stats.new_empty(N, C, 2), stats.new_empty(N, groups, 2)
    dscale = None if scale is None else scale.new_empty(N, C)
    dshift = None if shift is None else shift.new_empty(N, C)
    _launch(kernels.gradient_sums, x, N * groups, partials, weight, bias, scale, sums, terms, dscale, dshift, P, parts, groups, size, scale_stride,
            **_sums_config(parts, size))
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    _launch(kernels.gradient_parameters, x, math.ceil(C / 32), sums, scale, dweight, dbias, N, groups, size, scale_stride,
            BLOCK_N=32, BLOCK_C=32, num_warps=4)
    chosen, units, parts, blocks, programs = _walk("gradient_x", x)
    dx = torch.empty_like(x)
    _launch(kernels.gradient_x, x, programs, x, dy, add, stats, terms, weight, bias, scale, shift, dx, P, units, parts, blocks, groups, size,
            scale_stride, shift_stride, eps, **chosen)
    return dx, dweight, dbias, dscale, dshift


class _GroupNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, groups, weight, bias, scale, shift, eps, stats):
        stats = frame_statistics(x, groups) if stats is None else stats.contiguous()
        ctx.groups, ctx.eps = groups, eps
        ctx.save_for_backward(x, stats, weight, bias, scale, shift)
        return _apply(x, stats, groups, weight, bias, scale, shift, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, stats, weight, bias, scale, shift = ctx.saved_tensors
        dx, dweight, dbias, dscale, dshift = backward(x, dy.contiguous(), stats, ctx.groups, weight, bias, scale, shift, ctx.eps)
        return dx, None, dweight, dbias, dscale, dshift, None, None


class _AddStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, groups):
        out, stats = _statistics(a, b, groups)
        ctx.mark_non_differentiable(stats)
        return out, stats

    @staticmethod
    def backward(ctx, dout, _):
        return dout, dout, None


def group_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float,
                    stats: Tensor | None) -> Tensor:
    """The op on arguments that the door checked.   x [N, P, C]; weight, bias [C]; scale, shift [N, C] or None; stats [N, groups, 2] or None -> like x"""
    return _GroupNormSiLU.apply(x.contiguous(), groups, weight.contiguous(), bias.contiguous(), scale, shift, eps, stats)


def add_statistics(a: Tensor, b: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """(a + b, statistics of the rounded sum) in one pass: the sum itself is not read again.   a, b [N, P, C] -> like a, fp32 [N, groups, 2]"""
    return _AddStatistics.apply(a.contiguous(), b.contiguous(), groups)
