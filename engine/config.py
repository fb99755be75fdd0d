"""Every setting of the engine, as pydantic models: the defaults are the paper's, unknown fields are errors, values are checked once.

Files and `--set` overrides are read by `engine.config_io`.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

STAGE_ORDER = ("base", "tsr1", "ssr1", "ssr2", "tsr2", "tsr3", "ssr3")


class Strict(BaseModel):
    """A frozen model that refuses fields it does not know, and NaN or infinity anywhere."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class UNetConfig(Strict):
    """One U-Net, the same class for all seven stages (FACTS 3.7; Imagen Video Sec. 2 for the parts)."""

    channels: int = Field(gt=0)                                 # width of level 0
    channel_mults: tuple[int, ...] = Field(min_length=1)        # width of each level, in units of `channels`
    num_blocks: tuple[int, ...] = Field(min_length=1)           # residual blocks per level, on each side
    space_to_depth: int = Field(1, ge=1, le=8)                  # s x s pixels become channels at the stem, and back at the head
    attention_levels: tuple[int, ...] = ()                      # levels with spatial attention over pixels and text tokens
    attention_every_block: bool = False                         # after every block (base), or once per level and side (SR)
    temporal: Literal["attention", "conv"] = "conv"             # how frames are mixed
    head_dim: int = Field(64, gt=0)
    groups: int = Field(32, gt=0)                               # of every GroupNorm; statistics are per frame
    text_dim: int = Field(4096, gt=0)                           # width of the text encoder (T5-XXL: 4096)
    context_dim: int = Field(1024, gt=0)                        # text tokens are projected to this for keys and values
    max_frames: int = Field(128, gt=0)                          # reach of the relative position bias
    lowres: bool = False                                        # conditioned on an upsampled, noise-augmented video (all but base)
    frame_index: bool = False                                   # video samples also know each frame's absolute place in the clip
    coordinates: bool = False                                   # pixel coordinates as input channels (off: shift-equivariant inside)

    @model_validator(mode="after")
    def _levels(self):
        if len(self.channel_mults) != len(self.num_blocks):
            raise ValueError(f"num_blocks: want one per level = {len(self.channel_mults)}, got {len(self.num_blocks)}")
        for level, mult in enumerate(self.channel_mults):
            width = self.channels * mult
            if width % self.groups:
                raise ValueError(f"channels: level {level} is {width} wide, which {self.groups} groups do not divide")
            if (self.temporal == "attention" or level in self.attention_levels) and width % self.head_dim:
                raise ValueError(f"channels: level {level} is {width} wide, which heads of {self.head_dim} do not divide")
        wrong = [level for level in self.attention_levels if not 0 <= level < len(self.channel_mults)]
        if wrong:
            raise ValueError(f"attention_levels: want levels 0 to {len(self.channel_mults) - 1}, got {wrong}")
        return self


class DiffusionConfig(Strict):
    """What a stage's network predicts, and how it is sampled (Sec. 3 and A.3; Imagen Video Sec. 2.2 to 2.6)."""

    prediction: Literal["v", "eps", "x0"] = "v"
    logsnr_shift: float = 0.0                                   # added to the cosine schedule's log SNR; 0 is the paper's
    sampler: Literal["stochastic_ddim", "ddim", "ancestral"] = "stochastic_ddim"
    ancestral_gamma: float = Field(0.3, ge=0, le=1)             # only for `ancestral`: 0 lower, 1 upper bound of the variance
    guidance_weight: float = Field(1.0, ge=0)                   # classifier-free guidance; 1 is off (the paper), and costs one pass
    oscillating_guidance: bool = False                          # constant at first, then alternating with 1
    threshold: Literal["static", "dynamic", "none"] = "static"
    threshold_percentile: float = Field(0.995, gt=0, le=1)      # only for `dynamic`
    residual_scale: float | None = Field(None, gt=0)            # diffuse (x - upsampled) / scale instead of x; None is the paper's


