"""Learn a clip, or a handful of pictures: `python -m engine.finetune --video CLIP --out DIR`, or `deepspeed engine/finetune.py ...`.

A run that was ended goes on when the same line is given again. stdout carries results, stderr everything else. Exit codes: 0 done, 2 usage
or config, 3 input media, 4 weights or checkpoints, 5 disk, 6 numbers not finite, 7 the folder is in use, 8 out of memory, 130 interrupted,
143 terminated.
"""

import argparse
import json
import os
import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:
    # run by its path, as the deepspeed launcher does: beside this file lie names that would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from engine.errors import ConfigError, OutOfMemory, UserError


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m engine.finetune", description="Finetune a cascade on one clip or a few pictures (mixed "
                                "video-image finetuning); `python -m engine.infer edit --finetuned DIR/product` then uses the result.")
    source = p.add_mutually_exclusive_group()
    source.add_argument("--video", type=Path, metavar="CLIP", help="what is learned: a video file, GIF, .npy or folder of frames in order")
    source.add_argument("--images", type=Path, metavar="DIR", help="pictures without an order: a folder, or one file")
    p.add_argument("--out", type=Path, metavar="DIR", help="folder of the run: checkpoints, metrics.jsonl, previews, product")
    p.add_argument("--cascade", default="sprites", metavar="NAME|PATH", help="a name in configs/cascade, a YAML file or a folder")
    p.add_argument("--config", metavar="NAME|FILE", help="settings (YAML), or a name in configs/finetune, the paper's are video, mixed, "
                   "frames; default: the cascade's own mixed (pictures: frames), where it has one")
    p.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override one setting, e.g. stage_steps.base=50")
    p.add_argument("--alpha", type=float, help="weight of the video loss; 1: the clip alone, 0: its frames alone")
    p.add_argument("--steps", type=int, help="of every stage")
    p.add_argument("--lr", type=float, help="of every stage")
    p.add_argument("--stages", metavar="base,ssr1,ssr2", help="which models learn")
    p.add_argument("--rare-token", metavar="T", help="the prompt that comes to stand for the clip; default sks")
    p.add_argument("--seed", type=int)
    p.add_argument("--device", help="auto, cpu, cuda, cuda:1")
    p.add_argument("--dtype", help="auto, fp32, bf16: of the pass; what is trained is kept in fp32")
    p.add_argument("--lora", type=int, metavar="RANK", help="write differences of this rank instead of whole weights")
    p.add_argument("--preview-every", type=int, metavar="K", help="steps between pictures in DIR/previews")
    p.add_argument("--preview-prompt", metavar="TEXT", help="show an edit there too")
    p.add_argument("--report-to", action="append", metavar="NAME", help="tensorboard, wandb or trackio; may be repeated")
    p.add_argument("--deepspeed", metavar="FILE", help="ZeRO-3 with these settings (JSON), or a name in configs/deepspeed; "
                   "default zero3 where the launcher starts more than one rank")
    p.add_argument("--allow-config-change", action="store_true", help="go on with a run although its settings or input differ")
    p.add_argument("--plan", action="store_true", help="print memory and time for each stage, and load nothing")
    p.add_argument("--plan-machines", action="store_true",
                   help="print the best policy for 1, 2, 4, 8 GPUs of 24, 48, 80, 141 GB; takes half a minute at the paper's size")
    p.add_argument("--gpus", type=int, default=1, metavar="N", help="with --plan: for so many GPUs")
    p.add_argument("--gpu-memory", type=float, metavar="GB", help="with --plan: of each; default: what is here")
    p.add_argument("--quiet", action="store_true", help="no progress bars and notes")
    p.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)      # the launcher says it in the environment too
    return p


def settings(args):
    """The run's config: defaults < --config < flags < --set."""
    from engine.config import FinetuneConfig
    from engine.config_io import load_config

    flags = []
    for flag, field in (("alpha", "alpha"), ("steps", "steps"), ("lr", "lr"), ("rare_token", "rare_token"), ("seed", "seed"),
                        ("device", "device"), ("dtype", "dtype"), ("lora", "lora_rank"), ("preview_every", "preview_every"),
                        ("preview_prompt", "preview_prompt"), ("report_to", "report_to")):
        if (value := getattr(args, flag)) is not None:
            flags.append(f"{field}={json.dumps(value)}")
            if field in ("steps", "lr"):
                flags.append(f"stage_{field}={{}}")          # what a preset says of single stages goes too
    if args.stages:
        flags.append(f"stages={json.dumps([part.strip() for part in args.stages.split(',')])}")
    if args.images and args.alpha is None:
        flags.append("alpha=0.0")                            # pictures have no order to learn (Sec. 5)
    return load_config(FinetuneConfig, preset(args), flags + args.set)


