"""Spatial attention: every pixel of a frame attends to the frame's pixels and to the text tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor


def spatial_attention(q: Tensor, k: Tensor, v: Tensor, text_k: Tensor | None = None, text_v: Tensor | None = None,
                      text_mask: Tensor | None = None) -> Tensor:
    """Self-attention within each frame, text tokens appended to keys and values.

    Shapes: q, k, v [B, T, P, heads, head_dim] (P pixels); text_k, text_v [B, L, heads, head_dim]; text_mask bool [B, L], True for
    real tokens -> like q.
    Raises: ValueError if a shape is another, or the mask is not bool.
    Source: Imagen App. B ("concatenating text to the key-value pairs of each self-attention layer").
    """
    B, T, P, h, d = q.shape
    mask = None
    if not k.shape == v.shape == q.shape:
        raise ValueError(f"k, v: want the shape of q = {[*q.shape]}, got {[*k.shape]}, {[*v.shape]}")
    if (text_k is None) != (text_v is None):
        raise ValueError("text_k, text_v: want both or neither")
    if text_k is not None:
        L = text_k.shape[1]
        if not text_k.shape == text_v.shape == (B, L, h, d):
            raise ValueError(f"text_k, text_v: want [{B}, L, {h}, {d}], got {[*text_k.shape]}, {[*text_v.shape]}")
        if text_mask is not None and (text_mask.dtype != torch.bool or text_mask.shape != (B, L)):
            raise ValueError(f"text_mask: want bool [{B}, {L}], got {text_mask.dtype} {[*text_mask.shape]}")
        k = torch.cat([k, text_k[:, None].expand(B, T, L, h, d)], 2)
        v = torch.cat([v, text_v[:, None].expand(B, T, L, h, d)], 2)
        if text_mask is not None:
            mask = F.pad(text_mask, (P, 0), value=True)[:, None].expand(B, T, P + L).reshape(B * T, 1, 1, P + L)
    q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cpu" and torch.is_grad_enabled() and k.shape[2] <= 256:
        # SDPA's backward on the CPU takes ten times its forward; over a few hundred keys the plain products win
        scores = torch.matmul(q * d**-0.5, k.transpose(-1, -2))
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        out = torch.matmul(F.softmax(scores, -1), v)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).unflatten(0, (B, T))
