"""Captioned video for pretraining: batches addressed by (seed, step, rank), so a resumed run sees what an unbroken one would."""

import hashlib
import random
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from engine import sprites
from engine.config import StageConfig
from engine.errors import MediaError


def batch_seed(*address) -> int:
    """A 62-bit seed for one purpose of one step."""
    return int.from_bytes(hashlib.blake2b(repr(address).encode(), digest_size=8).digest(), "little") >> 2


class CaptionedSource(Protocol):
    """Anything that gives captioned clips and pictures at the size of a stage, the same ones for the same seed."""

    def clips(self, seed: int, count: int, stage: StageConfig, frames: int, crop: tuple[int, int] | None) -> tuple[Tensor, list[str]]:
        """-> videos [count, frames, h, w, 3] in [-1, 1], captions. (h, w) is the crop, or the stage's size.

        Fewer frames than the stage's: for base the whole clip at a lower rate, for the others a window at the stage's own rate.
        """

    def pictures(self, seed: int, count: int, stage: StageConfig, crop: tuple[int, int] | None) -> tuple[Tensor, list[str]]:
        """-> pictures [count, 1, h, w, 3], captions that do not speak of motion."""


def draw_crop(seed: int, stage: StageConfig, crop: tuple[int, int] | None, grid: int = 8) -> tuple[int, int, int, int]:
    """A crop (y, x, h, w) whose corner lies on a grid, so that a lower resolution has whole pixels there."""
    if crop is None:
        return 0, 0, stage.height, stage.width
    if crop[0] > stage.height or crop[1] > stage.width:
        raise ValueError(f"crop: want at most {stage.name}'s {stage.height}x{stage.width}, got {crop[0]}x{crop[1]}")
    rng = random.Random(seed)
    y, x = (rng.randrange(0, (full - size) // grid + 1) * grid for full, size in zip((stage.height, stage.width), crop))
    return y, x, *crop


def draw_window(seed: int, stage: StageConfig, frames: int) -> tuple[int, int]:
    """(rate, start): frames of the whole clip at this sampling, and the first of them that is used."""
    if stage.frames % frames:
        raise ValueError(f"frames: want a divisor of {stage.name}'s {stage.frames}, got {frames}")
    if stage.name == "base":
        return frames, 0
    return stage.frames, random.Random(seed + 1).randrange(0, stage.frames // frames) * frames


class Sprites:
    """The procedural world: endless, and never the same clip twice. The combinations held out for testing are never drawn."""

    def clips(self, seed, count, stage, frames, crop=None):
        scenes = sprites.sample_scenes(count, seed, split="train")
        rate, start = draw_window(seed, stage, frames)
        video = sprites.render(scenes, rate, stage.height, stage.width, start=start, stop=start + frames, crop=draw_crop(seed, stage, crop))
        return video, sprites.captions(scenes, seed)

    def pictures(self, seed, count, stage, crop=None):
        scenes = sprites.sample_scenes(count, seed, split="train")
        moments = torch.rand(count, generator=torch.Generator().manual_seed(seed))
        y, x, h, w = draw_crop(seed, stage, crop)
        pictures = sprites.render_frames(scenes, moments, stage.height, stage.width)[:, None, y : y + h, x : x + w]
        return pictures.contiguous(), sprites.captions(scenes, seed, motion=False)


class Folder:
    """Video files with captions beside them: `clip.mp4` and `clip.txt`, one caption a line."""

    def __init__(self, root: str | Path, fit: str = "crop"):
        self.fit = fit
        entries = sorted(Path(root).iterdir()) if Path(root).is_dir() else []
        self.items = [(path, lines) for path in entries if path.suffix != ".txt" and (lines := self._captions(path.with_suffix(".txt")))]
        if not self.items:
            raise MediaError(f"{root}: want videos with a caption file beside each (clip.mp4, clip.txt), found none")

    @staticmethod
    def _captions(path: Path) -> list[str]:
        return [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()] if path.is_file() else []

    def clips(self, seed, count, stage, frames, crop=None):
        from engine.media import probe, read_clip

        rng = random.Random(seed)
        y, x, h, w = draw_crop(seed, stage, crop)
        rate, start = draw_window(seed, stage, frames)
        fps = stage.fps * rate / stage.frames
        videos, captions = [], []
        for path, lines in rng.choices(self.items, k=count):
            # a clip that is over before the window begins gives its end
            begin = max(0.0, min(start / fps, (probe(path).duration or 0.0) - frames / fps))
            video = read_clip(path, frames=frames, fps=fps, height=stage.height, width=stage.width, fit=self.fit, start=begin).video
            videos.append(video[:, y : y + h, x : x + w])
            captions.append(rng.choice(lines))
        return torch.stack(videos), captions

    def pictures(self, seed, count, stage, crop=None):
        video, captions = self.clips(seed, count, stage, min(stage.frames, 16), crop)
        moments = torch.randint(video.shape[1], (count,), generator=torch.Generator().manual_seed(seed))
        return video[torch.arange(count), moments][:, None], captions


def open_source(name: str) -> CaptionedSource:
    """`sprites`, or a folder of captioned videos."""
    return Sprites() if name == "sprites" else Folder(name)


