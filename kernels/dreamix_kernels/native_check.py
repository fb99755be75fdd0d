"""The C++ kernels against the ops' definitions in fp64, on small cases: what `dispatch` asks before it trusts them."""

import torch

from . import native
from .dispatch import require_agreement


def self_check(op: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises: RuntimeError if the op cannot be compiled, or its output or a gradient differs from the definition."""
    {"group_norm_silu": _group_norm_silu, "temporal_attention": _temporal_attention}[op](dtype)


def _normal(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _group_norm_silu(dtype: torch.dtype) -> None:
    from .group_norm_silu import GroupNormSiLU, group_norm_silu_reference

    N, P, C, groups = 3, 71, 20, 5
    x, dy = _normal(N, P, C, seed=0, dtype=dtype) + 2, _normal(N, P, C, seed=1, dtype=dtype)
    rest = [_normal(*shape, seed=i, dtype=dtype) for i, shape in enumerate([(C,), (C,), (N, C), (N, C)], 2)]
    ours = [t.clone().requires_grad_() for t in (x, *rest)]
    exact = [t.double().requires_grad_() for t in (x, *rest)]
    got = GroupNormSiLU.apply(ours[0], groups, *ours[1:], 1e-5, None, True)
    want = group_norm_silu_reference(exact[0].unsqueeze(2), groups, *exact[1:]).squeeze(2)
    require_agreement("the output", got.detach(), want.detach())
    names = ("x", "weight", "bias", "scale", "shift")
    for name, mine, theirs in zip(names, torch.autograd.grad(got, ours, dy), torch.autograd.grad(want, exact, dy.double())):
        require_agreement(f"the gradient of {name}", mine, theirs)


def _temporal_attention(dtype: torch.dtype) -> None:
    B, P, h = 2, 3, 2
    for T, d in ((5, 24), (16, 32), (33, 64)):
        q, k, v = _normal(B, T, P, 3, h, d, seed=T, dtype=dtype).unbind(3)
        bias = _normal(h, T, T, seed=1, dtype=torch.float32)
        wide = [t.double().permute(0, 2, 3, 1, 4) for t in (q, k, v)]
        weights = torch.softmax(wide[0] @ wide[1].transpose(-1, -2) * d**-0.5 + bias.double(), -1)
        require_agreement(f"the output at T = {T}", native.temporal_attention(q, k, v, bias), (weights @ wide[2]).permute(0, 3, 1, 2, 4))
