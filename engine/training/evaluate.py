"""A cascade trained on sprites, judged on attribute combinations that training never shows: `python -m engine.training.evaluate`.

Three questions, each with an answer that needs no human and no learned critic:
  base     does a clip show what its caption says? (attributes read back from the pixels, engine.sprites.readout)
  others   is the made clip nearer to the rendered truth than plain interpolation of what the stage was given? (PSNR)
  edits    after an edit from strength s, is the asked attribute changed and are the five others kept? (readout, and PSNR to the
           scene rendered with that attribute, which exists here because the world is procedural)
Clip i is made with seed `seed + i`, so any of them can be made again alone.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from engine.cascade import Cascade, StageRun
from engine.config import STAGE_ORDER, SampleConfig, StageConfig
from engine.diffusion.conditioning import downsample, upsample
from engine.dreamix import degrade
from engine.errors import ConfigError, NumericError, UserError
from engine.media import contact_sheet
from engine.models.text import TextEmbedding
from engine.models.unet import VideoUNet
from engine.runtime import weights
from engine.runtime.device import dtype_name
from engine.sprites import ATTRIBUTES, Scenes, captions, render, sample_scenes
from engine.sprites.readout import read, score

TARGETS = {"colour": 0.95, "background_colour": 0.95, "style": 0.95, "background_kind": 0.8, "shape": 0.8, "motion": 0.8}
STRENGTHS = (0.6, 0.7, 0.8, 0.9, 1.0)
BEST_PSNR = 60.0               # dB, about what rounding to 8 bits costs; linear interpolation of a still clip is exact, and would be infinite
SHEET_CLIPS = 12


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each clip, in dB, for a range of 2 from peak to peak.   [N, ...], same -> [N]"""
    if a.shape != b.shape:
        raise ValueError(f"psnr: want two tensors of one shape, got {[*a.shape]} and {[*b.shape]}")
    return 10 * torch.log10(4 / (a.double() - b.double()).square().flatten(1).mean(1))


def held_out(count: int, seed: int) -> tuple[Scenes, list[str]]:
    """Scenes whose combinations of attributes are kept from training, and paraphrased captions of them."""
    scenes = sample_scenes(count, seed, split="held_out")
    return scenes, captions(scenes, seed)


def batches(name: str, count: int, size: int) -> Iterator[list[int]]:
    parts = [list(range(count))[first : first + size] for first in range(0, count, size)]
    yield from tqdm(parts, desc=name, file=sys.stderr, disable=None)


def stage_run(stage: StageConfig, network, text: TextEmbedding, settings: SampleConfig, some: list[int]) -> StageRun:
    steps = settings.steps.get(stage.name, stage.steps)
    return StageRun(stage, network, text[some], settings, steps, [settings.seed + i for i in some])


def finite(name: str, video: Tensor) -> Tensor:
    # the readout takes NaN for grey, so it must not get that far
    if not torch.isfinite(video).all():
        raise NumericError(f"{name}: the sampled video is not finite; try --dtype fp32")
    return video.float().cpu()


def judge_base(stage: StageConfig, network, text: TextEmbedding, scenes: Scenes, settings: SampleConfig,
               batch: int = 10) -> tuple[dict, Tensor]:
    """The share of clips made from text alone in which each attribute is read as asked -> (report, clips [N, T, H, W, 3])."""
    video = torch.cat([finite(stage.name, stage_run(stage, network, text, settings, some).base(None, 1.0))
                       for some in batches(stage.name, len(scenes), batch)])
    accuracy = score(video, scenes)
    return {"clips": len(scenes), "accuracy": accuracy, "match": read(video).match.mean().item(),
            "targets": {name: {"want": want, "margin": accuracy[name] - want, "met": accuracy[name] >= want}
                        for name, want in TARGETS.items()}}, video


