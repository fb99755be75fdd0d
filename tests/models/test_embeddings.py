import math

import pytest
import torch

from engine.models.embeddings import FrameIndex, RelativePositionBias, TimeEmbedding, coordinate_maps, sinusoids


def test_sinusoids_are_geometric():
    x = torch.tensor([0.0, 1.0, 250.5])
    got = sinusoids(x, 6, 100.0)
    for i, frequency in enumerate([1, 100 ** (-1 / 3), 100 ** (-2 / 3)]):
        assert got[:, i].tolist() == pytest.approx([math.cos(v * frequency) for v in x.tolist()], abs=1e-5)
        assert got[:, 3 + i].tolist() == pytest.approx([math.sin(v * frequency) for v in x.tolist()], abs=1e-5)
    assert sinusoids(x.bfloat16(), 6).dtype == torch.float32


def test_times_are_told_apart_in_bf16():
    """1000 * time must reach the sinusoids in fp32: neighbours of 128 steps round to one bf16 number."""
    embed = TimeEmbedding(64, 32).to(torch.bfloat16)
    out = embed(torch.tensor([1.0, 127 / 128, 126 / 128]))
    assert out.dtype == torch.bfloat16 and (out[0] != out[1]).any() and (out[1] != out[2]).any()


def test_relative_bias_depends_on_signed_distance_only():
    bias = RelativePositionBias(heads=2, max_frames=4)
    bias.table.data = torch.arange(14.0).view(2, 7)
    got = bias(6)
    assert got.shape == (2, 6, 6)
    for s in range(6):
        for t in range(6):
            assert got[:, s, t].tolist() == bias.table[:, min(max(t - s, -3), 3) + 3].tolist()
    assert torch.equal(bias(3), got[:, :3, :3])


def test_frame_index_is_zero_for_independent_frames():
    index = FrameIndex(8, 12)
    text = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([False, True, False])
    out, all_videos = index(text, 5, mask), index(text, 5, None)
    assert out.shape == (3, 5, 12) and not out[1].any() and torch.equal(out[[0, 2]], all_videos[[0, 2]])
    assert all((all_videos[0, t] - all_videos[0, 0]).abs().max() > 1e-3 for t in range(1, 5))


def test_frame_index_reads_the_caption_against_the_clock():
    """Not a sum of the two: how one caption differs from another changes from frame to frame."""
    out = FrameIndex(8, 12)(torch.randn(2, 8, generator=torch.Generator().manual_seed(0)), 5, None)
    difference = out[0] - out[1]
    assert (difference[1:] - difference[:1]).abs().max() > 1e-3


def test_frame_index_is_a_place_in_the_clip_not_a_count():
    index, text = FrameIndex(8, 12), torch.ones(1, 8)
    assert torch.allclose(index(text, 16, None)[:, ::2], index(text, 8, None), atol=1e-6)


def test_coordinates_are_of_pixel_centres():
    maps = coordinate_maps(2, 4, "cpu", torch.float32)
    assert maps.shape == (2, 4, 10)
    assert maps[:, 0, 0].tolist() == [-0.5, 0.5] and maps[0, :, 1].tolist() == [-0.75, -0.25, 0.25, 0.75]
    assert torch.allclose(maps[..., 2:4], (maps[..., :2] * math.pi).sin())
    assert torch.allclose(maps[..., 8:], (maps[..., :2] * 2 * math.pi).cos())
    assert torch.allclose(maps.flip(0, 1)[..., :2], -maps[..., :2])
