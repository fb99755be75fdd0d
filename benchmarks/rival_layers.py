"""The U-Net's layers as diffusers writes them, with our weights: frames are [B * T, C, H, W] in NCHW memory.

Where diffusers is slower than its formulation needs (three linears for q, k and v; FiLM's projection once a frame), the rival is not.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.models import attention, resblock


def nchw(module: nn.Module) -> nn.Module:
    """A copy whose weights lie in NCHW memory, whatever the original's layout."""
    return copy.deepcopy(module).to(memory_format=torch.contiguous_format)


class RivalResBlock(nn.Module):
    """x [N, C_in, H, W], emb [B, T or 1, emb], N = B * T -> [N, C_out, H, W]"""

    def __init__(self, ours: resblock.ResBlock):
        super().__init__()
        self.norm1, self.norm2, self.film = copy.deepcopy(ours.norm1), copy.deepcopy(ours.norm2), copy.deepcopy(ours.film)
        self.conv1, self.conv2 = nchw(ours.conv1), nchw(ours.conv2)
        self.skip = None
        if isinstance(ours.skip, nn.Linear):               # a 1x1 convolution there
            self.skip = nn.Conv2d(ours.skip.in_features, ours.skip.out_features, 1).to(ours.skip.weight.device, ours.skip.weight.dtype)
            self.skip.load_state_dict({"weight": ours.skip.weight[..., None, None], "bias": ours.skip.bias})

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        frames = x.shape[0] // emb.shape[0]
        film = self.film(F.silu(emb)).expand(-1, frames, -1).flatten(0, 1)[:, :, None, None]
        scale, shift = film.chunk(2, 1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.norm2(h) * (1 + scale) + shift
        h = self.conv2(F.silu(h))
        return (x if self.skip is None else self.skip(x)) + h


class RivalSpatialAttention(nn.Module):
    """x [B * T, C, H, W], text [B, L, context], text_mask bool [B, L] -> like x"""

    def __init__(self, ours: attention.SpatialAttention):
        super().__init__()
        self.num_heads = ours.num_heads
        self.norm, self.to_qkv, self.text_to_kv, self.to_out = (
            copy.deepcopy(m) for m in (ours.norm, ours.to_qkv, ours.text_to_kv, ours.to_out))

    def forward(self, x: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        N, C, H, W = x.shape
        frames = N // text.shape[0]
        h = x.permute(0, 2, 3, 1).reshape(N, H * W, C)
        q, k, v = self.to_qkv(self.norm(h)).chunk(3, -1)
        text_k, text_v = self.text_to_kv(text).repeat_interleave(frames, 0).chunk(2, -1)
        k, v = torch.cat([k, text_k], 1), torch.cat([v, text_v], 1)
        q, k, v = (part.view(N, -1, self.num_heads, C // self.num_heads).transpose(1, 2) for part in (q, k, v))
        mask = F.pad(text_mask, (H * W, 0), value=True).repeat_interleave(frames, 0)[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(N, H * W, C)
        return self.to_out(out).view(N, H, W, C).permute(0, 3, 1, 2).contiguous() + x


class RivalTemporalAttention(nn.Module):
    """x [B * T, C, H, W], independent_frames bool [B] or None -> like x"""

    def __init__(self, ours: attention.TemporalAttention):
        super().__init__()
        self.num_heads = ours.num_heads
        self.norm, self.to_qkv, self.to_out, self.position_bias = (
            copy.deepcopy(m) for m in (ours.norm, ours.to_qkv, ours.to_out, ours.position_bias))

    def forward(self, x: Tensor, batch: int, independent_frames: Tensor | None = None) -> Tensor:
        N, C, H, W = x.shape
        frames = N // batch
        h = x.view(batch, frames, C, H, W).permute(0, 3, 4, 1, 2).reshape(batch * H * W, frames, C)
        qkv = self.to_qkv(self.norm(h)).view(batch * H * W, frames, 3, self.num_heads, C // self.num_heads)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        mask = self.position_bias(frames).to(x.dtype)[None]
        if independent_frames is not None:
            others = ~torch.eye(frames, dtype=torch.bool, device=x.device) & independent_frames[:, None, None, None]
            mask = mask.masked_fill(others, float("-inf")).repeat_interleave(H * W, 0)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(batch * H * W, frames, C)
        return self.to_out(out).view(batch, H, W, frames, C).permute(0, 3, 4, 1, 2).contiguous().view(N, C, H, W) + x


class RivalTemporalConv(nn.Module):
    """x [B * T, C, H, W], independent_frames bool [B] or None -> like x. Statistics of a frame, as ours; diffusers': of a clip."""

    def __init__(self, ours: attention.TemporalConv):
        super().__init__()
        width = ours.norm.num_channels
        self.norm = copy.deepcopy(ours.norm)
        self.conv = nn.Conv3d(width, width, (3, 1, 1), padding=(1, 0, 0)).to(ours.conv.weight.device, ours.conv.weight.dtype)
        self.conv.load_state_dict({"weight": ours.conv.weight[..., None, None], "bias": ours.conv.bias})

    def forward(self, x: Tensor, batch: int, independent_frames: Tensor | None = None) -> Tensor:
        N, C, H, W = x.shape
        identity = x.view(batch, -1, C, H, W).permute(0, 2, 1, 3, 4)
        h = F.silu(self.norm(x)).view(batch, -1, C, H, W).permute(0, 2, 1, 3, 4)
        out = identity + self.conv(h)
        if independent_frames is not None:
            out = torch.where(independent_frames[:, None, None, None, None], identity, out)
        return out.permute(0, 2, 1, 3, 4).reshape(N, C, H, W)
