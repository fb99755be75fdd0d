"""Where the bytes of finetuning are under each policy, and the best policy that a machine has room for.

State bytes per parameter, bf16 passes: weights 2, gradients 2, fp32 master 4, moments 8 (fp32) or 2 (8-bit).
    fp32 Adam 16 | 8-bit Adam and master 10 | in backward, gradients never together, 8 | the same, no master, weights rounded at random 4
Below, P is the number of parameters; what a pass costs is a `Pass`, from a walk over the network without memory.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from engine.errors import OutOfMemory

from .roofline import H200, Card

GB = 10**9
WORLDS, CARDS = (1, 2, 4, 8), (24 * GB, 48 * GB, 80 * GB, 141 * GB)
GPU_RESERVE = 1_000_000_000            # estimate: the CUDA context, workspaces of cuDNN and cuBLAS, the allocator's gaps
MOMENT_BYTES = {"adamw": 8.0, "fused": 8.0, "adamw8bit": 2 + 8 / 256}      # 8-bit moments: two scales of 4 bytes per block of 256
STEP_TENSORS = 3                       # fp32 copies of one parameter while it is stepped: gradient, denominator, update
PREFETCH, REDUCE, SUBGROUP = 50_000_000, 500_000_000, 1_000_000_000        # numbers: DeepSpeed's defaults
DISK_STAGING = 16 * GB                 # estimate: pinned host memory through which optimizer state goes to disk and back, per rank


class Pass(NamedTuple):
    """One forward and backward pass of a rank. Bytes, where nothing else is said."""

    parameters: int               # numbers
    largest_parameter: int        # numbers
    largest_block: int            # numbers
    activations: int              # kept from forward to backward
    peak: int                     # alive at once, gradients counted until each is complete
    peak_with_gradients: int      # alive at once, with all gradients made so far
    offloaded: int                # activations that leave for the host
    flops: int
    moved: int                    # read and written by all ops
    seconds: float                # by the roofline, op for op


@dataclass(frozen=True)
class Policy:
    """How the state of one finetuning is kept. `zero3`: partitioned over the ranks; else one rank has it all."""

    dtype: Literal["bf16", "fp32"] = "bf16"
    optimizer: Literal["adamw", "adamw8bit", "fused"] = "adamw"
    master: Literal["fp32", "stochastic"] = "fp32"
    in_backward: bool = False
    gradient_checkpointing: bool = False
    activation_offload: bool = False
    zero3: bool = False
    offload_optimizer: Literal["none", "host", "disk"] = "none"
    offload_parameters: Literal["none", "host", "disk"] = "none"

    def __post_init__(self):
        if (self.offload_optimizer, self.offload_parameters) != ("none", "none") and not self.zero3:
            raise ValueError("offload of optimizer or parameters: want zero3, which does it")
        if self.zero3 and (self.in_backward or self.master == "stochastic"):
            raise ValueError("in_backward, master stochastic: want a run without zero3")

    @property
    def weight_bytes(self) -> int:
        return 2 if self.dtype == "bf16" else 4

    @property
    def master_bytes(self) -> int:
        return 4 if self.dtype == "bf16" and self.master == "fp32" else 0

    @property
    def state_bytes_per_parameter(self) -> float:
        """Weights, gradients, master and moments, wherever they are."""
        gradients = 0 if self.in_backward else self.weight_bytes
        return self.weight_bytes + gradients + self.master_bytes + MOMENT_BYTES[self.optimizer]

    def __str__(self) -> str:
        parts = [{"adamw": "Adam", "adamw8bit": "8-bit Adam", "fused": "fused Adam"}[self.optimizer],
                 self.dtype if not self.master_bytes and self.dtype == "fp32" else f"{self.master} master" if self.master_bytes
                 else "stochastic rounding"]
        parts += ["in backward"] * self.in_backward + ["recompute"] * self.gradient_checkpointing
        parts += ["activations on host"] * self.activation_offload
        parts += [f"optimizer on {self.offload_optimizer}"] * (self.offload_optimizer != "none")
        parts += [f"parameters on {self.offload_parameters}"] * (self.offload_parameters != "none")
        return ("ZeRO-3, " if self.zero3 else "") + ", ".join(parts)


def ladder(world: int, dtype: str = "bf16") -> list[Policy]:
    """Policies from the plainest to the most frugal: what costs nothing first, then time, then exactness, then the way to the host."""
    one = Policy(dtype=dtype)
    eight = replace(one, optimizer="adamw8bit")
    if world > 1:
        plain = [replace(one, zero3=True), replace(eight, zero3=True)]
    else:
        plain = [one, eight, replace(eight, in_backward=True)]
    steps = plain + [replace(p, gradient_checkpointing=True) for p in plain]
    if world == 1:
        frugal = replace(eight, master="stochastic", in_backward=True)
        steps += [frugal, replace(frugal, gradient_checkpointing=True)]
    last = replace(one, zero3=True, gradient_checkpointing=True)
    for host in ("host", "disk"):
        steps += [replace(last, offload_optimizer=host), replace(last, offload_optimizer=host, offload_parameters=host)]
    last = steps[-1]
    return steps + [replace(last, gradient_checkpointing=False, activation_offload=True)]


@dataclass(frozen=True)
class Need:
    """Bytes per rank of one policy; `host` and `disk` over all ranks of a machine. `activations` is part of `working`."""

    state: int
    activations: int
    working: int
    gpu: int
    host: int
    disk: int
    seconds: dict[str, float]

    @property
    def step_seconds(self) -> float:
        """The pass hides what moves beside it, as far as it lasts; then the optimizer."""
        return max(self.seconds["pass"], self.seconds["links"], self.seconds["host link"]) + self.seconds["optimizer"]


def need(cost: Pass, policy: Policy, world: int, card: Card = H200, on_cpu: bool = False) -> Need:
    """Of one rank of `world`, given the pass it runs."""
    P, share = cost.parameters, world if policy.zero3 else 1
    w, moments = policy.weight_bytes, MOMENT_BYTES[policy.optimizer]
    optimizer = policy.master_bytes + moments
    resident = w * (policy.offload_parameters == "none") + optimizer * (policy.offload_optimizer == "none")
    state = round(resident * P / share)
    largest = STEP_TENSORS * 4 * cost.largest_parameter
    if policy.zero3:
        gathered = 0 if world == 1 and policy.offload_parameters == "none" else w * min(P, cost.largest_block + PREFETCH)
        buckets = w * min(P, REDUCE)
        gradients = 0 if policy.offload_optimizer != "none" else round(w * P / share)
        step = 4 * min(P // share, SUBGROUP) * (policy.offload_optimizer == "none")          # gradients of a group, in fp32
        working = gradients + max(cost.peak + gathered + buckets, step + largest)
    elif policy.in_backward:
        gradients, working = 0, cost.peak + largest
    else:
        gradients = w * P
        working = max(cost.peak_with_gradients, gradients + largest)
    host = disk = 0
    for what, where in ((policy.master_bytes + moments + 4, policy.offload_optimizer), (w, policy.offload_parameters)):
        host += round(what * P) * (where == "host")
        disk += round(what * P) * (where == "disk")
    if disk:
        host += min(DISK_STAGING * world, disk)
    host += cost.offloaded * world
    reserve = 0 if on_cpu else GPU_RESERVE
    return Need(state + gradients, cost.activations, working, state + working + reserve, host, disk,
                _seconds(cost, policy, world, share, card))


def _seconds(cost: Pass, policy: Policy, world: int, share: int, card: Card) -> dict[str, float]:
    P, w = cost.parameters, policy.weight_bytes
    parts = {"pass": cost.seconds, "links": 0.0, "host link": 2 * cost.offloaded / card.host_link_per_s, "optimizer": 0.0}
    if policy.zero3:                  # gathered forwards, gathered backwards, gradients scattered
        parts["links"] = 3 * w * P * (world - 1) / world / card.links_per_s
    if policy.offload_parameters != "none":
        parts["host link"] += 2 * w * P / share / card.host_link_per_s
    state = policy.master_bytes + MOMENT_BYTES[policy.optimizer]
    traffic = 2 * state + 2 * w       # state read and written, the gradient read, the weight written
    if policy.offload_optimizer == "none":
        parts["optimizer"] = traffic * P / share / card.bytes_per_s / card.memory_efficiency
    else:
        parts["optimizer"] = 2 * w * P / share / card.host_link_per_s + (traffic + 4) * P / card.host_memory_per_s
        if policy.offload_optimizer == "disk":
            parts["optimizer"] += 2 * state * P / card.disk_per_s
    if policy.offload_parameters == "disk":
        parts["host link"] = max(parts["host link"], 3 * w * P / card.disk_per_s)
    return parts


def fits(what: Need, gpu_bytes: int | None, host_bytes: int | None) -> bool:
    """gpu_bytes None: on the CPU, where everything is the host's."""
    if gpu_bytes is None:
        return host_bytes is None or what.gpu + what.host <= host_bytes
    return what.gpu <= gpu_bytes and (host_bytes is None or what.host <= host_bytes)


