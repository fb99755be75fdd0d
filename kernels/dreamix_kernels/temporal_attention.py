"""Attention along time, one sequence of T frames per pixel; samples marked as independent frames take their values.

A softmax over one key is 1, so for those samples (D^a of paper Sec. 4.2) the output IS V: their scores are never computed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .dispatch import use_native, use_triton

SDPA_BATCH_LIMIT = 65536               # its kernels refuse as many sequences: "invalid configuration argument"


def temporal_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, independent_frames: Tensor | None = None) -> Tensor:
    """Softmax attention over T at each pixel, with an additive bias.

    Shapes: q, k, v [B, T, H, W, heads, head_dim], any strides; bias [heads, T, T]; independent_frames bool [B] or None -> like v
    (v itself where every sample is one of independent frames and no gradient is recorded).
    Raises: ValueError if a shape is another, or the mask is not bool.
    Source: Imagen Video Sec. 2.1; the mask is Sec. 4.2 of Dreamix ("only pays attention within each frame").
    """
    if not q.shape == k.shape == v.shape:
        raise ValueError(f"q, k: want the shape of v = {[*v.shape]}, got {[*q.shape]}, {[*k.shape]}")
    _check(v, bias, independent_frames)
    B, T, H, W, h, d = v.shape
    if use_triton("temporal_attention", v):
        from . import temporal_attention_triton as gpu
        if gpu.supported(T, d, v.dtype):
            return gpu.temporal_attention(*(x.flatten(2, 3) for x in (q, k, v)), bias, independent_frames).unflatten(2, (H, W))
    if independent_frames is None or not independent_frames.any():
        return _attend(q, k, v, bias)
    video = (~independent_frames).nonzero().squeeze(1)
    if video.numel() == 0:
        # the bias stays in the graph with a zero gradient: every rank of ZeRO-3 sees the same set. Not q and k: a sum of them would carry
        # one frame's NaN to all
        return v + 0 * bias.sum() if torch.is_grad_enabled() else v
    return v.index_copy(0, video, _attend(q[video], k[video], v[video], bias))


def temporal_attention_packed(qkv: Tensor, bias: Tensor, independent_frames: Tensor | None = None) -> Tensor:
    """`temporal_attention` of the fused projection's output, whose gradient comes back as one tensor.

    Shapes: qkv [B, T, H, W, 3, heads, head_dim], any strides; the rest as in `temporal_attention` -> [B, T, H, W, heads, head_dim].
    Raises: ValueError if a shape is another, or the mask is not bool.
    """
    if qkv.ndim != 7 or qkv.shape[4] != 3:
        raise ValueError(f"qkv: want [B, T, H, W, 3, heads, head_dim], got {[*qkv.shape]}")
    q, k, v = qkv.unbind(4)
    if use_triton("temporal_attention", v):
        from . import temporal_attention_triton as gpu
        if gpu.supported(qkv.shape[1], qkv.shape[-1], qkv.dtype):
            _check(v, bias, independent_frames)
            return gpu.temporal_attention_packed(qkv.flatten(2, 3), bias, independent_frames).unflatten(2, qkv.shape[2:4])
    return temporal_attention(q, k, v, bias, independent_frames)


def wants_sequences(x: Tensor) -> bool:
    """True where attention along time reads a pixel's frames best when they lie side by side: in PyTorch on the CPU, and in training
    there."""
    return x.device.type == "cpu" and (torch.is_grad_enabled() or not use_native("temporal_attention", x))


def _check(v: Tensor, bias: Tensor, independent_frames: Tensor | None) -> None:
    B, T, heads = *v.shape[:2], v.shape[4]
    if bias.shape != (heads, T, T):
        raise ValueError(f"bias: want [heads, T, T] = {[heads, T, T]}, got {[*bias.shape]}")
    if independent_frames is not None and (independent_frames.dtype != torch.bool or independent_frames.shape != (B,)):
        raise ValueError(f"independent_frames: want bool [{B}], got {independent_frames.dtype} {[*independent_frames.shape]}")


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    B, T, H, W, h, d = v.shape
    if not torch.is_grad_enabled() and native.can_attend(q, k, v) and use_native("temporal_attention", v):
        return native.temporal_attention(*(x.flatten(2, 3) for x in (q, k, v)), bias).unflatten(2, (H, W))
    q, k, v = (x.movedim(1, 3).flatten(0, 2).transpose(1, 2) for x in (q, k, v))          # [pixels, h, T, d], views where sequence-major
    bias = bias.to(q.dtype)
    few = q.device.type == "cpu" or len(q) < SDPA_BATCH_LIMIT
    if few and not torch.is_grad_enabled() and (q.dtype == torch.float32 or q.is_cuda or T > 64):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
    else:
        # SDPA's backward on the CPU takes ten times its forward, and its bf16 loses to plain products at a few dozen frames
        scores = torch.matmul(q * d**-0.5, k.transpose(-1, -2)) + bias
        weights = F.softmax(scores, -1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        out = torch.matmul(weights, v)
    return out.transpose(1, 2).unflatten(0, (B, H, W)).movedim(3, 1)
