"""A policy file cut into its documents, each with its exact lines, comments included.

`defaults`, `enforced` and each service become pieces that can be kept and replaced one by one. Must not know what the
values mean. Invariant: a piece decodes to what the whole file states, positions included; where lines or brackets do
not allow such a piece, it is the whole file (`whole`).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sidecar.model.documents import DEFAULTS, ENFORCED, SERVICES, decode_file, decode_piece, documents_of
from sidecar.model.kinds import Block, Stated
from sidecar.model.problems import Sink
from sidecar.model.source import Source
from sidecar.model.yaml_tree import Map, Node

WHOLE_BYTES_MAX = 1024 * 1024
"""What the documents of one file hold together where each must hold the whole file."""

_COMMENT = re.compile(r"[ \t]*#")
_INDENT = re.compile(r" *")


@dataclass(frozen=True, slots=True)
class Fragment:
    """`line`: the number of the text's first line in the file; with `whole` that of the document's key. `stated`: the
    piece, decoded."""

    line: int
    text: str
    whole: bool
    stated: Stated


@dataclass(frozen=True, slots=True)
class _Entry:
    """A key in the text: line and column from 0, and where the last text of its value ends."""

    name: str
    line: int
    column: int
    end: tuple[int, int]

    @property
    def last_line(self) -> int:
        line, column = self.end
        return line if column else max(self.line, line - 1)  # a block scalar ends where the next line begins


def cut(text: str, file: str, sink: Sink) -> Mapping[str, Fragment]:
    """The documents of a normalised text by name: `defaults`, `enforced`, `services/NAME`; nothing where the file has
    errors, which are in `sink`."""
    before = sink.failed
    sink.failed = False
    block = decode_file(text, file, sink)
    failed, sink.failed = sink.failed, sink.failed or before
    return {} if block is None or failed else cut_block(text, file, block, sink)


def cut_block(text: str, file: str, block: Block, sink: Sink) -> Mapping[str, Fragment]:
    """The same for a text that has been decoded without an error."""
    stated = documents_of(block)
    lines = text.splitlines(keepends=True) if "\n" in text else [text]
    pieces = dict(_pieces(lines, block.node))
    fragments = {}
    for name, each in stated.items():
        piece = pieces.get(name)
        if piece is not None and (piece.sure or _stands_alone(name, file, piece, each)):
            fragments[name] = Fragment(piece.line, piece.text, False, each)
        else:
            fragments[name] = Fragment(each.key.source.line, text, True, each)
    wholes = sum(each.whole for each in fragments.values())
    if wholes * len(text) > WHOLE_BYTES_MAX:
        sink.error(
            "P0114",
            f"a file of {len(text)} bytes with {wholes} documents that cannot be told apart by their lines",
            Source(file, 1, 1),
            help="write `services:`, `defaults:` and `enforced:`, and the name of each service, on lines of their own",
        )
        return {}
    return fragments


@dataclass(frozen=True, slots=True)
class _Piece:
    line: int
    text: str
    sure: bool  # cut by lines: nothing can go wrong


def _stands_alone(name: str, file: str, piece: _Piece, stated: Stated) -> bool:
    return decode_piece(name, piece.text, file, piece.line, Sink()) == stated


def _pieces(lines: Sequence[str], root: Node) -> Iterator[tuple[str, _Piece]]:
    assert isinstance(root, Map)
    entries = _entries(root)
    if root.flow:
        yield from ((each.name, _span(lines, each)) for each in entries if each.name in (DEFAULTS, ENFORCED))
    elif _on_own_lines(lines, entries):
        starts = [*_starts(lines, entries, -1), len(lines)]
        for index, each in enumerate(entries):
            if each.name in (DEFAULTS, ENFORCED):
                yield each.name, _lines(lines, starts[index], starts[index + 1], each)
    if "services" not in root.entries:
        return
    services = root.entries["services"][1]
    if not isinstance(services, Map):
        return
    inner = _entries(services)
    if services.flow or root.flow:
        yield from ((SERVICES + each.name, _span(lines, each)) for each in inner)
    elif _on_own_lines(lines, [*entries, *inner]):
        index = next(index for index, each in enumerate(entries) if each.name == "services")
        starts = [*_starts(lines, inner, entries[index].line), [*_starts(lines, entries, -1), len(lines)][index + 1]]
        for index, each in enumerate(inner):
            yield SERVICES + each.name, _lines(lines, starts[index], starts[index + 1], each)


def _entries(node: Map) -> list[_Entry]:
    assert node.ends is not None
    places = ((name, key.source) for name, (key, _) in node.entries.items())
    return [_Entry(name, at.line - 1, at.column - 1, node.ends[name]) for name, at in places]


def _on_own_lines(lines: Sequence[str], entries: Sequence[_Entry]) -> bool:
    return all(not lines[each.line][: each.column].strip(" ") for each in entries)


def _starts(lines: Sequence[str], entries: Sequence[_Entry], above: int) -> Iterator[int]:
    """Where each begins, with the comments right above it that are not indented deeper; `above` is the last line that
    belongs to something else."""
    for each in entries:
        start = each.line
        while start - 1 > above and _is_comment_of(lines[start - 1], each.column):
            start -= 1
        yield start
        above = each.last_line


def _is_comment_of(line: str, column: int) -> bool:
    if _COMMENT.match(line) is None:
        return False
    indent = _INDENT.match(line)
    return indent is not None and indent.end() <= column


def _lines(lines: Sequence[str], start: int, end: int, entry: _Entry) -> _Piece:
    while end - 1 > entry.last_line and not lines[end - 1].strip():
        end -= 1
    return _Piece(start + 1, "".join(lines[start:end]), True)


def _span(lines: Sequence[str], entry: _Entry) -> _Piece:
    """What stands in brackets: from the key to the end of its value, at its column."""
    line, column = entry.end
    if line == entry.line:
        inside = lines[line][entry.column : column]
    else:
        inside = "".join((lines[entry.line][entry.column :], *lines[entry.line + 1 : line], lines[line][:column]))
    return _Piece(entry.line + 1, f"{' ' * entry.column}{inside}\n", False)
