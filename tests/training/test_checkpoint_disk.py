"""A full disk ends a save, a line of metrics or a lock with exit 5, the path and the bytes needed; what was there before is untouched."""

import ctypes
import errno
import hashlib
import json
import os
import resource
import signal
import traceback
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.errors import DiskError
from engine.training import checkpoint
from engine.training.checkpoint import latest, save
from engine.training.guards import RunLock
from engine.training.metrics import Metrics

BIG = torch.arange(100_000, dtype=torch.float32)                  # 400 kB: more than the disks below hold
KINDS = {"plain": lambda folder: (folder / "state.bin").write_bytes(BIG.numpy().tobytes()),
         "safetensors": lambda folder: save_file({"weight": BIG}, folder / "state.safetensors"),
         "torch": lambda folder: torch.save({"weight": BIG}, folder / "state.pt")}


def small(folder):
    (folder / "state.bin").write_bytes(b"s" * 3000)


def in_child(job, *arguments):
    """job(*arguments) in a forked process, whose limits and mounts are its own -> what it returned."""
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        signal.alarm(60)
        try:
            answer = job(*arguments)
        except BaseException:
            answer = traceback.format_exc()
        os.write(write, json.dumps(answer).encode())
        os._exit(0)
    os.close(write)
    with open(read) as f:
        text = f.read()
    assert os.waitpid(pid, 0)[1] == 0 and text
    return json.loads(text)


def private_tmpfs(folder: Path, options: str = "size=256k") -> bool:
    """A small disk at `folder` that this process alone sees; it needs no rights, only a kernel that lets users have namespaces."""
    libc, uid, gid = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    if libc.unshare(0x10000000 | 0x00020000):                     # CLONE_NEWUSER | CLONE_NEWNS
        return False
    try:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    except OSError:
        return False
    return libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, options.encode()) == 0


