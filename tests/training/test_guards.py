"""One run per folder, a signal that becomes a flag, and ranks that do not outlive their launcher."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.errors import DiskError, LockedError
from engine.training import guards
from engine.training.guards import RunLock, Signals, watch_parent
from engine.training.ranks import Ranks

ROOT = Path(__file__).parents[2]


def child(job):
    """A forked process that runs job(say) -> its id and what it says, line by line."""
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        os.close(read)
        try:
            signal.alarm(30)
            job(lambda text: os.write(write, f"{text}\n".encode()))
        finally:
            os._exit(99)
    os.close(write)
    return pid, open(read)


def end(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def hold(folder):
    def job(say):
        with RunLock(folder):
            say("locked")
            time.sleep(30)
    return job


@pytest.mark.fault
def test_the_second_run_is_told_whose_folder_it_is(tmp_path):
    holder, said = child(hold(tmp_path / "run"))
    assert said.readline() == "locked\n"
    script = ("import sys\nfrom engine.errors import UserError\nfrom engine.training.guards import RunLock\n"
              "try:\n    with RunLock(sys.argv[1]): print('in')\n"
              "except UserError as error:\n    print(error)\n    sys.exit(error.exit_code)\n")
    try:
        started = time.monotonic()
        second = subprocess.run([sys.executable, "-c", script, tmp_path / "run"], cwd=ROOT, capture_output=True, text=True, timeout=30)
        seconds = time.monotonic() - started
        assert second.returncode == 7 and f"process {holder} " in second.stdout and second.stdout.count("\n") == 1, second
        started = time.monotonic()
        with pytest.raises(LockedError, match=f"{tmp_path}/run: process {holder} is using"):
            RunLock(tmp_path / "run").__enter__()
        assert time.monotonic() - started < 0.5 and seconds < 2
    finally:
        os.kill(holder, signal.SIGKILL)
        end(holder)
    with RunLock(tmp_path / "run"):                                   # the kernel has freed it
        assert (tmp_path / "run" / ".lock").read_text() == f"{os.getpid()}\n"
    with RunLock(tmp_path / "run"):
        pass


def test_other_folders_are_free(tmp_path):
    with RunLock(tmp_path / "a"), RunLock(tmp_path / "b"):
        pass


@pytest.mark.fault
def test_a_worker_that_outlives_its_run_does_not_hold_the_lock(tmp_path):
    def job(say):
        with RunLock(tmp_path):
            if os.fork() == 0:
                signal.alarm(10)
                say(os.getpid())
                time.sleep(10)
            time.sleep(30)

    pid, said = child(job)
    worker = int(said.readline())
    os.kill(pid, signal.SIGKILL)
    end(pid)
    try:
        os.kill(worker, 0)
        with RunLock(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_lock_that_was_removed_is_no_lock(tmp_path):
    with RunLock(tmp_path):
        (tmp_path / ".lock").unlink()
        with RunLock(tmp_path), pytest.raises(LockedError):           # the new file is the one that counts
            RunLock(tmp_path).__enter__()


def test_a_lock_removed_while_it_is_taken_is_taken_again(tmp_path, monkeypatch):
    flock, calls = fcntl.flock, []

    def racing(handle, how):
        flock(handle, how)
        calls.append(handle)
        if len(calls) == 1:
            (tmp_path / ".lock").unlink()
            (tmp_path / ".lock").touch()

    monkeypatch.setattr(fcntl, "flock", racing)
    with RunLock(tmp_path) as lock:
        assert len(calls) == 2 and os.path.samestat(os.fstat(lock.handle), os.stat(tmp_path / ".lock"))


def test_the_lock_is_no_way_to_another_file(tmp_path):
    (tmp_path / "precious").write_text("words")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(DiskError, match=".lock: cannot be locked"):
        RunLock(tmp_path).__enter__()
    assert (tmp_path / "precious").read_text() == "words"


class Second(Ranks):
    """Rank 1, beside a rank 0 that was `told` something."""

    rank, world = 1, 2

    def __init__(self, told):
        self.told = told

    def gather(self, value):
        return [(None, self.told), value]


def test_all_ranks_hear_of_the_lock(tmp_path):
    with RunLock(tmp_path), pytest.raises(LockedError, match="rank 0: run: process 12 is using it"):
        RunLock(tmp_path, Second((7, "run: process 12 is using it"))).__enter__()
    with RunLock(tmp_path), RunLock(tmp_path, Second(None)):            # rank 0 alone takes it
        pass


@pytest.mark.fault
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("again", [0, 1])
def test_a_signal_is_a_flag(number, code, again):
    def job(say):
        with Signals() as signals:
            say("ready")
            while not signals.requested:
                time.sleep(0.01)
            say("asked")
            time.sleep(0.2 * again)                                   # the save, during which a launcher may ask again
        say("saved")
        os._exit(signals.exit_code)

    pid, said = child(job)
    assert said.readline() == "ready\n"
    os.kill(pid, number)
    assert said.readline() == "asked\n"
    if again:
        os.kill(pid, signal.SIGTERM)
    assert said.read() == "saved\n" and end(pid) == code


@pytest.mark.fault
def test_a_signal_after_the_patience_ends_the_process():
    def job(say):
        with Signals(patience_s=0.05) as signals:
            say("ready")
            try:
                time.sleep(0.5)
                time.sleep(10)
            except SystemExit as error:
                os._exit(error.code if signals.requested else 1)

    pid, said = child(job)
    said.readline()
    os.kill(pid, signal.SIGINT)
    time.sleep(0.2)
    os.kill(pid, signal.SIGTERM)
    assert end(pid) == 130


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Signals() as signals:
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert not signals.requested and signals.exit_code == 0


def family(monkeypatch, rank, launcher="deepspeed.launcher.launch"):
    """runner -> launcher -> a rank that runs rank(say) -> the ids of all three, and what the rank says."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    commands = {}

    def runner(say):
        commands[os.getpid()] = b"python\0bin/deepspeed\0"
        if os.fork() == 0:
            commands[os.getpid()] = launcher.encode()
            if os.fork() == 0:
                signal.alarm(30)
                monkeypatch.setattr(guards, "_command", lambda pid: commands.get(pid, b""))
                try:
                    rank(lambda *words: say(" ".join(map(str, (*words, os.getpid(), os.getppid())))))
                finally:
                    os._exit(99)
            signal.alarm(30)
            time.sleep(30)
        time.sleep(30)

    pid, said = child(runner)
    word, rank_pid, launcher_pid = said.readline().split()
    assert word == "watching"
    return pid, int(launcher_pid), int(rank_pid), said


