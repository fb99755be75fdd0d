"""The samplers against closed forms, without Monte Carlo.

On data N(mu, s^2 I) the best denoiser E[x0 | z] is affine, so a whole sampling run is an affine map of its starting point and its noises.
One run over a vector of elements (all zeros; one in z; one in the noise of step k) reads that map off, and with it mean and variance.
"""

import math

import pytest
import torch

from engine.diffusion.sampler import METHODS, sample, start_index, stochastic_ddim_coefficients
from engine.diffusion.schedule import CosineSchedule

MU, S2 = 0.3, 0.16
CASES = [("stochastic_ddim", 0.0), ("ddim", 0.0), ("ancestral", 0.0), ("ancestral", 0.4), ("ancestral", 1.0)]


def gaussian_gain(gamma, sigma):
    return gamma * S2 / (gamma**2 * S2 + sigma**2)


def gaussian_denoiser(schedule):
    def denoise(z, time, step):
        gamma, sigma = schedule.gamma(time).item(), schedule.sigma(time).item()
        return MU + gaussian_gain(gamma, sigma) * (z - gamma * MU)
    return denoise


def sampled_mean_and_variance(method, ancestral_gamma, steps, start, schedule):
    z = torch.zeros(steps + 2, dtype=torch.float64)
    z[1] = 1
    noise = lambda step: torch.nn.functional.one_hot(torch.tensor(step + 2), steps + 2).double()      # noqa: E731
    out = sample(gaussian_denoiser(schedule), z.reshape(-1, 1, 1, 1, 1), schedule=schedule, steps=steps, start=start, method=method,
                 ancestral_gamma=ancestral_gamma, noise=lambda step: noise(step).reshape(-1, 1, 1, 1, 1)).flatten()
    offset, gains = out[0], out[1:] - out[0]
    begin = round(start * steps) / steps
    gamma, sigma = schedule.gamma(begin).item(), schedule.sigma(begin).item()
    return (offset + gains[0] * gamma * MU).item(), (gains[0] ** 2 * (gamma**2 * S2 + sigma**2) + gains[1:].square().sum()).item()


def closed_form_mean_and_variance(method, ancestral_gamma, steps, start, shift):
    """The definitions as published, on mean and variance: z_s = a z + b x0(z) + noise of variance n, x0(z) = MU + gain (z - gamma MU)."""
    def alpha_sigma(i):
        logsnr = -2 * math.log(math.tan(math.pi / 2 * (i / steps))) + shift if i else math.inf
        return 1 / math.sqrt(1 + math.exp(-logsnr)), 1 / math.sqrt(1 + math.exp(logsnr)) if i else 0.0

    first = round(start * steps)
    alpha_t, sigma_t = alpha_sigma(first)
    mean, variance = alpha_t * MU, alpha_t**2 * S2 + sigma_t**2
    for i in range(first, 0, -1):
        alpha_t, sigma_t = alpha_sigma(i)
        alpha_s, sigma_s = alpha_sigma(i - 1)
        if i == 1:
            a, b, n = 0.0, 1.0, 0.0
        elif method == "ddim":
            a, b, n = sigma_s / sigma_t, alpha_s - sigma_s / sigma_t * alpha_t, 0.0
        elif method == "stochastic_ddim":    # down to s2 by DDIM, up by q(z_s | z_s2) = N((alpha_s/alpha_2) z, (1 - e^{l_s-l_2}) sigma_s^2)
            alpha_2, sigma_2 = alpha_sigma(i - 2)
            up = alpha_s / alpha_2
            a, b = up * sigma_2 / sigma_t, up * (alpha_2 - sigma_2 / sigma_t * alpha_t)
            n = (1 - (alpha_s * sigma_2 / (alpha_2 * sigma_s)) ** 2) * sigma_s**2
        else:
            e = (alpha_t / sigma_t) ** 2 / (alpha_s / sigma_s) ** 2
            a, b = e * alpha_s / alpha_t, (1 - e) * alpha_s
            n = ((1 - e) * sigma_s**2) ** (1 - ancestral_gamma) * ((1 - e) * sigma_t**2) ** ancestral_gamma
        gain = gaussian_gain(alpha_t, sigma_t)
        mean, variance = (a + b * gain) * mean + b * (1 - gain * alpha_t) * MU, (a + b * gain) ** 2 * variance + n
    return mean, variance


@pytest.mark.parametrize("method, ancestral_gamma", CASES)
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8, 13, 64])
@pytest.mark.parametrize("start", [0.3, 0.5, 0.85, 1.0])
@pytest.mark.parametrize("shift", [0.0, -1.5])
def test_follows_the_closed_form(method, ancestral_gamma, steps, start, shift):
    if round(start * steps) == 0:
        start = 1 / steps
    mean, variance = sampled_mean_and_variance(method, ancestral_gamma, steps, start, CosineSchedule(shift))
    wanted_mean, wanted_variance = closed_form_mean_and_variance(method, ancestral_gamma, steps, start, shift)
    assert mean == pytest.approx(wanted_mean, abs=1e-9)
    assert variance == pytest.approx(wanted_variance, abs=1e-9)


