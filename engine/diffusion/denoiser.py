"""From a network's raw output to the clean video it means: D(z_s, s, ...) of the paper's Eq. 1.

A network may predict v (the paper's cascade), eps or x0. With z = gamma x0 + sigma eps and v = gamma eps - sigma x0, any one of the
three gives the other two. On the way: classifier-free guidance (weight 1 = off) and thresholding. All of it at least in float32, whatever
the network uses.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from engine.diffusion.schedule import CosineSchedule, at_least_float32, spread

PREDICTIONS = ("v", "eps", "x0")


def to_x0(output: Tensor, z: Tensor, time: Tensor | float, schedule: CosineSchedule, prediction: str) -> Tensor:
    """The clean video a raw output stands for.

    Shapes: output, z [B, T, H, W, C] -> same; time a float, [B] or [B, T]. An eps prediction says nothing about x0 at time 1: there the
    division is by exp(logsnr_min / 2), not by 0, so the result is large and finite (threshold it).
    Source: Salimans & Ho 2022 (v-prediction), as in Imagen Video.
    """
    output, z, gamma, sigma = _prepare(output, z, time, schedule, prediction)
    if prediction == "v":
        return gamma * z - sigma * output
    if prediction == "eps":
        return (z - sigma * output) / gamma.clamp(min=math.exp(schedule.logsnr_min / 2))
    return output


def to_eps(output: Tensor, z: Tensor, time: Tensor | float, schedule: CosineSchedule, prediction: str) -> Tensor:
    """The noise a raw output stands for; shapes as in to_x0. An x0 prediction says nothing about eps at time 0 (finite, as above)."""
    output, z, gamma, sigma = _prepare(output, z, time, schedule, prediction)
    if prediction == "v":
        return sigma * z + gamma * output
    if prediction == "x0":
        return (z - gamma * output) / sigma.clamp(min=math.exp(-schedule.logsnr_max / 2))
    return output


def target(x0: Tensor, eps: Tensor, time: Tensor | float, schedule: CosineSchedule, prediction: str) -> Tensor:
    """What a network of this kind should have answered for z = gamma x0 + sigma eps; shapes as in to_x0."""
    x0, eps, gamma, sigma = _prepare(x0, eps, time, schedule, prediction)
    if prediction == "v":
        return gamma * eps - sigma * x0
    return eps if prediction == "eps" else x0


def _prepare(a: Tensor, b: Tensor, time, schedule: CosineSchedule, prediction: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction: want one of {PREDICTIONS}, got {prediction!r}")
    if a.shape != b.shape:
        raise ValueError(f"want two tensors of one shape, got {[*a.shape]} and {[*b.shape]}")
    a, b = at_least_float32(a), at_least_float32(b)
    return a, b, spread(schedule.gamma(time), b), spread(schedule.sigma(time), b)


def static_threshold(x0: Tensor) -> Tensor:
    """x0 clipped to the range of videos, [-1, 1]."""
    return x0.clamp(-1, 1)


def dynamic_threshold(x0: Tensor, percentile: float = 0.995) -> Tensor:
    """Per sample: s = this percentile of |x0|, at least 1; clip to [-s, s] and divide by s. Keeps high guidance from saturating.

    Shapes: x0 [B, T, H, W, C] -> same. s looks at the whole sample: chunks of one video would each get their own, so sample it whole.
    Source: Imagen, arXiv 2205.11487; the percentile from its Fig. A.10.
    """
    if not 0 < percentile <= 1:
        raise ValueError(f"percentile: want a number in (0, 1], got {percentile}")
    size = x0[0].numel()
    rank = 1 + math.ceil(percentile * (size - 1))     # kthvalue, because torch.quantile refuses more than 2**24 values
    s = at_least_float32(x0).abs().flatten(1).kthvalue(rank, dim=1).values.clamp(min=1)
    s = spread(s, x0)
    return x0.clamp(-s, s) / s


THRESHOLDS: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda x0: x0, "static": static_threshold, "dynamic": dynamic_threshold}


def guide(cond: Tensor, uncond: Tensor, weight: float) -> Tensor:
    """Classifier-free guidance, w c + (1 - w) u. Weight 1 is off; Imagen Video's own w is this one minus 1.

    Source: Ho & Salimans 2022, in the convention of Imagen and of the paper, whose weight is 1 throughout (App. A).
    """
    return weight * cond + (1 - weight) * uncond


def guidance_schedule(weight: float, oscillating: int | None = None) -> Callable[[int], float]:
    """The guidance weight as a function of the sampler's step (0 at time 1).

    oscillating=None: constant. oscillating=n: weight for the first n steps, then 1, weight, 1, weight, ...: starting low, because starting
    high would only be one more constant step.
    Source: Imagen Video (15 and 1, in its base and first two spatial super-resolution models).
    """
    if oscillating is None:
        return lambda step: weight
    if oscillating < 0:
        raise ValueError(f"oscillating: want None or a number of initial steps >= 0, got {oscillating}")
    return lambda step: weight if step < oscillating or (step - oscillating) % 2 else 1.0


class Denoiser:
    """A network made into what samplers call: (z, time, step) -> x0.

    network(z, time): z [B, T, H, W, C], time [B] on z's device, float32 -> raw output like z, in any floating dtype.
    unconditional: the same without the prompt; it is called only at steps whose guidance weight is not 1.
    guidance: a weight, or a function of the step.
    threshold: "static", "dynamic", "none" or a function x0 -> x0. Everything but the two networks runs at least in float32.
    Raises: ValueError for an unknown prediction or threshold, and for guidance that is not 1 without an unconditional network.
    """

    def __init__(self, network: Callable[[Tensor, Tensor], Tensor], schedule: CosineSchedule, prediction: str = "v", *,
                 unconditional: Callable[[Tensor, Tensor], Tensor] | None = None, guidance: float | Callable[[int], float] = 1.0,
                 threshold: str | Callable[[Tensor], Tensor] = "static"):
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction: want one of {PREDICTIONS}, got {prediction!r}")
        if not callable(threshold) and threshold not in THRESHOLDS:
            raise ValueError(f"threshold: want one of {tuple(THRESHOLDS)} or a function, got {threshold!r}")
        self.network, self.unconditional, self.schedule, self.prediction = network, unconditional, schedule, prediction
        self.guidance = guidance if callable(guidance) else guidance_schedule(guidance)
        self.threshold = threshold if callable(threshold) else THRESHOLDS[threshold]

    def __call__(self, z: Tensor, time: float, step: int = 0) -> Tensor:
        z = at_least_float32(z)
        times = torch.full((len(z),), time, dtype=torch.float32, device=z.device)
        output = at_least_float32(self.network(z, times))
        weight = self.guidance(step)
        if weight != 1:
            if self.unconditional is None:
                raise ValueError(f"guidance: weight {weight} at step {step} wants an unconditional network, got none")
            output = guide(output, at_least_float32(self.unconditional(z, times)), weight)
        return self.threshold(to_x0(output, z, time, self.schedule, self.prediction))