def limited(size: int) -> None:
    """No file of this process above `size` bytes: EFBIG, which is what a disk without room for it says to one that asks for more."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def fill(disk: Path) -> None:
    with open(disk / "filler", "wb", buffering=0) as f:
        for block in (4096, 1):
            try:
                while True:
                    f.write(b"\0" * block)
            except OSError as error:
                assert error.errno == errno.ENOSPC


def tree(folder: Path) -> dict:
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
            for path in sorted(folder.rglob("*")) if path.name != "filler"}


def fails(disk: Path, work, kept=lambda before: before) -> dict:
    """What a failing `work` says and leaves."""
    before = tree(disk)
    try:
        work()
    except DiskError as error:
        found = latest(disk / "ck", notes=(notes := []))
        return {"says": str(error), "code": error.exit_code, "same": tree(disk) == kept(before), "step": found.step, "notes": notes,
                "new": sorted(tree(disk).keys() ^ before.keys())}
    return {"says": "nothing"}


def state_file(disk, shrink, kind):
    save(disk / "ck", 1, small, meta={})
    shrink(100_000)
    return fails(disk, lambda: save(disk / "ck", 2, KINDS[kind], meta={}))


def manifest(disk, shrink):
    save(disk / "ck", 1, small, meta={})

    def write(folder):
        small(folder)
        shrink(4000)

    return fails(disk, lambda: save(disk / "ck", 2, write, meta={"config": {"text": "t" * 9000}}))


def pointer(disk, shrink):
    save(disk / "ck", 1, small, meta={})
    publish = checkpoint._publish
    checkpoint._publish = lambda part, folder: (publish(part, folder), shrink(3))           # the child's copy of the module
    return fails(disk, lambda: save(disk / "ck", 2, small, meta={}))


def metrics(disk, shrink):
    save(disk / "ck", 1, small, meta={})
    log = Metrics(disk / "metrics.jsonl", {})
    log.write({"stage": "base", "step": 1, "loss": "l" * 2000})
    shrink(2100)

    def kept(before):                                             # whole lines, as many as went in, and nothing else
        lines = (disk / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        whole = all(line.endswith(b"\n") and json.loads(line)["step"] == step for step, line in enumerate(lines, 1))
        return tree(disk) if whole and len(lines) == len(told) else before

    told = [0]
    return fails(disk, lambda: [(log.write({"stage": "base", "step": step, "loss": "l" * 1500}), told.append(step))
                                for step in range(2, 300)], kept)


@pytest.fixture
def disk(tmp_path):
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


CASES = {**{kind: (state_file, kind) for kind in KINDS}, "manifest": (manifest,), "LATEST": (pointer,), "metrics": (metrics,)}


@pytest.mark.fault
@pytest.mark.parametrize("how", ["tmpfs", "limit"])
@pytest.mark.parametrize("case", CASES)
def test_a_disk_that_fills_up(disk, case, how):
    work, *arguments = CASES[case]

    def child():
        if how == "tmpfs" and not private_tmpfs(disk):
            return None
        return work(disk, (lambda _: None if case in KINDS else fill(disk)) if how == "tmpfs" else limited, *arguments)

    end = in_child(child)
    if end is None:
        pytest.skip("no user namespaces here")
    print(end)
    assert isinstance(end, dict), end
    assert end["code"] == 5 and "\n" not in end["says"] and end["notes"] == []
    path, words = ("metrics.jsonl", "want 1") if case == "metrics" else ("ck", "want ")
    assert str(disk / path) in end["says"] and words in end["says"] and " bytes" in end["says"]
    if case == "LATEST":                                          # complete by then: only its name could not be told
        assert end["step"] == 2 and {name.split("/")[1] for name in end["new"]} == {"step-2"}
    else:
        assert end["step"] == 1 and end["same"] and end["new"] == []


def test_bytes_needed_is_what_is_known(disk):
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    asked = []
    with pytest.raises(DiskError, match=rf"{disk}/ck: .*No space left on device: want {2 * free} bytes, \d+ can be had; older .* intact"):
        save(disk / "ck", 1, asked.append, meta={}, bytes_needed=2 * free)
    assert asked == [] and list((disk / "ck").iterdir()) == []


def test_bytes_needed_is_guessed_from_the_last(disk):
    def child():
        save(disk / "ck", 1, KINDS["plain"], meta={})
        limited(1000)
        return fails(disk, lambda: save(disk / "ck", 2, KINDS["plain"], meta={}))

    assert "want at least 400000 bytes" in in_child(child)["says"]


def test_no_room_for_a_folder(disk):
    def child():
        if not private_tmpfs(disk, "size=256k,nr_inodes=12"):
            return None
        save(disk / "ck", 1, small, meta={})
        for n in range(20):
            try:
                (disk / f"filler{n}").mkdir()
            except OSError:
                break
        return fails(disk, lambda: save(disk / "ck", 2, small, meta={}))

    end = in_child(child)
    if end is None:
        pytest.skip("no user namespaces here")
    assert end["same"] and end["step"] == 1 and "want at least 3000 bytes" in end["says"]


@pytest.mark.parametrize("what", ["a file in place", "a folder that cannot be made"])
def test_a_place_that_cannot_be_written(tmp_path, what):
    if what == "a file in place":
        (tmp_path / "ck").write_text("mine")
        where = tmp_path / "ck"
    else:
        where = Path("/proc/nowhere/ck")
    for work in (lambda: save(where, 1, small, meta={}), lambda: Metrics(where / "metrics.jsonl", {}), lambda: RunLock(where).__enter__()):
        with pytest.raises(DiskError, match=f"^{where}") as caught:
            work()
        assert "\n" not in str(caught.value)
    assert what != "a file in place" or (tmp_path / "ck").read_text() == "mine"


def test_metrics_are_cut_to_the_checkpoints(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"stage": stage, "step": step, "loss": 1e-3 * step} for stage in ("base", "ssr1") for step in (1, 2, 3)]

    def written(resume, torn=b""):
        path.unlink(missing_ok=True)
        with Metrics(path, {}) as log:
            for line in lines:
                log.write(line)
            assert path.read_text().count("\n") == 6                # not held back until the file is closed
        with open(path, "ab") as f:
            f.write(torn)
        with Metrics(path, resume) as log:
            log.write({"stage": "ssr1", "step": 9, "loss": float("nan")})
        return [(line["stage"], line["step"]) for line in map(json.loads, path.read_text().splitlines())]

    base, new = [("base", 1), ("base", 2), ("base", 3)], ("ssr1", 9)
    assert written({"base": 3, "ssr1": 2}) == [*base, ("ssr1", 1), ("ssr1", 2), new]
    assert written({"base": 3}) == [*base, new]
    assert written({"base": 2, "ssr1": 1}) == [*base[:2], ("ssr1", 1), new] and not list(tmp_path.glob("*.part"))
    assert written({}) == [new]
    for torn in (b'{"stage": "ssr1", "st', b"\0" * 99, b'{"stage": "ssr1", "step": 3}', b"[]\n", b"\xff\n"):
        assert written({"base": 3, "ssr1": 3}, torn) == [*base, ("ssr1", 1), ("ssr1", 2), ("ssr1", 3), new]
