"""AdamW for finetuning at a rate of 6e-6, where bf16 weights would round most updates away (App. A.2 gives the rate).

16-bit weights therefore either have an fp32 master, of which they are copies, or are rounded at random, so that the small updates count in
expectation (`master: stochastic`: no second copy of the weights). The moments are fp32, or 8 bits each in blocks (bitsandbytes).
Every tensor's update stands alone, so applying them one by one during the backward pass gives the same bits as all together at its end.
"""

import functools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from engine.config import FinetuneConfig
from engine.errors import ConfigError

from .data import batch_seed

SMALL = 4096                       # numbers; tensors below keep fp32 moments under adamw8bit, as in bitsandbytes
GOLDEN = 40503                     # 2**16 / the golden ratio, odd: multiples of it spread evenly over 16 bits
BLOCK = 256


class FinetuneOptimizer:
    """The state of one network's AdamW.

    params: the network's parameters by name, all of one dtype; on return their values are those of the masters.
    masters: fp32 values to start from, where 16-bit parameters have masters; they are taken over, not copied.
    Raises: ConfigError if bitsandbytes is asked for and does not work here.
    """

    def __init__(self, params: dict[str, nn.Parameter], config: FinetuneConfig, masters: dict[str, Tensor] | None = None):
        self.params, self.config = params, config
        dtype = next(iter(params.values())).dtype
        self.stochastic = dtype != torch.float32 and config.master == "stochastic"
        if self.stochastic and dtype != torch.bfloat16:
            raise ConfigError(f"master: stochastic rounding is for bf16 weights, got {dtype}")
        self.masters: dict[str, Tensor] = {}
        if dtype != torch.float32 and not self.stochastic:
            self.masters = {name: masters[name] if masters else p.detach().float() for name, p in params.items()}
        self.state = {name: self._empty_state(p) for name, p in params.items()}
        self.steps = 0

    def _empty_state(self, p: Tensor) -> dict[str, Tensor]:
        if self.config.optimizer == "adamw8bit" and p.numel() >= SMALL:
            blocks = -(-p.numel() // BLOCK)
            return {"first": torch.zeros(p.numel(), dtype=torch.uint8, device=p.device),
                    "second": torch.zeros(p.numel(), dtype=torch.uint8, device=p.device),
                    "first_scale": torch.zeros(blocks, device=p.device), "second_scale": torch.zeros(blocks, device=p.device)}
        return {"first": torch.zeros_like(p, dtype=torch.float32), "second": torch.zeros_like(p, dtype=torch.float32)}

    @torch.no_grad()
    def update(self, name: str, gradient: Tensor, scale: float, lr: float) -> None:
        """Apply scale * gradient to one tensor, as part of step `self.steps + 1`."""
        p = self.params[name]
        weight = self.masters.get(name)
        if weight is None:
            weight = p.data if p.dtype == torch.float32 else p.float()
        # like the weight's strides too: what works on flat memory must pair the right numbers
        gradient = torch.empty_like(weight).copy_(gradient)
        if scale != 1:
            gradient.mul_(scale)
        if "first_scale" in self.state[name]:
            self._adam_8bit(weight, gradient, self.state[name], lr)
        else:
            self._adam(weight, gradient, self.state[name], lr)
        if self.stochastic:
            round_(p.data, weight, batch_seed(self.config.seed, "rounding", name), self.steps)
        elif weight is not p.data:
            p.data.copy_(weight)

    def step(self, scale: float, lr: float) -> None:
        """Apply scale * each parameter's .grad (one that is missing is zero), and free it."""
        for name, p in self.params.items():
            gradient, p.grad = p.grad, None
            self.update(name, torch.zeros_like(p) if gradient is None else gradient, scale, lr)
        self.steps += 1

    def _adam(self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], lr: float) -> None:
        # PyTorch's own arithmetic, one tensor at a time: what torch.optim.AdamW gives, to the last bit
        fused = self.config.optimizer == "fused"
        count = torch.tensor(float(self.steps), device=weight.device if fused else "cpu")
        beta1, beta2 = self.config.betas
        adamw([weight], [gradient], [state["first"]], [state["second"]], [], [count], foreach=False, fused=fused, amsgrad=False,
              beta1=beta1, beta2=beta2, lr=lr, weight_decay=self.config.weight_decay, eps=self.config.eps, maximize=False)

    def _adam_8bit(self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], lr: float) -> None:
        beta1, beta2 = self.config.betas
        signed, unsigned = _maps(weight.device)
        flat = (weight.numel(),), (1,)
        _bitsandbytes().optimizer_update_8bit_blockwise(
            "adam", gradient.as_strided(*flat), weight.as_strided(*flat), state["first"], state["second"], beta1, beta2, 0.0, 0.0,
            self.config.eps, self.steps + 1, lr, signed, unsigned, state["first_scale"], state["second_scale"],
            self.config.weight_decay, 1.0, False)

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All state by name, the optimizer's own tensors and not copies; kernels of 2-D convolutions lie channels last and are given so."""
        yield "steps", torch.tensor(self.steps)
        for name, state in self.state.items():
            for kind, value in [("weight", self.masters.get(name, self.params[name].data)), *state.items()]:
                yield f"{kind}.{name}", value.permute(0, 2, 3, 1) if value.ndim == 4 else value

    @torch.no_grad()
    def load_tensors(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """The same back, in any order.   Raises: ValueError for a name or shape that is not this network's, or one that is missing."""
        wanted = dict(self.state_tensors())
        for name, value in tensors:
            place = wanted.pop(name, None)
            if place is None or place.shape != value.shape or place.dtype != value.dtype:
                raise ValueError(f"{name}: want {'no such tensor' if place is None else f'{place.dtype} {[*place.shape]}'}, "
                                 f"got {value.dtype} {[*value.shape]}")
            place.copy_(value)
            if name == "steps":
                self.steps = int(value)
        if wanted:
            raise ValueError(f"{len(wanted)} tensors are missing, the first is {next(iter(wanted))}")
        for name, master in self.masters.items():
            self.params[name].data.copy_(master)


def round_(out: Tensor, value: Tensor, seed: int, step: int) -> None:
    """bf16 `out` <- fp32 `value`, up or down with the chance that makes it right on average.

    The threshold of number i at step t is (phase_i + t * golden ratio) mod 1, the phases drawn from `seed`: uniform for every t, so each
    rounding is unbiased, and evenly spread over successive steps, so that small equal updates move a weight after about as many steps as
    they should instead of at random times (the error of 20 steps is a third of independent draws').
    """
    generator = torch.Generator(out.device).manual_seed(seed)
    threshold = torch.randint(0, 1 << 16, out.shape, generator=generator, device=out.device, dtype=torch.int32)
    threshold.add_(step * GOLDEN % (1 << 16)).bitwise_and_(0xFFFF)
    # bf16 is fp32 without its last 16 bits: adding below them carries into the kept ones that often
    bits = threshold.add_(value.view(torch.int32)).bitwise_and_(-(1 << 16))
    out.copy_(bits.view(torch.float32))


@functools.cache
def _bitsandbytes():
    import logging

    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.CRITICAL)                # it speaks of kernels that are not used here
    try:
        import bitsandbytes.functional as functional
    except Exception as error:                       # a wheel without this machine's libraries raises RuntimeError, not ImportError
        why = " ".join(str(error).split())[:200]
        raise ConfigError(f"optimizer: adamw8bit needs bitsandbytes, which does not import here ({why})") from error
    finally:
        logger.setLevel(level)
    return functional


@functools.cache
def _maps(device: torch.device) -> tuple[Tensor, Tensor]:
    """The 256 values that the codes of first and second moments stand for."""
    create = _bitsandbytes().create_dynamic_map
    return create(signed=True).to(device), create(signed=False).to(device)
