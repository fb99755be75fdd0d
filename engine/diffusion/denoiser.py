"""From a network's raw output to the clean video it means: D(z_s, s, ...) of the paper's Eq. 1.

A network may predict v (the paper's cascade), eps or x0. With z = gamma x0 + sigma eps and v = gamma eps - sigma x0, any one of the three gives
the other two. On the way: classifier-free guidance (weight 1 = off) and thresholding. All of it at least in float32, whatever the network uses.
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
    Source: Salimans & Ho 2022 (v-prediction), Imagen Video Sec. 2.
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