def preset(args) -> Path | None:
    """The file of --config; without one the cascade's own, where it has one."""
    from engine.config_io import nearest
    from engine.paths import config_root

    folder = config_root() / "finetune"
    if args.config is None:
        own = folder / f"{Path(args.cascade).name}_{'frames' if args.images else 'mixed'}.yaml"
        return own if own.is_file() else None
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if args.config in names:
        return folder / f"{args.config}.yaml"
    if not Path(args.config).is_file():
        near = nearest(args.config, names)
        hint = f" (did you mean {near}?)" if near else ""
        raise ConfigError(f"--config: want a file or one of {', '.join(names)}; got {args.config}{hint}")
    return Path(args.config)


def zero_settings(args, world: int = 1) -> Path | None:
    """DeepSpeed's settings, or None: without DeepSpeed, which saves nothing on one GPU."""
    from engine.paths import config_root

    name = args.deepspeed or ("zero3" if world > 1 else None)
    if name is None:
        return None
    bundled = config_root() / "deepspeed" / f"{name}.json"
    return bundled if bundled.is_file() else Path(name)


def run(args) -> int:
    from contextlib import ExitStack
    from functools import partial

    config, zero = settings(args), zero_settings(args, int(os.environ.get("WORLD_SIZE", 1)))
    if not (args.video or args.images) or not args.out:
        raise ConfigError("want --video CLIP or --images DIR, and --out DIR")
    import torch

    from engine.cascade import Cascade
    from engine.training.finetune_data import Source
    from engine.training.finetuning import Finetuning
    from engine.training.guards import watch_parent
    from engine.training.plain_engine import PlainEngine
    from engine.training.ranks import Alone, Processes

    device = config.device
    if "LOCAL_RANK" in os.environ:
        watch_parent()
        if device in ("auto", "cuda") and torch.cuda.is_available():
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        else:
            here = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1          # DeepSpeed's launcher, torchrun
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(here)))
    cascade = Cascade.load(args.cascade, device, config.dtype, config.stages)
    with ExitStack() as stack:
        make_engine, ranks = PlainEngine, Alone()
        if zero is not None:
            from engine.training.zero import ZeroEngine, join, leaving

            stack.enter_context(leaving())
            join(cascade.device)
            make_engine, ranks = partial(ZeroEngine, settings=zero), Processes()
        code = Finetuning(cascade, Source(args.video or args.images, images=args.video is None), config, args.out, make_engine=make_engine,
                          ranks=ranks, allow_config_change=args.allow_config_change, quiet=args.quiet,
                          say=lambda text: None if args.quiet else print(text, file=sys.stderr)).run()
        if code == 0 and ranks.rank == 0:
            print(args.out / "product")
    return code


def plan(args) -> int:
    """Memory and time of each stage under the settings given; nothing is loaded.   Raises: OutOfMemory if one does not fit."""
    config = settings(args)
    import torch

    from engine.cascade_folder import find_cascade
    from engine.finetune_plan import kinds_of, table
    from engine.finetune_plan import plan as make_plan
    from engine.runtime.device import dtype_name, resolve_device, resolve_dtype
    from engine.runtime.memory import GB, Policy

    zero = zero_settings(args, args.gpus)
    if args.gpu_memory is not None:                          # a machine that is not this one: what its host has is not asked
        gpu, host, dtype = round(args.gpu_memory * GB), None, "fp32" if config.dtype == "fp32" else "bf16"
    else:
        device = resolve_device(config.device)
        gpu = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        dtype = dtype_name(resolve_dtype(config.dtype, device)).replace("fp16", "fp32")
    try:
        policy = Policy.of(config, dtype, json.loads(zero.read_text("utf-8")) if zero is not None else None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plan: {error}") from error
    records = make_plan(find_cascade(args.cascade)[1], config.stages, world=args.gpus, gpu_bytes=gpu, host_bytes=host, policy=policy,
                        kinds=kinds_of(config), accumulate=config.accumulate)
    print(table(records))
    if refused := [record["refusal"] for record in records if not record["fits"]]:
        raise OutOfMemory("; ".join(refused))
    return 0


def plan_machines(args) -> int:
    """What each size of machine would do best, whatever the settings' own policy."""
    from engine.cascade_folder import find_cascade
    from engine.finetune_plan import every_machine, table
    from engine.runtime.memory import GB

    config = settings(args)
    stages = [name for name in ("base", "ssr1", "ssr2") if name in config.stages]
    records = every_machine(find_cascade(args.cascade)[1], stages)
    for card in dict.fromkeys(record["card"] for record in records):
        print(f"GPUs of {card / GB:.0f} GB\n{table([record for record in records if record['card'] == card])}\n")
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        code = plan_machines(args) if args.plan_machines else plan(args) if args.plan else run(args)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate" in str(error):
            problem = OutOfMemory("not enough memory for this run; --plan shows what it needs and what would fit")
            print(f"error: {problem}", file=sys.stderr)
            return problem.exit_code
        raise


if __name__ == "__main__":
    sys.exit(main())
