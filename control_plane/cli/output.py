"""How the command line shows data: aligned tables, JSON, YAML, colours, spans of time, differences of texts.

Must not know what the data mean. Invariants: texts from elsewhere cannot steer the terminal; colours only on a terminal
that wants them (NO_COLOR, TERM=dumb); what is aligned is aligned without its colours.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TextIO, TypeVar

import click

from sidecar.model.problems import one_line

GOOD, BAD, DOUBTFUL, FAINT, STRONG = "32", "31", "33", "2", "1"
FORMATS = ("table", "wide", "json", "yaml", "name")

Cell = str | tuple[str, str]  # a text, or a text and its style
Command = TypeVar("Command", bound=Callable[..., Any])


def output_option(*formats: str) -> Callable[[Command], Command]:
    return click.option(
        "-o", "--output", type=click.Choice(formats), default=formats[0], show_default=True, help="How to show it."
    )


def colors(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, style: str, wanted: bool) -> str:
    return f"\x1b[{style}m{text}\x1b[0m" if wanted and style and text else text


def table(rows: Iterable[Sequence[Cell]], head: Sequence[str] = (), color: bool = False) -> str:
    """Columns aligned with spaces; the last one is not padded."""
    split = [[_split(cell) for cell in row] for row in ([tuple(head)] if head else [])]
    split += [[_split(cell) for cell in row] for row in rows]
    if not split:
        return ""
    widths = [max(len(row[column][0]) for row in split) for column in range(len(split[0]))]
    return "\n".join(table_line(row, widths, color) for row in split)


def table_line(row: Sequence[Cell], widths: Sequence[int], color: bool = False) -> str:
    cells = [_split(cell) for cell in row]
    while len(cells) > 1 and not cells[-1][0]:
        cells.pop()
    padded = [
        paint(text, style, color) + " " * (0 if number == len(cells) else max(0, width - len(text)))
        for number, ((text, style), width) in enumerate(zip(cells, widths, strict=False), 1)
    ]
    return "  ".join(padded)


def _split(cell: Cell) -> tuple[str, str]:
    text, style = (cell, "") if isinstance(cell, str) else cell
    return one_line(text), style


def indented(text: str, by: str = "  ") -> str:
    return "\n".join(by + line if line else line for line in text.split("\n"))


def echo_json(data: object) -> None:
    click.echo(json.dumps(data, indent=2))


def echo_yaml(data: object) -> None:
    import yaml

    click.echo(yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120), nl=False)


def echo_data(data: object, output: str) -> None:
    """As `-o json` and `-o yaml` have it."""
    if output == "yaml":
        echo_yaml(json.loads(json.dumps(data)))  # what is shared would be written as aliases
    else:
        echo_json(data)


def note(text: str) -> None:
    """For people: to stderr."""
    click.echo(text, err=True)


def span(seconds: float) -> str:
    """A length of time in its two largest units: 3d 4h, 12m, 40s."""
    rest = max(0, int(seconds))
    parts: list[str] = []
    for unit, name in ((86400, "d"), (3600, "h"), (60, "m"), (1, "s")):
        count, rest = divmod(rest, unit)
        if count or parts:
            parts.append(f"{count}{name}" if count else "")
        if len(parts) == 2:
            break
    return " ".join(part for part in parts if part) or "0s"


def ago(when: float, now: float) -> str:
    return f"{span(now - when)} ago" if when <= now else f"in {span(when - now)}"


def expiry(not_after: float | None, now: float) -> Cell:
    """When something ends, and whether that is soon."""
    if not_after is None:
        return "-"
    left = not_after - now
    if left <= 0:
        return f"expired {span(-left)} ago", BAD
    return f"in {span(left)}"


def moment(when: float) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def plural(count: int, word: str, words: str = "") -> str:
    return f"{count} {word if count == 1 else words or word + 's'}"


def labels_text(labels: Mapping[str, str] | None) -> str:
    return ",".join(f"{key}={value}" for key, value in (labels or {}).items()) or "-"


def text_diff(before: str | None, after: str | None, old: str, new: str, color: bool = False) -> str:
    """A unified difference of two texts; None: not there."""
    import difflib

    lines = difflib.unified_diff(
        (before or "").splitlines(),
        (after or "").splitlines(),
        "(nothing)" if before is None else one_line(old),
        "(nothing)" if after is None else one_line(new),
        lineterm="",
    )
    styles = {"+": GOOD, "-": BAD, "@": "36"}
    shown = []
    for number, line in enumerate(lines):
        style = STRONG if number < 2 else styles.get(line[:1], "")
        shown.append(paint(one_line(line), style, color and bool(style)))
    return "\n".join(shown)


def marks() -> tuple[str, str]:
    """Yes and no, in what stdout can write."""
    try:
        "✓✗".encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return "ok", "FAILED"
    return "✓", "✗"
