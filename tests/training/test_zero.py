"""ZeRO-3 over two ranks, through the real launcher: what one process computes, what it keeps, how it ends.

A launch costs about ten seconds, so one does everything that can be asked of living ranks (`rank_main`, which runs below `deepspeed`) and
leaves its answers in a folder; the tests read them.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
ALPHAS = (1.0, 0.35, 0.0)
STEPS = 5


# ---------------------------------------------------------------------------------------------------- what both sides do

def stage_of(tiny: Path, name: str):
    from engine.cascade_folder import read_index

    cascade = read_index(tiny)
    index = [stage.name for stage in cascade.stages].index(name)
    return cascade.stages[index], cascade.stages[index - 1] if index else None


def settings_of(**changes):
    from engine.config import FinetuneConfig

    # a rate and an epsilon at which five steps move weights well above rounding, and AdamW does not turn rounding into signs
    return FinetuneConfig(**{"lr": 1e-3, "eps": 1e-6, "seed": 3, "dtype": "fp32"} | changes)


def task(tiny: Path, name: str, config):
    """(build, folder, objective, data) for one stage of the tiny cascade, with a clip from a generator."""
    from engine.models.text import TextEmbedding
    from engine.models.unet import VideoUNet
    from engine.training.finetune_data import StageData
    from engine.training.objective import Objective

    stage, before = stage_of(tiny, name)
    generator = torch.Generator().manual_seed(0)
    clip = torch.rand(stage.frames, stage.height, stage.width, 3, generator=generator) * 2 - 1
    pictures = torch.rand(7, stage.height, stage.width, 3, generator=generator) * 2 - 1
    text = TextEmbedding(torch.randn(1, 5, stage.unet.text_dim, generator=generator), torch.ones(1, 5, dtype=torch.bool))
    objective = Objective(config, stage, before, text, torch.device("cpu"))
    return (lambda: VideoUNet(stage.unet)), tiny / name, objective, StageData(clip, pictures.half())


def advance(engine, config, objective, data, steps, spoil=None, skip=()) -> list[tuple[float, float]]:
    """Steps of the engine's rank -> each one's loss over all ranks, and the norm."""
    from engine.training.objective import share, units

    record = []
    for step in steps:
        mine = share(units(config, objective.stage.name, step), engine.rank, engine.world)
        parts = max(1, min(config.accumulate, len(mine)))
        loss = 0.0
        for part in range(parts):
            batch = objective.batch(mine[part::parts], data, step)
            errors = objective.errors(engine.network, batch)
            if (step, engine.rank) == spoil:
                errors = errors * float("nan")
            total = (errors * batch.weights).sum()
            engine.backward(total * engine.world)
            loss += total.item()
        record.append((engine.sum_ranks([loss])[0], engine.step(config.lr, skip=step in skip)))
    return record


def all_weights(engine) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in engine.weights()}


# ---------------------------------------------------------------------------------------------------- below `deepspeed`

def rank_main(tiny: Path, out: Path) -> None:
    from engine.training import zero

    torch.set_num_threads(1)
    answers = {}
    with zero.leaving():
        rank = int(os.environ["RANK"])
        for stage, alpha in [("base", alpha) for alpha in ALPHAS] + [("ssr1", 0.35)]:
            config = settings_of(alpha=alpha)
            engine, weights = make(tiny, stage, config)
            answers[f"{stage} {alpha}"] = advance(engine, config, *weights, range(STEPS))
            dump(engine, out / f"{stage}-{alpha}.safetensors")
            engine.close()
        answers |= states(tiny, out, rank)
    (out / f"rank{rank}.json").write_text(json.dumps(answers))


def make(tiny, stage, config, settings=None, dtype=torch.float32):
    from engine.training.zero import ZeroEngine

    build, folder, objective, data = task(tiny, stage, config)
    settings = settings or ROOT / "configs/deepspeed/zero3.json"
    return ZeroEngine(build, folder, config, torch.device("cpu"), dtype, settings=settings), (objective, data)


def dump(engine, path: Path) -> None:
    found = all_weights(engine)
    if engine.rank == 0:
        save_file(found, path)


def states(tiny, out, rank) -> dict:
    return {}


if __name__ == "__main__":
    rank_main(Path(sys.argv[-2]), Path(sys.argv[-1]))
