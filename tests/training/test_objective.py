"""Eq. 2 to 4: their values, who learns from whom, which passes are run, and that ranks and order change nothing."""

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from engine.cascade_folder import read_index
from engine.config import FinetuneConfig
from engine.diffusion.denoiser import to_eps, to_x0
from engine.diffusion.schedule import add_noise
from engine.models.attention import TemporalAttention
from engine.models.text import TextEmbedding
from engine.models.unet import VideoUNet
from engine.runtime import weights
from engine.training.finetune_data import StageData
from engine.training.objective import Objective, Unit, share, units, video_only

VIDEO, FRAMES = Unit("video", 0, 0.35), Unit("frames", 0, 0.65)


@pytest.fixture
def start(tiny):
    """start(stage, **settings) -> network in fp32, objective, data: random clip and frames."""
    cascade = read_index(tiny)
    names = [stage.name for stage in cascade.stages]

    def make(name="base", **changes):
        stage = cascade.stage(name)
        config = FinetuneConfig(**{"aug_level_max": 0.3} | changes)
        generator = torch.Generator().manual_seed(3)
        text = TextEmbedding(torch.randn(1, 3, 128, generator=generator), torch.ones(1, 3, dtype=torch.bool))
        network = weights.load(lambda: VideoUNet(stage.unet), tiny / name, torch.device("cpu"), torch.float32).requires_grad_(True)
        video = torch.rand(stage.frames, stage.height, stage.width, 3, generator=generator) * 2 - 1
        pictures = (torch.rand(9, stage.height, stage.width, 3, generator=generator) * 2 - 1).half()
        before = cascade.stages[names.index(name) - 1] if name != "base" else None
        return SimpleNamespace(network=network, objective=Objective(config, stage, before, text, torch.device("cpu")), stage=stage,
                               data=StageData(video, pictures), config=config)

    return make


def gradients(network, loss):
    for p in network.parameters():
        p.grad = None
    loss.backward()
    return {name: p.grad.clone() for name, p in network.named_parameters()}


@pytest.mark.parametrize("name", ["base", "ssr1"])
def test_one_mixed_pass_is_two_passes(start, name):
    run = start(name)
    both = run.objective.batch([VIDEO, FRAMES], run.data, 5)
    error = run.objective.errors(run.network, both)
    together = gradients(run.network, (error * both.weights).sum())
    apart, losses = {}, []
    for unit in (VIDEO, FRAMES):
        batch = run.objective.batch([unit], run.data, 5)
        losses.append(run.objective.errors(run.network, batch)[0])
        for key, value in gradients(run.network, unit.weight * losses[-1]).items():
            apart[key] = apart.get(key, 0) + value
    torch.testing.assert_close(error, torch.stack(losses), rtol=1e-5, atol=1e-6)
    assert not torch.isclose(error[0], error[1])
    for key, value in together.items():
        torch.testing.assert_close(value, apart[key], rtol=1e-4, atol=1e-6 + 1e-5 * apart[key].abs().max().item(), msg=key)


@pytest.mark.parametrize("space", ["x", "v", "eps"])
def test_the_errors_are_the_papers(start, space):
    run = start(loss_space=space)
    batch = run.objective.batch([VIDEO, FRAMES], run.data, 1)
    torch.testing.assert_close(batch.z, add_noise(batch.target, batch.eps, batch.time, run.objective.schedule))
    torch.testing.assert_close(batch.target[0], run.data.clip)
    with torch.no_grad():
        found = run.objective.errors(run.network, batch)
        text, kind = run.objective.text, (run.objective.schedule, "v")
        v = run.network(batch.z, batch.time, text.tokens.expand(2, -1, -1), text.mask.expand(2, -1),
                        independent_frames=torch.tensor([False, True]))
    s = batch.time[:, None, None, None, None] * math.pi / 2
    want = {"x": (to_x0(v, batch.z, batch.time, *kind) - batch.target), "eps": to_eps(v, batch.z, batch.time, *kind) - batch.eps,
            "v": v - (s.cos() * batch.eps - s.sin() * batch.target)}[space]
    torch.testing.assert_close(found, want.square().mean((1, 2, 3, 4)), rtol=1e-4, atol=1e-5)


