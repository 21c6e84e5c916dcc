"""YAML text to a tree of nodes that know their place: the YAML 1.2 core schema, strictly and within bounds.

PyYAML supplies the events only; what a scalar means is decided here, so `on`, `no` and `yes` are strings. Directives,
tags, anchors, aliases, merge keys, several documents and duplicate keys are problems with a position. Keys are always
text. Must not know what a policy is. Never raises for bad input; no recursion goes deeper than DEPTH_MAX.
"""

import re
from collections.abc import Callable
from dataclasses import field
from typing import Any

import yaml

from .problems import Sink, clip
from .records import record
from .source import Source

BYTES_MAX = 4 * 1024 * 1024
DEPTH_MAX = 32
NODES_MAX = 200_000
_DIGITS_MAX = 30

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml, where PyYAML was built with it

# What YAML 1.2 does not print, what YAML 1.1 readers take for a line break and 1.2 readers do not, and what makes a
# line look different from what it says.
_FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff\ufffe\uffff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_INT = re.compile(r"[-+]?[0-9]+\Z")
_OCTAL = re.compile(r"0o[0-7]+\Z")
_HEX = re.compile(r"0x[0-9a-fA-F]+\Z")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
_SPECIAL_FLOAT = re.compile(r"[-+]?\.(inf|Inf|INF)\Z|\.(nan|NaN|NAN)\Z")
_NUMERIC = frozenset("0123456789+-.")

Plain = None | bool | int | float | str
_WORDS: dict[str, Plain] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


@record(frozen=True, slots=True)
class Node:
    """`length` is what an underline covers on the node's first line."""

    source: Source
    length: int


@record(frozen=True, slots=True)
class Scalar(Node):
    value: Plain
    text: str


@record(frozen=True, slots=True)
class Map(Node):
    """In the order of the file. `ends` (of the two outermost levels): where the last text of each entry's value ends,
    as line and column from 0 in the text that was read."""

    entries: dict[str, tuple[Scalar, Node]] = field(default_factory=dict)
    flow: bool = field(default=False, compare=False)  # written in brackets
    ends: dict[str, tuple[int, int]] | None = field(default=None, compare=False, repr=False)


@record(frozen=True, slots=True)
class List(Node):
    items: tuple[Node, ...] = ()


@record(frozen=True, slots=True)
class Broken(Node):
    """A node that has been reported already; who meets it says nothing more."""


class _TooMuch(Exception):
    """A bound was passed: the file is given up."""


def normalise(text: str) -> str:
    """The text that positions refer to: without byte order mark, with `\\n` as its only line break."""
    return text.removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}").replace("\r\n", "\n").replace("\r", "\n")


def read_yaml(text: str, file: str, sink: Sink, first_line: int = 1) -> Node | None:
    """The tree of one normalised text; None where the file cannot be understood at all, or is empty. `first_line` is
    the number of the text's first line, where it is a piece of a file."""
    bad = _FORBIDDEN.search(text)
    if bad is not None:
        line = text.count("\n", 0, bad.start()) + first_line
        column = bad.start() - text.rfind("\n", 0, bad.start())
        char = f"U+{ord(bad.group()):04X}"
        sink.error(
            "P0101",
            f"the character {char} may not stand in a policy file",
            Source(file, line, column),
            help=f'inside a double-quoted string it can be written as an escape: "\\u{ord(bad.group()):04X}"'
            if 0 < ord(bad.group()) <= 0xFFFF
            else "remove it",
        )
        return None
    if len(text) > BYTES_MAX:
        sink.error("P0114", f"the file holds more than {BYTES_MAX // 1024 // 1024} MB", Source(file))
        return None
    try:
        return _Reader(text, file, sink, first_line).document()
    except _TooMuch:
        return None
    except yaml.YAMLError as error:
        _report_syntax(error, text, file, sink, first_line)
        return None


def _report_syntax(error: yaml.YAMLError, text: str, file: str, sink: Sink, first_line: int) -> None:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    what = str(getattr(error, "problem", None) or getattr(error, "context", None) or "cannot be read")
    if mark is None:
        sink.error("P0101", f"not valid YAML: {clip(what)}", Source(file, first_line, 1))
        return
    lines = text.split("\n")
    line = lines[mark.line] if mark.line < len(lines) else ""
    help = ""
    if "\t" in line[: mark.column + 1] and not line[: mark.column].strip():
        help = "indent with spaces: YAML does not take tabs"
    elif "alias" in what or "anchor" in what or line[mark.column : mark.column + 1] == "*":
        help = 'a value that begins with * or & must be quoted: "*"'
    elif "mapping values are not allowed" in what:
        help = "quote a value that holds `: `, and check the indentation of this line and the one above"
    elif line[mark.column : mark.column + 1] in ("@", "`", "%"):
        help = "quote a value that begins with @, ` or %"
    at = Source(file, mark.line + first_line, mark.column + 1)
    sink.error("P0101", f"not valid YAML: {clip(what, 100)}", at, help=help)


