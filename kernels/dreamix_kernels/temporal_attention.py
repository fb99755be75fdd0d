"""Attention along time, one sequence of T frames per pixel; samples marked as independent frames take their values.

A softmax over one key is 1, so for those samples (D^a of paper Sec. 4.2) the output IS V: their scores are never computed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def temporal_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, independent_frames: Tensor | None = None) -> Tensor:
    """Softmax attention over T at each pixel, with an additive bias.

    Shapes: q, k, v [B, T, H, W, heads, head_dim]; bias [heads, T, T]; independent_frames bool [B] or None -> like v.
    Raises: ValueError if a shape is another, or the mask is not bool.
    Source: Imagen Video Sec. 2.1; the mask is Sec. 4.2 of Dreamix ("only pays attention within each frame").
    """
    B, T, heads = *v.shape[:2], v.shape[4]
    if not q.shape == k.shape == v.shape:
        raise ValueError(f"q, k: want the shape of v = {[*v.shape]}, got {[*q.shape]}, {[*k.shape]}")
    if bias.shape != (heads, T, T):
        raise ValueError(f"bias: want [heads, T, T] = {[heads, T, T]}, got {[*bias.shape]}")
    if independent_frames is None:
        return _attend(q, k, v, bias)
    if independent_frames.dtype != torch.bool or independent_frames.shape != (B,):
        raise ValueError(f"independent_frames: want bool [{B}], got {independent_frames.dtype} {[*independent_frames.shape]}")
    video = (~independent_frames).nonzero().squeeze(1)
    if video.numel() == 0:
        # the bias stays in the graph with a zero gradient: every rank of ZeRO-3 sees the same set
        return v + 0 * bias.sum() if torch.is_grad_enabled() and bias.requires_grad else v
    if video.numel() == v.shape[0]:
        return _attend(q, k, v, bias)
    return v.index_copy(0, video, _attend(q[video], k[video], v[video], bias))


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    B, T, H, W, h, d = v.shape

    def sequences(x):                                     # [B, T, H, W, h, d] -> [B * H * W * h, T, d]
        return x.reshape(B, T, H * W, h, d).permute(0, 2, 3, 1, 4).reshape(-1, T, d)

    # for T of 8 to 32 one batched product beats SDPA on the CPU, most of all in backward
    scores = torch.bmm(sequences(q) * d**-0.5, sequences(k).transpose(1, 2)).view(-1, h, T, T) + bias.to(q.dtype)
    out = torch.bmm(F.softmax(scores, -1).view(-1, T, T), sequences(v))
    return out.view(B, H * W, h, T, d).permute(0, 3, 1, 2, 4).reshape(B, T, H, W, h, d)
