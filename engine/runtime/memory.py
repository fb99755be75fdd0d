"""Where the bytes of finetuning are under each policy, and the best policy that a machine has room for.

State bytes per parameter, bf16 passes: weights 2, gradients 2, fp32 master 4, moments 8 (fp32) or 2 (8-bit).
    fp32 Adam 16 | 8-bit Adam and master 10 | in backward, gradients never together, 8 | the same, no master, weights rounded at random 4
Under ZeRO-3 gradients are summed in fp32 (two bytes more) and all of it is divided by the ranks; a layer's whole weights exist while it
runs. Below, P is the number of parameters; what a pass costs is a `Pass`, from a walk over the network without memory.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from engine.config import FinetuneConfig
from engine.errors import OutOfMemory

from .roofline import H200, Card

GB = 10**9
WORLDS, CARDS = (1, 2, 4, 8), (24 * GB, 48 * GB, 80 * GB, 141 * GB)
GPU_RESERVE = 1_000_000_000            # estimate: the CUDA context, workspaces of cuDNN and cuBLAS, the allocator's gaps
MOMENT_BYTES = {"adamw": 8.0, "fused": 8.0, "adamw8bit": 2 + 8 / 256}      # 8-bit moments: two scales of 4 bytes per block of 256
DISK_STAGING = 16 * GB                 # estimate: pinned host memory through which state goes to disk and back, per rank


class Pass(NamedTuple):
    """One forward and backward pass of a rank. Bytes, where nothing else is said."""

    sizes: tuple[int, ...]        # numbers of each parameter, in the network's order
    largest_block: int            # numbers that are gathered together
    activations: int              # kept from forward to backward
    peak: int                     # alive at once, gradients counted until each is complete
    peak_with_gradients: int      # alive at once, with all gradients made so far
    offloaded: int                # activations that leave for the host
    flops: int
    moved: int                    # read and written by all ops
    seconds: float                # by the roofline, op for op

    @property
    def parameters(self) -> int:
        return sum(self.sizes)


class Zero(NamedTuple):
    """ZeRO-3's sizes, in numbers (bytes of one where said). Defaults: those of configs/deepspeed."""

    live: int = 200_000_000       # gathered weights at a time, besides the block that runs
    bucket: int = 20_000_000      # gradients summed at a time
    group: int = 100_000_000      # a rank's numbers stepped at a time
    gradient_bytes: int = 4       # of a summed gradient
    sent_bytes: int = 4           # of a gradient on its way

    @classmethod
    def of(cls, settings: Mapping) -> "Zero":
        """From DeepSpeed's JSON; what it does not say is DeepSpeed's own default."""
        part = settings.get("zero_optimization", {})
        width = {"fp32": 4, "fp16": 2, "bf16": 2}
        return cls(int(part.get("stage3_max_live_parameters", 10**9)), int(part.get("reduce_bucket_size", 5 * 10**8)),
                   int(part.get("sub_group_size", 10**9)), width.get((settings.get("data_types") or {}).get("grad_accum_dtype"), 4),
                   width.get(settings.get("communication_data_type"), 2))


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
    zero: Zero = Zero()
    offload_optimizer: Literal["none", "host", "disk"] = "none"
    offload_parameters: Literal["none", "host", "disk"] = "none"

    def __post_init__(self):
        if (self.offload_optimizer, self.offload_parameters) != ("none", "none") and not self.zero3:
            raise ValueError("offload of optimizer or parameters: want zero3, which does it")
        if self.zero3 and (self.in_backward or self.master == "stochastic"):
            raise ValueError("in_backward, master stochastic: want a run without zero3")

    @classmethod
    def of(cls, config: FinetuneConfig, dtype: str, settings: Mapping | None = None) -> "Policy":
        """The policy of a run. dtype: as resolved, fp32 or bf16; settings: DeepSpeed's JSON where it runs under ZeRO-3."""
        where = {"none": "none", "cpu": "host", "nvme": "disk"}
        zero = (settings or {}).get("zero_optimization", {})
        offload = {f"offload_{ours}": where[(zero.get(f"offload_{theirs}") or {}).get("device", "none")]
                   for ours, theirs in (("optimizer", "optimizer"), ("parameters", "param"))}
        return cls(dtype, config.optimizer, config.master if dtype == "bf16" else "fp32", config.in_backward, config.gradient_checkpointing,
                   config.activation_offload, settings is not None, Zero.of(settings) if settings else Zero(), **offload)

    @property
    def weight_bytes(self) -> int:
        return 2 if self.dtype == "bf16" else 4

    @property
    def master_bytes(self) -> int:
        return 4 if self.zero3 or (self.dtype == "bf16" and self.master == "fp32") else 0       # DeepSpeed has a copy for fp32 passes too

    @property
    def state_bytes_per_parameter(self) -> float:
        """Weights, gradients, master and moments, wherever they are."""
        gradients = 0 if self.in_backward else self.zero.gradient_bytes if self.zero3 else self.weight_bytes
        return self.weight_bytes + gradients + self.master_bytes + MOMENT_BYTES[self.optimizer]

    def step_tensors(self, on_cpu: bool = False) -> int:
        """fp32 copies of a tensor while it is stepped: its gradient, and what Adam or the rounding needs beside it.

        bitsandbytes has one kernel on a GPU; on the CPU it is written out, with both moments in fp32.
        """
        stochastic = self.master == "stochastic" and self.dtype == "bf16"
        adam = {"adamw": 2, "fused": 0, "adamw8bit": 5 if on_cpu else 0}[self.optimizer]
        return 1 + max(adam + stochastic, 2 * stochastic)

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
    plain = [replace(p, zero3=world > 1) for p in (one, eight)]
    steps = plain + [replace(p, gradient_checkpointing=True) for p in plain]
    if world == 1:
        masters = replace(eight, in_backward=True)
        rounded = replace(masters, master="stochastic")
        for p in (masters, rounded) if dtype == "bf16" else (masters,):
            steps += [p, replace(p, gradient_checkpointing=True)]
    last = replace(one, zero3=True, gradient_checkpointing=True)
    for host in ("host", "disk"):
        steps += [replace(last, offload_optimizer=host), replace(last, offload_optimizer=host, offload_parameters=host)]
    last = steps[-1]
    return steps + [replace(last, gradient_checkpointing=False, activation_offload=True)]


