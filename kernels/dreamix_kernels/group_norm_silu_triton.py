"""GroupNorm, FiLM and SiLU in Triton: two reads of x and a write, or one read and a write where its statistics are known.

Forward: `statistics` (per channel, over parts of a frame) -> `merge` (per frame and group) -> `apply`. Backward: `gradient_partials` ->
`gradient_sums` -> `gradient_parameters`, `gradient_x`: x and dy are read twice, and nothing of x's size but x is kept. A frame is [P, C]
here, and the arguments are those that the door checked; `stats`, fp32 [N, groups, 2], holds (mean, biased variance): a cache of a function
of x, with no gradient of its own. Where not all of x fits in the GPU's cache, its last frames do: the second pass begins with them.
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

# of each kernel that walks over pixels: numbers per tile, numbers per thread (of each tensor read), tiles per program, at most
WALKS = {"statistics": (4096, 16, 16), "apply": (8192, 32, 4), "gradient_partials": (4096, 16, 16), "gradient_x": (4096, 16, 8)}
PROGRAMS_PER_FRAME = 128               # wanted, where a frame has the pixels: one frame alone then fills the GPU
FEWEST_PER_PROGRAM = 16384             # numbers, where a frame has them: each part's sums cost 8 bytes per channel, written and read


def config(kind: str, P: int, C: int) -> tuple[int, dict[str, int]]:
    """Pixels of a part, and the block sizes and launch options of a kernel that walks over pixels.

    They depend on the frame alone, so a frame's bits do not on the frames beside it. A block of channels is 128 or 64 wide where one of
    these divides C, else it covers C with masks.
    """
    elements, per_thread, most_tiles = WALKS[kind]
    block_c = next((block for block in (128, 64) if C % block == 0), min(128, triton.next_power_of_2(C)))
    block_p = min(triton.next_power_of_2(P), elements // block_c)
    tiles = math.ceil(P * math.ceil(C / block_c) / (block_p * PROGRAMS_PER_FRAME))
    tiles = min(max(tiles, FEWEST_PER_PROGRAM // elements), most_tiles)
    num_warps = max(block_p * block_c // (32 * per_thread), 1)
    pivot = {"FEW": min(block_p, 8)} if kind == "statistics" else {}
    return block_p * tiles, {"UNIT": math.gcd(C, 16), "BLOCK_P": block_p, "BLOCK_C": block_c, **pivot, "num_warps": num_warps}


def _merge_config(entries: int) -> dict[str, int]:
    block = min(triton.next_power_of_2(entries), 4096)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 8)}


def _sums_config(parts: int, size: int) -> dict[str, int]:
    block_c = min(triton.next_power_of_2(size), 64)
    block_p = min(triton.next_power_of_2(parts), 2048 // block_c)
    return {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": min(max(block_p * block_c // 512, 1), 4)}


PARAMETERS_CONFIG = {"BLOCK_N": 32, "BLOCK_C": 32, "num_warps": 4}


def _launch(kernel, like: Tensor, programs: int, *args, **options) -> None:
    with torch.cuda.device_of(like):   # Triton launches on the current GPU, whichever the tensors' is
        kernel[(programs,)](*args, **options)


def _walk(kind: str, x: Tensor) -> tuple[dict[str, int], tuple[int, ...], int]:
    """For a kernel over the pixels of x: its config; P, units, pixels_per_part, parts, blocks, as it takes them; the number of programs."""
    N, P, C = x.shape
    pixels_per_part, chosen = config(kind, P, C)
    parts, blocks = math.ceil(P / pixels_per_part), math.ceil(C / chosen["BLOCK_C"])
    return chosen, (P, C // chosen["UNIT"], pixels_per_part, parts, blocks), N * parts * blocks


def _statistics(x: Tensor, b: Tensor | None, groups: int) -> tuple[Tensor, Tensor]:
    """(x, its statistics), or (x + b, its statistics)."""
    chosen, sizes, programs = _walk("statistics", x)
    P, _, pixels_per_part, parts, _ = sizes
    partials = x.new_empty(x.shape[0], parts, x.shape[2], 2, dtype=torch.float32)
    out = None if b is None else torch.empty_like(x)
    _launch(kernels.statistics, x, programs, x, b, out, partials, *sizes, **chosen)
    return x if b is None else out, merge_statistics(partials, pixels_per_part, P, groups)


def frame_statistics(x: Tensor, groups: int) -> Tensor:
    """Mean and biased variance of every frame and group.   x [N, P, C], contiguous -> fp32 [N, groups, 2]"""
    return _statistics(x, None, groups)[1]


def merge_statistics(partials: Tensor, pixels_per_part: int, P: int, groups: int) -> Tensor:
    """Statistics from those of the parts of each frame, in a fixed order (Chan, Golub & LeVeque 1983).

    Shapes: partials fp32 [N, parts, C, 2], contiguous: (mean, M2 = sum of squared distances from it) of each channel over a part's pixels;
    every part has pixels_per_part of the frame's P pixels, the last one what is left -> fp32 [N, groups, 2].
    """
    N, parts, C, _ = partials.shape
    stats = partials.new_empty(N, groups, 2)
    _launch(kernels.merge, partials, N * groups, partials, stats, P, pixels_per_part, parts, groups, C // groups,
            **_merge_config(parts * C // groups))
    return stats


def _arguments(groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float) -> tuple[tuple, tuple]:
    """What every kernel needs to fold the affine in: its pointers; groups, size, scale_stride, shift_stride, eps.

    scale and shift are read with their rows as far apart as they are: a half of a wider tensor is not copied.
    """
    scale, shift = (s if s is None or s.stride(-1) == 1 else s.contiguous() for s in (scale, shift))
    strides = (0 if s is None else s.stride(0) for s in (scale, shift))
    return (weight, bias, scale, shift), (groups, weight.shape[0] // groups, *strides, eps)


def fold(stats: Tensor, groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None,
         eps: float) -> tuple[Tensor, Tensor]:
    """(gain, offset): silu(x * gain + offset) is the op.

    Shapes: stats [N, groups, 2]; weight, bias [C]; scale, shift [N, C] or None -> both fp32 [N, C].
    """
    N, C = stats.shape[0], weight.shape[0]
    affine, numbers = _arguments(groups, weight, bias, scale, shift, eps)
    gain, offset = stats.new_empty(N, C), stats.new_empty(N, C)
    block = min(triton.next_power_of_2(C), 256)
    blocks = math.ceil(C / block)
    _launch(kernels.fold, stats, N * blocks, stats, *affine, gain, offset, blocks, *numbers, BLOCK_C=block, num_warps=2)
    return gain, offset


def _apply(x: Tensor, stats: Tensor, *arguments) -> Tensor:
    chosen, sizes, programs = _walk("apply", x)
    affine, numbers = _arguments(*arguments)
    y = torch.empty_like(x)
    _launch(kernels.apply, x, programs, x, stats, *affine, y, *sizes, *numbers, **chosen)
    return y


def backward(x: Tensor, dy: Tensor, stats: Tensor, groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None,
             eps: float, add: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Every gradient of the op at x, given the output's; silu's input and the normalised x are computed again.

    Shapes: x, dy, add [N, P, C], contiguous; stats [N, groups, 2]; weight, bias [C]; scale, shift [N, C] or None -> dx like x (with `add`,
    the gradient of another path, summed in before it is rounded), dweight, dbias [C], dscale, dshift [N, C] or None.
    """
    N, P, C = x.shape
    affine, numbers = _arguments(groups, weight, bias, scale, shift, eps)
    weight, bias, scale, shift = affine
    size, scale_stride = numbers[1:3]

    chosen, sizes, programs = _walk("gradient_partials", x)
    parts = sizes[3]
    partials = stats.new_empty(N, parts, C, 2)
    _launch(kernels.gradient_partials, x, programs, x, dy, stats, *affine, partials, *sizes, *numbers, **chosen)

    sums, terms = stats.new_empty(N, C, 2), stats.new_empty(N, groups, 2)
    dscale, dshift = (None if s is None else s.new_empty(N, C) for s in (scale, shift))
    _launch(kernels.gradient_sums, x, N * groups, partials, weight, bias, scale, sums, terms, dscale, dshift, P, parts, groups, size,
            scale_stride, **_sums_config(parts, size))

    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    _launch(kernels.gradient_parameters, x, math.ceil(C / PARAMETERS_CONFIG["BLOCK_C"]), sums, scale, dweight, dbias, N, groups, size,
            scale_stride, **PARAMETERS_CONFIG)

    chosen, sizes, programs = _walk("gradient_x", x)
    dx = torch.empty_like(x)
    _launch(kernels.gradient_x, x, programs, x, dy, add, stats, terms, *affine, dx, *sizes, *numbers, **chosen)
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
    """The op, on arguments that the door checked. With `stats`, those of x as `frame_statistics` finds them, x is read once.

    Shapes: x [N, P, C]; weight, bias [C]; scale, shift [N, C] or None; stats [N, groups, 2] or None -> like x.
    """
    return _GroupNormSiLU.apply(x.contiguous(), groups, weight.contiguous(), bias.contiguous(), scale, shift, eps, stats)


