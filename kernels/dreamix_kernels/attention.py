"""Spatial attention: every pixel of a frame attends to the frame's pixels and to the text tokens. One door over several backends.

A backend is judged by calling it, never by importing it: on first use with a device, dtype, head dimension and kind of mask, its output
and its gradients are compared with the definition, and the first that agrees is taken. Backends of other packages are added from outside
(`add_backend`).
"""

import warnings
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import alone, capturing, first_line, require_agreement

# q [N, h, P, d]; k, v [N, h, S, d]; mask bool [N, 1, 1, S] -> like q
Backend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
# up to which plain products train faster than SDPA on the CPU, whose backward takes ten times its forward
FEW_KEYS = 256


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.matmul(F.softmax(scores, -1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype), v)


_backends: dict[str, Backend] = {"sdpa": _sdpa, "products": _products}          # in order of preference; the last needs nobody


def add_backend(name: str, call: Backend) -> None:
    """Offer another backend, to be tried after SDPA and before the plain products. It may import what it needs when it is called."""
    last = _backends.pop("products")
    _backends.update({name: call, "products": last})
    probe.cache_clear()


@cache
def probe(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, masked: bool, gradients: bool) -> str | None:
    """None if the backend agrees with the definition there, or why it must not be used."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, dy = torch.randn(4, 2, 3, 40, head_dim, generator=generator, dtype=torch.float64).to(device, dtype)
    mask = torch.arange(40, device=device) < torch.tensor([40, 33], device=device)[:, None]
    mask = mask[:, None, None] if masked else None
    try:
        with alone(device, gradients):
            ours, exact = ([x.detach().to(to).requires_grad_(gradients) for x in (q, k, v)] for to in (dtype, torch.float64))
            got, want = _backends[name](*ours, mask), _products(*exact, mask)
            require_agreement("the output", got.detach(), want.detach())
            if gradients:
                grads = zip("qkv", torch.autograd.grad(got, ours, dy), torch.autograd.grad(want, exact, dy.double()))
                for which, mine, theirs in grads:
                    require_agreement(f"the gradient of {which}", mine, theirs)
    except Exception as problem:      # whatever a foreign backend raises is the reason to report
        return first_line(problem)
    return None


def _choose(device: torch.device, dtype: torch.dtype, head_dim: int, masked: bool, gradients: bool) -> str:
    """The first backend that works there. Those refused before it are told once."""
    if capturing(device):
        return "sdpa"
    for name in list(_backends)[:-1]:
        known = probe.cache_info().currsize
        reason = probe(name, device, dtype, head_dim, masked, gradients)
        if reason is None:
            return name
        if probe.cache_info().currsize > known and name == "sdpa":
            warnings.warn(f"dreamix_kernels: attention without SDPA on {device} ({dtype}): {reason}", stacklevel=4)
    return "products"


def report(device: torch.device, dtype: torch.dtype, head_dim: int = 64) -> list[dict]:
    """Each backend: does it work on this device and dtype, is it the one used for inference, and why."""
    chosen = _choose(device, dtype, head_dim, True, False)
    found = []
    for name in _backends:
        reason = None if name == "products" else probe(name, device, dtype, head_dim, True, False)
        found.append({"backend": name, "works": reason is None, "used": name == chosen, "reason": reason or "agrees with the reference"})
    return found


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
    grad = torch.is_grad_enabled()
    few = grad and q.device.type == "cpu" and k.shape[2] <= FEW_KEYS
    name = "products" if few else _choose(q.device, q.dtype, d, mask is not None, grad)
    return _backends[name](q, k, v, mask).transpose(1, 2).unflatten(0, (B, T))
