"""Eq. 1 and its other weightings: one network, one number per loss space, however the network is parameterised."""

import pytest
import torch

from engine.diffusion.denoiser import PREDICTIONS, target, to_eps, to_x0
from engine.diffusion.loss import LOSS_SPACES, diffusion_loss
from engine.diffusion.schedule import CosineSchedule, add_noise

SCHEDULE = CosineSchedule(0.7)
SHAPE = (2, 3, 4, 5, 3)


def case(time):
    x0, eps, wrong = torch.randn(3, *SHAPE, dtype=torch.float64)
    z = add_noise(x0, eps, time, SCHEDULE)
    return x0, eps, z, x0 + 0.3 * wrong


@pytest.mark.parametrize("time", [torch.tensor([0.1, 0.9]), torch.linspace(0.05, 0.95, 6).reshape(2, 3)], ids=["sample", "frame"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("loss_space", LOSS_SPACES)
def test_any_parameterisation_gives_the_plain_error_of_its_space(prediction, loss_space, time):
    time = time.double()
    x0, eps, z, guess = case(time)
    guessed_eps = to_eps(guess, z, time, SCHEDULE, "x0")
    output = target(guess, guessed_eps, time, SCHEDULE, prediction)
    difference = {"x": guess - x0, "eps": guessed_eps - eps,
                  "v": target(guess, guessed_eps, time, SCHEDULE, "v") - target(x0, eps, time, SCHEDULE, "v")}[loss_space]
    loss = diffusion_loss(output, x0, eps, time, SCHEDULE, prediction, loss_space)
    assert loss.shape == time.shape
    torch.testing.assert_close(loss, difference.square().flatten(time.ndim).mean(-1), rtol=1e-9, atol=0)


def test_identities_of_the_spaces():
    time = torch.tensor([0.2, 0.7], dtype=torch.float64)
    x0, eps, z, _ = case(time)
    x, v, e = (diffusion_loss(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)), x0, eps, time, SCHEDULE, "v", space)
               for space in ("x", "v", "eps"))
    gamma2, sigma2 = SCHEDULE.gamma(time) ** 2, SCHEDULE.sigma(time) ** 2
    torch.testing.assert_close(x, sigma2 * v)
    torch.testing.assert_close(x, sigma2 / gamma2 * e)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("loss_space", LOSS_SPACES)
def test_finite_at_the_ends(prediction, loss_space):
    x0, eps, output = torch.randn(3, *SHAPE)
    loss = diffusion_loss(output, x0, eps, torch.tensor([0.0, 1.0]), SCHEDULE, prediction, loss_space)
    assert loss.isfinite().all()


def test_float32_from_bfloat16_and_gradient():
    x0, eps = torch.randn(2, *SHAPE)
    output = torch.randn(SHAPE, dtype=torch.bfloat16, requires_grad=True)
    time = torch.tensor([0.3, 0.6])
    loss = diffusion_loss(output, x0, eps, time, SCHEDULE)
    assert loss.dtype == torch.float32
    exact = diffusion_loss(output.double(), x0.double(), eps.double(), time.double(), SCHEDULE)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    loss.sum().backward()
    assert output.grad.abs().sum() > 0


def test_weights_are_eq_4_and_samples_do_not_mix():
    x0, eps, output = torch.randn(3, *SHAPE)
    time = torch.tensor([0.3, 0.6])
    video, frames = diffusion_loss(output, x0, eps, time, SCHEDULE)
    total = diffusion_loss(output, x0, eps, time, SCHEDULE, weights=torch.tensor([0.35, 0.65]))
    torch.testing.assert_close(total, 0.35 * video + 0.65 * frames)
    torch.testing.assert_close(diffusion_loss(output[:1], x0[:1], eps[:1], 0.3, SCHEDULE)[0], video)


def test_doors():
    x = torch.zeros(SHAPE)
    with pytest.raises(ValueError, match="loss_space"):
        diffusion_loss(x, x, x, 0.5, SCHEDULE, loss_space="x0")
    with pytest.raises(ValueError, match="output"):
        diffusion_loss(x[:1], x, x, 0.5, SCHEDULE)
    with pytest.raises(ValueError, match="weights"):
        diffusion_loss(x, x, x, 0.5, SCHEDULE, weights=torch.ones(3))


def test_perfect_network_has_no_loss():
    x0, eps = torch.randn(2, *SHAPE, dtype=torch.float64)
    z = add_noise(x0, eps, 0.4, SCHEDULE)
    v = target(x0, eps, 0.4, SCHEDULE, "v")
    assert diffusion_loss(v, x0, eps, 0.4, SCHEDULE).tolist() == [0, 0]
    torch.testing.assert_close(to_x0(v, z, 0.4, SCHEDULE, "v"), x0)
