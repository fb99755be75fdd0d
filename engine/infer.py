"""Edit and generate videos: `python -m engine.infer {edit,generate,demo,plan,info}`.

stdout carries results, stderr everything else. Exit codes: 0 done, 2 usage or config, 3 input media, 4 weights, 5 disk, 6 numbers not
finite, 8 out of memory, 130 interrupted, 143 terminated.
"""

import argparse
import json
import os
import signal
import sys
import warnings
from pathlib import Path

from engine.errors import ConfigError, OutOfMemory, UserError

DEMO_PROMPT = "a blue square moving right over a striped grey background"


def parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--cascade", default="sprites", metavar="NAME|PATH",
                        help="a name in configs/cascade, a YAML file, or a folder of weights")
    common.add_argument("--config", type=Path, metavar="FILE", help="settings (YAML); flags and --set win over it")
    common.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override one setting, e.g. steps.ssr2=8")
    common.add_argument("--seed", type=int)
    common.add_argument("--device", help="auto, cpu, cuda, cuda:1")
    common.add_argument("--dtype", help="auto, fp32, bf16, fp16")
    common.add_argument("--stages", metavar="base..ssr2", help="stop early, for a preview")
    common.add_argument("--guidance", type=float, metavar="W", help="classifier-free guidance of the base model; 1 is off (the paper)")
    common.add_argument("--json", action="store_true", help="one JSON object a line on stdout")
    common.add_argument("--quiet", action="store_true", help="no progress bars and notes")
    output = argparse.ArgumentParser(add_help=False)
    output.add_argument("--out", type=Path, metavar="PATH",
                        help=".mp4, .gif, .npy, or a folder for PNG frames; default out/<command>.mp4")
    output.add_argument("--finetuned", type=Path, metavar="DIR",
                        help="what engine.finetune made of a clip (its OUT/product); in --prompt, the token that the clip was learned by "
                             "stands for it (sks by default), and is not required")
    source = argparse.ArgumentParser(add_help=False)
    source.add_argument("--strength", type=float, metavar="S",
                        help="noise on the input, the paper's s: 0 keeps it, 1 ignores it; default 0.8")
    source.add_argument("--fit", choices=("crop", "pad", "stretch"), help="how the input meets the cascade's aspect; default crop")
    source.add_argument("--start", type=float, metavar="SECONDS", help="where in the input to begin")

    p = argparse.ArgumentParser(prog="python -m engine.infer",
                                description="Edit and generate videos with a cascade of seven diffusion models.")
    commands = p.add_subparsers(dest="command", required=True, metavar="{edit,generate,demo,plan,info}")
    edit = commands.add_parser("edit", parents=[common, output, source], help="edit a video by a text prompt")
    edit.add_argument("--video", required=True, type=Path, help="video file, GIF, .npy, picture, or folder of pictures")
    edit.add_argument("--prompt", required=True, help="the video after the edit, in words")
    generate = commands.add_parser("generate", parents=[common, output], help="make a video from text alone")
    generate.add_argument("--prompt", required=True)
    demo = commands.add_parser("demo", parents=[common, output, source], help="edit a bundled clip; needs no arguments")
    demo.add_argument("--prompt", default=DEMO_PROMPT)
    commands.add_parser("plan", parents=[common, source],
                        help="resolved config and, per stage, shape, steps, parameters, FLOPs; loads no weights")
    info = commands.add_parser("info", help="versions, devices, kernels and attention backends, and why each is or is not used")
    info.add_argument("--json", action="store_true")
    return p


def settings(args, cls):
    """The command's config: defaults < --config < flags < --set."""
    from engine.config_io import load_config

    flags = []
    for flag, field in (("seed", "seed"), ("device", "device"), ("dtype", "dtype"), ("guidance", "guidance_weight"),
                        ("strength", "strength"), ("fit", "fit"), ("start", "start")):
        if getattr(args, flag, None) is not None:
            flags.append(f"{field}={json.dumps(getattr(args, flag))}")
    if args.stages:
        first, _, last = args.stages.rpartition("..")
        if first not in ("", "base"):
            raise ConfigError(f"--stages: want a range that begins at base, like base..ssr2; got {args.stages}")
        flags.append(f"last_stage={last}")
    return load_config(cls, args.config, flags + args.set)


