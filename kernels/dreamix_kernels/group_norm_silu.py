"""GroupNorm, FiLM and SiLU: silu(norm(x) * (1 + scale) + shift), statistics per frame. The prologue of every convolution.

Statistics of one frame never see another frame: isolation of independent frames (paper Sec. 4.2) rests on it. Where a kernel before this
one has already seen every element, it hands the statistics on, and x is read once less.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import native
from .dispatch import use_native, use_triton


def group_norm_silu_reference(x: Tensor, groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None = None,
                              shift: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """The definition, in PyTorch's own GroupNorm. Shapes as in `group_norm_silu`."""
    h = F.group_norm(x.movedim(-1, 1), groups, weight, bias, eps).movedim(1, -1)
    if scale is not None:
        h = h * (1 + scale[:, None, None]) + shift[:, None, None]
    return F.silu(h)


# frames are taken a few at a time on the CPU: two buffers of 512 KiB of fp32 stay in the second-level cache
CHUNK_ELEMENTS = 1 << 17
GRAIN_ELEMENTS, VECTOR_ELEMENTS = 32768, 32     # ATen's: the smallest share of a thread, and what a vectorised loop takes at a time


def _step(x: Tensor) -> int:
    """How many frames of x [N, P, C] are taken at a time."""
    return max(1, CHUNK_ELEMENTS // (x.shape[1] * x.shape[2])) if x.device.type == "cpu" else len(x)


def _even(numel: int) -> int:
    """The next number of elements at which no thread's share ends inside a vector.

    The last elements of a share go through the scalar exp, whose last bit is another than the vectorised one's: silu's bits would
    depend on the number of threads and on the frames beside.
    """
    shares = min(torch.get_num_threads(), -(-numel // GRAIN_ELEMENTS)) * VECTOR_ELEMENTS
    return -(-numel // shares) * shares


def _buffer(shape: torch.Size, like: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised memory (flat and even, its view in `shape`)."""
    numel = shape.numel()
    flat = like.new_empty(_even(numel) if like.device.type == "cpu" else numel)
    return flat, flat[:numel].view(shape)


def _group_mean(s: Tensor, groups: int) -> Tensor:
    """Means over the channels of each group, at every channel.   s [n, C] -> [n, C]"""
    means = s.view(-1, groups, s.shape[-1] // groups).mean(-1, keepdim=True)
    return means.expand(-1, -1, s.shape[-1] // groups).reshape(s.shape)


def _moments(x: Tensor, groups: int, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each frame's groups, at every channel.   x [N, P, C] -> [N, C], [N, C] in `wide`

    Squares are summed around each channel's own mean, while the frame is in the cache: E[x^2] - E[x]^2 would lose the digits of a large
    mean.
    """
    N, P, C = x.shape
    step = _step(x)
    means, squares = torch.empty(2, N, C, dtype=wide, device=x.device)
    scratch = torch.empty(min(step, N), P, C, dtype=wide, device=x.device)
    for part, m, q in zip(x.split(step), means.split(step), squares.split(step)):
        f = part if part.dtype == wide else scratch[: len(part)].copy_(part)
        torch.sum(f, 1, out=m)
        f = torch.sub(f, m.div_(P)[:, None], out=scratch[: len(part)])
        torch.sum(torch.mul(f, f, out=f), 1, out=q)
    mean = _group_mean(means, groups)
    return mean, _group_mean(squares.div_(P) + (means - mean).square_(), groups)


def _affine(weight, bias, scale, shift, wide):
    """GroupNorm's affine parameters and FiLM as one multiply-add of the normalised x: [N or 1, C] each."""
    film = 1 if scale is None else 1 + scale.to(wide)
    affine, add = (weight.to(wide) * film).view(-1, len(weight)), (bias.to(wide) * film).view(-1, len(weight))
    return affine, add if shift is None else add + shift.to(wide)


def _forward(x, groups, weight, bias, scale, shift, eps, stats, compiled):
    """Everything per (frame, channel) folds into one multiply-add over x [N, P, C].   -> y, (mean, rstd, gain, offset), each [N, C]"""
    C = x.shape[-1]
    wide, step = torch.promote_types(x.dtype, torch.float32), _step(x)
    affine, add = _affine(weight, bias, scale, shift, wide)
    if compiled:
        return native.norm_forward(x, groups, affine, add, eps, stats)
    if stats is None:
        mean, var = _moments(x, groups, wide)
    else:
        mean, var = (s.to(wide).repeat_interleave(C // groups, 1) for s in stats.unbind(-1))
    rstd = torch.rsqrt(var + eps)
    gain = rstd * affine
    offset = torch.addcmul(add.expand_as(mean), mean, gain, value=-1)
    y = torch.empty_like(x)
    flat = f = None
    for part, out, g, o in zip(x.split(step), y.split(step), gain[:, None].split(step), offset[:, None].split(step)):
        if f is None or f.shape != part.shape:
            flat, f = _buffer(part.shape, gain)
        torch.addcmul(o, part if part.dtype == wide else f.copy_(part), g, out=f)
        if x.dtype == wide and flat.shape[0] == f.numel():
            torch.ops.aten.silu.out(flat, out=out.view(-1))
        else:
            F.silu(flat, inplace=True)
            out.copy_(f)
    return y, (mean, rstd, gain, offset)


class GroupNormSiLU(torch.autograd.Function):
    """The op on x [N, P, C]; backward recomputes the forward's result instead of saving it. All arithmetic is in fp32 (fp64 for fp64).

    `compiled`: by the C++ kernels. One of the two kinds runs in both directions.
    """

    @staticmethod
    def forward(ctx, x, groups, weight, bias, scale, shift, eps, stats, compiled):
        y, folded = _forward(x, groups, weight, bias, scale, shift, eps, stats, compiled)
        ctx.groups, ctx.compiled = groups, compiled
        ctx.save_for_backward(x, *folded, weight, bias, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, mean, rstd, gain, offset, weight, bias, scale = ctx.saved_tensors
        wide, dy = gain.dtype, dy.contiguous()
        film = 1 if scale is None else 1 + scale.to(wide)
        affine = (weight.to(wide) * film).view(-1, x.shape[-1])
        if ctx.compiled:
            dx, doffset, dnormed = native.norm_backward(x, dy, ctx.groups, affine, (mean, rstd, gain, offset))
        else:
            dx, doffset, dnormed = _backward(x, dy, ctx.groups, affine.expand_as(gain), mean, rstd, gain, offset)
        dweight, dbias = (dnormed * film).sum(0), (doffset * film).sum(0)
        dscale = dshift = None
        if scale is not None:
            dscale = (dnormed * weight.to(wide) + doffset * bias.to(wide)).to(scale.dtype)
            dshift = doffset.to(scale.dtype)
        return dx, None, dweight.to(weight.dtype), dbias.to(bias.dtype), dscale, dshift, None, None, None


def _backward(x, dy, groups, affine, mean, rstd, gain, offset):
    """dx, and per frame the sums over pixels of du and of du * normalised; du is the gradient before SiLU.   -> [N, P, C], [N, C], [N,
    C]"""
    N, P, _ = x.shape
    wide, step = gain.dtype, _step(x)
    doffset, dnormed, dx = torch.empty_like(gain), torch.empty_like(gain), torch.empty_like(x)
    for n in (slice(i, i + step) for i in range(0, N, step)):
        f = x[n].to(wide) - mean[n, None]
        (flat_u, u), (flat_du, du) = _buffer(f.shape, f), _buffer(f.shape, f)
        torch.addcmul(offset[n, None], x[n].to(wide), gain[n, None], out=u)                 # normalised * affine + add
        du.copy_(dy[n])
        torch.ops.aten.silu_backward(flat_du, flat_u, grad_input=flat_du)
        doffset[n] = du.sum(1)
        dnormed[n] = torch.mul(du, f, out=u).sum(1) * rstd[n]
        # through the statistics: dx = du * gain - rstd * (mean of g + normalised * mean of g * normalised), g = du * affine
        g1, g2 = _group_mean(doffset[n] * affine[n] / P, groups), _group_mean(dnormed[n] * affine[n] / P, groups)
        a, b = -rstd[n].square() * g2, -rstd[n] * g1
        dx[n] = torch.addcmul(b[:, None], f, a[:, None], out=f).addcmul_(du, gain[n, None])
    return dx, doffset, dnormed


def group_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None = None, shift: Tensor | None = None,
                    eps: float = 1e-5, *, stats: Tensor | None = None) -> Tensor:
    """GroupNorm with per-frame statistics, FiLM, SiLU.

    Shapes: x [N, H, W, C] (N frames); weight, bias [C]; scale, shift [N, C] or None; stats fp32 [N, groups, 2] = (mean, biased variance) of
    x, from the op that made it, or None -> like x. Arithmetic in fp32 (fp64 for fp64). The gradient is that of the whole function
    of x, whether or not the statistics came from outside.
    Raises: ValueError if groups does not divide C, or if a shape is another.
    Source: Wu & He 2018; FiLM as in Dhariwal & Nichol 2021; per-frame statistics because temporal mixing must be the only mixing.
    """
    N, C = x.shape[0], x.shape[-1]
    check_norm(C, groups, weight, bias)
    if (scale is None) != (shift is None):
        raise ValueError("scale, shift: want both or neither")
    if scale is not None and not scale.shape == shift.shape == (N, C):
        raise ValueError(f"scale, shift: want [N, C] = {[N, C]}, got {[*scale.shape]}, {[*shift.shape]}")
    check_stats(stats, N, groups)
    rows = x.reshape(N, -1, C)
    if use_triton("group_norm_silu", x):
        from . import group_norm_silu_triton as gpu
        return gpu.group_norm_silu(rows, groups, weight, bias, scale, shift, eps, stats).view(x.shape)
    compiled = use_native("group_norm_silu", x)
    op = GroupNormSiLU.apply if torch.is_grad_enabled() else lambda *args: _forward(*args)[0]
    return op(rows.contiguous(), groups, weight, bias, scale, shift, eps, stats, compiled).view(x.shape)


def add_statistics(a: Tensor, b: Tensor, groups: int) -> tuple[Tensor, Tensor | None]:
    """a + b, and the statistics of the sum for the GroupNorm that reads it, where they come in the same pass: on a GPU.

    Shapes: a, b [N, H, W, C] -> like a, fp32 [N, groups, 2] = (mean, biased variance) per frame, or None.
    Without gradients the sum may be written over b.
    Raises: ValueError if the shapes differ or groups does not divide C.
    """
    if a.shape != b.shape:
        raise ValueError(f"b: want the shape of a = {[*a.shape]}, got {[*b.shape]}")
    N, C = a.shape[0], a.shape[-1]
    if C % groups:
        raise ValueError(f"groups: want a divisor of C = {C}, got {groups}")
    if a.dtype == b.dtype and use_triton("group_norm_silu", a):
        from . import group_norm_silu_triton as gpu
        total, stats = gpu.add_statistics(a.reshape(N, -1, C), b.reshape(N, -1, C), groups)
        return total.view(a.shape), stats
    return (a + b if torch.is_grad_enabled() or a.dtype != b.dtype else b.add_(a)), None


def check_norm(C: int, groups: int, weight: Tensor, bias: Tensor) -> None:
    """ValueError unless groups divides C and the affine parameters are [C]."""
    if C % groups:
        raise ValueError(f"groups: want a divisor of C = {C}, got {groups}")
    if not weight.shape == bias.shape == (C,):
        raise ValueError(f"weight, bias: want [{C}], got {[*weight.shape]}, {[*bias.shape]}")


def check_stats(stats: Tensor | None, N: int, groups: int) -> None:
    """ValueError unless stats are None or fp32 [N, groups, 2]."""
    if stats is not None and (stats.shape != (N, groups, 2) or stats.dtype != torch.float32):
        raise ValueError(f"stats: want fp32 [N, groups, 2] = {[N, groups, 2]}, got {stats.dtype} {[*stats.shape]}")
