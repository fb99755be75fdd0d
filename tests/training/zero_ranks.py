"""What test_zero.py asks of living ranks: this file runs below `deepspeed` and leaves answers in a folder.

A launch costs about ten seconds, so one does all that can be done in one. The tests also take from here what the two sides share.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "configs/deepspeed/zero3.json"
ALPHAS = (1.0, 0.35, 0.0)
STEPS = 5


def stage_of(tiny: Path, name: str):
    from engine.cascade_folder import read_index

    cascade = read_index(tiny)
    index = [stage.name for stage in cascade.stages].index(name)
    return cascade.stages[index], cascade.stages[index - 1] if index else None


def settings_of(**changes):
    from engine.config import FinetuneConfig

    # a rate and an epsilon at which five steps move weights well above rounding, and AdamW does not turn rounding into signs
    return FinetuneConfig(**{"lr": 1e-3, "eps": 1e-6, "seed": 3, "dtype": "fp32"} | changes)


def write_settings(out: Path) -> None:
    """The bundled settings, with limits at which even this network does not stay in one piece."""
    tight = {"stage3_param_persistence_threshold": 0, "sub_group_size": 4000, "stage3_prefetch_bucket_size": 1000,
             "stage3_max_live_parameters": 1000, "stage3_max_reuse_distance": 0, "reduce_bucket_size": 5000}
    for name, ours in (("zero3", "pieces"), ("zero3_offload", "offload")):
        settings = json.loads((ROOT / f"configs/deepspeed/{name}.json").read_text())
        settings["zero_optimization"] |= tight
        (out / f"{ours}.json").write_text(json.dumps(settings))


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


def rank_main(job: str, tiny: Path, out: Path) -> None:
    from engine.training import zero

    torch.set_num_threads(1)
    answers = {}
    with zero.leaving():
        for ask in JOBS[job]:
            started = time.perf_counter()
            answers[ask.__name__] = ask(tiny, out)
            answers.setdefault("seconds", {})[ask.__name__] = time.perf_counter() - started
    (out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(answers))


def make(tiny, stage, config, settings=BUNDLED, dtype=torch.float32):
    from engine.training.zero import ZeroEngine

    build, folder, objective, data = task(tiny, stage, config)
    return ZeroEngine(build, folder, config, torch.device("cpu"), dtype, settings=settings), (config, objective, data)


def run(tiny, out, name, stage="base", steps=range(STEPS), settings=BUNDLED, dtype=torch.float32, load=None, save=None, **changes) -> list:
    """A short run, its weights in `name`.safetensors -> losses and norms. `save`: a folder that gets the state after step 2."""
    engine, what = make(tiny, stage, settings_of(**changes), settings, dtype)
    if load:
        engine.load(out / load)
    record = []
    for step in steps:
        record += advance(engine, *what, [step])
        if save and step == 2:
            save_to(engine, out / save)
    dump(engine, out / f"{name}.safetensors")
    engine.close()
    return record


def dump(engine, path: Path) -> None:
    found = all_weights(engine)
    if engine.rank == 0:
        save_file(found, path)


def save_to(engine, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    engine.save(folder)
    engine.sum_ranks([])                                    # the other rank's files are there too


def agreement(tiny, out):
    return {str(alpha): run(tiny, out, f"base-{alpha}", alpha=alpha) for alpha in ALPHAS}


def agreement_of_convolutions(tiny, out):
    """With a kernel that leaves the block out where all frames are independent: this rank's graph then has no temporal weights at all."""
    from engine.models import attention

    block = attention.temporal_conv_block

    def bypassed(x, *args, **kwargs):
        return (x, None) if args[-1] is not None and args[-1].all() else block(x, *args, **kwargs)

    attention.temporal_conv_block = bypassed
    return run(tiny, out, "ssr1", stage="ssr1", settings=out / "pieces.json")


def resumed(tiny, out):
    run(tiny, out, "unbroken", settings=out / "pieces.json", save="state")
    return run(tiny, out, "resumed", steps=range(3, STEPS), settings=out / "pieces.json", load="state")


