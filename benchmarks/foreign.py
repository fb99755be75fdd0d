"""Other projects' layers as peers, given our weights and their own layout. Each function gives a competitor, or why there is none.

What shares no function with ours is left out: imagen-pytorch's attention (null key, one key head, l2-normalised queries), diffusers' whole
TransformerTemporalModel (two attentions and a feed-forward); their attention and convolutions are here.
"""

import importlib.util
import sys
import types
from collections.abc import Callable

from torch import Tensor, nn

from benchmarks.harness import Peer


def built(build: Callable[[], Peer]) -> Peer | str:
    try:
        return build()
    except Exception as problem:       # a package may be absent, or fail at import as it likes
        return (str(problem).strip() or type(problem).__name__).splitlines()[0][:160]


def set_weights(module: nn.Module, like: Tensor, **weights: Tensor) -> nn.Module:
    """`module` on the device and in the dtype of `like`, its parameters by name (dots as double underscores)."""
    state = module.to(like.device, like.dtype).state_dict()
    for name, value in weights.items():
        state[name.replace("__", ".")].copy_(value)
    return module.requires_grad_(False)


def frames(x: Tensor) -> Tensor:
    """[B, T, H, W, C] -> [B * T, C, H, W] in memory."""
    return x.flatten(0, 1).permute(0, 3, 1, 2).contiguous()


def diffusers_temporal_conv(x: Tensor, layers: list[tuple[Tensor, ...]], groups: int) -> Peer | str:
    """Its TemporalConvLayer.   layers: 4 of (norm weight, norm bias, conv weight [C, C, 3], conv bias)"""
    def build():
        from diffusers.models.resnet import TemporalConvLayer

        weights = {}
        for i, (norm_weight, norm_bias, weight, bias) in enumerate(layers, 1):
            last = 2 if i == 1 else 3                      # the first has no dropout before its convolution
            weights |= {f"conv{i}__0__weight": norm_weight, f"conv{i}__0__bias": norm_bias,
                        f"conv{i}__{last}__weight": weight[..., None, None], f"conv{i}__{last}__bias": bias}
        layer = set_weights(TemporalConvLayer(x.shape[-1], norm_num_groups=groups), x, **weights).eval()
        B, T = x.shape[:2]
        given = frames(x)
        return Peer(lambda: layer(given, num_frames=T), lambda out: out.permute(0, 2, 3, 1).unflatten(0, (B, T)))
    return built(build)


def diffusers_attention(x: Tensor, layer: nn.Module) -> Peer | str:
    """Its Attention behind a LayerNorm, in the layout of its TransformerTemporalModel. `layer`'s bias of positions must be zero."""
    def build():
        from diffusers.models.attention_processor import Attention

        B, T, H, W, C = x.shape
        heads = layer.num_heads
        q, k, v = layer.to_qkv.weight.chunk(3)
        attention = set_weights(Attention(C, heads=heads, dim_head=C // heads), x, to_q__weight=q, to_k__weight=k, to_v__weight=v,
                                to_out__0__weight=layer.to_out.weight, to_out__0__bias=layer.to_out.bias).eval()
        given = frames(x)

        def run():
            h = given[None].reshape(B, T, C, H, W).permute(0, 2, 1, 3, 4).permute(0, 3, 4, 2, 1).reshape(B * H * W, T, C)
            h = attention(layer.norm(h))
            return h.reshape(B, H, W, T, C).permute(0, 3, 4, 1, 2).contiguous().reshape(B * T, C, H, W) + given
        return Peer(run, lambda out: out.permute(0, 2, 3, 1).unflatten(0, (B, T)))
    return built(build)


def imagen_conv(x: Tensor, spatial: tuple[Tensor, Tensor], temporal: tuple[Tensor, Tensor]) -> Peer | str:
    """imagen-pytorch's Conv3d: a 3x3 Conv2d, then a causal Conv1d over three frames.   spatial, temporal: (weight, bias)"""
    def build():
        layer = set_weights(_imagen_video().Conv3d(x.shape[-1]), x, spatial_conv__weight=spatial[0], spatial_conv__bias=spatial[1],
                            temporal_conv__weight=temporal[0], temporal_conv__bias=temporal[1])
        given = x.permute(0, 4, 1, 2, 3).contiguous()
        return Peer(lambda: layer(given), lambda out: out.permute(0, 2, 3, 4, 1))
    return built(build)


def _imagen_video():
    """Its module alone: the package imports a trainer, data sets and torchvision with it, and its text encoder asks the hub at import."""
    if "imagen_pytorch" not in sys.modules:
        spec = importlib.util.find_spec("imagen_pytorch")
        if spec is None:
            raise ModuleNotFoundError("No module named 'imagen_pytorch'")
        package, text = types.ModuleType("imagen_pytorch"), types.ModuleType("imagen_pytorch.t5")
        package.__path__ = list(spec.submodule_search_locations)
        text.t5_encode_text, text.get_encoded_dim, text.DEFAULT_T5_NAME = None, lambda name: 768, "google/t5-v1_1-base"
        sys.modules |= {"imagen_pytorch": package, "imagen_pytorch.t5": text}
    return importlib.import_module("imagen_pytorch.imagen_video")


def xformers_block_diagonal(qkv: Tensor) -> Peer | str:
    """Its memory-efficient attention over all sequences in one row, with a block-diagonal mask. No bias beside it."""
    def build():
        from xformers.ops import memory_efficient_attention
        from xformers.ops.fmha.attn_bias import BlockDiagonalMask

        B, T, H, W, _, heads, d = qkv.shape
        mask = BlockDiagonalMask.from_seqlens([T] * (B * H * W))

        def run():
            q, k, v = qkv.permute(4, 0, 2, 3, 1, 5, 6).reshape(3, 1, B * H * W * T, heads, d)
            out = memory_efficient_attention(q, k, v, attn_bias=mask)
            return out.view(B, H, W, T, heads, d).permute(0, 3, 1, 2, 4, 5).contiguous()
        run()                                              # judged by a call: it imports well where it does not work
        return Peer(run)
    return built(build)
