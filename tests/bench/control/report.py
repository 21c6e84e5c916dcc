"""The figures as tables: Markdown, terminal, JSON; and where they fall short of what was promised.

Must not know how anything is measured. Invariants: a figure that is missing shows as missing; a row in which something
went wrong says so wherever it is shown; bars are held against the largest mesh only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..table import number

BEGIN, END = "<!-- bench-control: begin -->", "<!-- bench-control: end -->"


@dataclass(frozen=True, slots=True)
class Row:
    key: str
    title: str
    unit: str
    digits: int = 0
    limit: float | None = None  # of the largest mesh; in the row's unit
    errors: str = ""  # the key under which errors stand; the row's own, else

    @property
    def blamed(self) -> str:
        return self.errors or self.key


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    rows: tuple[Row, ...]
    note: str = ""


def _latency(key: str, title: str, limit: float | None = None) -> tuple[Row, Row]:
    return (
        Row(f"{key}.p50", f"{title}: p50", "ms", errors=key),
        Row(f"{key}.p99", f"{title}: p99", "ms", limit=limit, errors=key),
    )


def _accounts(key: str, title: str, unit: str = "s", digits: int = 2) -> tuple[Row, Row, Row]:
    return (
        Row(f"{key}.cpu", f"{title}: control plane", unit, digits),
        Row(f"{key}.store-cpu", f"{title}: etcd", unit, digits),
        Row(f"{key}.swarm-cpu", f"{title}: the swarm itself", unit, digits),
    )


TABLES = (
    Table(
        "From a change to the last answer",
        (
            *_latency("change", "an endpoint, any change", 1000),
            *_latency("change.withdraw", "… withdrawn"),
            *_latency("change.register", "… registered"),
            *_latency("change.unhealthy", "… turns unhealthy"),
            *_latency("change.healthy", "… turns healthy"),
            *_latency("apply", "policy of one service", 1000),
            *_latency("apply-all", "defaults: the policy of every service", 1000),
            Row("changes.cpu-each", "CPU of an endpoint's change", "ms", 1),
            Row("apply.cpu-each", "CPU of one service's policy", "ms", 1),
            *_accounts("apply-all", "CPU of defaults"),
            Row("apply-all.bytes", "defaults: bytes sent in all", "MB", 1),
        ),
        "From when the request leaves (a registration, a heartbeat that says unhealthy, an apply) until the answer of "
        "the last sidecar concerned has been taken. Changes are gathered for 100 ms before they are sent; removals and "
        "endpoints that turn unhealthy are not.",
    ),
    Table(
        "Bytes of one endpoint that flaps",
        tuple(
            row
            for name, title in (
                ("ordinary", "of an ordinary service"),
                ("tenth", "that a tenth use"),
                ("all", "that all use"),
            )
            for row in (
                Row(f"flap.{name}.users", f"{title}: sidecars that use it", ""),
                Row(f"flap.{name}.told", f"{title}: sidecars told, a flap", "", 1),
                Row(f"flap.{name}.bytes", f"{title}: sent in all, a flap", "KB", 1),
                Row(f"flap.{name}.each", f"{title}: sent to each", "bytes"),
                Row(f"flap.{name}.p99", f"{title}: until the last answer, p99", "ms", errors=f"flap.{name}"),
            )
        ),
        "Lines of the stream, before TLS.",
    ),
    Table(
        "Memory, and CPU when nothing changes",
        (
            Row("memory", "resident, all connected and registered", "MB", 0, 300),
            Row("memory.after-reconnect", "… after all have reconnected", "MB"),
            Row("memory.peak", "… at its peak, in a control plane that all came back to", "MB"),
            *_accounts("idle", "CPU, % of one core", "%", 1),
            Row("idle.heartbeats", "heartbeats", "/s"),
        ),
    ),
    Table(
        "Everyone at once",
        (
            Row("found.apply", "first apply of the whole policy", "s", 2),
            Row("tokens.rate", "tokens made, one after another", "/s"),
            Row("join.rate", "joins", "/s"),
            *_latency("join", "a join, with all others at the same time"),
            Row("join.cpu-each", "CPU of a join", "ms", 1),
            Row("connect", "first connection of all: until all hold everything", "s", 2),
            *_accounts("connect", "CPU of that"),
            Row("connect.bytes", "sent to each then", "KB", 1),
            Row("register", "registration of all: until all know of all", "s", 2),
            *_accounts("register", "CPU of that"),
            Row("rollout.withdraw", "a tenth withdraw at once: until the last is acknowledged", "s", 2),
            Row("rollout.register", "they come back at once: until all know", "s", 2),
            Row("reconnect", "all connections lost: until all are in sync", "s", 2),
            *_accounts("reconnect", "CPU of that"),
            Row("restart.ready", "control plane killed and started: until it is ready", "s", 2),
            Row("restart", "… until all are in sync", "s", 2),
            Row("restart.cpu", "… CPU of the control plane", "s", 2),
        ),
    ),
)


@dataclass(frozen=True, slots=True)
class Column:
    """One run: a store and a size."""

    store: str
    sidecars: int
    figures: Mapping[str, float]
    errors: Mapping[str, Sequence[str]]
    notes: Sequence[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"{self.store}, {number(self.sidecars, 0)}"


def markdown(columns: Sequence[Column], about: Sequence[str]) -> str:
    parts = ["\n".join(f"- {line}" for line in about)]
    for table in TABLES:
        lines = _lines(table, columns)
        if not lines:
            continue
        parts.append(f"### {table.title}")
        if table.note:
            parts.append(table.note)
        rule = ["---", *("---:" for _ in lines[0][1:])]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:])))
    return "\n\n".join(parts) + "\n"


def terminal(columns: Sequence[Column], about: Sequence[str]) -> str:
    parts = ["\n".join(about)]
    for table in TABLES:
        lines = _lines(table, columns)
        if lines:
            widths = [max(len(line[index]) for line in lines) for index in range(len(lines[0]))]
            text = [
                "  ".join(
                    cell.rjust(width) if index else cell.ljust(width)
                    for index, (cell, width) in enumerate(zip(line, widths, strict=True))
                ).rstrip()
                for line in lines
            ]
            parts.append("\n".join([table.title, *text]))
    return "\n\n".join([*parts, verdict(columns)]) + "\n"


def _lines(table: Table, columns: Sequence[Column]) -> list[list[str]]:
    largest = max(column.sidecars for column in columns)
    lines = []
    for row in table.rows:
        cells = [_cell(row, column) for column in columns]
        if any(cells):
            bar = ""
            if row.limit is not None:
                found = [c.figures.get(row.key) for c in columns if c.sidecars == largest]
                known = [value for value in found if value is not None]
                verdict = "**missed**" if any(value > row.limit for value in known) else "reached"
                bar = f"≤ {number(row.limit, 0)}: {verdict if len(known) == len(found) else 'not measured'}"
            lines.append([f"{row.title}, {row.unit}" if row.unit else row.title, *cells, bar])
    if not lines:
        return []
    lines.insert(0, ["", *(column.title for column in columns), "bar"])
    return lines if any(line[-1] for line in lines[1:]) else [line[:-1] for line in lines]


def _cell(row: Row, column: Column) -> str:
    value = column.figures.get(row.key)
    if value is None or (row.key.endswith("store-cpu") and column.store == "embedded"):
        return "failed" if row.blamed in column.errors else ""
    mark = " (!)" if row.blamed in column.errors else ""
    return f"{number(value, row.digits)}{mark}"


def verdict(columns: Sequence[Column]) -> str:
    largest = max(column.sidecars for column in columns)
    lines = []
    for column in columns:
        for row in (row for table in TABLES for row in table.rows):
            value = column.figures.get(row.key)
            if column.sidecars == largest and row.limit is not None and (value is None or value > row.limit):
                value_text = "not measured" if value is None else f"{number(value, row.digits)} {row.unit}"
                lines.append(f"  {column.title}: {row.title}: {value_text}, the bar is {number(row.limit, 0)}")
    parts = ["Falls short:", *lines] if lines else ["All bars reached."]
    wrong = [
        f"  {column.title}: {key}: {text}"
        for column in columns
        for key, texts in column.errors.items()
        for text in texts
    ]
    wrong += [f"  {column.title}: {text}" for column in columns for text in column.notes]
    return "\n".join([*parts, *(["Went wrong:", *wrong] if wrong else [])])


def as_json(columns: Sequence[Column], facts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "facts": dict(facts),
        "columns": [
            {
                "store": column.store,
                "sidecars": column.sidecars,
                "figures": dict(column.figures),
                "errors": dict(column.errors),
                "notes": list(column.notes),
            }
            for column in columns
        ],
    }


def from_json(data: Mapping[str, Any]) -> list[Column]:
    return [Column(**each) for each in data["columns"]]


def replace_between_marks(page: str, text: str) -> str:
    """A page with the text between its two marks replaced. Raises ValueError where a mark is not there once."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"the page must hold the lines {BEGIN} and {END} once each, in this order")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{text.strip()}\n\n{END}{rest.split(END)[1]}"
