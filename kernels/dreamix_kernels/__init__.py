"""The hot path of the engine, one op per file. Imports torch (and triton, where there is a GPU) only.

Videos are [B, T, H, W, C], contiguous; no op permutes by copying.
"""

from .attention import spatial_attention
from .group_norm_silu import group_norm_silu
from .temporal_attention import temporal_attention
from .temporal_conv import temporal_conv

__all__ = ["group_norm_silu", "spatial_attention", "temporal_attention", "temporal_conv"]
