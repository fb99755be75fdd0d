"""Every kernel compiles for the GPUs of today without one, without spilling registers and within the part's shared memory."""

import json
import os
import subprocess
import sys

import pytest

from dreamix_kernels import aot, dispatch

pytest.importorskip("triton")


def compiled(*arguments):
    """The command's result, in a process of its own: where this one has no GPU it has Triton's interpreter, which compiles nothing."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", "dreamix_kernels.aot", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=290)


@pytest.mark.parametrize("op", dispatch.TRITON_OPS)
def test_kernels_compile_without_spills(op, tmp_path):
    result = compiled("--op", op, "--json", str(tmp_path / "report.jsonl"))
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    assert {row["arch"] for row in rows} == {"sm_80", "sm_90"}
    for dtype in ("fp32", "bf16", "fp16"):
        assert any(dtype in row["kernel"] for row in rows), f"no case in {dtype}"


@pytest.mark.slow
@pytest.mark.parametrize("arch", [86, 89])
def test_small_parts_have_kernels_that_fit(arch):
    """What their launchers pick: the wide rolling convolution is left to cuDNN there. (At 192 and 256 channels a few bytes do spill.)"""
    result = compiled("--op", "temporal_conv", "--arch", str(arch))
    assert f"sm_{arch}" in result.stdout and "wants" not in result.stdout, result.stdout[-3000:] + result.stderr[-3000:]


@pytest.mark.parametrize("row, words", [
    ({"arch": "sm_80", "spill_bytes": 0, "shared_bytes": 166912}, None),
    ({"arch": "sm_80", "spill_bytes": 0, "shared_bytes": 166913}, "shared memory"),
    ({"arch": "sm_90", "spill_bytes": 8, "shared_bytes": 0}, "spills 8 bytes"),
])
def test_what_counts_as_a_problem(row, words):
    assert (aot.problem(row) is None) if words is None else words in aot.problem(row)