def run(args) -> None:
    """edit, generate, demo: load, sample, write, report."""
    from engine import dreamix, outputs
    from engine.cascade import Cascade
    from engine.config import STAGE_ORDER, EditConfig, GenerateConfig
    from engine.paths import config_root

    config = settings(args, GenerateConfig if args.command == "generate" else EditConfig)
    out = args.out or Path("out", f"{args.command}.mp4")
    video = {"edit": lambda: args.video, "demo": lambda: config_root() / "demo" / "clip.mp4", "generate": lambda: None}[args.command]()
    outputs.check_output(out, video)
    cascade = Cascade.load(args.cascade, config.device, config.dtype, STAGE_ORDER[: STAGE_ORDER.index(config.last_stage) + 1],
                           args.finetuned)
    progress = Console(args)
    if video is None:
        result = dreamix.generate(cascade, args.prompt, config, progress)
    else:
        result = dreamix.edit(cascade, video, args.prompt, config, progress)
    for note in result.notes:
        progress.note(note)
    record = outputs.manifest(cascade, config, args.prompt, result, args.command, video)
    with warnings.catch_warnings(record=True) as caught:
        paths = outputs.write(result, out, record, video)
    for warning in caught:
        progress.note(str(warning.message))
    if args.json:
        print(json.dumps({"result": {name: str(path) for name, path in paths.items()}, "seconds": sum(record["seconds"].values())}))
    else:
        print("\n".join(f"{name:10}  {path}" for name, path in paths.items()))


class Console:
    """Progress on a terminal: one bar a stage. With --json, one line a stage on stdout."""

    def __init__(self, args):
        self.json, self.quiet, self.bar = args.json, args.quiet or args.json, None

    def on_stage(self, stage, steps: int) -> None:
        from tqdm import tqdm

        size = f"{stage.frames}x{stage.height}x{stage.width}"
        self.bar = tqdm(total=steps, desc=f"{stage.name:4} {size:12}", unit="step", file=sys.stderr, disable=True if self.quiet else None)

    def on_step(self) -> None:
        self.bar.update()

    def on_report(self, report, video) -> None:
        self.bar.close()
        if self.json:
            print(json.dumps(vars(report)), flush=True)

    def note(self, text: str) -> None:
        if not self.quiet:
            print(f"note: {text}", file=sys.stderr)


def plan(args) -> None:
    from engine.cascade_folder import find_cascade
    from engine.cascade_plan import plan as make_plan
    from engine.cascade_plan import table
    from engine.config import EditConfig
    from engine.config_io import dump_yaml

    config = settings(args, EditConfig)
    folder, cascade = find_cascade(args.cascade)
    # without an input the base starts from noise
    records = make_plan(cascade, config, config.strength if "strength" in config.model_fields_set else 1.0)
    if args.json:
        print(json.dumps({"cascade": cascade.name, "weights": str(folder), "config": config.model_dump(mode="json"), "stages": records}))
    else:
        print(f"cascade: {cascade.name}\n{dump_yaml(config)}\n{table(records)}")


def info(args) -> None:
    from engine.runtime.environment import describe

    found = describe()
    if args.json:
        print(json.dumps(found))
        return
    print("versions    " + ", ".join(f"{name} {version or '(not installed)'}" for name, version in found["versions"].items()))
    for device in found["devices"]:
        print("device      " + ", ".join(f"{key} {value}" for key, value in device.items()))
    print(f"dtype       {found['default_dtype']} by default")
    for kernel in found["kernels"]:
        print(f"kernel      {kernel['kernel']}: {kernel['implementation']}, {kernel['reason']}")
    for backend in found["attention"]:
        print(f"attention   {backend['backend']}: {'used' if backend['used'] else 'not used'}, {backend['reason']}")


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        {"plan": plan, "info": info}.get(args.command, run)(args)
        sys.stdout.flush()                                                      # here, where a reader that has gone is no traceback
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)       # one line, whatever a path holds
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # the reader has gone: nothing more to say
        return 141
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate" in str(error):
            problem = OutOfMemory("not enough memory for this run; try --stages base..ssr2 or --dtype bf16")
            print(f"error: {problem}", file=sys.stderr)
            return problem.exit_code
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
