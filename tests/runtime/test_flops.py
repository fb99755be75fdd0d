import pytest
import torch
import torch.nn.functional as F

from dreamix_kernels import spatial_attention, temporal_attention, temporal_conv
from engine.runtime.flops import count_flops


@pytest.fixture
def empty():
    return lambda *shape: torch.empty(shape, device="meta")


def test_products_and_convolutions(empty):
    assert count_flops(lambda: F.linear(empty(3, 5, 7), empty(11, 7))) == 2 * 3 * 5 * 7 * 11
    assert count_flops(lambda: F.conv2d(empty(2, 3, 8, 10), empty(6, 3, 3, 3), padding=1)) == 2 * 2 * 8 * 10 * 6 * 3 * 9
    assert count_flops(lambda: F.conv2d(empty(2, 3, 8, 10), empty(6, 3, 3, 3), stride=2, padding=1)) == 2 * 2 * 4 * 5 * 6 * 3 * 9
    assert count_flops(lambda: empty(4, 5) + 1) == 0


def test_layers_of_the_engine(empty):
    B, T, H, W, h, d, L = 2, 5, 3, 4, 2, 8, 7
    C, P = h * d, H * W
    assert count_flops(lambda: temporal_conv(empty(B, T, H, W, C), empty(6, C, 3), None)) == 2 * B * T * P * C * 6 * 3
    x = empty(B, T, H, W, h, d)
    assert count_flops(lambda: temporal_attention(x, x, x, empty(h, T, T))) == 2 * 2 * B * P * h * T * T * d
    q, text = empty(B, T, P, h, d), empty(B, L, h, d)
    assert count_flops(lambda: spatial_attention(q, q, q, text, text)) == 2 * 2 * B * T * h * P * (P + L) * d


def test_nothing_is_allocated(empty):
    """A hundred terabytes of activations."""
    assert count_flops(lambda: F.linear(empty(10**9, 1000), empty(25_000, 1000))) == 2 * 10**9 * 1000 * 25_000


def test_errors_pass_through(empty):
    with pytest.raises(ZeroDivisionError):
        count_flops(lambda: 1 / 0)
    assert count_flops(lambda: None) == 0
