"""What this machine has, and which implementation runs each hot op here, with the reason: the answer of `infer info`.

A backend is judged by calling it, never by importing it: xformers imports well beside a torch it was not built for and then refuses every
call. Nothing here is needed to run a cascade.
"""

import contextlib
import io
import platform
import warnings
from importlib import metadata

import torch
import torch.nn.functional as F

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
    """SDPA and xformers, each called once on a small case and compared with plain arithmetic in fp64."""
    device = resolve_device("auto")
    q, k, v = torch.randn(3, 2, 4, 33, 32, generator=torch.Generator().manual_seed(0)).to(device)
    want = (torch.softmax(q.double() @ k.double().transpose(-1, -2) * 32**-0.5, -1) @ v.double()).float()

    def sdpa():
        return F.scaled_dot_product_attention(q, k, v)

    def xformers():
        if device.type != "cuda":
            raise RuntimeError("its operators are for GPUs")
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            from xformers.ops import memory_efficient_attention
        return memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    found = []
    for name, call in (("sdpa", sdpa), ("xformers", xformers)):
        try:
            error = (call() - want).abs().max().item()
            works = error < 1e-3
            reason = "agrees with the reference" if works else f"differs from the reference by {error:.2g}"
        except Exception as problem:      # whatever a foreign backend raises is the reason to report
            works, reason = False, (str(problem).strip() or type(problem).__name__).splitlines()[0]
        found.append({"backend": name, "works": works, "used": works and name == "sdpa", "reason": reason})
    if found[1]["works"]:
        found[1]["reason"] += "; not used: on this torch its kernels are SDPA's own"
    return found


def kernels() -> list[dict]:
    """Which implementation of each of `dreamix_kernels`' ops runs here."""
    from dreamix_kernels import __all__ as ops

    return [{"kernel": name, "implementation": "torch", "reason": "the PyTorch formulation is the only one so far"} for name in ops]


def describe() -> dict:
    """All of it, as one object."""
    device = resolve_device("auto")
    return {"versions": versions(), "devices": devices(), "default_dtype": dtype_name(resolve_dtype("auto", device)),
            "kernels": kernels(), "attention": attention_backends()}
