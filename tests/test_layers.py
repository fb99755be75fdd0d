"""The order of imports (DESIGN.md, section 4), read from the source of every file, and what `import engine` and `--help` may load."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Lowest first. Names in one string know each other; names in different strings of a layer are siblings and do not.
LAYERS = [
    ["dreamix_kernels", "engine engine.errors engine.strict_yaml engine.paths engine.config engine.config_io"],
    ["engine.media", "engine.diffusion", "engine.models", "engine.runtime", "engine.sprites"],
    ["engine.cascade engine.cascade_folder engine.cascade_plan engine.finetune_plan"],
    ["engine.dreamix engine.outputs"],
    ["engine.training"],
    ["engine.infer", "engine.finetune", "engine.pretrain", "engine.convert"],
]
PLACE = {name: (rank, group) for rank, layer in enumerate(LAYERS) for group in layer for name in group.split()}
KERNEL_IMPORTS = {"torch", "triton", "numpy", "dreamix_kernels"} | sys.stdlib_module_names
DEPENDENCIES = set("torch triton numpy transformers diffusers deepspeed bitsandbytes xformers safetensors av pydantic yaml tqdm PIL pytest "
                   "hypothesis kernels datasets accelerate evaluate gradio packaging regex".split())
SLOW = {"deepspeed", "transformers", "xformers", "bitsandbytes", "triton", "av"}


def sources(root: Path) -> dict[str, Path]:
    """Module name -> file, of the two packages."""
    found = {}
    for base, package in ((root, "engine"), (root / "kernels", "dreamix_kernels")):
        for path in sorted((base / package).rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(module: str, path: Path, modules: dict[str, Path]) -> list[tuple[int, str]]:
    """(line, absolute module) of every import statement and constant `import_module`, also those inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
            base = ".".join([*parents[: len(parents) - node.level + 1]] * bool(node.level) + [node.module] * bool(node.module))
            for alias in node.names:                       # `from engine import cascade` is engine.cascade
                full = f"{base}.{alias.name}"
                found.append((node.lineno, full if full in modules or full in PLACE else base))
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("import_module", "__import__"):
            if node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                found.append((node.lineno, node.args[0].value))
    return found


def place(module: str) -> tuple[int, str] | None:
    """(layer, siblings' group); a package's own files have its place. The bare `engine` has one, but lends it to no submodule."""
    if module in PLACE:
        return PLACE[module]
    parent = module.rpartition(".")[0]
    return place(parent) if parent not in ("", "engine") else None


def violations(root: Path) -> list[str]:
    """Every breach of the order in the tree at `root`, as "file:line: what"."""
    modules, wrong = sources(root), []
    for module, path in modules.items():
        here = path.relative_to(root).as_posix()
        mine = place(module)
        if mine is None:
            wrong.append(f"{here}: has no layer; give it one in LAYERS")
            continue
        for line, target in imports(module, path, modules):
            top = target.split(".")[0]
            if module.startswith("dreamix_kernels") and top not in KERNEL_IMPORTS:
                wrong.append(f"{here}:{line}: a kernel imports {target}")
            if top == "deepspeed" and not (module + ".").startswith("engine.training."):
                wrong.append(f"{here}:{line}: only engine.training imports deepspeed")
            if top in ("engine", "dreamix_kernels"):
                theirs = place(target)
                if theirs is None:
                    wrong.append(f"{here}:{line}: {target} has no layer")
                elif theirs != mine and theirs[0] >= mine[0]:
                    wrong.append(f"{here}:{line}: {module} imports {target}, {'a sibling' if theirs[0] == mine[0] else 'above it'}")
    for path in sorted((root / "engine").glob("*")):
        if path.stem != "__init__" and path.stem in sys.stdlib_module_names | DEPENDENCIES:
            wrong.append(f"engine/{path.name}: shadows {path.stem} when a file of engine/ is run by its path")
    wrong += [f"{path.relative_to(root)}: tests are no packages" for path in (root / "tests").rglob("__init__.py")]
    wrong += [f"{path}: `kernels` must not be importable" for path in ("kernels/__init__.py", "kernels.py") if (root / path).exists()]
    return wrong


def test_the_tree_keeps_the_order():
    assert len(sources(ROOT)) > 10
    assert not (wrong := violations(ROOT)), "\n".join(wrong)


