"""The space-time separable U-Net of Imagen Video (Sec. 2.1; FACTS 3.7), one class for the base and the six super-resolution models.

Per level, on the way down: halve the size (not at level 0), then N times [ResBlock, spatial attention, temporal layer]; on the way
up the same, with the level's skip concatenated once and scaled by 1/sqrt(2). Spatial layers see one frame, temporal layers one pixel,
and all normalisation is per frame, so independent frames stay independent to the last bit.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.config import UNetConfig

from .attention import SpatialAttention, TemporalAttention, TemporalConv
from .embeddings import FrameIndex, TimeEmbedding, coordinate_maps
from .norm import LayerNorm
from .resblock import Downsample, ResBlock, Upsample, conv2d, depth_to_space, group_norm_silu, space_to_depth

COORDINATE_CHANNELS = 10


class Block(nn.Module):
    """ResBlock, then spatial attention where the level has it, then the temporal layer."""

    def __init__(self, config: UNetConfig, c_in: int, c_out: int, emb: int, attention: bool):
        super().__init__()
        self.res = ResBlock(c_in, c_out, emb, config.groups)
        self.attention = SpatialAttention(c_out, config.head_dim, config.context_dim) if attention else None
        if config.temporal == "attention":
            self.temporal = TemporalAttention(c_out, config.head_dim, config.max_frames)
        else:
            self.temporal = TemporalConv(c_out, config.groups)

    def forward(self, x: Tensor, stats: Tensor | None, emb: Tensor, text: Tensor, text_mask: Tensor,
                independent_frames: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x and its GroupNorm statistics, where the layer before gave them -> the same of the result."""
        conv = isinstance(self.temporal, TemporalConv)
        x, stats = self.res(x, emb, stats, want_stats=conv and self.attention is None)
        if self.attention is not None:
            x = self.attention(x, text, text_mask)
        if conv:                      # x is nobody else's: where no gradient needs it, bypassed samples need not be copied
            return self.temporal(x, independent_frames, stats, inplace=not torch.is_grad_enabled())
        return self.temporal(x, independent_frames), None