@dataclass(frozen=True)
class Need:
    """Bytes per rank of one policy; `host` and `disk` over all ranks of a machine.

    state: weights, gradients, master, moments that are on the card. working: the most that exists beside the state; less than the
    activations where they are gone before the gradients have all come. gpu: all of it, with the reserve.
    """

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


def need(cost: Pass, policy: Policy, world: int, card: Card = H200, on_cpu: bool = False, passes: int = 1) -> Need:
    """Of one rank of `world`, given the pass it runs, so many times a step."""
    P, share = cost.parameters, world if policy.zero3 else 1
    w, moments = policy.weight_bytes, MOMENT_BYTES[policy.optimizer]
    optimizer = policy.master_bytes + moments
    resident = w * (policy.offload_parameters == "none") + optimizer * (policy.offload_optimizer == "none")
    state = round(resident * P / share)
    zero = policy.zero
    if policy.zero3:
        gathered = 0 if world == 1 and policy.offload_parameters == "none" else w * min(P, zero.live + cost.largest_block)
        bucket = (w + zero.sent_bytes) * min(P, max(zero.bucket, max(cost.sizes)))        # and its copy in the format it is sent in
        gradients = 0 if policy.offload_optimizer != "none" else round(zero.gradient_bytes * P / share)
        step = 4 * (1 + policy.step_tensors(on_cpu)) * min(P // share, zero.group + max(cost.sizes) // share)
        working = max(cost.peak + gathered + bucket, step * (policy.offload_optimizer == "none"))
    elif policy.in_backward:
        gradients, working = 0, cost.peak
    else:
        gradients = w * P
        norms = 4 * max(cost.sizes) * (w < 4)                        # of fp32 copies, one at a time
        working = max(cost.peak_with_gradients - gradients if passes == 1 else cost.peak, norms,
                      _stepping(cost.sizes, w, 4 * policy.step_tensors(on_cpu)) - gradients)
    host = disk = 0
    for what, where in ((policy.master_bytes + moments + zero.gradient_bytes, policy.offload_optimizer), (w, policy.offload_parameters)):
        host += round(what * P) * (where == "host")
        disk += round(what * P) * (where == "disk")
    if disk:
        host += min(DISK_STAGING * world, disk)
    host += cost.offloaded * world
    reserve = 0 if on_cpu else GPU_RESERVE
    return Need(state + gradients, cost.activations, working, state + gradients + working + reserve, host, disk,
                _seconds(cost, policy, world, share, card, passes))


def _stepping(sizes: tuple[int, ...], gradient_bytes: int, beside_bytes: int) -> int:
    """The most while parameters are stepped one by one: the gradients that are left, and what the step of one needs."""
    left, most = gradient_bytes * sum(sizes), 0
    for size in sizes:
        most = max(most, left + beside_bytes * size)
        left -= gradient_bytes * size
    return most


def _seconds(cost: Pass, policy: Policy, world: int, share: int, card: Card, passes: int) -> dict[str, float]:
    P, w = cost.parameters, policy.weight_bytes
    parts = {"pass": passes * cost.seconds, "links": 0.0, "host link": passes * 2 * cost.offloaded / card.host_link_per_s, "optimizer": 0.0}
    if policy.zero3:                  # gathered forwards, gathered backwards, gradients scattered
        parts["links"] = passes * (2 * w + policy.zero.sent_bytes) * P * (world - 1) / world / card.links_per_s
    if policy.offload_parameters != "none":
        parts["host link"] += passes * 2 * w * P / share / card.host_link_per_s
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
    short = f"{what.gpu / GB:.1f} GB for each rank (state {what.state / GB:.1f}, activations {what.activations / GB:.1f})"
    if what.host:
        short += f" and {what.host / GB:.0f} GB of host memory"
    if host_bytes is not None:
        machine += f" with {host_bytes / GB:.0f} GB of host memory"
    ways = []
    if here := best(measure, world, gpu_bytes, host_bytes, policy.dtype):
        ways.append(f"{here[0]} ({here[1].gpu / GB:.1f} GB)")
    if gpu_bytes is not None:
        worlds = [n for n in WORLDS if n > world]
        if not policy.in_backward and policy.master == "fp32":
            spread = replace(policy, zero3=True)
            more = next(((n, spread) for n in worlds if fits(measure(spread, n), gpu_bytes, host_bytes)), None)
        else:                                                    # which ZeRO-3 cannot: what it can
            more = next(((n, found[0]) for n in worlds if (found := best(measure, n, gpu_bytes, host_bytes, policy.dtype))), None)
        larger = next((size for size in CARDS if size > gpu_bytes and fits(what, size, host_bytes)), None)
        ways += [f"{more[0]} GPUs ({more[1]})"] if more else []
        ways += [f"a card of {larger / GB:.0f} GB"] if larger else []
    nearest = "nearest that fits: " + ", or ".join(ways) if ways else "nothing here fits it"
    return OutOfMemory(f"{stage}: {policy} needs {short}, which {machine} cannot hold; {nearest}")
