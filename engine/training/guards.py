"""What keeps a long run honest: one run per folder, a way out when it is asked to stop, and no update from a number that is none."""

import ctypes
import fcntl
import math
import os
import signal
import statistics
import threading
import time
from collections import deque
from pathlib import Path
from types import FrameType

from engine.errors import DiskError, LockedError, NumericError
from engine.media.clip import shown

from .ranks import Alone, Ranks, together

PR_SET_PDEATHSIG = 1
_held: set[int] = set()                               # descriptors of locks, which a forked child must not keep alive


def _let_go() -> None:
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)           # a data worker that outlives a killed run would hold its lock


class RunLock:
    """`with RunLock(folder):` one run at a time in an output folder, which is made if need be. The kernel frees it however a run ends.

    ranks: rank 0 takes the lock, the others hear of it. Raises: LockedError naming the process that has it; DiskError.
    """

    def __init__(self, folder: Path, ranks: Ranks | None = None):
        self.path, self.ranks, self.handle = Path(folder) / ".lock", ranks or Alone(), None

    def __enter__(self) -> "RunLock":
        together(self.ranks, lambda: self._take() if self.ranks.rank == 0 else None)
        return self

    def __exit__(self, *_) -> None:
        if self.handle is not None:
            os.ftruncate(self.handle, 0)
            _held.discard(self.handle)
            os.close(self.handle)
            self.handle = None

    def _take(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while True:
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if os.path.exists(self.path) and os.path.samestat(os.fstat(handle), os.stat(self.path)):
                        break                         # else it was removed between the two lines, and another run may hold its successor
                except BlockingIOError:
                    owner = os.pread(handle, 20, 0).decode("ascii", "replace").strip()
                    who = f"process {owner}" if owner.isdecimal() else "another process"
                    os.close(handle)
                    raise LockedError(f"{shown(self.path.parent)}: {who} is using this folder; want another --out, or its end") from None
                except BaseException:
                    os.close(handle)
                    raise
                os.close(handle)
            self.handle = handle
            _held.add(handle)
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            raise DiskError(f"{shown(self.path)}: cannot be locked: {error.strerror or error}") from error


class Signals:
    """`with Signals() as signals:` SIGTERM and SIGINT set `signals.requested`; the loop saves and leaves with `signals.exit_code`.

    Later signals change nothing for `patience_s` (a terminal and a launcher both send one, or several); after that one ends the process
    at once with the same code. In the main thread only.
    """

    def __init__(self, patience_s: float = 10.0):
        self.patience_s, self.number, self.since = patience_s, 0, 0.0
        self._before: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        return self.number != 0

    @property
    def exit_code(self) -> int:
        """143 after SIGTERM, 130 after SIGINT, 0 if there was none."""
        return 128 + self.number if self.number else 0

    def __enter__(self) -> "Signals":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._on)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _on(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.number, self.since = int(number), time.monotonic()
        elif time.monotonic() - self.since > self.patience_s:
            raise SystemExit(self.exit_code)


def watch_parent(grace_s: float = 10.0, every_s: float = 0.5) -> bool:
    """In a process that a launcher started (LOCAL_RANK is set): SIGTERM to itself when the launcher is gone -> whether it watches.

    DeepSpeed's runner starts a launcher that starts the ranks, and passes no SIGTERM on: its end is seen as the launcher's new parent.
    A process that is still there `grace_s` after is ended: its peers may be gone, and it may wait for them for ever.
    """
    if "LOCAL_RANK" not in os.environ:
        return False
    parent = os.getppid()
    runner = _parent_of(parent) if b"deepspeed.launcher.launch" in _command(parent) else None
    if runner is not None and b"deepspeed" not in _command(runner):
        runner = None                                 # started over ssh, or by hand: whose parent that is says nothing
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)

    def gone() -> bool:
        return os.getppid() != parent or runner is not None and _parent_of(parent) != runner

    def watch() -> None:
        while not gone():
            time.sleep(every_s)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace_s)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()
    return True


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _parent_of(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None


class SpikeGuard:
    """Says, alike on every rank, which steps must not change the weights, and when a run has lost its way.

    A step is bad if any rank's part of the loss, or the gradient norm, is not finite, or if the loss is a spike: over 10 times the running
    median of the last 100 accepted ones and over 4 times the largest of them. The third bad step in a row ends the run. Why not the median
    alone: the losses of sound diffusion steps differ over three decades with their noise level, and a rejected one is never learned, so it
    would be rejected for ever. On such losses (simulated) 10 medians alone reject 1 step in 6, this rule 1 in 9000, and a thousandfold
    loss is still seen. Until 16 were accepted a spike is not looked for.

        skip = guard.skip(loss)                       # before the update
        norm = engine.step(lr, skip)
        applied = guard.applied(norm)                 # after it: the truth about this step

    `applied_steps` and `skipped_steps` count; `state()` belongs in a checkpoint, so that a resumed run judges as an unbroken one.
    """

    def __init__(self, ranks: Ranks | None = None, *, factor: float = 10.0, row: int = 3, window: int = 100, warmup: int = 16):
        self.ranks, self.factor, self.row, self.warmup = ranks or Alone(), factor, row, warmup
        self.accepted: deque[float] = deque(maxlen=window)
        self.applied_steps = self.skipped_steps = self.bad_in_row = 0
        self._loss, self.reason = 0.0, None           # of the step under way; None: nothing is wrong with it

    def skip(self, loss: float) -> bool:
        """loss: this rank's part of the step's loss; the parts add up. Collective -> the same on every rank."""
        parts = self.ranks.gather(float(loss))
        self._loss, self.reason = math.fsum(parts) if all(map(math.isfinite, parts)) else math.nan, None
        for rank, part in enumerate(parts):
            if not math.isfinite(part):
                self.reason = f"the loss of rank {rank} is {part}"
                return True
        if len(self.accepted) >= self.warmup:
            median = statistics.median(self.accepted)
            if self._loss > max(self.factor * median, 4 * max(self.accepted)):
                self.reason = f"the loss {self._loss:.4g} is {self._loss / median:.3g} times the running median"
        return self.reason is not None

    def applied(self, norm: float) -> bool:
        """norm: what the engine's step returned -> whether the step changed the weights. Collective.

        Raises: NumericError on every rank after the third bad step in a row; at once if some ranks' norm is finite and some are not.
        """
        norms = [math.isfinite(one) for one in self.ranks.gather(float(norm))]
        if self.reason is None and not all(norms):
            self.reason = f"the gradient norm of rank {norms.index(False)} is not finite"
            if any(norms):
                raise NumericError(f"{self.reason} and of rank {norms.index(True)} is: their weights no longer agree")
        if self.reason is None:
            self.accepted.append(self._loss)
            self.applied_steps += 1
            self.bad_in_row = 0
            return True
        self.skipped_steps += 1
        self.bad_in_row += 1
        if self.bad_in_row >= self.row:
            raise NumericError(f"{self.bad_in_row} steps in a row could not be applied, in the last {self.reason}; "
                               "the weights are those before them and the last checkpoint is intact")
        return False

    def state(self) -> dict:
        """JSON values; floats come back bit for bit."""
        return {"accepted": list(self.accepted), "applied_steps": self.applied_steps, "skipped_steps": self.skipped_steps,
                "bad_in_row": self.bad_in_row}

    def restore(self, state: dict) -> None:
        self.accepted.clear()
        self.accepted.extend(state["accepted"])
        self.applied_steps, self.skipped_steps, self.bad_in_row = (state[k] for k in ("applied_steps", "skipped_steps", "bad_in_row"))
