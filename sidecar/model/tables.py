"""Containers of a policy file: lists, maps with free keys, and tables, which are maps with declared keys.

The declarations of fields.py, made from these, drive the strict decoder, the JSON Schema and the reference in
docs/policy.md alike. Must not know any particular field, nor how levels merge.
"""

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from .kinds import INVALID, RESET, Block, Clamp, Kind, Schema, Stated, Text
from .problems import Sink, clip
from .records import record
from .yaml_tree import List, Map, Node, Scalar


@record(frozen=True)
class ListOf(Kind):
    item: Kind
    what: str = "a list"
    items_min: int = 0
    items_max: int = 1000
    unique: bool = True

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.what

    def decode(self, node: Node, where: str, sink: Sink) -> Any:
        if not isinstance(node, List):
            help = f"write [{clip(node.text)}]" if isinstance(node, Scalar) and node.text else ""
            return self.wrong(node, where, sink, help)
        if len(node.items) < self.items_min:
            sink.error("P0106", f"`{where}` is empty", node, help="leave the key out, or name at least one")
            return INVALID
        if len(node.items) > self.items_max:
            sink.error("P0114", f"`{where}` holds more than {self.items_max} entries", node)
            return INVALID
        values = []
        seen = set()
        for index, each in enumerate(node.items):
            value = self.item.decode(each, f"{where}[{index}]", sink)
            if value is INVALID:
                continue
            if self.unique and isinstance(each, Scalar):
                if each.text in seen:
                    message = f'"{clip(each.text)}" stands twice in `{where}`'
                    sink.error("P0106", message, each, help="remove one of them")
                    continue
                seen.add(each.text)
            values.append(value)
        return tuple(values)

    def format(self, value: Any) -> str:
        return f"[{', '.join(self.item.format(each) for each in value)}]"

    def schema(self) -> Schema:
        schema: Schema = {"type": "array", "items": self.item.schema(), "maxItems": self.items_max}
        return schema | ({"minItems": self.items_min} if self.items_min else {})


@record(frozen=True)
class MapOf(Kind):
    """A map with free keys, each judged by `key`; gives a dict of Stated. `lower` compares keys without case."""

    key: Text
    item: Kind
    what: str = "a map"
    entries_max: int = 10_000
    lower: bool = False

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.what

    def decode(self, node: Node, where: str, sink: Sink) -> Any:
        if not isinstance(node, Map):
            return self.wrong(node, where, sink)
        if len(node.entries) > self.entries_max:
            sink.error("P0114", f"`{where}` holds more than {self.entries_max} entries", node)
            return INVALID
        values: dict[str, Stated] = {}
        for name, (key, each) in node.entries.items():
            name_ok = self.key.judge(name, key, f"{where}.{clip(name)}", sink)
            value = self.item.decode(each, f"{where}.{clip(name)}", sink)
            name = name.lower() if self.lower else name
            if name in values:
                sink.error("P0103", f'the key "{clip(name)}" stands twice (names differ in case only)', key)
            elif name_ok and value is not INVALID:
                values[name] = Stated(value, each, key)
        return values

    def format(self, value: Any) -> str:
        return "{" + ", ".join(f"{key}: {self.item.format(each.value)}" for key, each in value.items()) + "}"

    def schema(self) -> Schema:
        return {
            "type": "object",
            "propertyNames": {k: v for k, v in self.key.schema().items() if k != "type"},
            "additionalProperties": self.item.schema(),
            "maxProperties": self.entries_max,
        }


@record(frozen=True)
class Anything(Kind):
    """Plain JSON data, passed on as it is."""

    @property
    def name(self) -> str:  # type: ignore[override]
        return "a map"

    def decode(self, node: Node, where: str, sink: Sink) -> Any:
        return _plain(node, sink) if isinstance(node, Map) else self.wrong(node, where, sink)

    def format(self, value: Any) -> str:
        return "{...}" if value else "{}"

    def schema(self) -> Schema:
        return {"type": "object"}


def _plain(node: Node, sink: Sink) -> Any:
    match node:
        case Map():
            return {key: _plain(value, sink) for key, (_, value) in node.entries.items()}
        case List():
            return [_plain(item, sink) for item in node.items]
        case Scalar():
            if isinstance(node.value, float) and not math.isfinite(node.value):
                sink.error("P0106", f"{node.text} is no JSON number", node)
            return node.value
    return None


@record(frozen=True)
class Field:
    """One key of a table. `builtin` is the value where nothing is stated, `builtin_text` says it where the value
    cannot; `later` is the code of a key that a later release brings."""

    key: str
    kind: Kind
    doc: str
    builtin: Any = None
    required: bool = False
    later: str = ""
    builtin_text: str = ""
    null: str = ""  # why `null` is refused here, and what to write


