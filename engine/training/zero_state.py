"""ZeRO-3's pieces on disk: what each rank holds, as safetensors, to be read by as many ranks or by another number of them.

A file per rank and group of parameters, `zero-<rank>-of-<world>-<group>.safetensors`, with a tensor `<kind>/<parameter>` for the piece
of each master and of each moment that has one number per weight. What has not (AdamW8bit's blocks) is there whole as `state/<key>`, and
can only be read by the same ranks.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.errors import ConfigError, WeightsError

ABOUT = "zero"             # the metadata's one entry


@dataclass
class Piece:
    """This rank's part of one parameter: elements [begin, end) of its flat row, at `offset` in the group's flat tensors."""

    name: str
    numel: int               # of the whole parameter
    begin: int
    end: int
    offset: int
    master: Tensor           # [size], fp32; longer than end - begin on a last rank, where zeros fill it up


@dataclass
class Group:
    """Parameters that are updated together; `flat` is the optimizer's one parameter for them."""

    index: int
    flat: Tensor
    state: dict
    pieces: list[Piece]


def groups(engine, refresh: bool = False) -> Iterator[Group]:
    """This rank's groups one after the other, each in memory (from a disk, if it is offloaded to one) while it is looked at."""
    zero = engine.zero
    for index, parameters in enumerate(zero.fp16_groups):
        swapped = zero._swappable_optimizer_subgroup(index)
        if swapped:
            zero._optimizer_states_and_gradient_swap_in(index)
        flat = zero.fp32_partitioned_groups_flat[index]
        pieces = []
        for p in parameters:
            _, offset, size = zero.grad_position[zero.get_param_id(p)]
            begin = min(engine.rank * size, p.ds_numel)
            pieces.append(Piece(engine.names[p], p.ds_numel, begin, min(begin + size, p.ds_numel), offset,
                                flat.data.narrow(0, offset, size)))
        yield Group(index, flat, zero.optimizer.state.setdefault(flat, {}), pieces)
        if refresh:
            zero._reassign_or_swap_out_partitioned_parameters(index)
        if swapped:
            zero._optimizer_states_and_gradient_swap_out(index)


class Source(contextlib.ExitStack):
    """Parameters in safetensors files, read without holding more than asked for."""

    def __init__(self, paths: list[Path]):
        super().__init__()
        self.files = {}
        for path in paths:
            try:
                f = self.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise WeightsError(f"{path}: not a complete safetensors file ({error})") from error
            for name in f.keys():
                self.files[name] = f

    def flat(self, name: str, begin: int, end: int, size: int) -> Tensor:
        """Elements [begin, end) of a parameter's flat row, zeros behind them -> [size]"""
        out = torch.zeros(size)
        rows = self.files[name].get_slice(name)
        shape = rows.get_shape()
        if not shape:
            return out.copy_(self.files[name].get_tensor(name).view(1)) if end > begin else out
        width = max(1, torch.Size(shape[1:]).numel())
        if end > begin:
            first = begin // width
            part = rows[first : -(-end // width)].flatten()
            out[: end - begin] = part[begin - first * width : end - first * width]
        return out


def file_name(rank: int, world: int, index: int) -> str:
    return f"zero-{rank:04d}-of-{world:04d}-{index:03d}.safetensors"


def save(engine, folder: Path) -> None:
    """This rank's files into an existing folder."""
    for group in groups(engine):
        flats, whole, rest = {"master": group.flat.data.cpu()}, {}, {}
        for key, value in group.state.items():
            if not isinstance(value, Tensor):
                rest[key] = value
            elif value.shape == group.flat.shape and value.is_floating_point():
                flats[key] = value.cpu()
            else:
                whole[f"state/{key}"] = value.cpu().contiguous()
        tensors = {f"{kind}/{piece.name}": flat.narrow(0, piece.offset, piece.master.numel())
                   for kind, flat in flats.items() for piece in group.pieces}
        about = {"optimizer": engine.config.optimizer, "rank": engine.rank, "world": engine.world, "kinds": sorted(flats),
                 "numbers": rest, "parameters": {piece.name: piece.numel for piece in group.pieces}}
        # in one entry: safetensors writes several in any order, and the same state must be the same bytes
        save_file(tensors | whole, folder / file_name(engine.rank, engine.world, group.index), metadata={ABOUT: json.dumps(about)})


def read_about(f, path: Path) -> dict:
    try:
        return json.loads((f.metadata() or {})[ABOUT])
    except (KeyError, ValueError) as error:
        raise WeightsError(f"{path}: not a state of this engine") from error


def load(engine, folder: Path) -> None:
    """The states of this rank's pieces, from as many files as that takes; masters too, the weights of the pass not yet."""
    paths = sorted(folder.glob("zero-*-of-*.safetensors"))
    if not paths:
        raise WeightsError(f"{folder}: want zero-*.safetensors, found none; a run without DeepSpeed is resumed without it")
    with contextlib.ExitStack() as stack:
        files, world = {}, 0
        for path in paths:
            try:
                f = stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise WeightsError(f"{path}: not a complete safetensors file ({error})") from error
            about = read_about(f, path)
            if about["optimizer"] != engine.config.optimizer:
                raise ConfigError(f"optimizer: want {about['optimizer']}, as in {folder}, got {engine.config.optimizer}")
            world = about["world"]
            for name in about["parameters"]:
                files[name, about["rank"]] = f, about
        for group in groups(engine):
            first, about = files.get((group.pieces[0].name, min(engine.rank, world - 1)), (None, None))
            if first is None:
                raise WeightsError(f"{folder}: {group.pieces[0].name} is missing")
            group.state.clear()
            group.state.update(about["numbers"])
            for key in (key for key in first.keys() if key.startswith("state/")):
                value = first.get_tensor(key)
                if value.ndim and (world != engine.world or about["parameters"].keys() != {p.name for p in group.pieces}):
                    raise ConfigError(f"{folder}: moments of {world} ranks in 8 bits; want as many ranks and the same groups, "
                                      f"got {engine.world}")
                group.state[key.removeprefix("state/")] = value.to(state_device(engine, group, value))
            for kind in about["kinds"]:
                flat = group.flat.data if kind == "master" else torch.zeros_like(group.flat.data)
                if kind != "master":
                    group.state[kind] = flat
                for piece in group.pieces:
                    copy(files, folder, kind, piece, world, flat.narrow(0, piece.offset, piece.master.numel()))


def state_device(engine, group: Group, value: Tensor) -> torch.device:
    """Where an optimizer keeps a tensor that is no moment: torch's step counter on the CPU unless it is fused."""
    counter = value.ndim == 0 and engine.config.optimizer == "adamw"
    return torch.device("cpu") if counter else group.flat.device


def copy(files: dict, folder: Path, kind: str, piece: Piece, world: int, out: Tensor) -> None:
    """One piece from the pieces of `world` ranks."""
    old = -(-piece.numel // world)
    out.zero_()
    for rank in range(piece.begin // old, -(-piece.end // old)):
        first, last = max(piece.begin, rank * old), min(piece.end, (rank + 1) * old)
        try:
            rows = files[piece.name, rank][0].get_slice(f"{kind}/{piece.name}")
        except (KeyError, SafetensorError) as error:
            raise WeightsError(f"{folder}: {kind} of {piece.name} of rank {rank} is missing") from error
        if rows.get_shape() != [old]:
            raise WeightsError(f"{folder}: {kind} of {piece.name}: want shape {[old]}, got {rows.get_shape()}")
        out[first - piece.begin : last - piece.begin] = rows[first - rank * old : last - rank * old]
