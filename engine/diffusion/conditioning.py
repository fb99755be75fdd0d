"""How a stage meets the one before it: upsampling what it is given, and the residual it may diffuse instead of the picture."""

import torch
import torch.nn.functional as F
from torch import Tensor


def resize(video: Tensor, height: int, width: int) -> Tensor:
    """Bilinear, antialiased when it shrinks.   [B, T, H, W, C] -> [B, T, height, width, C]

    Source: Imagen Video Sec. 2.1 (bilinear resizing on the way up, anti-aliased bilinear on the way down).
    """
    B, T, H, W, _ = video.shape
    if (H, W) == (height, width):
        return video
    image = video.flatten(0, 1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=(height, width), mode="bilinear", antialias=height < H or width < W, align_corners=False)
    return image.permute(0, 2, 3, 1).contiguous().unflatten(0, (B, T))


def upsample(video: Tensor, frames: int, height: int, width: int, temporal: str = "repeat") -> Tensor:
    """The conditioning video at the size of the stage that will use it.   [B, t, h, w, C] -> [B, frames, height, width, C]

    temporal: how the frames between the given ones are filled. Given frame i stands at i * frames / t, as frame skipping left it.
    "repeat" holds it, "blank" leaves zeros, "linear" blends towards the next one (the last is held).
    Source: Imagen Video Sec. 2.1 ("repeating frames or filling in blank frames").
    """
    B, t = video.shape[:2]
    if frames % t:
        raise ValueError(f"frames: want a multiple of the video's {t}, got {frames}")
    video = resize(video, height, width)
    factor = frames // t
    if factor == 1:
        return video
    if temporal == "repeat":
        return video.repeat_interleave(factor, 1)
    out = video.new_zeros(B, t, factor, *video.shape[2:])
    out[:, :, 0] = video
    if temporal == "linear":
        following = torch.cat([video[:, 1:], video[:, -1:]], 1)
        for i in range(1, factor):
            out[:, :, i] = torch.lerp(video, following, i / factor)
    elif temporal != "blank":
        raise ValueError(f"temporal: want repeat, blank or linear, got {temporal!r}")
    return out.flatten(1, 2)


def downsample(video: Tensor, frames: int, height: int, width: int) -> Tensor:
    """What the stage before would have made: frame skipping, then antialiased resizing.

    Shapes: [B, T, H, W, C] -> [B, frames, height, width, C]
    """
    T = video.shape[1]
    if T % frames:
        raise ValueError(f"frames: want a divisor of the video's {T}, got {frames}")
    return resize(video[:, :: T // frames], height, width)
