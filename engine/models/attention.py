"""The layers that mix: pixels of a frame with each other and with the text, and frames of a pixel with each other."""

from torch import Tensor, nn

from dreamix_kernels import spatial_attention, temporal_attention_packed, temporal_conv_block
from dreamix_kernels.temporal_attention import wants_sequences

from .embeddings import RelativePositionBias
from .norm import LayerNorm
from .resblock import residual


class SpatialAttention(nn.Module):
    """Attention within each frame, text tokens appended to keys and values (Imagen App. B).

    Shapes: x [B, T, H, W, C], text [B, L, context], text_mask [B, L] -> like x
    """

    def __init__(self, channels: int, head_dim: int, context: int):
        super().__init__()
        self.num_heads = channels // head_dim
        self.norm = LayerNorm(channels)
        self.to_qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.text_to_kv = nn.Linear(context, 2 * channels, bias=False)
        self.to_out = nn.Linear(channels, channels)
        nn.init.zeros_(self.to_out.weight)

    def forward(self, x: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        H, W = x.shape[2:4]
        q, k, v = self.to_qkv(self.norm(x)).flatten(2, 3).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        text_k, text_v = self.text_to_kv(text).unflatten(-1, (2, self.num_heads, -1)).unbind(-3)
        out = spatial_attention(q, k, v, text_k, text_v, text_mask)
        return residual(x, self.to_out(out.flatten(-2).unflatten(2, (H, W))))


class TemporalAttention(nn.Module):
    """Self-attention along time, one sequence of T frames per pixel.   x [B, T, H, W, C] -> same

    `independent_frames` [B] marks samples run as D^a (Sec. 4.2): a frame sees only itself. A softmax over one key is 1,
    so those samples take their value projection, exactly. The module always runs, so ZeRO-3 fetches in one order.
    """

    def __init__(self, channels: int, head_dim: int, max_frames: int):
        super().__init__()
        self.num_heads = channels // head_dim
        self.norm = LayerNorm(channels)
        self.to_qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.to_out = nn.Linear(channels, channels)
        self.position_bias = RelativePositionBias(self.num_heads, max_frames)
        nn.init.zeros_(self.to_out.weight)

    def forward(self, x: Tensor, independent_frames: Tensor | None = None) -> Tensor:
        H, W = x.shape[2:4]
        swap = wants_sequences(x)

        def order(rows):              # one copy here, of x, then stands for three, of q, k and v
            return rows.transpose(1, 2) if swap else rows

        h = order(x.flatten(2, 3)).contiguous()
        qkv = order(self.to_qkv(self.norm(h)).unflatten(-1, (3, self.num_heads, -1)))
        out = temporal_attention_packed(qkv.unflatten(2, (H, W)), self.position_bias(x.shape[1]), independent_frames)
        out = order(out.flatten(2, 3)).flatten(-2).contiguous()           # independent frames' values are a slice of qkv
        out = order(self.to_out(out)).unflatten(2, (H, W))
        return x + out if swap else residual(x, out)


class TemporalConv(nn.Module):
    """A residual convolution over three frames, bypassed for independent frames.   x [B, T, H, W, C] -> same

    "Masking the residual temporal convolution blocks" (Sec. 4.2): for those samples the whole branch is left out. `stats` of x come from
    the layer before and those of the result go to the next, where the kernels give them (`temporal_conv_block`).
    """

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.conv = nn.Conv1d(channels, channels, 3)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor, independent_frames: Tensor | None = None, stats: Tensor | None = None,
                inplace: bool = False) -> tuple[Tensor, Tensor | None]:
        return temporal_conv_block(x, self.norm.num_groups, self.norm.weight, self.norm.bias, self.conv.weight, self.conv.bias,
                                   independent_frames, stats=stats, next_groups=self.norm.num_groups, inplace=inplace)
