"""The finetuning command: its settings, presets by name, exit codes, and how it is started."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine import finetune
from engine.config import FinetuneConfig
from engine.config_io import load_config
from engine.paths import config_root

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["--steps", "2", "--dtype", "fp32", "--device", "cpu", "--stages", "base", "--lr", "1e-3", "--quiet"]


def settings(*line):
    return finetune.settings(finetune.parser().parse_args(line))


@pytest.fixture
def clip(film, tmp_path):
    return film(tmp_path / "clip.mp4", [k / 16 - 1 for k in range(32)])


def test_the_papers_presets_by_name():
    """App. A.3 and B."""
    for name, alpha, steps in (("video", 1.0, 64), ("mixed", 0.35, 300), ("frames", 0.0, 100)):
        config = settings("--video", "x", "--config", name)
        assert (config.alpha, config.steps, config.lr, config.stages) == (alpha, steps, 6e-6, ("base", "ssr1", "ssr2"))
        assert not config.stage_lr and not config.stage_steps
    assert settings("--video", "x", "--config", "mixed") == FinetuneConfig()


def test_every_preset_is_one():
    found = sorted((config_root() / "finetune").glob("*.yaml"))
    assert {"video", "mixed", "frames", "sprites_video", "sprites_mixed", "sprites_frames"} <= {path.stem for path in found}
    for path in found:
        config = load_config(FinetuneConfig, path)
        assert path.stem.removeprefix("sprites_") == {1.0: "video", 0.0: "frames"}.get(config.alpha, "mixed")


def test_a_cascade_brings_its_own():
    own = settings("--video", "x")
    assert own.lr_of("base") > 6e-6 and own.aug_level_max < 0.1
    assert settings("--video", "x", "--cascade", "imagen_video") == FinetuneConfig()
    assert settings("--images", "x").alpha == 0
    assert settings("--images", "x", "--config", "mixed").alpha == 0


def test_flags_win_over_files_and_set_over_flags(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("alpha: 0.5\nsteps: 7\nstage_steps: {base: 9}\nseed: 4\n")
    config = settings("--video", "x", "--config", str(path), "--steps", "8", "--set", "seed=5", "--stages", "ssr1, base", "--lora", "4",
                      "--report-to", "tensorboard", "--report-to", "wandb", "--preview-prompt", "a: {b}", "--local_rank=1")
    assert (config.alpha, config.steps_of("base"), config.seed, config.stages, config.lora_rank) == (0.5, 8, 5, ("ssr1", "base"), 4)
    assert config.report_to == ("tensorboard", "wandb") and config.preview_prompt == "a: {b}"


@pytest.mark.parametrize(("line", "code", "word"), [
    (["--out", "o"], 2, "want --video"),
    (["--video", "x"], 2, "--out"),
    (["--video", "x", "--out", "o", "--config", "mixd"], 2, "did you mean mixed"),
    (["--video", "x", "--out", "o", "--alpha", "2"], 2, "alpha"),
    (["--video", "x", "--out", "o", "--stages", "ssr3"], 2, "stages"),
    (["--video", "x", "--out", "o", "--set", "stage_steps.tsr1=4"], 2, "stage_steps"),
    (["--video", "x", "--out", "o", "--set", "alhpa=1.0"], 2, "did you mean alpha"),
    (["--video", "x", "--out", "o", "--cascade", "spirtes"], 2, "did you mean sprites"),
    (["--video", "nowhere.mp4", "--out", "o"], 3, "nowhere.mp4"),
    (["--images", "nowhere", "--out", "o"], 3, "nowhere"),
    (["--images", ".", "--out", "o", "--set", "alpha=1.0"], 2, "alpha"),
])
def test_one_line_and_a_code(line, code, word, capsys, tmp_path, monkeypatch, own_cache):
    monkeypatch.chdir(tmp_path)
    assert finetune.main(line) == code
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and told[0].startswith("error: ") and word in told[0]


def test_a_run(clip, tiny, tmp_path, capsys, own_cache):
    out = tmp_path / "out"
    line = ["--video", str(clip), "--out", str(out), "--cascade", str(tiny), *QUICK]
    assert finetune.main(line) == 0
    assert capsys.readouterr().out.strip() == str(out / "product") and (out / "product" / "dreamix.json").is_file()
    assert [json.loads(one)["step"] for one in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert finetune.main([*line, "--seed", "3"]) == 2 and "seed was 0, is 3" in capsys.readouterr().err
    (out / "base" / "checkpoints" / "step-2" / "manifest.json").write_text("{}")
    assert finetune.main(line) == 4


def test_started_by_its_path(clip, tiny, tmp_path, own_cache):
    """As the deepspeed launcher does it, from elsewhere: engine/ on the path must not hide other modules."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels"), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, str(ROOT / "engine" / "finetune.py"), "--local_rank=0", "--video", str(clip), "--out", "out"]
    line += ["--cascade", str(tiny), *QUICK]
    result = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "out/product"


def test_help_loads_nothing_heavy():
    script = ("import runpy, sys\ntry: runpy.run_module('engine.finetune', run_name='__main__', alter_sys=True)\nexcept SystemExit: pass\n"
              "print([m for m in ('torch', 'deepspeed', 'bitsandbytes', 'transformers', 'pydantic', 'av') if m in sys.modules])")
    result = subprocess.run([sys.executable, "-c", script, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout.strip().endswith("[]") and "--preview-prompt" in result.stdout


def test_the_plan_loads_nothing(tiny, capsys):
    assert finetune.main(["--plan", "--cascade", str(tiny), "--gpu-memory", "141", "--stages", "base"]) == 0
    assert "base" in capsys.readouterr().out
    assert finetune.main(["--plan", "--cascade", str(tiny), "--gpu-memory", "0.5", "--stages", "base"]) == 8
    told = capsys.readouterr()
    assert told.err.startswith("error: ") and len(told.err.strip().splitlines()) == 1
