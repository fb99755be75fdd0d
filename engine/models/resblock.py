"""The spatial half of the U-Net: convolutions that see one frame at a time, FiLM from the embedding, resampling.

Videos are [B, T, H, W, C]; a 2-D convolution sees [B * T, C, H, W] in channels_last, which is a view.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamix_kernels import add_statistics, group_norm_silu


def conv2d(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A 2-D convolution of every frame.   x [B, T, H, W, C] -> [B, T, H', W', C']"""
    B, T = x.shape[:2]
    out = conv(x.flatten(0, 1).permute(0, 3, 1, 2))
    return out.permute(0, 2, 3, 1).contiguous().unflatten(0, (B, T))


def residual(x: Tensor, h: Tensor) -> Tensor:
    """x + h of a branch's fresh output h; written over h where no gradient asks for it."""
    return x + h if torch.is_grad_enabled() else h.add_(x)


class ResBlock(nn.Module):
    """GroupNorm-SiLU-conv, GroupNorm-FiLM-SiLU-conv, skip (BigGAN's, as in Dhariwal & Nichol 2021).

    Shapes: x [B, T, H, W, C_in], emb [B, T or 1, emb] -> [B, T, H, W, C_out]. The skip is the identity where the width is kept.
    """

    def __init__(self, c_in: int, c_out: int, emb: int, groups: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, c_in), nn.GroupNorm(groups, c_out)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.film = nn.Linear(emb, 2 * c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Linear(c_in, c_out) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, emb: Tensor, stats: Tensor | None = None, want_stats: bool = False) -> tuple[Tensor, Tensor | None]:
        """`stats` of x, as the layer before gave them, or None; the result's own, if wanted and to be had (`add_statistics`)."""
        B, T = x.shape[:2]
        scale, shift = self.film(F.silu(emb)).expand(B, T, -1).flatten(0, 1).chunk(2, -1)
        h = group_norm_silu(x.flatten(0, 1), self.norm1.num_groups, self.norm1.weight, self.norm1.bias, stats=stats)
        h = conv2d(h.unflatten(0, (B, T)), self.conv1)
        h = group_norm_silu(h.flatten(0, 1), self.norm2.num_groups, self.norm2.weight, self.norm2.bias, scale, shift)
        h = conv2d(h.unflatten(0, (B, T)), self.conv2)
        if not want_stats:
            return residual(self.skip(x), h), None
        y, stats = add_statistics(self.skip(x).flatten(0, 1), h.flatten(0, 1), self.norm2.num_groups)
        return y.unflatten(0, (B, T)), stats


class Downsample(nn.Module):
    """Half the height and width, a new width of channels.   [B, T, H, W, C_in] -> [B, T, ceil(H/2), ceil(W/2), C_out]"""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.conv)


class Upsample(nn.Module):
    """Nearest neighbour to the size of the level above, then a convolution.   [B, T, h, w, C_in] -> [B, T, H, W, C_out]"""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        B, T = x.shape[:2]
        image = F.interpolate(x.flatten(0, 1).permute(0, 3, 1, 2), size=size, mode="nearest")
        return conv2d(image.permute(0, 2, 3, 1).unflatten(0, (B, T)), self.conv)


def space_to_depth(x: Tensor, s: int) -> Tensor:
    """s x s pixels become channels.   [B, T, H, W, C] -> [B, T, H/s, W/s, s*s*C]"""
    if s == 1:
        return x
    B, T, H, W, C = x.shape
    return x.view(B, T, H // s, s, W // s, s, C).permute(0, 1, 2, 4, 3, 5, 6).reshape(B, T, H // s, W // s, s * s * C)


def depth_to_space(x: Tensor, s: int) -> Tensor:
    """The inverse of `space_to_depth`."""
    if s == 1:
        return x
    B, T, H, W, C = x.shape
    return x.view(B, T, H, W, s, s, C // (s * s)).permute(0, 1, 2, 4, 3, 5, 6).reshape(B, T, H * s, W * s, C // (s * s))
