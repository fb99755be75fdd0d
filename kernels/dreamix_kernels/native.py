"""The CPU's own kernels: `native.cpp`, compiled by the machine's C++ compiler on first use (a second or two, then cached), loaded with
ctypes.

It needs no header but the compiler's, runs on the thread pool that PyTorch has already started, and proves itself before it is used, as
every kernel does (`dispatch`). Without a compiler the PyTorch formulations run; `engine.infer info` says which.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .dispatch import NO_COMPILER

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp")
SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
COMPILE_SECONDS = 120


def _cache_folder() -> Path:
    """Where compiled kernels are kept: the user's cache, or where that cannot be written, the user's own among the temporary folders."""
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    for folder in (Path(cache_home, "dreamix"), Path(tempfile.gettempdir(), f"dreamix-{os.getuid()}")):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK):       # never load what another user may have put there
                return folder
    raise RuntimeError("there is no folder to keep compiled kernels in")


def _processor() -> str:
    """What -march=native depends on."""
    try:
        return next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor()


@cache
def library() -> ctypes.CDLL:
    """The compiled kernels. Raises: RuntimeError with the reason, where they cannot be had."""
    compiler = shlex.split(os.environ.get("CXX", "")) or [c for c in map(shutil.which, ("g++", "c++")) if c][:1]
    version = _run([*compiler, "--version"]) if compiler else ""
    if not compiler or "clang" in version:         # whose vector extensions and OpenMP are others
        raise RuntimeError(NO_COMPILER)
    key = hashlib.sha256("\n".join([SOURCE.read_text(), version, *FLAGS, _processor(), torch.__version__]).encode()).hexdigest()[:20]
    path = _cache_folder() / f"native-{key}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:       # renamed when whole: another process may be at it too
            part = Path(folder)
            _run([*compiler, *FLAGS, "-c", str(SOURCE), "-o", str(part / "native.o")])
            # not linked with OpenMP: the symbols resolve to the library that PyTorch brought, so that there is one pool of threads
            _run([*compiler, "-shared", str(part / "native.o"), "-o", str(part / "native.so")])
            os.replace(part / "native.so", path)
    return ctypes.CDLL(str(path))


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as problem:
        raise RuntimeError(f"{command[0]}: {problem}") from problem
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {next(iter(done.stderr.strip().splitlines()), 'no message')}")
    return done.stdout


def _call(name: str, dtype: torch.dtype, *arguments: Tensor | int | float | None) -> None:
    types = {int: ctypes.c_int64, float: ctypes.c_float}
    given = [types[type(a)](a) if type(a) in types else ctypes.c_void_p(None if a is None else a.data_ptr()) for a in arguments]
    getattr(library(), f"{name}_{SUFFIX[dtype]}")(*given)


def norm_forward(x: Tensor, groups: int, affine: Tensor, add: Tensor, eps: float,
                 stats: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """silu((x - mean) * rstd * affine + add).   x [N, P, C] contiguous; affine, add fp32 [N or 1, C] -> y, (mean, rstd, gain, add) [N,
    C]"""
    N, P, C = x.shape
    y, folded = torch.empty_like(x), torch.empty(4, N, C, dtype=torch.float32, device=x.device)
    affine, add = affine.contiguous(), add.contiguous()
    stats = None if stats is None else stats.contiguous()
    _call("norm_forward", x.dtype, x, y, N, P, C, groups, affine, add, int(len(affine) > 1), float(eps), stats, *folded)
    return y, tuple(folded)


def norm_backward(x: Tensor, dy: Tensor, groups: int, affine: Tensor, folded: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """dx, and per frame the sums over its pixels of du and of du * normalised (du: the gradient before SiLU).   -> [N, P, C], [N, C],
    [N, C]"""
    N, P, C = x.shape
    dx, sums = torch.empty_like(x), torch.empty(2, N, C, dtype=torch.float32, device=x.device)
    affine = affine.contiguous()
    _call("norm_backward", x.dtype, x, dy.contiguous(), dx, N, P, C, groups, affine, int(len(affine) > 1), *folded, *sums)
    return dx, *sums


def temporal_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v along T.   q, k, v [B, T, P, heads, d], the same strides, d contiguous; bias [heads, T, T] ->
    contiguous"""
    B, T, P, h, d = v.shape
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    strides = [(ctypes.c_int64 * 4)(*x.stride()[:4]) for x in (q, out)]
    bias = bias.float().contiguous()
    getattr(library(), f"attend_{SUFFIX[v.dtype]}")(
        *(ctypes.c_void_p(x.data_ptr()) for x in (q, k, v, bias, out)), *map(ctypes.c_int64, (B, T, P, h, d)), *strides,
        ctypes.c_float(d**-0.5))
    return out


def can_attend(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Strides that the kernel reads: one set for q, k and v, head_dim contiguous."""
    return q.stride() == k.stride() == v.stride() and v.stride(-1) == 1
