"""Which device and number format a run uses, and why; resolved once, at the door."""

import contextlib
import ctypes
from functools import cache

import torch

from dreamix_kernels import dispatch
from engine.errors import ConfigError

from . import xformers_attention  # noqa: F401, offers itself as a backend of attention

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3             # malloc.h; 32 MiB is the largest threshold it takes
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """`auto` is the first GPU, else the CPU.   Raises: ConfigError if the device is not there, or DREAMIX_KERNELS asks for what it
    cannot have."""
    device = _find(name)
    if device.type == "cpu":
        _keep_freed_memory()
    try:
        dispatch.require_possible(device)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(str(error)) from error
    return device


def _find(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: want auto, cpu, cuda or cuda:N, got {name}") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(f"device: {name} is not there, this machine has {torch.cuda.device_count()} GPUs")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: want auto, cpu, cuda or cuda:N, got {name}")
    return device


@cache
def _keep_freed_memory() -> None:
    """Tell glibc to keep what a freed tensor took: given back, it comes again page by page, each zeroed, at the next layer.

    Sampling the bundled cascade on two cores then takes 6 to 16 % less (wall time per stage, bf16). Where the C library is another,
    nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 64 << 20)):
            mallopt(parameter, value)


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bf16 in hardware (AVX512-BF16 or AMX); elsewhere bf16 is emulated and slower than fp32."""
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        if getattr(torch.cpu, probe, lambda: False)():
            return True
    return False


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bf16 where the hardware has it, else fp32."""
    if name != "auto":
        if name == "fp16" and device.type == "cpu":
            raise ConfigError("dtype: fp16 is for GPUs; want fp32 or bf16 on the CPU")
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if cpu_has_bf16() else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, value in DTYPES.items() if value is dtype)
