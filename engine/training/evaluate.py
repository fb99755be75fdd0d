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
from engine.sprites.readout import Reading, read

TARGETS = {"colour": 0.95, "background_colour": 0.95, "style": 0.95, "background_kind": 0.8, "shape": 0.8, "motion": 0.8}
STRENGTHS = (0.6, 0.7, 0.8, 0.9, 1.0)
# dB, about what rounding to 8 bits costs: the linear interpolation of a still clip is exact, and its PSNR would be infinite
BEST_PSNR = 60.0
SHEET_CLIPS, SHEET_SCALE = 12, 4


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
    reading = read(video)
    hits = agreement(reading, scenes)
    accuracy = {name: mean([hit[name] for hit in hits]) for name in ATTRIBUTES}
    return {"clips": len(scenes), "accuracy": accuracy, "match": reading.match.mean().item(),
            "targets": {name: {"want": want, "margin": accuracy[name] - want, "met": accuracy[name] >= want}
                        for name, want in TARGETS.items()}}, video


def one_chunk(stage: StageConfig, before: StageConfig) -> tuple[StageConfig, int]:
    """The stage cut to its first chunk, whose result is the same alone, and how many frames of the stage before that takes."""
    frames = stage.chunk_frames or stage.frames
    return stage.model_copy(update={"frames": frames}), before.frames * frames // stage.frames


def judge_super_resolution(stage: StageConfig, before: StageConfig, network, text: TextEmbedding, scenes: Scenes,
                           settings: SampleConfig) -> dict:
    """Rendered clips taken down to what the stage before would have made, and up again by the stage and by interpolation.

    A spatial stage is judged on all its frames; a temporal one also on the frames it had to make ("new"), and on those of the clips in
    which something moves ("new_moving"), since interpolation cannot be beaten where nothing does.   -> per group of frames the mean
    PSNR of both (dB, each clip capped at BEST_PSNR), and the number of clips in which the stage is the better one.
    """
    part, given = one_chunk(stage, before)
    stride = part.frames // given
    groups: dict[str, list[tuple[float, float]]] = {"all": []} | ({"new": [], "new_moving": []} if stride > 1 else {})
    for (i,) in batches(stage.name, len(scenes), 1):
        truth = render(scenes[i], stage.frames, stage.height, stage.width, stop=part.frames)
        lowres = downsample(truth, given, before.height, before.width)
        made = finite(stage.name, stage_run(part, network, text, settings, [i]).super_resolution(lowres.to(text.tokens.device)))
        plain = upsample(lowres, part.frames, stage.height, stage.width, "linear")
        new = torch.arange(part.frames) % stride > 0
        for name in groups:
            if name == "new_moving" and scenes.attributes(i)["motion"] == "still":
                continue
            frames = slice(None) if name == "all" else new
            groups[name].append(tuple(min(psnr(video[:, frames], truth[:, frames]).item(), BEST_PSNR) for video in (made, plain)))
    report: dict = {"clips": len(scenes), "frames": part.frames}
    for name, found in groups.items():
        made, plain = torch.tensor(found, dtype=torch.float64).view(-1, 2).T
        report[name] = {"clips": len(made), "psnr": mean(made), "interpolation": mean(plain), "gain": mean(made - plain),
                        "wins": int((made > plain).sum())}
    return report


def edits(scenes: Scenes, seed: int) -> tuple[Scenes, list[str]]:
    """The scenes after one change each, and the attribute that was changed: scene i's is number i modulo six, its new value is drawn.

    What is edited is held out; what the edit asks for may be a combination that training shows.
    """
    names, generator = list(ATTRIBUTES), torch.Generator().manual_seed(seed)
    changed = torch.arange(len(scenes)) % len(names)
    new = {}
    for k, (name, values) in enumerate(ATTRIBUTES.items()):
        other = (getattr(scenes, name) + torch.randint(1, len(values), (len(scenes),), generator=generator)) % len(values)
        new[name] = torch.where(changed == k, other, getattr(scenes, name))
    return scenes.replace(**new), [names[k] for k in changed]