def refused(tiny, out):
    """Steps 0, 1, then 2 with a NaN on rank 1, then 2 again, refused by the loop, then 3, to which neither must add."""
    engine, what = make(tiny, "base", settings_of(), out / "pieces.json")
    parameters, live, applied = list(engine.engine.module.parameters()), [], []
    for module in engine.engine.module.modules():
        if not list(module.children()):
            module.register_forward_pre_hook(lambda *_: live.append(sum(p.numel() for p in parameters)))
    advance(engine, *what, range(2))
    save_to(engine, out / "before")
    spoiled, = advance(engine, *what, [2], spoil=(2, 1))
    applied.append(engine.applied)
    save_to(engine, out / "spoiled")
    skipped, = advance(engine, *what, [2], skip=[2])
    applied.append(engine.applied)
    save_to(engine, out / "skipped")
    advance(engine, *what, [3])
    applied.append(engine.applied)
    dump(engine, out / "refused.safetensors")
    said = [engine.any_rank(engine.rank == 1), engine.any_rank(False), engine.sum_ranks([1.5, engine.rank])]
    sizes = {"whole": sum(p.ds_numel for p in parameters), "most": max(live), "between": sum(p.numel() for p in parameters),
             "largest": max(sum(p.ds_numel for p in m.parameters()) for m in engine.engine.module.modules() if type(m).__name__ == "Block"),
             "pieces": [[p.ds_numel, p.ds_tensor.numel()] for p in parameters],
             "masters": sum(flat.numel() for flat in engine.zero.fp32_partitioned_groups_flat)}
    engine.close()
    return {"skipped": skipped, "spoiled": [str(x) for x in spoiled], "applied": applied, "said": said, "sizes": sizes}


def resumed_in_other_formats(tiny, out):
    for optimizer in ("adamw8bit", "fused"):
        common = {"dtype": torch.bfloat16, "optimizer": optimizer}
        run(tiny, out, f"{optimizer}-unbroken", save=f"{optimizer}-state", **common)
        run(tiny, out, f"{optimizer}-resumed", steps=range(3, STEPS), load=f"{optimizer}-state", **common)


def number_formats(tiny, out):
    for dtype in (torch.float32, torch.bfloat16):
        run(tiny, out, f"{dtype}", steps=range(20), dtype=dtype, lr=6e-6, eps=1e-8)


def passes(tiny, out):
    run(tiny, out, "accumulated", draws=3, accumulate=3)
    for stage in ("base", "ssr1"):
        common = {"stage": stage, "settings": out / "pieces.json"}
        run(tiny, out, f"checkpointed-{stage}", gradient_checkpointing=True, **common)
        run(tiny, out, f"elsewhere-{stage}", activation_offload=True, **common)
        run(tiny, out, f"both-{stage}", activation_offload=True, gradient_checkpointing=True, **common)
        run(tiny, out, f"kept-{stage}", **common)


def offloaded(tiny, out):
    """DeepSpeed's offloading to the host, here from the host to itself: the arithmetic's order and the bookkeeping are those of a GPU."""
    from engine.training import zero_settings

    zero_settings.offload = lambda path, part, wanted, device: wanted
    common = {"settings": out / "offload.json", "optimizer": "fused"}
    run(tiny, out, "offload-unbroken", save="offload-state", **common)
    run(tiny, out, "offload-resumed", steps=range(3, STEPS), load="offload-state", **common)
    engine, what = make(tiny, "base", settings_of(optimizer="fused"), out / "offload.json")
    record = advance(engine, *what, [0])
    save_to(engine, out / "offload-before")
    record += advance(engine, *what, [1, 2], skip=[1], spoil=(2, 0))
    save_to(engine, out / "offload-after")
    engine.close()
    return [str(norm) for _, norm in record]


def forever(tiny, out):
    """Steps until the end of time; each rank says who it is."""
    engine, what = make(tiny, "base", settings_of())
    (out / f"pid{engine.rank}.part").write_text(str(os.getpid()))
    (out / f"pid{engine.rank}.part").rename(out / f"pid{engine.rank}")
    while True:
        advance(engine, *what, [0])


JOBS = {"short": [agreement, agreement_of_convolutions, resumed, refused],
        "long": [resumed_in_other_formats, number_formats, passes, offloaded], "forever": [forever]}


if __name__ == "__main__":
    rank_main(sys.argv[-3], Path(sys.argv[-2]), Path(sys.argv[-1]))