def test_frames_never_see_each_other(start):
    run = start()
    batch = run.objective.batch([FRAMES], run.data, 0)
    batch.z.requires_grad_(True)
    text = run.objective.text
    out = run.network(batch.z, batch.time, text.tokens, text.mask, independent_frames=batch.independent_frames)
    (seen,) = torch.autograd.grad(out[:, 2].square().sum(), batch.z)
    assert seen[:, 2].abs().sum() > 0
    assert torch.count_nonzero(seen[:, [0, 1, 3]]) == 0
    out = run.network(batch.z, batch.time, text.tokens, text.mask)
    (seen,) = torch.autograd.grad(out[:, 2].square().sum(), batch.z)
    assert seen[:, 0].abs().sum() > 0                                      # as a video they do


@pytest.mark.parametrize("name", ["base", "ssr2"])
def test_what_frames_teach_of_time(start, name):
    """Of temporal attention: values and output, not the bias, queries and keys. Of temporal convolutions and the clock: nothing."""
    run = start(name)
    batch = run.objective.batch([FRAMES], run.data, 0)
    found = gradients(run.network, run.objective.errors(run.network, batch).sum())
    checked = 0
    for key, value in found.items():
        if "position_bias" in key or "frame_index" in key or ("temporal.conv" in key):
            assert torch.count_nonzero(value) == 0, key
            checked += 1
        elif key.endswith("temporal.to_qkv.weight"):
            q, k, v = value.chunk(3)
            assert torch.count_nonzero(q) == torch.count_nonzero(k) == 0 < torch.count_nonzero(v), key
            checked += 1
    assert checked >= 4
    video = gradients(run.network, run.objective.errors(run.network, run.objective.batch([VIDEO], run.data, 0)).sum())
    assert all(value.abs().sum() > 0 for key, value in video.items() if "position_bias" in key or "temporal.conv.weight" in key)


def test_fig_3_freezes_temporal_layers_for_frames(start):
    run = start()
    batch = run.objective.batch([VIDEO, FRAMES], run.data, 2)
    plain = run.objective.errors(run.network, batch)
    whole = gradients(run.network, (plain * batch.weights).sum())
    clip = gradients(run.network, run.objective.errors(run.network, batch)[0] * VIDEO.weight)
    frozen = video_only(run.network)
    error = run.objective.errors(frozen, batch)
    torch.testing.assert_close(error, plain, rtol=1e-6, atol=1e-7)         # the same function ...
    found = gradients(frozen, (error * batch.weights).sum())
    for key, value in found.items():                                       # ... and what lies below still learns from the frames
        want = clip[key] if ".temporal." in key else whole[key]
        torch.testing.assert_close(value, want, rtol=1e-4, atol=1e-6 + 1e-5 * want.abs().max().item(), msg=key)
    temporal = [key for key in found if ".temporal." in key]
    assert temporal and any(not torch.allclose(whole[key], clip[key], rtol=1e-3) for key in temporal)
    frames = gradients(frozen, run.objective.errors(frozen, run.objective.batch([FRAMES], run.data, 2)).sum())
    assert all(torch.count_nonzero(frames[key]) == 0 for key in temporal)
    frozen.gradient_checkpointing = True
    again = gradients(frozen, (run.objective.errors(frozen, batch) * batch.weights).sum())
    for key, value in again.items():
        torch.testing.assert_close(value, found[key], rtol=1e-5, atol=1e-7, msg=key)


def test_every_temporal_layer_is_told(start):
    frozen = video_only(start().network)
    layers = [layer for layer in frozen.modules() if isinstance(layer, TemporalAttention)]
    assert layers and all(type(layer.to_out).__name__ == "_Linear" for layer in layers)


