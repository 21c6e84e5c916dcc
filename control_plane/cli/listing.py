"""Lists of things that a control plane knows, as every listing verb shows them: -o and --watch.

A Listing says what to ask and which columns to show; all else is the same for each. Must not know a particular one.
Invariants: stdout holds the list and nothing else; an empty list is said on stderr; --watch goes on through an
interruption and ends with Ctrl-C only.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from sidecar.model.problems import suggest

from . import EXIT_FAILED
from .output import BAD, FAINT, GOOD, Cell, colors, echo_data, note, table, table_line

if TYPE_CHECKING:
    from .remote import Remote

Item = Mapping[str, Any]
WATCH_INTERVAL_S = 1.0


@dataclass(frozen=True, slots=True)
class Column:
    """`cell` is given an item and the time; `wide`: shown with `-o wide` only."""

    head: str
    cell: Callable[[Item, float], Cell]
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Listing:
    """`key`: under which the answer of `path` holds the list. `empty`: what to say of an empty one."""

    path: str
    key: str
    word: str
    name: Callable[[Item], str]
    columns: tuple[Column, ...]
    empty: str


def text(key: str, usual: str = "-") -> Callable[[Item, float], Cell]:
    """The cell of one value as it is."""

    def cell(item: Item, now: float) -> Cell:
        value = item.get(key)
        if isinstance(value, list):
            return ",".join(str(each) for each in value) or usual
        return usual if value is None or value == "" else str(value)

    return cell


def show(
    remote: "Remote",
    listing: Listing,
    output: str,
    names: Sequence[str] = (),
    watch: bool = False,
    **query: str | int | None,
) -> int:
    """Print the list; where names are given, these only, and 1 where one of them is unknown."""
    with remote:
        if watch:
            _follow(remote, listing, output, names, query)
        data = remote.get(listing.path, query)
    items = _items(data, listing)
    known = [listing.name(item) for item in items]
    for name in names:
        if name not in known:
            help = suggest(name, known) or (f"known: {', '.join(known[:20])}" if known else "there is none")
            note(f"Error: unknown {listing.word} {name!r}; {help}")
    missing = any(name not in known for name in names)
    if names:
        items = [item for item in items if listing.name(item) in names]
    if output in ("json", "yaml"):
        echo_data({**data, listing.key: items}, output)
    elif output == "name":
        for item in items:
            click.echo(listing.name(item))
    elif items:
        columns = _columns(listing, output)
        now = time.time()
        rows = [[column.cell(item, now) for column in columns] for item in items]
        click.echo(table(rows, [column.head for column in columns], colors(sys.stdout)), color=True)
    elif not names:
        note(listing.empty)
    return EXIT_FAILED if missing else 0


def _items(data: Mapping[str, Any], listing: Listing) -> list[Item]:
    found = data.get(listing.key)
    if not isinstance(found, list):
        raise click.ClickException(
            f"the control plane's answer to {listing.path} is not understood; is its version the same as this one's?"
        )
    return found


def _columns(listing: Listing, output: str) -> list[Column]:
    return [column for column in listing.columns if output == "wide" or not column.wide]


def _follow(
    remote: "Remote", listing: Listing, output: str, names: Sequence[str], query: Mapping[str, str | int | None]
) -> None:
    """Print the list, then whatever is new, changes or goes; for ever."""
    from .remote import Unavailable, Unreachable

    shown: dict[str, Item] = {}
    printer = _Printer(listing, output)
    down = False
    while True:
        try:
            data = remote.get(listing.path, query)
        except (Unreachable, Unavailable) as error:
            if not printer.begun:
                raise
            if not down:
                note(f"{error.format_message().splitlines()[0].rstrip('.')}; trying on (Ctrl-C ends)")
            down = True
            time.sleep(WATCH_INTERVAL_S)
            continue
        if down:
            note(f"the control plane answers again at {remote.address}")
            down = False
        items = {listing.name(item): item for item in _items(data, listing)}
        if names:
            items = {name: item for name, item in items.items() if name in names}
        changes = [
            ("new" if name not in shown else "changed", item) for name, item in items.items() if shown.get(name) != item
        ]
        changes += [("gone", item) for name, item in shown.items() if name not in items]
        printer.print(changes)
        shown = items
        sys.stdout.flush()
        time.sleep(WATCH_INTERVAL_S)


class _Printer:
    """Changes as lines; what stands there at first is printed as the list is."""

    marks = {"": (" ", ""), "new": ("+", GOOD), "changed": ("~", ""), "gone": ("-", BAD)}

    def __init__(self, listing: Listing, output: str) -> None:
        self.begun = False
        self._listing, self._output = listing, output
        self._columns = _columns(listing, output)
        self._widths = [1] + [len(column.head) for column in self._columns]
        self._shown: dict[str, list[Cell]] = {}

    def print(self, changes: Sequence[tuple[str, Item]]) -> None:
        first, self.begun = not self.begun, True
        if self._output in ("json", "yaml"):
            for change, item in changes:
                line = {"change": "present" if first else change, "item": item}
                if self._output == "json":
                    click.echo(json.dumps(line))
                else:
                    click.echo("---")
                    echo_data(line, "yaml")
        elif self._output == "name":
            for change, item in changes:
                click.echo(f"{self.marks['' if first else change][0]} {self._listing.name(item)}".strip())
        else:
            self._print_rows(changes, first)

    def _print_rows(self, changes: Sequence[tuple[str, Item]], first: bool) -> None:
        now = time.time()
        color = colors(sys.stdout)
        rows: list[list[Cell]] = []
        for change, item in changes:
            cells: list[Cell] = [column.cell(item, now) for column in self._columns]
            name = self._listing.name(item)
            if change == "changed" and self._shown.get(name) == cells:
                continue  # in something that is not among these columns
            self._shown[name] = cells
            if change == "gone":
                del self._shown[name]
                cells = [(cell if isinstance(cell, str) else cell[0], FAINT) for cell in cells]
            rows.append([self.marks["" if first else change], *cells])
        head: list[Cell] = ["", *(column.head for column in self._columns)]
        for row in rows:
            for number, cell in enumerate(row):
                width = len(cell if isinstance(cell, str) else cell[0])
                self._widths[number] = max(self._widths[number], width)
        for row in [head, *rows] if first else rows:
            click.echo(table_line(row, self._widths, color), color=True)