GOOD = {
    "engine/__init__.py": "", "engine/errors.py": "", "engine/config.py": "import pydantic",
    "engine/config_io.py": "from engine.errors import X",
    "engine/media/__init__.py": "", "engine/media/video.py": "from engine import errors\nfrom . import geometry\nfrom .geometry import f",
    "engine/media/geometry.py": "import numpy", "engine/diffusion/__init__.py": "from engine.diffusion.schedule import S",
    "engine/diffusion/schedule.py": "import torch", "engine/models/__init__.py": "",
    "engine/models/unet.py": "from dreamix_kernels import attention",
    "engine/cascade.py": "from engine.models.unet import U\nimport engine.diffusion", "engine/dreamix.py": "from engine import cascade",
    "engine/training/__init__.py": "", "engine/training/zero.py": "def f():\n    import deepspeed",
    "engine/infer.py": "from engine import dreamix\nfrom engine.training import zero", "engine/finetune.py": "",
    "kernels/dreamix_kernels/__init__.py": "from .attention import a",
    "kernels/dreamix_kernels/attention.py": "import torch, math\nimport triton.language as tl\nimport numpy\nfrom .dispatch import d",
    "kernels/dreamix_kernels/dispatch.py": "", "tests/test_a.py": "",
}  # fmt: skip
BAD = {   # one file changed: the complaint
    ("engine/diffusion/schedule.py", "from engine.models.unet import U"): "engine/diffusion/schedule.py:1: engine.diffusion.sch",
    ("engine/diffusion/schedule.py", "def f():\n    from engine.cascade import C"): "schedule.py:2: engine.diffusion.schedule imports",
    ("engine/diffusion/schedule.py", "from engine import media"): "imports engine.media, a sibling",
    ("engine/diffusion/schedule.py", "from .. import media"): "imports engine.media, a sibling",
    ("engine/diffusion/schedule.py", "from ..models.unet import U"): "imports engine.models.unet, a sibling",
    ("engine/diffusion/__init__.py", "from ..models import unet"): "engine.diffusion imports engine.models.unet, a sibling",
    ("engine/diffusion/schedule.py", "import importlib\nimportlib.import_module('engine.dreamix')"): ":2: ",
    ("engine/diffusion/schedule.py", "try:\n    import engine.training.zero as z\nexcept ImportError: pass"): "above it",
    ("engine/config.py", "from engine.media.video import read"): "engine.config imports engine.media.video, above it",
    ("engine/config.py", "import dreamix_kernels.attention"): "dreamix_kernels.attention, a sibling",
    ("engine/__init__.py", "from engine.cascade import Cascade"): "engine imports engine.cascade, above it",
    ("engine/cascade.py", "from engine.dreamix import edit"): "engine.cascade imports engine.dreamix, above it",
    ("engine/dreamix.py", "import engine.training"): "engine.dreamix imports engine.training, above it",
    ("engine/infer.py", "from engine.finetune import main"): "engine.infer imports engine.finetune, a sibling",
    ("engine/infer.py", "def f():\n    import deepspeed.comm"): "infer.py:2: only engine.training imports deepspeed",
    ("engine/dreamix.py", "from deepspeed import zero"): "only engine.training",
    ("engine/unheard_of.py", ""): "engine/unheard_of.py: has no layer",
    ("engine/cascade.py", "from engine import unheard_of"): None,       # a name inside engine/__init__.py, as far as one can see
    ("engine/cascade.py", "import engine.unheard_of"): "engine.unheard_of has no layer",
    ("kernels/dreamix_kernels/attention.py", "import pydantic"): "attention.py:1: a kernel imports pydantic",
    ("kernels/dreamix_kernels/attention.py", "def f():\n    import einops"): "a kernel imports einops",
    ("kernels/dreamix_kernels/attention.py", "from engine.errors import UserError"): "a kernel imports engine.errors",
    ("engine/queue.py", ""): "engine/queue.py: shadows queue",
    ("engine/profile/__init__.py", ""): "engine/profile: shadows profile",
    ("engine/torch.py", ""): "engine/torch.py: shadows torch",
    ("tests/kernels/__init__.py", ""): "tests/kernels/__init__.py: tests are no packages",
    ("kernels/__init__.py", ""): "must not be importable",
}


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_the_checker_passes_a_good_tree(tmp_path):
    assert violations(plant(tmp_path, GOOD)) == []


@pytest.mark.parametrize("change", BAD, ids=lambda change: f"{change[0]}: {change[1][:40]}")
def test_the_checker_sees_a_bad_tree(tmp_path, change):
    wrong = violations(plant(tmp_path, GOOD | {change[0]: change[1]}))
    assert (wrong == []) if BAD[change] is None else any(BAD[change] in one for one in wrong), wrong


def loaded_by(*arguments: str) -> tuple[set[str], float]:
    """The top-level modules a fresh interpreter loads, and the processor seconds it takes (best of two: the machine may be busy)."""
    report = ("import atexit, json, os, sys\n"
              "names = lambda: json.dumps(sorted({m.split('.')[0] for m in sys.modules}))\n"
              "atexit.register(lambda: os.write(2, ('\\nMODULES ' + names()).encode()))\n")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    best = float("inf")
    for _ in range(2):
        start = os.times()
        result = subprocess.run([sys.executable, "-c", report + arguments[0], *arguments[1:]], cwd=ROOT, env=environment,
                                capture_output=True, text=True, timeout=60)
        end = os.times()
        assert result.returncode == 0, result.stderr
        best = min(best, end.children_user + end.children_system - start.children_user - start.children_system)
    return set(json.loads(result.stderr.rpartition("MODULES ")[2])), best


def test_import_engine_is_light():
    modules, seconds = loaded_by("import engine")
    assert "engine" in modules and not modules & (SLOW | {"torch", "pydantic"})
    assert seconds < 1.5


@pytest.mark.skipif(not (ROOT / "engine/infer.py").exists(), reason="no command yet")
def test_help_is_quick():
    modules, seconds = loaded_by("import runpy; runpy.run_module('engine.infer', run_name='__main__', alter_sys=True)", "--help")
    assert "engine" in modules and not modules & (SLOW | {"torch"})
    assert seconds < 1.5


def test_the_import_probe_sees_what_is_loaded():
    assert "safetensors" in loaded_by("import engine, safetensors")[0]
