"""What a pass costs, counted op by op on tensors without memory: bytes alive, bytes moved, FLOPs, and time by the roofline.

The `Meter` sees every op below autograd, so what it counts as alive is what autograd keeps, no more: a storage counts once, from the op
that makes it to the last reference. It counts the same on real tensors, which is how a plan is compared with a run.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


@dataclass(frozen=True)
class Card:
    """Rates of the hardware. Rates in bf16 are an H200's, measured (products 790 TFLOP/s, copies 4.3 TB/s); the rest are estimates."""

    flops_per_s: float = 790e12
    bytes_per_s: float = 4.3e12
    compute_efficiency: float = 0.60       # estimate: 3x3 convolutions of 256 channels and more reach 50 to 62 % of the products' rate
    memory_efficiency: float = 0.85        # estimate
    links_per_s: float = 400e9             # bytes between GPUs, effective: estimate
    host_link_per_s: float = 50e9          # bytes between a GPU and its host (PCIe 5): estimate
    host_memory_per_s: float = 100e9       # bytes, all cores of the host together: estimate; the rate of an optimizer that lives there
    disk_per_s: float = 5e9                # bytes, one NVMe: estimate

    def seconds(self, flops: float, moved: float) -> float:
        """An op is as slow as the slower of its two needs."""
        return max(flops / (self.flops_per_s * self.compute_efficiency), moved / (self.bytes_per_s * self.memory_efficiency))


H200 = Card()


class Meter(TorchDispatchMode):
    """Counts what runs inside it. `alive` and `peak` in bytes, of storages made inside; `flops`, `moved` (bytes), `seconds` (roofline).

    Bytes given to `set_aside` (gradients, which some policies keep and others do not) leave `alive`: `peak_with_aside` has both.
    """

    def __init__(self, card: Card = H200):
        super().__init__()
        from torch.utils.flop_counter import flop_registry

        self.card, self._flop_registry = card, flop_registry
        self.alive = self.peak = self.aside = self.peak_with_aside = 0
        self.flops = self.moved = 0
        self.seconds = 0.0
        self._storages: dict[int, tuple] = {}         # id of a living storage: (weak reference, bytes, set aside)

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """These were there before: they count nothing."""
        for tensor in tensors:
            self._enter(tensor, 0)

    def set_aside(self, tensor: Tensor) -> None:
        key = tensor.untyped_storage()._cdata
        reference, size, aside = self._storages[key]
        if not aside:
            self._storages[key] = (reference, size, True)
            self.alive -= size
            self.aside += size

    def _enter(self, tensor: Tensor, size: int | None = None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes() if size is None else size

        def leave(_, key=key):
            _, size, aside = self._storages.pop(key)
            if aside:
                self.aside -= size
            else:
                self.alive -= size

        self._storages[key] = (weakref.ref(storage, leave), size, False)
        self.alive += size
        self.peak, self.peak_with_aside = max(self.peak, self.alive), max(self.peak_with_aside, self.alive + self.aside)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_iter(out) if isinstance(x, Tensor)]
        given = {x.untyped_storage()._cdata for x in inputs}
        view = not func._schema.is_mutable and given and all(x.untyped_storage()._cdata in given for x in outputs)
        if not view and "empty" not in func._schema.name:
            moved = sum(min(x.numel() * x.itemsize, x.untyped_storage().nbytes()) for x in (*inputs, *outputs))
            count = self._flop_registry.get(func._overloadpacket)
            flops = count(*args, **(kwargs or {}), out_val=out) if count else 0
            self.moved += moved
            self.flops += flops
            self.seconds += self.card.seconds(flops, moved)
        for x in outputs:
            self._enter(x)
        return out


class Offloaded(torch.autograd.graph.saved_tensors_hooks):
    """Saved activations of `at_least` bytes are let go and come back as fresh tensors: activation offload without the copies.

    `kept`: storages that stay (the parameters').
    """

    def __init__(self, kept: Iterable[Tensor], at_least: int = 1 << 20):
        stay = {x.untyped_storage()._cdata for x in kept}
        self.bytes = 0

        def pack(x: Tensor):
            if x.untyped_storage()._cdata in stay or x.numel() * x.itemsize < at_least:
                return x
            self.bytes += x.numel() * x.itemsize
            return x.shape, x.dtype, x.device

        def unpack(saved):
            return saved if isinstance(saved, Tensor) else torch.empty(saved[0], dtype=saved[1], device=saved[2])

        super().__init__(pack, unpack)
