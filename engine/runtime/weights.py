"""Weights from disk to a module: built without memory on the meta device, filled from memory-mapped safetensors, freed after use.

Folders are laid out as diffusers does: `config.json` beside `diffusion_pytorch_model.safetensors`, or shards and their
`.safetensors.index.json`. Nothing is unpickled, and no shard outside the folder is opened.
"""

import contextlib
import gc
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from engine.errors import WeightsError

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a stage.   Raises: WeightsError if there are none, or if an index names a file outside the folder."""
    folder = Path(folder)
    if (folder / WEIGHTS_NAME).is_file():
        return [folder / WEIGHTS_NAME]
    index = folder / (WEIGHTS_NAME + ".index.json")
    if not index.is_file():
        raise WeightsError(f"{folder}: want {WEIGHTS_NAME} (or its index and shards), found neither")
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()), key=str)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index}: want a JSON object with a weight_map, got {error}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise WeightsError(f"{index}: want names of safetensors files beside it, got {name!r}")
        if not (folder / name).is_file():
            raise WeightsError(f"{folder}: shard {name} is missing")
    return [folder / name for name in names]


def check(folder: Path, shapes: dict[str, torch.Size]) -> None:
    """That every weight is there in its shape, from the headers alone.   Raises: WeightsError naming the first that is not."""
    found: dict[str, tuple] = {}
    for path in weight_files(folder):
        with _open(path) as f:
            for name in f.keys():
                found[name] = tuple(f.get_slice(name).get_shape())
    missing, extra = sorted(shapes.keys() - found.keys()), sorted(found.keys() - shapes.keys())
    if missing or extra:
        what = (f"{len(names)} {kind}" + (f" ({names[0]})" if names else "") for kind, names in (("missing", missing), ("unknown", extra)))
        raise WeightsError(f"{folder}: weights do not fit the config: {', '.join(what)}")
    for name, shape in shapes.items():
        if found[name] != tuple(shape):
            raise WeightsError(f"{folder}: {name}: want shape {[*shape]}, got {[*found[name]]}")


@contextlib.contextmanager
def _open(path: Path):
    try:
        with safe_open(path, framework="pt") as f:
            yield f
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a complete safetensors file ({error})") from error


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """The module with its shapes and no memory."""
    with torch.device("meta"):
        return build()


def load(build: Callable[[], nn.Module], folder: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A module for inference with its weights on `device` in `dtype`; peak memory is the module and one tensor."""
    module = on_meta(build)
    check(folder, {name: p.shape for name, p in module.state_dict().items()})
    state = {}
    for path in weight_files(folder):
        with _open(path) as f:
            for name in f.keys():
                state[name] = f.get_tensor(name).to(device=device, dtype=dtype)
    module.load_state_dict(state, assign=True)
    # oneDNN and cuDNN read channels_last kernels without repacking them at every call
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            m.weight.data = m.weight.data.contiguous(memory_format=torch.channels_last)
    return module.eval().requires_grad_(False)


@contextlib.contextmanager
def resident(build: Callable[[], nn.Module], folder: Path, device: torch.device, dtype: torch.dtype) -> Iterator[nn.Module]:
    """The module for as long as it is used, then its memory back."""
    module = load(build, folder, device, dtype)
    try:
        yield module
    finally:
        module.to("meta")
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def fingerprint(folder: Path) -> str:
    """sha256 over the weight files of a folder, in the order of their names."""
    digest = hashlib.sha256()
    for path in weight_files(folder):
        with open(path, "rb") as f:
            while block := f.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
