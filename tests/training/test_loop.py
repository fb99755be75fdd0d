"""Pretraining: what a step is made of, that a broken run and several ranks change nothing, and that its weights reach a cascade."""

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine import pretrain
from engine.cascade import Cascade
from engine.cascade_folder import read_index
from engine.config import PretrainConfig, SampleConfig
from engine.diffusion.conditioning import downsample, upsample
from engine.errors import ConfigError, NumericError, WeightsError
from engine.models.text import TextEmbedding
from engine.runtime.weights import WEIGHTS_NAME
from engine.training import loop
from engine.training.loop import Pretraining

ROOT = Path(__file__).parents[2]
SMALL = {"phases": [{"steps": 2, "pictures": 3}, {"steps": 4, "videos": 2, "frames": 4, "pictures": 2}], "warmup": 2, "dtype": "fp32",
         "save_every": 3}


@pytest.fixture
def start(tiny, tmp_path):
    def make(stage="base", out="run", **changes) -> Pretraining:
        return Pretraining(read_index(tiny), stage, PretrainConfig(**SMALL | changes), "sprites", tiny, tmp_path / out)

    return make


@pytest.fixture
def calls(monkeypatch):
    """What the network is called with: a list of dicts."""
    from engine.models.unet import VideoUNet

    seen, real = [], VideoUNet.forward

    def forward(self, z, time, text, mask, **more):
        seen.append({"z": z, "time": time, "mask": mask, **more})
        return real(self, z, time, text, mask, **more)

    monkeypatch.setattr(VideoUNet, "forward", forward)
    return seen


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(("stage", "dtype"), [("base", "bf16"), ("ssr3", "fp32")])
def test_a_broken_run_goes_on_as_if_it_had_not_been(start, stage, dtype):
    changes = {"dtype": dtype, "crop": (8, 16) if stage == "ssr3" else None, "aug_level_max": 0.1 if stage == "ssr3" else 0.0}
    whole = start(stage, "whole", **changes)
    whole.run()
    broken = start(stage, "broken", **changes)
    step, lived = broken.step, []

    def killed():
        if len(lived) == 4:                                    # one step after the save at 3: that step is lost
            raise KeyboardInterrupt
        lived.append(0)
        return step()

    broken.step = killed
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    again = start(stage, "broken", **changes)
    again.run()
    assert again.step_index == 6
    for name in ("state.safetensors", WEIGHTS_NAME):
        assert sha(whole.out / name) == sha(again.out / name)
    lines = [json.loads(line) for line in (again.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 3, 4, 5]
    assert not list(again.out.glob("*.part"))


def test_another_seed_is_another_run(start):
    a, b = start(seed=0), start(seed=1)
    assert a.step()["pictures"] != b.step()["pictures"]


def test_time_is_up_after_the_step_that_it_ends_in(start):
    run = start()
    run.run(until=time.time() - 1)
    assert run.step_index == 1 and start().resume()


def test_phases_choose_what_a_step_sees(start, calls):
    """Pictures only, then clips and pictures; pictures are independent frames, clips are not; times cover [0, 1] in every batch."""
    run = start()
    first, _, third = run.step(), run.step(), run.step()
    assert "videos" not in first and {"videos", "pictures"} <= third.keys()
    assert [(*call["z"].shape[:2], call["independent_frames"].tolist()) for call in calls] == [
        (3, 1, [True] * 3), (3, 1, [True] * 3), (2, 4, [False] * 2), (2, 1, [True] * 2)]
    for call in calls:
        assert sorted((call["time"] * len(call["time"])).long().tolist()) == [*range(len(call["time"]))]


def test_rate_warms_up_stays_and_falls_to_zero(start):
    phases = [{"steps": 30, "pictures": 1}, {"steps": 30, "pictures": 1, "rate": 0.5}, {"steps": 40, "pictures": 1}]
    run = start(phases=phases, warmup=10, decay=0.4)
    rates = [run.rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10:60] == pytest.approx([1] * 20 + [0.5] * 30)
    assert rates[60:] == pytest.approx([0.5 + 0.5 * math.cos(math.pi * i / 40) for i in range(40)], abs=1e-6)
    assert rates[-1] < 0.002


def test_the_rates_reach_the_optimizer(start, monkeypatch):
    run, seen = start(muon_lr=0.5, adam_lr=0.25), []
    monkeypatch.setattr(run.optimizer, "step", lambda gradients, muon, adam: seen.append((muon, adam)))
    assert run.step()["rate"] == 0.5 and seen == [(0.25, 0.125)]                                          # half way through a warmup of 2


def test_gradients_are_clipped_together(start, monkeypatch):
    run, seen = start(clip=1e-3), []
    monkeypatch.setattr(run.optimizer, "step", lambda gradients, *_: seen.append({k: g.clone() for k, g in gradients.items()}))
    free, free_seen = start(clip=1e9), []
    monkeypatch.setattr(free.optimizer, "step", lambda gradients, *_: free_seen.append(gradients))
    norm = run.step()["grad_norm"]
    free.step()
    total = torch.stack([g.norm() for g in seen[0].values()]).norm()
    assert norm > 1e-3 and total == pytest.approx(1e-3, rel=1e-4)
    for name, gradient in free_seen[0].items():
        torch.testing.assert_close(seen[0][name], gradient * (1e-3 / norm), rtol=1e-4, atol=1e-9)


def test_the_loss_falls_on_what_it_has_seen(start, monkeypatch):
    """One batch with its noise and times, over and over."""
    monkeypatch.setattr(loop, "batch_seed", lambda *address: 0)
    run = start(phases=[{"steps": 25, "videos": 4, "frames": 4}], warmup=3, muon_lr=1e-2, adam_lr=1e-2)
    losses = [run.step()["videos"] for _ in range(25)]
    assert losses[-1] < 0.7 * losses[0], losses


def test_balanced_times_weigh_one_on_average_and_less_near_noise():
    times = torch.linspace(0, 1, 10_001)
    weights = loop.balance(times)
    assert torch.trapezoid(weights, times).item() == pytest.approx(1, abs=1e-4)
    assert (weights.diff() < 0).all() and (weights[0] / weights[-1]).item() == pytest.approx(10, rel=1e-4)


def test_captions_are_dropped_at_their_rate(start):
    text = TextEmbedding(torch.ones(4000, 2, 3), torch.ones(4000, 2, dtype=torch.bool))
    for share in (0.0, 0.1, 1.0):
        out = start(text_dropout=share).drop_captions(text, torch.Generator().manual_seed(0))
        gone = ~out.mask[:, 0]
        assert gone.float().mean().item() == pytest.approx(share, abs=0.02)
        assert not out.tokens[gone].any() and not out.mask[gone].any() and out.tokens[~gone].all() and out.mask[~gone].all()


@pytest.mark.parametrize("stage", ["tsr1", "ssr1", "ssr3"])
def test_condition_is_the_stage_before_made_large_again(start, stage):
    run = start(stage)
    video, _ = run.source.clips(0, 2, run.stage, 4)
    before = run.before
    frames = 2 if stage == "tsr1" else 4
    lowres, levels = run.condition(video, torch.Generator().manual_seed(0))
    wanted = upsample(downsample(video, frames, before.height, before.width), 4, *video.shape[2:4], run.stage.temporal_upsample)
    assert torch.equal(lowres, wanted) and not levels.any() and not torch.equal(lowres, video)
    crop = video[:, :, :8, -8:]
    lowres, _ = run.condition(crop, torch.Generator().manual_seed(0))
    size = {"tsr1": 8, "ssr1": 4, "ssr3": 6}[stage]
    assert torch.equal(lowres, upsample(downsample(crop, frames, size, size), 4, 8, 8, run.stage.temporal_upsample))


def test_half_of_the_conditions_are_noised_and_the_network_is_told(start, calls):
    run = start("ssr1", aug_level_max=0.2)
    video, _ = run.source.clips(0, 60, run.stage, 1)
    clean, _ = start("ssr1").condition(video, torch.Generator().manual_seed(0))
    noisy, levels = run.condition(video, torch.Generator().manual_seed(0))
    zero = levels == 0
    assert 15 < zero.sum() < 45 and levels.max() <= 0.2 and levels.max() > 0.15
    assert torch.equal(noisy[zero], clean[zero])
    difference = (noisy - clean)[~zero].square().mean((1, 2, 3, 4)).sqrt()
    order = levels[~zero].argsort()
    assert (difference[order][-10:].mean() > 3 * difference[order][:10].mean()) and (difference > 0).all()
    for _ in run.losses(2):
        pass
    assert all(call["aug_level"].shape == call["time"].shape and call["lowres"].shape == call["z"].shape for call in calls)


def test_residual_stages_learn_what_upsampling_misses(start, calls):
    """Of a constant clip upsampling misses nothing: the target is 0, which a network whose head starts at zero hits at once."""
    run = start("ssr1")
    flat = torch.full((2, 4, 16, 24, 3), 0.3)
    assert run.loss(flat, ["a", "b"], torch.zeros(2, dtype=torch.bool), torch.Generator().manual_seed(0)).item() < 1e-9
    torch.testing.assert_close(calls[-1]["lowres"], flat)
    video, captions = run.source.clips(0, 2, run.stage, 4)
    lowres, _ = run.condition(video, torch.Generator().manual_seed(0))
    loss = run.loss(video, captions, torch.zeros(2, dtype=torch.bool), torch.Generator().manual_seed(0)).item()
    assert loss > 0
    run.config = PretrainConfig(**SMALL | {"loss_space": "x"})
    loss = run.loss(video, captions, torch.zeros(2, dtype=torch.bool), torch.Generator().manual_seed(0)).item()
    assert loss == pytest.approx(((video - lowres) / 0.1).square().mean().item(), rel=1e-4)               # 0.1: the stage's residual_scale


def test_a_gradient_that_is_not_finite_stops_the_run_and_leaves_the_weights(start):
    run = start()
    before = {name: p.clone() for name, p in run.optimizer.master.items()}
    run.source.pictures = lambda *_: (torch.full((3, 1, 8, 12, 3), float("nan")), ["a"] * 3)
    with pytest.raises(NumericError, match="step 0: the gradient is not finite"):
        run.step()
    assert run.step_index == 0 and all(torch.equal(before[name], p) for name, p in run.optimizer.master.items())


def test_settings_that_no_step_could_use_are_refused_at_once(start):
    with pytest.raises(ConfigError, match="frames: want a divisor of base's 4, got 3"):
        start(phases=[{"steps": 1, "videos": 1, "frames": 3}])
    with pytest.raises(ConfigError, match="crop: want at most ssr1's 16x24"):
        start("ssr1", crop=(32, 32))


def test_a_damaged_or_foreign_state_is_refused(start):
    run = start()
    run.run(until=0)
    with pytest.raises(WeightsError, match="state.safetensors: not a state of this stage"):
        start("tsr1").resume()
    path = run.out / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="state.safetensors: not a state of this stage"):
        start().resume()