def judge_edits(stage: StageConfig, network, text: TextEmbedding, scenes: Scenes, wanted: Scenes, changed: list[str],
                settings: SampleConfig, batch: int = 10) -> dict:
    """Rendered clips of `scenes`, degraded to each strength and sampled with the captions (`text`) of `wanted`.

    -> per strength: how often the changed attribute is read as asked (all, and per attribute), the share of the other attributes that is
    kept, how often both hold in full, and the mean PSNR to the rendered `wanted`; "input" is the same of the clips before the edit.
    """
    before, truth = (render(s, stage.frames, stage.height, stage.width) for s in (scenes, wanted))
    steps = settings.steps.get(stage.name, stage.steps)

    def judged(video: Tensor) -> dict:
        hits = agreement(read(video), wanted)
        asked = [hit[name] for hit, name in zip(hits, changed)]
        kept = [sum(hit[other] for other in hit if other != name) / (len(hit) - 1) for hit, name in zip(hits, changed)]
        each = {name: [ok for ok, other in zip(asked, changed) if other == name] for name in ATTRIBUTES}
        return {"success": mean(asked), "kept": mean(kept), "both": mean([all(hit.values()) for hit in hits]),
                "psnr": mean(psnr(video, truth).clamp(max=BEST_PSNR)), "success_per_attribute": {k: mean(v) for k, v in each.items() if v}}

    report = {"clips": len(scenes), "input": judged(before), "strengths": {}}
    for strength in STRENGTHS:
        made = []
        for some in batches(f"edit {strength}", len(scenes), batch):
            z = torch.stack([degrade(before[i], strength, stage, settings.seed + i, steps) for i in some])
            run = stage_run(stage, network, text, settings, some)
            made.append(finite("edit", run.denoise(z.to(run.device), None, None, range(stage.frames), strength)))
        report["strengths"][str(strength)] = judged(torch.cat(made))
    return report


def agreement(reading: Reading, wanted: Scenes) -> list[dict[str, bool]]:
    """Per clip and attribute, whether it is read as wanted."""
    return [{name: found[name] == want for name, want in wanted.attributes(i).items()} for i, found in enumerate(reading)]


def mean(values) -> float | None:
    """None of nothing, which JSON can say."""
    return torch.as_tensor(values, dtype=torch.float64).mean().item() if len(values) else None


@torch.inference_mode()
def evaluate(cascade: Cascade, folders: dict[str, Path], settings: SampleConfig, *, count: int = 200, count_sr: int = 8,
             count_edits: int = 0, batch: int = 10, sheet: Path | None = None) -> dict:
    """Judge the stages of `folders` (name -> folder of its weights), each in memory only while it is judged -> a JSON-able report."""
    guidance = settings.guidance_weight if settings.guidance_weight is not None else cascade.config.stages[0].diffusion.guidance_weight
    report = {"cascade": cascade.config.name, "seed": settings.seed, "guidance": guidance, "dtype": dtype_name(cascade.dtype),
              "steps": {name: settings.steps.get(name, cascade.config.stage(name).steps) for name in folders},
              "weights": {name: str(folder) for name, folder in folders.items()}}
    for stage in cascade.config.stages:
        if stage.name not in folders:
            continue
        with weights.resident(lambda stage=stage: VideoUNet(stage.unet), folders[stage.name], cascade.device, cascade.dtype) as network:
            if stage.name == "base":
                scenes, texts = held_out(count, settings.seed)
                report["base"], video = judge_base(stage, network, cascade.encode(texts), scenes, settings, batch)
                if sheet is not None:
                    large = video[:SHEET_CLIPS].repeat_interleave(SHEET_SCALE, 2).repeat_interleave(SHEET_SCALE, 3)
                    contact_sheet(sheet, list(zip(texts, large)))
                if count_edits:
                    scenes, _ = held_out(count_edits, settings.seed)
                    wanted, changed = edits(scenes, settings.seed)
                    text = cascade.encode(captions(wanted, settings.seed))
                    report["edits"] = judge_edits(stage, network, text, scenes, wanted, changed, settings, batch)
            else:
                before = cascade.config.stages[STAGE_ORDER.index(stage.name) - 1]
                scenes, texts = held_out(count_sr, settings.seed)
                report.setdefault("super_resolution", {})[stage.name] = judge_super_resolution(
                    stage, before, network, cascade.encode(texts), scenes, settings)
    return report


