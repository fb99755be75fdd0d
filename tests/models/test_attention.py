"""What each mixing layer sees, and what it must not."""

import pytest
import torch

from dreamix_kernels import temporal_conv
from engine.models.attention import SpatialAttention, TemporalAttention, TemporalConv

B, T, H, W, C = 2, 5, 3, 4, 32


class Conv(TemporalConv):
    """Without the statistics."""

    def forward(self, *args):
        return super().forward(*args)[0]


def randomised(module):
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=generator) * (p[0].numel() ** -0.5 if p.ndim > 1 else 1)
    return module.requires_grad_(False)


@pytest.fixture
def x():
    return torch.randn(B, T, H, W, C, generator=torch.Generator().manual_seed(1))


def reached(layer, x, *args, **options):
    """bool [B, T, H, W]: where the output changes when the pixel (1, 2) of frame 3 of sample 1 does."""
    before = layer(x, *args, **options)
    x = x.clone()
    x[1, 3, 1, 2] += torch.linspace(-1, 2, C)
    return (layer(x, *args, **options) != before).any(-1)


def test_temporal_attention_sees_one_pixel(x):
    found = reached(randomised(TemporalAttention(C, 16, 8)), x)
    assert found[1, :, 1, 2].all() and found.sum() == T


def test_temporal_conv_sees_one_pixel_but_for_its_norm(x):
    """Its GroupNorm takes statistics over a frame, so the whole frame hears of the pixel; through time each pixel sees its own column."""
    layer = randomised(Conv(C, 8))
    found = reached(layer, x)
    assert found[1, 2:5].all() and found.sum() == 3 * H * W
    found = reached(lambda h: temporal_conv(h, layer.conv.weight, layer.conv.bias), x)
    assert found[1, 2:5, 1, 2].all() and found.sum() == 3


@pytest.mark.parametrize("layer", [TemporalAttention(C, 16, 8), Conv(C, 8)], ids=["attention", "conv"])
def test_the_mask_keeps_temporal_layers_in_the_pixel_or_out(layer, x):
    layer, mask = randomised(layer), torch.tensor([False, True])
    found = reached(layer, x, mask)
    assert found[1, 3, 1, 2] and found.sum() == 1
    if isinstance(layer, Conv):
        assert torch.equal(layer(x, mask)[1], x[1])                            # bypassed
    else:
        assert not torch.equal(layer(x, mask)[1], x[1])                        # its value projection
    assert torch.equal(layer(x, mask)[0], layer(x[:1])[0])


def test_spatial_attention_sees_one_frame(x):
    layer = randomised(SpatialAttention(C, 16, 8))
    text, mask = torch.randn(B, 3, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([[True, True, False], [True, False, False]])
    found = reached(layer, x, text, mask)
    assert found[1, 3].all() and found.sum() == H * W
    other = text.clone()
    other[0, 1] += 1
    differ = (layer(x, other, mask) != layer(x, text, mask)).flatten(2).any(-1)
    assert differ[0].all() and not differ[1].any()


def test_temporal_layers_begin_without_mixing(x):
    """Zero-initialised: the convolution is the identity, attention adds the constant of its bias."""
    assert torch.equal(Conv(C, 8)(x), x)
    layer = TemporalAttention(C, 16, 8)
    assert torch.equal(layer(x), x + layer.to_out.bias)