@pytest.fixture
def copied(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "mine")


def flags(*more) -> list[str]:
    return ["--set", "dtype=fp32", "--set", "phases=[{steps: 2, videos: 2, frames: 4}]", *more]


def test_published_weights_are_what_a_cascade_loads(copied, tmp_path, own_cache):
    out = tmp_path / "run"
    line = ["--stage", "base", "--cascade", str(copied), "--out", str(out)]
    assert pretrain.main(line + flags()) == 0
    old = sha(copied / "base" / WEIGHTS_NAME)
    assert pretrain.main([*line, *flags(), "--publish"]) == 0
    assert sha(copied / "base" / WEIGHTS_NAME) != old
    state, published = load_file(out / "state.safetensors"), load_file(copied / "base" / WEIGHTS_NAME)
    for name, value in published.items():
        assert value.dtype == torch.float16 and torch.equal(value, state[f"ema.{name}"].half())
    cascade = Cascade.load(copied, "cpu", "fp32")
    videos = cascade.sample("a red circle", SampleConfig(last_stage="base", steps={"base": 1}))
    assert videos["base"].shape == (4, 8, 12, 3)


def test_nothing_is_published_without_a_run(copied, tmp_path, capsys):
    old = sha(copied / "base" / WEIGHTS_NAME)
    line = ["--stage", "base", "--cascade", str(copied), "--out", str(tmp_path / "none"), *flags("--publish")]
    assert pretrain.main(line) == 2
    assert "error: --publish: want the folder of a run" in capsys.readouterr().err
    assert sha(copied / "base" / WEIGHTS_NAME) == old