class VideoUNet(nn.Module):
    """D_theta: a noisy video to the network's prediction of v, eps or x0 (which one is the stage's DiffusionConfig).

    Shapes of `forward`: z [B, T, H, W, 3]; time [B] in [0, 1]; text [B, L, text_dim] and text_mask bool [B, L] (all False: no text);
    lowres [B, T, H, W, 3] (the conditioning video, upsampled to this stage and noise-augmented) and aug_level [B], for every stage
    but base; independent_frames bool [B] or None -> [B, T, H, W, 3].
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        widths = [config.channels * mult for mult in config.channel_mults]
        emb, s2 = 4 * config.channels, config.space_to_depth**2

        self.time = TimeEmbedding(config.channels, emb)
        self.aug_level = TimeEmbedding(config.channels, emb) if config.lowres else None
        self.pooled_text = nn.Linear(config.text_dim, emb)
        self.frame_index = FrameIndex(config.text_dim, emb) if config.frame_index else None
        self.text_tokens = nn.Linear(config.text_dim, config.context_dim) if config.attention_levels else None
        self.text_norm = LayerNorm(config.context_dim) if config.attention_levels else None

        c_in = (6 if config.lowres else 3) * s2 + (COORDINATE_CHANNELS if config.coordinates else 0)
        self.stem = nn.Conv2d(c_in, config.channels, 3, padding=1)
        self.down, self.downsample = nn.ModuleList(), nn.ModuleList()
        self.up, self.upsample = nn.ModuleList(), nn.ModuleList()
        width = config.channels
        for level, c in enumerate(widths):
            if level:
                self.downsample.append(Downsample(width, c))
                width = c
            self.down.append(nn.ModuleList(self._blocks(level, width, c, emb)))
            width = c
        for level in reversed(range(len(widths))):
            c = widths[level]
            self.up.append(nn.ModuleList(self._blocks(level, 2 * c, c, emb)))
            if level:
                self.upsample.append(Upsample(c, widths[level - 1]))
        self.norm_out = nn.GroupNorm(config.groups, config.channels)
        self.head = nn.Conv2d(config.channels, 3 * s2, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def _blocks(self, level: int, c_in: int, c: int, emb: int):
        n = self.config.num_blocks[level]
        for i in range(n):
            attention = level in self.config.attention_levels and (self.config.attention_every_block or i == n - 1)
            yield Block(self.config, c_in if i == 0 else c, c, emb, attention)

    @property
    def dtype(self) -> torch.dtype:
        return self.stem.weight.dtype

    def forward(self, z: Tensor, time: Tensor, text: Tensor, text_mask: Tensor, *, lowres: Tensor | None = None,
                aug_level: Tensor | None = None, independent_frames: Tensor | None = None) -> Tensor:
        self._check(z, time, text, text_mask, lowres, aug_level, independent_frames)
        emb, tokens = self._embed(z.shape[1], time, text.to(self.dtype), text_mask, aug_level, independent_frames)
        x, stats = self._stem(z, lowres), None
        skips = []
        for level, blocks in enumerate(self.down):
            if level:
                x, stats = self.downsample[level - 1](x), None
            for block in blocks:
                x, stats = self._run(block, x, stats, emb, tokens, text_mask, independent_frames)
            skips.append(x)
        for i, blocks in enumerate(self.up):
            x, stats = torch.cat([x, skips.pop() * 2**-0.5], -1), None
            for block in blocks:
                x, stats = self._run(block, x, stats, emb, tokens, text_mask, independent_frames)
            if skips:
                x = self.upsample[i](x, skips[-1].shape[2:4])
        B, T = x.shape[:2]
        x = group_norm_silu(x.flatten(0, 1), self.norm_out.num_groups, self.norm_out.weight, self.norm_out.bias, stats=stats)
        return depth_to_space(conv2d(x.unflatten(0, (B, T)), self.head), self.config.space_to_depth).to(z.dtype)

    def _run(self, block: Block, *args) -> tuple[Tensor, Tensor | None]:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def _embed(self, frames, time, text, text_mask, aug_level, independent_frames):
        # a sample without text has an all-False mask: its mean is zero
        weight = text_mask.to(text.dtype)[..., None]
        pooled = (text * weight).sum(1) / weight.sum(1).clamp_min(1)
        emb = self.time(time) + self.pooled_text(pooled)
        if self.aug_level is not None:
            emb = emb + self.aug_level(aug_level)
        emb = emb[:, None]
        if self.frame_index is not None:
            emb = emb + self.frame_index(pooled, frames, independent_frames)
        tokens = self.text_norm(self.text_tokens(text)) if self.text_tokens is not None else None
        return emb, tokens

    def _stem(self, z: Tensor, lowres: Tensor | None) -> Tensor:
        x = z if lowres is None else torch.cat([z, lowres], -1)
        x = space_to_depth(x.to(self.dtype), self.config.space_to_depth)
        if self.config.coordinates:
            maps = coordinate_maps(*x.shape[2:4], x.device, x.dtype)
            x = torch.cat([x, maps.expand(*x.shape[:2], *maps.shape)], -1)
        return conv2d(x, self.stem)

    def _check(self, z, time, text, text_mask, lowres, aug_level, independent_frames):
        s, width = self.config.space_to_depth, self.config.text_dim
        if z.ndim != 5 or z.shape[-1] != 3 or z.shape[2] % s or z.shape[3] % s:
            raise ValueError(f"z: want [B, T, H, W, 3] with H and W multiples of {s}, got {[*z.shape]}")
        if self.config.lowres != (lowres is not None) or self.config.lowres != (aug_level is not None):
            raise ValueError(f"lowres, aug_level: want both {'given' if self.config.lowres else 'None'} for this stage")
        if lowres is not None and lowres.shape != z.shape:
            raise ValueError(f"lowres: want the shape of z = {[*z.shape]}, got {[*lowres.shape]}")
        B = len(z)
        for name, x in (("time", time), ("aug_level", aug_level)):
            if x is not None and x.shape != (B,):
                raise ValueError(f"{name}: want [{B}], got {[*x.shape]}")
        if text.ndim != 3 or text.shape[0] != B or text.shape[2] != width:
            raise ValueError(f"text: want [{B}, L, {width}], got {[*text.shape]}")
        for name, x, want in (("text_mask", text_mask, text.shape[:2]), ("independent_frames", independent_frames, (B,))):
            if x is not None and (x.dtype != torch.bool or x.shape != want):
                raise ValueError(f"{name}: want bool {[*want]}, got {x.dtype} {[*x.shape]}")


def count_parameters(config: UNetConfig) -> int:
    """Parameters of a stage, without allocating them."""
    with torch.device("meta"):
        return sum(p.numel() for p in VideoUNet(config).parameters())
