"""Train one stage of a cascade on captioned video: `python -m engine.pretrain --stage base --out runs/base`.

Under torchrun the ranks share the work: `torchrun --nproc_per_node 2 -m engine.pretrain ...`. A run that is stopped goes on when the same
line is given again.
"""

import argparse
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
    p.add_argument("--minutes", type=float, help="stop (resumable) after this long")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    from engine.config import PretrainConfig
    from engine.config_io import load_config
    from engine.errors import UserError

    try:
        config = load_config(PretrainConfig, args.config, args.set)
        import torch

        torch.set_num_threads(1 if "LOCAL_RANK" in __import__("os").environ else torch.get_num_threads())
        from engine.cascade import find_cascade
        from engine.training.loop import Pretraining

        folder, cascade = find_cascade(args.cascade)
        run = Pretraining(cascade, args.stage, config, args.source, folder, args.out)
        run.run(time.time() + args.minutes * 60 if args.minutes else float("inf"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
