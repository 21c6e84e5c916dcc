"""How the demo is shown: a story that scrolls with a live table below it, or plain lines.

Must not know processes. Invariant: nothing here waits; a table fits its terminal, be it ever so narrow, by leaving
columns out.
"""

import shutil
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .figures import Row, Sample, rows
from .mesh import VERSIONS, WAYS
from .story import Result

COLUMNS = (  # heading, narrowest width, and how late it is left out
    ("source", 9, 9),
    ("service", 7, 9),
    ("version", 7, 9),
    ("effective", 9, 9),
    ("actual", 6, 8),
    ("rate", 5, 4),
    ("p50", 5, 2),
    ("p99", 5, 3),
    ("retries", 7, 6),
    ("breaker", 9, 5),
)
WIDTHS = {name: width for name, width, _ in COLUMNS}
GOOD, FAIR = 0.995, 0.95


def fitting(width: int) -> list[str]:
    """The columns that fit."""
    kept = list(COLUMNS)
    while len(kept) > 4 and sum(column[1] + 1 for column in kept) - 1 > width:
        kept.remove(min(kept, key=lambda column: column[2]))
    return [column[0] for column in kept]


def _percent(value: float | None) -> str:
    if value is None:
        return "-"
    return "100%" if value >= 0.9995 else f"{value * 100:.1f}%"


def _style(value: float | None) -> str:
    if value is None:
        return "dim"
    return "green" if value >= GOOD else "yellow" if value >= FAIR else "bold red"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.0f}ms" if seconds < 1 else f"{seconds:.1f}s"


def _cell(row: Row, column: str) -> Text:
    match column:
        case "source":
            return Text("" if row.version not in ("", "all") else row.source)
        case "service":
            return Text("" if row.version not in ("", "all") else row.service, "bold")
        case "version":
            return Text(row.version)
        case "effective":
            text = "denied" if row.denied and row.effective == 0 else _percent(row.effective)
            return Text(text, _style(row.effective))
        case "actual":
            return Text(_percent(row.actual), _style(row.actual))
        case "rate":
            return Text(f"{row.rate:.0f}/s" if row.rate >= 9.5 or not row.rate else f"{row.rate:.1f}/s")
        case "p50":
            return Text(_duration(row.p50_s))
        case "p99":
            return Text(_duration(row.p99_s))
        case "retries":
            return Text("-" if not row.retries else f"{row.retries:.1f}/s", "cyan" if row.retries else "dim")
        case _:
            return Text(row.breaker or "-", "bold red" if row.breaker not in ("", "closed") else "")


def table(lines: Sequence[Row], width: int) -> Table:
    shown = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold underline")
    columns = fitting(width)
    for name in columns:
        left = name in ("source", "service", "version", "breaker")
        shown.add_column(name, justify="left" if left else "right", min_width=WIDTHS[name], no_wrap=True)
    for row in lines:
        shown.add_row(*(_cell(row, name) for name in columns))
    return shown


class Screen:
    """A Teller on a console. `live`: keep the table below the story up to date."""

    def __init__(self, console: Console, *, live: bool) -> None:
        self.console = console
        self._rows: Sequence[Row] = ()
        self._status = ""
        self._live = (
            Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False) if live else None
        )

    def __enter__(self) -> "Screen":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    # -- the table

    def status(self, text: str) -> None:
        """The line above the table."""
        self._status = text
        if self._live is None:
            self._print(Text(text, "dim"))
        else:
            self._refresh()

    def figures(self, window: Sample) -> None:
        """What happened in the last few seconds."""
        self._rows = rows(window, WAYS, VERSIONS)
        self._refresh()

    def _refresh(self) -> None:
        if self._live is not None:
            # Rich asks for the size by itself only where it draws.
            self._live.update(self._below(), refresh=True)

    def _below(self) -> RenderableType:
        width = self.console.width
        head = Text(self._status, "dim", no_wrap=True, overflow="ellipsis")
        return Group(Text("─" * min(width, 79), "dim"), head, table(self._rows, width)) if self._rows else head

    # -- the story

    def _print(self, *parts: RenderableType) -> None:
        for part in parts:
            self.console.print(part, soft_wrap=not self.console.is_terminal)

    def say(self, text: str, style: str = "") -> None:
        self._print(Text(text, style))

    def step(self, number: int, of: int, title: str, text: str) -> None:
        self._print(Text(""), Text(f"{number}/{of}  {title}", "bold cyan"), Text(text))
        self._status = f"step {number} of {of}: {title}"
        self._refresh()

    def changed(self, path: str, lines: list[str]) -> None:
        self._print(Text(f"  {path}", "dim"))
        for line in lines:
            self._print(Text(f"  {line}", "green" if line.startswith("+") else "red"))

    def command(self, text: str) -> None:
        self._print(Text("$ ", "dim").append(text, "bold not dim"))

    def output(self, lines: list[str]) -> None:
        """What a command said; on a terminal no line takes two."""
        for line in lines:
            text = Text(f"  {line}", "dim")
            if self.console.is_terminal:
                self.console.print(text, no_wrap=True, overflow="ellipsis")
            else:
                self.console.print(text, soft_wrap=True)

    def look(self, text: str) -> None:
        self._print(Text("look: ", "bold").append(text, "not bold"))

    def result(self, result: Result) -> None:
        for said in result.said:
            self._print(Text(("✓ " if result.holds else "  ") + said, "green" if result.holds else ""))
        for problem in result.problems:
            self._print(Text(f"✗ {problem}", "bold red"))
        if self._live is None and result.window is not None:
            self._print(table(rows(result.window, WAYS, VERSIONS), self.console.width))


def terminal_is_usable(console: Console) -> bool:
    """Whether there is a terminal on which a table can be kept up to date."""
    size = shutil.get_terminal_size()
    return console.is_terminal and not console.is_dumb_terminal and size.lines >= 16 and size.columns >= 40