def table(report: dict) -> str:
    """The report for a reader."""
    lines = [f"{report['cascade']}  seed {report['seed']}  guidance {report['guidance']:g}  {report['dtype']}"]
    lines += [f"  {name:5} {report['steps'][name]:4} steps  {folder}" for name, folder in report["weights"].items()]
    if base := report.get("base"):
        lines.append(f"base: {base['clips']} held-out captions, match {base['match']:.3f}")
        for name, target in base["targets"].items():
            verdict = "pass" if target["met"] else "MISS"
            lines.append(f"  {name:18} {base['accuracy'][name]:6.3f}  want {target['want']:.2f}  {verdict} by {abs(target['margin']):.3f}")
    for stage, found in report.get("super_resolution", {}).items():
        lines.append(f"{stage}: PSNR in dB of {found['clips']} held-out clips, {found['frames']} frames")
        for group in (name for name in found if name in ("all", "new", "new_moving") and found[name]["clips"]):
            g = found[group]
            lines.append(f"  {group:18} {g['psnr']:6.2f}  interpolation {g['interpolation']:6.2f}  gain {g['gain']:+6.2f}  "
                         f"wins {g['wins']} of {g['clips']}")
    if found := report.get("edits"):
        lines.append(f"edits: {found['clips']} held-out clips, one attribute changed in each")
        lines.append("  s       asked   kept   both    PSNR  asked, per attribute")
        for name, row in [("input", found["input"]), *found["strengths"].items()]:
            each = "  ".join(f"{k} {v:.2f}" for k, v in row["success_per_attribute"].items())
            lines.append(f"  {name:6} {row['success']:6.3f} {row['kept']:6.3f} {row['both']:6.3f}  {row['psnr']:6.2f}  {each}")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m engine.training.evaluate", description=__doc__.split("\n")[0])
    p.add_argument("--cascade", default="sprites", help="name or path of the cascade")
    p.add_argument("--stage", nargs="+", default=list(STAGE_ORDER), metavar="NAME", help="stages to judge (default: all seven)")
    p.add_argument("--count", type=int, default=200, help="captions for the base")
    p.add_argument("--count-sr", type=int, default=8, help="clips for each of the other stages")
    p.add_argument("--edits", type=int, default=0, metavar="N", help="clips to edit with the base (default: none)")
    p.add_argument("--guidance", type=float, metavar="W", help="the base's guidance weight, 1 is off (default: the cascade's own)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--steps", action="append", default=[], metavar="NAME=N", help="a stage's sampling steps, instead of the cascade's")
    p.add_argument("--batch", type=int, default=10, help="clips of the base made side by side")
    p.add_argument("--weights-folder", type=Path, metavar="DIR",
                   help="folder of training runs: a stage is judged with DIR/<stage> where there are weights")
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
    for flag, least in (("count", 1), ("count_sr", 1), ("edits", 0), ("batch", 1)):
        if getattr(args, flag) < least:
            raise ConfigError(f"--{flag.replace('_', '-')}: want at least {least}, got {getattr(args, flag)}")
    wrong = [name for name in args.stage if name not in STAGE_ORDER]
    if wrong:
        raise ConfigError(f"--stage: want names of {' '.join(STAGE_ORDER)}, got {' '.join(wrong)}")
    try:
        settings = SampleConfig(seed=args.seed, guidance_weight=args.guidance, steps=pairs("--steps", args.steps))
    except ValueError as error:
        raise ConfigError(" ".join(str(error).split())) from error
    if "base" not in args.stage and (args.edits or args.sheet):
        raise ConfigError("--edits, --sheet: these are made with base, which --stage leaves out")
    runs = {name: args.weights_folder / name for name in args.stage} if args.weights_folder is not None else {}
    elsewhere = {name: folder for name, folder in runs.items() if (folder / weights.WEIGHTS_NAME).is_file()}
    if runs and not elsewhere:
        raise ConfigError(f"--weights-folder: want NAME/{weights.WEIGHTS_NAME} for one of {' '.join(args.stage)} in {args.weights_folder}")
    elsewhere.update((name, Path(folder)) for name, folder in pairs("--override", args.override).items())
    if unused := sorted(elsewhere.keys() - set(args.stage)):
        raise ConfigError(f"--override: {' '.join(unused)} is not among the stages to judge, {' '.join(args.stage)}")
    cascade = Cascade.load(args.cascade, args.device, args.dtype, tuple(name for name in args.stage if name not in elsewhere))
    folders = {name: elsewhere.get(name, cascade.folder / name) for name in STAGE_ORDER if name in args.stage}
    return evaluate(cascade, folders, settings, count=args.count, count_sr=args.count_sr, count_edits=args.edits, batch=args.batch,
                    sheet=args.sheet)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        report = run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(report) if args.json else table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
