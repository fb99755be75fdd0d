"""Editing by inverting corruptions (Sec. 4.1): what the strength means, and how clips of any kind and length meet the cascade."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from engine import dreamix
from engine.cascade import Cascade
from engine.config import EditConfig, GenerateConfig
from engine.diffusion.noise import frame_noise
from engine.diffusion.schedule import CosineSchedule
from engine.errors import MediaError
from engine.media import read_clip, write_video

pytestmark = pytest.mark.usefixtures("own_cache")
PROMPT = "a red circle moving left over a plain grey background"


@pytest.fixture(scope="module")
def cascade(tiny):
    return Cascade.load(tiny, "cpu", "fp32")


@pytest.fixture(scope="module")
def ramp(film, tmp_path_factory):
    """48 frames at 24 fps, from -0.75 to 0.75: 2 s, of which the tiny cascade makes 1 1/3."""
    return film(tmp_path_factory.mktemp("film") / "ramp.mp4", torch.linspace(-0.75, 0.75, 48).tolist())


@pytest.fixture(scope="module")
def flat(film, tmp_path_factory):
    return film(tmp_path_factory.mktemp("film") / "flat.mp4", [0.4] * 48)


def keep(**more) -> EditConfig:
    """Strength 0: the base gives back what it was given."""
    return EditConfig(strength=0.0, last_stage="base", **more)


@pytest.mark.parametrize(("strength", "steps", "grid"), [(0.0, None, 0), (0.3, None, 0.25), (0.8, None, 0.75), (0.8, 10, 0.8), (1.0, 3, 1)])
def test_degrade(cascade, strength, steps, grid):
    """z_s = gamma_s v + sigma_s eps, at the grid time where sampling begins, with the schedule's shift and the noise of a run from text."""
    stage = cascade.config.stage("base")
    stage = stage.model_copy(update={"diffusion": stage.diffusion.model_copy(update={"logsnr_shift": -3.0})})
    video = torch.rand(4, 8, 12, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    eps = frame_noise(5, "base", "init", range(4), (8, 12, 3))
    schedule = CosineSchedule(-3.0)
    z = dreamix.degrade(video, strength, stage, 5, steps)
    torch.testing.assert_close(z, schedule.gamma(grid).float() * video + schedule.sigma(grid).float() * eps, rtol=0, atol=1e-6)
    if strength in (0.0, 1.0):
        assert torch.equal(z, video if strength == 0 else eps)
    if 0 < strength < 1:
        assert not torch.equal(dreamix.degrade(video, strength, stage, 6, steps), z)


def test_strength_0_keeps_the_input(cascade, ramp):
    result = dreamix.edit(cascade, ramp, PROMPT, EditConfig(strength=0.0, last_stage="tsr1"))
    clip = read_clip(ramp, frames=4, fps=3, height=8, width=12).video
    assert torch.equal(result.stages["base"], clip) and torch.equal(result.degraded, clip)
    assert list(result.stages) == ["base", "tsr1"] and torch.equal(result.output, result.stages["tsr1"])


def test_strength_1_forgets_the_input(cascade, ramp, flat):
    a, b = (dreamix.edit(cascade, path, PROMPT, EditConfig(strength=1.0, seed=7, last_stage="ssr1")) for path in (ramp, flat))
    text = dreamix.generate(cascade, PROMPT, GenerateConfig(seed=7, last_stage="ssr1"))
    for name in ("base", "tsr1", "ssr1"):
        assert torch.equal(a.stages[name], b.stages[name]) and torch.equal(a.stages[name], text.stages[name])
    assert not torch.equal(a.source, b.source)


def test_in_between_the_input_shines_through(cascade, ramp, flat):
    config = EditConfig(strength=0.5, last_stage="base")
    a, b = (dreamix.edit(cascade, path, PROMPT, config) for path in (ramp, flat))
    assert not torch.equal(a.output, b.output)
    assert cascade.reports[0].steps == 2
    again = dreamix.edit(cascade, ramp, PROMPT, config)
    assert torch.equal(again.output, a.output) and torch.equal(again.degraded, a.degraded)
    assert not torch.equal(dreamix.edit(cascade, ramp, PROMPT, config.model_copy(update={"seed": 1})).output, a.output)
    more = dreamix.edit(cascade, ramp, PROMPT, config.model_copy(update={"steps": {"base": 6}}))
    assert cascade.reports[0].steps == 3 and not torch.equal(more.output, a.output)


def test_generate(cascade):
    result = dreamix.generate(cascade, PROMPT, GenerateConfig(seed=7, last_stage="tsr1"))
    assert result.output.shape == (8, 8, 12, 3) and result.fps == 6 and result.source is None and result.degraded is None


def test_the_base_sees_the_moments_of_its_frames(cascade, ramp):
    result = dreamix.edit(cascade, ramp, PROMPT, keep())
    level = torch.linspace(-0.75, 0.75, 48)
    torch.testing.assert_close(result.output.mean((1, 2, 3)), level[[0, 8, 16, 24]], rtol=0, atol=0.02)
    assert result.fps == 3 and result.duration == pytest.approx(4 / 3)
    torch.testing.assert_close(result.source, result.output, rtol=0, atol=1e-6)


def test_start_and_a_longer_clip(cascade, ramp):
    result = dreamix.edit(cascade, ramp, PROMPT, keep(start=0.25))
    level = torch.linspace(-0.75, 0.75, 48)
    torch.testing.assert_close(result.output.mean((1, 2, 3)), level[[6, 14, 22, 30]], rtol=0, atol=0.02)
    assert result.notes == ("the cascade makes 1.33 s: edited 0.25 to 1.58 s of the input",)
    with pytest.raises(MediaError, match="start 2.5 s: want less than its length of 2 s"):
        dreamix.edit(cascade, ramp, PROMPT, keep(start=2.5))


def test_no_note_for_a_clip_of_the_right_length(cascade, film, tmp_path):
    path = film(tmp_path / "exact.mp4", [0.0] * 32)
    assert dreamix.edit(cascade, path, PROMPT, keep()).notes == ()


@pytest.mark.parametrize(("frames", "kept"), [(12, (2, 3)), (1, (1, 1)), (16, (2, 4)), (17, (3, 5))])
def test_a_shorter_clip_gives_a_shorter_video(cascade, film, tmp_path, frames, kept):
    """Every stage's video lasts as long as the clip, to the next whole frame: 32 frames of 1/24 s are all that the cascade makes."""
    path = film(tmp_path / "short.mp4", [0.2] * frames)
    result = dreamix.edit(cascade, path, PROMPT, EditConfig(strength=0.5, last_stage="tsr1"))
    assert (len(result.stages["base"]), len(result.stages["tsr1"])) == kept
    assert len(result.output) == len(result.source) == kept[1] and len(result.degraded) == kept[0]
    assert result.duration == pytest.approx(frames / 24)
    assert any("lie past the end" in note for note in result.notes)


def test_start_counts_against_the_length(cascade, ramp):
    result = dreamix.edit(cascade, ramp, PROMPT, keep(start=1.5))
    assert len(result.output) == 2 and result.duration == pytest.approx(0.5)


def test_fit(cascade, film, tmp_path):
    """48x36 into 12x8: crop loses two rows at the top and below, pad adds black at a side, stretch keeps all."""
    picture = np.full((36, 48, 3), 255, np.uint8)
    picture[:2] = 0
    path = film(tmp_path / "band.mp4", [0] * 8, picture=picture)
    crop, pad, stretch = (dreamix.edit(cascade, path, PROMPT, keep(fit=fit)).output[0].mean(-1) for fit in ("crop", "pad", "stretch"))
    assert crop[1:].min() > 0.9 and crop[0].min() > 0.5
    assert min(pad[:, 0].max(), pad[:, -1].max()) < -0.9 and pad[2:, 2:-2].min() > 0.9
    assert stretch[0].max() < 0.6 and stretch[2:].min() > 0.9


def test_sources_that_are_no_video_files(cascade, tmp_path):
    """A folder of PNG, a GIF, an array and a picture give the same edit as the frames they hold."""
    levels = (torch.arange(32) // 8 * 0.25 - 0.5).view(32, 1, 1, 1).expand(32, 8, 12, 3).contiguous()
    write_video(tmp_path / "frames", levels, 24)
    write_video(tmp_path / "frames.gif", levels[::2], 12)
    write_video(tmp_path / "frames.npy", levels, 24)
    Image.fromarray(np.full((8, 12, 3), 191, np.uint8)).save(tmp_path / "one.png")
    wanted = levels[::8]
    for name in ("frames", "frames.gif", "frames.npy"):
        result = dreamix.edit(cascade, tmp_path / name, PROMPT, keep())
        torch.testing.assert_close(result.output, wanted, rtol=0, atol=0.02, msg=lambda text, name=name: f"{name}: {text}")
    result = dreamix.edit(cascade, tmp_path / "one.png", PROMPT, keep())
    assert len(result.output) == 1 and result.output.mean() == pytest.approx(0.5, abs=0.01)


def test_videos_that_are_not_there(cascade, tmp_path):
    (tmp_path / "text.mp4").write_text("not a video")
    for name in ("none.mp4", "text.mp4"):
        with pytest.raises(MediaError):
            dreamix.edit(cascade, tmp_path / name, PROMPT, keep())


def test_rates_are_exact(cascade):
    result = dreamix.generate(cascade, PROMPT, GenerateConfig(last_stage="base"))
    assert isinstance(result.fps, Fraction) and result.fps == 3 and result.notes == ()
