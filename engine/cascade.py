"""The cascade: seven stages, each conditioned on the video of the one before, each in memory only while it works (Sec. 3, App. A).

    cascade = Cascade.load("sprites")
    videos = cascade.sample("a red circle moving left over a plain grey background", seed=0)     # {"base": ..., ..., "ssr3": ...}
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from engine.cascade_folder import find_cascade
from engine.config import STAGE_ORDER, CascadeConfig, SampleConfig, StageConfig
from engine.diffusion.augmentation import augment
from engine.diffusion.conditioning import upsample
from engine.diffusion.denoiser import Denoiser, dynamic_threshold, guidance_schedule, static_threshold
from engine.diffusion.noise import frame_noise
from engine.diffusion.sampler import sample, start_index
from engine.diffusion.schedule import CosineSchedule
from engine.errors import NumericError, WeightsError
from engine.models.text import TextEmbedding, TextEncoder
from engine.models.unet import VideoUNet
from engine.runtime import weights
from engine.runtime.device import resolve_device, resolve_dtype
from engine.runtime.overlay import Overlay

OSCILLATING_CONSTANT_STEPS = 4        # at the full weight, before guidance alternates with 1 (Imagen Video Sec. 2.5: "an initial number")


@dataclass
class StageReport:
    """What one stage did, as it is told to the user and to the manifest."""

    stage: str
    frames: int
    height: int
    width: int
    steps: int                        # sampling steps that were run
    seconds: float
    parameters: int


@dataclass
class Progress:
    """Where a run reports: a new stage with its number of network steps, each step, and the stage's end."""

    on_stage: Callable[[StageConfig, int], None] = lambda stage, steps: None
    on_step: Callable[[], None] = lambda: None
    on_report: Callable[[StageReport, Tensor], None] = lambda report, video: None


@dataclass
class Cascade:
    """Seven stage configs and the folder of their weights. Nothing is in memory until `sample`."""

    config: CascadeConfig
    folder: Path
    device: torch.device
    dtype: torch.dtype
    reports: list[StageReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)          # what the user should be told of the last run
    overlay: Overlay | None = None                          # finetuned stages, used in place of the folder's

    @classmethod
    def load(cls, name: str | Path, device: str = "auto", dtype: str = "auto", stages: tuple[str, ...] = STAGE_ORDER,
             overlay: str | Path | None = None) -> "Cascade":
        """A cascade by name or folder; the weights of `stages` are checked by their headers, and read when they are used.

        overlay: a product of finetuning, verified whole, and against the sha256 of the stages it replaces.
        Raises: ConfigError if there is no such cascade, WeightsError if a stage's weights are missing or of another shape.
        """
        folder, config = find_cascade(name)
        finetuned = None if overlay is None else Overlay.open(overlay)
        cascade = cls(config, folder, resolve_device(device), resolve_dtype(dtype, resolve_device(device)), overlay=finetuned)
        for stage in config.stages:
            if stage.name in stages:
                module = weights.on_meta(lambda stage=stage: VideoUNet(stage.unet))
                shapes = {key: value.shape for key, value in module.state_dict().items()}
                weights.check(folder / stage.name, shapes)
                if finetuned is not None and stage.name in finetuned:
                    finetuned.check(stage, folder / stage.name, config.name, shapes)
        return cascade

    def network(self, stage: StageConfig) -> AbstractContextManager[VideoUNet]:
        """A stage's network for as long as it is used; finetuned, where there is an overlay."""
        resident = weights.resident
        if self.overlay is not None and stage.name in self.overlay:
            resident = partial(self.overlay.resident, stage.name)
        return resident(lambda: VideoUNet(stage.unet), self.folder / stage.name, self.device, self.dtype)

    def encode(self, prompts: list[str]) -> TextEmbedding:
        """Prompts through T5, from the disk cache where it has them; the encoder is freed before the first stage is loaded."""
        source = self.folder if (self.folder / "text_encoder").is_dir() else self.config.text.encoder
        encoder = TextEncoder(source, self.config.text.precision, self.config.text.max_tokens, device=self.device)
        try:
            embedding = encoder.encode(prompts).to(self.device)
        finally:
            encoder.release()
        self.notes = encoder.notes
        width = self.config.stages[0].unet.text_dim
        if embedding.tokens.shape[-1] != width:
            raise WeightsError(f"text encoder {source}: want embeddings of {width}, got {embedding.tokens.shape[-1]}")
        return embedding

    @torch.inference_mode()
    def sample(self, prompt: str, settings: SampleConfig, *, z: Tensor | None = None, strength: float = 1.0,
               progress: Progress | None = None) -> dict[str, Tensor]:
        """All stages up to `settings.last_stage`, in the paper's order.

        z: [T, H, W, 3] at the base's size, an input degraded to time `strength` (`dreamix.degrade`), where sampling begins. None: noise.
        Returns the video of each stage, [T, H, W, 3] in [-1, 1], on the CPU. Raises: NumericError if a stage's output is not finite.
        """
        progress, self.reports = progress or Progress(), []
        text = self.encode([prompt])
        videos: dict[str, Tensor] = {}
        before = None
        for stage in self.config.stages[: STAGE_ORDER.index(settings.last_stage) + 1]:
            steps = settings.steps.get(stage.name, stage.steps)
            start = strength if stage.name == "base" and z is not None else 1.0
            passes = start_index(start, steps) * stage.chunks
            progress.on_stage(stage, passes)
            began = time.perf_counter()
            with self.network(stage) as network:
                run = StageRun(stage, network, text, settings, steps, (settings.seed,), progress.on_step)
                before = run.base(z, start) if stage.name == "base" else run.super_resolution(before)
                parameters = sum(p.numel() for p in network.parameters())
            if not torch.isfinite(before).all():
                raise NumericError(f"{stage.name}: the sampled video is not finite; try --dtype fp32")
            report = StageReport(stage.name, *before.shape[1:4], passes, time.perf_counter() - began, parameters)
            self.reports.append(report)
            videos[stage.name] = before[0].cpu()
            progress.on_report(report, videos[stage.name])
        return videos


