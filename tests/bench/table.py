"""Rows of results, and their forms: Markdown, terminal, JSON.

Must not know how anything is measured. Invariants: every row shows its spread; a row in which a request failed says
so wherever it is shown; the verdict against the bar comes from the median.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .stats import Summary, Value, better_of, paired_ratios, summarize

OURS = "pillion"
OURS_COMPILED = "pillion, compiled"  # the same sources, with the data path compiled
OWN = (OURS, OURS_COMPILED)
TO = "\N{EN DASH}"  # between the ends of a spread
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"


@dataclass(frozen=True, slots=True)
class Bar:
    """What pillion must reach: a ratio to the better of some rivals, or, without rivals, a value of its own."""

    limit: float
    rivals: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        if not self.rivals:
            return ""
        return " of the better" if len(self.rivals) > 1 else f" of {self.rivals[0]}"


@dataclass(slots=True)
class Row:
    """One measurement: for each contender a value a round, and how many requests failed."""

    key: str
    title: str
    unit: str
    digits: int = 1
    lower_is_better: bool = True
    bars: tuple[Bar, ...] = ()
    rivals: tuple[str, ...] = ()  # to which ratios are shown
    series: dict[str, list[Value]] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)

    def add(self, contender: str, value: Value, errors: int = 0) -> None:
        self.series.setdefault(contender, []).append(value)
        self.failed(contender, errors)

    def failed(self, contender: str, errors: int) -> None:
        if errors:
            self.errors[contender] = self.errors.get(contender, 0) + errors

    @property
    def compiled(self) -> bool:
        """Whether the compiled build was measured too."""
        return OURS_COMPILED in self.series

    def ratio(self, rival: str, own: str = OURS) -> Summary | None:
        """pillion, or its compiled build, over a rival, paired by round."""
        return summarize(paired_ratios(self.series.get(own, ()), self.series.get(rival, ())))

    def judged_by(self, bar: Bar, own: str = OURS) -> Summary | None:
        """What is held against a bar."""
        if not bar.rivals:
            return summarize(self.series.get(own, ()))
        rival = better_of(self.series, bar.rivals, lower=self.lower_is_better)
        return None if rival is None else self.ratio(rival, own)

    def reached(self, bar: Bar, own: str = OURS) -> bool | None:
        """Whether a bar is reached; None where there is nothing to judge by."""
        value = self.judged_by(bar, own)
        if value is None:
            return None
        return value.median <= bar.limit if self.lower_is_better else value.median >= bar.limit


@dataclass(slots=True)
class Group:
    """Rows that are shown as one table."""

    title: str
    rows: list[Row]
    note: str = ""

    @property
    def contenders(self) -> list[str]:
        found: dict[str, None] = {}
        for row in self.rows:
            found.update(dict.fromkeys([*row.series, *row.errors]))
        return sorted(found, key=lambda name: OWN.index(name) if name in OWN else len(OWN))


# -- cells


def number(value: float, digits: int) -> str:
    text = f"{value:,.{digits}f}".replace(",", "\N{NO-BREAK SPACE}")
    return text.lstrip("-") if not text.strip("-0.") else text


def cell(values: Sequence[Value], digits: int, errors: int = 0) -> str:
    mark = f" ({errors} errors!)" if errors else ""
    found = summarize(values)
    if found is None:
        return f"failed{mark}" if errors else ""
    spread = f" ({number(found.low, digits)}{TO}{number(found.high, digits)})" if found.rounds > 1 else ""
    return f"{number(found.median, digits)}{spread}{mark}"


def ratio_cell(row: Row, rival: str, own: str = OURS) -> str:
    if rival not in row.rivals:
        return ""
    return cell(paired_ratios(row.series.get(own, ()), row.series.get(rival, ())), 2)


def bar_words(row: Row, bar: Bar) -> str:
    return f"{'≤' if row.lower_is_better else '≥'} {bar.limit:g}{bar.words}"


def bar_cell(row: Row) -> str:
    return "; ".join(
        f"{bar_words(row, bar)}{_verdict(row, bar)}"
        + (f", compiled{_verdict(row, bar, OURS_COMPILED)}" if row.reached(bar, OURS_COMPILED) is not None else "")
        for bar in row.bars
    )


def _verdict(row: Row, bar: Bar, own: str = OURS) -> str:
    """Met or missed, with the ratio where the bar is one."""
    met = row.reached(bar, own)
    if met is None:
        return ""
    seen = row.judged_by(bar, own)
    return f": {'met' if met else '**missed**'}{f' ({seen.median:.2f})' if bar.rivals and seen else ''}"


def columns(group: Group) -> tuple[list[str], list[list[str]]]:
    """The header and the cells of a group's table; columns in which nothing stands are left out."""
    contenders = group.contenders
    rivals = list(dict.fromkeys(rival for row in group.rows for rival in row.rivals))
    header = [
        *("", *contenders, *(f"÷ {rival}" for rival in rivals)),
        *(*(f"compiled ÷ {rival}" for rival in rivals), "bar"),
    ]
    lines = [
        [
            f"{row.title}, {row.unit}" if row.unit else row.title,
            *(cell(row.series.get(name, ()), row.digits, row.errors.get(name, 0)) for name in contenders),
            *(ratio_cell(row, rival) for rival in rivals),
            *(ratio_cell(row, rival, OURS_COMPILED) for rival in rivals),
            bar_cell(row),
        ]
        for row in group.rows
    ]
    keep = [index for index in range(len(header)) if index == 0 or any(line[index] for line in lines)]
    return [header[index] for index in keep], [[line[index] for index in keep] for line in lines]


