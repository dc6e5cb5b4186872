"""Settings as text: ``KEY=VALUE`` to the fields of a config dataclass and back."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, TypeVar

from .checks import check_choice, check_count, check_device, check_positive, reject
from .recipes.networks import ENCODERS

Config = TypeVar("Config")

# Every other whole number but the seed is a count of at least 1.
FROM_ZERO = {"queue", "finetune_steps", "cutout", "size"}
SHARES = {"threshold", "push_threshold", "smoothing", "ema", "momentum", "grey", "crop"}
SHARES |= {"teacher_decay", "pretrain_teacher_decay", "centre_decay"}
ABOVE_ZERO = {"temperature", "teacher_temperature", "epsilon"}


class UsageError(Exception):
    """The command line asks for something that does not exist."""


def apply(config: Config, texts: Sequence[str], presets: Mapping[str, Any] | None = None) -> Config:
    """``config`` with each ``KEY=VALUE`` in place; ``strong.rotation=10`` reaches into a nested config.

    Args:
        presets: nested configs that a value may call by name.
    """
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set takes KEY=VALUE, got {text!r}")
        config = _replace(config, key.strip().replace("-", "_"), value.strip(), presets or {})
    return config


def _replace(config: Config, path: str, text: str, presets: Mapping[str, Any]) -> Config:
    name, _, rest = path.partition(".")
    hints = typing.get_type_hints(type(config))
    if name not in hints:
        close = difflib.get_close_matches(name, hints, cutoff=0.5)
        guess = f"; did you mean {' or '.join(close)}?" if close else ""
        raise UsageError(f"there is no setting {name!r}{guess} (there are: {', '.join(hints)})")
    if rest and not dataclasses.is_dataclass(hints[name]):
        raise UsageError(f"{name} has no parts, so there is no {path!r}; set {name} itself")
    if rest:
        value = _replace(getattr(config, name), rest, text, presets)
    else:
        value = _parse(text, hints[name], name, presets)
    return dataclasses.replace(config, **{name: value})  # type: ignore[type-var]


def _parse(text: str, hint: Any, key: str, presets: Mapping[str, Any]) -> Any:
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if text.lower() == "none" and type(None) in choices:
            return None
        # The message below names this type with its alternatives.
        with suppress(UsageError):
            return _parse(text, next(c for c in choices if c is not type(None)), key, presets)
    elif origin is tuple:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        return tuple(_parse(part, choices[0], key, presets) for part in parts)
    elif origin is Literal and text in choices:
        return text
    elif dataclasses.is_dataclass(hint) and isinstance(presets.get(text), typing.cast(type, hint)):
        return presets[text]
    elif hint is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    elif hint is str:
        return text
    elif hint in (int, float):
        with suppress(ValueError):
            return hint(text)
    raise UsageError(f"{key} must be {describe(hint, presets)}, got {text!r}")


def check(config: Any, inside: str = "") -> None:
    """Raise ``ValueError`` unless the values in ``config`` and its parts are possible."""
    for field, hint in typing.get_type_hints(type(config)).items():
        name, value = inside + field, getattr(config, field)
        for part in value if isinstance(value, tuple) else (value,):
            if dataclasses.is_dataclass(part):
                check(part, f"{name}.")
        if hint is int and field != "seed":
            least = 0 if field in FROM_ZERO else 1
            check_count(value, name, least, f"set it to {least} or more")
        elif isinstance(value, float):
            _check_number(value, field, name)
        elif field == "device":
            check_device(value, name)
        elif field == "network":
            check_choice(value, name, ENCODERS)


def _check_number(value: float, field: str, name: str) -> None:
    if not 0 <= value < math.inf:
        reject(name, "finite and at least 0", value, "set it to 0 or more")
    if field in SHARES and value > 1:
        reject(name, "in [0, 1]", value, "set it to a share, such as 0.9")
    if field in ABOVE_ZERO:
        check_positive(value, name, "set it to a larger number")


def describe(hint: Any, presets: Mapping[str, Any]) -> str:
    """A type as people say it."""
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if c is type(None) else describe(c, presets) for c in choices)
    if origin is tuple:
        return f"several, with commas, each {describe(choices[0], presets)}"
    if origin is Literal:
        return f"one of {', '.join(map(str, choices))}"
    if dataclasses.is_dataclass(hint):
        names = [name for name, value in presets.items() if isinstance(value, typing.cast(type, hint))]
        parts = [field.name for field in dataclasses.fields(hint)]
        return f"one of {', '.join(names)} (or set its parts: {', '.join(parts)})"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(hint, str(hint))


def listing(config: Any, presets: Mapping[str, Any]) -> str:
    """One line for each setting: name, value, what it may be."""
    lines = []
    for name, hint in typing.get_type_hints(type(config)).items():
        lines.append(f"{name:<18} {_shown(getattr(config, name), presets):<14} {describe(hint, presets)}")
    return "\n".join(lines)


def _shown(value: Any, presets: Mapping[str, Any]) -> str:
    if isinstance(value, tuple):
        return ",".join(_shown(part, presets) for part in value)
    return next((name for name, preset in presets.items() if preset == value), str(value).lower())


def from_plain(kind: type[Config], values: dict[str, Any]) -> Config:
    """The dataclass whose ``dataclasses.asdict`` went through JSON."""
    hints = typing.get_type_hints(kind)
    return kind(**{name: _unplain(hints[name], value) for name, value in values.items() if name in hints})


def _unplain(hint: Any, value: Any) -> Any:
    choices = typing.get_args(hint)
    if isinstance(value, list):
        return tuple(_unplain(choices[0], part) for part in value)
    if isinstance(value, dict):
        nested = next(h for h in (hint, *choices) if dataclasses.is_dataclass(h))
        return from_plain(typing.cast(type, nested), value)
    return value
