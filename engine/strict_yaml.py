"""YAML as people expect it: the core schema of YAML 1.2 with duplicate keys, aliases and tags refused, and limits that fit a config.

PyYAML follows YAML 1.1: `6e-6` is a string, `no` is False, `12:30:00` is a number, a later duplicate key wins. Settings are read through
`engine.config_io`; this file is its reader and writer.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from engine.errors import ConfigError

MAX_BYTES, MAX_NODES, MAX_DEPTH = 1 << 20, 10_000, 32
Place = tuple[str | int, ...]            # the way to a value: keys and list indices

_TAG = "tag:yaml.org,2002:"
_CORE = {                                # YAML 1.2.2, section 10.3.2
    "null": (r"~|null|Null|NULL|", lambda text: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", lambda text: int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))),
    "float": (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
              lambda text: float(re.sub(r"\.(?=[a-z])", "", text.lower()))),
}


class _Loader(yaml.SafeLoader):
    """Composes nodes only, so that no tag ever constructs an object. Limits are checked on the way down: composing is recursive."""

    yaml_implicit_resolvers: dict = {}
    depth = nodes = 0

    def compose_node(self, parent, index):
        mark = self.peek_event().start_mark
        self.depth, self.nodes = self.depth + 1, self.nodes + 1
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not allowed", mark)
        if self.depth > MAX_DEPTH or self.nodes > MAX_NODES:
            raise yaml.composer.ComposerError(None, None, f"want at most {MAX_DEPTH} levels and {MAX_NODES} values", mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes every string that YAML 1.1 or 1.2 would read as something else."""

    def ignore_aliases(self, data):
        return True

    def represent_str(self, data):
        return self.represent_scalar(_TAG + "str", data, style=None if data.isprintable() else '"')   # plain style loses U+0085 and U+2028


_Dumper.add_representer(str, _Dumper.represent_str)

for _kind, (_pattern, _) in _CORE.items():
    for _yaml in (_Loader, _Dumper):
        _yaml.add_implicit_resolver(_TAG + _kind, re.compile(rf"(?:{_pattern})\Z"), None)


def parse(text: str, source: str) -> tuple[Any, dict[Place, str]]:
    """One YAML document as plain dicts (keys: strings as written), lists and scalars, and each value's "source:line:column".

    Raises: ConfigError "source:line:column: what is wrong".
    """
    places: dict[Place, str] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _build(node, (), source, places), places
    except yaml.MarkedYAMLError as error:
        problem = ": ".join(part for part in (error.context, error.problem) if part)
        raise _error(source, error.problem_mark or error.context_mark, plain(problem)) from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        where = f"{source}:{before.count(chr(10)) + 1}:{error.position - before.rfind(chr(10))}"
        raise ConfigError(f"{where}: the character {error.character:#x} is not allowed") from None
    except (ValueError, OverflowError) as error:                            # an escape beyond Unicode
        raise ConfigError(f"{source}: {plain(error)}") from None


def read(path: Path) -> tuple[dict[str, Any], dict[Place, str]]:
    """The mapping in a file of at most 1 MiB, and where each value stands. An empty file is {}."""
    try:
        if path.exists() and not path.is_file():                            # a pipe or a device could keep us reading
            raise ConfigError(f"config: want a file, got {plain(path)}")
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise ConfigError(f"{plain(path)}: want at most {MAX_BYTES} bytes, got more")
        text = raw.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigError(f"config: cannot read {plain(path)}: {plain(getattr(error, 'strerror', None) or error)}") from None
    data, places = parse(text, plain(path))
    if not isinstance(data, dict | None):
        raise ConfigError(f"{places[()]}: want a mapping of field: value, got {short(data)}")
    places[()] = plain(path)
    return data or {}, places


def dump(data: dict[str, Any]) -> str:
    """YAML text that `parse` reads back to equal data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=140)


def plain(value: Any) -> str:
    """A name for an error message of one line: control characters escaped."""
    text = str(value)
    return text if text.isprintable() else ascii(text)[1:-1]


def short(value: Any) -> str:
    """A value for an error message: as Python writes it, at most 80 characters."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _error(source: str, mark: Any, problem: str) -> ConfigError:
    return ConfigError(f"{source}:{mark.line + 1}:{mark.column + 1}: {problem}")


def _build(node: yaml.Node, place: Place, source: str, places: dict[Place, str]) -> Any:
    places.setdefault(place, f"{source}:{node.start_mark.line + 1}:{node.start_mark.column + 1}")
    if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
        return [_build(item, (*place, i), source, places) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
        result: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _error(source, key.start_mark, "want a plain name as key")
            if key.value in result:
                raise _error(source, key.start_mark, f"duplicate key {short(key.value)}, first at {places[(*place, key.value)]}")
            places[(*place, key.value)] = f"{source}:{key.start_mark.line + 1}:{key.start_mark.column + 1}"
            result[key.value] = _build(value, (*place, key.value), source, places)
        return result
    if isinstance(node, yaml.ScalarNode) and node.tag == _TAG + "str":
        return node.value
    kind = node.tag.removeprefix(_TAG)
    if not (isinstance(node, yaml.ScalarNode) and kind in _CORE and re.fullmatch(_CORE[kind][0], node.value)):
        raise _error(source, node.start_mark, f"the tag {short(node.tag)} is not allowed here")
    try:
        return _CORE[kind][1](node.value)
    except ValueError as error:                                             # an integer of more than 4300 digits
        raise _error(source, node.start_mark, str(error)) from None
