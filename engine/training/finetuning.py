"""The finetuning of a cascade on one clip or a handful of pictures (Sec. 4.2): its stages one after the other, each step by step.

All that a step draws has an address, so a run that was ended, however, goes on from its last checkpoint with the same bits. The folder of a
run: metrics.jsonl, previews/, `<stage>/checkpoints/step-N`, and in the end `product/`, which `engine.infer --finetuned` takes.
"""

import gc
import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.cascade import Cascade
from engine.config import STAGE_ORDER, FinetuneConfig
from engine.errors import DiskError
from engine.models.text import TextEmbedding
from engine.models.unet import VideoUNet
from engine.runtime import weights

from . import checkpoint, product
from .finetune_data import Source, StageData
from .guards import RunLock, Signals, SpikeGuard
from .metrics import Metrics
from .objective import Objective, share, units, video_only
from .plain_engine import Engine, PlainEngine
from .ranks import Alone, Ranks, together
from .watching import Bar, Preview, Reporters, psnr

# said once for each stage, or of no weight's bits
ELSEWHERE = {"stages", "steps", "stage_steps", "lr", "stage_lr", "device", "preview_steps", "lora_rank"}


class Stopped(Exception):
    """A rank was asked to end; the state is saved."""


class Finetuning:
    """One run.

    cascade: its stages' weights were checked; make_engine: an engine of this process (`PlainEngine`, or a rank's); say: where notes go.
    """

    def __init__(self, cascade: Cascade, source: Source, config: FinetuneConfig, out: Path, *,
                 make_engine: Callable[..., Engine] = PlainEngine, ranks: Ranks | None = None, allow_config_change: bool = False,
                 quiet: bool = True, say: Callable[[str], None] = print):
        self.cascade, self.source, self.config, self.out = cascade, source, config, Path(out)
        self.make_engine, self.ranks, self.allow, self.quiet = make_engine, ranks or Alone(), allow_config_change, quiet
        self.stages = [name for name in STAGE_ORDER if name in config.stages]
        self.dtype = torch.float32 if cascade.dtype == torch.float16 else cascade.dtype       # no fp16: its gradients underflow
        self.first = self.ranks.rank == 0
        self.say = say if self.first else lambda text: None
        self.signals = Signals()

    def run(self) -> int:
        """Learn every stage and write the product -> 0; or 143 or 130 when a signal ended it, with all saved.

        Raises: UserError subclasses, each with its exit code.
        """
        with RunLock(self.out, self.ranks), self.signals, ExitStack() as stack:
            together(self.ranks, self._check)
            identity = self._identity()
            notes: list[str] = []
            found = {name: checkpoint.latest(self._root(name), notes=notes, ranks=self.ranks) for name in self.stages}
            for one in filter(None, found.values()):
                notes += checkpoint.check_config(one, identity[one.manifest["stage"]], self.allow)
            for note in dict.fromkeys(notes):
                self.say(f"note: {note}")
            self.text = self._encode()
            self.metrics = self.reporters = None
            if self.first:
                self.metrics = stack.enter_context(Metrics(self.out / "metrics.jsonl", {k: one.step for k, one in found.items() if one}))
                self.reporters = Reporters(self.config, self.out)
                stack.callback(self.reporters.close)
            try:
                for name in self.stages:
                    if found[name] is None or found[name].step < self.config.steps_of(name):
                        StageFinetuning(self, name, identity[name]).run(found[name])
                self._publish()
            except Stopped:
                return max(self.ranks.gather(self.signals.exit_code))
        return 0

    def _check(self) -> None:
        """What would fail at the end fails at the beginning."""
        self.source.check(self.config)
        if self.first:
            product.check_target(self.out / "product")

    def _root(self, stage: str) -> Path:
        return self.out / stage / "checkpoints"

    def _encode(self) -> list[TextEmbedding]:
        """t* and the preview's prompt; the encoder is freed. Each is cut to its own length: its neighbour must not change a bit of it."""
        prompts = [self.config.rare_token] + ([self.config.preview_prompt] if self.config.preview_prompt is not None else [])
        both = self.cascade.encode(prompts)
        for note in self.cascade.notes:
            self.say(f"note: {note}")
        lengths = [int(mask.sum()) for mask in both.mask]
        return [TextEmbedding(both.tokens[i : i + 1, :n], both.mask[i : i + 1, :n]) for i, n in enumerate(lengths)]

    def _identity(self) -> dict[str, dict[str, Any]]:
        """What must be the same when a stage's run goes on: the settings, the input's bytes, the weights it began with."""
        def look():
            if not self.first:
                return None
            settings = self.config.model_dump(mode="json", exclude=ELSEWHERE)
            common = settings | {"dtype": str(self.dtype).removeprefix("torch."), "input": digest(self.source.path)}
            return {name: common | {"steps": self.config.steps_of(name), "lr": self.config.lr_of(name),
                                    "stage": self.cascade.config.stage(name).model_dump(mode="json", exclude={"steps"}),
                                    "weights": weights.fingerprint(self.cascade.folder / name)} for name in self.stages}

        return together(self.ranks, look)[0]

    def build(self, name: str) -> VideoUNet:
        network = VideoUNet(self.cascade.config.stage(name).unet)
        return network if self.config.temporal_learns_from_frames else video_only(network)

    def open_engine(self, name: str) -> Engine:
        return self.make_engine(lambda: self.build(name), self.cascade.folder / name, self.config, self.cascade.device, self.dtype)

    def finetuned(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """A finished stage's weights, one at a time, from its last checkpoint. Collective."""
        engine = self.open_engine(name)
        try:
            engine.load(checkpoint.latest(self._root(name), notes=[], ranks=self.ranks).folder)
            yield from engine.weights()
        finally:
            engine.close()

    def _publish(self) -> None:
        product.write(self.out / "product", self.cascade, self.config, self.finetuned, ranks=self.ranks)


class StageFinetuning:
    """One stage of a run: its data, its engine, its loop."""

    def __init__(self, whole: Finetuning, name: str, identity: dict[str, Any]):
        self.whole, self.name, self.identity, self.config = whole, name, identity, whole.config
        cascade = whole.cascade.config
        self.stage, index = cascade.stage(name), STAGE_ORDER.index(name)
        self.before = cascade.stages[index - 1] if index else None
        found: list[StageData] = []
        together(whole.ranks, lambda: found.append(whole.source.read(cascade, self.stage, self.config)))
        self.data = found[0]
        for note in self.data.notes:
            whole.say(f"note: {name}: {note}")
        self.objective = Objective(self.config, self.stage, self.before, whole.text[0], whole.cascade.device)
        self.guard = SpikeGuard(whole.ranks)
        self.steps, self.lr = self.config.steps_of(name), self.config.lr_of(name)

    def run(self, found: checkpoint.Checkpoint | None) -> None:
        """From the checkpoint, or from the cascade's weights, to the last step.   Raises: Stopped after a signal, with the state saved."""
        whole = self.whole
        self.engine = whole.open_engine(self.name)
        bar, done = None, 0
        try:
            if found is not None:
                self.engine.load(found.folder)
                self.guard.restore(found.manifest["guard"])
                done = found.step
            bar = Bar(self.name, self.steps, done, whole.quiet or not whole.first)
            while done < self.steps:
                record = self.step(done)
                done += 1
                if self.config.preview_every and (done % self.config.preview_every == 0 or done == self.steps):
                    record |= self.preview(done)
                stop = self.tell(record, bar)
                if stop or done == self.steps or done % self.config.save_every == 0:
                    self.save(done)
                if stop:
                    raise Stopped
        finally:
            if bar is not None:
                bar.close()
            self.engine.close()
            self.engine = self.data = None
            gc.collect()

    def tell(self, record: dict[str, Any], bar: Bar) -> bool:
        """The step's line, on rank 0 -> whether any rank was asked to end. If the disk is full, all ranks hear of it."""
        def write() -> bool:
            if self.whole.first:
                self.whole.metrics.write(record)
                self.whole.reporters.write(record)
                bar.step(record)
            return self.whole.signals.requested

        return any(together(self.whole.ranks, write))

    def step(self, index: int) -> dict[str, Any]:
        """One update -> its line of metrics.jsonl. index: how many steps came before it."""
        began, engine = time.perf_counter(), self.engine
        work = share(units(self.config, self.name, index, self.data.clip is not None), engine.rank, engine.world)
        size = -(-len(work) // self.config.accumulate)
        errors = []
        for part in (work[i : i + size] for i in range(0, len(work), size)):
            batch = self.objective.batch(part, self.data, index)
            error = self.objective.errors(engine.network, batch)
            engine.backward((error * batch.weights).sum() * engine.world)
            errors += error.detach().tolist()
        sums = {"video": [0.0, 0], "frames": [0.0, 0]}
        loss = 0.0
        for unit, error in zip(work, errors):
            if unit.weight > 0:                              # else it is another rank's, repeated
                loss += unit.weight * error
                sums[unit.kind][0] += error
                sums[unit.kind][1] += 1
        total, video, videos, frames, sets = engine.sum_ranks([loss, *sums["video"], *sums["frames"]])
        norm = engine.step(self.lr, self.guard.skip(loss))
        applied = self.guard.applied(norm)
        if not applied:
            self.whole.say(f"note: {self.name} step {index + 1} was left out: {self.guard.reason}")
        return {"stage": self.name, "step": index + 1, "video": video / videos if videos else None,
                "frames": frames / sets if sets else None, "loss": total, "loss_hex": float(total).hex(), "grad_norm": norm,
                "applied": applied, "lr": self.lr, "seconds": time.perf_counter() - began}

    def preview(self, done: int) -> dict[str, Any]:
        """Pictures of what the network makes now -> {"psnr": dB} where there is a clip. A signal ends it; the loop then saves."""
        whole = self.whole

        def on_step() -> None:
            if self.engine.any_rank(whole.signals.requested):
                raise Stopped

        shown = Preview(self.stage, self.before, whole.text, self.data, self.config)
        try:
            made = [shown.make(self.engine.network, text, edit=i > 0, on_step=on_step) for i, text in enumerate(whole.text)]
        except Stopped:
            return {}
        path = whole.out / "previews" / f"{self.name}-{done:05d}.png"
        together(whole.ranks, lambda: shown.write(made, path) if whole.first else None)
        return {"psnr": psnr(made[0], self.data.clip)} if self.data.clip is not None else {}

    def save(self, done: int) -> None:
        each = 6 if self.config.optimizer == "adamw8bit" else 12                # bytes a parameter: a master and two moments
        numbers = sum(p.numel() for p in weights.on_meta(lambda: VideoUNet(self.stage.unet)).parameters())
        checkpoint.save(self.whole._root(self.name), done, self.engine.save, ranks=self.whole.ranks, keep=self.config.keep,
                        bytes_needed=each * numbers // self.engine.world,
                        meta={"stage": self.name, "applied_steps": self.guard.applied_steps, "config": self.identity,
                              "guard": self.guard.state()})


def digest(path: Path) -> str:
    """sha256 of a file, or of a folder's files with their names.   Raises: DiskError."""
    found = hashlib.sha256()
    try:
        for file in sorted(f for f in path.iterdir() if f.is_file()) if path.is_dir() else [path]:
            found.update(f"{file.name if path.is_dir() else ''} {file.stat().st_size} ".encode())
            with open(file, "rb") as f:
                while block := f.read(1 << 20):
                    found.update(block)
    except OSError as error:
        raise DiskError(f"{path}: cannot be read: {error.strerror or error}") from error
    return found.hexdigest()
