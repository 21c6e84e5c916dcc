"""The kinds of scalar that a policy file holds, and what decoding gives.

A kind decodes a node strictly (reporting every problem to a Sink), shows a value again as text, and gives its JSON
Schema. Must not know any particular field, nor how levels merge. Invariant: what `format` shows, `decode` reads.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from enum import Enum
from typing import Any

from .problems import Sink, clip
from .records import record
from .snapshot import NONE
from .yaml_tree import Broken, Node, Scalar, kind_of

Schema = dict[str, Any]


class Mark(Enum):
    INVALID = "invalid"  # reported already
    RESET = "null"  # `null`: the built-in value again


INVALID, RESET = Mark.INVALID, Mark.RESET


@record(frozen=True, slots=True)
class Stated:
    """A value, and where the file states it."""

    value: Any
    node: Node
    key: Node


@record(frozen=True, slots=True)
class Block:
    """A decoded table: what is stated, key by key. Missing keys are not stated; invalid ones are left out."""

    fields: Mapping[str, Stated]
    node: Node

    def get(self, key: str) -> Any:
        """The stated value; None where there is none or it is null."""
        stated = self.fields.get(key)
        return None if stated is None or stated.value is RESET else stated.value

    def stated(self, key: str) -> Stated | None:
        """What is stated and not null."""
        stated = self.fields.get(key)
        return None if stated is None or stated.value is RESET else stated


@record(frozen=True, slots=True)
class Ref:
    """A name that must resolve to something declared, with its place."""

    name: str
    node: Node


@record(frozen=True, slots=True)
class Clamp:
    """`{min, max}` under `enforced`."""

    minimum: float | None
    maximum: float | None


class Kind:
    """`name` is what a message and the reference call it; `ordered` kinds can be clamped."""

    name = "a value"
    ordered = False

    def decode(self, node: Node, where: str, sink: Sink) -> Any:
        raise NotImplementedError

    def format(self, value: Any) -> str:
        return str(value)

    def schema(self) -> Schema:
        raise NotImplementedError

    def wrong(self, node: Node, where: str, sink: Sink, help: str = "") -> Mark:
        if not isinstance(node, Broken):
            what = f"`{where}`" if where else "the file"
            sink.error("P0105", f"{what} must be {self.name}, not {kind_of(node)}", node, help=help)
        return INVALID


def format_seconds(seconds: float) -> str:
    """The shortest exact spelling: 250ms, 10s, 1m, 1h, none."""
    if seconds == NONE:
        return "none"
    milliseconds = round(seconds * 1000, 6)
    for unit, size in (("h", 3_600_000), ("m", 60_000), ("s", 1000)):
        if milliseconds >= size and milliseconds % size == 0:
            return f"{milliseconds / size:.0f}{unit}"
    return f"{seconds:g}s" if seconds >= 1 else f"{milliseconds:g}ms"


def format_number(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)(ms|s|m|h)\Z")
_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_PERCENT = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,6})?)%\Z")
DURATION_MAX_S = 365 * 86400.0


@record(frozen=True)
class Duration(Kind):
    none: bool = False  # whether `none` (no limit) is a value
    min_s: float = 0.001
    max_s: float = DURATION_MAX_S
    ordered = True

    @property
    def name(self) -> str:  # type: ignore[override]
        return "a duration"

    def decode(self, node: Node, where: str, sink: Sink) -> Any:
        examples = "for example 10s, 250ms, 1m, 1h" + (", or none for no limit" if self.none else "")
        if not isinstance(node, Scalar):
            return self.wrong(node, where, sink, examples)
        if self.none and node.text == "none":
            return NONE
        found = _DURATION.match(node.text)
        if found is None:
            if isinstance(node.value, int | float) and not isinstance(node.value, bool):
                help = f"write {clip(node.text)}s or {clip(node.text)}ms"
                sink.error("P0106", f"`{where}` needs a unit", node, help=help)
            elif node.text == "none":
                sink.error("P0106", f"`{where}` cannot be none", node, help=examples)
            else:
                sink.error("P0106", f'"{clip(node.text)}" is not a duration', node, help=examples)
            return INVALID
        seconds = round(float(found[1]) * _UNIT_S[found[2]], 9)
        if not self.min_s <= seconds <= self.max_s:
            limits = f"from {format_seconds(self.min_s)} to {format_seconds(self.max_s)}"
            help = "for no limit write none" if self.none and seconds == 0 else ""
            sink.error("P0115", f"`{where}` must be {limits}", node, help=help)
            return INVALID
        return seconds

    def format(self, value: Any) -> str:
        return format_seconds(value)

    def schema(self) -> Schema:
        pattern = r"[0-9]{1,9}(\.[0-9]{1,6})?(ms|s|m|h)"
        return {"type": "string", "pattern": f"^({pattern}|none)$" if self.none else f"^{pattern}$"}


@record(frozen=True)
class Percent(Kind):
    none: bool = False  # whether `none` may be written for 0%
    ordered = True

    @property
    def name(self) -> str:  # type: ignore[override]
        return "a percentage"

    def decode(self, node: Node, where: str, sink: Sink) -> Any:
        if not isinstance(node, Scalar):
            return self.wrong(node, where, sink, "for example 20%")
        if self.none and node.text == "none":
            return 0.0
        found = _PERCENT.match(node.text)
        if found is None:
            number = isinstance(node.value, int | float) and not isinstance(node.value, bool)
            help = f"write {clip(node.text)}%" if number else "for example 20%"
            sink.error("P0106", f'"{clip(node.text)}" is not a percentage', node, help=help)
            return INVALID
        if float(found[1]) > 100:
            sink.error("P0115", f"`{where}` must be from 0% to 100%", node)
            return INVALID
        return float(found[1])

    def format(self, value: Any) -> str:
        return "none" if self.none and not value else f"{value:g}%"

    def schema(self) -> Schema:
        pattern = r"([0-9]{1,2}(\.[0-9]{1,6})?|100(\.0{1,6})?)%"
        return {"type": "string", "pattern": f"^({pattern}|none)$" if self.none else f"^{pattern}$"}


@record(frozen=True)
class Number(Kind):
    """An integer, or with `whole` false any finite number."""

    minimum: float
    maximum: float
    whole: bool = True
    ordered = True

    @property
    def name(self) -> str:  # type: ignore[override]
        return "a whole number" if self.whole else "a number"

    def decode(self, node: Node, where: str, sink: Sink) -> Any:
        value = node.value if isinstance(node, Scalar) else None
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            help = ""
            if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit():
                help = f"remove the quotes: {clip(value.strip())}"
            if isinstance(value, float):
                sink.error("P0105", f"`{where}` must be {self.name}, not {clip(str(value))}", node)
                return INVALID
            return self.wrong(node, where, sink, help)
        if not self.minimum <= value <= self.maximum:
            limits = f"from {format_number(self.minimum)} to {format_number(self.maximum)}"
            if self.minimum == self.maximum:
                limits = format_number(self.minimum)
            sink.error("P0115", f"`{where}` must be {limits}", node)
            return INVALID
        return value if self.whole else float(value)

    def format(self, value: Any) -> str:
        return "none" if value is None else format_number(value)

    def schema(self) -> Schema:
        return {"type": "integer" if self.whole else "number", "minimum": self.minimum, "maximum": self.maximum}


@record(frozen=True)
class Flag(Kind):
    @property
    def name(self) -> str:  # type: ignore[override]
        return "true or false"

    def decode(self, node: Node, where: str, sink: Sink) -> Any:
        if isinstance(node, Scalar) and isinstance(node.value, bool):
            return node.value
        return self.wrong(node, where, sink)

    def format(self, value: Any) -> str:
        return "true" if value else "false"

    def schema(self) -> Schema:
        return {"type": "boolean"}


@record(frozen=True)
class Status(Kind):
    """One of a few HTTP statuses."""

    statuses: tuple[int, ...]

    @property
    def name(self) -> str:  # type: ignore[override]
        return _either(tuple(str(each) for each in self.statuses))

    def decode(self, node: Node, where: str, sink: Sink) -> Any:
        if isinstance(node, Scalar) and node.value in self.statuses:
            return node.value
        return self.wrong(node, where, sink) if not isinstance(node, Scalar) else self._other(node, where, sink)

    def _other(self, node: Scalar, where: str, sink: Sink) -> Any:
        sink.error("P0106", f"`{where}` must be {self.name}, not {clip(node.text) or 'nothing'}", node)
        return INVALID

    def schema(self) -> Schema:
        return {"type": "integer", "enum": list(self.statuses)}


Check = Callable[[str], tuple[str, str] | None]
"""Says what is wrong with a text (message, help), or None."""


@record(frozen=True)
class Text(Kind):
    """A string. `check` judges it, `convert` makes the value of it, `pattern` tells editors what it looks like."""

    what: str = "a string"
    check: Check | None = None
    chars_max: int = 1024
    pattern: str | None = None
    convert: Callable[[str], Any] | None = None
    ref: bool = False

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.what

    def decode(self, node: Node, where: str, sink: Sink) -> Any:
        if not isinstance(node, Scalar) or not isinstance(node.value, str):
            if isinstance(node, Broken):
                return INVALID
            quote = isinstance(node, Scalar) and node.value is not None
            help = f'quote it: "{clip(node.text)}"' if quote and isinstance(node, Scalar) else ""
            sink.error("P0105", f"`{where}` must be a string, not {kind_of(node)}", node, help=help)
            return INVALID
        if not self.judge(node.value, node, where, sink):
            return INVALID
        value = self.convert(node.value) if self.convert is not None else node.value
        return Ref(value, node) if self.ref else value

    def judge(self, text: str, node: Node, where: str, sink: Sink) -> bool:
        if len(text) > self.chars_max:
            sink.error("P0115", f"`{where}` is longer than {self.chars_max} characters", node)
            return False
        wrong = self.check(text) if self.check is not None else None
        if wrong is not None:
            sink.error("P0106", wrong[0], node, help=wrong[1])
        return wrong is None

    def format(self, value: Any) -> str:
        return value.name if isinstance(value, Ref) else str(value)

    def schema(self) -> Schema:
        schema: Schema = {"type": "string", "maxLength": self.chars_max}
        return schema | ({"pattern": self.pattern} if self.pattern else {})


@record(frozen=True)
class Choice(Kind):
    """One of a few words; a word in `later` is known but not supported yet, with the code that says so."""

    words: tuple[str, ...]
    later: Mapping[str, str] = field(default_factory=dict)
    convert: Callable[[str], Any] | None = None

    @property
    def name(self) -> str:  # type: ignore[override]
        return _either(self.words)

    def decode(self, node: Node, where: str, sink: Sink) -> Any:
        if not isinstance(node, Scalar) or not isinstance(node.value, str):
            return self.wrong(node, where, sink)
        if node.value in self.words:
            return self.convert(node.value) if self.convert is not None else node.value
        if node.value in self.later:
            sink.error(
                self.later[node.value],
                f"not supported yet: `{where}: {node.value}`",
                node,
                help=f"this release knows {_either(self.words)}",
            )
            return INVALID
        sink.error(
            "P0106",
            f'`{where}` cannot be "{clip(node.value)}"',
            node,
            label=f"known: {', '.join(self.words)}",
            help=sink.suggest(node.value, self.words),
        )
        return INVALID

    def format(self, value: Any) -> str:
        return str(value.value) if isinstance(value, Enum) else str(value)

    def schema(self) -> Schema:
        return {"type": "string", "enum": list(self.words)}


def _either(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
