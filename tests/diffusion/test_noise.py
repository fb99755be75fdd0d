"""Noise by address: the same frame gets the same numbers however the video is cut, and different addresses get different ones."""

import itertools

import pytest
import torch

from engine.diffusion import noise
from engine.diffusion.noise import frame_noise, noise_key

SHAPE = (12, 20, 3)
PINNED = [-0.28469374775886536, -0.04774896427989006, 0.8482382893562317, -0.6666747331619263]


def test_chunks_order_and_repeats_do_not_matter():
    whole = frame_noise(7, "ssr3", 2, range(12), SHAPE)
    assert whole.shape == (12, *SHAPE) and whole.dtype == torch.float32 and whole.is_contiguous()
    chunks = torch.cat([frame_noise(7, "ssr3", 2, range(a, b), SHAPE) for a, b in ((0, 5), (5, 6), (6, 12))])
    assert chunks.equal(whole)
    assert frame_noise(7, "ssr3", 2, [9, 3, 3], SHAPE).equal(whole[[9, 3, 3]])


@pytest.mark.parametrize("threads", [1, 2, 3, 8, None])
def test_threads_do_not_matter(threads, monkeypatch):
    alone = frame_noise(0, "base", 0, range(9), SHAPE, threads=1)
    monkeypatch.setattr(noise, "_SMALL", 0)
    assert frame_noise(0, "base", 0, range(9), SHAPE, threads=threads).equal(alone)


def test_every_part_of_the_address_matters():
    addresses = list(itertools.product((0, 1, 12), ("base", "tsr1", "ssr1"), (-1, 0, 1, 10, "init", "aug", "1"), (0, 1, 3, 23, 127)))
    keys = {noise_key(*address) for address in addresses}
    assert len(keys) == len(addresses)
    streams = [frame_noise(*address[:3], [address[3]], (8, 8, 3)).flatten() for address in addresses]
    correlation = torch.corrcoef(torch.stack(streams)).fill_diagonal_(0).abs().max()
    assert correlation < 6 / (8 * 8 * 3) ** 0.5


def test_integers_of_any_kind_are_one_address():
    import numpy as np
    assert noise_key(np.int64(3), "base", np.int32(1), np.int64(2)) == noise_key(3, "base", 1, 2)


def test_is_standard_normal():
    x = frame_noise(3, "ssr1", "init", range(64), (48, 80, 3)).double().flatten()
    n = x.numel()
    assert abs(x.mean()) < 4 / n**0.5
    assert abs(x.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 4 * (96 / n) ** 0.5
    frames = x.reshape(64, -1)
    assert (frames.mean(1).abs() < 5 / frames.shape[1] ** 0.5).all()
    assert torch.corrcoef(frames).fill_diagonal_(0).abs().max() < 6 / frames.shape[1] ** 0.5


def test_bits_are_pinned():
    """A seed in a manifest must give the same video after an upgrade of numpy; if this fails, say so in the changelog."""
    assert frame_noise(1, "base", "init", [0], (1, 2, 2)).flatten().tolist() == pytest.approx(PINNED, abs=1e-7)


def test_no_frames():
    assert frame_noise(0, "base", 0, [], SHAPE).shape == (0, *SHAPE)