def evaluate(cascade: Cascade, folders: dict[str, Path], settings: SampleConfig, *, count: int = 200, batch: int = 10,
             sheet: Path | None = None) -> dict:
    """Judge the stages of `folders` (name -> folder of its weights), each in memory only while it is judged -> a JSON-able report."""
    report = {"cascade": cascade.config.name, "seed": settings.seed, "guidance": settings.guidance_weight, "dtype": dtype_name(cascade.dtype),
              "weights": {name: str(folder) for name, folder in folders.items()}}
    for stage in cascade.config.stages:
        if stage.name not in folders:
            continue
        with weights.resident(lambda stage=stage: VideoUNet(stage.unet), folders[stage.name], cascade.device, cascade.dtype) as network:
            if stage.name == "base":
                scenes, texts = held_out(count, settings.seed)
                report["base"], video = judge_base(stage, network, cascade.encode(texts), scenes, settings, batch)
                if sheet is not None:
                    contact_sheet(sheet, list(zip(texts, video))[:SHEET_CLIPS])
    return report


def table(report: dict) -> str:
    """The report for a reader."""
    lines = [f"{report['cascade']}  seed {report['seed']}  guidance {report['guidance']}  {report['dtype']}"]
    if base := report.get("base"):
        lines.append(f"base: {base['clips']} held-out captions, match {base['match']:.3f}")
        for name, target in base["targets"].items():
            verdict = "pass" if target["met"] else "MISS"
            lines.append(f"  {name:18} {base['accuracy'][name]:6.3f}  want {target['want']:.2f}  {verdict} by {abs(target['margin']):.3f}")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m engine.training.evaluate", description=__doc__.split("\n")[0])
    p.add_argument("--cascade", default="sprites", help="name or path of the cascade")
    p.add_argument("--stage", nargs="+", default=list(STAGE_ORDER), metavar="NAME", help="stages to judge (default: all seven)")
    p.add_argument("--count", type=int, default=200, help="captions for the base")
    p.add_argument("--guidance", type=float, default=1.0, metavar="W", help="the base's guidance weight; 1 is off")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--steps", action="append", default=[], metavar="NAME=N", help="a stage's sampling steps, instead of the cascade's")
    p.add_argument("--batch", type=int, default=10, help="clips of the base made side by side")
    p.add_argument("--weights-folder", type=Path, metavar="DIR", help="folder of training runs: a stage that has DIR/<stage> is judged with it")
    p.add_argument("--override", action="append", default=[], metavar="NAME=DIR", help="judge a stage with the weights in DIR")
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto", choices=("auto", "fp32", "bf16", "fp16"))
    p.add_argument("--sheet", type=Path, metavar="PATH", help=f"PNG of the first {SHEET_CLIPS} clips of the base and their captions")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    return p


def pairs(flag: str, values: list[str]) -> dict[str, str]:
    """NAME=VALUE flags, NAME a stage."""
    out = {}
    for value in values:
        name, equals, what = value.partition("=")
        if name not in STAGE_ORDER or not equals or not what:
            raise ConfigError(f"{flag}: want NAME=VALUE with a NAME of {' '.join(STAGE_ORDER)}, got {value}")
        out[name] = what
    return out


def run(args) -> dict:
    """What the command does: `args` as `parser` gives them -> the report of `evaluate`."""
    for flag in ("count", "batch"):
        if getattr(args, flag) < 1:
            raise ConfigError(f"--{flag}: want at least 1, got {getattr(args, flag)}")
    wrong = [name for name in args.stage if name not in STAGE_ORDER]
    if wrong:
        raise ConfigError(f"--stage: want names of {' '.join(STAGE_ORDER)}, got {' '.join(wrong)}")
    try:
        settings = SampleConfig(seed=args.seed, guidance_weight=args.guidance, steps=pairs("--steps", args.steps))
    except ValueError as error:
        raise ConfigError(" ".join(str(error).split())) from error
    elsewhere = {}
    if args.weights_folder is not None:
        elsewhere = {name: args.weights_folder / name for name in args.stage if (args.weights_folder / name / weights.WEIGHTS_NAME).is_file()}
    elsewhere.update((name, Path(folder)) for name, folder in pairs("--override", args.override).items())
    cascade = Cascade.load(args.cascade, args.device, args.dtype, tuple(name for name in args.stage if name not in elsewhere))
    folders = {name: elsewhere.get(name, cascade.folder / name) for name in STAGE_ORDER if name in args.stage}
    return evaluate(cascade, folders, settings, count=args.count, batch=args.batch, sheet=args.sheet)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        with torch.inference_mode():
            report = run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(report) if args.json else table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
