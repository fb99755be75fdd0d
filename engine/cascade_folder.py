"""A cascade on disk: by name, by YAML file, or as a folder that describes itself, laid out as diffusers does."""

import json
from pathlib import Path

from engine import __version__
from engine.config import STAGE_ORDER, CascadeConfig, StageConfig
from engine.config_io import load_config, nearest
from engine.errors import ConfigError, WeightsError
from engine.paths import config_root


def find_cascade(name: str | Path) -> tuple[Path, CascadeConfig]:
    """A cascade by name or path -> (folder of its weights, its config).

    A folder describes itself (`model_index.json`); a YAML file, or a name in `configs/cascade/`, has its weights in the folder of the same
    stem beside it.   Raises: ConfigError.
    """
    path = Path(name)
    if path.is_dir():
        return path, read_index(path)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path.with_suffix(""), load_config(CascadeConfig, path)
    bundled = config_root() / "cascade"
    names = sorted(p.stem for p in bundled.glob("*.yaml"))
    if str(name) not in names:
        hint = nearest(str(name), names)
        hint = f" (did you mean {hint}?)" if hint else ""
        raise ConfigError(f"cascade: want a folder, a YAML file or one of {', '.join(names)}; got {name}{hint}")
    return bundled / str(name), load_config(CascadeConfig, bundled / f"{name}.yaml")


def read_index(folder: Path) -> CascadeConfig:
    """The config of a self-describing folder: `model_index.json`, and each stage's `config.json`.   Raises: WeightsError, ConfigError."""
    def read(path: Path) -> dict:
        try:
            data = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise WeightsError(f"{path}: want a JSON object, got {error}") from error
        if not isinstance(data, dict):
            raise WeightsError(f"{path}: want a JSON object, got {type(data).__name__}")
        return {key: value for key, value in data.items() if not key.startswith("_")}

    index = read(folder / "model_index.json")
    known = {stage: read(folder / stage / "config.json") for stage in STAGE_ORDER}
    try:
        return CascadeConfig(name=index["name"], text=index["text"], stages=tuple(StageConfig(**known[stage]) for stage in STAGE_ORDER))
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{folder}: not a cascade of this engine: {' '.join(str(error).split())}") from error


def write_index(folder: Path, config: CascadeConfig) -> None:
    """`model_index.json` and each stage's `config.json`, as `read_index` reads them."""
    def write(path: Path, data: dict) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=2) + "\n", "utf-8")

    write(folder / "model_index.json", {
        "_class_name": "DreamixCascade", "_dreamix_version": __version__, "name": config.name, "text": config.text.model_dump(mode="json"),
        **{f"_{stage.name}": ["engine", "VideoUNet"] for stage in config.stages}, "_text_encoder": ["transformers", "T5EncoderModel"],
        "_tokenizer": ["transformers", "PreTrainedTokenizerFast"]})
    for stage in config.stages:
        about = {"_class_name": "VideoUNet", "_dreamix_version": __version__}
        write(folder / stage.name / "config.json", about | stage.model_dump(mode="json"))
