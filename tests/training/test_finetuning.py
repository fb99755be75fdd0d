"""Whole runs on the tiny cascade: against a plain loop, broken and resumed, with all that is shown on the way."""

import hashlib
import json
import os
import signal

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from engine.cascade import Cascade
from engine.config import FinetuneConfig
from engine.diffusion.augmentation import augment
from engine.diffusion.conditioning import downsample, upsample
from engine.diffusion.noise import frame_noise
from engine.diffusion.schedule import COSINE
from engine.errors import ConfigError, LockedError, NumericError
from engine.media import read_clip
from engine.models.unet import VideoUNet
from engine.runtime import weights
from engine.training import checkpoint, finetuning
from engine.training.data import batch_seed
from engine.training.finetune_data import Source
from engine.training.finetuning import Finetuning, StageFinetuning
from engine.training.guards import RunLock

SMALL = {"steps": 4, "lr": 1e-3, "stages": ("base",), "dtype": "fp32", "save_every": 2, "device": "cpu", "aug_level_max": 0.2}


@pytest.fixture(scope="module")
def clip(film, tmp_path_factory):
    return film(tmp_path_factory.mktemp("clip") / "clip.mp4", [((7 * k) % 29) / 15 - 1 for k in range(32)])


@pytest.fixture
def start(tiny, clip, tmp_path, own_cache):
    def make(out="run", source=None, allow=False, said=None, **changes) -> Finetuning:
        config = FinetuneConfig(**SMALL | changes)
        cascade = Cascade.load(tiny, "cpu", config.dtype, config.stages)
        return Finetuning(cascade, source or Source(clip), config, tmp_path / out, allow_config_change=allow,
                          say=(said if said is not None else []).append)

    return make


def lines(run, *keys):
    found = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line.get(key) for key in keys) for line in found] if keys else found


def state(run, stage="base"):
    """The bytes of a stage's last state."""
    folder = run.out / stage / "checkpoints"
    files = sorted((folder / (folder / "LATEST").read_text().strip()).glob("*.safetensors"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def reference(tiny, clip, stage_name, config, steps):
    """Algorithm as the paper has it: one pass a loss, torch's AdamW. -> losses, weights."""
    cascade = Cascade.load(tiny, "cpu", "fp32", (stage_name,))
    names = [stage.name for stage in cascade.config.stages]
    stage, text = cascade.config.stage(stage_name), cascade.encode(["sks"])
    T, H, W = stage.frames, stage.height, stage.width
    before = cascade.config.stages[names.index(stage_name) - 1]
    video = read_clip(clip, frames=T, fps=stage.fps, height=H, width=W).video
    pictures = read_clip(clip, frames=32, fps=24, height=H, width=W).video
    network = weights.load(lambda: VideoUNet(stage.unet), tiny / stage_name, torch.device("cpu"), torch.float32)
    network.requires_grad_(True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=0.0, foreach=False)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for kind, weight in (("video", config.alpha), ("frames", 1 - config.alpha)):
            if weight == 0:
                continue
            seed = batch_seed(config.seed, stage_name, "finetune", step, kind, 0)
            generator = torch.Generator().manual_seed(seed)
            s = torch.rand(1, generator=generator)
            order = torch.randperm(32, generator=torch.Generator().manual_seed(batch_seed(seed, "choice")))[:T]
            x = (video if kind == "video" else pictures[order].half().float())[None]
            extra = {}
            if stage_name != "base":
                level = torch.rand(1, generator=generator) * config.aug_level_max
                small = downsample(x, before.frames, before.height, before.width)
                noise = frame_noise(config.seed, stage_name, f"finetune aug {step} {kind} 0", range(T), (before.height, before.width, 3))
                lowres = upsample(augment(small, level, noise[None]), T, H, W)
                x = (x - lowres) / 0.1
                extra = {"lowres": lowres, "aug_level": level}
            eps = frame_noise(config.seed, stage_name, f"finetune {step} {kind} 0", range(T), (H, W, 3))[None]
            gamma, sigma = COSINE.gamma(s)[:, None, None, None, None], COSINE.sigma(s)[:, None, None, None, None]
            z = gamma * x + sigma * eps
            out = network(z, s, text.tokens, text.mask, independent_frames=torch.tensor([kind == "frames"]), **extra)
            if stage_name == "base":                                        # a v-network; ||x - x^|| = sigma ||v - v^||
                loss = (out - (gamma * eps - sigma * x)).square().flatten(1).mean(-1)[0] * sigma.square().flatten()[0]
            else:
                loss = (out - x).square().flatten(1).mean(-1)[0]
            (weight * loss).backward()
            total += weight * loss.item()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip, foreach=False)
        optimizer.step()
        losses.append(total)
    return losses, dict(network.named_parameters())


@pytest.mark.parametrize(("alpha", "stage"), [(1.0, "base"), (0.35, "base"), (0.0, "base"), (0.35, "ssr2"),
                                               pytest.param(1.0, "ssr2", marks=pytest.mark.slow)])
def test_a_run_is_the_plain_loop(start, tiny, clip, alpha, stage):
    run = start(alpha=alpha, stages=(stage,), steps=5, clip=1e6)
    assert run.run() == 0
    losses, want = reference(tiny, clip, stage, run.config, 5)
    found = dict(run.finetuned(stage))
    begun = load_file(tiny / stage / weights.WEIGHTS_NAME)
    assert any((found[name] - begun[name]).abs().max() > 1e-3 for name in begun)
    for name, value in want.items():
        if alpha in (0.0, 1.0):                                             # one pass here and there: the same bits
            assert torch.equal(found[name], value), name
        else:
            torch.testing.assert_close(found[name], value.detach(), rtol=1e-5, atol=2e-5, msg=name)
    assert [line["loss"] for line in lines(run)] == pytest.approx(losses, rel=1e-5)
    for line in lines(run):
        assert (line["video"] is None) == (alpha == 0) and (line["frames"] is None) == (alpha == 1)
        assert float.fromhex(line["loss_hex"]) == line["loss"] and line["applied"] and line["lr"] == 1e-3


def test_a_loss_of_weight_0_is_not_run(start, monkeypatch):
    seen, real = [], VideoUNet.forward

    def forward(self, *args, independent_frames=None, **more):
        seen.append(independent_frames.tolist())
        return real(self, *args, independent_frames=independent_frames, **more)

    monkeypatch.setattr(VideoUNet, "forward", forward)
    for changes, want in (({"alpha": 1.0}, [[False]]), ({"alpha": 0.0}, [[True]]), ({}, [[False, True]]),
                          ({"draws": 2}, [[False, True] * 2]), ({"draws": 2, "accumulate": 3}, [[False, True], [False, True]]),
                          ({"accumulate": 2}, [[False], [True]])):
        seen.clear()
        start(out=str(changes), steps=1, **changes).run()
        assert seen == want


def test_accumulated_passes_are_one(start):
    one, two = start(steps=3), start(out="two", steps=3, accumulate=2)
    one.run(), two.run()
    for (name, a), (_, b) in zip(one.finetuned("base"), two.finetuned("base")):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=name)
    assert lines(one, "video", "frames") == [pytest.approx(pair, rel=1e-5) for pair in lines(two, "video", "frames")]


