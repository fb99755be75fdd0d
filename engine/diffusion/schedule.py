"""How much video and how much noise there is at each time (paper Sec. 3): z_s = gamma_s v + sigma_s eps, gamma^2 + sigma^2 = 1.

The paper takes its schedule from Imagen Video: cosine in continuous time, gamma = cos(pi t / 2), sigma = sin(pi t / 2). Everything here is
written through logsnr = log(gamma^2 / sigma^2), where "simple diffusion" adds a shift for larger pictures (0 in Imagen Video).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """x itself when it is float32 or float64, else a float32 copy: sums of video and noise are never taken in 16 bits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def spread(coefficient: Tensor, video: Tensor) -> Tensor:
    """A coefficient per sample [B], per frame [B, T] or for all [] -> shaped to multiply video [B, T, H, W, C], on its dtype and device.

    Raises: ValueError if its axes are not the video's first ones.
    """
    if coefficient.shape != video.shape[: coefficient.ndim]:
        raise ValueError(f"time: want [], [B] or [B, T] of a video {[*video.shape]}, got {[*coefficient.shape]}")
    return coefficient.to(video).reshape(coefficient.shape + (1,) * (video.ndim - coefficient.ndim))


@dataclass(frozen=True)
class CosineSchedule:
    """The cosine schedule with a shift in logSNR. Times are in [0, 1] (the paper's s): 0 is the video, 1 is pure noise.

    The ends are exact for every shift: gamma(0) = sigma(1) = 1 and sigma(0) = gamma(1) = 0, so that "s = 1 replaces the video by noise"
    and "s = 0 adds none" (Sec. 4.1) hold to the last bit. logsnr would be infinite there and is clipped to [logsnr_min, logsnr_max]; gamma
    and sigma follow the clipped value on the open interval and leave it at the two ends. With a clipped gamma at time 1 the input would
    still shine through by exp(logsnr_min / 2).

    Methods take a float or a Tensor of any shape (tensors outside [0, 1] saturate), compute in float64 and return the tensor's own dtype,
    at least float32; a float gives a float64 scalar tensor, which does not widen the tensors it multiplies.
    Source: Imagen Video, arXiv 2210.02303; the shift: Hoogeboom et al. 2023, arXiv 2301.11093.
    """

    logsnr_shift: float = 0.0
    logsnr_min: float = -20.0
    logsnr_max: float = 20.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.logsnr_shift) and self.logsnr_min < 0 < self.logsnr_max):
            raise ValueError(f"CosineSchedule: want a finite logsnr_shift and logsnr_min < 0 < logsnr_max, got {self}")

    def logsnr(self, time: Tensor | float) -> Tensor:
        """log(gamma^2 / sigma^2), clipped, finite everywhere."""
        t, dtype = _float64(time, "time", 0, 1)
        return self._logsnr64(t).to(dtype)

    def gamma(self, time: Tensor | float) -> Tensor:
        """The video's share of z: 1 at time 0, 0 at time 1."""
        t, dtype = _float64(time, "time", 0, 1)
        return _exact_ends(self._logsnr64(t).sigmoid().sqrt(), t, at_0=1.0, at_1=0.0).to(dtype)

    def sigma(self, time: Tensor | float) -> Tensor:
        """The noise's share of z: 0 at time 0, 1 at time 1."""
        t, dtype = _float64(time, "time", 0, 1)
        return _exact_ends((-self._logsnr64(t)).sigmoid().sqrt(), t, at_0=0.0, at_1=1.0).to(dtype)

    def time_from_sigma(self, sigma: Tensor | float) -> Tensor:
        """The time at which the noise has this share, sigma in [0, 1]."""
        s, dtype = _float64(sigma, "sigma", 0, 1)
        angle = torch.atan2(s * math.exp(self.logsnr_shift / 2), ((1 - s) * (1 + s)).sqrt())
        return _exact_ends(angle * 2 / math.pi, s, at_0=0.0, at_1=1.0).to(dtype)

    def time_from_logsnr(self, logsnr: Tensor | float) -> Tensor:
        """The time at which logsnr (not yet clipped) has this value; -inf and inf give 1 and 0."""
        x, dtype = _float64(logsnr, "logsnr", -math.inf, math.inf)
        return (torch.exp((self.logsnr_shift - x) / 2).atan() * 2 / math.pi).clamp(0, 1).to(dtype)

    def _logsnr64(self, t: Tensor) -> Tensor:
        return (self.logsnr_shift - 2 * torch.log(torch.tan(t * (math.pi / 2)))).clamp(self.logsnr_min, self.logsnr_max)


COSINE = CosineSchedule()     # Imagen Video's, and so the paper's: no shift


def add_noise(video: Tensor, eps: Tensor, time: Tensor | float, schedule: CosineSchedule) -> Tensor:
    """The noisy video z_s = gamma_s v + sigma_s eps.

    Shapes: video, eps [B, T, H, W, C] -> same, at least float32; time a float, [B] or per frame [B, T].
    Source: paper Sec. 3; with s chosen by the user, the degradation of Sec. 4.1.
    """
    if video.shape != eps.shape:
        raise ValueError(f"eps: want the video's shape {[*video.shape]}, got {[*eps.shape]}")
    video = at_least_float32(video)
    return spread(schedule.gamma(time), video) * video + spread(schedule.sigma(time), video) * eps.to(video)


def _float64(x: Tensor | float, name: str, low: float, high: float) -> tuple[Tensor, torch.dtype]:
    if isinstance(x, Tensor):     # not checked value by value: that would stop the device at every call
        return x.double().clamp(low, high), torch.promote_types(x.dtype, torch.float32)
    if not low <= x <= high:
        raise ValueError(f"{name}: want a number in [{low}, {high}], got {x}")
    return torch.tensor(x, dtype=torch.float64), torch.float64


def _exact_ends(inside: Tensor, position: Tensor, at_0: float, at_1: float) -> Tensor:
    return inside.masked_fill(position <= 0, at_0).masked_fill(position >= 1, at_1)