def patient(say):
    with Signals() as signals:
        assert watch_parent(every_s=0.05)
        say("watching")
        while not signals.requested:
            time.sleep(0.01)
        say("saved")
        os._exit(signals.exit_code)


def ended(pid, seconds):
    """Whether the process is gone, or a zombie of a launcher that does not look after it, before these seconds are over."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


def kill_all(*pids):
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


@pytest.mark.fault
@pytest.mark.parametrize("who", ["runner", "launcher"])
def test_a_rank_saves_and_leaves_when_its_launcher_is_gone(monkeypatch, who):
    runner, launcher, rank, said = family(monkeypatch, patient)
    try:
        started = time.monotonic()
        os.kill(runner if who == "runner" else launcher, signal.SIGKILL)
        if who == "runner":
            end(runner)
        assert said.readline().startswith("saved") and ended(rank, 5) and time.monotonic() - started < 5
    finally:
        kill_all(runner, launcher, rank)


@pytest.mark.fault
def test_a_rank_that_hangs_is_ended(monkeypatch):
    def stuck(say):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        watch_parent(grace_s=0.3, every_s=0.05)
        say("watching")
        time.sleep(20)
        say("still here")

    runner, launcher, rank, said = family(monkeypatch, stuck)
    try:
        started = time.monotonic()
        os.kill(launcher, signal.SIGKILL)
        assert ended(rank, 5) and time.monotonic() - started > 0.2
    finally:
        kill_all(runner, launcher, rank)


def test_a_process_that_no_launcher_started_may_outlive_its_parent(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert watch_parent() is False
    assert guards._parent_of(os.getpid()) == os.getppid() and b"py" in guards._command(os.getpid())
