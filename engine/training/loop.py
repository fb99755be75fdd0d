"""Pretraining of one stage on captioned clips and independent pictures jointly (Imagen Video Sec. 2.4; Dreamix App. A.1).

Everything random is drawn from (seed, step, rank), and the whole state is one file, so a run that is stopped goes on as if it had not
been. Started by torchrun, ranks share the batch and sum their gradients through one flat all-reduce.
"""

import json
import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from engine.config import CascadeConfig, PretrainConfig
from engine.diffusion.augmentation import augment
from engine.diffusion.conditioning import downsample, upsample
from engine.diffusion.loss import diffusion_loss
from engine.diffusion.schedule import CosineSchedule, add_noise
from engine.errors import ConfigError, NumericError, WeightsError
from engine.models.text import TextEmbedding, TextEncoder
from engine.models.unet import VideoUNet
from engine.runtime.weights import WEIGHTS_NAME

from .data import batch_seed, draw_crop, draw_window, open_source
from .optimizer import MasterWeights


class Pretraining:
    """One stage's network, its optimizer and its data; `step()` is one update.

    cascade: the seven stages; name: the one that is trained; text_source: folder of the frozen text encoder; out: the run's folder.
    """

    def __init__(self, cascade: CascadeConfig, name: str, config: PretrainConfig, source: str, text_source: Path, out: Path):
        self.stage, self.config, self.out = cascade.stage(name), config, Path(out)
        index = [stage.name for stage in cascade.stages].index(name)
        self.before = cascade.stages[index - 1] if index else None
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("gloo")
        torch.manual_seed(config.seed)
        self.model = VideoUNet(self.stage.unet)
        self.optimizer = MasterWeights(self.model, config.ema)
        self.model.to(torch.bfloat16 if config.dtype == "bf16" else torch.float32)
        self.optimizer.params = dict(self.model.named_parameters())
        self.source = open_source(source)
        self.text = TextEncoder(text_source, precision="fp32", max_tokens=cascade.text.max_tokens)
        self.schedule = CosineSchedule(self.stage.diffusion.logsnr_shift)
        self.total = sum(phase.steps for phase in config.phases)
        try:                                                # now, not at the step that first meets it
            for phase in config.phases:
                draw_crop(0, self.stage, self.drifting_crop(phase.frames) if phase.videos else config.crop)
                if phase.videos:
                    draw_window(0, self.stage, phase.frames)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    @property
    def step_index(self) -> int:
        return self.optimizer.step_count

    def phase(self, step: int):
        for phase in self.config.phases:
            if step < phase.steps:
                return phase
            step -= phase.steps
        raise IndexError(step)

    def rate(self, step: int) -> float:
        """Linear warmup, flat within a phase, then a cosine to zero."""
        warm = min(1.0, (step + 1) / max(1, self.config.warmup))
        left = (self.total - step) / max(1.0, self.config.decay * self.total)
        return self.phase(step).rate * warm * (0.5 - 0.5 * torch.cos(torch.tensor(min(1.0, left) * torch.pi)).item())

    def losses(self, step: int):
        """The step's losses, to be weighted alike: a clip batch and a picture batch, as far as the phase has them."""
        phase = self.phase(step)
        for kind, count in (("videos", phase.videos), ("pictures", phase.pictures)):
            if count:
                seed = batch_seed(self.config.seed, self.stage.name, kind, step, self.rank)
                if kind == "videos":
                    video, captions = self.source.clips(seed, count, self.stage, phase.frames, self.drifting_crop(phase.frames))
                    video = drift(video, self.config.pan, batch_seed(seed, "drift"))
                else:
                    video, captions = self.source.pictures(seed, count, self.stage, self.config.crop)
                independent = torch.full((count,), kind == "pictures")
                yield kind, self.loss(video, captions, independent, torch.Generator().manual_seed(seed))

    def drifting_crop(self, frames: int) -> tuple[int, int] | None:
        """The crop, and the room it needs to drift."""
        crop, pan = self.config.crop, self.config.pan
        return crop if crop is None else (crop[0] + pan * (frames - 1), crop[1] + pan * (frames - 1))

    def loss(self, video, captions, independent, generator):
        B = len(video)
        text = self.drop_captions(self.text.encode(captions, batch_size=512, cache=False), generator)
        eps = torch.randn(video.shape, generator=generator)
        # one time in each of B slices of [0, 1]: the batch always covers all noise levels
        times = (torch.randperm(B, generator=generator) + torch.rand(B, generator=generator)) / B
        lowres = levels = None
        if self.before is not None:
            lowres, levels = self.condition(video, generator)
            if (scale := self.stage.diffusion.residual_scale) is not None:
                video = (video - lowres) / scale
        output = self.model(add_noise(video, eps, times, self.schedule), times, text.tokens, text.mask, lowres=lowres, aug_level=levels,
                            independent_frames=independent)
        if self.stage.kind == "tsr":
            # the last frames of a window have no given frame after them: what is asked there is extrapolation, and would rule the loss
            last = video.shape[1] - self.stage.frames // self.before.frames + 1
            output, video, eps = output[:, :last], video[:, :last], eps[:, :last]
        prediction = self.stage.diffusion.prediction
        losses = diffusion_loss(output, video, eps, times, self.schedule, prediction, self.config.loss_space)
        return (losses * balance(times)).mean() if self.config.balance_times else losses.mean()

    def drop_captions(self, text: TextEmbedding, generator) -> TextEmbedding:
        keep = torch.rand(len(text.mask), generator=generator) >= self.config.text_dropout
        return TextEmbedding(text.tokens * keep[:, None, None], text.mask & keep[:, None])

    def condition(self, video, generator):
        """What the stage before would have given, degraded by noise on half of the samples, at this stage's size."""
        B, T, H, W, _ = video.shape
        frames = T * self.before.frames // self.stage.frames if T > 1 else 1
        lowres = downsample(video, frames, H * self.before.height // self.stage.height, W * self.before.width // self.stage.width)
        levels = torch.rand(B, generator=generator) * self.config.aug_level_max * (torch.rand(B, generator=generator) < 0.5)
        lowres = augment(lowres, levels, torch.randn(lowres.shape, generator=generator), CosineSchedule())
        return upsample(lowres, T, H, W, self.stage.temporal_upsample), levels

    def step(self) -> dict:
        """One update over all ranks -> what a log line says."""
        step, started = self.step_index, time.perf_counter()
        for p in self.model.parameters():
            p.grad = None
        record = {}
        for kind, loss in self.losses(step):
            loss.backward()
            record[kind] = loss.item()
        gradients = {name: torch.zeros_like(p, dtype=torch.float32) if p.grad is None else p.grad.float()
                     for name, p in self.optimizer.params.items()}
        if self.world > 1:
            flat = torch.cat([g.flatten() for g in gradients.values()])
            dist.all_reduce(flat)
            flat.div_(self.world)
            pieces = flat.split([g.numel() for g in gradients.values()])
            gradients = {name: piece.view_as(g) for (name, g), piece in zip(gradients.items(), pieces)}
        norm = torch.stack(torch._foreach_norm(list(gradients.values()))).norm()
        if not norm.isfinite():      # after the sum, so that every rank sees it; the weights are still those of the step before
            raise NumericError(f"step {step}: the gradient is not finite, losses {record}; the run's last save is intact")
        torch._foreach_mul_(list(gradients.values()), (self.config.clip / norm.clamp_min(self.config.clip)).item())
        rate = self.rate(step)
        self.optimizer.step(gradients, rate * self.config.muon_lr, rate * self.config.adam_lr)
        return {"step": step, **record, "grad_norm": norm.item(), "rate": rate, "seconds": time.perf_counter() - started}

    def run(self, until: float = float("inf")) -> None:
        """Train to the end of the phases, or until this time (time.time()); saves as it goes and resumes from what is there."""
        self.resume()
        log = None
        if self.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            log = open(self.out / "metrics.jsonl", "a", buffering=1)
        while self.step_index < self.total:
            record = self.step()
            if log:
                log.write(json.dumps(record) + "\n")
            stop = torch.tensor(float(time.time() > until))
            if self.world > 1:
                dist.all_reduce(stop)
            if stop or self.step_index % self.config.save_every == 0 or self.step_index == self.total:
                self.save()
            if stop:
                break

    def save(self) -> None:
        if self.rank == 0:
            publish(self.optimizer.state_dict(), self.out / "state.safetensors")
            self.export(self.out / WEIGHTS_NAME)

    def resume(self) -> bool:
        """Whether there was a state to go on from.   Raises: WeightsError if it is damaged or another network's."""
        path = self.out / "state.safetensors"
        if not path.is_file():
            return False
        try:
            self.optimizer.load_state_dict(load_file(path))
        except (SafetensorError, OSError, KeyError, RuntimeError) as error:
            raise WeightsError(f"{path}: not a state of this stage ({' '.join(str(error).split())})") from error
        return True

    def export(self, path: Path) -> None:
        """The averaged weights in fp16: what the cascade ships."""
        path.parent.mkdir(parents=True, exist_ok=True)
        publish({name: value.half().contiguous() for name, value in self.optimizer.ema.items()}, path)


def drift(video: torch.Tensor, pan: int, seed: int) -> torch.Tensor:
    """Each clip seen through a window that moves by a constant whole number of pixels a frame, as from a moving camera.

    Shapes: video [B, T, H, W, 3] -> [B, T, H - pan * (T - 1), W - pan * (T - 1), 3]. Where only a small thing moves, a temporal model has
    little to learn from; in a drifting window every edge moves. A third of the drifts by at most one pixel, along either axis, is none.
    """
    B, T, H, W, C = video.shape
    if pan == 0 or T == 1:
        return video
    h, w = H - pan * (T - 1), W - pan * (T - 1)
    velocity = torch.randint(-pan, pan + 1, (B, 2), generator=torch.Generator().manual_seed(seed))
    out = video.new_empty(B, T, h, w, C)
    for b in range(B):
        for t in range(T):
            y, x = ((int(v) * t if v >= 0 else (pan * (T - 1)) + int(v) * t) for v in velocity[b])
            out[b, t] = video[b, t, y : y + h, x : x + w]
    return out


def balance(times: torch.Tensor) -> torch.Tensor:
    """Weights [B], 1 on average over [0, 1], that give every noise level about the same say in the gradient.

    Near time 1 most of the error cannot be learned away and drowns what can, so a level counts by the inverse of the error it keeps,
    which grows about linearly with time here.
    Source: the uncertainty weighting of Karras et al. 2024 (EDM2), App. B.2, with the fit held fixed.
    """
    return 0.9 / math.log(10) / (0.1 + 0.9 * times)


def publish(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """A safetensors file that is either absent, the old one, or complete."""
    part = path.with_name(path.name + ".part")
    save_file(tensors, part)
    with open(part, "rb") as f:
        os.fsync(f.fileno())
    os.replace(part, path)