@pytest.mark.parametrize(("changes", "has_clip", "want"), [
    ({"alpha": 1.0}, True, [("video", 1.0)]),
    ({"alpha": 0.0}, True, [("frames", 1.0)]),
    ({"alpha": 0.35}, True, [("video", 0.35), ("frames", 0.65)]),
    ({"alpha": 0.35}, False, [("frames", 1.0)]),
    ({"alpha": 0.5, "draws": 2}, True, [("video", 0.25), ("frames", 0.25)] * 2),
])
def test_a_weight_of_zero_is_no_unit(changes, has_clip, want):
    found = units(FinetuneConfig(**changes), "base", 0, has_clip)
    assert [unit.kind for unit in found] == [kind for kind, _ in want]
    assert [unit.weight for unit in found] == pytest.approx([weight for _, weight in want])


def test_one_of_the_two_has_the_same_expectation():
    config, total = FinetuneConfig(alpha=0.35, sample_one=True), Counter()
    for step in range(4000):
        (unit,) = units(config, "base", step)
        assert unit.weight == 1
        total[unit.kind] += unit.weight
    assert abs(total["video"] / 4000 - 0.35) < 4 * math.sqrt(0.35 * 0.65 / 4000)
    assert [units(config, "base", 7)] == [units(config, "base", 7)]
    for alpha, kind in ((0.0, "frames"), (1.0, "video")):
        assert {units(FinetuneConfig(alpha=alpha, sample_one=True), "base", step)[0].kind for step in range(50)} == {kind}


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("alpha", [0.35, 1.0])
def test_ranks_share_all_the_work_once(world, alpha):
    work = units(FinetuneConfig(alpha=alpha, draws=3), "base", 0)
    shares = [share(work, rank, world) for rank in range(world)]
    assert len({len(one) for one in shares}) == 1                           # all run as many samples
    weighed = [unit for one in shares for unit in one if unit.weight > 0]
    assert sorted(weighed, key=str) == sorted(work, key=str)


def test_all_that_is_random_has_an_address(start):
    run = start("ssr1")
    one, same = (run.objective.batch([VIDEO, FRAMES], run.data, 4) for _ in range(2))
    alone = run.objective.batch([FRAMES], run.data, 4)
    for key in ("z", "eps", "time", "lowres", "aug_level", "target"):
        assert torch.equal(getattr(one, key), getattr(same, key)), key
        assert torch.equal(getattr(one, key)[1:], getattr(alone, key)), key        # a neighbour changes nothing
        others = [run.objective.batch([FRAMES], run.data, 5), run.objective.batch([Unit("frames", 1, 1.0)], run.data, 4),
                  start("ssr1", seed=1).objective.batch([FRAMES], run.data, 4)]
        assert not any(torch.equal(getattr(alone, key), getattr(other, key)) for other in others), key
    times = torch.tensor([run.objective.sample(VIDEO, run.data, step).time.item() for step in range(300)])
    assert times.min() < 0.02 and times.max() > 0.98 and abs(times.mean() - 0.5) < 0.07
    levels = [run.objective.sample(VIDEO, run.data, step).aug_level.item() for step in range(50)]
    assert max(levels) <= 0.3 and max(levels) - min(levels) > 0.2


def test_frames_are_conditioned_in_space_only(start, tiny):
    """Where the stage before has fewer frames, a clip loses some and gets them back blurred; pictures keep theirs."""
    run = start("ssr1")
    cascade = read_index(tiny)
    objective = Objective(run.config, cascade.stage("tsr1"), cascade.stage("base"), run.objective.text, torch.device("cpu"))
    video = torch.rand(1, 8, 8, 12, 3)
    assert torch.equal(objective.condition(video, True, torch.zeros(1), "a"), video)
    clip = objective.condition(video, False, torch.zeros(1), "a")
    assert torch.equal(clip[:, ::2], video[:, ::2]) and not torch.equal(clip[:, 1::2], video[:, 1::2])
