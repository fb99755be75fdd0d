"""What Dreamix adds to a text-to-video cascade: editing a video by inverting corruptions (Sec. 4.1)."""

import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from torch import Tensor

from engine.cascade import Cascade, Progress
from engine.config import EditConfig, GenerateConfig, StageConfig
from engine.diffusion.noise import frame_noise
from engine.diffusion.sampler import start_index
from engine.diffusion.schedule import CosineSchedule, add_noise
from engine.media import read_clip


@dataclass
class Result:
    """A finished run. Videos are [T, H, W, 3] in [-1, 1]; all of them last as long as `output`, at their own frame rates."""

    output: Tensor
    fps: Fraction
    stages: dict[str, Tensor]
    source: Tensor | None = None            # the input, at the size and rate of `output`
    degraded: Tensor | None = None          # z_s, where sampling began
    duration: float | None = None           # seconds of the input that were edited
    notes: tuple[str, ...] = ()


def degrade(video: Tensor, strength: float, stage: StageConfig, seed: int, steps: int | None = None) -> Tensor:
    """The corrupted video that an edit starts from: z_s = gamma_s v + sigma_s eps, v at the base's size (Sec. 4.1).

    Shapes: video [T, H, W, 3], already downsampled to the base -> same. s is the sampler's grid time nearest to strength.
    """
    steps = steps or stage.steps
    eps = frame_noise(seed, stage.name, "init", range(len(video)), tuple(video.shape[1:]))
    return add_noise(video[None], eps[None], start_index(strength, steps) / steps, CosineSchedule(stage.diffusion.logsnr_shift))[0]


def edit(cascade: Cascade, path: str | Path, prompt: str, config: EditConfig, progress: Progress | None = None) -> Result:
    """The video of `path` as `prompt` describes it after the edit.

    The clip is read twice, at the base's 16 frames and, to be compared, at the output's size; it is edited from `config.start` for as
    long as the cascade's videos last, or to its end. Raises: MediaError if it cannot be read.
    """
    base, last = cascade.config.stages[0], cascade.config.stage(config.last_stage)
    clip = read_clip(path, frames=base.frames, fps=base.fps, height=base.height, width=base.width, fit=config.fit, start=config.start)
    source = read_clip(path, frames=last.frames, fps=last.fps, height=last.height, width=last.width, fit=config.fit, start=config.start)
    seconds = min(clip.duration, last.frames / last.fps)
    notes = list(clip.notes)                                    # the second reading has the same to say
    if clip.duration > last.frames / last.fps + 0.5 / last.fps:
        end = config.start + seconds
        notes.append(f"the cascade makes {last.frames / last.fps:.2f} s: edited {config.start:g} to {end:.2f} s of the input")
    degraded = degrade(clip.video, config.strength, base, config.seed, config.steps.get("base"))
    stages = cascade.sample(prompt, config, z=degraded, strength=config.strength, progress=progress)

    def trimmed(video: Tensor) -> Tensor:
        return video[: max(1, math.ceil(len(video) * seconds / (last.frames / last.fps) - 1e-6))]

    stages = {name: trimmed(video) for name, video in stages.items()}
    return Result(stages[config.last_stage], Fraction(last.fps).limit_denominator(1001), stages, trimmed(source.video), trimmed(degraded),
                  seconds, (*notes, *cascade.notes))


def generate(cascade: Cascade, prompt: str, config: GenerateConfig, progress: Progress | None = None) -> Result:
    """A video from text alone: sampling from s = 1, where nothing of an input is left."""
    last = cascade.config.stage(config.last_stage)
    stages = cascade.sample(prompt, config, progress=progress)
    return Result(stages[config.last_stage], Fraction(last.fps).limit_denominator(1001), stages, notes=tuple(cascade.notes))
