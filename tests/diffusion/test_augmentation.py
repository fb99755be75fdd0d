"""Noise-conditioning augmentation, and the promise of the whole package to import torch and numpy only."""

import ast
import sys
from pathlib import Path

import pytest
import torch

from engine.diffusion import augmentation
from engine.diffusion.augmentation import aug_level_from_snr, augment
from engine.diffusion.schedule import CosineSchedule


def test_level_0_is_exact():
    lowres, eps = torch.randn(2, 2, 3, 4, 5, 3)
    lowres[0, 0, 0] = -0.0
    assert augment(lowres, 0.0, eps).view(torch.int32).equal(lowres.view(torch.int32))
    mixed = augment(lowres, torch.tensor([0.0, 0.4]), eps)
    assert mixed[0].equal(lowres[0])
    torch.testing.assert_close(mixed[1], augment(lowres[1:], 0.4, eps[1:])[0])
    assert augment(lowres, 1.0, eps).equal(eps)


@pytest.mark.parametrize("level", [0.1, 0.3, 0.8])
def test_variance_is_preserved(level):
    """Exactly, read off the two unit responses; a variance-exploding rule would keep the video's gain at 1."""
    one, zero = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, 1, dtype=torch.float64)
    gain, noise = augment(one, level, zero).item(), augment(zero, level, one).item()
    assert gain < 1 and gain**2 + noise**2 == pytest.approx(1, rel=1e-12)
    assert noise == pytest.approx(torch.sin(torch.tensor(level * torch.pi / 2)).item())


def test_fixed_snr():
    assert aug_level_from_snr(3) == pytest.approx(1 / 3)
    for snr, shift in ((3, 0.0), (5, 0.0), (5, 1.2)):
        schedule = CosineSchedule(shift)
        level = aug_level_from_snr(snr, schedule)
        assert schedule.gamma(level).item() ** 2 / schedule.sigma(level).item() ** 2 == pytest.approx(snr)
    with pytest.raises(ValueError, match="snr"):
        aug_level_from_snr(0)


def test_the_package_imports_torch_and_numpy_only():
    for path in Path(augmentation.__file__).parent.glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
        for name in names:
            known = name.split(".")[0] in {"torch", "numpy", *sys.stdlib_module_names}
            assert known or name.startswith("engine.diffusion"), (path.name, name)