class StageConfig(Strict):
    """One of the seven models: the video it makes, its network, its diffusion (Sec. 3 and App. A.1)."""

    name: Literal["base", "tsr1", "ssr1", "ssr2", "tsr2", "tsr3", "ssr3"]
    frames: int = Field(gt=0)
    height: int = Field(gt=0)
    width: int = Field(gt=0)
    fps: float = Field(gt=0)
    steps: int = Field(gt=0)                                    # sampling steps
    unet: UNetConfig
    diffusion: DiffusionConfig = DiffusionConfig()
    temporal_upsample: Literal["repeat", "blank", "linear"] = "repeat"   # how a TSR stage fills the frames it has to make
    aug_level: float = Field(0.0, ge=0, lt=1)                   # noise on the conditioning video when sampling, as a time on the schedule
    chunk_frames: int | None = Field(None, gt=0)                # frames sampled at a time (final SSR: 32, App. A.3); part of the result

    @property
    def kind(self) -> str:
        return self.name.rstrip("0123456789")

    @property
    def chunks(self) -> int:
        """How many pieces the video is sampled in; the last may be shorter."""
        return -(-self.frames // (self.chunk_frames or self.frames))

    @model_validator(mode="after")
    def _conditioning(self):
        if (self.name != "base") != self.unet.lowres:
            raise ValueError(f"unet.lowres: want {self.name != 'base'} for stage {self.name}, got {self.unet.lowres}")
        if self.unet.temporal == "attention" and self.frames > self.unet.max_frames:
            raise ValueError(f"unet.max_frames: want at least the stage's {self.frames} frames, got {self.unet.max_frames}")
        return self


class TextConfig(Strict):
    """The frozen T5 encoder (App. A.1)."""

    encoder: str = "google/t5-v1_1-xxl"                         # local folder or hub id; a cascade's own `text_encoder/` wins
    precision: Literal["fp32", "bf16", "int8", "nf4"] = "bf16"  # never fp16: T5 overflows
    max_tokens: int = Field(256, gt=0)


class CascadeConfig(Strict):
    """Seven stages in the paper's order, each fed by the one before it."""

    name: str
    text: TextConfig = TextConfig()
    stages: tuple[StageConfig, ...]

    @model_validator(mode="after")
    def _chain(self):
        names = tuple(stage.name for stage in self.stages)
        if names != STAGE_ORDER:
            raise ValueError(f"stages: want {' '.join(STAGE_ORDER)}, got {' '.join(names)}")
        for before, stage in zip(self.stages, self.stages[1:]):
            if stage.kind == "tsr" and (stage.height, stage.width) != (before.height, before.width):
                raise ValueError(f"{stage.name}: a temporal stage keeps {before.height}x{before.width}, got {stage.height}x{stage.width}")
            if stage.kind == "tsr" and stage.frames % before.frames:
                raise ValueError(f"{stage.name}.frames: want a multiple of {before.name}'s {before.frames}, got {stage.frames}")
            if stage.kind == "tsr" and (chunk := stage.chunk_frames or 0) % (ratio := stage.frames // before.frames):
                raise ValueError(f"{stage.name}.chunk_frames: want a multiple of {ratio}, the frames for each one given, got {chunk}")
            if stage.kind == "ssr" and stage.frames != before.frames:
                raise ValueError(f"{stage.name}.frames: a spatial stage keeps {before.frames}, got {stage.frames}")
        return self

    def stage(self, name: str) -> StageConfig:
        return next(stage for stage in self.stages if stage.name == name)

    @property
    def fps(self) -> Fraction:
        return Fraction(self.stages[-1].fps).limit_denominator(1001)


class SampleConfig(Strict):
    """How a cascade is run: the part shared by `edit` and `generate`."""

    seed: int = Field(0, ge=0)
    device: str = "auto"                                        # auto, cpu, cuda, cuda:1 ...
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"     # of weights and activations; auto: bf16 where the hardware has it
    last_stage: Literal["base", "tsr1", "ssr1", "ssr2", "tsr2", "tsr3", "ssr3"] = "ssr3"
    guidance_weight: float | None = Field(None, ge=0)           # overrides the base model's own
    steps: dict[str, int] = Field(default_factory=dict)         # overrides a stage's sampling steps

    @model_validator(mode="after")
    def _stages(self):
        for name, steps in self.steps.items():
            if name not in STAGE_ORDER:
                raise ValueError(f"steps: want stages {' '.join(STAGE_ORDER)}, got {name}")
            if steps < 1:
                raise ValueError(f"steps.{name}: want at least 1, got {steps}")
        return self


class EditConfig(SampleConfig):
    """An edit by inverting corruptions (Sec. 4.1)."""

    strength: float = Field(0.8, ge=0, le=1)                    # the paper's s: 0.4 to 0.85 without finetuning, 0.95 to 1 with (App. A.3)
    fit: Literal["crop", "pad", "stretch"] = "crop"             # how the input meets the cascade's aspect
    start: float = Field(0.0, ge=0)                             # seconds into the input


class GenerateConfig(SampleConfig):
    """Sampling from text alone: s = 1, no input."""


class Phase(Strict):
    """A stretch of pretraining with one mixture of data."""

    steps: int = Field(gt=0)
    videos: int = Field(0, ge=0)                                # clips a step, on each rank
    frames: int = Field(16, gt=0)                               # frames of each clip
    pictures: int = Field(0, ge=0)                              # independent frames a step, each with its own caption and noise level
    rate: float = Field(1.0, gt=0)                              # factor on both learning rates


class PretrainConfig(Strict):
    """How one stage of a cascade is trained on captioned video and pictures jointly (App. A.1; Imagen Video Sec. 2.4)."""

    phases: tuple[Phase, ...] = (Phase(steps=100_000, videos=8, pictures=64),)
    muon_lr: float = Field(2e-3, gt=0)                          # matrices, orthogonalised updates
    adam_lr: float = Field(2e-3, gt=0)                          # everything else
    warmup: int = Field(100, ge=0)
    decay: float = Field(0.4, ge=0, le=1)                       # the last part of the run, in which the rate falls to zero
    clip: float = Field(1.0, gt=0)                              # gradient norm
    ema: float = Field(0.998, ge=0, lt=1)
    text_dropout: float = Field(0.1, ge=0, le=1)                # captions left out, for classifier-free guidance
    loss_space: Literal["x", "v", "eps"] = "v"
    balance_times: bool = False                                 # weight the loss by about 1 / its expectation at each time
    crop: tuple[int, int] | None = None                         # height and width of training crops, for super-resolution
    pan: int = Field(0, ge=0)                                   # crops of clips drift by up to this many pixels a frame, each way
    aug_level_max: float = Field(0.0, ge=0, lt=1)               # conditioning noise is drawn up to this, on half of the samples
    seed: int = Field(0, ge=0)
    save_every: int = Field(100, gt=0)
    dtype: Literal["fp32", "bf16"] = "bf16"                     # of the pass; master weights are fp32


class FinetuneConfig(Strict):
    """How one clip or a handful of pictures is learned (Sec. 4.2). Defaults: the paper's mixed setting (App. A.3, B)."""

    alpha: float = Field(0.35, ge=0, le=1)                      # weight of the video loss, Eq. 4: 1 is the clip alone, 0 its frames alone
    steps: int = Field(300, gt=0)                               # optimizer steps of each stage; paper: 64 at alpha 1, 50 to 150 at 0
    stage_steps: dict[str, int] = Field(default_factory=dict)   # overrides a stage's steps
    lr: float = Field(6e-6, gt=0)                               # constant
    stage_lr: dict[str, float] = Field(default_factory=dict)    # overrides a stage's rate
    stages: tuple[Literal["base", "ssr1", "ssr2"], ...] = ("base", "ssr1", "ssr2")   # the other four stay as pretrained (App. A.2)
    rare_token: str = Field("sks", min_length=1)                # t*, the whole prompt of finetuning
    loss_space: Literal["x", "v", "eps"] = "x"                  # Eq. 1 to 3 are errors of the clean video
    draws: int = Field(1, gt=0)                                 # times and noises per step of each loss, averaged
    sample_one: bool = False                                    # each step runs one of the two losses, the video with probability alpha
    temporal_learns_from_frames: bool = True                    # the text of Sec. 4.2; False is the caption of Fig. 3
    aug_level_max: float = Field(1.0, ge=0, le=1)               # conditioning noise of ssr1 and ssr2 is drawn up to this (Imagen)
    optimizer: Literal["adamw", "adamw8bit", "fused"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)                      # with it, weights that a loss leaves unused would shrink
    clip: float = Field(1.0, gt=0)                              # gradient norm
    accumulate: int = Field(1, gt=0)                            # passes that a rank's share of a step is cut into: less memory, same sum
    gradient_checkpointing: bool = False                        # blocks are computed again in the backward pass
    activation_offload: bool = False                            # what the backward pass needs waits in pinned host memory
    master: Literal["fp32", "stochastic"] = "fp32"              # of 16-bit weights: an fp32 copy, or stochastic rounding without one
    in_backward: bool = False                                   # gradients are applied one by one and never held together
    dtype: Literal["auto", "fp32", "bf16"] = "auto"             # of the pass; auto: bf16 where the hardware has it
    device: str = "auto"
    seed: int = Field(0, ge=0)
    fit: Literal["crop", "pad", "stretch"] = "crop"             # how the input meets the cascade's aspect
    start: float = Field(0.0, ge=0)                             # seconds into the input
    save_every: int = Field(50, gt=0)
    keep: int = Field(2, ge=2)                                  # checkpoints of a stage; with one alone, a damaged one would end the run
    preview_every: int = Field(0, ge=0)                         # steps between pictures of the reconstruction; 0: none
    preview_prompt: str | None = None                           # also of an edit with this prompt
    preview_steps: int = Field(16, gt=0)                        # sampling steps of a preview, at most the stage's own
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    lora_rank: int = Field(0, ge=0)                             # 0: the product holds whole weights, else differences of this rank

    def steps_of(self, stage: str) -> int:
        return self.stage_steps.get(stage, self.steps)

    def lr_of(self, stage: str) -> float:
        return self.stage_lr.get(stage, self.lr)

    @model_validator(mode="after")
    def _possible(self):
        if not self.stages or len(set(self.stages)) < len(self.stages):
            raise ValueError(f"stages: want at least one of base ssr1 ssr2, each once, got {' '.join(self.stages) or 'none'}")
        for field in ("stage_steps", "stage_lr"):
            for name, value in getattr(self, field).items():
                if name not in ("base", "ssr1", "ssr2"):
                    raise ValueError(f"{field}: want stages base ssr1 ssr2, got {name}")
                if value <= 0:
                    raise ValueError(f"{field}.{name}: want more than 0, got {value}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: want two numbers in [0, 1), got {[*self.betas]}")
        if self.in_backward and self.accumulate > 1:
            raise ValueError(f"in_backward: want accumulate 1, since no gradient is left to add to, got {self.accumulate}")
        return self
