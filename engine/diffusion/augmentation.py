"""Noise-conditioning augmentation: a super-resolution stage sees its conditioning video through some noise, and is told how much.

Trained with random amounts and sampled at a fixed one, a stage learns to correct the stage before it instead of trusting every pixel.
"""

import math

from torch import Tensor

from engine.diffusion.schedule import COSINE, CosineSchedule, add_noise


def augment(lowres: Tensor, aug_level: Tensor | float, eps: Tensor, schedule: CosineSchedule = COSINE) -> Tensor:
    """The conditioning video at noise level aug_level, a time of the schedule: variance preserving, like z_s.

    Shapes: lowres, eps [B, T, H, W, C] -> same; aug_level a float or [B] in [0, 1]. Level 0 returns the input, bit for bit.
    Source: Ho et al. 2022 (cascaded diffusion); Imagen Fig. A.32; Imagen Video.
    """
    if not isinstance(aug_level, Tensor) and aug_level == 0:
        return lowres
    return add_noise(lowres, eps, aug_level, schedule)


def aug_level_from_snr(snr: float, schedule: CosineSchedule = COSINE) -> float:
    """The level at which gamma^2 / sigma^2 = snr. Imagen Video samples at 3 or 5: levels 1/3 and 0.268 without a shift."""
    if not snr > 0:
        raise ValueError(f"snr: want a number above 0, got {snr}")
    return float(schedule.time_from_logsnr(math.log(snr)))
