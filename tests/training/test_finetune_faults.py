"""Whole finetuning runs that are killed, told to stop or started twice: what is learned in the end has the bits of an unbroken run.

Single-process runs are forked from one process that has imported everything; ZeRO-3 runs go through the real launcher.
"""

import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20
NURSERY = """
import json, os, signal, sys, time
import torch
from engine import finetune
from engine.training import finetuning, plain_engine, product, watching
import engine.models.text, engine.media
for line in sys.stdin:
    job = json.loads(line)
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(os.open(job["errors"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        try:
            code = finetune.main(job["line"])
        except SystemExit as end:
            code = end.code
        os._exit(code or 0)
    after = job.get("after")
    deadline, status = began + (1e9 if after is None else after), None
    while status is None:
        pid, found = os.waitpid(child, os.WNOHANG)
        if pid:
            status = found
        elif time.monotonic() >= deadline:
            sent = time.monotonic()
            os.kill(child, job["signal"])
            status = os.waitpid(child, 0)[1]
            job["took"] = time.monotonic() - sent
        else:
            time.sleep(0.002)
    print(json.dumps({"code": os.waitstatus_to_exitcode(status), "took": job.get("took"), "seconds": time.monotonic() - began}), flush=True)
"""


@pytest.fixture(scope="module")
def clip(film, tmp_path_factory):
    return film(tmp_path_factory.mktemp("clip") / "clip.mp4", [k / 16 - 1 for k in range(32)])


@pytest.fixture(scope="module")
def run(tiny, clip, own_cache, tmp_path_factory):
    """run(out, signal=None, after=None) -> exit code, seconds from the signal to the end, seconds in all."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    nursery = subprocess.Popen([sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    errors = tmp_path_factory.mktemp("errors") / "stderr"
    options = ["--dtype", "fp32", "--device", "cpu", "--stages", "base,ssr1", "--lr", "1e-3", "--quiet", "--steps", str(STEPS),
               "--set", "save_every=3"]

    def one(out, number=None, after=None):
        line = ["--video", str(clip), "--cascade", str(tiny), "--out", str(out), *options]
        nursery.stdin.write(json.dumps({"line": line, "signal": number, "after": after, "errors": str(errors)}) + "\n")
        nursery.stdin.flush()
        answer = json.loads(nursery.stdout.readline())
        assert answer["code"] in (0, -9, 130, 143), errors.read_text()[-2000:]
        return answer
    yield one
    nursery.kill()


def bits(out: Path) -> tuple[list, dict[str, str]]:
    """Every step's loss to the last bit, and the product's files."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    files = {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
             for path in sorted((out / "product").rglob("*.safetensors"))}
    return [(line["stage"], line["step"], line["loss_hex"], line["applied"]) for line in lines], files


def leftovers(out: Path) -> list[Path]:
    return [path for path in out.rglob("*") if path.name.startswith(".tmp") or path.name.endswith(".part")]


@pytest.fixture(scope="module")
def unbroken(run, tmp_path_factory):
    """(seconds of a run, its losses, its files); run twice, because what is compiled and cached once makes the first slower."""
    found = []
    for name in ("first", "second"):
        out = tmp_path_factory.mktemp(name) / "run"
        answer = run(out)
        assert answer["code"] == 0 and not leftovers(out)
        found.append((answer["seconds"], *bits(out)))
    assert found[0][1:] == found[1][1:] and len(found[0][1]) == 2 * STEPS and len(found[0][2]) == 2
    return found[1]


def broken_runs(run, unbroken, folder, count, numbers, seed):
    """Ends `count` runs at random times, one signal after the other; each goes on where the one before was, until it is done. -> answers"""
    seconds, *want = unbroken
    rng, ended, chain = random.Random(seed), [], 0
    while len(ended) < count:
        answer = run(folder / str(chain), numbers[len(ended) % len(numbers)], rng.uniform(0.1, 0.9) * seconds)
        if answer["code"] != 0:
            ended.append(answer)
            continue
        assert list(bits(folder / str(chain))) == want and not leftovers(folder / str(chain))
        chain += 1
        assert chain < 4 * count
    assert run(folder / str(chain))["code"] == 0
    assert list(bits(folder / str(chain))) == want and not leftovers(folder / str(chain))
    return ended


