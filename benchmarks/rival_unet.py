"""The same U-Net and weights in the formulation that users run today, operation by operation as diffusers' UNet3DConditionModel has it.

Frames are [B * T, C, H, W] in NCHW memory: Conv2d and GroupNorm see a batch of pictures, a temporal convolution is a Conv3d of (3, 1, 1) on
a permuted view, attention permutes to [B * H * W, T, C] (or [B * T, H * W, C]) and back around SDPA, FiLM is a product and a sum.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.rival_layers import RivalResBlock, RivalSpatialAttention, RivalTemporalAttention, RivalTemporalConv, nchw
from engine.models import attention, embeddings
from engine.models.unet import VideoUNet


class RivalBlock(nn.Module):
    def __init__(self, ours: nn.Module):
        super().__init__()
        self.res = RivalResBlock(ours.res)
        self.attention = None if ours.attention is None else RivalSpatialAttention(ours.attention)
        kind = RivalTemporalAttention if isinstance(ours.temporal, attention.TemporalAttention) else RivalTemporalConv
        self.temporal = kind(ours.temporal)

    def forward(self, x, emb, text, text_mask, independent_frames):
        x = self.res(x, emb)
        if self.attention is not None:
            x = self.attention(x, text, text_mask)
        return self.temporal(x, emb.shape[0], independent_frames)


class RivalUNet(nn.Module):
    """`forward` takes and gives videos as [B, 3, T, H, W]; everything else is as in `VideoUNet.forward`.

    Built of a network in its final dtype and device: the embedding's linears are shared, all other weights copied into NCHW memory.
    """

    def __init__(self, ours: VideoUNet):
        super().__init__()
        self.config = ours.config
        self.embedding = ours._embed                       # time, text and frame: a few small linears, the very same ones
        self.stem, self.head, self.norm_out = nchw(ours.stem), nchw(ours.head), copy.deepcopy(ours.norm_out)
        self._pixel_order()
        self.down = nn.ModuleList(nn.ModuleList(RivalBlock(block) for block in blocks) for blocks in ours.down)
        self.up = nn.ModuleList(nn.ModuleList(RivalBlock(block) for block in blocks) for blocks in ours.up)
        self.downsample = nn.ModuleList(nchw(layer.conv) for layer in ours.downsample)
        self.upsample = nn.ModuleList(nchw(layer.conv) for layer in ours.upsample)

    @torch.no_grad()
    def _pixel_order(self) -> None:
        """`F.pixel_unshuffle` puts a patch's pixels inside each colour, `space_to_depth` the colours inside each pixel."""
        s2 = self.config.space_to_depth**2
        colours = 6 if self.config.lowres else 3
        weight = self.stem.weight
        weight[:, : s2 * colours] = weight[:, : s2 * colours].unflatten(1, (s2, colours)).transpose(1, 2).flatten(1, 2).clone()
        for parameter in (self.head.weight, self.head.bias):
            parameter.copy_(parameter.unflatten(0, (s2, 3)).transpose(0, 1).flatten(0, 1).clone())

    def forward(self, z: Tensor, time: Tensor, text: Tensor, text_mask: Tensor, *, lowres: Tensor | None = None,
                aug_level: Tensor | None = None, independent_frames: Tensor | None = None) -> Tensor:
        B, _, T = z.shape[:3]
        emb, tokens = self.embedding(T, time, text.to(self.stem.weight.dtype), text_mask, aug_level, independent_frames)
        x = z if lowres is None else torch.cat([z, lowres], 1)
        x = x.to(self.stem.weight.dtype).permute(0, 2, 1, 3, 4).reshape(B * T, -1, *z.shape[3:])
        x = F.pixel_unshuffle(x, self.config.space_to_depth)
        if self.config.coordinates:
            maps = embeddings.coordinate_maps(*x.shape[2:], x.device, x.dtype).permute(2, 0, 1)
            x = torch.cat([x, maps.expand(len(x), *maps.shape)], 1)
        x = self.stem(x)
        skips = []
        for level, blocks in enumerate(self.down):
            if level:
                x = self.downsample[level - 1](x)
            for block in blocks:
                x = block(x, emb, tokens, text_mask, independent_frames)
            skips.append(x)
        for i, blocks in enumerate(self.up):
            x = torch.cat([x, skips.pop() * 2**-0.5], 1)
            for block in blocks:
                x = block(x, emb, tokens, text_mask, independent_frames)
            if skips:
                x = self.upsample[i](F.interpolate(x, size=skips[-1].shape[2:], mode="nearest"))
        x = self.head(F.silu(self.norm_out(x)))
        return F.pixel_shuffle(x, self.config.space_to_depth).unflatten(0, (B, T)).permute(0, 2, 1, 3, 4).contiguous().to(z.dtype)


def frames_last(video: Tensor) -> Tensor:
    """[B, T, H, W, C] -> [B, C, T, H, W] in memory, the rival's layout."""
    return video.permute(0, 4, 1, 2, 3).contiguous()
