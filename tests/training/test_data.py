"""Batches by address: the same seed gives the same clips, windows and crops are slices of the whole, and held-out scenes stay out."""

from fractions import Fraction

import pytest
import torch

from engine import sprites
from engine.config import STAGE_ORDER
from engine.errors import MediaError
from engine.sprites import ATTRIBUTES
from engine.training import data
from engine.training.data import Folder, Sprites, batch_seed, draw_crop, draw_window, open_source


@pytest.fixture(scope="session")
def stages(tiny):
    from engine.cascade_folder import read_index

    config = read_index(tiny)
    return {name: config.stage(name) for name in STAGE_ORDER}


def test_batch_seed_tells_every_part_of_the_address_apart():
    addresses = [(0, "base", "videos", 12, 3), (0, "base", "videos", 1, 23), (1, "base", "videos", 12, 3), (0, "tsr1", "videos", 12, 3),
                 (0, "base", "pictures", 12, 3), (0, "base", "videos", 13, 3), (0, "base", "videos", "12", 3)]
    seeds = [batch_seed(*address) for address in addresses]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**62 for seed in seeds)
    assert batch_seed(0, "base") == batch_seed(0, "base")


@pytest.mark.parametrize("kind", ["clips", "pictures"])
def test_same_seed_same_batch(stages, kind):
    source, stage = Sprites(), stages["tsr1"]

    def draw(seed):
        return source.clips(seed, 3, stage, 4, (8, 8)) if kind == "clips" else source.pictures(seed, 3, stage, (8, 8))

    (a, captions), (b, again), (other, _) = draw(5), draw(5), draw(6)
    assert torch.equal(a, b) and captions == again and not torch.equal(a, other)
    assert a.shape == (3, 4 if kind == "clips" else 1, 8, 8, 3) and a.is_contiguous() and a.abs().max() <= 1 and len(captions) == 3
    assert a.unique().numel() > 3                                                    # pictures, not blanks


def test_windows_and_crops_are_slices_of_the_whole_clip(stages):
    source, stage = Sprites(), stages["ssr1"]                                        # 8 frames of 16x24
    found = set()
    for seed in range(12):
        part, captions = source.clips(seed, 2, stage, 4, (8, 8))
        whole, same = source.clips(seed, 2, stage, 8, None)
        (y, x, h, w), (rate, start) = draw_crop(seed, stage, (8, 8)), draw_window(seed, stage, 4)
        assert rate == 8 and captions == same
        assert torch.equal(part, whole[:, start : start + 4, y : y + h, x : x + w])
        found.add((start, y, x))
    assert {start for start, _, _ in found} == {0, 4} and {y for _, y, _ in found} == {0, 8} and {x for _, _, x in found} == {0, 8, 16}


def test_the_base_sees_the_whole_clip_at_a_lower_rate(stages):
    source, stage = Sprites(), stages["base"]
    few, _ = source.clips(3, 2, stage, 2)
    whole, _ = source.clips(3, 2, stage, 4)
    assert draw_window(3, stage, 2) == (2, 0) and torch.equal(few, whole[:, ::2])


def test_refused_windows_and_crops(stages):
    with pytest.raises(ValueError, match="frames: want a divisor of ssr1's 8, got 3"):
        draw_window(0, stages["ssr1"], 3)
    with pytest.raises(ValueError, match="crop: want at most ssr1's 16x24, got 8x32"):
        draw_crop(0, stages["ssr1"], (8, 32))


def test_held_out_combinations_are_never_drawn(stages, monkeypatch):
    asked = []
    real = sprites.sample_scenes

    def sample_scenes(count, seed, split="train"):
        scenes = real(count, seed, split=split)
        asked.append(scenes)
        return scenes

    monkeypatch.setattr(sprites, "sample_scenes", sample_scenes)
    Sprites().clips(0, 300, stages["base"], 1)
    Sprites().pictures(1, 300, stages["base"])
    drawn = torch.cat([torch.stack([getattr(scenes, name) for name in ATTRIBUTES]) for scenes in asked], 1)
    assert drawn.shape[1] == 600 and not sprites.is_held_out(drawn).any()
    everything = real(600, 0, split=None)
    assert 0.05 < sprites.is_held_out(everything).float().mean() < 0.2                # the ones that could have come


def test_captions_speak_of_motion_only_for_clips(stages):
    _, clips = Sprites().clips(0, 40, stages["base"], 1)
    _, pictures = Sprites().pictures(0, 40, stages["base"])
    assert all("motion" in sprites.parse(text) for text in clips)
    assert not any("motion" in sprites.parse(text) for text in pictures)
    assert [sprites.parse(a)["shape"] for a in clips] == [sprites.parse(b)["shape"] for b in pictures]         # the same scenes


