"""What this machine has, and which implementation runs each hot op here, with the reason: the answer of `infer info`.

Nothing here is needed to run a cascade.
"""

import platform
from importlib import metadata

import torch

from .device import cpu_has_bf16, dtype_name, resolve_device, resolve_dtype

PACKAGES = ("torch", "triton", "xformers", "bitsandbytes", "deepspeed", "transformers", "numpy", "safetensors", "av", "pydantic")


def versions() -> dict[str, str | None]:
    """Installed versions, without importing anything."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def devices() -> list[dict]:
    """The CPU and every GPU: name, memory, number formats."""
    auto = resolve_device("auto")
    found = [{"device": "cpu", "name": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
              "capability": torch.backends.cpu.get_cpu_capability(), "bf16": cpu_has_bf16(), "default": auto.type == "cpu"}]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append({"device": f"cuda:{i}", "name": p.name, "memory_gib": round(p.total_memory / 2**30, 1),
                      "capability": f"sm_{p.major}{p.minor}", "bf16": torch.cuda.is_bf16_supported(),
                      "default": auto.type == "cuda" and i == 0})
    return found


def attention_backends() -> list[dict]:
    """The backends of spatial attention on the default device, each called on a small case and compared with plain arithmetic."""
    from dreamix_kernels import attention

    device = resolve_device("auto")
    return attention.report(device, resolve_dtype("auto", device))


def kernels() -> list[dict]:
    """Which implementation of each op runs on the default device, and why."""
    from dreamix_kernels import dispatch

    device = resolve_device("auto")
    return dispatch.report(device, resolve_dtype("auto", device))


def describe() -> dict:
    """All of it, as one object."""
    device = resolve_device("auto")
    return {"versions": versions(), "devices": devices(), "default_dtype": dtype_name(resolve_dtype("auto", device)),
            "kernels": kernels(), "attention": attention_backends()}
