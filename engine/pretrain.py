"""Train one stage of a cascade on captioned video: `python -m engine.pretrain --stage base --out runs/base`.

Under torchrun the ranks share the work: `torchrun --nproc_per_node 2 -m engine.pretrain ...`. A run that is stopped goes on when the same
line is given again.
"""

import argparse
import os
import sys
import time
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m engine.pretrain", description=__doc__.split("\n")[0])
    p.add_argument("--stage", required=True, help="base tsr1 ssr1 ssr2 tsr2 tsr3 ssr3")
    p.add_argument("--cascade", default="sprites", help="name or path of the cascade's config")
    p.add_argument("--source", default="sprites", help="'sprites', or a folder of clip.mp4 + clip.txt")
    p.add_argument("--config", type=Path, help="pretraining config (YAML)")
    p.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override one setting")
    p.add_argument("--out", type=Path, required=True, help="folder of the run: state, weights, metrics.jsonl")
    p.add_argument("--publish", action="store_true", help="train no further: put the run's averaged weights into the cascade's folder")
    p.add_argument("--minutes", type=float, help="stop (resumable) after this long")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    from engine.config import STAGE_ORDER, PretrainConfig
    from engine.config_io import load_config
    from engine.errors import ConfigError, UserError

    try:
        config = load_config(PretrainConfig, args.config, args.set)
        import torch

        from engine.cascade_folder import find_cascade, write_index
        from engine.runtime.weights import WEIGHTS_NAME
        from engine.training.loop import Pretraining

        if "LOCAL_RANK" in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
        folder, cascade = find_cascade(args.cascade)
        if args.stage not in STAGE_ORDER:
            raise ConfigError(f"--stage: want one of {' '.join(STAGE_ORDER)}, got {args.stage}")
        run = Pretraining(cascade, args.stage, config, args.source, folder, args.out)
        if args.publish:
            if not run.resume():
                raise ConfigError(f"--publish: want the folder of a run in --out, got {args.out}, which has none")
            run.export(folder / args.stage / WEIGHTS_NAME)
            write_index(folder, cascade)
            return 0
        run.run(time.time() + args.minutes * 60 if args.minutes else float("inf"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
