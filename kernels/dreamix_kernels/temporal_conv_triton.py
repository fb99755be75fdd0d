"""The residual temporal convolution block in Triton: statistics in, one kernel over x, the next norm's statistics out.

    y = x + conv(silu(groupnorm(x))) for videos, y = x for samples that are independent frames

Where `fused` says so, normalisation, activation, convolution, residual and mask are one kernel (`rolling` up to C = 128, `per_tap` above),
and h = silu(groupnorm(x)) never reaches memory. Elsewhere h is written, PyTorch's conv2d runs on a view of it, and `add_residual` does the
rest. Backward keeps x and its statistics, and makes h again. The mask is read by the kernels only: nothing waits for the GPU.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import group_norm_silu_triton as norm
from . import temporal_conv_triton_kernels as kernels
from .aot import TYPES, Case
from .dispatch import DTYPES, interpreted, require_agreement
from .group_norm_silu import group_norm_silu_reference
from .temporal_conv import temporal_conv

WIDE_ROLLING_BYTES = 150 * 1024        # of shared memory, wanted by `rolling` at 64 < C <= 128
PROGRAMS_PER_SAMPLE = 264              # of the weight's gradient, wanted: two for each multiprocessor of the largest GPUs


def supported(x: Tensor, weight: Tensor) -> bool:
    """x [..., C], weight [C, C, 3]: rows of 16 bytes or more, in a format of the kernels."""
    C = x.shape[-1]
    return x.dtype in DTYPES and C % 8 == 0 and weight.shape == (C, C, 3)


def fused(C: int, dtype: torch.dtype) -> bool:
    """One kernel, rather than an activated tensor in memory, PyTorch's conv2d and a pass that adds the residual.

    Arithmetic for an H200 in bf16 (4.3 TB/s, 790 TFLOP/s), not yet measured. Three passes move 7 tensors, one kernel 2: what that saves, 10
    bytes per element, is 300 / C of the time of the products (6 C flops per element). The price is to activate an element anew wherever it
    is read, by two operations of the special-function unit (3.7 T/s). Up to C = 128 it is read once: the weight of all taps stays on chip
    (6 C^2 bytes) and a program walks through time. Beyond, it is read once per tap and 256 output channels, what a program's registers
    hold: 0.8 of the products' time, less than the 1.2 that are saved at C = 256, more than the 0.6 at C = 512.
    In fp32 a product without TF32 keeps its operands in registers: enough for C = 32. Small parts have no room for 64 < C <= 128.
    """
    if 64 < C <= 128 and _shared_bytes() < WIDE_ROLLING_BYTES:
        return False
    return C <= (32 if dtype == torch.float32 else 256)


@cache
def _shared_bytes() -> int:
    """Shared memory that a program may have on the smallest GPU there is; without one, as much as any has."""
    parts = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return min((getattr(part, "shared_memory_per_block_optin", 0) or 232448 for part in parts), default=232448)


def config(C: int, dtype: torch.dtype) -> tuple:
    """(kernel, block sizes and launch options) of the fused form: one choice per width and format, whatever the frames. None spills."""
    block_c = max(triton.next_power_of_2(C), 16)
    if block_c <= 128:
        block_p, num_warps = {128: (64, 8), 64: (64, 4)}.get(block_c, (128 if dtype.itemsize == 2 else 64, 4))
        return kernels.rolling, {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": num_warps, "num_stages": 2}
    return kernels.per_tap, {"BLOCK_P": 128, "BLOCK_K": 32, "BLOCK_C": block_c, "num_warps": 8, "num_stages": 4}


ADD_CONFIG = {"BLOCK_P": 64, "BLOCK_C": 128, "num_warps": 4, "num_stages": 2}


def weight_config(C: int, dtype: torch.dtype) -> dict[str, int]:
    """Block sizes and launch options of `weight_gradient`; its tensors are longest along BLOCK_P, which it walks."""
    block_c = max(triton.next_power_of_2(C), 32)
    if dtype == torch.float32:
        return {"BLOCK_O": 32, "BLOCK_I": min(block_c, 64), "BLOCK_P": 32, "num_warps": 4 if block_c == 32 else 8, "num_stages": 2}
    walk = {"BLOCK_P": 32, "num_stages": 4} if fused(C, dtype) else {"BLOCK_P": 64, "num_stages": 3}
    return {"BLOCK_O": min(block_c, 64), "BLOCK_I": min(block_c, 128), "num_warps": 4 if block_c == 32 else 8, **walk}


def _precision(dtype: torch.dtype) -> str:
    """As PyTorch's convolutions: fp32 by TF32 where cuDNN may."""
    if interpreted():
        return "widened"
    return "tf32" if dtype == torch.float32 and _tf32() else "ieee"


