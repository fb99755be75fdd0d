"""A product of finetuning, laid over the cascade it was made from: what `engine.infer --finetuned DIR` reads.

    product/dreamix.json                                        what it was made from and how, and the sha256 of every file
    product/base/config.json, diffusion_pytorch_model.safetensors   whole weights, laid out as the cascade's own folder is; or
    product/base/config.json, pytorch_lora_weights.safetensors      differences from the cascade's: matrices as up @ down, the rest in full

All tensors are bf16. Nothing is used before all of it was verified; only names that this file can spell itself are opened.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, StringConstraints, ValidationError
from torch import nn

from engine.config import StageConfig, Strict
from engine.errors import WeightsError
from engine.strict_yaml import plain, short

from . import weights
from .weights import _open

FORMAT = "dreamix-product-1"
RECORD = "dreamix.json"
CONFIG_NAME = "config.json"
LORA_NAME = "pytorch_lora_weights.safetensors"
UP, DOWN = ".lora_up", ".lora_down"
MAX_RECORD_BYTES = 1 << 20
# what a stage's weights mean; how it is sampled may be changed afterwards
MEANING = {"name": True, "frames": True, "height": True, "width": True, "unet": True,
           "diffusion": {"prediction", "logsnr_shift", "residual_scale"}}

StageName = Literal["base", "tsr1", "ssr1", "ssr2", "tsr2", "tsr3", "ssr3"]
Hash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class FileEntry(Strict):
    bytes: int = Field(ge=0)
    sha256: Hash


class BaseCascade(Strict):
    """The cascade that was finetuned, and `weights.fingerprint` of each stage that was."""

    name: str
    stages: dict[StageName, Hash] = Field(min_length=1)


class StageEntry(Strict):
    steps: int = Field(gt=0)
    lr: float = Field(gt=0)
    lora_rank: int = Field(ge=0)                                # 0: whole weights
    kept: float | None = None                                   # share of the squared update that this rank holds


class Record(Strict):
    """The contents of dreamix.json."""

    format: str
    base: BaseCascade
    prompt: str                                                 # t*: what the clip was called while it was learned
    alpha: float
    steps: int
    lr: float
    seed: int
    stages: dict[StageName, StageEntry] = Field(min_length=1)
    versions: dict[str, str]
    config: dict[str, Any]                                      # of the run, in full
    config_sha256: Hash
    files: dict[str, FileEntry]


def file_names(stages: dict[str, StageEntry]) -> list[str]:
    """The files of a product beside its record, sorted."""
    return sorted(f"{stage}/{file}" for stage, entry in stages.items() for file in (CONFIG_NAME, weights_name(entry.lora_rank)))


def weights_name(rank: int) -> str:
    return LORA_NAME if rank else weights.WEIGHTS_NAME


def layout(shapes: dict[str, tuple[int, ...]], rank: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a stage's file, from the network's. With a rank, a matrix [m, n, ...] is up [m, rank] @ down [rank, n * ...], unless
    that would be no smaller.
    """
    found = {}
    for name, shape in shapes.items():
        m, n = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (0, 0)
        if rank and rank * (m + n) < m * n:
            found |= {name + UP: (m, rank), name + DOWN: (rank, n)}
        else:
            found[name] = tuple(shape)
    return found


def sealed(record: dict[str, Any]) -> str:
    """The text of dreamix.json, with the hash of its own contents: one form for one content, so that no changed byte goes unnoticed."""
    return _text(record | {"sha256": hashlib.sha256(_text(record).encode()).hexdigest()})


def _text(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=2, sort_keys=True, allow_nan=False) + "\n"


