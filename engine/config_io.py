"""How settings are read: defaults < a strict YAML file < `--set a.b=c`, with one-line errors naming field, place and near names."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import to_jsonable_python

from engine import strict_yaml
from engine.errors import ConfigError
from engine.strict_yaml import MAX_DEPTH, Place, plain, short

MAX_ERRORS = 5
Model = TypeVar("Model", bound=BaseModel)


def read_yaml(path: Path | str) -> dict[str, Any]:
    """The mapping in a YAML file, as plain dicts, lists and scalars; keys are strings as written. An empty file is {}.

    Raises: ConfigError "file:line:column: what is wrong" for syntax, duplicate keys, aliases, tags, more than 1 MiB or 32 levels.
    """
    return strict_yaml.read(Path(path))[0]


def load_config(cls: type[Model], path: Path | str | None = None, overrides: Sequence[str] = ()) -> Model:
    """`cls` from its defaults, then the file, then overrides such as "strength=0.9" or "stages.ssr2.steps=8"; later ones win.

    Types are strict: neither "8" nor 8.0 nor true is the integer 8.
    Raises: ConfigError naming each wrong field, its file:line:column or --set, what was wanted and what came.
    """
    data, places = ({}, {}) if path is None else strict_yaml.read(Path(path))
    data = _over_defaults(cls, data)
    for override in overrides:
        place = _set(data, override)
        places = {other: where for other, where in places.items() if other[: len(place)] != place}
        places = {place[:n]: "--set" for n in range(1, len(place) + 1)} | places
    try:
        return cls.model_validate_json(json.dumps(data), strict=True)       # strict JSON: lists may be tuples, and nothing else converts
    except ValidationError as error:
        found = error.errors(include_url=False)
        lines = [_sentence(cls, data, places, one) for one in found[:MAX_ERRORS]]
        raise ConfigError("; ".join(lines) + (f"; and {len(found) - MAX_ERRORS} more" if len(found) > MAX_ERRORS else "")) from None


def apply_overrides(data: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `data` with each "a.b=value" set; the value is YAML. A part is a key, a list index, or the `name` of a list's item."""
    data = copy.deepcopy(data)
    for override in overrides:
        _set(data, override)
    return data


def dump_yaml(model: BaseModel) -> str:
    """Every field of the model as YAML that `load_config` reads back to an equal model."""
    return strict_yaml.dump(model.model_dump(mode="json"))


def config_hash(model: BaseModel) -> str:
    """sha256 (hex) of the model's canonical JSON: every field, sorted keys, no spaces, ASCII. How a file is laid out does not matter."""
    text = json.dumps(model.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The one of `words` that `word` is most likely a slip of; None if none is near."""
    spelled = {known.lower(): known for known in words}
    return next((spelled[match] for match in get_close_matches(word.lower(), spelled, n=1)), None)


def _over_defaults(cls: type[BaseModel], data: dict[str, Any]) -> dict[str, Any]:
    """`data` over those defaults that its own groups would lose: giving one field of a group, or one item of a list, keeps the others."""
    merged = dict(data)
    for name, field in cls.model_fields.items():
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel) and isinstance(merged.get(name, {}), dict):
            merged[name] = _over_defaults(type(default), default.model_dump(mode="json", exclude_unset=True) | merged.get(name, {}))
        elif isinstance(default, (tuple, list, dict)) and name not in merged:
            merged[name] = to_jsonable_python(default)
    return merged


def _set(data: dict[str, Any], override: str) -> Place:
    field, equals, text = override.partition("=")
    parts = field.strip().split(".")
    if not equals or not all(parts) or len(parts) > MAX_DEPTH:
        raise ConfigError(f"--set: want field=value or group.field=value, got {short(override)}")
    value = strict_yaml.parse(text.strip(), f"--set {plain(field.strip())}")[0]
    at: Any = data
    place: list[str | int] = []
    for part in parts:
        if place:
            if isinstance(at, dict) and at.get(place[-1]) is None:
                at[place[-1]] = {}
            at = at[place[-1]]
        place.append(_key(at, part, place))
    at[place[-1]] = value
    return tuple(place)


def _key(at: Any, part: str, above: list[str | int]) -> str | int:
    if isinstance(at, dict):
        return part
    where = f"--set {plain('.'.join(map(str, above)))}"
    if not isinstance(at, list):
        raise ConfigError(f"{where}: has no field {short(part)}, it is {short(at)}")
    names = [item["name"] if isinstance(item, dict) and isinstance(item.get("name"), str) else str(i) for i, item in enumerate(at)]
    if part in names:
        return names.index(part)
    if re.fullmatch(r"[0-9]{1,6}", part) and int(part) < len(at):
        return int(part)
    near = nearest(part, names)
    hint = f"; did you mean {plain(near)}?" if near else ""
    raise ConfigError(f"{where}: want one of {' '.join(map(plain, names))}, got {short(part)}{hint}")


def _sentence(cls: type[BaseModel], data: Any, places: dict[Place, str], error: Any) -> str:
    """One of pydantic's errors in one line: "place: field: want ..., got ..."."""
    loc, at, words, models = error["loc"], data, [], {cls}
    for i, part in enumerate(loc):
        inside = isinstance(at, dict) and part in at or isinstance(at, list) and isinstance(part, int) and part < len(at)
        item = at[part] if inside else None
        words.append(str(item["name"]) if isinstance(at, list) and isinstance(item, dict) and "name" in item else str(part))
        if i < len(loc) - 1:
            models = {m for model in models if part in model.model_fields for m in _models(model.model_fields[part].annotation)} or models
        at = item
    where = next((places[loc[:n]] for n in range(len(loc), -1, -1) if loc[:n] in places), None)
    prefix, field = f"{where}: " if where else "", plain(".".join(words))
    if error["type"] == "extra_forbidden":
        known = [name for model in models for name in model.model_fields]
        near = nearest(words[-1], known)
        return f"{prefix}{field}: unknown key; " + (f"did you mean {near}?" if near else f"want one of {' '.join(known)}")
    if error["type"] == "value_error":                                      # a model's own sentence, which starts with the field's name
        return prefix + (f"{field}." if field else "") + plain(error["ctx"]["error"])
    if error["type"] == "missing":
        return f"{prefix}{field}: want a value, got none"
    return f"{prefix}{field or 'config'}: want {plain(error['msg'].removeprefix('Input should be '))}, got {short(error['input'])}"


def _models(annotation: Any) -> set[type[BaseModel]]:
    inside = {model for argument in get_args(annotation) for model in _models(argument)}
    return inside | ({annotation} if isinstance(annotation, type) and issubclass(annotation, BaseModel) else set())