def _tf32() -> bool:
    """Whether cuDNN may use TF32, by whichever of PyTorch's two switches was touched: it refuses to read the older after the newer."""
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return torch.backends.cudnn.conv.fp32_precision == "tf32"


def _launch(kernel, like: Tensor, programs: int, *args, **config) -> None:
    with torch.cuda.device_of(like):   # Triton launches on the current GPU, whichever the tensors' is
        kernel[(programs,)](*args, **config)


def _partials(x: Tensor, block_p: int, wanted: bool) -> Tensor | None:
    B, T, P, C = x.shape
    return x.new_empty(B * T, math.ceil(P / block_p), C, 2, dtype=torch.float32) if wanted else None


def _fused(x: Tensor, gain: Tensor | None, offset: Tensor | None, weight: Tensor, bias: Tensor | None, mask: Tensor | None,
           inplace: bool = False, statistics: bool = False) -> tuple[Tensor, Tensor | None, int]:
    """y and, if wanted, its partial statistics with the pixels of each part. Without gain: y = conv(x), zero where masked."""
    B, T, P, C = x.shape
    kernel, chosen = config(C, x.dtype)
    blocks = math.ceil(P / chosen["BLOCK_P"])
    constants = {"C": C, "ACTIVATE": gain is not None, "RESIDUAL": gain is not None, "PRECISION": _precision(x.dtype)}
    if kernel is kernels.rolling:
        constants["INPLACE"], programs = inplace, B * blocks
    else:
        inplace, programs = False, B * T * blocks          # its programs read each other's frames
    y = x if inplace else torch.empty_like(x)
    partials = _partials(x, chosen["BLOCK_P"], statistics)
    _launch(kernel, x, programs, x, gain, offset, weight, bias, mask, y, partials, T, P, **constants, **chosen)
    return y, partials, chosen["BLOCK_P"]


def _conv2d(h: Tensor, weight: Tensor) -> Tensor:
    """PyTorch's, on the image of height T and width P that h [B, T, P, C] is. weight [C_out, C_in, 3], in h's format."""
    with torch.autocast(h.device.type, enabled=False):
        out = F.conv2d(h.permute(0, 3, 1, 2), weight[..., None], padding=(1, 0))
    return out.permute(0, 2, 3, 1).contiguous()            # a view already in channels last


def _add_residual(x: Tensor, conv: Tensor, bias: Tensor, mask: Tensor | None, inplace: bool,
                  statistics: bool) -> tuple[Tensor, Tensor | None, int]:
    """x + conv + bias, or x where masked, in x's memory or in conv's; the rest as of `_fused`."""
    B, T, P, C = x.shape
    y = x if inplace else conv
    partials = _partials(x, ADD_CONFIG["BLOCK_P"], statistics)
    programs = B * T * math.ceil(P / ADD_CONFIG["BLOCK_P"]) * math.ceil(C / ADD_CONFIG["BLOCK_C"])
    _launch(kernels.add_residual, x, programs, x, conv, bias, mask, y, partials, T, P, C=C, INPLACE=inplace, **ADD_CONFIG)
    return y, partials, ADD_CONFIG["BLOCK_P"]


def _activated(x: Tensor, stats: Tensor, groups: int, norm_weight: Tensor, norm_bias: Tensor, eps: float) -> Tensor:
    with torch.no_grad():
        return norm.group_norm_silu(x.flatten(0, 1), groups, norm_weight, norm_bias, None, None, eps, stats).view(x.shape)


def _forward(x, groups, norm_weight, norm_bias, weight, bias, mask, eps, stats, next_groups, inplace):
    B, T, P, C = x.shape
    weight, wanted = weight.to(x.dtype), next_groups is not None
    if fused(C, x.dtype):
        gain, offset = norm.fold(stats, groups, norm_weight, norm_bias, None, None, eps)
        packed = weight.permute(2, 1, 0).contiguous()
        y, partials, part = _fused(x, gain, offset, packed, bias, mask, inplace, wanted)
    else:
        conv = _conv2d(_activated(x, stats, groups, norm_weight, norm_bias, eps), weight)
        y, partials, part = _add_residual(x, conv, bias, mask, inplace, wanted)
    return y, norm.merge_statistics(partials, part, P, next_groups) if wanted else None


def _input_gradient(dy: Tensor, weight: Tensor, mask: Tensor | None) -> Tensor:
    """The transposed convolution of dy [B, T, P, C]: the gradient of h, zero in masked samples."""
    flipped = weight.to(dy.dtype).flip(2)                  # h at frame t meets tap k in output frame t - k + 1
    if fused(dy.shape[-1], dy.dtype):
        return _fused(dy, None, None, flipped.permute(2, 0, 1).contiguous(), None, mask)[0]
    dh = _conv2d(dy, flipped.transpose(0, 1))
    return dh if mask is None else dh.masked_fill_(mask[:, None, None, None], 0)