def add_statistics(a: Tensor, b: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """(a + b, statistics of that sum as it is stored), which is not read again.   a, b [N, P, C] -> like a, [N, groups, 2]"""
    return _AddStatistics.apply(a.contiguous(), b.contiguous(), groups)


def self_check(device: torch.device, dtype: torch.dtype) -> None:
    """A small case with a ragged last part: output and gradients against the definition, statistics against fp64. Raises: RuntimeError."""
    N, P, C, groups = 2, 300, 48, 8
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, scale, shift, dy, b = (torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in
                                            ((N, P, C), (C,), (C,), (N, C), (N, C), (N, P, C), (N, P, C)))
    leaves = [t.requires_grad_() for t in (x, weight, bias, scale, shift)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    y = group_norm_silu(x, groups, weight, bias, scale, shift, 1e-5, None)
    want = group_norm_silu_reference(wide[0][:, None], groups, *wide[1:])[:, 0]
    require_agreement("group_norm_silu", y.detach(), want.detach())
    gradients = torch.autograd.grad(y, leaves, dy), torch.autograd.grad(want, wide, dy.double())
    for name, got, exact in zip(("x", "weight", "bias", "scale", "shift"), *gradients):
        require_agreement(f"group_norm_silu's gradient of {name}", got, exact)
    out, stats = add_statistics(x.detach(), b, groups)
    require_agreement("add_statistics", out, x.detach().double() + b.double())
    var, mean = torch.var_mean(out.double().unflatten(-1, (groups, -1)), (1, 3), correction=0)
    require_agreement("statistics", stats, torch.stack((mean, var), -1))


def aot_cases() -> list[Case]:
    """Every kernel at frames of the cascade's stages: wide and many, narrow and few; each configuration once."""
    small = {"partials_ptr": torch.float32, "stats_ptr": torch.float32, "sums_ptr": torch.float32, "terms_ptr": torch.float32,
             "gain_ptr": torch.float32, "offset_ptr": torch.float32}
    found = {}

    def add(name: str, kernel, dtype: torch.dtype, chosen: dict[str, int], **absent) -> None:
        constants = {k: v for k, v in chosen.items() if k != "num_warps"}
        arguments = {k: "fp32" if k == "eps" else small.get(k, dtype) if k.endswith("_ptr") else "i32"
                     for k in kernel.arg_names if k not in constants}
        found.setdefault((kernel, dtype, tuple(absent), *chosen.items()),
                         Case(f"{name} {TYPES[dtype]}", kernel, {**arguments, **absent}, constants, {"num_warps": chosen["num_warps"]}))

    plain = {"scale_ptr": None, "shift_ptr": None}
    stages = ("ssr3 384x640", 384 * 640, 128, 32), ("tsr1 6x10", 60, 1024, 32), ("base 3x5", 15, 3072, 32), ("sprites 24x40", 960, 48, 8)
    for stage, P, C, groups in stages:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            shape, size = f"{stage} C={C}", C // groups
            add(f"gn statistics {shape}", kernels.statistics, dtype, config("statistics", P, C)[1], b_ptr=None, sum_ptr=None)
            add(f"gn add_statistics {shape}", kernels.statistics, dtype, config("statistics", P, C)[1])
            add(f"gn apply {shape}", kernels.apply, dtype, config("apply", P, C)[1], **plain)
            add(f"gn apply film {shape}", kernels.apply, dtype, config("apply", P, C)[1])
            add(f"gn gradient_partials film {shape}", kernels.gradient_partials, dtype, config("gradient_partials", P, C)[1])
            add(f"gn gradient_x film {shape}", kernels.gradient_x, dtype, config("gradient_x", P, C)[1], add_ptr=None)
            add(f"gn gradient_x film add {shape}", kernels.gradient_x, dtype, config("gradient_x", P, C)[1])
            parts = math.ceil(P / config("gradient_partials", P, C)[0])
            add(f"gn gradient_sums film {shape}", kernels.gradient_sums, dtype, _sums_config(parts, size))
            add("gn gradient_parameters film", kernels.gradient_parameters, dtype, PARAMETERS_CONFIG)
            add("gn fold film", kernels.fold, dtype, {"BLOCK_C": 128, "num_warps": 2})
        parts = math.ceil(P / config("statistics", P, C)[0])
        add(f"gn merge {shape}", kernels.merge, torch.float32, _merge_config(parts * size))
    return list(found.values())
