"""Shapes of JSON: one declaration that decodes what comes in and says in a schema what may come.

A shape decodes strictly: unknown keys, wrong types and what is out of bounds are refused, with the place. Pure; must
not know HTTP. Invariant: `decode` takes nothing that `schema` (JSON Schema 2020-12) forbids, so that tests made from
the schema test the decoder. What comes in declares a bound; what goes out need not.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Json = Any

WHOLE_MAX = 2**53 - 1


class ShapeError(ValueError):
    """A value that has not the declared shape; says where and what is expected."""


class Shape:
    """What a value may be."""

    __slots__ = ()

    def decode(self, value: Json, where: str) -> Any:
        raise NotImplementedError

    def schema(self) -> dict[str, Json]:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Text(Shape):
    """`pattern` matches the whole text, in what the expressions of Python and JavaScript have in common. `check` raises
    ValueError for what a pattern cannot say: then the schema allows more than is taken."""

    length_max: int | None = None
    length_min: int = 0
    pattern: str = ""
    choices: tuple[str, ...] = ()
    check: Callable[[str], object] | None = None
    about: str = ""

    def decode(self, value: Json, where: str) -> str:
        if not isinstance(value, str):
            raise ShapeError(f"{where} must be a text")
        if self.choices and value not in self.choices:
            raise ShapeError(f"{where} must be one of {', '.join(self.choices)}")
        if self.length_max is not None and len(value) > self.length_max:
            raise ShapeError(f"{where} is longer than {self.length_max} characters")
        if len(value) < self.length_min:
            raise ShapeError(
                f"{where} must hold at least {self.length_min} characters" if value else f"{where} is empty"
            )
        if self.pattern and re.fullmatch(self.pattern, value, re.ASCII) is None:
            raise ShapeError(f"{where} must be {self.about or f'of the form {self.pattern}'}")
        if self.check is not None:
            try:
                self.check(value)
            except ValueError as error:
                raise ShapeError(f"{where}: {error}") from None
        return value

    def schema(self) -> dict[str, Json]:
        data: dict[str, Json] = {"type": "string"}
        if self.choices:
            data["enum"] = list(self.choices)
        if self.length_max is not None:
            data["maxLength"] = self.length_max
        if self.length_min:
            data["minLength"] = self.length_min
        if self.pattern:
            data["pattern"] = f"^(?:{self.pattern})$"
        return _with(data, self.about)


@dataclass(frozen=True, slots=True)
class Whole(Shape):
    least: int = 0
    most: int = WHOLE_MAX
    about: str = ""

    def decode(self, value: Json, where: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ShapeError(f"{where} must be a whole number")
        if not self.least <= value <= self.most:
            raise ShapeError(f"{where} must be from {self.least} to {self.most}")
        return value

    def schema(self) -> dict[str, Json]:
        return _with({"type": "integer", "minimum": self.least, "maximum": self.most}, self.about)


@dataclass(frozen=True, slots=True)
class Number(Shape):
    least: float | None = None
    most: float | None = None
    about: str = ""

    def decode(self, value: Json, where: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ShapeError(f"{where} must be a number")
        least, most = self.least, self.most
        if (least is not None and not value >= least) or (most is not None and not value <= most):  # nor NaN
            raise ShapeError(f"{where} must be from {least:g} to {most:g}")
        return float(value)

    def schema(self) -> dict[str, Json]:
        data: dict[str, Json] = {"type": "number"}
        if self.least is not None:
            data["minimum"] = self.least
        if self.most is not None:
            data["maximum"] = self.most
        return _with(data, self.about)


@dataclass(frozen=True, slots=True)
class Flag(Shape):
    about: str = ""

    def decode(self, value: Json, where: str) -> bool:
        if not isinstance(value, bool):
            raise ShapeError(f"{where} must be true or false")
        return value

    def schema(self) -> dict[str, Json]:
        return _with({"type": "boolean"}, self.about)


@dataclass(frozen=True, slots=True)
class Anything(Shape):
    """Goes out as it is; never comes in."""

    about: str = ""

    def schema(self) -> dict[str, Json]:
        return _with({}, self.about)


@dataclass(frozen=True, slots=True)
class Maybe(Shape):
    """Null, or the other shape."""

    shape: Shape

    def decode(self, value: Json, where: str) -> Any:
        return None if value is None else self.shape.decode(value, where)

    def schema(self) -> dict[str, Json]:
        return {"anyOf": [self.shape.schema(), {"type": "null"}]}


@dataclass(frozen=True, slots=True)
class Listing(Shape):
    item: Shape
    count_max: int | None = None

    def decode(self, value: Json, where: str) -> list[Any]:
        if not isinstance(value, list):
            raise ShapeError(f"{where} must be a list")
        if self.count_max is not None and len(value) > self.count_max:
            raise ShapeError(f"{where} holds more than {self.count_max} values")
        return [self.item.decode(each, f"{where}[{index}]") for index, each in enumerate(value)]

    def schema(self) -> dict[str, Json]:
        data: dict[str, Json] = {"type": "array", "items": self.item.schema()}
        return data if self.count_max is None else data | {"maxItems": self.count_max}


@dataclass(frozen=True, slots=True)
class Table(Shape):
    """A map whose keys are data."""

    key: Text
    value: Shape
    count_max: int | None = None

    def decode(self, value: Json, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise ShapeError(f"{where} must be a map")
        if self.count_max is not None and len(value) > self.count_max:
            raise ShapeError(f"{where} holds more than {self.count_max} entries")
        return {
            self.key.decode(key, f"a key of {where}"): self.value.decode(each, f"{where}[{shown(key)}]")
            for key, each in value.items()
        }

    def schema(self) -> dict[str, Json]:
        data: dict[str, Json] = {"type": "object", "additionalProperties": self.value.schema()}
        key = self.key.schema()
        del key["type"]
        if key:
            data["propertyNames"] = key
        return data if self.count_max is None else data | {"maxProperties": self.count_max}


@dataclass(frozen=True, slots=True)
class Record(Shape):
    """A map whose keys are declared: `needed` ones, and `usual` ones with the value that holds where they are left
    out."""

    needed: Mapping[str, Shape] = field(default_factory=dict)
    usual: Mapping[str, tuple[Shape, Json]] = field(default_factory=dict)
    about: str = ""

    def decode(self, value: Json, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise ShapeError(f"{where} must be a map")
        for key in value:
            if key not in self.needed and key not in self.usual:
                known = ", ".join((*self.needed, *self.usual)) or "none"
                raise ShapeError(f"{where} has an unknown key {shown(key)}; known: {known}")
        found: dict[str, Any] = {}
        for key, shape in self.needed.items():
            if key not in value:
                raise ShapeError(f"{where} needs {key!r}")
            found[key] = shape.decode(value[key], f"{where}.{key}")
        for key, (shape, usual) in self.usual.items():
            found[key] = shape.decode(value[key], f"{where}.{key}") if key in value else usual
        return found

    def schema(self) -> dict[str, Json]:
        properties = {key: shape.schema() for key, shape in self.needed.items()}
        for key, (shape, usual) in self.usual.items():
            properties[key] = shape.schema() | {"default": usual}
        data: dict[str, Json] = {"type": "object", "properties": properties, "additionalProperties": False}
        if self.needed:
            data["required"] = list(self.needed)
        return _with(data, self.about)


@dataclass(frozen=True, slots=True)
class Choice(Shape):
    """One of several records, told apart by the text under the key `by`."""

    by: str
    records: Mapping[str, Record]

    def decode(self, value: Json, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise ShapeError(f"{where} must be a map")
        word = Text(choices=tuple(self.records)).decode(value.get(self.by), f"{where}.{self.by}")
        rest = {key: each for key, each in value.items() if key != self.by}
        return {self.by: word} | self.records[word].decode(rest, where)

    def schema(self) -> dict[str, Json]:
        return {"oneOf": [self._tagged(word, record) for word, record in self.records.items()]}

    def _tagged(self, word: str, record: Record) -> dict[str, Json]:
        return Record({self.by: Text(choices=(word,))} | dict(record.needed), record.usual, record.about).schema()


def shown(text: str) -> str:
    """A hostile text as a message quotes it."""
    return ascii(text if len(text) <= 60 else text[:60] + "...")


def _with(data: dict[str, Json], about: str) -> dict[str, Json]:
    if about:
        data["description"] = about
    return data
