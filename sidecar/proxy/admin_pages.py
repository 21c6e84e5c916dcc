"""The pages of the admin interface, made in slices, so that other tasks run while a long one is written.

Must not know connections, nor where the data come from. Invariant: a slice costs about a millisecond at most.
"""

import json
from collections.abc import Iterable, Iterator, Mapping

SLICE_CHARS = 16_384
ROWS_PER_SLICE = 100

Row = Mapping[str, object]


def quality(accept: str, kind: str, subtype: str) -> float:
    """The q that an Accept field gives a media type (RFC 9110, section 12.5.1), by its closest range; an absent
    field says nothing, so 0."""
    best = (0, 0.0)
    for item in accept.lower().split(","):
        media, *parameters = (part.strip() for part in item.split(";"))
        closeness = {f"{kind}/{subtype}": 3, f"{kind}/*": 2, "*/*": 1}.get(media, 0)
        q = 1.0
        for parameter in parameters:
            if parameter.startswith("q="):
                try:
                    q = float(parameter[2:])
                except ValueError:
                    q = 0.0
        if closeness:
            best = max(best, (closeness, q))
    return best[1]


def json_slices(data: object) -> Iterator[bytes]:
    """JSON in slices; with an indent the encoder yields small pieces, and so can be paused."""
    pieces: list[str] = []
    size = 0
    for piece in json.JSONEncoder(indent=2, default=str).iterencode(data):
        pieces.append(piece)
        size += len(piece)
        if size >= SLICE_CHARS:
            yield "".join(pieces).encode()
            pieces, size = [], 0
    yield "".join((*pieces, "\n")).encode()


def row_slices(rows: Iterable[Row]) -> Iterator[bytes]:
    """A JSON array with a line for each row."""
    lines: list[str] = []
    before = "["
    for row in rows:
        lines.append(f"{before}\n{json.dumps(row, default=str)}")
        before = ","
        if len(lines) >= ROWS_PER_SLICE:
            yield "".join(lines).encode()
            lines = []
    yield "".join((*lines, "[]\n" if before == "[" else "\n]\n")).encode()


def table_slices(rows: Iterable[Row], empty: str = "no endpoints") -> Iterator[bytes]:
    """A plain table; the columns are the keys of all rows in the order of their first appearance."""
    widths: dict[str, int] = {}
    cells: list[dict[str, str]] = []
    for row in rows:
        texts = {name: _cell(value) for name, value in row.items()}
        for name, text in texts.items():
            widths[name] = max(widths.get(name, len(name)), len(text))
        cells.append(texts)
        if len(cells) % ROWS_PER_SLICE == 0:
            yield b""  # a pause
    head = "  ".join(f"{name.upper():<{width}}" for name, width in widths.items()).rstrip()
    yield f"{head or empty}\n".encode()
    for start in range(0, len(cells), ROWS_PER_SLICE):
        yield "".join(
            "  ".join(f"{texts.get(name, '-'):<{width}}" for name, width in widths.items()).rstrip() + "\n"
            for texts in cells[start : start + ROWS_PER_SLICE]
        ).encode()


def _cell(value: object) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, Mapping):
        return ",".join(f"{name}={item}" for name, item in value.items()) or "-"
    if isinstance(value, list):
        return str(value[0]) if value else "-"
    if isinstance(value, float):
        return f"{value:.3f}"
    return str(value)
