"""The hot path of the engine, one op per file: the definition, PyTorch's best formulation, and where there is a GPU a Triton kernel.

Videos are [B, T, H, W, C]; no op permutes by copying. Imports torch, and triton where it is used. `dispatch` says what runs.
"""

from .attention import spatial_attention
from .group_norm_silu import add_statistics, group_norm_silu
from .temporal_attention import temporal_attention, temporal_attention_packed
from .temporal_conv import temporal_conv, temporal_conv_block

__all__ = ["add_statistics", "group_norm_silu", "spatial_attention", "temporal_attention", "temporal_attention_packed", "temporal_conv",
           "temporal_conv_block"]
