"""Which implementation of an op runs on a tensor: Triton on a GPU, compiled C++ on the CPU, PyTorch
wherever those have not proved themselves.

DREAMIX_KERNELS=auto (default) decides so; `torch` takes PyTorch alone; `triton` insists on Triton and raises where it cannot be had. A
kernel proves itself on first use on a device and dtype: the `self_check` of its module compares it with the op's definition, output and
gradients. One that fails, or does not compile, is left out with one warning and never runs.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

MODES = ("auto", "triton", "torch")
TRITON_OPS = ("temporal_attention", "temporal_conv", "group_norm_silu")        # those with a module <op>_triton
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NATIVE_OPS = ("temporal_attention", "group_norm_silu")                         # those in native.cpp
NATIVE_DTYPES = (torch.float32, torch.bfloat16)
NO_COMPILER = "there is no GNU C++ compiler"

# (op_kind, device, dtype); None: it agrees with its reference
_verdicts: dict[tuple[str, torch.device, torch.dtype], str | None] = {}


def mode() -> str:
    """DREAMIX_KERNELS, checked. Raises: ValueError for a word that is none of MODES."""
    value = os.environ.get("DREAMIX_KERNELS") or "auto"
    if value not in MODES:
        raise ValueError(f"DREAMIX_KERNELS: want {', '.join(MODES)}, got {value!r}")
    return value


def interpreted() -> bool:
    """True where Triton's interpreter runs the kernels on the CPU, for tests (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@cache
def _import_problem() -> str | None:
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    try:
        import triton  # noqa: F401
    except Exception as problem:       # a broken install raises what it likes
        return f"triton cannot be imported ({first_line(problem)})"
    return None


def first_line(problem: Exception) -> str:
    """What an exception says, as one line."""
    return (str(problem).strip() or type(problem).__name__).splitlines()[0]


def _on_cpu(device: torch.device) -> bool:
    """The interpreter is for tests: `auto` never takes it."""
    return device.type == "cpu"


def _impossible(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no Triton kernel can run there, whichever the op."""
    if device.type == "cpu" and not interpreted():
        return "Triton needs a GPU"
    if device.type not in ("cpu", "cuda"):
        return f"the kernels are not written for {device.type}"
    if dtype not in DTYPES:
        return f"the kernels take fp32, bf16 and fp16, not {dtype}"
    return _import_problem()


def require_possible(device: torch.device) -> None:
    """ValueError if DREAMIX_KERNELS is none of MODES, RuntimeError if it insists on Triton where no kernel can run."""
    if mode() == "triton" and (reason := _impossible(device, torch.float32)):
        raise RuntimeError(f"DREAMIX_KERNELS=triton: {reason}, and this run is on {device}")


@contextmanager
def alone(device: torch.device, gradients: bool = True) -> Iterator[None]:
    """For checks at first use: the pass they interrupt (inference mode, autocast, the recording of a checkpointed block) is not theirs."""
    own = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    with torch.inference_mode(False), torch.set_grad_enabled(gradients), torch.autocast(device.type, enabled=False), own:
        yield


def capturing(device: torch.device) -> bool:
    """True while a CUDA graph is captured, in which no check can run: warm up first, as every capture must."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _verdict(op: str, device: torch.device, dtype: torch.dtype, kind: str = "triton") -> str | None:
    """None, or why the op's own kernel must not be used there. The check runs once."""
    key = (f"{op}_{kind}", device, dtype)
    if key not in _verdicts:
        try:
            module = import_module("dreamix_kernels.native_check" if kind == "native" else f"dreamix_kernels.{op}_triton")
            with alone(device):
                module.self_check(*([op] if kind == "native" else []), device, dtype)
            _verdicts[key] = None
        except Exception as problem:   # whatever a compiler raises: the op has another implementation
            _verdicts[key] = first_line(problem)
    return _verdicts[key]


def _warn(op: str, device: torch.device, dtype: torch.dtype, reason: str) -> None:
    warnings.warn(f"dreamix_kernels: {op} runs in PyTorch on {device} ({dtype}): {reason}", stacklevel=4)


def use_native(op: str, x: Tensor) -> bool:
    """True if the op's C++ kernel is to run on tensors like x: on the CPU, in `auto`.   Raises: ValueError for a wrong DREAMIX_KERNELS."""
    if mode() != "auto" or not _on_cpu(x.device) or x.dtype not in NATIVE_DTYPES:
        return False
    known = (f"{op}_native", x.device, x.dtype) in _verdicts
    reason = _verdict(op, x.device, x.dtype, "native")
    if reason is not None and not known and reason != NO_COMPILER:         # having none is no fault
        _warn(op, x.device, x.dtype, reason)
    return reason is None


def use_triton(op: str, x: Tensor) -> bool:
    """True if the op's Triton kernel is to run on tensors like x, as far as it takes their shape.

    Raises: ValueError for a wrong DREAMIX_KERNELS; RuntimeError if it says `triton` and no kernel of the op can run here.
    """
    chosen = mode()
    if x.device.type == "meta":        # only shapes are asked for
        return False
    if chosen == "torch" or (chosen == "auto" and _on_cpu(x.device)):
        return False
    reason = _impossible(x.device, x.dtype)
    if reason is None:
        known = (f"{op}_triton", x.device, x.dtype) in _verdicts
        if not known and capturing(x.device):
            return False
        reason = _verdict(op, x.device, x.dtype)
        if reason is not None and not known and chosen == "auto":
            _warn(op, x.device, x.dtype, reason)
    if reason is not None and chosen == "triton":
        raise RuntimeError(f"DREAMIX_KERNELS=triton, but {op} cannot run on {x.device} ({x.dtype}): {reason}")
    return reason is None


def require_agreement(what: str, got: Tensor, want: Tensor, roundings: float = 16.0) -> None:
    """For self-checks: `got` within so many roundings of its own format of `want` (the definition, in fp64), or RuntimeError.

    A last-bit difference is a matter of order; a wrong sign, a missing term or uninitialised memory is orders above this.
    """
    error = (got.double() - want).abs().max().item() if got.isfinite().all() else float("nan")
    allowed = roundings * torch.finfo(got.dtype).eps * max(want.abs().max().item(), 1e-3)
    if not error <= allowed:
        raise RuntimeError(f"{what} differs from its reference by {error:.2g}, allowed {allowed:.2g}")


def report(device: torch.device, dtype: torch.dtype) -> list[dict]:
    """For each op: which implementation runs on this device and dtype, and why."""
    found = []
    for op in TRITON_OPS:
        chosen, reason = "torch", "DREAMIX_KERNELS=torch"
        if mode() == "auto" and _on_cpu(device):
            chosen = "c++"
            reason = "PyTorch's own is the fastest known on a CPU" if op not in NATIVE_OPS else \
                f"the C++ kernels take fp32 and bf16, not {dtype}" if dtype not in NATIVE_DTYPES else _verdict(op, device, dtype, "native")
        elif mode() != "torch":
            chosen, reason = "triton", _impossible(device, dtype) or _verdict(op, device, dtype)
        found.append({"kernel": op, "implementation": "torch" if reason else chosen, "reason": reason or "agrees with its reference"})
    return found