@pytest.mark.parametrize("changes", [
    {"dtype": "bf16", "optimizer": "adamw8bit"}, pytest.param({}, marks=pytest.mark.slow),
    pytest.param({"dtype": "bf16", "master": "stochastic"}, marks=pytest.mark.slow),
    pytest.param({"in_backward": True, "gradient_checkpointing": True}, marks=pytest.mark.slow)], ids=str)
def test_a_broken_run_goes_on_with_the_same_bits(start, monkeypatch, changes):
    changes = {"stages": ("base", "ssr1"), "stage_steps": {"base": 3, "ssr1": 5}, **changes}
    whole, broken = start("whole", **changes), start("broken", **changes)
    assert whole.run() == 0
    step, done = StageFinetuning.step, []

    def killed(self, index):
        if len(done) == 6:                                                  # in the fourth step of ssr1, after the save at its second
            raise KeyboardInterrupt
        done.append(index)
        return step(self, index)

    monkeypatch.setattr(StageFinetuning, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    assert len(lines(broken)) == 6
    monkeypatch.setattr(StageFinetuning, "step", step)
    again = start("broken", **changes)
    assert again.run() == 0
    assert lines(again, "stage", "step", "loss_hex", "grad_norm") == lines(whole, "stage", "step", "loss_hex", "grad_norm")
    assert len(lines(again)) == 8
    for stage in ("base", "ssr1"):
        assert state(again, stage) == state(whole, stage)
    product = [sorted((path.relative_to(run.out).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest())
                      for path in (run.out / "product").rglob("*.safetensors")) for run in (whole, again)]
    assert product[0] == product[1] and len(product[0]) == 2


def test_a_finished_run_only_writes_its_product_again(start, monkeypatch):
    run = start()
    run.run()
    monkeypatch.setattr(StageFinetuning, "step", None)
    before = state(run)
    assert start().run() == 0
    assert state(run) == before and len(lines(run)) == 4


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_leaves(start, monkeypatch, number, code):
    whole, run = start("whole"), start()
    whole.run()
    step = StageFinetuning.step

    def hit(self, index):
        if index == 2:
            os.kill(os.getpid(), number)
        return step(self, index)

    monkeypatch.setattr(StageFinetuning, "step", hit)
    assert run.run() == code
    assert [line["step"] for line in lines(run)] == [1, 2, 3]
    assert (run.out / "base" / "checkpoints" / "step-3").is_dir() and not (run.out / "product").exists()
    monkeypatch.setattr(StageFinetuning, "step", step)
    assert start().run() == 0
    assert state(run) == state(whole)


def test_a_changed_run_is_refused(start, film, tmp_path):
    start().run()
    for changes, word in (({"alpha": 0.5}, "alpha"), ({"seed": 1}, "seed"), ({"lr": 2e-3}, "lr"),
                          ({"source": Source(film(tmp_path / "other.mp4", [0.0] * 32))}, "input")):
        with pytest.raises(ConfigError, match=word):
            start(**changes).run()
    assert start(preview_prompt="a red circle", keep=3).run() == 0          # no weight hears of these
    said = []
    assert start(alpha=0.5, allow=True, said=said).run() == 0 and any("alpha" in line for line in said)


def test_one_run_a_folder(start):
    run = start()
    with RunLock(run.out), pytest.raises(LockedError):
        run.run()


def test_a_number_that_is_none_is_left_out_and_three_end_the_run(start, monkeypatch):
    errors, bad = finetuning.Objective.errors, []

    def spoiled(self, network, batch):
        found = errors(self, network, batch)
        bad.append(len(bad))
        return found * float("nan") if bad[-1] in spoil else found

    monkeypatch.setattr(finetuning.Objective, "errors", spoiled)
    spoil, said = {1}, []
    run = start(said=said)
    assert run.run() == 0
    assert [line["applied"] for line in lines(run)] == [True, False, True, True] and any("left out" in line for line in said)
    spoil, _ = {1, 2, 3}, bad.clear()
    lost = start("lost", save_every=1)
    with pytest.raises(NumericError):
        lost.run()
    kept = checkpoint.latest(lost.out / "base" / "checkpoints", notes=[])
    assert kept.applied_steps == 1 and not (lost.out / "product").exists()
    monkeypatch.setattr(finetuning.Objective, "errors", errors)
    one = start("one", steps=1)
    one.run()
    whole = dict(one.finetuned("base"))
    assert all(torch.equal(value, whole[name]) for name, value in lost.finetuned("base"))       # as the last good step left them


def test_temporal_layers_frozen_for_frames(start, tiny):
    run = start(alpha=0.0, temporal_learns_from_frames=False)
    run.run()
    begun = load_file(tiny / "base" / weights.WEIGHTS_NAME)
    for name, value in run.finetuned("base"):
        assert torch.equal(value, begun[name]) == (".temporal." in name or "frame_index" in name), name


def test_it_is_shown(start):
    run = start(stages=("base", "ssr1"), steps=3, preview_every=2, preview_prompt="a blue square", preview_steps=2)
    plain = start("plain", stages=("base", "ssr1"), steps=3)
    run.run(), plain.run()
    pictures = sorted(path.name for path in (run.out / "previews").iterdir())
    assert pictures == ["base-00002.png", "base-00003.png", "ssr1-00002.png", "ssr1-00003.png"]
    with Image.open(run.out / "previews" / "ssr1-00003.png") as sheet:
        assert sheet.height > 3 * 16                                        # input, reconstruction, edit
    assert [(line["step"], "psnr" in line) for line in lines(run)] == [(1, False), (2, True), (3, True)] * 2
    assert lines(run, "loss_hex") == lines(plain, "loss_hex")               # looking changes nothing


def test_pictures_alone(start, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k in range(3):
        Image.new("RGB", (40, 30), (80 * k, 10, 10)).save(folder / f"{k}.png")
    run = start(source=Source(folder, images=True), alpha=0.0, stages=("base", "ssr1"), steps=2, preview_every=2, preview_steps=2)
    assert run.run() == 0
    assert all(line["video"] is None and line["frames"] > 0 for line in lines(run))


def test_other_loggers(start):
    pytest.importorskip("tensorboard")
    run = start(steps=2, report_to=("tensorboard",))
    run.run()
    assert list((run.out / "tensorboard").iterdir())


def test_a_logger_that_is_not_there(start, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "trackio", None)
    with pytest.raises(ConfigError, match="trackio"):
        start(report_to=("trackio",)).run()