# -- whole reports


def markdown(groups: Iterable[Group], about: Sequence[str]) -> str:
    parts = ["\n".join(f"- {line}" for line in about)]
    for group in groups:
        header, lines = columns(group)
        table = [header, ["---", *("---:" for _ in header[1:])], *lines]
        parts.append(f"### {group.title}")
        if group.note:
            parts.append(group.note)
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in table))
    return "\n\n".join(parts) + "\n"


def terminal(groups: Iterable[Group], about: Sequence[str]) -> str:
    parts = ["\n".join(about)]
    for group in groups:
        header, lines = columns(group)
        cells = [header, *([text.replace("**", "") for text in line] for line in lines)]
        widths = [max(len(line[index]) for line in cells) for index in range(len(header))]
        table = [
            "  ".join(
                text.ljust(width) if index in (0, len(widths) - 1) else text.rjust(width)
                for index, (text, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in cells
        ]
        table.insert(1, "─" * max(len(line) for line in table))
        parts.append("\n".join([group.title, *table]))
    parts.append(verdict(groups))
    return "\n\n".join(parts) + "\n"


def verdict(groups: Iterable[Group]) -> str:
    """Row by row, whether the bar is met, and where something failed, in words."""
    rows = [row for group in groups for row in group.rows]
    lines = []
    for own in OWN if any(row.compiled for row in rows) else (OURS,):
        judged = [(row, bar) for row in rows for bar in row.bars if row.reached(bar, own) is not None]
        met = sum(row.reached(bar, own) is True for row, bar in judged)
        lines.append(f"{'' if own == OURS else f'{own}: '}{met} of {len(judged)} bars met.")
        lines += [
            f"  {'met   ' if row.reached(bar, own) else 'MISSED'}  {row.key}: {row.title}: {_seen(row, bar, own)}"
            for row, bar in judged
        ]
    failed = [(row, name, count) for row in rows for name, count in row.errors.items()]
    if failed:
        lines.append("Not to be trusted, because requests failed:")
        lines += [f"  {row.key}: {row.title}: {count} through {name}" for row, name, count in failed]
    return "\n".join(lines)


def _seen(row: Row, bar: Bar, own: str) -> str:
    found = row.judged_by(bar, own)
    assert found is not None
    if bar.rivals:
        return f"{found.median:.2f}, the bar is {bar_words(row, bar)}"
    unit = f" {row.unit}" if row.unit else ""
    return f"{number(found.median, row.digits)}{unit}, the bar is {bar_words(row, bar)}{unit}"


def as_json(groups: Iterable[Group], facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "facts": facts,
        "groups": [
            {"title": group.title, "note": group.note, "rows": [_row_as_json(row) for row in group.rows]}
            for group in groups
        ],
    }


def _row_as_json(row: Row) -> dict[str, Any]:
    return {
        "key": row.key,
        "title": row.title,
        "unit": row.unit,
        "digits": row.digits,
        "lower_is_better": row.lower_is_better,
        "rivals": row.rivals,
        "errors": row.errors,
        "rounds": row.series,
        "summary": {name: found for name, values in row.series.items() if (found := _plain(summarize(values)))},
        "ratios": {rival: found for rival in row.rivals if (found := _plain(row.ratio(rival)))},
        "bars": [
            {**asdict(bar), "reached": row.reached(bar)}
            | ({"reached_compiled": row.reached(bar, OURS_COMPILED)} if row.compiled else {})
            for bar in row.bars
        ],
    }


def _plain(found: Summary | None) -> dict[str, float] | None:
    return asdict(found) if found else None


def from_json(data: dict[str, Any]) -> list[Group]:
    """The groups that `as_json` wrote."""
    return [
        Group(each["title"], [_row_from_json(row) for row in each["rows"]], each["note"]) for each in data["groups"]
    ]


def _row_from_json(data: dict[str, Any]) -> Row:
    return Row(
        **{name: data[name] for name in ("key", "title", "unit", "digits", "lower_is_better", "errors")},
        bars=tuple(Bar(bar["limit"], tuple(bar["rivals"])) for bar in data["bars"]),
        rivals=tuple(data["rivals"]),
        series=data["rounds"],
    )


def replace_between_marks(page: str, text: str) -> str:
    """A page with the text between its two marks replaced. Raises ValueError where a mark is not there once."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"the page must hold the lines {BEGIN} and {END} once each, in this order")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{text.strip()}\n\n{END}{rest.split(END)[1]}"
