"""What the judge of a cascade says of networks whose answers are known: oracles, copies, and ones that do nothing."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.cascade import StageRun
from engine.cascade_folder import write_index
from engine.config import STAGE_ORDER, CascadeConfig, SampleConfig, StageConfig
from engine.diffusion.conditioning import downsample, resize
from engine.diffusion.noise import frame_noise
from engine.diffusion.schedule import CosineSchedule, add_noise
from engine.errors import NumericError
from engine.models.text import TextEmbedding
from engine.models.unet import VideoUNet
from engine.sprites import ATTRIBUTES, is_held_out, parse, render
from engine.sprites.readout import score
from engine.training import evaluate as module
from engine.training.evaluate import edits, held_out, judge_base, judge_edits, judge_super_resolution, main, one_chunk, psnr

BUNDLED = Path(__file__).parents[2] / "configs" / "cascade" / "sprites"
SIZES = {"base": (4, 24, 40, 3), "tsr1": (8, 24, 40, 6), "ssr1": (8, 48, 80, 6), "ssr2": (8, 48, 80, 6), "tsr2": (16, 48, 80, 12),
         "tsr3": (16, 48, 80, 12), "ssr3": (16, 48, 80, 12)}
FAST = SampleConfig(seed=3)


def stage(name: str, **values) -> StageConfig:
    frames, height, width, fps = SIZES[name]
    unet = dict(channels=8, channel_mults=(1,), num_blocks=(1,), space_to_depth=4, groups=4, text_dim=128, lowres=name != "base")
    diffusion = {} if name == "base" else dict(prediction="x0", residual_scale=0.1)
    temporal = {"temporal_upsample": "linear"} if name.startswith("tsr") else {}
    return StageConfig(**dict(name=name, frames=frames, height=height, width=width, fps=fps, steps=3, unet=unet, diffusion=diffusion,
                              **temporal, chunk_frames=8 if name == "ssr3" else None) | values)


def numbered(count: int) -> TextEmbedding:
    """Embeddings that only carry the number of their clip, so that an oracle knows which one it is asked for."""
    return TextEmbedding(torch.arange(count).float()[:, None, None], torch.ones(count, 1, dtype=torch.bool))


def oracle(clips, schedule=None):
    """A v-predicting network that always knows the clean clips."""
    schedule = schedule or CosineSchedule()

    def network(z, time, tokens, mask, lowres=None, aug_level=None):
        x0 = clips[tokens[:, 0, 0].long()]
        gamma, sigma = (f(time).view(-1, 1, 1, 1, 1) for f in (schedule.gamma, schedule.sigma))
        return gamma * (z - gamma * x0) / sigma - sigma * x0
    return network


def residual_oracle(clips):
    return lambda z, time, tokens, mask, lowres, aug_level: (clips[tokens[:, 0, 0].long()][:, : z.shape[1]] - lowres) / 0.1


def nothing(z, time, tokens, mask, lowres=None, aug_level=None):
    return torch.zeros_like(z)


def test_psnr_is_its_closed_form_for_each_clip():
    clean = torch.zeros(3, 2, 4, 4, 3)
    noisy = clean + torch.tensor([1.0, 0.2, 0.02]).view(3, 1, 1, 1, 1)
    assert psnr(noisy, clean).tolist() == pytest.approx([20 * math.log10(2 / d) for d in (1.0, 0.2, 0.02)], abs=1e-5)
    assert psnr(noisy, clean)[1].item() == pytest.approx(20.0, abs=1e-5)                   # a tenth of the range
    half = clean.clone()
    half[:, 0] = 0.2                                                                       # half of the numbers are off: 10 log10(2) more
    assert psnr(half, clean)[0].item() == pytest.approx(20.0 + 10 * math.log10(2), abs=1e-5)
    assert psnr(clean, clean).isinf().all()
    with pytest.raises(ValueError, match="one shape"):
        psnr(clean, clean[:1])


def test_held_out_scenes_and_their_captions():
    scenes, texts = held_out(60, 1)
    assert is_held_out(scenes).all()
    assert [parse(text) for text in texts] == [scenes.attributes(i) for i in range(60)]
    assert held_out(60, 1)[1] == texts != held_out(60, 2)[1]


def test_base_scores_one_for_the_truth_and_less_for_the_neighbours_clip():
    scenes, _ = held_out(6, 0)
    base = stage("base", frames=16)
    truth = render(scenes, 16)
    report, video = judge_base(base, oracle(truth), numbered(6), scenes, FAST, batch=4)    # 4 and 2: batches do not mix clips up
    assert torch.allclose(video, truth, atol=1e-3)
    assert report["accuracy"] == {name: 1.0 for name in ATTRIBUTES} and report["match"] > 0.95
    assert all(t["met"] and t["margin"] == 1 - t["want"] for t in report["targets"].values()) and set(report["targets"]) == set(ATTRIBUTES)
    wrong, _ = judge_base(base, oracle(truth.roll(1, 0)), numbered(6), scenes, FAST)
    assert wrong["accuracy"] == score(truth.roll(1, 0), scenes)
    missed = wrong["targets"]["colour"]
    assert not missed["met"] and missed["margin"] == pytest.approx(wrong["accuracy"]["colour"] - 0.95) and missed["margin"] < 0


def test_each_clip_of_the_base_has_its_own_seed_whatever_the_batch():
    torch.manual_seed(0)
    base, (scenes, _) = stage("base"), held_out(3, 0)
    network = VideoUNet(base.unet).eval().requires_grad_(False)
    torch.nn.init.normal_(network.head.weight, std=0.05)
    text = TextEmbedding(torch.randn(3, 2, 128), torch.ones(3, 2, dtype=torch.bool))
    _, together = judge_base(base, network, text, scenes, FAST, batch=3)
    _, apart = judge_base(base, network, text, scenes, FAST, batch=1)
    alone = StageRun(base, network, text[2], FAST, 3, [FAST.seed + 2]).base(None, 1.0)
    assert torch.allclose(together, apart, atol=1e-4) and torch.equal(apart[2], alone[0])
    assert (together[0] - together[1]).abs().max() > 0.1


def test_a_video_that_is_not_finite_is_an_error_and_no_score():
    with pytest.raises(NumericError, match="base"):
        judge_base(stage("base"), lambda z, *_, **__: z * torch.nan, numbered(1), held_out(1, 0)[0], FAST)


def test_spatial_stage_against_bilinear_interpolation():
    scenes, _ = held_out(3, 4)
    before, ssr = stage("tsr1"), stage("ssr1")
    truth = render(scenes, 8, 48, 80)
    plain = psnr(resize(downsample(truth, 8, 24, 40), 48, 80), truth)
    idle = judge_super_resolution(ssr, before, nothing, numbered(3), scenes, FAST)
    assert idle["all"]["interpolation"] == pytest.approx(plain.mean().item(), abs=1e-6)
    assert idle["all"]["psnr"] == pytest.approx(idle["all"]["interpolation"], abs=1e-4) and set(idle) == {"clips", "frames", "all"}
    best = judge_super_resolution(ssr, before, residual_oracle(truth), numbered(3), scenes, FAST)["all"]
    assert best["psnr"] == 60 and best["wins"] == best["clips"] == 3
    assert best["gain"] == pytest.approx(60 - plain.mean().item(), abs=1e-6)
    halves = truth.clone()
    halves[1] = -1                                                                         # one clip ruined: it alone is lost
    assert judge_super_resolution(ssr, before, residual_oracle(halves), numbered(3), scenes, FAST)["all"]["wins"] == 2


def test_temporal_stage_is_judged_on_the_frames_it_made_and_where_something_moves():
    scenes, _ = held_out(4, 4)
    scenes = scenes.replace(motion=["left", "still", "up", "still"])
    before, tsr = stage("base"), stage("tsr1")
    truth = render(scenes, 8)
    given = truth[:, ::2]
    plain = truth.clone()
    plain[:, 1:-1:2] = (given[:, :-1] + given[:, 1:]) / 2                                  # the last one is held
    plain[:, -1] = given[:, -1]
    report = judge_super_resolution(tsr, before, nothing, numbered(4), scenes, FAST)
    assert [report[name]["clips"] for name in ("all", "new", "new_moving")] == [4, 4, 2]
    for name, clips, first, step in (("all", [0, 1, 2, 3], 0, 1), ("new", [0, 1, 2, 3], 1, 2), ("new_moving", [0, 2], 1, 2)):
        direct = psnr(plain[clips, first::step], truth[clips, first::step]).clamp(max=60).mean().item()
        assert report[name]["interpolation"] == pytest.approx(direct, abs=1e-6), name
    assert report["new"]["interpolation"] < report["all"]["interpolation"] and report["new_moving"]["interpolation"] < 40
    best = judge_super_resolution(tsr, before, residual_oracle(truth), numbered(4), scenes, FAST)
    assert best["new_moving"]["wins"] == 2 and best["new"]["wins"] == 2                    # still clips tie at the cap
    still = judge_super_resolution(tsr, before, nothing, numbered(4), scenes.replace(motion="still"), FAST)
    assert still["new_moving"] == {"clips": 0, "psnr": None, "interpolation": None, "gain": None, "wins": 0}


def test_one_chunk_is_the_start_of_the_whole():
    torch.manual_seed(0)
    ssr, before = stage("ssr3", aug_level=0.1), stage("tsr3")
    network = VideoUNet(ssr.unet).eval().requires_grad_(False)
    torch.nn.init.normal_(network.head.weight, std=0.05)
    text = TextEmbedding(torch.randn(1, 2, 128), torch.ones(1, 2, dtype=torch.bool))
    lowres = downsample(render(held_out(1, 0)[0], 16, 48, 80), 16, before.height, before.width)
    part, given = one_chunk(ssr, before)
    whole, first = (StageRun(s, network, text, FAST, 3, [0]).super_resolution(v) for s, v in ((ssr, lowres), (part, lowres[:, :given])))
    assert part.frames == 8 and given == 8 and torch.equal(first, whole[:, :8])


def test_edits_change_one_attribute_and_never_to_what_it_was():
    scenes, _ = held_out(60, 2)
    wanted, changed = edits(scenes, 2)
    for i in range(60):
        before, after = scenes.attributes(i), wanted.attributes(i)
        assert [name for name in ATTRIBUTES if before[name] != after[name]] == [changed[i]]
    assert changed[:7] == [*ATTRIBUTES, "shape"] and len({wanted.attributes(i)["colour"] for i in range(1, 60, 6)}) > 2
    for name in ("across", "down", "radius", "speed", "phase"):
        assert torch.equal(getattr(scenes, name), getattr(wanted, name))


def test_edits_by_an_oracle_by_a_copy_and_by_one_that_forgets(monkeypatch):
    monkeypatch.setattr(module, "STRENGTHS", (0.6, 1.0))
    scenes, _ = held_out(6, 5)
    wanted, changed = edits(scenes, 5)
    base = stage("base", frames=16, steps=10)
    truth, before = render(wanted, 16), render(scenes, 16)
    report = judge_edits(base, oracle(truth), numbered(6), scenes, wanted, changed, FAST, batch=4)
    assert list(report["strengths"]) == ["0.6", "1.0"] and report["clips"] == 6
    monkeypatch.setattr(module, "STRENGTHS", (0.8,))
    for row in report["strengths"].values():
        assert row["success"] == row["kept"] == row["both"] == 1 and row["psnr"] > 50
        assert row["success_per_attribute"] == {name: 1.0 for name in ATTRIBUTES}
    copy = judge_edits(base, oracle(before), numbered(6), scenes, wanted, changed, FAST)["strengths"]["0.8"]
    assert (copy["success"], copy["kept"], copy["both"]) == (0, 1, 0)
    assert report["input"]["success"] == 0 and report["input"]["kept"] == 1
    assert report["input"]["psnr"] == pytest.approx(psnr(before, truth).mean().item(), abs=1e-6) == pytest.approx(copy["psnr"], abs=1e-2)
    flat = truth.mean((2, 3), keepdim=True).expand_as(truth)
    assert judge_edits(base, oracle(flat), numbered(6), scenes, wanted, changed, FAST)["strengths"]["0.8"]["kept"] < 0.9


def test_edits_begin_at_the_degraded_clip_and_at_its_time():
    scenes, _ = held_out(2, 5)
    wanted, changed = edits(scenes, 5)
    base, asked = stage("base", steps=10, diffusion={"logsnr_shift": -3.0}), []
    clips = render(scenes, 4)

    def network(z, time, *_, **__):
        asked.append((time[0].item(), z.clone()))
        return torch.zeros_like(z)

    judge_edits(base, network, numbered(2), scenes, wanted, changed, FAST)
    starts = [0, *(sum((6, 7, 8, 9)[:k]) for k in range(1, 5))]
    assert len(asked) == 6 + 7 + 8 + 9 + 10
    eps = torch.stack([frame_noise(FAST.seed + i, "base", "init", range(4), (24, 40, 3)) for i in range(2)])
    for at, strength in zip(starts, (0.6, 0.7, 0.8, 0.9, 1.0)):
        time, z = asked[at]
        assert time == pytest.approx(strength)
        assert torch.allclose(z, add_noise(clips, eps, strength, CosineSchedule(-3.0)), atol=1e-6)


@pytest.fixture(scope="module")
def cascade(tmp_path_factory) -> Path:
    """Seven tiny networks of random weights on disk."""
    folder = tmp_path_factory.mktemp("cascade")
    config = CascadeConfig(name="tiny", text={"encoder": str(BUNDLED), "precision": "fp32", "max_tokens": 48},
                           stages=tuple(stage(name, steps=2) for name in STAGE_ORDER))
    write_index(folder, config)
    for k, name in enumerate(STAGE_ORDER):
        save(config.stage(name), folder / name, k)
    return folder


def save(config: StageConfig, folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    network = VideoUNet(config.unet)
    for p in network.parameters():
        if not p.any():                                                                    # what starts at zero would hide text and noise
            torch.nn.init.normal_(p, std=0.02)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), folder / "diffusion_pytorch_model.safetensors")


@pytest.fixture
def judge(cascade, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cascade / "cache"))

    def run(*flags) -> tuple[int, str]:
        code = main(["--cascade", str(cascade), "--device", "cpu", "--dtype", "fp32", "--count", "3", "--count-sr", "2", *map(str, flags)])
        printed = capsys.readouterr()
        return code, printed.out if code == 0 else printed.err
    return run


def test_command_judges_all_stages_on_held_out_scenes_only(judge, tmp_path, monkeypatch):
    seen = []
    for name in ("judge_base", "judge_super_resolution", "judge_edits"):
        original = getattr(module, name)

        def spy(*args, original=original, **kwargs):
            seen.extend(is_held_out(next(a for a in args if isinstance(a, module.Scenes))).tolist())
            return original(*args, **kwargs)
        monkeypatch.setattr(module, name, spy)
    monkeypatch.setattr(module, "STRENGTHS", (0.5,))
    code, out = judge("--json", "--edits", 4, "--seed", 11, "--sheet", tmp_path / "sheet.png")
    report = json.loads(out)
    assert code == 0 and all(seen) and len(seen) == 3 + 6 * 2 + 4
    assert list(report["super_resolution"]) == list(STAGE_ORDER[1:]) and report["super_resolution"]["ssr3"]["frames"] == 8
    assert report["base"]["clips"] == 3 and report["edits"]["clips"] == 4 and report["seed"] == 11 and report["guidance"] == 1
    assert (tmp_path / "sheet.png").read_bytes()[:4] == b"\x89PNG"
    again = json.loads(judge("--json", "--edits", 4, "--seed", 11, "--stage", "base", "ssr1")[1])
    assert again["super_resolution"]["ssr1"] == report["super_resolution"]["ssr1"]         # deterministic, bit for bit
    assert (again["base"], again["edits"]) == (report["base"], report["edits"])
    other = json.loads(judge("--json", "--seed", 12, "--stage", "base")[1])
    assert other["base"]["match"] != report["base"]["match"]


def test_command_takes_a_run_s_weights_guidance_and_steps(judge, cascade, tmp_path):
    plain = json.loads(judge("--json", "--stage", "base", "tsr1")[1])
    other = stage("base")
    save(other, tmp_path / "runs" / "base", 99)
    by_folder = json.loads(judge("--json", "--stage", "base", "tsr1", "--weights-folder", tmp_path / "runs")[1])
    by_name = json.loads(judge("--json", "--stage", "base", "tsr1", "--override", f"base={tmp_path / 'runs' / 'base'}")[1])
    assert by_folder == by_name and by_folder["weights"] == {"base": str(tmp_path / "runs" / "base"), "tsr1": str(cascade / "tsr1")}
    assert by_folder["base"]["match"] != plain["base"]["match"] and by_folder["super_resolution"] == plain["super_resolution"]
    guided = json.loads(judge("--json", "--stage", "base", "--guidance", 4)[1])
    assert guided["guidance"] == 4 and guided["base"]["match"] != plain["base"]["match"]
    more = json.loads(judge("--json", "--stage", "base", "--steps", "base=5")[1])
    assert more["steps"] == {"base": 5} and more["base"]["match"] != plain["base"]["match"]


def test_table_says_pass_or_miss_and_by_how_much(judge, monkeypatch):
    monkeypatch.setattr(module, "STRENGTHS", (0.6, 0.9))
    code, out = judge("--stage", "base", "tsr1", "--edits", 2)
    accuracy = json.loads(judge("--json", "--stage", "base")[1])["base"]["accuracy"]["shape"]
    line = next(line for line in out.splitlines() if line.split()[0] == "shape")
    verdict = "MISS" if accuracy < 0.8 else "pass"
    assert line.split() == ["shape", f"{accuracy:.3f}", "want", "0.80", verdict, "by", f"{abs(accuracy - 0.8):.3f}"]
    assert code == 0 and "new_moving" in out and "edits: 2" in out and len([row for row in out.splitlines() if row.startswith("  0.")]) == 2


@pytest.mark.parametrize("flags, code, says", [
    (["--stage", "tsr9"], 2, "tsr9"), (["--count", "0"], 2, "--count"), (["--count-sr", "0"], 2, "--count-sr"),
    (["--seed", "-1"], 2, "seed"),
    (["--override", "base"], 2, "NAME=VALUE"), (["--steps", "base=x"], 2, "steps"), (["--stage", "tsr1", "--edits", "2"], 2, "--edits"),
    (["--stage", "tsr1", "--override", "base=."], 2, "base"), (["--override", "base=/nowhere"], 4, "nowhere"),
    (["--weights-folder", "/nowhere"], 2, "--weights-folder")], ids=str)
def test_refusals_are_one_line(judge, flags, code, says):
    found, err = judge(*flags)
    assert found == code and err.startswith("error: ") and says in err and err.count("\n") == 1