@pytest.mark.parametrize("method, ancestral_gamma", CASES)
@pytest.mark.parametrize("start", [0.5, 1.0])
def test_converges_to_the_data(method, ancestral_gamma, start):
    errors = []
    for steps in (8, 16, 32, 64, 128, 256):
        mean, variance = sampled_mean_and_variance(method, ancestral_gamma, steps, start, CosineSchedule())
        assert mean == pytest.approx(MU, abs=1e-9)       # these denoisers keep the mean exactly
        errors.append(abs(variance - S2) / S2)
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.04, errors
    assert 0.4 < errors[-1] / errors[-2] < 0.6, errors       # first order: what is left goes to 0 with the step, not to a bias
    assert abs(2 * errors[-1] - errors[-2]) < 0.005, errors


def test_stochastic_ddim_coefficients():
    schedule = CosineSchedule()
    ratios = []
    for i in range(8, 1, -1):
        gamma, c_d, c_n = stochastic_ddim_coefficients(i / 8, 8, schedule)
        sigma = schedule.sigma((i - 1) / 8).item()
        assert gamma == schedule.gamma((i - 1) / 8).item()
        assert c_d**2 + c_n**2 == pytest.approx(sigma**2, rel=1e-14)
        ratios.append(round(c_n / sigma, 2))
    assert ratios == [0.88, 0.78, 0.74, 0.74, 0.78, 0.88, 1.0]
    assert stochastic_ddim_coefficients(2 / 8, 8)[1] == 0
    assert stochastic_ddim_coefficients(1 / 8, 8) == (1, 0, 0)


@pytest.mark.parametrize("method", METHODS)
def test_start_0_returns_the_input(method):
    z = torch.randn(1, 2, 3, 4, 3)
    never = lambda *_: pytest.fail("called")      # noqa: E731
    assert sample(never, z, schedule=CosineSchedule(), steps=8, start=0.0, method=method, noise=never) is z


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps, start, indices", [(8, 1.0, 8), (8, 0.5, 4), (4, 0.85, 3), (10, 0.24, 2), (1, 1.0, 1)])
def test_visits_the_grid_and_asks_for_noise_only_when_needed(method, steps, start, indices):
    visited, drawn, reported = [], [], []
    z = torch.randn(1, 2, 3, 4, 3)
    before = z.clone()

    def denoise(z, time, step):
        visited.append((time, step))
        return z * 0.5

    def noise(step):
        drawn.append(step)
        return torch.randn_like(z)

    out = sample(denoise, z, schedule=CosineSchedule(), steps=steps, start=start, method=method, noise=noise,
                 on_step=lambda step, x0: reported.append((step, x0)))
    assert start_index(start, steps) == indices
    assert visited == [(i / steps, steps - i) for i in range(indices, 0, -1)]
    assert drawn == ([] if method == "ddim" else [step for _, step in visited[:-1]])
    assert [step for step, _ in reported] == [step for _, step in visited]
    assert out.equal(reported[-1][1])      # the last step returns x0
    assert z.equal(before)


@pytest.mark.parametrize("method", METHODS)
def test_a_perfect_denoiser_is_believed(method):
    x0 = torch.randn(1, 2, 3, 4, 3)
    z = torch.randn_like(x0)
    assert sample(lambda *_: x0, z, schedule=CosineSchedule(), steps=7, method=method, noise=lambda step: torch.randn_like(z)).equal(x0)


@pytest.mark.parametrize("method", METHODS)
def test_keeps_the_noise_level(method):
    """With x0 known, z at every grid time is gamma x0 plus noise of exactly sigma, for every method (ancestral: at its lower bound)."""
    schedule, steps, seen = CosineSchedule(0.5), 6, {}
    z = torch.zeros(steps + 1, 1, 1, 1, 1, dtype=torch.float64)
    z[0] = 1

    def noise(step):
        return torch.nn.functional.one_hot(torch.tensor(step + 1), steps + 1).double().reshape(z.shape)

    def denoise(z, time, step):
        seen[time] = z.square().sum().item()
        return torch.zeros_like(z)

    sample(denoise, z, schedule=schedule, steps=steps, method=method, noise=noise)
    assert seen == pytest.approx({i / steps: schedule.sigma(i / steps).item() ** 2 for i in range(1, steps + 1)}, rel=1e-12)


def test_stays_float32_for_16_bit_inputs():
    z = torch.randn(1, 2, 3, 4, 3).bfloat16()
    kept = []
    sample(lambda z, time, step: kept.append(z.dtype) or z.bfloat16(), z, schedule=CosineSchedule(), steps=4, noise=lambda s: z)
    assert kept == [torch.float32] * 4


def test_doors():
    z = torch.zeros(1, 2, 3, 4, 3)
    for name, bad in (("steps", 0), ("start", 1.1), ("method", "euler"), ("ancestral_gamma", 2), ("noise", None)):
        with pytest.raises(ValueError, match=name):
            sample(lambda z, time, step: z, z, schedule=CosineSchedule(), **({"steps": 4, "noise": lambda step: z} | {name: bad}))
    for t, n in ((0.3, 8), (0.0, 8), (9 / 8, 8)):
        with pytest.raises(ValueError, match="t:"):
            stochastic_ddim_coefficients(t, n)