@record(frozen=True)
class Table(Kind):
    """A map with declared keys; decodes to a Block. `nothing` allows an empty value for an empty map."""

    title: str
    fields: tuple[Field, ...]
    nothing: bool = False
    doc: str = ""

    @property
    def name(self) -> str:  # type: ignore[override]
        return "a map"

    @cached_property
    def by_key(self) -> Mapping[str, Field]:
        return {each.key: each for each in self.fields}

    def decode(self, node: Node, where: str, sink: Sink) -> Any:
        if self.nothing and isinstance(node, Scalar) and node.value is None:
            return Block({}, node)
        if not isinstance(node, Map):
            keys = [each.key for each in self.fields if not each.later]
            shown = ", ".join(keys[:6]) + (", ..." if len(keys) > 6 else "")
            return self.wrong(node, where, sink, f"its keys: {shown}")
        known = self.by_key
        fields: dict[str, Stated] = {}
        prefix = f"{where}." if where else ""
        for name, (key, each) in node.entries.items():
            declared = known.get(name)
            if declared is None:
                self._unknown(name, key, where, sink)
                continue
            if declared.later:
                sink.error(
                    declared.later,
                    f"not supported yet: `{prefix}{name}`",
                    key,
                    help="remove it; a later release brings it",
                )
                continue
            if isinstance(each, Scalar) and each.value is None and not _takes_nothing(declared.kind):
                if declared.null:
                    sink.error("P0106", f"`{prefix}{name}` cannot be null", each, help=declared.null)
                    continue
                fields[name] = Stated(RESET, each, key)
                continue
            value = declared.kind.decode(each, prefix + name, sink)
            if value is not INVALID:
                fields[name] = Stated(value, each, key)
        for declared in self.fields:
            entry = node.entries.get(declared.key)
            null = declared.key in fields and fields[declared.key].value is RESET
            if declared.required and (entry is None or null):
                inside = f"`{where}`" if where else "the file"
                help = f"`{declared.key}` is {declared.kind.name}"
                sink.error("P0109", f"{inside} needs `{declared.key}`", node, help=help)
        return Block(fields, node)

    def _unknown(self, name: str, key: Node, where: str, sink: Sink) -> None:
        keys = [each.key for each in self.fields]
        near = sink.suggest(name, keys)
        inside = f"in `{where}`" if where else "at the top"
        sink.error(
            "P0104", f'unknown key "{clip(name)}"', key, label=inside, help=near or f"known here: {', '.join(keys)}"
        )

    def format(self, value: Any) -> str:
        known = self.by_key
        parts = [
            f"{key}: {'null' if each.value is RESET else known[key].kind.format(each.value)}"
            for key, each in value.fields.items()
        ]
        return "{" + ", ".join(parts) + "}"

    def schema(self) -> Schema:
        properties = {}
        for each in self.fields:
            if not each.later:
                properties[each.key] = _nullable(each.kind.schema(), each) | {"description": each.doc}
        schema: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
        required = [each.key for each in self.fields if each.required]
        if required:
            schema["required"] = required
        return schema if not self.nothing else schema | {"type": ["object", "null"]}


def _takes_nothing(kind: Kind) -> bool:
    return isinstance(kind, Table) and kind.nothing


def _nullable(schema: Schema, declared: Field) -> Schema:
    """`null` is a value of every optional key: the built-in again."""
    if declared.required or declared.null:
        return schema
    if "enum" in schema:
        return schema | {"type": [schema["type"], "null"], "enum": [*schema["enum"], None]}
    if isinstance(schema.get("type"), str):
        return schema | {"type": [schema["type"], "null"]}
    return schema if "type" in schema else {"anyOf": [schema, {"type": "null"}]}


@record(frozen=True)
class Clampable(Kind):
    """A scalar, or `{min, max}` that clamps what the levels below say."""

    kind: Kind

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.kind.name} or a map of min and max"

    def decode(self, node: Node, where: str, sink: Sink) -> Any:
        if not isinstance(node, Map):
            return self.kind.decode(node, where, sink)
        block = self._table().decode(node, where, sink)
        low, high = block.get("min"), block.get("max")
        if low is None and high is None:
            if not node.entries:
                sink.error("P0109", f"`{where}` needs `min` or `max`", node)
            return INVALID
        if low is not None and high is not None and low > high:
            sink.error("P0111", f"`{where}`: min is greater than max", node)
            return INVALID
        return Clamp(low, high)

    def _table(self) -> Table:
        return Table("clamp", (Field("min", self.kind, "Lower bound."), Field("max", self.kind, "Upper bound.")))

    def format(self, value: Any) -> str:
        if not isinstance(value, Clamp):
            return self.kind.format(value)
        parts = [("min", value.minimum), ("max", value.maximum)]
        return "{" + ", ".join(f"{key}: {self.kind.format(each)}" for key, each in parts if each is not None) + "}"

    def schema(self) -> Schema:
        inner = self.kind.schema()
        bounds = {
            "type": "object",
            "properties": {"min": inner, "max": inner},
            "additionalProperties": False,
            "minProperties": 1,
        }
        return {"anyOf": [inner, bounds]}
