"""What a U-Net is told besides the picture: time, noise on the conditioning video, text, the place of frames and pixels."""

import math

import torch
from torch import Tensor, nn


def sinusoids(x: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sines and cosines at geometric frequencies.   x [...] -> [..., dim], fp32"""
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = x.float()[..., None] * freqs
    return torch.cat([angles.cos(), angles.sin()], -1)


class TimeEmbedding(nn.Module):
    """A scalar in [0, 1] per sample to the width of FiLM.   time [B] -> [B, emb]"""

    def __init__(self, channels: int, emb: int):
        super().__init__()
        self.channels = channels
        self.mlp = nn.Sequential(nn.Linear(channels, emb), nn.SiLU(), nn.Linear(emb, emb))

    def forward(self, time: Tensor) -> Tensor:
        return self.mlp(sinusoids(1000 * time, self.channels).to(self.mlp[0].weight.dtype))


class FrameIndex(nn.Module):
    """Where in the clip a frame stands, alone and together with the caption.   text [B, text_dim], T -> [B, T, emb]

    Motion is a caption read against the clock: without this, values of temporal attention never know the frame, and a small model
    takes "left" and "right" for synonyms. Independent frames have no clock, so their rows are exactly zero.
    """

    FEATURES = 32

    def __init__(self, text_dim: int, emb: int):
        super().__init__()
        self.from_clock = nn.Linear(self.FEATURES, emb)
        self.from_text = nn.Linear(text_dim, emb)
        self.to_emb = nn.Linear(emb, emb)

    def forward(self, pooled_text: Tensor, frames: int, independent_frames: Tensor | None) -> Tensor:
        u = torch.arange(frames, device=pooled_text.device, dtype=torch.float32) / frames
        clock = self.from_clock(sinusoids(20 * u, self.FEATURES, 100.0).to(pooled_text.dtype))
        text = self.from_text(pooled_text)
        emb = self.to_emb(nn.functional.silu(clock + text[:, None] + clock * text[:, None]))
        if independent_frames is not None:
            emb = emb.masked_fill(independent_frames[:, None, None], 0)
        return emb


def coordinate_maps(height: int, width: int, device, dtype) -> Tensor:
    """Pixel centres and two octaves of their sines and cosines.   -> [height, width, 10]"""
    y = (torch.arange(height, device=device) + 0.5) / height * 2 - 1
    x = (torch.arange(width, device=device) + 0.5) / width * 2 - 1
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1)
    maps = [grid] + [f(grid * math.pi * octave) for octave in (1, 2) for f in (torch.sin, torch.cos)]
    return torch.cat(maps, -1).to(dtype)


class RelativePositionBias(nn.Module):
    """A learned bias for every head and every distance in frames.   T -> [heads, T, T]; distances beyond the table share its ends."""

    def __init__(self, heads: int, max_frames: int):
        super().__init__()
        self.max_frames = max_frames
        self.table = nn.Parameter(torch.zeros(heads, 2 * max_frames - 1))

    def forward(self, frames: int) -> Tensor:
        t = torch.arange(frames, device=self.table.device)
        distance = (t[None, :] - t[:, None]).clamp(1 - self.max_frames, self.max_frames - 1)
        return self.table[:, distance + self.max_frames - 1]
