"""One process, one device: the network, its backward pass and its optimizer, without DeepSpeed, which saves nothing on one GPU.

The protocol that `zero.ZeroEngine` shares is `Engine`. Memory options: blocks computed again, activations in pinned host memory, gradients
applied as they come, and the optimizer's own (`finetune_optimizer`).
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.config import FinetuneConfig
from engine.errors import WeightsError
from engine.models.unet import VideoUNet
from engine.runtime import weights

from .finetune_optimizer import FinetuneOptimizer

STATE_NAME = "state-{}.safetensors"
FILE_BYTES = 1 << 30
OFFLOAD_BYTES = 1 << 20            # smaller activations stay: their copies would cost more than their place


class Engine(Protocol):
    """What finetunes one stage, on one rank of `world`.

    Made by Engine(build, folder, config, device, dtype): build makes the network (called on the meta device or in shards), folder has the
    stage's weights. The loss given to `backward` is this rank's weighted sum times `world`, because backends average over ranks; it may be
    given in `config.accumulate` parts, whose gradients add up.
    """

    network: Callable[..., Tensor]                          # called as VideoUNet.forward is
    rank: int
    world: int

    def backward(self, loss: Tensor) -> None: ...
    def step(self, lr: float, skip: bool = False) -> float: ...      # -> norm over all ranks; not finite, or skip: nothing changes
    def any_rank(self, flag: bool) -> bool: ...
    def sum_ranks(self, values: list[float]) -> list[float]: ...
    def save(self, folder: Path) -> None: ...               # this rank's files, into a folder that exists
    def load(self, folder: Path) -> None: ...               # from a folder that has been verified
    def weights(self) -> Iterator[tuple[str, Tensor]]: ...  # fp32 on the CPU, one at a time; every rank has to iterate
    def close(self) -> None: ...


class PlainEngine:
    """`Engine` for one process.

    device, dtype: of the pass; bf16 weights have fp32 masters unless `config.master` is stochastic. Raises: WeightsError.
    """

    rank, world = 0, 1

    def __init__(self, build: Callable[[], VideoUNet], folder: Path, config: FinetuneConfig, device: torch.device, dtype: torch.dtype):
        self.config, self.device = config, torch.device(device)
        keep = dtype != torch.float32 and config.master == "fp32"
        module = weights.load(build, folder, self.device, torch.float32 if keep else dtype)
        masters = {name: p.detach() for name, p in module.named_parameters()} if keep else None
        if keep:
            for p in module.parameters():
                p.data = p.data.to(dtype)
        self.module = module.train().requires_grad_(True)
        self.module.gradient_checkpointing = config.gradient_checkpointing
        self.optimizer = FinetuneOptimizer(dict(module.named_parameters()), config, masters)
        self.waiting: Tensor | None = None                  # a loss whose gradients are not applied yet
        self.norms: dict[str, Tensor] = {}
        self.apply: tuple[float, float] | None = None       # (scale, lr) while gradients are applied as they come
        if config.in_backward:
            for name, p in module.named_parameters():
                p.register_post_accumulate_grad_hook(lambda p, name=name: self._take(name, p))

    def network(self, *args, **kwargs) -> Tensor:
        with self._saving():
            return self.module(*args, **kwargs)

    def _saving(self):
        """Where the backward pass's tensors wait. Weights are left alone: they are there anyway."""
        if not (self.config.activation_offload and torch.is_grad_enabled()):
            return contextlib.nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(*offload_hooks(self.device, {p.data_ptr() for p in self.module.parameters()}))

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`; with `in_backward` take their norms only, and keep the graph for `step`."""
        loss.backward(retain_graph=self.config.in_backward)
        self.waiting = loss if self.config.in_backward else None

    def _take(self, name: str, p: Tensor) -> None:
        gradient, p.grad = p.grad, None
        if self.apply is None:
            self.norms[name] = gradient.float().norm()
        else:
            self.optimizer.update(name, gradient, *self.apply)

    @torch.no_grad()
    def step(self, lr: float, skip: bool = False) -> float:
        """One clipped update -> the gradient's norm before clipping. Not finite, or `skip`: nothing changes.

        With `in_backward` the norm has been taken in one backward pass and the updates are made in a second one: the price of
        clipping and of skipping a bad step without ever holding all gradients.
        """
        params = self.optimizer.params
        for name, p in params.items():
            if p.grad is not None:
                self.norms[name] = p.grad.float().norm()
        norm = torch.stack([self.norms[name] for name in params if name in self.norms]).norm().item()
        scale = min(1.0, self.config.clip / (norm + 1e-6))             # as PyTorch's and DeepSpeed's clipping
        loss, norms_of = self.waiting, self.norms.keys()
        self.waiting, self.norms = None, {}
        if skip or not norm < float("inf"):
            for p in params.values():
                p.grad = None
        elif loss is not None:
            self.apply = scale, lr
            try:
                loss.backward()
            finally:
                self.apply = None
            for name in params.keys() - norms_of:           # not in the graph: their moments decay all the same
                self.optimizer.update(name, torch.zeros_like(params[name]), scale, lr)
            self.optimizer.steps += 1
        else:
            self.optimizer.step(scale, lr)
        return norm

    def any_rank(self, flag: bool) -> bool:
        return bool(flag)

    def sum_ranks(self, values: list[float]) -> list[float]:
        return list(values)

    def save(self, folder: Path) -> None:
        """Weights (fp32 where there are masters) and moments, in safetensors files of 1 GiB: as much is copied at a time."""
        part, count, size = {}, 0, 0
        for name, value in self.optimizer.state_tensors():
            if part and size + value.nbytes > FILE_BYTES:
                save_file(part, Path(folder) / STATE_NAME.format(count))
                part, count, size = {}, count + 1, 0
            part[name], size = value.contiguous(), size + value.nbytes
        save_file(part, Path(folder) / STATE_NAME.format(count))

    def load(self, folder: Path) -> None:
        """Raises: WeightsError if a file is damaged, or the state is another network's."""
        def tensors():
            for path in sorted(Path(folder).glob(STATE_NAME.format("*"))):
                with safe_open(path, framework="pt") as f:
                    for name in f.keys():
                        yield name, f.get_tensor(name)

        try:
            self.optimizer.load_tensors(tensors())
        except (SafetensorError, OSError, ValueError) as error:
            raise WeightsError(f"{folder}: not a state of this stage ({' '.join(str(error).split())})") from error

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, p in self.optimizer.params.items():
            yield name, self.optimizer.masters.get(name, p.detach()).float().cpu()

    def close(self) -> None:
        """Give the memory back; the engine is of no use afterwards."""
        self.optimizer = self.waiting = None
        self.module.to("meta")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def offload_hooks(device: torch.device, keep: set[int]) -> tuple[Callable, Callable]:
    """(pack, unpack) for saved_tensors_hooks: large tensors on the GPU are copied to pinned memory beside the computation, and back.

    keep: addresses of tensors that stay (weights). On the CPU there is nowhere to go: tensors pass through.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def pack(tensor: Tensor):
        if not tensor.is_cuda or tensor.nbytes < OFFLOAD_BYTES or tensor.untyped_storage().data_ptr() in keep:
            return tensor
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)                        # its memory is not handed out again before the copy has been made
        return tensor.device, host

    def unpack(packed):
        if isinstance(packed, Tensor):
            return packed
        with torch.cuda.stream(stream):                     # after the copy out, which is in the same stream
            tensor = packed[1].to(packed[0], non_blocking=True)
        torch.cuda.current_stream(device).wait_stream(stream)
        tensor.record_stream(torch.cuda.current_stream(device))
        return tensor

    return pack, unpack
