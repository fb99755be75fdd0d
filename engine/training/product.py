"""What a run of finetuning is for: the finetuned stages' weights in a small folder, which `engine.runtime.overlay` reads.

Written as the weights come, one tensor in memory; the folder is complete or absent, and one that is there is replaced by a complete one.
With `lora_rank` each matrix's update is cut to that rank by singular values, after the whole network was trained: the finetuning stays the
paper's, one run can be written in any rank, and how much of the update was kept is known and told.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine import __version__
from engine.cascade import Cascade
from engine.config import STAGE_ORDER, FinetuneConfig, StageConfig
from engine.errors import DiskError, NumericError, WeightsError
from engine.media.atomic import disk_errors
from engine.media.clip import shown
from engine.models.unet import VideoUNet
from engine.runtime import weights
from engine.runtime.overlay import CONFIG_NAME, DOWN, FORMAT, RECORD, UP, layout, sealed, weights_name
from engine.runtime.weights import _open

from .checkpoint import _exchange, versions
from .checkpoint_files import config_hash, remove, sha256, sync
from .ranks import Alone, Processes, Ranks, together

SMALL = 256                # matrices with a side up to this have their singular values taken exactly
OVERSAMPLING, ITERATIONS = 16, 4

Weights = Iterator[tuple[str, Tensor]]


def write(folder: Path, cascade: Cascade, config: FinetuneConfig, stages: Callable[[str], Weights], *, ranks: Ranks | None = None) -> Path:
    """Write the product of a run on `config.stages` -> its folder.

    cascade: the one that was finetuned; stages: name of a stage -> its weights, fp32 on the CPU, in any order. Collective: every rank calls
    it and iterates, rank 0 writes. ranks: by default those of torch.distributed, if it is initialised.
    Raises, on every rank: DiskError (nothing new is left behind, an older product is intact), NumericError if a weight is not finite,
    WeightsError if the weights are not those of the stages.
    """
    folder, ranks = Path(os.path.abspath(folder)), ranks or _ranks()
    part = folder.with_name(f".{folder.name}.part")
    names = [name for name in STAGE_ORDER if name in config.stages]
    shapes = {name: weights.on_meta(lambda name=name: VideoUNet(cascade.config.stage(name).unet)).state_dict() for name in names}
    layouts = {name: layout({key: tuple(value.shape) for key, value in shapes[name].items()}, config.lora_rank) for name in names}
    first = ranks.rank == 0

    def on_first(work: Callable[[], Any]) -> Any:
        return together(ranks, lambda: work() if first else None)[0]

    try:
        on_first(lambda: _prepare(folder, part, layouts))
        kept = {}
        for name in names:
            stage = None
            if first:
                stage = _Stage(part / name, cascade.config.stage(name), layouts[name], config.lora_rank, cascade.folder / name)
            kept[name] = together(ranks, lambda stage=stage, name=name: _drain(stages(name), stage))[0]
        on_first(lambda: _seal(folder, part, cascade, config, kept))
    except BaseException:
        if first:
            remove(part)
        raise
    return folder


def _ranks() -> Ranks:
    import torch.distributed as dist

    return Processes() if dist.is_available() and dist.is_initialized() else Alone()


def check_target(folder: Path) -> None:
    """That a product may be written there: nothing is there, or what a former run wrote.   Raises: DiskError."""
    if not os.path.lexists(folder):
        return
    known = {RECORD, *STAGE_ORDER}
    known |= {f"{stage}/{name}" for stage in STAGE_ORDER for name in (CONFIG_NAME, weights_name(0), weights_name(1))}
    if folder.is_symlink() or not folder.is_dir():
        raise DiskError(f"{shown(folder)}: cannot be written: want a folder for the product, but something else is in its place")
    if strange := sorted({path.relative_to(folder).as_posix() for path in folder.rglob("*")} - known):
        raise DiskError(f"{shown(folder)}: cannot be written: the folder holds other files than a product's ({shown(strange[0])})")


def _prepare(folder: Path, part: Path, layouts: dict[str, dict[str, tuple[int, ...]]]) -> None:
    with disk_errors(folder):
        check_target(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove(part)                                            # left by a run that was killed
        need = sum(_header(tensors)[2] for tensors in layouts.values())
        if need > (free := shutil.disk_usage(folder.parent).free):
            raise DiskError(f"{shown(folder)}: cannot be written: No space left on device: want {need} bytes, {free} can be had")
        part.mkdir()


def _drain(tensors: Weights, stage: "_Stage | None") -> float | None:
    """Take every tensor, also when they can no longer be written: other ranks wait for this one to ask."""
    failed = None
    with ExitStack() as stack:
        try:
            if stage is not None:
                stack.enter_context(stage)
        except Exception as error:
            failed = error
        for name, value in tensors:
            if stage is None or failed is not None:
                continue
            try:
                stage.put(name, value)
            except Exception as error:
                failed = error
        if failed is not None:
            raise failed
        return stage.finish() if stage is not None else None


class _Stage:
    """One stage's folder while it is written: the header first, then each tensor at its place, in whatever order they come."""

    def __init__(self, folder: Path, config: StageConfig, tensors: dict[str, tuple[int, ...]], rank: int, base: Path):
        self.path, self.config, self.tensors, self.rank, self.base = folder / weights_name(rank), config, tensors, rank, base
        self.header, self.places, _ = _header(tensors)
        self.written: set[str] = set()
        self.update = self.lost = 0.0                           # squared norms

    def __enter__(self) -> "_Stage":
        with ExitStack() as stack, disk_errors(self.path):
            self.path.parent.mkdir()
            about = {"_class_name": "VideoUNet", "_dreamix_version": __version__} | self.config.model_dump(mode="json")
            (self.path.parent / CONFIG_NAME).write_text(json.dumps(about, indent=2) + "\n", "utf-8")
            self.file = stack.enter_context(open(self.path, "xb"))
            self.file.write(self.header)
            self.bases = {}
            for path in weights.weight_files(self.base) if self.rank else ():
                f = stack.enter_context(_open(path))
                self.bases |= dict.fromkeys(f.keys(), f)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *_) -> None:
        with suppress(OSError):                                 # what is left in its buffer finds no room either
            self.stack.close()

    def put(self, name: str, value: Tensor) -> None:
        if not self.rank:
            self._write(name, value)
            return
        if name not in self.bases:
            raise WeightsError(f"{shown(self.path)}: {name}: not a weight of this stage")
        update = value - self.bases[name].get_tensor(name).float()
        self.update += update.square().sum().item()
        if name in self.places:
            self._write(name, update)
            return
        up, down = low_rank(update.flatten(1), self.rank)
        self._write(name + UP, up)
        self._write(name + DOWN, down)
        self.lost += (update.flatten(1) - up.bfloat16().float() @ down.bfloat16().float()).square().sum().item()

    def _write(self, name: str, value: Tensor) -> None:
        if name not in self.places or name in self.written or tuple(value.shape) != self.tensors[name]:
            raise WeightsError(f"{shown(self.path)}: {name} {[*value.shape]}: not a weight of this stage, or there twice")
        value = value.bfloat16().contiguous()
        if not value.isfinite().all():
            raise NumericError(f"{self.config.name}: {name} is not finite after finetuning")
        with disk_errors(self.path):
            self.file.seek(self.places[name])
            self.file.write(value.view(-1).view(torch.uint8).numpy())
        self.written.add(name)

    def finish(self) -> float | None:
        """-> the share of the squared update that is kept, where differences are written.   Raises: WeightsError, DiskError."""
        if missing := sorted(self.places.keys() - self.written):
            raise WeightsError(f"{shown(self.path)}: {len(missing)} weights did not come ({missing[0]})")
        with disk_errors(self.path):
            self.file.close()
            for path in (self.path, self.path.parent / CONFIG_NAME, self.path.parent):
                sync(path)
        return (1 - self.lost / self.update if self.update else 1.0) if self.rank else None


