"""What a finetuning run shows while it goes: a progress bar, other loggers, and pictures of what the stage makes of t* (s = 1)."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.cascade import StageRun
from engine.config import FinetuneConfig, SampleConfig, StageConfig
from engine.diffusion.conditioning import downsample
from engine.dreamix import degrade
from engine.errors import ConfigError
from engine.media import contact_sheet
from engine.models.text import TextEmbedding

from .finetune_data import StageData

EDIT_STRENGTH = 0.95          # of the preview's edit: the paper's range for finetuned models is 0.95 to 1 (App. A.3)


class Bar:
    """A line a stage on stderr, with both losses; silent where stderr is no terminal."""

    def __init__(self, stage: str, steps: int, done: int, quiet: bool):
        from tqdm import tqdm

        self.bar = tqdm(total=steps, initial=done, desc=f"{stage:4}", unit="step", file=sys.stderr, disable=True if quiet else None)

    def step(self, record: dict[str, Any]) -> None:
        losses = {name: f"{record[name]:.4f}" for name in ("video", "frames") if record[name] is not None}
        self.bar.set_postfix(losses | ({"psnr": f"{record['psnr']:.1f}"} if "psnr" in record else {}), refresh=False)
        self.bar.update()

    def close(self) -> None:
        self.bar.close()


class Reporters:
    """The loggers of `report_to`. metrics.jsonl is written whether or not there are any.   Raises: ConfigError if one is not installed."""

    def __init__(self, config: FinetuneConfig, out: Path):
        self.sinks = []
        for name in config.report_to:
            try:
                module = import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
            except Exception as error:                                   # half-installed packages raise what they like
                self.close()
                why = " ".join(str(error).split())[:200]
                raise ConfigError(f"report_to: {name} cannot be used here ({why}); pip install {name}, or leave it out") from error
            if name == "tensorboard":
                writer = module.SummaryWriter(out / "tensorboard")
                self.sinks.append((lambda values, step, w=writer: [w.add_scalar(k, v, step) for k, v in values.items()], writer.close))
            else:
                settings = {"project": "dreamix", "name": Path(out).resolve().name, "config": config.model_dump(mode="json")}
                run = module.init(**settings, **({"dir": str(out)} if name == "wandb" else {}))
                self.sinks.append((lambda values, step, r=run: r.log(values), run.finish))

    def write(self, record: dict[str, Any]) -> None:
        stage, step = record["stage"], record["step"]
        values = {f"{stage}/{key}": value for key, value in record.items() if isinstance(value, float)}
        for log, _ in self.sinks:
            log({**values, f"{stage}/step": step}, step)

    def close(self) -> None:
        for _, close in self.sinks:
            close()
        self.sinks = []


def psnr(made: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two videos in [-1, 1]; at most 100, so that it is a number in JSON."""
    return float(10 * torch.log10(4 / (made.double() - truth.double()).square().mean().clamp(min=4e-10)))


class Preview:
    """What a stage makes of its prompt from noise, beside what it learns; stages above base are given the true video of the stage before.

    text: t* and, where there is an edit to show, its prompt, each a batch of one.
    """

    def __init__(self, stage: StageConfig, before: StageConfig | None, text: list[TextEmbedding], data: StageData, config: FinetuneConfig):
        self.stage, self.before, self.text, self.config = stage, before, text, config
        self.has_clip = data.clip is not None
        self.truth = data.clip if self.has_clip else data.frames(stage.frames, config.seed)

    @torch.no_grad()
    def make(self, network, text: TextEmbedding, edit: bool = False, on_step=lambda: None) -> Tensor:
        """[T, H, W, 3] on the CPU. Every rank of an engine has to run it."""
        stage, settings = self.stage, SampleConfig(seed=self.config.seed)
        run = StageRun(stage, network, text, settings, min(stage.steps, self.config.preview_steps), (settings.seed,), on_step)
        if self.before is None:
            z = degrade(self.truth, EDIT_STRENGTH, stage, settings.seed, run.steps) if edit and self.has_clip else None
            return run.base(z, EDIT_STRENGTH if z is not None else 1.0)[0].float().cpu()
        given = downsample(self.truth[None], self.before.frames, self.before.height, self.before.width)
        return run.super_resolution(given.to(run.device))[0].float().cpu()

    def write(self, made: list[Tensor], path: Path) -> None:
        """The input and what was made, a row each, as one PNG.   Raises: DiskError."""
        contact_sheet(path, [("input", self.truth), *zip(("t*, s = 1", "edit"), made)])
