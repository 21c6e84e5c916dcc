"""A Snapshot as plain JSON data in a stable order, and back: what `show -o json` prints and a control plane sends.

Made from the frozen types themselves, so a field that is added there is carried here. Sets are sorted lists, enums
their values, a duration without end the word "none"; a field that holds its usual value is left out, and so is
everything of provenance where that is not asked for. Must not know policy files. Invariant: from_json(to_json(s)) == s,
and equal snapshots give equal data. Provenance is shared between routes, so each origin is written once, in a table.
"""

import math
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from enum import Enum
from functools import cache
from operator import attrgetter
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from .snapshot import Level, Origin, Service, Snapshot
from .source import Source

FORMAT = 1

Json = Any
R = TypeVar("R")


class SnapshotError(ValueError):
    """The data is no snapshot: the message says where."""


def snapshot_to_json(snapshot: Snapshot, provenance: bool = True) -> dict[str, Json]:
    writer = _Writer(provenance)
    services = {name: writer.value(snapshot.services[name]) for name in sorted(snapshot.services)}
    data: dict[str, Json] = {"format": FORMAT, "revision": snapshot.revision, "services": services}
    if provenance:
        data["origins"] = writer.origins
    return data


def service_to_json(service: Service) -> dict[str, Json]:
    """One service, its provenance written in full."""
    data: dict[str, Json] = _Writer(provenance=True, inline=True).value(service)
    return data


def service_policy_to_json(service: Service) -> dict[str, Json]:
    """What is said of a service without its addresses and without provenance: how a control plane sends it."""
    data: dict[str, Json] = _Writer(provenance=False).value(replace(service, endpoints=()))
    return data


def value_to_json(value: object) -> Json:
    """Any value that a Snapshot holds."""
    return _Writer(provenance=True, inline=True).value(value)


def record_from_json(kind: type[R], data: Json) -> R:
    """A frozen record of another package from its JSON: unknown keys and wrong types are refused. Raises
    SnapshotError."""
    reader: Any = _reader_of
    record: R = reader(kind)(data, kind.__name__.lower(), [])
    return record


def origin_to_json(origin: Origin) -> dict[str, Json]:
    return _origin(origin)


def snapshot_from_json(data: Json) -> Snapshot:
    """Raises SnapshotError."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise SnapshotError(f"not a snapshot of format {FORMAT}")
    unknown = sorted(set(data) - {"format", "revision", "services", "origins"})
    if unknown:
        raise SnapshotError(f"unknown key {str(unknown[0])[:60]!r}")
    origins = [_read_origin(each, f"origins[{index}]") for index, each in enumerate(data.get("origins", []))]
    services = data.get("services")
    revision = data.get("revision")
    if not isinstance(services, dict) or not isinstance(revision, str):
        raise SnapshotError("a snapshot needs services and revision")
    read = _reader_of(Service)
    built = {}
    for name in sorted(services):
        built[name] = read(services[name], f"services.{name}", origins)
        if built[name].name != name:
            raise SnapshotError(f"services.{name}: its name is {built[name].name!r}")
    return Snapshot(built, revision)


_PLAIN = frozenset((str, int, bool, type(None)))
"""What is written as it is; most values are."""


class _Writer:
    def __init__(self, provenance: bool, inline: bool = False) -> None:
        self.origins: list[Json] = []
        self._provenance = provenance
        self._inline = inline
        self._indexes: dict[Origin, int] = {}

    def value(self, value: Any) -> Json:
        if type(value) in _PLAIN:
            return value
        if isinstance(value, float):
            return "none" if math.isinf(value) else value
        if value is None or isinstance(value, bool | int | str):
            return value.value if isinstance(value, Enum) else value
        if isinstance(value, Source):
            return _source(value)
        if isinstance(value, Enum):
            return value.value
        if isinstance(value, frozenset):
            return sorted(value)
        if isinstance(value, tuple | list):
            return [self.value(each) for each in value]
        if isinstance(value, Mapping):
            return {key: self.value(value[key]) for key in sorted(value)}
        assert is_dataclass(value), value
        return self._record(value)

    def _record(self, record: Any) -> dict[str, Json]:
        data: dict[str, Json] = {}
        kind: Any = type(record)
        usuals = _defaults(kind)
        for (name, usual), value in zip(usuals, _values_of(kind)(record), strict=True):
            if value is usual:
                continue
            if name == "provenance":
                if self._provenance and value:
                    data[name] = {key: self._origin(value[key]) for key in sorted(value)}
            elif usual is MISSING or value != usual:
                data[name] = self.value(value)
        return data

    def _origin(self, origin: Origin) -> Json:
        if self._inline:
            return _origin(origin)
        index = self._indexes.get(origin)
        if index is None:
            index = self._indexes[origin] = len(self.origins)
            self.origins.append(_origin(origin))
        return index


def _source(source: Source) -> str:
    return f"{source.file}:{source.line}:{source.column}" if source.file else ""


def _origin(origin: Origin) -> dict[str, Json]:
    data: dict[str, Json] = {"value": origin.value, "level": origin.level.value}
    if origin.source.file:
        data["source"] = _source(origin.source)
    if origin.overrode:
        data["overrode"] = [_origin(each) for each in origin.overrode]
    return data


@cache
def _defaults(record: type) -> tuple[tuple[str, Any], ...]:
    """Each field with its usual value, MISSING where it has none."""
    return tuple(
        (each.name, each.default_factory() if each.default_factory is not MISSING else each.default)
        for each in fields(record)
    )


@cache
def _values_of(record: type) -> Callable[[Any], tuple[Any, ...]]:
    """All of a record's fields, at once."""
    names = [each.name for each in fields(record)]
    if len(names) > 1:
        return attrgetter(*names)
    return lambda value: tuple(getattr(value, name) for name in names)