@dataclass(frozen=True)
class Overlay:
    """A verified product. `fingerprint` is the sha256 of dreamix.json, which names those of all its files and of the cascade's stages."""

    folder: Path
    record: Record
    fingerprint: str

    @classmethod
    def open(cls, folder: str | Path) -> "Overlay":
        """Read and verify every byte.   Raises: WeightsError for anything missing, changed, added or unknown."""
        folder = Path(folder)
        try:
            record, digest = _read_record(folder)
            _verify(folder, record)
        except OSError as error:
            raise WeightsError(f"{plain(folder)}: cannot be read: {error.strerror or error}") from error
        except ValueError as error:                             # a NUL in the path
            raise WeightsError(f"{plain(folder)}: cannot be read: {error}") from error
        return cls(folder, record, digest)

    def __contains__(self, stage: str) -> bool:
        return stage in self.record.stages

    def weights_sha256(self, stage: str) -> str:
        return self.record.files[f"{stage}/{weights_name(self.record.stages[stage].lora_rank)}"].sha256

    def about(self) -> dict[str, Any]:
        """For a run's manifest."""
        return {"sha256": self.fingerprint, "prompt": self.record.prompt, "stages": list(self.record.stages)}

    def check(self, stage: StageConfig, folder: Path, cascade: str, shapes: dict[str, tuple[int, ...]]) -> None:
        """That a stage of the cascade, with weights of these shapes in `folder`, is the one that was finetuned.   Raises: WeightsError."""
        was, now = self.record.base.stages[stage.name], weights.fingerprint(folder)
        if was != now:
            raise WeightsError(f"{plain(self.folder)}: was made from cascade {plain(self.record.base.name)}, whose {stage.name} has the "
                               f"sha256 {was}; that of {plain(cascade)} has {now}")
        if self._config(stage.name).model_dump(include=MEANING) != stage.model_dump(include=MEANING):
            raise WeightsError(f"{plain(self.folder)}: {stage.name}/{CONFIG_NAME} describes another network than {short(cascade)}'s")
        want, path = layout(shapes, self.record.stages[stage.name].lora_rank), self._weights(stage.name)
        with _open(path) as f:
            found = {name: (tuple(f.get_slice(name).get_shape()), f.get_slice(name).get_dtype()) for name in f.keys()}
        for name in sorted(want.keys() | found.keys()):
            if found.get(name) != (want.get(name), "BF16"):
                wanted = f"BF16 {[*want[name]]}" if name in want else "nothing"
                got = f"{found[name][1]} {[*found[name][0]]}" if name in found else "nothing"
                raise WeightsError(f"{plain(path)}: {plain(name)}: want {wanted}, got {got}")

    @contextlib.contextmanager
    def resident(self, stage: str, build: Callable[[], nn.Module], folder: Path, device: torch.device, dtype: torch.dtype
                 ) -> Iterator[nn.Module]:
        """As `weights.resident`, with the finetuned weights in place of those in `folder`. Sums are made in fp32, tensor by tensor."""
        low_rank = self.record.stages[stage].lora_rank > 0
        with weights.resident(build, folder if low_rank else self.folder / stage, device, dtype) as module:
            if low_rank:
                self._add(stage, module, folder)
            yield module

    @torch.no_grad()
    def _add(self, stage: str, module: nn.Module, folder: Path) -> None:
        state = module.state_dict()
        with _open(self._weights(stage)) as f:
            keys = set(f.keys())
            for path in weights.weight_files(folder):
                with _open(path) as base:
                    for name in base.keys():
                        value = base.get_tensor(name).float()
                        if name in keys:
                            value += f.get_tensor(name).float()
                        else:
                            value += (f.get_tensor(name + UP).float() @ f.get_tensor(name + DOWN).float()).view_as(value)
                        state[name].copy_(value)

    def _weights(self, stage: str) -> Path:
        return self.folder / stage / weights_name(self.record.stages[stage].lora_rank)

    def _config(self, stage: str) -> StageConfig:
        path = self.folder / stage / CONFIG_NAME
        try:
            data = json.loads(path.read_bytes())
            return StageConfig(**{key: value for key, value in data.items() if not key.startswith("_")})
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise WeightsError(f"{plain(path)}: not a stage of this engine: {plain(' '.join(str(error).split()))}") from error


def _read_record(folder: Path) -> tuple[Record, str]:
    """dreamix.json and the sha256 of its bytes."""
    path = folder / RECORD
    if path.is_symlink() or not path.is_file():
        hint = f" (did you mean {plain(folder / 'product')}?)" if (folder / "product" / RECORD).is_file() else ""
        raise WeightsError(f"{plain(folder)}: want a product of engine.finetune, got no {RECORD}{hint}")
    changed = WeightsError(f"{plain(path)}: damaged: not as it was written")
    if path.stat().st_size > MAX_RECORD_BYTES:
        raise changed
    data = path.read_bytes()
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise changed from error
    found = record.get("format") if isinstance(record, dict) else record
    if found != FORMAT:
        raise WeightsError(f"{plain(path)}: want a product in the format {FORMAT}, got {short(found)}")
    record.pop("sha256", None)
    try:
        if sealed(record).encode() != data:
            raise changed
        return Record(**record), hashlib.sha256(data).hexdigest()
    except ValidationError as error:
        first = error.errors()[0]
        where = plain(".".join(map(str, first["loc"])))
        raise WeightsError(f"{plain(path)}: {where}: {plain(first['msg'])}, got {short(first['input'])}") from error
    except (ValueError, TypeError) as error:                    # NaN, or a key that is no name
        raise changed from error


def _verify(folder: Path, record: Record) -> None:
    """That the folder holds the files of its stages and nothing else, each as the record says.   Raises: WeightsError."""
    want = file_names(record.stages)
    if record.base.stages.keys() != record.stages.keys():
        raise WeightsError(f"{plain(folder / RECORD)}: base.stages: want those of stages, {' '.join(record.stages)}, "
                           f"got {' '.join(record.base.stages)}")
    if strange := sorted(record.files.keys() - set(want)) + sorted(set(want) - record.files.keys()):
        raise WeightsError(f"{plain(folder / RECORD)}: files: want {', '.join(want)}; {short(strange[0])} is "
                           f"{'unknown' if strange[0] in record.files else 'missing'}")
    found = []
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise WeightsError(f"{plain(folder)}: damaged: {plain(name)} is not a regular file")
        if path.is_file() and name != RECORD:
            found.append(name)
    if strange := sorted(set(found) ^ set(want)):
        raise WeightsError(f"{plain(folder)}: damaged: {plain(strange[0])} is {'missing' if strange[0] in want else 'not in its record'}")
    for name in want:                                           # the sizes first, which cost nothing
        if (size := (folder / name).stat().st_size) != record.files[name].bytes:
            raise WeightsError(f"{plain(folder)}: damaged: {name} has {size} bytes, want {record.files[name].bytes}")
    for name in want:
        with open(folder / name, "rb") as f:
            if hashlib.file_digest(f, "sha256").hexdigest() != record.files[name].sha256:
                raise WeightsError(f"{plain(folder)}: damaged: the bytes of {name} have changed")