def _header(tensors: dict[str, tuple[int, ...]]) -> tuple[bytes, dict[str, int], int]:
    """Of a safetensors file in bf16 -> its first bytes, where in the file each tensor is, and the whole file's size."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places, at = {}, 0
    for name, shape in tensors.items():
        places[name], end = at, at + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: begin + place for name, place in places.items()}, begin + at


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest product of two thin matrices: [m, n] -> up [m, rank], down [rank, n], of equal norms; the same bits every time.

    Source: Eckart and Young 1936; large matrices by randomised subspace iteration (Halko et al. 2011, algorithm 4.4).
    """
    if min(matrix.shape) <= max(SMALL, rank + OVERSAMPLING):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, q=rank + OVERSAMPLING, niter=ITERATIONS)
        vh = v.T
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


def _seal(folder: Path, part: Path, cascade: Cascade, config: FinetuneConfig, kept: dict[str, float | None]) -> None:
    """The record, and the rename that makes the product."""
    settings = config.model_dump(mode="json")
    record = {
        "format": FORMAT, "prompt": config.rare_token, "alpha": config.alpha, "steps": config.steps, "lr": config.lr, "seed": config.seed,
        "base": {"name": cascade.config.name, "stages": {name: weights.fingerprint(cascade.folder / name) for name in kept}},
        "stages": {name: {"steps": config.steps_of(name), "lr": config.lr_of(name), "lora_rank": config.lora_rank, "kept": kept[name]}
                   for name in kept},
        "versions": versions(), "config": settings, "config_sha256": config_hash(settings)}
    with disk_errors(folder):
        record["files"] = {f"{name}/{file}": {"bytes": (part / name / file).stat().st_size, "sha256": sha256(part / name / file)}
                           for name in kept for file in (CONFIG_NAME, weights_name(config.lora_rank))}
        (part / RECORD).write_text(sealed(record), "ascii")
        for path in (part / RECORD, part):
            sync(path)
        check_target(folder)
        if not os.path.lexists(folder):
            os.rename(part, folder)
        elif not _exchange(part, folder):                       # a file system that cannot: for a moment there is none
            old = part.with_name(part.name + ".old")
            remove(old)
            os.rename(folder, old)
            os.rename(part, folder)
            remove(old)
        sync(folder.parent)
        remove(part)                                            # the one it changed places with
