import json
import shutil
import subprocess
import sys

import pytest
import torch

from dreamix_kernels import dispatch
from engine.runtime import environment


@pytest.fixture(scope="module")
def found():
    return environment.describe()


def test_has_all_parts_and_is_json(found):
    assert set(found) == {"versions", "devices", "default_dtype", "kernels", "attention"}
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_versions_are_those_installed(found):
    assert found["versions"]["torch"] == torch.__version__ or found["versions"]["torch"] == torch.__version__.split("+")[0]
    assert found["versions"]["python"] == sys.version.split()[0]
    assert set(environment.PACKAGES) < set(found["versions"])


def test_a_missing_package_is_none(monkeypatch):
    monkeypatch.setattr(environment, "PACKAGES", ("torch", "no-such-package-at-all"))
    assert environment.versions()["no-such-package-at-all"] is None


def test_one_device_is_the_default(found):
    assert sum(d["default"] for d in found["devices"]) == 1
    cpu = found["devices"][0]
    assert cpu["device"] == "cpu" and cpu["threads"] == torch.get_num_threads() and cpu["name"]
    assert len(found["devices"]) == 1 + torch.cuda.device_count()
    assert found["default_dtype"] in ("fp32", "bf16", "fp16")


def test_every_backend_and_kernel_has_a_reason(found):
    for entry in found["attention"] + found["kernels"]:
        assert entry["reason"] and "\n" not in entry["reason"]
    assert {entry["kernel"] for entry in found["kernels"]} == set(dispatch.TRITON_OPS)
    assert [entry["backend"] for entry in found["attention"]] == ["sdpa", "xformers", "products"]
    assert [entry["used"] for entry in found["attention"]] == [True, False, False] and found["attention"][0]["works"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_cpu_runs_its_own_kernels_and_says_so(found):
    runs = {entry["kernel"]: entry["implementation"] for entry in found["kernels"]}
    compiled = "c++" if shutil.which("c++") or shutil.which("g++") else "torch"
    assert runs == {"temporal_attention": compiled, "temporal_conv": "torch", "group_norm_silu": compiled}
    assert not found["attention"][1]["works"] and "GPU" in found["attention"][1]["reason"]


def test_nothing_heavy_is_imported():
    script = ("import sys; from engine.runtime import environment; environment.describe();"
              "print(sorted({'transformers', 'deepspeed', 'bitsandbytes', 'av'} & set(sys.modules)))")
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and result.stdout.strip() == "[]" and not result.stderr, result.stderr
