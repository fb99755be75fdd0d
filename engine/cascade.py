"""The cascade."""

from pathlib import Path

from engine.config import CascadeConfig
from engine.config_io import load_config
from engine.errors import ConfigError
from engine.paths import config_root


def find_cascade(name: str) -> tuple[Path, CascadeConfig]:
    """A cascade by name -> (folder of its weights, its config)."""
    path = config_root() / "cascade" / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"cascade {name}: want one of configs/cascade, found no {path.name}")
    return path.with_suffix(""), load_config(CascadeConfig, path)