def _weight_gradient(h: Tensor, gain: Tensor | None, offset: Tensor | None, dy: Tensor, mask: Tensor | None) -> Tensor:
    """Gradient of the weight, fp32 [C, C, 3]. h [B, T, P, C], or x with the gain and offset that make it h."""
    B, T, P, C = h.shape
    chosen = weight_config(C, h.dtype)
    tiles = math.ceil(C / chosen["BLOCK_O"]) * math.ceil(C / chosen["BLOCK_I"])
    items = T * math.ceil(P / chosen["BLOCK_P"])
    per_split = math.ceil(items / min(items, math.ceil(PROGRAMS_PER_SAMPLE / tiles)))
    splits = math.ceil(items / per_split)
    partials = h.new_empty(B * splits, 3, C, C, dtype=torch.float32)
    _launch(kernels.weight_gradient, h, B * splits * tiles, h, gain, offset, dy, mask, partials, T, P, splits, per_split,
            C=C, ACTIVATE=gain is not None, PRECISION=_precision(h.dtype), **chosen)
    return partials.sum(0).permute(1, 2, 0)


class _TemporalConvBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, groups, norm_weight, norm_bias, weight, bias, mask, eps, stats, next_groups):
        ctx.groups, ctx.eps = groups, eps
        ctx.save_for_backward(x, norm_weight, norm_bias, weight, bias, mask, stats)
        y, next_stats = _forward(x, groups, norm_weight, norm_bias, weight, bias, mask, eps, stats, next_groups, False)
        if next_stats is not None:
            ctx.mark_non_differentiable(next_stats)
        return y, next_stats

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, _):
        x, norm_weight, norm_bias, weight, bias, mask, stats = ctx.saved_tensors
        groups, eps, dy = ctx.groups, ctx.eps, dy.contiguous()
        dx = dnorm_weight = dnorm_bias = dweight = dbias = None
        needs_x, _, needs_norm_weight, needs_norm_bias, needs_weight, needs_bias = ctx.needs_input_grad[:6]
        if needs_bias:
            sums = dy.sum((1, 2), dtype=torch.float32)
            dbias = (sums if mask is None else sums.masked_fill(mask[:, None], 0)).sum(0).to(bias.dtype)
        if needs_weight:
            if fused(x.shape[-1], x.dtype):
                h, affine = x, norm.fold(stats, groups, norm_weight, norm_bias, None, None, eps)
            else:
                h, affine = _activated(x, stats, groups, norm_weight, norm_bias, eps), (None, None)
            dweight = _weight_gradient(h, *affine, dy, mask).to(weight.dtype).contiguous()
            del h
        if needs_x or needs_norm_weight or needs_norm_bias:
            dh = _input_gradient(dy, weight, mask)
            dx, dnorm_weight, dnorm_bias, _, _ = norm.backward(x.flatten(0, 1), dh.flatten(0, 1), stats, groups, norm_weight, norm_bias,
                                                               None, None, eps, add=dy.flatten(0, 1))
            dx = dx.view(x.shape)
        return dx, None, dnorm_weight, dnorm_bias, dweight, dbias, None, None, None, None


def temporal_conv_block(x: Tensor, groups: int, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor,
                        independent_frames: Tensor | None, eps: float, stats: Tensor | None, next_groups: int | None,
                        inplace: bool) -> tuple[Tensor, Tensor | None]:
    """The op, on arguments that the door checked.

    Shapes: x [B, T, P, C]; norm_weight, norm_bias, bias [C]; weight [C, C, 3]; independent_frames bool [B] or None; stats of x, fp32
    [B * T, groups, 2], or None: they are computed -> (y like x, its statistics [B * T, next_groups, 2] or None without next_groups).
    `inplace`, where no gradient is recorded: y takes x's memory and masked samples are not touched, except at 128 < C <= 256 in bf16 and
    fp16, whose kernel reads frames that others write. The result is the same either way; x is lost.
    """
    x, norm_weight, norm_bias, bias = x.contiguous(), norm_weight.contiguous(), norm_bias.contiguous(), bias.contiguous()
    mask = None if independent_frames is None else independent_frames.contiguous()
    stats = norm.frame_statistics(x.detach().flatten(0, 1), groups) if stats is None else stats.contiguous()
    if not torch.is_grad_enabled():
        return _forward(x, groups, norm_weight, norm_bias, weight, bias, mask, eps, stats, next_groups, inplace)
    return _TemporalConvBlock.apply(x, groups, norm_weight, norm_bias, weight, bias, mask, eps, stats, next_groups)


