import json
import subprocess
import sys

import pytest
import torch

from benchmarks import profile_gpu, run_gpu

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@without_gpu
@pytest.mark.parametrize("script", [run_gpu, profile_gpu])
def test_without_a_gpu_there_is_nothing_to_do(script, tmp_path):
    done = subprocess.run([sys.executable, script.__file__, "--out", str(tmp_path / "out")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "nothing to do" in done.stderr and not (tmp_path / "out").exists()


@pytest.fixture
def pretend(monkeypatch):
    """A GPU by name, and three parts instead of the real ones."""
    def make(*parts):
        monkeypatch.setattr(run_gpu, "gpu_name", lambda: "a GPU")
        monkeypatch.setattr(run_gpu, "parts", lambda out: [(name, share, [sys.executable, "-c", code]) for name, share, code in parts])
    return make


def test_every_part_has_its_log_and_its_verdict(pretend, tmp_path, capsys):
    pretend(("good", 1, "print('fine')"), ("bad", 1, "raise SystemExit(3)"), ("after", 1, "print('still run')"))
    assert run_gpu.main(["--out", str(tmp_path), "--minutes", "1"]) == 1
    assert (tmp_path / "good.log").read_text() == "fine\n" and (tmp_path / "after.log").read_text() == "still run\n"
    parts = json.loads((tmp_path / "summary.json").read_text())["parts"]
    assert [part["exit_code"] for part in parts] == [0, 3, 0]
    said = capsys.readouterr().out
    assert "good" in said and "passed" in said and "failed (3)" in said


def test_a_part_that_hangs_is_stopped_and_the_next_one_runs(pretend, tmp_path):
    pretend(("hangs", 0.005, "import time; print('begun', flush=True); time.sleep(60)"), ("next", 1, "print('here')"))
    assert run_gpu.main(["--out", str(tmp_path), "--minutes", "4"]) == 1
    assert (tmp_path / "hangs.log").read_text().startswith("begun") and (tmp_path / "next.log").read_text() == "here\n"
    assert [part["exit_code"] for part in json.loads((tmp_path / "summary.json").read_text())["parts"]] == [None, 0]


def test_all_passed(pretend, tmp_path):
    pretend(("good", 1, "pass"))
    assert run_gpu.main(["--out", str(tmp_path)]) == 0


def test_parts_name_files_that_exist(tmp_path):
    for _, share, command in run_gpu.parts(tmp_path):
        assert 0 < share < 1
        for word in command:
            if word.startswith(("benchmarks/", "tests/")):
                assert (run_gpu.ROOT / word).exists(), word
