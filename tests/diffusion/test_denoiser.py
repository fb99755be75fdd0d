"""Conversions between predictions, thresholding, guidance, and the Denoiser that puts them together."""

import itertools

import pytest
import torch

from engine.diffusion.denoiser import (
    PREDICTIONS,
    Denoiser,
    dynamic_threshold,
    guidance_schedule,
    guide,
    static_threshold,
    target,
    to_eps,
    to_x0,
)
from engine.diffusion.schedule import CosineSchedule, add_noise

SCHEDULE = CosineSchedule()
SHAPE = (2, 3, 4, 5, 3)


def pair():
    return torch.randn(2, *SHAPE, dtype=torch.float64).unbind(0)


@pytest.mark.parametrize("time", [0.02, 0.5, 0.98, torch.tensor([0.1, 0.9]), torch.linspace(0.05, 0.95, 6).reshape(2, 3)], ids=str)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_target_and_conversions_are_inverse(prediction, time):
    x0, eps = pair()
    z = add_noise(x0, eps, time, SCHEDULE)
    output = target(x0, eps, time, SCHEDULE, prediction)
    tight = dict(rtol=0, atol=1e-5 if isinstance(time, torch.Tensor) else 1e-11)
    torch.testing.assert_close(to_x0(output, z, time, SCHEDULE, prediction), x0, **tight)
    torch.testing.assert_close(to_eps(output, z, time, SCHEDULE, prediction), eps, **tight)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_wrong_output_still_means_one_consistent_pair(prediction):
    z, output = pair()
    x0, eps = (convert(output, z, 0.3, SCHEDULE, prediction) for convert in (to_x0, to_eps))
    torch.testing.assert_close(add_noise(x0, eps, 0.3, SCHEDULE), z, rtol=0, atol=1e-12)
    torch.testing.assert_close(target(x0, eps, 0.3, SCHEDULE, prediction), output, rtol=0, atol=1e-12)


