"""GroupNorm, FiLM and SiLU: silu(norm(x) * (1 + scale) + shift), statistics per frame. The prologue of every convolution.

Statistics of one frame never see another frame: isolation of independent frames (paper Sec. 4.2) rests on it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def _frame_statistics(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1/std per frame and group, fp32.   x [N, P, C] -> two of [N, groups]

    One pass for sums, one for squares around a pivot pixel: E[x^2] - E[x]^2 cancels when a group's mean is far from zero.
    """
    N, P, C = x.shape
    pivot = x[:, :1].detach()
    centred = (x - pivot).float()
    count = P * (C // groups)
    pivot = pivot.float().view(N, groups, -1)
    # over channels of a group the pivots differ, so moments are gathered per channel, then combined exactly
    mean = centred.mean(1).view(N, groups, -1)
    spread = (centred * centred).mean(1).view(N, groups, -1) - mean * mean
    channel_mean = mean + pivot
    group_mean = channel_mean.mean(-1)
    var = (spread + (channel_mean - group_mean[..., None]) ** 2).mean(-1)
    del count
    return group_mean, torch.rsqrt(var.clamp_min(0) + eps)


def group_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None = None, shift: Tensor | None = None,
                    eps: float = 1e-5) -> Tensor:
    """GroupNorm with per-frame statistics, FiLM, SiLU.

    Shapes: x [N, H, W, C] (N frames); weight, bias [C]; scale, shift [N, C] or None -> like x. Arithmetic of the statistics in fp32.
    Raises: ValueError if groups does not divide C.
    Source: Wu & He 2018; FiLM as in Dhariwal & Nichol 2021; per-frame statistics: DESIGN.md section 2.
    """
    N, C = x.shape[0], x.shape[-1]
    if C % groups:
        raise ValueError(f"groups: want a divisor of C = {C}, got {groups}")
    mean, rstd = _frame_statistics(x.view(N, -1, C), groups, eps)
    # everything per (frame, channel) folds into one multiply-add over x
    gain = rstd.repeat_interleave(C // groups, 1) * weight.float()
    offset = bias.float() - mean.repeat_interleave(C // groups, 1) * gain
    if scale is not None:
        gain, offset = gain * (1 + scale.float()), offset * (1 + scale.float()) + shift.float()
    gain, offset = gain.to(x.dtype)[:, None, None], offset.to(x.dtype)[:, None, None]
    return F.silu(torch.addcmul(offset, x, gain))