@pytest.fixture
def captioned(tmp_path, stages):
    """Two clips: frame i of `one` is grey of level i / 40 on average, darker at the left, of `two` its negative, at 24 fps for 1 1/3 s."""
    from engine.media import write_video

    ramp = (torch.arange(32) / 32 * 0.8).view(32, 1, 1, 1) + torch.linspace(-0.2, 0.2, 24).view(24, 1).expand(32, 16, 24, 3)
    for name, video in (("one", ramp), ("two", -ramp)):
        write_video(tmp_path / f"{name}.mp4", video, 24)
    (tmp_path / "one.txt").write_text("first\n\n  also first  \n")
    (tmp_path / "two.txt").write_text("second\n")
    write_video(tmp_path / "no caption.mp4", ramp[:2], 24)
    write_video(tmp_path / "empty.mp4", ramp[:2], 24)
    (tmp_path / "empty.txt").write_text("\n")
    return tmp_path


def test_folder_of_captioned_clips(captioned, stages):
    source = open_source(str(captioned))
    assert [path.name for path, _ in source.items] == ["one.mp4", "two.mp4"] and source.items[0][1] == ["first", "also first"]
    seen = set()
    for seed in range(6):
        video, captions = source.clips(seed, 3, stages["base"], 4)
        again, same = source.clips(seed, 3, stages["base"], 4)
        assert torch.equal(video, again) and captions == same and video.shape == (3, 4, 8, 12, 3)
        wanted = torch.arange(4) * 8 / 32 * 0.8                                         # base: 4 frames at 3 fps, one of 8
        for clip, caption in zip(video, captions):
            level = clip.mean((1, 2, 3)) * (-1 if caption == "second" else 1)
            torch.testing.assert_close(level, wanted, rtol=0, atol=0.03)
        seen |= set(captions)
    assert seen == {"first", "also first", "second"}


def test_folder_windows_follow_the_clock(captioned, stages):
    """A stage above the base sees a window at its own rate: frame i of window at `start` is the picture of that moment."""
    source, stage = Folder(captioned), stages["tsr2"]                                   # 16 frames at 12 fps of 24x36
    starts = set()
    for seed in range(6):
        video, captions = source.clips(seed, 1, stage, 4, (8, 16))
        whole, _ = source.clips(seed, 1, stage, 4)
        (y, x, h, w), (_, start) = draw_crop(seed, stage, (8, 16)), draw_window(seed, stage, 4)
        level = whole[0].mean((1, 2, 3)) * (-1 if captions[0] == "second" else 1)
        torch.testing.assert_close(level, (start + torch.arange(4)) * 2 / 32 * 0.8, rtol=0, atol=0.03)
        assert torch.equal(video, whole[:, :, y : y + h, x : x + w]) and video.shape == (1, 4, 8, 16, 3)
        starts.add((start, x))
    assert len({start for start, _ in starts}) > 1 < len({x for _, x in starts})


def test_folder_pictures(captioned, stages):
    pictures, captions = Folder(captioned).pictures(0, 5, stages["base"])
    assert pictures.shape == (5, 1, 8, 12, 3) and len(captions) == 5


def test_a_clip_shorter_than_the_cascades_gives_its_end(tmp_path, stages):
    from engine.media import write_video

    levels = torch.linspace(-0.5, 0.5, 6)
    write_video(tmp_path / "short.mp4", levels.view(6, 1, 1, 1).expand(6, 24, 36, 3), Fraction(12))      # 0.5 s of 1 1/3
    (tmp_path / "short.txt").write_text("short")
    late = next(seed for seed in range(20) if draw_window(seed, stages["tsr2"], 4)[1] >= 8)
    video, _ = Folder(tmp_path).clips(late, 1, stages["tsr2"], 4)
    torch.testing.assert_close(video[0].mean((1, 2, 3)), levels[2:], rtol=0, atol=0.03)


@pytest.mark.parametrize("content", [None, [], ["clip.mp4"], ["clip.txt"]], ids=str)
def test_folders_without_captioned_clips_are_refused(tmp_path, content):
    root = tmp_path / "clips"
    if content is not None:
        root.mkdir()
        for name in content:
            (root / name).write_text("a caption")
    with pytest.raises(MediaError, match="want videos with a caption file beside each"):
        open_source(str(root))


def test_the_sprite_world_has_a_name():
    assert isinstance(open_source("sprites"), data.Sprites)
