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


def _group_statistics(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1/std of each group in each frame, fp32.   x [N, P, C] -> two of [N, groups]

    Squares are taken around a pivot pixel: E[x^2] - E[x]^2 cancels when a mean is far from zero. Two sweeps over one fp32 copy.
    """
    N, P, C = x.shape
    pivot = x[:, :1].float()
    centred = x.float() - pivot
    mean = centred.sum(1) / P
    square = centred.square_().sum(1) / P
    spread, mean = (square - mean * mean).view(N, groups, -1), (mean + pivot[:, 0]).view(N, groups, -1)
    group_mean = mean.mean(-1)
    var = (spread + (mean - group_mean[..., None]) ** 2).mean(-1)          # within the channels, and between them
    return group_mean, torch.rsqrt(var.clamp_min(0) + eps)


class _GroupNormSiLU(torch.autograd.Function):
    """Everything per (frame, channel) folds into one multiply-add over x; backward recomputes its result instead of saving it."""

    @staticmethod
    def forward(ctx, x, groups, weight, bias, scale, shift, eps):
        N, P, C = x.shape
        mean, rstd = _group_statistics(x, groups, eps)
        film = None if scale is None else 1 + scale.float()
        affine = weight.float() if film is None else weight.float() * film                     # [C] or [N, C]
        gain = rstd.repeat_interleave(C // groups, 1) * affine
        offset = bias.float() if film is None else bias.float() * film + shift.float()
        offset = offset - mean.repeat_interleave(C // groups, 1) * gain
        gain, offset = gain.to(x.dtype)[:, None], offset.to(x.dtype)[:, None]
        ctx.groups = groups
        ctx.save_for_backward(x, gain, offset, mean, rstd, weight, bias, scale)
        return F.silu(torch.addcmul(offset, x, gain))

    @staticmethod
    def backward(ctx, dy):
        x, gain, offset, mean, rstd, weight, bias, scale = ctx.saved_tensors
        N, P, C = x.shape
        groups, size = ctx.groups, P * (C // ctx.groups)
        du = torch.ops.aten.silu_backward(dy.contiguous(), torch.addcmul(offset, x, gain))      # u = normalised * affine + shift
        doffset = du.float().sum(1) if x.dtype == torch.float32 else du.sum(1).float()          # [N, C]: sum of du
        product = (du * x).sum(1).float()                                                       # [N, C]: sum of du * x
        mean_c, rstd_c = (s.repeat_interleave(C // groups, 1) for s in (mean, rstd))
        dnormed = (product - mean_c * doffset) * rstd_c                                         # [N, C]: sum of du * normalised
        film = 1.0 if scale is None else 1 + scale.float()
        affine = weight.float() * film
        dweight, dbias = (dnormed * film).sum(0), (doffset * film).sum(0)
        dscale = dshift = None
        if scale is not None:
            dscale = (dnormed * weight.float() + doffset * bias.float()).to(scale.dtype)
            dshift = doffset.to(scale.dtype)
        # through the statistics: dx = du * gain - rstd * (mean of g + normalised * mean of g * normalised), g = du * affine
        g1 = (doffset * affine).expand(N, C).view(N, groups, -1).sum(-1) / size
        g2 = (dnormed * affine).expand(N, C).view(N, groups, -1).sum(-1) / size
        a = -(rstd * rstd * g2).repeat_interleave(C // groups, 1)
        b = (rstd * rstd * mean * g2 - rstd * g1).repeat_interleave(C // groups, 1)
        dx = torch.addcmul(b.to(x.dtype)[:, None], x, a.to(x.dtype)[:, None]).addcmul_(du, gain)
        return dx, None, dweight.to(weight.dtype), dbias.to(bias.dtype), dscale, dshift, None


def group_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None = None, shift: Tensor | None = None,
                    eps: float = 1e-5) -> Tensor:
    """GroupNorm with per-frame statistics, FiLM, SiLU.

    Shapes: x [N, H, W, C] (N frames); weight, bias [C]; scale, shift [N, C] or None -> like x. Statistics in fp32.
    Raises: ValueError if groups does not divide C, or if scale and shift are not [N, C].
    Source: Wu & He 2018; FiLM as in Dhariwal & Nichol 2021; per-frame statistics because temporal mixing must be the only mixing.
    """
    N, C = x.shape[0], x.shape[-1]
    if C % groups:
        raise ValueError(f"groups: want a divisor of C = {C}, got {groups}")
    if scale is not None and not scale.shape == shift.shape == (N, C):
        raise ValueError(f"scale, shift: want [N, C] = {[N, C]}, got {[*scale.shape]}, {[*shift.shape]}")
    return _GroupNormSiLU.apply(x.reshape(N, -1, C), groups, weight, bias, scale, shift, eps).view(x.shape)
