"""What a run learns from: the clip as each stage wants it, and all its frames once, without order."""

import numpy as np
import pytest
import torch
from PIL import Image

from engine.cascade_folder import read_index
from engine.config import FinetuneConfig
from engine.errors import ConfigError, MediaError
from engine.training.finetune_data import Source, StageData

MIXED = FinetuneConfig()


@pytest.fixture(scope="module")
def ramp(film, tmp_path_factory):
    """A clip of 2 s whose picture k has the level k / 24 - 1, one level a frame."""
    return film(tmp_path_factory.mktemp("clip") / "ramp.mp4", [k / 24 - 1 for k in range(48)])


def levels(video):
    return video.float().mean((1, 2, 3))


def test_the_clip_has_each_stages_frames_and_size(tiny, ramp):
    cascade = read_index(tiny)
    for name, frames in (("base", 4), ("ssr1", 8), ("ssr2", 8)):
        stage = cascade.stage(name)
        data = Source(ramp).read(cascade, stage, MIXED)
        assert data.clip.shape == (frames, stage.height, stage.width, 3) and data.clip.dtype == torch.float32
        want = torch.tensor([k * 24 / stage.fps / 24 - 1 for k in range(frames)])
        torch.testing.assert_close(levels(data.clip), want, rtol=0, atol=0.03)
        # the set: all pictures of the cascade's 32 / 24 s, at the file's own 24 a second
        assert data.pictures.shape == (32, stage.height, stage.width, 3) and data.pictures.dtype == torch.float16
        torch.testing.assert_close(levels(data.pictures), torch.arange(32) / 24 - 1, rtol=0, atol=0.03)


def test_frames_past_the_end_are_not_in_the_set(tiny, film, tmp_path):
    short = film(tmp_path / "short.mp4", [k / 10 - 0.5 for k in range(10)])
    cascade = read_index(tiny)
    data = Source(short).read(cascade, cascade.stage("base"), MIXED)
    assert len(data.pictures) == 10 and len(data.clip) == 4 and data.notes
    later = Source(short).read(cascade, cascade.stage("base"), FinetuneConfig(start=0.25))
    torch.testing.assert_close(levels(later.pictures), torch.arange(6, 10) / 10 - 0.5, rtol=0, atol=0.03)


def test_video_alone_reads_no_set(tiny, ramp):
    cascade = read_index(tiny)
    assert len(Source(ramp).read(cascade, cascade.stage("base"), FinetuneConfig(alpha=1.0)).pictures) == 0


def test_frames_are_drawn_without_order_and_without_return():
    data = StageData(None, torch.arange(12.0).half()[:, None, None, None].expand(12, 2, 2, 3))
    drawn = [data.frames(8, seed)[:, 0, 0, 0].tolist() for seed in range(200)]
    assert all(len(set(one)) == 8 for one in drawn)
    assert sum(one == sorted(one) for one in drawn) < 5
    seen = torch.bincount(torch.tensor(drawn).long().flatten(), minlength=12)
    assert seen.min() > 90 and seen.max() < 180                             # 133 on average
    many = data.frames(30, 1)[:, 0, 0, 0].long()
    assert torch.bincount(many, minlength=12).min() >= 2                    # scarce: each as often as the others
    assert torch.equal(data.frames(8, 5), data.frames(8, 5))


def test_a_folder_of_pictures(tiny, tmp_path):
    for k, size in enumerate([(48, 36), (60, 40), (33, 50)]):
        Image.fromarray(np.full((*size, 3), 60 * k, np.uint8)).save(tmp_path / f"{k}.png")
    cascade = read_index(tiny)
    source = Source(tmp_path, images=True)
    source.check(FinetuneConfig(alpha=0.0))
    data = source.read(cascade, cascade.stage("ssr1"), FinetuneConfig(alpha=0.0))
    assert data.clip is None and data.pictures.shape == (3, 16, 24, 3)
    torch.testing.assert_close(levels(data.pictures), torch.tensor([0, 60, 120]) / 127.5 - 1, rtol=0, atol=0.01)
    one = Source(tmp_path / "1.png", images=True).read(cascade, cascade.stage("ssr1"), FinetuneConfig(alpha=0.0))
    assert len(one.pictures) == 1


def test_refusals(tiny, tmp_path, ramp):
    with pytest.raises(ConfigError, match="alpha: want less than 1"):
        Source(tmp_path, images=True).check(FinetuneConfig(alpha=1.0))
    with pytest.raises(MediaError, match="folder without pictures"):
        Source(tmp_path, images=True).check(FinetuneConfig(alpha=0.0))
    with pytest.raises(MediaError, match="want a folder of pictures"):
        Source(ramp, images=True).check(FinetuneConfig(alpha=0.0))
    with pytest.raises(MediaError):
        Source(tmp_path / "none.mp4").check(MIXED)
