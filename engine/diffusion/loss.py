"""The denoising loss, the paper's Eq. 1, in the space of x, v or eps.

Eq. 1 is a squared error on the clean video. A v-network's own squared error is another weighting of the same thing:
    ||x - x^||^2 = sigma^2 ||v - v^||^2 = (sigma^2 / gamma^2) ||eps - eps^||^2
so the network's raw output is compared with its own target and the result weighted by time: no conversion of large tensors is needed.
"""

import math

from torch import Tensor

from engine.diffusion.denoiser import target
from engine.diffusion.schedule import CosineSchedule, at_least_float32

LOSS_SPACES = ("x", "v", "eps")


def diffusion_loss(output: Tensor, x0: Tensor, eps: Tensor, time: Tensor | float, schedule: CosineSchedule, prediction: str = "v",
                   loss_space: str = "x", weights: Tensor | None = None) -> Tensor:
    """Mean squared error of a network's raw output, measured in loss_space.

    Shapes: output, x0, eps [B, T, H, W, C]; time a float or [B] -> one loss per sample [B]; time [B, T] -> one per frame [B, T].
    weights, of that shape: returns the scalar sum(weights * loss) instead, so [alpha, 1 - alpha] is Eq. 4 on a batch [clip, its frames].
    Losses that diverge at an end of time (x from an eps-network at 1, eps from an x0-network at 0) stop at the schedule's logsnr clip.
    Raises: ValueError for an unknown loss_space or prediction, or shapes that do not fit.
    Source: paper Eq. 1; the identities follow from z = gamma x + sigma eps, v = gamma eps - sigma x.
    """
    if loss_space not in LOSS_SPACES:
        raise ValueError(f"loss_space: want one of {LOSS_SPACES}, got {loss_space!r}")
    if output.shape != x0.shape:
        raise ValueError(f"output: want the video's shape {[*x0.shape]}, got {[*output.shape]}")
    wanted = target(x0, eps, time, schedule, prediction)
    kept = max(time.ndim, 1) if isinstance(time, Tensor) else 1
    error = (at_least_float32(output) - wanted).square().flatten(kept).mean(-1)
    loss = error * error_weight(time, schedule, prediction, loss_space).to(error)
    if weights is None:
        return loss
    if weights.shape != loss.shape:
        raise ValueError(f"weights: want {[*loss.shape]}, one per loss, got {[*weights.shape]}")
    return (weights.to(loss) * loss).sum()


def error_weight(time: Tensor | float, schedule: CosineSchedule, prediction: str, loss_space: str) -> Tensor:
    """The factor, shaped like time, from a squared error in the network's own space to one in loss_space."""
    gamma2, sigma2 = schedule.gamma(time).square(), schedule.sigma(time).square()
    gamma2_floor, sigma2_floor = gamma2.clamp(min=math.exp(schedule.logsnr_min)), sigma2.clamp(min=math.exp(-schedule.logsnr_max))
    own = {"x0": "x"}.get(prediction, prediction)
    return {
        ("v", "x"): sigma2,
        ("v", "eps"): gamma2,
        ("eps", "x"): sigma2 / gamma2_floor,
        ("eps", "v"): 1 / gamma2_floor,
        ("x", "v"): 1 / sigma2_floor,
        ("x", "eps"): gamma2 / sigma2_floor,
    }.get((own, loss_space), gamma2 * 0 + 1)
