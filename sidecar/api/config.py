"""Strict decoding of a filter's configuration.

A filter states its settings as a dataclass; `decode` makes one from the plain data under `with`, or says which key is
wrong, and how. Must not know files: whoever knows the place of the configuration puts it before the text.
Invariant: nothing is ignored and nothing is converted (but a whole number where a float is wanted).
"""

import difflib
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

_WORDS = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}


class ConfigError(ValueError):
    """A configuration that a filter refuses. `key` names the place within it, for example rules[0].name; empty: the
    whole. `problem` says what is wrong."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}" if key else problem)
        self.key = key
        self.problem = problem


def decode(into: type[T], config: Mapping[str, object]) -> T:
    """An instance of the dataclass `into`; ConfigError names the first key that is unknown, missing or
    of the wrong type.

    Fields may be str, int, float, bool, Literal, X | None, Mapping[str, X], tuple[X, ...], list[X], Any, and other such
    dataclasses. A ValueError of `__post_init__` becomes a ConfigError, so limits are best checked there.
    """
    return _dataclass(into, config, "")


def nothing(config: Mapping[str, object]) -> None:
    """For a filter without settings: any key is an error."""
    if not isinstance(config, Mapping):
        raise ConfigError("", f"must be a map, not {_kind(config)}")
    for key in config:
        raise ConfigError(str(key), "unknown key; this filter takes no settings")


def _dataclass(into: type[T], config: object, key: str) -> T:
    assert is_dataclass(into)
    if not isinstance(config, Mapping):
        raise ConfigError(key, f"must be a map, not {_kind(config)}")
    known: dict[str, Field[Any]] = {field.name: field for field in fields(into) if field.init}
    for name in config:
        if name not in known:
            raise ConfigError(_join(key, name), f"unknown key; {_suggest(str(name), list(known))}")
    hints = get_type_hints(into)
    values = {}
    for name, field in known.items():
        if name in config:
            values[name] = _value(hints[name], config[name], _join(key, name))
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(_join(key, name), "required, but missing")
    try:
        return into(**values)
    except ConfigError as error:
        raise ConfigError(_join(key, error.key) if error.key else key, error.problem) from None
    except ValueError as error:
        raise ConfigError(key, str(error)) from None


def _value(hint: Any, value: object, key: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any or hint is object:
        return value
    if origin in (Union, types.UnionType):
        return _union(arguments, value, key)
    if origin is Literal:
        if not any(value == one and type(value) is type(one) for one in arguments):
            raise ConfigError(key, f"must be one of {', '.join(map(str, arguments))}, not {value!r:.80}")
        return value
    if origin in (tuple, list, Sequence):
        if not isinstance(value, list | tuple):
            raise ConfigError(key, f"must be a list, not {_kind(value)}")
        items = [_value(arguments[0], item, f"{key}[{index}]") for index, item in enumerate(value)]
        return items if origin is list else tuple(items)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(key, f"must be a map, not {_kind(value)}")
        return {_value(str, name, key): _value(arguments[1], item, _join(key, name)) for name, item in value.items()}
    if is_dataclass(hint) and isinstance(hint, type):
        return _dataclass(hint, value, key)
    return _scalar(hint, value, key)


def _scalar(hint: Any, value: object, key: str) -> object:
    if hint is float and type(value) is int:
        return float(value)
    if hint in _WORDS:
        if type(value) is not hint:  # bool is an int to Python, but not to people
            raise ConfigError(key, f"must be {_WORDS[hint]}, not {_kind(value)}")
        if hint is float and value != value:
            raise ConfigError(key, "must be a number")
        return value
    if hint is type(None):
        if value is not None:
            raise ConfigError(key, f"must be null, not {_kind(value)}")
        return None
    raise TypeError(f"settings cannot be declared as {hint!r}; see sidecar.api.decode")


def _union(hints: tuple[Any, ...], value: object, key: str) -> Any:
    if value is None and type(None) in hints:
        return None
    problems = []
    for hint in hints:
        if hint is type(None):
            continue
        try:
            return _value(hint, value, key)
        except ConfigError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    raise ConfigError(key, " or ".join(dict.fromkeys(error.problem for error in problems)))


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return "a map"
    if isinstance(value, list | tuple):
        return "a list"
    return _WORDS.get(type(value), type(value).__name__)


def _suggest(name: str, known: list[str]) -> str:
    if not known:
        return "there are no settings here"
    close = difflib.get_close_matches(name, known, 1)
    return f'did you mean "{close[0]}"?' if close else f"known: {', '.join(known)}"