class StageRun:
    """One stage with its network in memory: conditioning, chunks and the sampler's arithmetic in fp32.

    text and seeds have one entry for each of B videos that are made side by side; a video never depends on its neighbours.
    """

    def __init__(self, stage: StageConfig, network: VideoUNet, text: TextEmbedding, settings: SampleConfig, steps: int,
                 seeds: Sequence[int], on_step: Callable[[], None] = lambda: None):
        self.stage, self.network, self.settings, self.steps, self.seeds, self.on_step = stage, network, settings, steps, seeds, on_step
        self.diffusion = stage.diffusion
        self.schedule = CosineSchedule(stage.diffusion.logsnr_shift)
        self.text, self.null = text, text.null_like()
        self.device = text.tokens.device

    def base(self, z: Tensor | None, start: float) -> Tensor:
        """[B, T, H, W, 3], from noise, or from one input degraded to time `start` (Sec. 4.1)."""
        frames = range(self.stage.frames)
        if z is None:
            return self.denoise(self.noise("init", frames), None, None, frames, 1.0)
        want = (self.stage.frames, self.stage.height, self.stage.width, 3)
        if tuple(z.shape) != want:
            raise ValueError(f"z: want the base's {[*want]}, got {[*z.shape]}")
        return self.denoise(z[None].to(self.device).expand(len(self.seeds), *want), None, None, frames, start)

    def super_resolution(self, before: Tensor) -> Tensor:
        """The video before, made larger or smoother. Chunks of the final SSR see only their own frames (App. A.3)."""
        stage, level = self.stage, self.stage.aug_level
        if level > 0:
            before = augment(before, level, self.noise("aug", range(before.shape[1]), tuple(before.shape[2:])))
        size = stage.chunk_frames or stage.frames
        ratio = stage.frames // before.shape[1]
        out = []
        for first in range(0, stage.frames, size):
            frames = range(first, min(first + size, stage.frames))
            given = before[:, first // ratio : -(-frames.stop // ratio)]
            lowres = upsample(given, len(frames), stage.height, stage.width, stage.temporal_upsample)
            out.append(self.denoise(self.noise("init", frames), lowres, level, frames, 1.0))
        return torch.cat(out, 1) if len(out) > 1 else out[0]

    def noise(self, step: int | str, frames: range, shape: tuple[int, int, int] | None = None) -> Tensor:
        """Each frame's numbers come from (seed, stage, step, frame), so chunks and memory policies never change them."""
        shape = shape or (self.stage.height, self.stage.width, 3)
        drawn = [frame_noise(seed, self.stage.name, step, frames, shape) for seed in self.seeds]
        return (torch.stack(drawn) if len(drawn) > 1 else drawn[0][None]).to(self.device)

    def denoise(self, z: Tensor, lowres: Tensor | None, level: float | None, frames: range, start: float) -> Tensor:
        scale = self.diffusion.residual_scale if lowres is not None else None
        threshold = self._threshold()
        if scale is not None:                              # the network sees (x - lowres) / scale; the range is x's
            threshold = self._residual_threshold(lowres, scale)
        levels = None if lowres is None else torch.full((len(lowres),), level, device=self.device)

        def network(text):
            return lambda z, time: self.network(z, time, text.tokens, text.mask, lowres=lowres, aug_level=levels)

        weight = self.diffusion.guidance_weight
        if self.stage.name == "base" and self.settings.guidance_weight is not None:
            weight = self.settings.guidance_weight
        guidance = guidance_schedule(weight, OSCILLATING_CONSTANT_STEPS if self.diffusion.oscillating_guidance else None)
        denoiser = Denoiser(network(self.text), self.schedule, self.diffusion.prediction, unconditional=network(self.null),
                            guidance=guidance, threshold=threshold)
        out = sample(denoiser, z, schedule=self.schedule, steps=self.steps, noise=lambda step: self.noise(step, frames), start=start,
                     method=self.diffusion.sampler, ancestral_gamma=self.diffusion.ancestral_gamma, on_step=lambda *_: self.on_step())
        return out if scale is None else lowres + scale * out

    def _threshold(self) -> Callable[[Tensor], Tensor]:
        if self.diffusion.threshold == "dynamic":
            return lambda x0: dynamic_threshold(x0, self.diffusion.threshold_percentile)
        return static_threshold if self.diffusion.threshold == "static" else lambda x0: x0

    def _residual_threshold(self, lowres: Tensor, scale: float) -> Callable[[Tensor], Tensor]:
        """The threshold of lowres + scale * r, told in r: one pass over the video a step where its bounds are fixed."""
        if self.diffusion.threshold == "static":
            low, high = (-1 - lowres) / scale, (1 - lowres) / scale
            return lambda r: torch.clamp(r, low, high)
        clip = self._threshold()
        return lambda r: (clip(lowres + scale * r) - lowres) / scale
