"""Where the files that belong to the engine are: in the repository, or inside the installed package."""

from __future__ import annotations

from pathlib import Path

from engine.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parent
_SURE_TO_BE_THERE = Path("cascade", "imagen_video.yaml")      # any folder may be called `configs`; ours has this


def config_root() -> Path:
    """The folder of cascades, settings and bundled weights: `configs/` beside the package (a checkout or an editable install), else
    `engine/_configs/`, the copy that `setup.py` puts into a wheel.

    Raises: ConfigError if neither is there.
    """
    for folder in (_PACKAGE.parent / "configs", _PACKAGE / "_configs"):
        if (folder / _SURE_TO_BE_THERE).is_file():
            return folder
    raise ConfigError(f"configs: want configs/ or engine/_configs/ with {_SURE_TO_BE_THERE}, got neither at {_PACKAGE.parent}")
