"""Convolution over time, kernel 3, as a 2-D convolution on a view: the image of height T and width H*W. No copies.

cuDNN and oneDNN run it at full speed in channels last, where Conv3d takes slow or faulty paths (PERFORMANCE.md 3.2 and 4).
"""

import torch.nn.functional as F
from torch import Tensor


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