def test_v_is_gamma_eps_minus_sigma_x():
    x0, eps = pair()
    assert target(x0, eps, 0.0, SCHEDULE, "v").equal(eps)
    assert target(x0, eps, 1.0, SCHEDULE, "v").equal(-x0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ends_of_time_stay_finite(prediction):
    z, output = pair()
    for time, convert in itertools.product((0.0, 1.0), (to_x0, to_eps)):
        assert convert(output, z, time, SCHEDULE, prediction).isfinite().all()


def test_static_threshold():
    assert static_threshold(torch.tensor([-3.0, 0.5, 2.0])).tolist() == [-1, 0.5, 1]


def test_dynamic_threshold_is_per_sample_and_leaves_small_samples():
    x0 = torch.randn(3, 2, 4, 5, 3)
    x0[0] = x0[0].clamp(-0.9, 0.9)
    x0[2] *= 10
    out = dynamic_threshold(x0, 0.9)
    assert out[0].equal(x0[0])
    for b in (1, 2):
        s = torch.quantile(x0[b].abs().flatten(), 0.9, interpolation="higher").clamp(min=1)
        assert s > 1
        torch.testing.assert_close(out[b], x0[b].clamp(-s, s) / s)
    assert out.abs().max() == 1


def test_dynamic_threshold_takes_more_values_than_torch_quantile():
    x0 = torch.ones(1, 2**24 + 1)
    x0[0, : 2**20] = 4.0
    assert dynamic_threshold(x0)[0, -1] == 0.25


def test_guidance_convention():
    cond, uncond = pair()
    assert guide(cond, uncond, 1.0).equal(cond)
    assert guide(cond, uncond, 0.0).equal(uncond)
    torch.testing.assert_close(guide(cond, uncond, 3.0), uncond + 3 * (cond - uncond))


def test_oscillating_guidance():
    weights = guidance_schedule(15.0, oscillating=3)
    assert [weights(step) for step in range(8)] == [15, 15, 15, 1, 15, 1, 15, 1]
    assert {guidance_schedule(6.0)(step) for step in range(9)} == {6.0}


class Counted:
    def __init__(self, value, dtype=torch.float32):
        self.value, self.dtype, self.calls = value, dtype, []

    def __call__(self, z, time):
        self.calls.append((z.dtype, time))
        return torch.full_like(z, self.value, dtype=self.dtype)


def test_weight_1_costs_one_pass():
    cond, uncond, z = Counted(0.25), Counted(0.5), torch.zeros(SHAPE)
    Denoiser(cond, SCHEDULE, unconditional=uncond)(z, 0.5, 0)
    assert (len(cond.calls), len(uncond.calls)) == (1, 0)
    oscillating = Denoiser(cond, SCHEDULE, unconditional=uncond, guidance=guidance_schedule(15.0, oscillating=2))
    for step in range(6):
        oscillating(z, 0.5, step)
    assert (len(cond.calls), len(uncond.calls)) == (7, 4)      # steps 0, 1, 3, 5


def test_guides_then_converts_then_thresholds():
    z = torch.randn(SHAPE)
    denoise = Denoiser(Counted(0.25), SCHEDULE, unconditional=Counted(0.5), guidance=3.0, threshold="none")
    raw = denoise(z, 0.5, 0)
    torch.testing.assert_close(raw, to_x0(torch.full(SHAPE, 3 * 0.25 - 2 * 0.5), z, 0.5, SCHEDULE, "v"))
    for threshold, function in (("static", static_threshold), ("dynamic", dynamic_threshold), (torch.tanh, torch.tanh)):
        denoise = Denoiser(Counted(0.25), SCHEDULE, unconditional=Counted(0.5), guidance=3.0, threshold=threshold)
        torch.testing.assert_close(denoise(z, 0.5, 0), function(raw))
        assert function(raw).ne(raw).any()


def test_float32_whatever_the_networks_dtype():
    network, z = Counted(0.1, torch.bfloat16), torch.randn(SHAPE)
    x0 = Denoiser(network, SCHEDULE, threshold="none")(z, 0.3, 0)
    assert x0.dtype == torch.float32
    exact = to_x0(torch.full(SHAPE, 0.1, dtype=torch.bfloat16).double(), z.double(), 0.3, SCHEDULE, "v")
    torch.testing.assert_close(x0.double(), exact, rtol=0, atol=1e-6)      # bfloat16 arithmetic would be off by 1e-2
    assert to_x0(torch.full(SHAPE, 0.1, dtype=torch.bfloat16), z, 0.3, SCHEDULE, "v").equal(x0)
    guided = Denoiser(network, SCHEDULE, unconditional=Counted(0.3, torch.bfloat16), guidance=7.5, threshold="none")(z, 0.3, 0)
    cond, uncond = (torch.tensor(x, dtype=torch.bfloat16).item() for x in (0.1, 0.3))
    exact = to_x0(torch.full(SHAPE, 7.5 * cond - 6.5 * uncond).double(), z.double(), 0.3, SCHEDULE, "v")
    torch.testing.assert_close(guided.double(), exact, rtol=0, atol=1e-6)
    dtype, time = network.calls[0]
    assert dtype == torch.float32 and time.shape == (2,) and time.dtype == torch.float32 and time[0].item() == pytest.approx(0.3)


def test_doors():
    z = torch.zeros(SHAPE)
    with pytest.raises(ValueError, match="prediction"):
        to_x0(z, z, 0.5, SCHEDULE, "epsilon")
    with pytest.raises(ValueError, match="prediction"):
        Denoiser(Counted(0), SCHEDULE, "velocity")
    with pytest.raises(ValueError, match="threshold"):
        Denoiser(Counted(0), SCHEDULE, threshold="soft")
    with pytest.raises(ValueError, match="guidance"):
        Denoiser(Counted(0), SCHEDULE, guidance=2.0)(z, 0.5, 0)
    with pytest.raises(ValueError, match="percentile"):
        dynamic_threshold(z, 99.5)
    with pytest.raises(ValueError, match="oscillating"):
        guidance_schedule(15.0, -1)
