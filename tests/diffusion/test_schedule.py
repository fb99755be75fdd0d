"""The schedule: Imagen Video's cosine, exact ends, exact inverses, broadcasting of times."""

import math

import pytest
import torch

from engine.diffusion.schedule import CosineSchedule, add_noise

SHIFTS = [0.0, 1.4, -3.0]
TIMES = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)


def test_is_imagen_videos_cosine():
    schedule = CosineSchedule()
    torch.testing.assert_close(schedule.gamma(TIMES), torch.cos(TIMES * math.pi / 2), rtol=1e-13, atol=0)
    torch.testing.assert_close(schedule.sigma(TIMES), torch.sin(TIMES * math.pi / 2), rtol=1e-13, atol=0)


@pytest.mark.parametrize("shift", SHIFTS)
def test_variance_is_preserved_and_logsnr_is_their_ratio(shift):
    schedule = CosineSchedule(shift)
    gamma, sigma = schedule.gamma(TIMES), schedule.sigma(TIMES)
    torch.testing.assert_close(gamma**2 + sigma**2, torch.ones_like(TIMES), rtol=1e-14, atol=0)
    torch.testing.assert_close(schedule.logsnr(TIMES), 2 * torch.log(gamma / sigma), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(schedule.logsnr(TIMES) - shift, CosineSchedule().logsnr(TIMES), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, float], ids=str)
@pytest.mark.parametrize("shift", SHIFTS)
def test_ends_are_exact(shift, dtype):
    schedule = CosineSchedule(shift)
    zero, one = (0.0, 1.0) if dtype is float else (torch.tensor(0, dtype=dtype), torch.tensor(1, dtype=dtype))
    assert (schedule.gamma(zero).item(), schedule.sigma(zero).item()) == (1.0, 0.0)
    assert (schedule.gamma(one).item(), schedule.sigma(one).item()) == (0.0, 1.0)
    assert (schedule.logsnr(zero).item(), schedule.logsnr(one).item()) == (20.0, -20.0)


def test_clip_holds_inside_and_only_there():
    schedule = CosineSchedule(logsnr_min=-4, logsnr_max=4)
    near = torch.tensor([1e-9, 1 - 1e-9], dtype=torch.float64)
    assert schedule.logsnr(near).tolist() == [4, -4]
    assert schedule.gamma(near)[1].item() == pytest.approx(math.sqrt(1 / (1 + math.exp(4))))
    assert schedule.gamma(1.0) == 0


@pytest.mark.parametrize("shift", SHIFTS)
def test_inverses(shift):
    schedule = CosineSchedule(shift)
    torch.testing.assert_close(schedule.time_from_sigma(schedule.sigma(TIMES)), TIMES, rtol=0, atol=1e-11)
    torch.testing.assert_close(schedule.time_from_logsnr(schedule.logsnr(TIMES)), TIMES, rtol=0, atol=1e-13)
    assert [float(schedule.time_from_sigma(s)) for s in (0.0, 1.0)] == [0, 1]
    assert [float(schedule.time_from_logsnr(x)) for x in (math.inf, -math.inf)] == [0, 1]


def test_dtypes_are_kept_and_16_bits_are_widened():
    schedule = CosineSchedule()
    for given, wanted in ((torch.float32, torch.float32), (torch.float64, torch.float64), (torch.float16, torch.float32)):
        assert schedule.sigma(torch.tensor([0.5], dtype=given)).dtype == wanted
    time = torch.tensor(0.37, dtype=torch.float32)
    assert schedule.gamma(time).item() == torch.tensor(math.cos(time.double().item() * math.pi / 2), dtype=torch.float32).item()


def test_add_noise_per_video_sample_and_frame():
    schedule = CosineSchedule()
    video, eps = torch.randn(2, 2, 3, 4, 5, 3)
    per_frame = torch.rand(2, 3)
    z = add_noise(video, eps, per_frame, schedule)
    for b in range(2):
        for t in range(3):
            one = add_noise(video[b : b + 1, t : t + 1], eps[b : b + 1, t : t + 1], float(per_frame[b, t]), schedule)
            torch.testing.assert_close(z[b, t], one[0, 0])
    assert add_noise(video, eps, per_frame[:, 0], schedule)[:, 0].equal(z[:, 0])
    assert add_noise(video.bfloat16(), eps, 0.5, schedule).dtype == torch.float32
    assert add_noise(video, eps, per_frame.double(), schedule).dtype == torch.float32


@pytest.mark.parametrize("shift", SHIFTS)
def test_time_1_ignores_the_video_and_time_0_the_noise(shift):
    video, eps = torch.randn(2, 1, 2, 4, 5, 3)
    assert add_noise(video, eps, 1.0, CosineSchedule(shift)).equal(eps)
    assert add_noise(1e6 * video, eps, torch.ones(1), CosineSchedule(shift)).equal(eps)
    assert add_noise(video, 1e6 * eps, 0.0, CosineSchedule(shift)).equal(video)


def test_doors():
    schedule, video = CosineSchedule(), torch.zeros(2, 3, 4, 5, 3)
    with pytest.raises(ValueError, match="time"):
        schedule.gamma(1.5)
    with pytest.raises(ValueError, match="time"):
        add_noise(video, video, torch.zeros(3), schedule)
    with pytest.raises(ValueError, match="eps"):
        add_noise(video, video[:1], 0.5, schedule)
    with pytest.raises(ValueError, match="logsnr_min"):
        CosineSchedule(logsnr_min=30)