def reference(x: Tensor, groups: int, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor,
              independent_frames: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """The definition, in PyTorch. Shapes as in `temporal_conv_block`."""
    h = group_norm_silu_reference(x.flatten(0, 1)[:, None], groups, norm_weight, norm_bias, eps=eps)
    branch = temporal_conv(h.view(*x.shape[:2], 1, *x.shape[2:]), weight, bias)[:, :, 0]
    if independent_frames is None:
        return x + branch
    return torch.where(independent_frames[:, None, None, None], x, x + branch)


def self_check(device: torch.device, dtype: torch.dtype) -> None:
    """A small mixed batch for each form that this dtype takes: output, its statistics and every gradient. Raises: RuntimeError."""
    names, generator = ("x", "norm_weight", "norm_bias", "weight", "bias"), torch.Generator().manual_seed(0)
    tf32 = dtype == torch.float32 and device.type == "cuda" and _tf32()    # as it is: what will run is what is checked
    roundings = 4.0 * 2**13 if tf32 else 16.0
    mask = torch.tensor([False, True], device=device)
    for C, P in ((32, 70), (40, 70)) if dtype == torch.float32 else ((32, 130), (128, 70), (136, 40), (264, 20)):
        shapes = ((2, 3, P, C), (C,), (C,), (C, C, 3), (C,), (2, 3, P, C))
        *inputs, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
        inputs[3] *= C**-0.5
        leaves = [t.to(device, dtype).requires_grad_() for t in inputs]
        wide = [t.detach().double().requires_grad_() for t in leaves]
        dy = dy.to(device, dtype)
        y, stats = temporal_conv_block(leaves[0], 8, *leaves[1:], mask, 1e-5, None, 4, False)
        got = torch.autograd.grad(y, leaves, dy)
        want = reference(wide[0], 8, *wide[1:], mask)
        exact = torch.autograd.grad(want, wide, dy.double())
        require_agreement(f"temporal_conv_block with C = {C}", y.detach(), want.detach(), roundings)
        for name, a, b in zip(names, got, exact):
            require_agreement(f"temporal_conv_block's gradient of {name} with C = {C}", a, b, roundings)
        var, mean = torch.var_mean(y.detach().double().flatten(0, 1).unflatten(-1, (4, -1)), (1, 3), correction=0)
        require_agreement(f"temporal_conv_block's statistics with C = {C}", stats, torch.stack((mean, var), -1))


def aot_cases() -> list[Case]:
    """Each kernel at the widths of the cascade's stages: with everything (mask, statistics) and with nothing, forward and backward."""
    found = []

    def add(name: str, kernel, dtype: torch.dtype, chosen: dict[str, int], absent: tuple[str, ...] = (), **constants) -> None:
        options = {k: v for k, v in chosen.items() if k.startswith("num_")}
        constants |= {k: v for k, v in chosen.items() if k not in options}
        wide = {"gain_ptr": torch.float32, "offset_ptr": torch.float32, "partials_ptr": torch.float32, "mask_ptr": torch.bool}
        arguments = {k: None if k in absent else wide.get(k, dtype) if k.endswith("_ptr") else "i32"
                     for k in kernel.arg_names if k not in constants}
        room = WIDE_ROLLING_BYTES if kernel is kernels.rolling and constants["BLOCK_C"] == 128 else 0
        found.append(Case(f"tconv {name} {TYPES[dtype]}", kernel, arguments, constants, options, room))

    plain = ("gain_ptr", "offset_ptr", "bias_ptr", "partials_ptr")
    widths = {torch.float32: (32, 512), torch.bfloat16: (32, 64, 128, 192, 256, 512), torch.float16: (128, 256, 512)}
    for dtype in DTYPES:
        for C in widths[dtype]:
            precisions = ("ieee", "tf32") if dtype == torch.float32 else ("ieee",)
            for precision in precisions:
                common = {"C": C, "PRECISION": precision}
                label = f"C={C} {precision}" if dtype == torch.float32 else f"C={C}"
                if fused(C, dtype):
                    kernel, chosen = config(C, dtype)
                    extra = {"INPLACE": False} if kernel is kernels.rolling else {}
                    name = f"{kernel.__name__} {label}"
                    add(f"{name} mask statistics", kernel, dtype, chosen, ACTIVATE=True, RESIDUAL=True, **common, **extra)
                    add(f"{name}", kernel, dtype, chosen, ("mask_ptr", "partials_ptr"), ACTIVATE=True, RESIDUAL=True, **common, **extra)
                    add(f"{name} gradient mask", kernel, dtype, chosen, plain, ACTIVATE=False, RESIDUAL=False, **common, **extra)
                absent = () if fused(C, dtype) else plain[:2]
                add(f"weight_gradient {label} mask", kernels.weight_gradient, dtype, weight_config(C, dtype), absent,
                    ACTIVATE=not absent, **common)
            if not fused(C, dtype):
                add(f"add_residual C={C} mask statistics", kernels.add_residual, dtype, ADD_CONFIG, C=C, INPLACE=False)
    return found
