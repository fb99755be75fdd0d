"""The residual convolution over three frames, bypassed for independent frames: x + conv(silu(norm(x))), or x.

In PyTorch the convolution is a 2-D one on a view, the image of height T and width H*W: no copies, and cuDNN and oneDNN run it at full speed
in channels last, where Conv3d takes slow or faulty paths. On a GPU the narrow widths, where memory is the limit, are one Triton kernel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import use_triton
from .group_norm_silu import check_norm, check_stats, group_norm_silu


def temporal_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolution along T with zero padding.

    Shapes: x [B, T, H, W, C]; weight [C_out, C, k], k odd; bias [C_out] -> [B, T, H, W, C_out].
    Raises: ValueError if the weight is for another width, or even.
    Source: Imagen Video Sec. 2.1 (temporal convolutions of the super-resolution models).
    """
    B, T, H, W, C = x.shape
    if weight.ndim != 3 or weight.shape[1] != C or weight.shape[2] % 2 == 0:
        raise ValueError(f"weight: want [C_out, {C}, odd], got {[*weight.shape]}")
    image = x.reshape(B, T, H * W, C).permute(0, 3, 1, 2)
    out = F.conv2d(image, weight[..., None], bias, padding=(weight.shape[-1] // 2, 0))
    return out.permute(0, 2, 3, 1).reshape(B, T, H, W, -1)


def temporal_conv_block(x: Tensor, groups: int, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor,
                        independent_frames: Tensor | None = None, eps: float = 1e-5, *, stats: Tensor | None = None,
                        next_groups: int | None = None, inplace: bool = False) -> tuple[Tensor, Tensor | None]:
    """x + conv(silu(group_norm(x))) along T for videos; x for samples of independent frames.

    Shapes: x [B, T, H, W, C]; norm_weight, norm_bias, bias [C]; weight [C, C, 3]; independent_frames bool [B] or None; stats fp32
    [B*T, groups, 2] = (mean, biased variance) of x per frame, or None: computed -> y like x, and the statistics of y for a GroupNorm
    of next_groups groups, fp32 [B*T, next_groups, 2], or None where they do not come in the same pass (or next_groups is None).
    `inplace` allows y to be written over x, so that bypassed samples cost nothing; only without gradients, and only a permission.
    Where every sample is bypassed, y may be x itself.
    Raises: ValueError if a shape is another, the mask is not bool, or inplace is asked for with gradients.
    Source: paper Sec. 4.2 ("masking the residual temporal convolution blocks").
    """
    B, T, H, W, C = x.shape
    check_norm(C, groups, norm_weight, norm_bias)
    check_stats(stats, B * T, groups)
    if weight.shape != (C, C, 3) or bias.shape != (C,):
        raise ValueError(f"weight, bias: want [{C}, {C}, 3], [{C}], got {[*weight.shape]}, {[*bias.shape]}")
    if independent_frames is not None and (independent_frames.dtype != torch.bool or independent_frames.shape != (B,)):
        raise ValueError(f"independent_frames: want bool [{B}], got {independent_frames.dtype} {[*independent_frames.shape]}")
    if next_groups is not None and C % next_groups:
        raise ValueError(f"next_groups: want a divisor of C = {C}, got {next_groups}")
    if inplace and torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        raise ValueError("inplace: want no gradients, got a tensor that requires them")

    if use_triton("temporal_conv", x):
        from . import temporal_conv_triton as gpu
        if gpu.supported(x, weight):
            rows = x.reshape(B, T, H * W, C)
            y, after = gpu.temporal_conv_block(rows, groups, norm_weight, norm_bias, weight, bias, independent_frames, eps, stats,
                                               next_groups, inplace)
            return y.view(x.shape), after

    def branch(x, stats):
        h = group_norm_silu(x.flatten(0, 1), groups, norm_weight, norm_bias, eps=eps, stats=stats).unflatten(0, (-1, T))
        return temporal_conv(h, weight, bias)

    if independent_frames is None or not independent_frames.any():
        return branch(x, stats).add_(x), None
    video = (~independent_frames).nonzero().squeeze(1)
    if video.numel() == 0:
        # the parameters stay in the graph with a zero gradient: every rank of ZeRO-3 sees the same set
        parameters = (norm_weight, norm_bias, weight, bias)
        return x + 0 * sum(p.sum() for p in parameters) if torch.is_grad_enabled() else x, None
    part = branch(x[video], None if stats is None else stats.unflatten(0, (B, T))[video].flatten(0, 1))
    return (x.index_add_(0, video, part) if inplace else x.index_add(0, video, part)), None
