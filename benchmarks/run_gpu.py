"""Everything a GPU can tell, in one call: `python benchmarks/run_gpu.py --out DIR [--minutes 8]`. The most valuable first.

Parts: the kernels' self-checks, the benchmarks of kernels and layers, the kernels' tests, whole U-Net steps, profiles, 3x3 convolutions.
Each has its own limit of time and its log in DIR, so a stop leaves what was done; records go to DIR/results. Exit code: 0 if every part
passed, 1 if one failed or ran out of time, 2 without a GPU. Needs torch, triton, numpy and pytest (U-Net steps: pydantic).
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNEL_BENCHES = ["benchmarks/bench_temporal_attention.py", "benchmarks/bench_temporal_conv.py", "benchmarks/bench_group_norm_silu.py"]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]

SELF_CHECKS = """
import torch
from importlib import import_module
from dreamix_kernels.dispatch import DTYPES, TRITON_OPS
device, failed = torch.device("cuda"), 0
for op in TRITON_OPS:
    for dtype in DTYPES:
        try:
            import_module(f"dreamix_kernels.{op}_triton").self_check(device, dtype)
            verdict = "agrees with its reference"
        except Exception as problem:
            failed, verdict = failed + 1, f"{type(problem).__name__}: {(str(problem).strip() or '-').splitlines()[0]}"
        print(f"{op:<20} {str(dtype):<16} {verdict}", flush=True)
raise SystemExit(bool(failed))
"""


def parts(out: Path) -> list[tuple[str, float, list[str]]]:
    """(name, share of the minutes it may take at most, command), in the order of their value."""
    record = ["--record", f"--results={out / 'results'}"]
    return [
        ("self_checks", 0.15, [sys.executable, "-c", SELF_CHECKS]),
        ("bench_kernels", 0.40, [*PYTEST, *KERNEL_BENCHES, "--compiled", "--seconds=0.5", *record]),
        ("tests_kernels", 0.35, [*PYTEST, "tests/kernels", "-m", "not slow or gpu", "--durations=10"]),
        ("bench_unet_step", 0.30, [*PYTEST, "benchmarks/bench_unet_step.py", "--seconds=1", *record]),
        ("profile", 0.15, [sys.executable, "benchmarks/profile_gpu.py", "--out", str(out / "profiles.txt")]),
        ("bench_conv3x3", 0.15, [*PYTEST, "benchmarks/bench_conv3x3.py", "--seconds=0.3", *record]),
        ("bench_unet_step_compiled", 0.30, [*PYTEST, "benchmarks/bench_unet_step.py", "--compiled", "--seconds=1", *record]),
    ]


def run_part(name: str, command: list[str], limit_s: float, out: Path, env: dict[str, str]) -> dict:
    """Run with output to DIR/name.log; at the limit the whole process group is stopped, and its log kept."""
    began = time.monotonic()
    with open(out / f"{name}.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)          # pytest prints its table on an interrupt
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            code = None
    return {"part": name, "exit_code": code, "seconds": round(time.monotonic() - began, 1), "limit_seconds": round(limit_s, 1)}


def gpu_name() -> str | None:
    """Asked in another process: a context here would hold memory for as long as this runs."""
    ask = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    answer = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    return answer.stdout.strip().splitlines()[-1] if answer.stdout.strip() else None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for results and logs")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything together")
    parser.add_argument("--only", nargs="+", metavar="PART", help="only these parts")
    args = parser.parse_args(argv)
    gpu = gpu_name()
    if gpu is None:
        print("run_gpu: no CUDA device here, so there is nothing to do (pytest benchmarks/ measures the CPU)", file=sys.stderr)
        return 2
    deadline = time.monotonic() + 60 * args.minutes
    out = args.out.resolve()
    (out / "results").mkdir(parents=True, exist_ok=True)
    for stored in (ROOT / "benchmarks" / "results").glob("*.jsonl"):       # what is there is compared with, and appended to
        if not (out / "results" / stored.name).exists():
            shutil.copy(stored, out / "results")
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "TRITON_DEFAULT_FP_FUSION": "1"}
    env.pop("TRITON_INTERPRET", None)
    env.pop("DREAMIX_KERNELS", None)
    print(f"{gpu}: {args.minutes:g} minutes, logs in {args.out}", flush=True)
    summary = []
    for name, share, command in parts(out):
        if args.only and name not in args.only:
            continue
        left = deadline - time.monotonic()
        if left < 15:
            summary.append({"part": name, "exit_code": None, "seconds": 0, "limit_seconds": 0})
        else:
            summary.append(run_part(name, command, min(left - 12, 60 * args.minutes * share), out, env))
        done = summary[-1]
        verdict = {0: "passed", None: "out of time"}.get(done["exit_code"], f"failed ({done['exit_code']})")
        print(f"{name:<26} {verdict:<14} {done['seconds']:>7.1f} s", flush=True)
        (out / "summary.json").write_text(json.dumps({"gpu": gpu, "parts": summary}, indent=2) + "\n", "utf-8")
    for name in ("bench_kernels", "bench_unet_step"):
        log = out / f"{name}.log"
        if log.is_file():
            lines = log.read_text("utf-8", errors="replace").splitlines()
            start = next((i for i, line in enumerate(lines) if "benchmarks on" in line), max(0, len(lines) - 20))
            print("\n".join(lines[start:]), flush=True)
    return 0 if summary and all(done["exit_code"] == 0 for done in summary) else 1


if __name__ == "__main__":
    sys.exit(main())