@pytest.mark.parametrize(("line", "code", "says"), [
    (["--stage", "ssr9"], 2, "--stage: want one of"),
    (["--stage", "base", "--cascade", "sprits"], 2, "did you mean sprites?"),
    (["--stage", "base", "--set", "muon_rl=1"], 2, "did you mean muon_lr?"),
    (["--stage", "base", "--set", "phases=[{steps: 1, videos: 1, frames: 5}]"], 2, "frames: want a divisor"),
    (["--stage", "base", "--source", "nowhere"], 3, "want videos with a caption file"),
])
def test_mistakes_end_in_one_line(line, code, says, tmp_path, capsys):
    assert pretrain.main([*line, "--out", str(tmp_path / "run")]) == code
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1 and says in text
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_ranks_are_one_process_over_both_batches(start, tiny, tmp_path):
    phases = [{"steps": 2, "videos": 2, "frames": 4, "pictures": 2}]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "engine.pretrain",
               "--stage", "base", "--cascade", str(tiny), "--out", str(tmp_path / "two"), "--set", "dtype=fp32",
               "--set", f"phases={json.dumps(phases)}"]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]                             # written once, by the first rank

    one = start("base", "one", phases=phases, warmup=100)
    for step in range(2):
        total = {}
        for one.rank in (0, 1):
            one.model.zero_grad()
            for _, loss in one.losses(step):
                loss.backward()
            for name, p in one.model.named_parameters():
                total[name] = total.get(name, 0) + p.grad / 2
        norm = torch.stack([g.norm() for g in total.values()]).norm()
        assert lines[step]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        scale = min(1.0, one.config.clip / norm.item())
        rate = one.rate(step)
        one.optimizer.step({name: g * scale for name, g in total.items()}, rate * one.config.muon_lr, rate * one.config.adam_lr)
    state = load_file(tmp_path / "two" / "state.safetensors")
    for name, value in one.optimizer.master.items():
        torch.testing.assert_close(state[f"master.{name}"], value, rtol=0, atol=2e-6)
