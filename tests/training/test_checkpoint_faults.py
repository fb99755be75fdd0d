"""A save that is killed or fails on any rank leaves the checkpoint before; a checkpoint with one changed bit is not loaded."""

import json
import os
import random
import shutil
import socket
import traceback
from multiprocessing.connection import Connection

import pytest

from engine.errors import DiskError, UserError, WeightsError
from engine.training import checkpoint
from engine.training.checkpoint import FAULTS, Ranks, latest, save


class Wired(Ranks):
    """Two forked processes over a socket. One that dies is noticed by the other, as over gloo."""

    def __init__(self, rank, wire):
        self.rank, self.world, self.wire = rank, 2, Connection(wire.detach())

    def gather(self, value):
        self.wire.send(value)
        other = self.wire.recv()
        return [value, other] if self.rank == 0 else [other, value]


def forked(*jobs, ours=()):
    """Each job in a child of its own -> what each returned, or its exit status if it died. ours: sockets that only children use."""
    pipes, pids = [], []
    for job in jobs:
        read, write = os.pipe()
        if (pid := os.fork()) == 0:
            try:
                answer = job()
            except BaseException:
                answer = "".join(traceback.format_exc())
            os.write(write, json.dumps(answer).encode())
            os._exit(0)
        os.close(write)
        pids.append(pid)
        pipes.append(read)
    for one in ours:
        one.close()
    answers = []
    for pid, read in zip(pids, pipes):
        with open(read) as f:
            text = f.read()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        answers.append(json.loads(text) if status == 0 else status)
    return answers


def pair(job):
    """job(ranks) on two ranks."""
    a, b = socket.socketpair()

    def on(rank, mine, other):
        def run():
            other.close()
            return job(Wired(rank, mine))
        return run

    return forked(on(0, a, b), on(1, b, a), ours=(a, b))


def content(step, rank):
    return random.Random(f"{step} {rank}").randbytes(3000)


def write_rank(step, rank):
    def write(folder):
        (folder / f"state-rank{rank}.bin").write_bytes(content(step, rank))
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data" / f"cursor-rank{rank}.json").write_text(json.dumps({"step": step, "rank": rank}))
    return write


def save_pair(root, step, mine):
    return str(save(root, step, write_rank(step, mine.rank), meta={"stage": "base"}, ranks=mine, keep=2))


def told(error_type, work):
    """What a save says -> (its error's class name, its sentence); None if it says nothing."""
    try:
        work()
    except error_type as error:
        return [type(error).__name__, str(error)]


def whole(root):
    """The checkpoint that loads, seen to hold what was written; LATEST names one that is whole too."""
    found = latest(root, notes=[])
    for rank in (0, 1):
        assert (found.folder / f"state-rank{rank}.bin").read_bytes() == content(found.step, rank)
    pointed = (root / "LATEST").read_text().strip()
    assert checkpoint.verified(root / pointed, int(pointed[5:]), False)
    return found


def temporaries(root):
    return sorted(path.name for path in root.rglob("*") if ".tmp" in path.name or path.name.endswith(".part"))


@pytest.fixture
def root(tmp_path):
    return tmp_path / "run" / "checkpoints"


@pytest.mark.fault
@pytest.mark.parametrize("how", ["kill", "raise"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("point", FAULTS)
def test_a_save_that_ends_at_a_named_point(root, monkeypatch, point, rank, how):
    def job(mine):
        monkeypatch.setattr(os, "fsync", lambda handle: None)               # no power is cut here, and the order has its own test
        for step in (1, 2):
            save_pair(root, step, mine)
        os.environ["DREAMIX_FAULT"] = f"{point}@3:{rank}" + (":raise" if how == "raise" else "")
        return told((UserError, RuntimeError, EOFError, OSError), lambda: save_pair(root, 3, mine))

    ends = pair(job)
    if how == "kill":
        assert ends[rank] == 137 and ends[1 - rank][0] in ("EOFError", "ConnectionResetError", "BrokenPipeError", "DiskError")
        assert rank == 0 or temporaries(root) == []
    else:
        assert ends[rank][0] == "RuntimeError" and ends[1 - rank][0] == "UserError" and f"rank {rank}: RuntimeError" in ends[1 - rank][1]
        assert temporaries(root) == []
    committed = rank == 1 and FAULTS.index(point) > FAULTS.index("hashed") or FAULTS.index(point) >= FAULTS.index("renamed")
    assert whole(root).step == (3 if committed else 2)
    assert pair(lambda mine: save_pair(root, 4, mine)) == [str(root / "step-4")] * 2
    assert whole(root).step == 4 and temporaries(root) == []


def damages(folder, other):
    """(name, action on a copy of the run's checkpoints): everything that is done to the newest one."""
    for name in ("state-rank{}.bin", "data/cursor-rank{}.json"):
        yield f"{name} swapped", lambda root, name=name: [
            shutil.copy(folder / name.format(rank), root / "step-2" / name.format(1 - rank)) for rank in (0, 1)]
    for path in sorted(path for path in (*folder.rglob("*"), other) if path.is_file()):
        name, data = path.relative_to(folder.parent), path.read_bytes()
        draw = random.Random(str(name))
        for n in (1, 2, len(data) // 3, len(data) // 2, len(data) - 1):
            yield f"{name} cut to {n}", lambda root, name=name, n=n, data=data: (root / name).write_bytes(data[:n])
        for bit in draw.sample(range(8 * len(data)), 10):
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            yield f"{name} bit {bit}", lambda root, name=name, flipped=flipped: (root / name).write_bytes(flipped)
        yield f"{name} deleted", lambda root, name=name: (root / name).unlink()
        yield f"{name} empty", lambda root, name=name: (root / name).write_bytes(b"")


@pytest.mark.fault
def test_every_damage_is_noticed(root, tmp_path):
    pair(lambda mine: [save_pair(root, step, mine) for step in (1, 2)])
    cases = list(damages(root / "step-2", root / "LATEST"))
    assert len(cases) >= 100
    unnoticed = []
    for name, damage in cases:
        copy = tmp_path / "copy"
        shutil.copytree(root, copy)
        damage(copy)
        notes = []
        found = latest(copy, notes=notes)
        if len(notes) != 1 or "\n" in notes[0] or found.step != (2 if name.startswith("LATEST") else 1):
            unnoticed.append((name, notes, found.step))
        if not name.startswith("LATEST"):
            shutil.rmtree(copy / "step-1")
            with pytest.raises(WeightsError, match="step-2: damaged: .*no checkpoint is whole$"):
                latest(copy, notes=[])
        shutil.rmtree(copy)
    assert unnoticed == []


def test_two_ranks_over_gloo(root, tmp_path):
    def job(rank):
        import torch.distributed as dist

        dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 2), rank=rank, world_size=2)
        both = checkpoint.Processes()
        save_pair(root, 1, both)
        found = latest(root, notes=[], ranks=both)
        ends = told(DiskError, lambda: save(root, 2, lambda folder: os.listdir(folder / "no") if rank else None, meta={}, ranks=both))
        return [found.step, found.world, both.any(rank == 1), both.any(False), both.gather(rank), ends]

    one, two = forked(lambda: job(0), lambda: job(1))
    assert one[:5] == two[:5] == [1, 2, True, False, [0, 1]]
    assert one[5][1] == "rank 1: " + two[5][1] and "No such file" in two[5][1]
    assert whole(root).step == 1 and temporaries(root) == []