class _Reader:
    """Turns events into nodes. `Event` objects come lazily, so a hostile file is left at the first bound it passes."""

    def __init__(self, text: str, file: str, sink: Sink, first_line: int) -> None:
        self._next: Callable[[], Any] = _LOADER(text).get_event  # None after the last
        self._file = file
        self._sink = sink
        self._first_line = first_line
        self._nodes = 0
        self._end: yaml.Event | None = None  # the last one that has text of its own

    def document(self) -> Node | None:
        root: Node | None = None
        documents = 0
        for event in iter(self._next, None):
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if event.version or event.tags:
                    self._refuse(event, "a directive", "remove the line that begins with %")
                if documents > 1:
                    self._refuse(event, "a second document", "put it into a file of its own; a folder is one policy")
                    return root
            elif isinstance(event, yaml.NodeEvent):
                root = self._node(event, 1)
        return root

    def _node(self, event: Any, depth: int) -> Node:
        """`event` is what begins a node; told by its exact type, which is quicker than isinstance."""
        self._nodes += 1
        start, end, kind = event.start_mark, event.end_mark, type(event)
        line, column = start.line, start.column
        length = end.column - column if line == end.line and end.column > column else 1
        source = Source(self._file, line + self._first_line, column + 1)
        if self._nodes > NODES_MAX:
            self._sink.error("P0114", f"the file holds more than {NODES_MAX} values", source)
            raise _TooMuch
        if depth > DEPTH_MAX:
            self._sink.error("P0114", f"nested more than {DEPTH_MAX} levels deep", source)
            raise _TooMuch
        if kind is yaml.AliasEvent:
            self._end = event
            self._refuse(event, f"the alias *{clip(str(event.anchor))}", "write the value out, or use `defaults`")
            return Broken(source, length)
        if event.anchor is not None:
            self._refuse(event, f"the anchor &{clip(event.anchor)}", "write the value out, or use `defaults`")
        if event.tag is not None:
            self._refuse(event, f"the tag {clip(str(event.tag))}", "remove the tag; quote a value to make it a string")
        if kind is yaml.ScalarEvent:
            self._end = event
            return self._scalar(event, source, length)
        flow = bool(event.flow_style)
        if kind is yaml.MappingStartEvent:
            return self._map(source, depth, flow)
        items = []
        while type(event := self._next()) is not yaml.SequenceEndEvent:
            items.append(self._node(event, depth + 1))
        if flow:
            self._end = event
        return List(source, self._span(source, event) if flow else 1, tuple(items))

    def _map(self, source: Source, depth: int, flow: bool) -> Map:
        entries: dict[str, tuple[Scalar, Node]] = {}
        ends: dict[str, tuple[int, int]] | None = {} if depth <= 2 else None
        more, below = self._next, depth + 1
        while type(event := more()) is not yaml.MappingEndEvent:
            key = self._node(event, below)
            value = self._node(more(), below)
            if isinstance(key, Broken):
                continue
            if not isinstance(key, Scalar):
                self._sink.error("P0102", "a key must be plain text, not a map or a list", key)
            elif key.text == "<<":
                self._sink.error("P0102", "merge keys are not allowed", key, help="use `defaults` for what is shared")
            elif key.text == "":
                self._sink.error("P0102", "an empty key", key)
            elif key.text in entries:
                first = entries[key.text][0].source
                self._sink.error(
                    "P0103",
                    f'the key "{clip(key.text)}" stands twice',
                    key,
                    f"first here: {first}",
                    "remove one of them",
                )
            else:
                entries[key.text] = (key, value)
                if ends is not None:
                    assert self._end is not None
                    assert self._end.end_mark is not None
                    ends[key.text] = (self._end.end_mark.line, self._end.end_mark.column)
        if flow:
            self._end = event
        return Map(source, self._span(source, event) if flow else 1, entries, flow, ends)

    def _scalar(self, event: yaml.ScalarEvent, source: Source, length: int) -> Scalar | Broken:
        text = event.value
        if not text.isascii() and _SURROGATE.search(text):  # escaped, in a quoted scalar; libyaml refuses it by itself
            self._sink.error("P0101", "half of a surrogate pair is no character", Node(source, length))
            return Broken(source, length)
        if not event.style:
            if text[:1] not in _NUMERIC:
                return Scalar(source, length, _WORDS.get(text, text), text)
            if len(text) > _DIGITS_MAX and (_INT.match(text) or _HEX.match(text) or _OCTAL.match(text)):
                self._sink.error("P0115", f"a number of more than {_DIGITS_MAX} digits", Node(source, length))
                return Scalar(source, length, 0, text)
            return Scalar(source, length, resolve_plain(text), text)
        return Scalar(source, length, text, text)

    def _place(self, event: yaml.Event) -> tuple[Source, int]:
        start, end = event.start_mark, event.end_mark
        assert start is not None
        assert end is not None
        length = end.column - start.column if start.line == end.line else 1
        return Source(self._file, start.line + self._first_line, start.column + 1), max(1, length)

    def _span(self, source: Source, end: yaml.Event) -> int:
        """A collection in brackets on one line is underlined as a whole, any other at its first character."""
        closing, length = self._place(end)
        mark = end.end_mark
        assert mark is not None
        in_brackets = mark.column == closing.column - 1 + length and closing.line == source.line
        return max(1, mark.column + 1 - source.column) if in_brackets else 1

    def _refuse(self, event: yaml.Event, what: str, help: str) -> None:
        source, length = self._place(event)
        self._sink.error("P0102", f"{what} is not allowed in a policy file", Node(source, length), help=help)


def resolve_plain(text: str) -> Plain:
    """What an unquoted scalar means (YAML 1.2.2, section 10.3.2)."""
    if text[:1] not in _NUMERIC:
        return _WORDS.get(text, text)
    if _INT.match(text):
        return int(text)
    if _OCTAL.match(text):
        return int(text[2:], 8)
    if _HEX.match(text):
        return int(text[2:], 16)
    if _FLOAT.match(text):
        return float(text)
    if _SPECIAL_FLOAT.match(text):
        return float(text.replace(".", "", 1))
    return text


def kind_of(node: Node) -> str:
    """What a node is, as a message names it."""
    match node:
        case Map():
            return "a map"
        case List():
            return "a list"
        case Scalar(value=None):
            return "nothing"
        case Scalar(value=bool()):
            return "a boolean"
        case Scalar(value=int() | float()):
            return "a number"
        case _:
            return "a string"
