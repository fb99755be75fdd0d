"""What one run learns from: a clip at a stage's frames and size, and the unordered set of its frames at the file's own rate (Sec. 4.2).

Both are read from the file for each stage in turn, and only the span of time that the cascade can show is read, so that a stage holds its
clip, and the set in half precision (an eighth of an 8-bit level), whatever the length of the file.
"""

import math
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from engine.config import CascadeConfig, FinetuneConfig, StageConfig
from engine.errors import ConfigError, MediaError
from engine.media import probe, read_clip

from .data import batch_seed

MAX_RATE = 60          # pictures a second of the frame set: more are copies of each other


@dataclass
class StageData:
    """One stage's share of the input: clip [T, H, W, 3] float32 in [-1, 1] or None, pictures [N, H, W, 3] float16, `notes` for the user."""

    clip: Tensor | None
    pictures: Tensor
    notes: list[str] = field(default_factory=list)

    def frames(self, count: int, seed: int) -> Tensor:
        """`count` pictures in random order, each as often as the others as far as it goes -> [count, H, W, 3] float32."""
        generator, chosen = torch.Generator().manual_seed(seed), []
        while len(chosen) < count:
            chosen += torch.randperm(len(self.pictures), generator=generator).tolist()
        return self.pictures[chosen[:count]].float()


@dataclass(frozen=True)
class Source:
    """Where a run learns from: a clip (with alpha < 1, its frames too), or a folder of pictures without any order."""

    path: Path
    images: bool = False

    def check(self, config: FinetuneConfig) -> None:
        """Before anything is loaded.   Raises: MediaError if it cannot be read, ConfigError if a clip is asked for and there is none."""
        if self.images and config.alpha == 1:
            raise ConfigError("alpha: want less than 1 for pictures, which have no order to learn, got 1")
        info = probe(self.path)
        if self.images and info.kind == "video":
            raise MediaError(f"{self.path}: want a folder of pictures, got a video; give it as the clip")

    def read(self, cascade: CascadeConfig, stage: StageConfig, config: FinetuneConfig) -> StageData:
        """Clip and frame set at the size of `stage`.   Raises: MediaError."""
        shape = {"height": stage.height, "width": stage.width, "fit": config.fit}
        if self.images:
            count = max(1, round(probe(self.path).duration * 24))           # a folder's pictures stand at 24 a second
            found = read_clip(self.path, frames=count, fps=24, source_fps=24, **shape)
            return StageData(None, found.video.half(), found.notes)
        clip = read_clip(self.path, frames=stage.frames, fps=stage.fps, start=config.start, **shape)
        if config.alpha == 1:                                               # the frames' loss is not run
            return StageData(clip.video, clip.video[:0].half(), clip.notes)
        last = cascade.stages[-1]
        rate = min(Fraction(clip.source.fps or stage.fps), MAX_RATE)
        seconds = min(clip.duration, last.frames / last.fps)
        count = max(1, math.ceil(seconds * rate - 1e-6))
        found = read_clip(self.path, frames=count, fps=rate, start=config.start, **shape)
        pictures = found.video[: max(1, found.covered)]                     # what lies past the end repeats the last picture
        return StageData(clip.video, pictures.half(), clip.notes)


def unit_seed(config: FinetuneConfig, stage: str, step: int, kind: str, draw: int) -> int:
    """The address of all that is random in one unit of work but its noise: nothing has to be kept for a resume but the step."""
    return batch_seed(config.seed, stage, "finetune", step, kind, draw)
