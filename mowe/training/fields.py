"""Dataclasses from YAML and from FIELD=VALUE: values of the right types, and errors that name the field."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Sequence
from dataclasses import MISSING
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mowe.errors import ConfigError


def as_config(kind: Any, value: Any, name: str = "") -> Any:
    """The value as a dataclass, or as any type that fields have. Raises ConfigError, naming the field."""
    if dataclasses.is_dataclass(kind):
        return _as_dataclass(kind, value, name)
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _as_one_of(inner, value, name)
    if origin is Literal:
        if value not in inner:
            raise ConfigError(f"{name}: must be {' or '.join(map(repr, inner))}, got {value!r}{_meant(value, inner)}")
        return value
    if origin is list and isinstance(value, list):
        return [as_config(inner[0], item, f"{name}.{i}") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {str(key): as_config(inner[1], item, f"{name}.{key}") for key, item in value.items()}
    if kind is Any or (kind in (bool, str, dict) and isinstance(value, kind)):
        return value
    if kind in (int, float):
        number = _as_number(kind, value)
        if number is not None:
            return number
    raise ConfigError(f"{name}: expected {_said(kind)}, got {value!r}")


def _as_dataclass(kind: Any, value: Any, name: str) -> Any:
    if not isinstance(value, dict):
        raise ConfigError(f"{name}: expected fields and values, got {value!r}")
    at = f"{name}." if name else ""
    hints = get_type_hints(kind)
    for key in value:
        if key not in hints:
            raise ConfigError(f"{at}{key}: unknown field{suggest(key, hints)}")
    for f in dataclasses.fields(kind):
        if f.default is MISSING and f.default_factory is MISSING and f.name not in value:
            raise ConfigError(f"{at}{f.name}: missing")
    config = kind(**{key: as_config(hints[key], item, f"{at}{key}") for key, item in value.items()})
    if hasattr(config, "check"):
        try:
            config.check()
        except ConfigError as error:
            raise ConfigError(f"{at}{error}") from None
    return config


def _as_one_of(kinds: Sequence[Any], value: Any, name: str) -> Any:
    if value is None and NoneType in kinds:
        return None
    if isinstance(value, dict):  # told apart by shape, so that what is wrong inside is named
        kinds = [kind for kind in kinds if dataclasses.is_dataclass(kind)] or kinds
    elif isinstance(value, list):
        kinds = [kind for kind in kinds if get_origin(kind) is list] or kinds
    kinds = [kind for kind in kinds if kind is not NoneType]
    if len(kinds) == 1:
        return as_config(kinds[0], value, name)
    for kind in kinds:
        try:
            return as_config(kind, value, name)
        except ConfigError:
            continue
    raise ConfigError(f"{name}: expected {' or '.join(dict.fromkeys(map(_said, kinds)))}, got {value!r}")


def _as_number(kind: type, value: Any) -> Any:
    """YAML takes 1e-3 for a text."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return kind(value) if kind is float or float(value).is_integer() else None


def _said(kind: Any) -> str:
    if dataclasses.is_dataclass(kind):
        return "fields and values"
    origin = get_origin(kind)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "a text"
    named = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", list: "a list"}
    return named.get(origin or kind, "fields and values")


def parse_yaml(text: str) -> Any:
    """YAML in which no field comes twice, of which the last would count. Raises ValueError."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key, _ in node.value:
                if str(key.value) in seen:
                    raise ValueError(f"line {key.start_mark.line + 1}: {key.value} is there twice")
                seen.add(str(key.value))
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # dates such as 2024-13-01 are ValueErrors
        raise ValueError(" ".join(str(error).split())) from None


def set_field(data: dict[str, Any], override: str) -> None:
    """Set what "data.batch_frames=4000" says. Raises ConfigError, naming the override."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"{override!r}: expected FIELD=VALUE, as data.batch_frames=4000")
    try:
        value = parse_yaml(text)
    except ValueError:
        value = text
    *parents, last = path.split(".")
    place: Any = data
    for key in parents:
        if isinstance(place, dict) and place.get(key) is None:
            place[key] = {}
        place = place[_key(place, key, override)]
    place[_key(place, last, override)] = value


def _key(place: Any, key: str, override: str) -> str | int:
    if isinstance(place, dict):
        return key
    if not isinstance(place, list):
        raise ConfigError(f"{override!r}: there is nothing inside of {place!r}")
    if not key.isdecimal() or int(key) >= len(place):
        raise ConfigError(f"{override!r}: no entry {key} in a list of {len(place)}")
    return int(key)


def suggest(name: Any, known: Any) -> str:
    """The end of an error about a name that is not known."""
    return _meant(name, known) or f"; known: {', '.join(map(str, known))}"


def _meant(name: Any, known: Any) -> str:
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1)
    return f"; did you mean {close[0]}?" if close else ""


def check_positive(config: Any, *names: str) -> None:
    """Raise ConfigError for a field that is not; None is one left out."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"{name}: must be positive, got {value}")


def check_not_negative(config: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) < float("inf"):
            raise ConfigError(f"{name}: must not be negative, got {getattr(config, name)}")


def check_share(config: Any, name: str) -> None:
    if not 0 <= getattr(config, name) < 1:
        raise ConfigError(f"{name}: must lie in 0..1, 1 excluded, got {getattr(config, name)}")


def check_path(name: str, value: str) -> None:
    """Raise ConfigError for a text that no file can have as its path, whether there is one or not."""
    if not value:
        raise ConfigError(f"{name}: expected a path, got an empty text")
    try:
        os.stat(value)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}: {value!r} cannot be a path ({getattr(error, 'strerror', None) or error})") from None
