"""What is stored: one JSON line a case in results/<device>.jsonl, and how a class of devices is called."""

import json
import platform
import re
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent / "results"


def slug(name: str) -> str:
    """`Intel(R) Xeon(R) Platinum 8480+ CPU @ 2.00GHz` -> intel-xeon-platinum-8480"""
    name = re.sub(r"\((R|TM)\)|@.*|\b(CPU|Processor|\d+-Core)\b", " ", name, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


@cache
def cpu_name() -> str:
    try:
        return re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


@cache
def cpu_features() -> str:
    """The widest of the instruction sets that decide which matrix kernels run."""
    for probe, name in (("_is_amx_tile_supported", "amx"), ("_is_avx512_bf16_supported", "avx512-bf16"), ("_is_avx512_supported", "avx512"),
                        ("_is_avx2_supported", "avx2")):
        if getattr(torch.cpu, probe, lambda: False)():
            return name
    return platform.machine().lower()


def device_class(device: torch.device) -> str:
    """The name of the results file: nvidia-h200, cpu-intel-xeon-amx-2-threads."""
    if device.type == "cuda":
        return slug(torch.cuda.get_device_name(device))
    threads = torch.get_num_threads()
    return f"cpu-{slug(cpu_name())}-{cpu_features()}-{threads}-thread{'s' if threads > 1 else ''}"


def versions(*packages: str) -> dict[str, str | None]:
    found = {"python": platform.python_version()}
    for package in ("torch", "triton", *packages):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


@cache
def commit() -> str | None:
    """The commit that is checked out, with `+` if files are changed. None outside a repository."""
    def git(*args):
        command = ["git", "-C", str(FOLDER.parent), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)benchmarks/results")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def about(device: torch.device, command: str) -> dict:
    """The fields that every record of a run has."""
    here = {"device": device_class(device), "cpu": cpu_name(), "threads": torch.get_num_threads(), "versions": versions(),
            "commit": commit(), "command": command, "date": datetime.now(UTC).isoformat(timespec="seconds")}
    if device.type == "cuda":
        here |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return here


def read(device: str, folder: Path = FOLDER) -> list[dict]:
    """All records of a class of devices, oldest first; [] where there are none."""
    path = folder / f"{device}.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]


def append(record: dict, folder: Path = FOLDER) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record['device']}.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(rounded(record)) + "\n")
    return path


def rounded(value):
    """Floats to five digits: more is noise, and a longer file."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value
