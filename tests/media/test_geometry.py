"""Which part of a picture is taken and where it lands."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from engine.media.geometry import Fit, fit_geometry, place, to_signed


@pytest.mark.parametrize(
    "args, want",
    [
        ((100, 100, 24, 40, "crop"), Fit(20, 0, 60, 100, 0, 0, 24, 40)),           # too tall: rows go
        ((100, 300, 24, 40, "crop"), Fit(0, 66, 100, 167, 0, 0, 24, 40)),          # too wide: columns go
        ((100, 100, 24, 40, "pad"), Fit(0, 0, 100, 100, 0, 8, 24, 24)),
        ((100, 100, 24, 40, "stretch"), Fit(0, 0, 100, 100, 0, 0, 24, 40)),
        ((100, 100, 50, 100, "crop", Fraction(2)), Fit(0, 0, 100, 100, 0, 0, 50, 100)),   # 2:1 pixels: already the target's shape
        ((100, 100, 50, 50, "crop", Fraction(2)), Fit(0, 25, 100, 50, 0, 0, 50, 50)),
        ((100, 100, 50, 50, "pad", Fraction(2)), Fit(0, 0, 100, 100, 12, 0, 25, 50)),
        ((1, 1000, 24, 40, "pad"), Fit(0, 0, 1, 1000, 11, 0, 1, 40)),              # never less than one line
        ((1, 1000, 1000, 1, "crop"), Fit(0, 499, 1, 1, 0, 0, 1000, 1)),
    ],
    ids=str,
)
def test_boxes(args, want):
    assert fit_geometry(*args) == want


def test_boxes_stay_inside():
    for h, w, H, W in [(2, 999, 24, 40), (7, 3, 192, 320), (718, 718, 24, 40), (5, 5, 1, 1)]:
        for fit in ("crop", "pad", "stretch"):
            for aspect in (Fraction(1, 3), 1, Fraction(7, 2)):
                g = fit_geometry(h, w, H, W, fit, aspect)
                assert 0 <= g.top and g.top + g.height <= h and 0 <= g.left and g.left + g.width <= w and min(g.height, g.width) >= 1
                assert 0 <= g.out_top and g.out_top + g.out_height <= H and 0 <= g.out_left and g.out_left + g.out_width <= W


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="fit: want one of crop, pad, stretch, got 'zoom'"):
        fit_geometry(4, 4, 4, 4, "zoom")
    with pytest.raises(ValueError, match="positive"):
        fit_geometry(0, 4, 4, 4)


def test_reducing_is_antialiased():
    """White noise reduced 4 times a side: antialiased it keeps about a quarter of its spread, point-sampled nearly all."""
    noise = torch.rand(96, 160, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert place(noise, 24, 40, "crop").std() < 0.35 * noise.std()


def test_same_size_is_untouched_and_overshoot_is_clamped():
    noise = torch.rand(24, 40, 3) * 2 - 1
    assert torch.equal(place(noise, 24, 40, "crop"), noise)
    edge = torch.full((8, 8, 3), -1.0)
    edge[:, 4:] = 1
    large = place(edge, 64, 64, "stretch")
    assert large.min() == -1 and large.max() == 1


def test_pad_bars_are_the_background():
    out = place(torch.ones(10, 10, 3), 10, 20, "pad", (255, 0, 51))
    assert torch.allclose(out[:, 0], torch.tensor([1.0, -1.0, -0.6])) and (out[:, 5:15] == 1).all()


def test_alpha_and_depth():
    rgba = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [255, 255, 255, 51]]], np.uint8)
    assert torch.allclose(to_signed(rgba, (0, 255, 0))[0], torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-0.6, 1, -0.6]]), atol=1e-6)
    assert torch.allclose(to_signed(np.full((1, 1, 3), 65535, np.uint16)), torch.ones(1, 1, 3))
