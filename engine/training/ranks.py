"""The processes of a run as one: what each did is told to all, so that all go on, or all stop with the same sentence."""

import os
from collections.abc import Callable
from typing import Any

from engine import errors
from engine.errors import UserError

BY_EXIT_CODE = {cls.exit_code: cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, UserError)}


class Ranks:
    """Which process this is and how it hears of the others. Collective: every rank calls the same methods in the same order."""

    rank = 0
    world = 1

    def gather(self, value: Any) -> list:
        """Every rank's value, in the order of ranks, on every rank."""
        return [value]

    def any(self, flag: bool) -> bool:
        return any(self.gather(bool(flag)))

    def barrier(self) -> None:
        self.gather(None)


class Alone(Ranks):
    """One process."""


class Processes(Ranks):
    """The ranks of torch.distributed, which is initialised. Control runs over gloo: whatever carries tensors may be a GPU's."""

    def __init__(self):
        import torch.distributed as dist

        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.group = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")

    def gather(self, value: Any) -> list:
        import torch.distributed as dist

        values: list = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values


def together(ranks: Ranks, work: Callable[[], Any]) -> list:
    """work() on every rank -> all results. If it fails on any, every rank raises: its own error, or the first other's as a UserError."""
    result = failed = None
    try:
        result = work()
    except Exception as error:                        # told to the others first: they would wait for ever
        failed = error
    told = None
    if failed is not None:
        told = getattr(failed, "exit_code", 1), str(failed) if isinstance(failed, UserError) else f"{type(failed).__name__}: {failed}"
    answers = ranks.gather((result, told))
    if failed is not None:
        raise failed
    for rank, (_, told) in enumerate(answers):
        if told is not None:
            raise BY_EXIT_CODE.get(told[0], UserError)(f"rank {rank}: {' '.join(told[1].split())}")
    return [result for result, _ in answers]


def fault(point: str, rank: int, step: int) -> None:
    """For tests: DREAMIX_FAULT=point[@step][:rank][:raise] ends the process here, as a kill would, or raises."""
    wanted = os.environ.get("DREAMIX_FAULT")
    if not wanted:
        return
    name, *rest = wanted.split(":")
    name, _, at = name.partition("@")
    if name == point and at in ("", str(step)) and (not rest or rest[0] in ("", str(rank))):
        if rest[1:] == ["raise"]:
            raise RuntimeError(f"DREAMIX_FAULT: {wanted}")
        os._exit(137)
