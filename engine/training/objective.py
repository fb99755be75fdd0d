"""Mixed video-image finetuning: what one step minimises (Sec. 4.2).

    Eq. 2   L_vid   = E ||D(z_s, s, t*, c) - v||^2           the clip v as a video
    Eq. 3   L_frame = E ||D^a(z_s, s, t*, c) - u||^2         M of its frames as an unordered set u, temporal mixing masked
    Eq. 4   alpha L_vid + (1 - alpha) L_frame

A step is a list of units, each one sample of one of the two expectations, with its weight in Eq. 4. The list does not depend on how many
ranks share it, and all that a unit draws comes from its address (seed, stage, step, kind, draw). Squared errors are means over a sample's
numbers. A stage that diffuses the residual to its conditioning takes both errors in units of the residual: a constant factor.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.config import FinetuneConfig, StageConfig
from engine.diffusion.augmentation import augment
from engine.diffusion.conditioning import downsample, upsample
from engine.diffusion.loss import diffusion_loss
from engine.diffusion.noise import frame_noise
from engine.diffusion.schedule import CosineSchedule, add_noise
from engine.models.attention import TemporalAttention
from engine.models.norm import LayerNorm
from engine.models.text import TextEmbedding

from .data import batch_seed
from .finetune_data import StageData, unit_seed


@dataclass(frozen=True)
class Unit:
    """One sample of one loss. kind: "video" (Eq. 2) or "frames" (Eq. 3); draw: which of the step's samples; weight: its share of Eq. 4."""

    kind: str
    draw: int
    weight: float


def units(config: FinetuneConfig, stage: str, step: int, has_clip: bool = True) -> list[Unit]:
    """The work of one step. A loss of weight 0 has no unit; without a clip the frames' loss is all there is.

    With `sample_one` each draw takes one of the two losses, the video's with probability alpha, at weight 1: the same expectation.
    """
    alpha, found = config.alpha if has_clip else 0.0, []
    for draw in range(config.draws):
        if config.sample_one:
            coin = batch_seed(config.seed, stage, "finetune", step, "which", draw) / 2**62
            found.append(Unit("video" if coin < alpha else "frames", draw, 1 / config.draws))
            continue
        if alpha > 0:
            found.append(Unit("video", draw, alpha / config.draws))
        if alpha < 1:
            found.append(Unit("frames", draw, (1 - alpha) / config.draws))
    return found


