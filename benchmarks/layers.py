"""Cases of a whole temporal attention layer (norm, projections, attention over T, residual), forward, and forward with backward."""

import copy

import torch
import torch.nn.functional as F

from benchmarks import foreign, peers
from benchmarks.harness import Peer, leaves
from benchmarks.rival_layers import RivalTemporalAttention
from engine.models.attention import TemporalAttention


def random_layer(layer: torch.nn.Module, dtype, device) -> torch.nn.Module:
    """No parameter is zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in layer.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(noise * (value.shape[-1] ** -0.5 if value.ndim > 1 else 0.1) + ("norm.weight" in name))
    return layer.to(device, dtype)


def definition(layer: TemporalAttention, x: torch.Tensor) -> torch.Tensor:
    """The layer in plain operations, pixels before frames.   x [B, T, H, W, C] -> same"""
    h = F.layer_norm(x.transpose(1, 3), x.shape[-1:], layer.norm.weight, layer.norm.bias, layer.norm.eps)      # [B, W, H, T, C]
    q, k, v = F.linear(h, layer.to_qkv.weight).unflatten(-1, (3, layer.num_heads, -1)).transpose(3, 5).unbind(4)   # [B, W, H, heads, T, d]
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + layer.position_bias(x.shape[1])
    out = (torch.softmax(scores, -1) @ v).transpose(3, 4).flatten(-2)
    return x + F.linear(out, layer.to_out.weight, layer.to_out.bias).transpose(1, 3)


def with_gradients(run, x, dy, module):
    """Output, dx and every parameter's gradient of run(x)."""
    wanted = [x, *module.parameters()]

    def both():
        out = run(x)
        return out.detach(), *torch.autograd.grad(out, wanted, dy)
    return both


def attention_layer_case(case, shape, head_dim, dtype, device, measure, compiled, backward, *, bias=True, **kwargs):
    """`bias=False`: the bias of positions is zero, which other projects' layers compute too."""
    B, T, H, W, C = shape
    layer = random_layer(TemporalAttention(C, head_dim, T), dtype, device)
    if not bias:
        torch.nn.init.zeros_(layer.position_bias.table)
    x, dy = (peers.randn(*shape, dtype=dtype, device=device, seed=i) for i in range(2))
    rival, given, dgiven = RivalTemporalAttention(layer), foreign.frames(x), foreign.frames(dy)
    wide = copy.deepcopy(layer).to(torch.float32 if x.is_cuda else torch.float64)
    (wide_x, wide_dy) = peers.wide(x, dy)

    def back(out):
        return [part.permute(0, 2, 3, 1).unflatten(0, (B, T)) if part.shape == given.shape else part for part in leaves(out)]

    fast = compiled(lambda x: definition(layer, x))
    if backward:
        for leaf in (x, given, wide_x):
            leaf.requires_grad_()
        competitors = {"ours": with_gradients(layer, x, dy, layer),
                       "eager": Peer(with_gradients(lambda given: rival(given, B), given, dgiven, rival), back)}
        if fast:
            competitors["compiled"] = with_gradients(fast, x, dy, layer)
        reference = with_gradients(lambda x: definition(wide, x), wide_x, wide_dy, wide)
    else:
        competitors = {"ours": lambda: [layer(x)], "eager": Peer(lambda: rival(given, B), back)}
        if fast:
            competitors["compiled"] = lambda: [fast(x)]
        if not bias:
            competitors["diffusers"] = foreign.diffusers_attention(x, layer)
        reference = lambda: [definition(wide, wide_x)]     # noqa: E731
    passes = 3 if backward else 1
    if backward and dtype is not torch.float32:
        kwargs["tolerance"] = 2e-2                         # a chain of roundings, in the peers as in ours
    measure(case + ("_bwd" if backward else ""), competitors, reference=reference, dtype=dtype, shape=shape, grad=backward,
            flops=passes * B * H * W * T * (8 * C * C + 4 * T * C), **kwargs)
