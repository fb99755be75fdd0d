"""From noise, or from a noisy video, to a video (paper Sec. 3, "Sampling from Diffusion Models"; Sec. 4.1 starts in the middle).

Times lie on a grid t_i = i / steps. Every method here moves from t_i to t_{i-1} by
    z <- keep * z + video * x0 + fresh * noise
with three numbers per step, computed in float64 by the functions below, and answers x0 itself at the last step. The paper's method is
"stochastic_ddim": "we then remove a fraction of the estimated noise and finally add randomly generated Gaussian noise, with magnitude
corresponding to half of the removed noise".
"""

import math
from collections.abc import Callable

from torch import Tensor

from engine.diffusion.schedule import COSINE, CosineSchedule, at_least_float32

METHODS = ("stochastic_ddim", "ddim", "ancestral")


def start_index(start: float, steps: int) -> int:
    """The grid index where sampling begins: round(start * steps), which is also the number of steps to run.

    The noise to begin from is that of time start_index(start, steps) / steps, not of start: between two grid times they differ.
    """
    if steps < 1:
        raise ValueError(f"steps: want at least 1, got {steps}")
    if not 0 <= start <= 1:
        raise ValueError(f"start: want a time in [0, 1], got {start}")
    return round(start * steps)


def sample(denoise: Callable[[Tensor, float, int], Tensor], z: Tensor, *, schedule: CosineSchedule, steps: int,
           noise: Callable[[int], Tensor] | None = None, start: float = 1.0, method: str = "stochastic_ddim",
           ancestral_gamma: float = 0.0, on_step: Callable[[int, Tensor], None] | None = None) -> Tensor:
    """Samples the video that z is a noisy version of.

    Shapes: z [B, T, H, W, C] -> x0, same, at least float32. z carries the noise of time start_index(start, steps) / steps: pure noise for
    start 1; start 0 returns z as it is.
    denoise(z, time, step) -> x0, for example a Denoiser. step counts along the whole grid: it is 0 at time 1 and steps - 1 at
    time 1 / steps, so a later start enters later; noise and guidance thus belong to times, whatever the start.
    noise(step): fresh normal noise like z, asked for only where a step adds some (never by "ddim", never at the last step).
    on_step(step, x0): called after each estimate.
    ancestral_gamma: 0 for the lower bound of the reverse variance, 1 for the upper one.
    Source: "stochastic_ddim": Imagen Video, after Karras et al. 2022 and Meng et al. 2022; "ddim": Song et al. 2021;
    "ancestral": Imagen Eq. 6.
    """
    if method not in METHODS:
        raise ValueError(f"method: want one of {METHODS}, got {method!r}")
    if not 0 <= ancestral_gamma <= 1:
        raise ValueError(f"ancestral_gamma: want a number in [0, 1], got {ancestral_gamma}")
    first = start_index(start, steps)
    if noise is None and method != "ddim" and first > 1:
        raise ValueError(f"noise: method {method!r} wants a function step -> noise, got None")
    if first == 0:
        return z
    z = at_least_float32(z)
    for index in range(first, 0, -1):
        step = steps - index
        x0 = at_least_float32(denoise(z, index / steps, step))
        if on_step is not None:
            on_step(step, x0)
        if index == 1:
            return x0
        keep, video, fresh = _coefficients(method, index, steps, schedule, ancestral_gamma)
        z = (x0 * video).add_(z, alpha=keep)
        if fresh:
            z.add_(noise(step).to(z), alpha=fresh)


def stochastic_ddim_coefficients(t: float, n: int, schedule: CosineSchedule = COSINE) -> tuple[float, float, float]:
    """One step of the n-step stochastic DDIM from t, on the grid: z_{s1} = gamma_{s1} x0 + c_d eps + c_n noise -> (gamma_{s1}, c_d, c_n).

    Down twice the step by deterministic DDIM, s2 = t - 2/n, then back up to s1 = t - 1/n by the forward process q(z_{s1} | z_{s2}).
    eps is the estimated noise, of which c_d is left; c_d^2 + c_n^2 = sigma_{s1}^2. Where s2 would be below 0 the answer is x0: (1, 0, 0).
    """
    index = round(t * n)
    if not (1 <= index <= n and math.isclose(index, t * n, rel_tol=1e-9)):
        raise ValueError(f"t: want one of 1/{n}, 2/{n}, ..., 1, got {t}")
    if index == 1:
        return 1.0, 0.0, 0.0
    gamma_s1, sigma_s1 = _gamma_sigma((index - 1) / n, schedule)
    gamma_s2, sigma_s2 = _gamma_sigma((index - 2) / n, schedule)
    c_d = gamma_s1 / gamma_s2 * sigma_s2
    return gamma_s1, c_d, math.sqrt(max(sigma_s1**2 - c_d**2, 0.0))      # max: both equal where a shifted schedule is clipped


def _coefficients(method: str, index: int, steps: int, schedule: CosineSchedule, ancestral_gamma: float) -> tuple[float, float, float]:
    """(keep, video, fresh) from time index / steps to the one before, for index >= 2; estimated noise is written (z - gamma x0) / sigma."""
    gamma_t, sigma_t = _gamma_sigma(index / steps, schedule)
    gamma_s, sigma_s = _gamma_sigma((index - 1) / steps, schedule)
    if method == "ddim":
        return sigma_s / sigma_t, gamma_s - sigma_s / sigma_t * gamma_t, 0.0
    if method == "stochastic_ddim":
        _, c_d, c_n = stochastic_ddim_coefficients(index / steps, steps, schedule)
        return c_d / sigma_t, gamma_s - c_d / sigma_t * gamma_t, c_n
    ratio = gamma_t * sigma_s / (sigma_t * gamma_s)       # sqrt(e^{logsnr_t - logsnr_s}), finite and 0 at time 1
    lower, upper = (1 - ratio**2) * sigma_s**2, (1 - ratio**2) * sigma_t**2
    return ratio * sigma_s / sigma_t, (1 - ratio**2) * gamma_s, math.sqrt(lower ** (1 - ancestral_gamma) * upper**ancestral_gamma)


def _gamma_sigma(time: float, schedule: CosineSchedule) -> tuple[float, float]:
    return float(schedule.gamma(time)), float(schedule.sigma(time))
