"""The readout is right on real renders, clean or not, follows each attribute alone, and reports chance on the wrong answers."""

import pytest
import torch
import torch.nn.functional as F

from engine.sprites import ATTRIBUTES, render, sample_scenes
from engine.sprites.readout import read, score


def spoil(video, seed):
    """Blurred by a 3x3 binomial, noisy (sigma .05), rounded to 5 bits, brightness off by a few percent."""
    generator = torch.Generator().manual_seed(seed)
    taps = torch.tensor([1.0, 2.0, 1.0]) / 4
    planes = F.pad(video.flatten(0, 1).movedim(-1, 1).flatten(0, 1)[:, None], (1, 1, 1, 1), mode="replicate")
    planes = F.conv2d(planes, (taps[:, None] * taps)[None, None])
    video = planes.view(-1, 3, *video.shape[2:4]).movedim(1, -1).unflatten(0, video.shape[:2])
    video = video * (1 + 0.04 * torch.randn(len(video), 1, 1, 1, 1, generator=generator))
    video = video + 0.05 * torch.randn(video.shape, generator=generator)
    return ((video * 16).round() / 16).clamp(-1, 1)


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("condition", [lambda v: v, lambda v: spoil(v, 1)], ids=["clean", "spoiled"])
def test_reads_real_renders(split, condition):
    scenes = sample_scenes(200, 21, split)
    video = condition(render(scenes))
    got = score(video, scenes)
    assert got.keys() == ATTRIBUTES.keys() and min(got.values()) >= 0.99, got
    found = read(video)
    error = (found.track - scenes.centres(torch.arange(16) / 16)).norm(dim=-1)
    assert error.mean() < 0.3
    travel = scenes.centres(torch.tensor([0.0, 1.0]))
    assert (found.displacement - (travel[:, 1] - travel[:, 0])).abs().mean() < 0.3


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_an_edit_changes_its_own_readout_only(name):
    scenes = sample_scenes(60, 33)
    edited = scenes.replace(**{name: (getattr(scenes, name) + 1) % len(ATTRIBUTES[name])})
    before, after = read(render(scenes)), read(render(edited))
    for other in ATTRIBUTES:
        same = (getattr(before, other) == getattr(after, other)).float().mean()
        assert same <= 0.02 if other == name else same >= 0.98, (other, same)


@pytest.mark.parametrize(("frames", "height", "width"), [(32, 48, 80), (8, 24, 40), (40, 30, 50)])
def test_other_sizes_and_lengths(frames, height, width):
    scenes = sample_scenes(24, 12)
    assert min(score(render(scenes, frames, height, width), scenes).values()) >= 0.95


def test_reverse_shuffle_and_noise_are_not_flattered():
    scenes = sample_scenes(80, 5).replace(motion=torch.arange(80) % 2 + 1)
    video = render(scenes)
    assert score(video.flip(1), scenes)["motion"] == 0
    shuffled = video[:, torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    assert score(shuffled, scenes)["motion"] < 0.3                     # the last frame of "left" is not where it should be
    noise = read(torch.randn(video.shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1))
    assert noise.match.mean() < 0.8 < read(video).match.min()


def test_night_is_dark_not_only_bluish():
    scenes = sample_scenes(30, 3).replace(style="night", background_colour="grey")
    video = render(scenes) - torch.tensor([0.0, 0.0, 0.08])            # the tint of the night taken away
    assert score(video, scenes)["style"] == 1


def test_one_frame_reads_as_still():
    scenes = sample_scenes(20, 5).replace(motion="still")
    assert min(score(render(scenes)[:, :1], scenes).values()) >= 0.95


def test_score_counts_what_is_asked():
    scenes = sample_scenes(4, 2)
    video = render(scenes)
    right = scenes.attributes(0)["colour"]
    wanted = [{"colour": right}, {"colour": "none of them"}, {"shape": scenes.attributes(2)["shape"]}, {}]
    assert score(video, wanted) == {"shape": 1.0, "colour": 0.5}


def test_constant_and_broken_clips_do_not_crash():
    assert len(list(read(torch.zeros(2, 16, 24, 40, 3)))) == 2
    assert torch.isfinite(read(torch.full((1, 16, 24, 40, 3), torch.nan)).track).all()


@pytest.mark.parametrize("video", [torch.zeros(16, 24, 40, 3), torch.zeros(1, 16, 12, 40, 3)])
def test_wrong_video_is_refused(video):
    with pytest.raises(ValueError, match="video: want"):
        read(video)