@pytest.mark.fault
def test_ten_kills(run, unbroken, tmp_path):
    """kill -9 at ten random times: while it starts, learns, saves or writes the product."""
    ended = broken_runs(run, unbroken, tmp_path, 10, [signal.SIGKILL], seed=0)
    assert [answer["code"] for answer in ended] == [-9] * 10


@pytest.mark.fault
def test_eight_signals(run, unbroken, tmp_path):
    """SIGTERM and SIGINT in turn, at random times: saved and gone within 10 s, each with its code (the default before the run listens)."""
    numbers, codes = [signal.SIGTERM, signal.SIGINT], [(143, -15), (130, -2)]
    ended = broken_runs(run, unbroken, tmp_path, 8, numbers, seed=1)
    assert all(answer["code"] in codes[i % 2] and answer["took"] < 10 for i, answer in enumerate(ended)), ended
    assert sum(answer["code"] > 0 for answer in ended) >= 4


@pytest.mark.fault
def test_runs_beside_each_other(run, unbroken, tiny, clip, tmp_path):
    """Two in folders of their own learn what one alone does; a third in a folder that is taken leaves at once with exit code 7."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "engine.finetune", "--video", clip, "--cascade", tiny, "--dtype", "fp32", "--device", "cpu", "--stages",
            "base,ssr1", "--lr", "1e-3", "--quiet", "--steps", STEPS, "--set", "save_every=3", "--out"]
    line = [str(part) for part in line]
    both = [subprocess.Popen([*line, str(tmp_path / name)], env=environment, stderr=subprocess.PIPE, text=True) for name in "ab"]
    while not (tmp_path / "a" / "metrics.jsonl").exists():
        assert both[0].poll() is None
        time.sleep(0.05)
    third = subprocess.run([*line, str(tmp_path / "a")], env=environment, capture_output=True, text=True, timeout=120)
    assert third.returncode == 7 and str(both[0].pid) in third.stderr and third.stderr.startswith("error: "), third.stderr
    assert [process.wait(200) for process in both] == [0, 0]
    assert all(list(bits(tmp_path / name)) == list(unbroken[1:]) for name in "ab")


@pytest.mark.fault
def test_two_kills_under_zero3(tiny, clip, tmp_path, own_cache):
    """A rank is killed in its steps, twice: all processes end, and the next launch goes on from the last whole checkpoint."""
    pytest.importorskip("deepspeed")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}

    def launch(out):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        line = [Path(sys.executable).with_name("deepspeed"), "--num_gpus", "2", "--master_port", port, ROOT / "engine" / "finetune.py",
                "--video", clip, "--cascade", tiny, "--dtype", "fp32", "--device", "cpu", "--stages", "base", "--lr", "1e-3", "--quiet",
                "--steps", 16, "--set", "save_every=2", "--out", out]
        return subprocess.Popen([str(part) for part in line], env=environment, cwd=tmp_path, start_new_session=True, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def living(sid):
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, _, its = path.read_text().rpartition(")")[2].split()[:4]
                line = Path(path.parent, "cmdline").read_text()
            except OSError:
                continue
            if int(its) == sid and state != "Z":
                found.append((int(path.parent.name), "finetune.py" in line and "local_rank" in line))
        return found

    def steps(out):
        path = out / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def finish(process):
        said, _ = process.communicate(timeout=200)
        assert process.returncode == 0, said[-3000:]

    whole, broken, rng = tmp_path / "whole", tmp_path / "broken", random.Random(2)
    finish(launch(whole))
    for target in (4, 9):
        process = launch(broken)
        try:
            deadline = time.monotonic() + 120
            while steps(broken) < target:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.01)
            os.kill(rng.choice([pid for pid, rank in living(process.pid) if rank]), signal.SIGKILL)
            killed = time.monotonic()
            while living(process.pid):
                assert time.monotonic() < killed + 10
                time.sleep(0.05)
            assert process.wait() != 0
        finally:
            for pid, _ in living(process.pid):
                os.kill(pid, signal.SIGKILL)
    finish(launch(broken))
    assert bits(broken) == bits(whole) and len(bits(whole)[0]) == 16 and not leftovers(broken)
