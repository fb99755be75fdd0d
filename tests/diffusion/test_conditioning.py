"""How one stage's video becomes the next one's condition: closed forms of the fillings, and what resizing keeps."""

import pytest
import torch

from engine.diffusion.conditioning import downsample, resize, upsample


def video(T=4, H=6, W=10, B=2, seed=0):
    return torch.rand(B, T, H, W, 3, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_repeat_holds_each_frame():
    x = video()
    assert torch.equal(upsample(x, 12, 6, 10, "repeat"), x[:, torch.arange(12) // 3])


def test_blank_leaves_zeros_between():
    x = video()
    y = upsample(x, 12, 6, 10, "blank")
    assert torch.equal(y[:, ::3], x) and not y[:, 1::3].any() and not y[:, 2::3].any()


def test_linear_blends_towards_the_next_frame_and_holds_the_last():
    x = video()
    y = upsample(x, 12, 6, 10, "linear")
    for i in range(12):
        a, b, w = x[:, i // 3], x[:, min(i // 3 + 1, 3)], i % 3 / 3
        torch.testing.assert_close(y[:, i], (1 - w) * a + w * b, rtol=0, atol=1e-6)
    ramp = torch.arange(4.0).view(1, 4, 1, 1, 1).expand(1, 4, 2, 2, 3)
    torch.testing.assert_close(upsample(ramp, 8, 2, 2, "linear")[0, :, 0, 0, 0], torch.tensor([0, 0.5, 1, 1.5, 2, 2.5, 3, 3]))


@pytest.mark.parametrize("temporal", ["repeat", "blank", "linear"])
def test_given_frames_come_back(temporal):
    """Frame i of t stands at i * frames / t, for the upsampling as for the skipping that the training conditions on."""
    x = video()
    assert torch.equal(downsample(upsample(x, 12, 6, 10, temporal), 4, 6, 10), x)


def test_downsample_skips_frames_and_does_not_average_them():
    x = video(T=12)
    assert torch.equal(downsample(x, 4, 6, 10), x[:, [0, 3, 6, 9]])


@pytest.mark.parametrize("size", [(6, 10), (12, 20), (9, 25), (3, 5), (4, 20)])
def test_resize_keeps_constants_and_linearity(size):
    flat = torch.full((1, 2, 6, 10, 3), 0.3)
    torch.testing.assert_close(resize(flat, *size), torch.full((1, 2, *size, 3), 0.3), rtol=0, atol=1e-6)
    a, b = video(seed=1), video(seed=2)
    torch.testing.assert_close(resize(2 * a - b, *size), 2 * resize(a, *size) - resize(b, *size), rtol=0, atol=1e-5)
    assert resize(a, *size).is_contiguous()


def test_resize_sees_one_frame_and_one_channel():
    """An impulse in one frame and channel stays there, so H, W, T and C are not mixed up."""
    x = torch.zeros(2, 3, 4, 8, 3)
    x[1, 2, 1, 5, 0] = 1
    y = resize(x, 8, 16)
    assert y[1, 2, :, :, 0].any()
    y[1, 2, :, :, 0] = 0
    assert not y.any()
    big = resize(x, 8, 16)[1, 2, :, :, 0]
    assert divmod(big.argmax().item(), 16) in [(r, c) for r in (2, 3) for c in (10, 11)]


def test_shrinking_is_antialiased_and_growing_is_plain_bilinear():
    """A one-pixel checkerboard: averaged to grey on the way down; on the way up, the textbook's weights 1/4 and 3/4."""
    y, x = torch.meshgrid(torch.arange(24), torch.arange(24), indexing="ij")
    board = ((y + x) % 2 * 2.0 - 1).view(1, 1, 24, 24, 1).expand(-1, -1, -1, -1, 3)
    assert resize(board, 8, 8)[:, :, 1:-1, 1:-1].abs().max() < 0.15             # without antialiasing every sample is -1 or 1
    row = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2, 1).expand(1, 1, 1, 2, 3)
    torch.testing.assert_close(resize(row, 1, 4)[0, 0, 0, :, 0], torch.tensor([0, 0.25, 0.75, 1]))


def test_antialiased_shrinking_keeps_the_mean_inside():
    """Every input pixel has the same total weight, away from the border: the weights of the adjoint."""
    x = torch.zeros(1, 1, 32, 32, 3)
    x[:, :, 13, 17] = 1
    torch.testing.assert_close(resize(x, 16, 16).sum(), torch.tensor(3 / 4), rtol=0, atol=1e-5)
    x = video(T=1, H=32, W=32)
    weights = torch.autograd.functional.vjp(lambda v: resize(v, 16, 16), x, torch.ones(2, 1, 16, 16, 3))[1]
    torch.testing.assert_close(weights[:, :, 4:-4, 4:-4], torch.full((2, 1, 24, 24, 3), 0.25), rtol=0, atol=1e-5)
    torch.testing.assert_close((weights * x).sum(), resize(x, 16, 16).sum(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("frames", [6, 3])
def test_refusals(frames):
    with pytest.raises(ValueError, match="frames: want a multiple of the video's 4"):
        upsample(video(), frames, 6, 10)
    with pytest.raises(ValueError, match="frames: want a divisor of the video's 4"):
        downsample(video(), 3, 6, 10)
    with pytest.raises(ValueError, match="temporal"):
        upsample(video(), 8, 6, 10, "cubic")
