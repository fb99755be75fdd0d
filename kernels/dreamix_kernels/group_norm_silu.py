"""GroupNorm, FiLM and SiLU: silu(norm(x) * (1 + scale) + shift), statistics per frame. The prologue of every convolution.

Statistics of one frame never see another frame: isolation of independent frames (paper Sec. 4.2) rests on it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def group_norm_silu_reference(x: Tensor, groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None = None,
                              shift: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """The definition, in PyTorch's own GroupNorm. Shapes as in `group_norm_silu`."""
    h = F.group_norm(x.movedim(-1, 1), groups, weight, bias, eps).movedim(1, -1)
    if scale is not None:
        h = h * (1 + scale[:, None, None]) + shift[:, None, None]
    return F.silu(h)


CHUNK_ELEMENTS = 1 << 18               # frames are taken a few at a time on the CPU: 1 MiB of fp32 stays in the second-level cache
GRAIN_ELEMENTS, VECTOR_ELEMENTS = 32768, 32     # ATen's: the smallest share of a thread, and what a vectorised loop takes at a time


def _chunks(x: Tensor) -> list[slice]:
    N, P, C = x.shape
    step = max(1, CHUNK_ELEMENTS // (P * C)) if x.device.type == "cpu" else N
    return [slice(n, n + step) for n in range(0, N, step)]


def _buffer(shape: torch.Size, like: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised memory (flat, its view in `shape`), padded so that no thread's share ends inside a vector.

    The last elements of a share go through the scalar exp, whose last bit is another than the vectorised one's: without the padding
    silu's bits would depend on the number of threads and on the frames beside.
    """
    numel = shape.numel()
    shares = min(torch.get_num_threads(), -(-numel // GRAIN_ELEMENTS)) * VECTOR_ELEMENTS
    flat = like.new_empty(-(-numel // shares) * shares if like.device.type == "cpu" else numel)
    return flat, flat[:numel].view(shape)


def _group_mean(s: Tensor, groups: int) -> Tensor:
    """Means over the channels of each group, at every channel.   s [n, C] -> [n, C]"""
    means = s.view(-1, groups, s.shape[-1] // groups).mean(-1, keepdim=True)
    return means.expand(-1, -1, s.shape[-1] // groups).reshape(s.shape)


class _GroupNormSiLU(torch.autograd.Function):
    """Everything per (frame, channel) folds into one multiply-add over x; backward recomputes its result instead of saving it.

    All arithmetic is in fp32 (fp64 for fp64), around a pivot near the mean: E[x^2] - E[x]^2 cancels when a mean is far from zero.
    """

    @staticmethod
    def forward(ctx, x, groups, weight, bias, scale, shift, eps):
        N, P, C = x.shape
        wide = torch.promote_types(x.dtype, torch.float32)
        pivot = _group_mean(x[:, 0].to(wide), groups)                                           # [N, C], the first pixel's
        film = 1 if scale is None else 1 + scale.to(wide)
        affine = (weight.to(wide) * film).expand(N, C)
        add = (bias.to(wide) * film + (0 if shift is None else shift.to(wide))).expand(N, C)
        mean, rstd, gain, offset = torch.empty(4, N, C, dtype=wide, device=x.device)            # mean: above the pivot
        y = torch.empty_like(x)
        for n in _chunks(x):
            flat, f = _buffer(x[n].shape, pivot)
            f.copy_(x[n]).sub_(pivot[n, None])
            mean[n] = _group_mean(f.sum(1) / P, groups)
            var = _group_mean(f.square().sum(1) / P, groups) - mean[n] * mean[n]
            rstd[n] = torch.rsqrt(var.clamp_min(0) + eps)
            gain[n] = rstd[n] * affine[n]
            offset[n] = add[n] - mean[n] * gain[n]
            torch.addcmul(offset[n, None], f, gain[n, None], out=f)
            F.silu(flat, inplace=True)
            y[n] = f
        ctx.groups = groups
        ctx.save_for_backward(x, pivot, mean, rstd, gain, offset, weight, bias, scale)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, pivot, mean, rstd, gain, offset, weight, bias, scale = ctx.saved_tensors
        N, P, C = x.shape
        wide, groups, dy = pivot.dtype, ctx.groups, dy.contiguous()
        film = 1 if scale is None else 1 + scale.to(wide)
        affine = (weight.to(wide) * film).expand(N, C)
        doffset, dnormed, dx = torch.empty_like(pivot), torch.empty_like(pivot), torch.empty_like(x)
        for n in _chunks(x):
            f = x[n].to(wide) - pivot[n, None]
            (flat_u, u), (flat_du, du) = _buffer(f.shape, f), _buffer(f.shape, f)
            torch.addcmul(offset[n, None], f, gain[n, None], out=u)                             # normalised * affine + add
            du.copy_(dy[n])
            torch.ops.aten.silu_backward(flat_du, flat_u, grad_input=flat_du)
            doffset[n] = du.sum(1)
            dnormed[n] = ((du * f).sum(1) - mean[n] * doffset[n]) * rstd[n]                     # sum of du * normalised
            # through the statistics: dx = du * gain - rstd * (mean of g + normalised * mean of g * normalised), g = du * affine
            g1, g2 = _group_mean(doffset[n] * affine[n] / P, groups), _group_mean(dnormed[n] * affine[n] / P, groups)
            a = -rstd[n].square() * g2
            b = -a * mean[n] - rstd[n] * g1
            dx[n] = torch.addcmul(b[:, None], f, a[:, None], out=f).addcmul_(du, gain[n, None])
        dweight, dbias = (dnormed * film).sum(0), (doffset * film).sum(0)
        dscale = dshift = None
        if scale is not None:
            dscale = (dnormed * weight.to(wide) + doffset * bias.to(wide)).to(scale.dtype)
            dshift = doffset.to(scale.dtype)
        return dx, None, dweight.to(weight.dtype), dbias.to(bias.dtype), dscale, dshift, None


def group_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None = None, shift: Tensor | None = None,
                    eps: float = 1e-5) -> Tensor:
    """GroupNorm with per-frame statistics, FiLM, SiLU.

    Shapes: x [N, H, W, C] (N frames); weight, bias [C]; scale, shift [N, C] or None -> like x. Arithmetic in fp32 (fp64 for fp64).
    Raises: ValueError if groups does not divide C, or if a shape is another.
    Source: Wu & He 2018; FiLM as in Dhariwal & Nichol 2021; per-frame statistics because temporal mixing must be the only mixing.
    """
    N, C = x.shape[0], x.shape[-1]
    if C % groups:
        raise ValueError(f"groups: want a divisor of C = {C}, got {groups}")
    if not weight.shape == bias.shape == (C,):
        raise ValueError(f"weight, bias: want [{C}], got {[*weight.shape]}, {[*bias.shape]}")
    if (scale is None) != (shift is None):
        raise ValueError("scale, shift: want both or neither")
    if scale is not None and not scale.shape == shift.shape == (N, C):
        raise ValueError(f"scale, shift: want [N, C] = {[N, C]}, got {[*scale.shape]}, {[*shift.shape]}")
    return _GroupNormSiLU.apply(x.reshape(N, -1, C), groups, weight, bias, scale, shift, eps).view(x.shape)
