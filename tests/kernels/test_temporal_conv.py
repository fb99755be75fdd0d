import pytest
import torch
import torch.nn.functional as F

from dreamix_kernels import temporal_conv

SHAPES = [(1, 1, 1, 1, 1, 1), (2, 2, 3, 1, 3, 5), (1, 5, 7, 3, 24, 8), (2, 16, 6, 10, 32, 32), (1, 33, 2, 3, 16, 16), (1, 64, 3, 5, 8, 8)]


def reference(x, weight, bias):
    """One Conv1d for every pixel."""
    B, T, H, W, C = x.shape
    pixels = x.permute(0, 2, 3, 4, 1).reshape(B * H * W, C, T)
    out = F.conv1d(pixels, weight, bias, padding=weight.shape[-1] // 2)
    return out.view(B, H, W, -1, T).permute(0, 4, 1, 2, 3)


def inputs(randn, B, T, H, W, C, C_out, dtype=torch.float32, kernel=3):
    return [randn(B, T, H, W, C, dtype=dtype), randn(C_out, C, kernel, dtype=dtype) / C**0.5, randn(C_out, dtype=dtype)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matches_a_conv1d_per_pixel(shape, dtype, randn, assert_matches):
    assert_matches(temporal_conv, reference, inputs(randn, *shape, dtype=dtype))


def test_equals_conv3d(randn):
    x, weight, bias = inputs(randn, 2, 5, 3, 4, 8, 6, torch.float64)
    want = F.conv3d(x.permute(0, 4, 1, 2, 3), weight[..., None, None], bias, padding=(1, 0, 0)).permute(0, 2, 3, 4, 1)
    assert (temporal_conv(x, weight, bias) - want).abs().max() < 1e-13


def test_gradients_in_fp64(randn):
    args = [a.requires_grad_() for a in inputs(randn, 2, 3, 1, 2, 2, 3, torch.float64)]
    assert torch.autograd.gradcheck(temporal_conv, args)
    assert torch.autograd.gradcheck(lambda x, w: temporal_conv(x, w, None), args[:2])


def test_ends_are_padded_with_zeros(randn):
    x, weight, bias = inputs(randn, 1, 4, 1, 1, 3, 2, torch.float64)
    x[:] = 1
    taps = weight.sum(1)
    out = temporal_conv(x, weight, bias)[0, :, 0, 0]
    assert torch.allclose(out[0], taps[:, 1:].sum(1) + bias) and torch.allclose(out[1], taps.sum(1) + bias)
    assert torch.allclose(out[3], taps[:, :2].sum(1) + bias)


def test_the_first_tap_looks_back(randn):
    x = randn(1, 5, 2, 2, 1)
    delay = torch.tensor([1.0, 0, 0]).view(1, 1, 3)
    out = temporal_conv(x, delay, None)
    assert torch.equal(out[:, 1:], x[:, :-1]) and not out[:, 0].any()


def test_reach_is_one_pixel_and_three_frames(randn):
    x, weight, bias = inputs(randn, 2, 7, 3, 4, 8, 8)
    before = temporal_conv(x, weight, bias)
    x[1, 3, 2, 1] += 1
    changed = (temporal_conv(x, weight, bias) != before).any(-1)
    assert changed[1, 2:5, 2, 1].all() and changed.sum() == 3


def test_samples_do_not_meet_in_the_image(randn):
    """The image is T high: were the batch folded into its height, the last frame of one clip would reach the first of the next."""
    x, weight, bias = inputs(randn, 3, 4, 2, 2, 8, 8, torch.float64)
    whole = temporal_conv(x, weight, bias)
    assert all(torch.allclose(whole[b : b + 1], temporal_conv(x[b : b + 1], weight, bias), atol=1e-14) for b in range(3))


def test_same_bits_twice(randn):
    args = inputs(randn, 1, 8, 6, 10, 32, 32, torch.bfloat16)
    assert torch.equal(temporal_conv(*args), temporal_conv(*args))


def test_refusals(randn):
    x, weight, bias = inputs(randn, 1, 4, 2, 2, 6, 8)
    with pytest.raises(ValueError, match=r"weight: want \[C_out, 6, odd\], got \[8, 5, 3\]"):
        temporal_conv(x, weight[:, :5], bias)
    with pytest.raises(ValueError, match=r"weight: want \[C_out, 6, odd\], got \[8, 6, 2\]"):
        temporal_conv(x, weight[..., :2], bias)