def _read_source(data: Json, where: str) -> Source:
    if data == "":
        return Source("")
    parts = data.rsplit(":", 2) if isinstance(data, str) else []
    if len(parts) != 3 or not parts[0] or not all(each.isascii() and each.isdigit() for each in parts[1:]):
        raise SnapshotError(f"{where}: not a place in a file")
    return Source(parts[0], int(parts[1][:9]), int(parts[2][:9]))


def _read_origin(data: Json, where: str) -> Origin:
    try:
        value, level = data["value"], Level(data["level"])
        source = _read_source(data.get("source", ""), where)
        overrode = tuple(_read_origin(each, where) for each in data.get("overrode", ()))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise error if isinstance(error, SnapshotError) else SnapshotError(f"{where}: not an origin") from None
    return Origin(value, level, source, overrode)


Reader = Callable[[Json, str, list[Origin]], Any]


@cache
def _reader_of(record: type) -> Reader:
    """A reader for one frozen type, made from its annotations."""
    hints = get_type_hints(record)
    readers: dict[str, Reader] = {
        each.name: _read_provenance if each.name == "provenance" else _reader(hints[each.name])
        for each in fields(record)
    }
    required = [name for name, usual in _defaults(record) if usual is MISSING]

    def read(data: Json, where: str, origins: list[Origin]) -> Any:
        if not isinstance(data, dict):
            raise SnapshotError(f"{where}: must be a map")
        values = {}
        for key, value in data.items():
            reader = readers.get(key)
            if reader is None:
                raise SnapshotError(f"{where}: unknown key {str(key)[:60]!r}")
            values[key] = reader(value, f"{where}.{key}", origins)
        for key in required:
            if key not in values:
                raise SnapshotError(f"{where}: needs {key!r}")
        return record(**values)

    return read


def _read_provenance(data: Json, where: str, origins: list[Origin]) -> Mapping[str, Origin]:
    if not isinstance(data, dict):
        raise SnapshotError(f"{where}: must be a map")
    result = {}
    for key, index in data.items():
        if type(index) is not int or not 0 <= index < len(origins):
            raise SnapshotError(f"{where}.{str(key)[:60]}: no such origin")
        result[key] = origins[index]
    return result


def _reader(hint: Any) -> Reader:
    kind, args = get_origin(hint), get_args(hint)
    if hint is Source:
        return lambda data, where, origins: _read_source(data, where)
    if kind in (types.UnionType, Union):
        inner = _reader(next(each for each in args if each is not type(None)))
        return lambda data, where, origins: None if data is None else inner(data, where, origins)
    if kind is tuple:
        return _list_reader(args)
    if kind is frozenset:
        item = _reader(args[0])
        return lambda data, where, origins: frozenset(
            item(each, f"{where}[]", origins) for each in _checked(data, list, where)
        )
    if kind is Mapping:
        item = _reader(args[1])
        return lambda data, where, origins: {
            _checked(key, str, where): item(each, f"{where}.{key}", origins)
            for key, each in _checked(data, dict, where).items()
        }
    if isinstance(hint, type) and issubclass(hint, Enum):
        return lambda data, where, origins: _member(hint, data, where)
    if isinstance(hint, type) and is_dataclass(hint):
        return lambda data, where, origins: _reader_of(hint)(data, where, origins)
    if hint is float:
        return _read_float
    if hint is object or hint is Any:
        return lambda data, where, origins: data
    return lambda data, where, origins: _checked(data, hint, where)


def _list_reader(args: tuple[Any, ...]) -> Reader:
    if len(args) == 2 and args[1] is Ellipsis:
        item = _reader(args[0])
        return lambda data, where, origins: tuple(
            item(each, f"{where}[{index}]", origins) for index, each in enumerate(_checked(data, list, where))
        )
    items = tuple(_reader(each) for each in args)

    def read(data: Json, where: str, origins: list[Origin]) -> Any:
        if len(_checked(data, list, where)) != len(items):
            raise SnapshotError(f"{where}: must hold {len(items)} values")
        return tuple(item(each, where, origins) for item, each in zip(items, data, strict=True))

    return read


def _read_float(data: Json, where: str, origins: list[Origin]) -> float:
    if data == "none":
        return math.inf
    if isinstance(data, bool) or not isinstance(data, int | float) or not math.isfinite(data):
        raise SnapshotError(f"{where}: must be a number")
    return float(data)


def _checked(data: Json, kind: type, where: str) -> Any:
    if not isinstance(data, kind) or (kind is int and isinstance(data, bool)):
        raise SnapshotError(f"{where}: must be {kind.__name__}")
    return data


def _member(kind: type[Enum], data: Json, where: str) -> Enum:
    try:
        return kind(data)
    except ValueError:
        raise SnapshotError(f"{where}: unknown value {str(data)[:60]!r}") from None
