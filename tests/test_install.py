"""What is installed: every module and every config is in the wheel and found there; the README's commands are what CI runs."""

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from engine import __version__, paths
from engine.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
INSTALL = 'python -m venv .venv && . .venv/bin/activate && pip install -e ".[test]" -c constraints/cpu.txt && '


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what a build reads: building writes beside its sources."""
    root = tmp_path_factory.mktemp("build") / "tree"
    for name in ("engine", "kernels", "configs"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    (root / "configs/cascade/nested").mkdir()
    (root / "configs/cascade/nested/blob.bin").write_bytes(bytes(range(256)))
    return root


@pytest.fixture(scope="module")
def wheel(tree):
    if tuple(map(int, importlib.metadata.version("setuptools").split(".")[:2])) < (70, 1):
        pytest.skip("setuptools before 70.1 builds no wheel without the package wheel")
    subprocess.run([sys.executable, "setup.py", "-q", "bdist_wheel", "-d", "dist"], cwd=tree, check=True, capture_output=True, timeout=120)
    return next((tree / "dist").glob("dreamix-*.whl"))


def files(folder: Path, prefix: str) -> set[str]:
    return {prefix + path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}


def test_the_wheel_holds_every_module_and_config(tree, wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = files(tree / "engine", "engine/") | files(tree / "kernels/dreamix_kernels", "dreamix_kernels/")
    configs = files(tree / "configs", "engine/_configs/")
    assert len(modules) > 10 and "engine/_configs/cascade/imagen_video.yaml" in configs
    metadata = f"dreamix-{__version__}.dist-info/"
    assert modules | configs == {name for name in names if not name.startswith(metadata)}        # nothing missing, and no tests
    assert metadata + "licenses/LICENSE" in names


def test_an_installed_wheel_finds_its_configs(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "site/configs").mkdir()                    # another package's folder of the same name must not win
    code = ("import json, importlib.util, engine\nfrom engine.paths import config_root\nfrom engine.config_io import load_config\n"
            "from engine.config import CascadeConfig\nroot = config_root()\n"
            "cascade = load_config(CascadeConfig, root / 'cascade/imagen_video.yaml')\n"
            "print(json.dumps([engine.__file__, str(root), cascade.name, len((root / 'cascade/nested/blob.bin').read_bytes()),\n"
            "                  importlib.util.find_spec('dreamix_kernels').origin]))")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
                            capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    file, root, name, length, kernels = json.loads(result.stdout)
    site = (tmp_path / "site").resolve()
    assert Path(file) == site / "engine/__init__.py" and Path(kernels) == site / "dreamix_kernels/__init__.py"
    assert Path(root) == site / "engine/_configs" and name == "imagen_video" and length == 256


def test_a_checkout_uses_its_own_configs(monkeypatch, tmp_path):
    assert paths.config_root() == ROOT / "configs"
    monkeypatch.setattr(paths, "_PACKAGE", tmp_path / "engine")
    with pytest.raises(ConfigError, match="_configs"):
        paths.config_root()


def test_requirements_are_the_ones_that_were_resolved_together():
    call = next(node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.Call)
                and getattr(node.func, "id", "") == "setup")
    arguments = {keyword.arg: keyword.value for keyword in call.keywords}
    required = {re.split(r"[<>=]", line)[0]: line for line in ast.literal_eval(arguments["install_requires"])}
    assert {"torch", "triton", "xformers", "bitsandbytes", "deepspeed", "transformers"} <= set(required)
    assert required["torch"] == "torch>=2.11,<2.14"        # without the cap the newest CUDA build is fetched
    assert "pytest>=8" in ast.literal_eval(arguments["extras_require"])["test"]
    assert (ROOT / "constraints/cpu.txt").read_text() == "torch==2.13.0\n"
    assert (ROOT / "constraints/gpu-cu130.txt").read_text() == "torch==2.11.0\ntriton==3.6.0\n"
    tested = [line for line in (ROOT / "constraints/tested.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line) for line in tested) and "torch==2.13.0" in tested


@pytest.mark.parametrize("name, last", [("demo", "python -m engine.infer demo"), ("test", "pytest -q")])
def test_ci_runs_the_readmes_commands(name, last):
    printed = subprocess.run([ROOT / ".ci/run", "--print", name], check=True, capture_output=True, text=True, timeout=20).stdout
    assert printed == INSTALL + last + "\n"
    assert printed in (ROOT / "README.md").read_text()


def test_ci_notices_a_missing_command():
    result = subprocess.run([ROOT / ".ci/run", "--print", "nothing"], capture_output=True, text=True, timeout=20)
    assert result.returncode != 0 and "<!-- ci: nothing -->" in result.stderr


@pytest.mark.parametrize("demo, test, code", [
    ("true", "echo '1 passed, 2 skipped in 0.01s'", 0), ("false", "echo '1 passed in 0.01s'", 1),
    ("true", "echo '1 failed in 0.01s'; false", 1),
    ("true", "echo nothing collected", 1), ("test ! -e stray && touch stray", "test -e stray && echo '= 3 passed in 61.2s (0:01:01) ='", 0),
])  # fmt: skip
def test_ci_ends_with_pytests_closing_line(tmp_path, demo, test, code):
    """The script itself, in a tree whose README has other commands."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci/run")
    (tmp_path / "README.md").write_text(f"<!-- ci: demo -->\n```bash\n{demo}\n```\ntext\n\n<!-- ci: test -->\n```bash\n{test}\n```\n")
    result = subprocess.run([tmp_path / ".ci/run"], capture_output=True, text=True, timeout=30)
    assert result.returncode == code, result.stderr
    assert re.search(r"passed|failed|no closing line", result.stdout.splitlines()[-1])
    assert not (tmp_path / "stray").exists()