def share(work: list[Unit], rank: int, world: int) -> list[Unit]:
    """This rank's units, dealt in turn. Ranks that are short of one repeat a unit at weight 0: all run the same number of samples."""
    each = -(-len(work) // world)
    return [work[i] if (i := rank + world * turn) < len(work) else Unit(work[i % len(work)].kind, work[i % len(work)].draw, 0.0)
            for turn in range(each)]


@dataclass
class Batch:
    """Samples of one pass. target (what D should answer), z, eps and lowres [n, T, H, W, 3] float32; time, aug_level, weights [n]."""

    target: Tensor
    z: Tensor
    eps: Tensor
    time: Tensor
    lowres: Tensor | None
    aug_level: Tensor | None
    independent_frames: Tensor
    weights: Tensor


class Objective:
    """Eq. 4 for one stage.

    stage: the model that is finetuned; before: the one that feeds it, None for base; text: t* encoded, [1, L, D]; device: of the pass.
    """

    def __init__(self, config: FinetuneConfig, stage: StageConfig, before: StageConfig | None, text: TextEmbedding, device: torch.device):
        self.config, self.stage, self.before, self.device = config, stage, before, device
        self.text = text.to(device)
        self.schedule = CosineSchedule(stage.diffusion.logsnr_shift)

    def sample(self, unit: Unit, data: StageData, step: int) -> Batch:
        """One unit's numbers, on the CPU, as a batch of one."""
        config, name, T = self.config, self.stage.name, self.stage.frames
        seed = unit_seed(config, name, step, unit.kind, unit.draw)
        generator = torch.Generator().manual_seed(seed)
        time = torch.rand(1, generator=generator)                            # s ~ U(0, 1), one for all frames of the sample
        video = (data.clip if unit.kind == "video" else data.frames(T, batch_seed(seed, "choice")))[None]
        lowres = level = None
        if self.before is not None:
            level = torch.rand(1, generator=generator) * config.aug_level_max
            lowres = self.condition(video, unit.kind == "frames", level, f"finetune aug {step} {unit.kind} {unit.draw}")
            if (scale := self.stage.diffusion.residual_scale) is not None:
                video = (video - lowres) / scale
        eps = frame_noise(config.seed, name, f"finetune {step} {unit.kind} {unit.draw}", range(T), tuple(video.shape[2:]))[None]
        return Batch(video, add_noise(video, eps, time, self.schedule), eps, time, lowres, level, torch.tensor([unit.kind == "frames"]),
                     torch.tensor([unit.weight]))

    def condition(self, video: Tensor, independent: bool, level: Tensor, stream: str) -> Tensor:
        """What the stage before would have given, noised to `level` [1], at this stage's size: [1, T, H, W, 3] -> same.

        A set of frames is only made smaller: skipping some of them, as for a clip, would take an order that it does not have.
        """
        before, (T, H, W) = self.before, video.shape[1:4]
        lowres = downsample(video, T if independent else T * before.frames // self.stage.frames, before.height, before.width)
        noise = frame_noise(self.config.seed, self.stage.name, stream, range(lowres.shape[1]), tuple(lowres.shape[2:]))
        return upsample(augment(lowres, level, noise[None]), T, H, W, self.stage.temporal_upsample)

    def batch(self, work: list[Unit], data: StageData, step: int) -> Batch:
        """The samples of some units, joined, on the device."""
        parts = [vars(self.sample(unit, data, step)) for unit in work]
        joined = {key: None if parts[0][key] is None else torch.cat([part[key] for part in parts]) for key in parts[0]}
        return Batch(**{key: None if value is None else value.to(self.device) for key, value in joined.items()})

    def errors(self, network, batch: Batch) -> Tensor:
        """The squared error of every sample [n], in one pass of `network`, clip and frames side by side."""
        n, text = len(batch.time), self.text
        output = network(batch.z, batch.time, text.tokens.expand(n, -1, -1), text.mask.expand(n, -1), lowres=batch.lowres,
                         aug_level=batch.aug_level, independent_frames=batch.independent_frames)
        return diffusion_loss(output, batch.target, batch.eps, batch.time, self.schedule, self.stage.diffusion.prediction,
                              self.config.loss_space)


def video_only(network: nn.Module) -> nn.Module:
    """The caption of Fig. 3: temporal layers pass the frames' gradient on but take none of it for their own weights.

    Temporal convolutions are bypassed for frames in any case; of temporal attention the value path is left, so its norm, its projections
    are told which samples to learn from. Returns the network, changed in place; its weights and their names stay.
    """
    for layer in network.modules():
        if isinstance(layer, TemporalAttention):
            layer.norm.__class__, layer.to_qkv.__class__, layer.to_out.__class__ = _Norm, _Linear, _Linear
            layer.register_forward_pre_hook(_tell, with_kwargs=True)
    return network


def _tell(layer, args, kwargs):
    frames = args[1] if len(args) > 1 else kwargs.get("independent_frames")
    for part in (layer.norm, layer.to_qkv, layer.to_out):
        part.frames = frames


class _Scale(torch.autograd.Function):
    """x * weight + bias, whose weights learn from some samples only."""

    @staticmethod
    def forward(ctx, x, weight, bias, frames):
        ctx.save_for_backward(x, weight, frames)
        return x * weight + bias

    @staticmethod
    def backward(ctx, grad):
        x, weight, frames = ctx.saved_tensors
        videos = (~frames).nonzero().squeeze(1)
        kept = grad[videos].flatten(0, -2)
        return grad * weight, (kept * x[videos].flatten(0, -2)).sum(0), kept.sum(0), None


class _Project(torch.autograd.Function):
    """A linear layer whose weights learn from some samples only. The weight itself is saved, so that ZeRO-3 may take it away meanwhile."""

    @staticmethod
    def forward(ctx, x, weight, bias, frames):
        ctx.save_for_backward(x, weight, frames)
        ctx.biased = bias is not None
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight, frames = ctx.saved_tensors
        videos = (~frames).nonzero().squeeze(1)
        kept = grad[videos].flatten(0, -2)
        return grad @ weight, kept.T @ x[videos].flatten(0, -2), kept.sum(0) if ctx.biased else None, None


class _Norm(LayerNorm):
    frames: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.frames is None:
            return super().forward(x)
        return _Scale.apply(nn.functional.layer_norm(x, self.normalized_shape, eps=self.eps), self.weight, self.bias, self.frames)


class _Linear(nn.Linear):
    frames: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.frames is None else _Project.apply(x, self.weight, self.bias, self.frames)