Measure = Callable[[Policy, int], Need]      # what a policy needs on a rank of so many


def best(measure: Measure, world: int, gpu_bytes: int | None, host_bytes: int | None, dtype: str = "bf16") -> tuple[Policy, Need] | None:
    """The first of the ladder that fits, or None."""
    for policy in ladder(world, dtype):
        if fits(found := measure(policy, world), gpu_bytes, host_bytes):
            return policy, found
    return None


def refuse(stage: str, measure: Measure, policy: Policy, world: int, gpu_bytes: int | None, host_bytes: int | None) -> OutOfMemory:
    """The error for a policy that does not fit, naming the nearest that does: another policy here, more GPUs, or a larger card."""
    what = measure(policy, world)
    machine = "the CPU" if gpu_bytes is None else f"{world} GPU{'s' * (world > 1)} of {gpu_bytes / GB:.0f} GB"
    short = f"{what.gpu / GB:.1f} GB per rank (state {what.state / GB:.1f}, activations {what.activations / GB:.1f})"
    if what.host:
        short += f" and {what.host / GB:.0f} GB of host memory"
    if host_bytes is not None:
        machine += f" with {host_bytes / GB:.0f} GB of host memory"
    ways = []
    if here := best(measure, world, gpu_bytes, host_bytes, policy.dtype):
        ways.append(f"{here[0]} ({here[1].gpu / GB:.1f} GB)")
    if gpu_bytes is not None:
        spread = replace(policy, zero3=True) if not policy.in_backward and policy.master == "fp32" else ladder(2, policy.dtype)[-2]
        more = next((n for n in WORLDS if n > world and fits(measure(spread, n), gpu_bytes, host_bytes)), None)
        larger = next((size for size in CARDS if size > gpu_bytes and fits(what, size, host_bytes)), None)
        ways += [f"{more} GPUs ({spread})"] * (more is not None) + [f"a card of {(larger or 0) / GB:.0f} GB"] * (larger is not None)
    nearest = "nearest that fits: " + ", or ".join(ways) if ways else "nothing here fits it"
    return OutOfMemory(f"{stage}: {policy} needs {short}, which {machine} cannot hold; {nearest}")
