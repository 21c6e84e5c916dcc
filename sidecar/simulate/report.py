"""A result as text for people and as JSON for programs.

Must not know how a result came about. Invariant: nothing in it depends on real time or on the machine.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from sidecar.policy.hedging import NO_BUDGET, NO_ENDPOINT, OVERFLOW

from .fields import AT_LEAST
from .objectives import Verdict
from .record import OUTLIERS, Change
from .results import Result
from .scenario import Outage, Scenario

BARS = "▁▂▃▄▅▆▇█"
NOTHING = "·"
NOT_SENT = (NO_BUDGET, NO_ENDPOINT, OVERFLOW)


def seconds(value_s: float) -> str:
    """A latency in its natural unit, to three digits."""
    if value_s >= 1.0:
        return f"{value_s:.2f}s"
    ms = value_s * 1000.0
    return f"{ms:.0f}ms" if ms >= 100 else f"{ms:.1f}ms"


def percent(value: float) -> str:
    """Never rounds to 100 % what is less."""
    text = f"{value * 100.0:.2f}%"
    return "99.99%" if text == "100.00%" and value < 1.0 else text


def sparkline(values: Sequence[float | None], top: float) -> str:
    """One character for each value, from 0 to `top`; the full one only for `top` itself, a dot for nothing."""
    return "".join(_bar(value, top) for value in values)


def _bar(value: float | None, top: float) -> str:
    if value is None:
        return " "
    if value <= 0.0 or top <= 0.0:
        return NOTHING
    return BARS[min(len(BARS) - 1, int(value / top * (len(BARS) - 1)))]


def table(rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """Aligned columns: the first `left` to the left, the others to the right."""
    every = [list(row) for row in rows]
    widths = [max(len(row[column]) for row in every) for column in range(len(every[0]))]
    lines = []
    for row in every:
        cells = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def text_of(scenario: Scenario, result: Result, verdicts: Sequence[Verdict], events_max: int) -> str:
    """One run."""
    blocks = [_edges(result), _outcomes(result), _over_time(scenario, result), _endpoints(result)]
    if result.changes and events_max:
        blocks.append(_events(result, events_max))
    if verdicts:
        blocks.append(_verdicts(verdicts))
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def _edges(result: Result) -> list[str]:
    head = ("CALLS", "REQUESTS", "EFFECTIVE", "ACTUAL", "P50", "P99", "ATTEMPTS", "RETRIES", "NO BUDGET", "OVERFLOW")
    rows = [
        (
            each.name,
            str(each.requests),
            percent(each.effective),
            percent(each.actual),
            seconds(each.p50_s),
            seconds(each.p99_s),
            str(each.attempts),
            str(each.retries),
            str(each.budget_refusals),
            str(each.overflows),
        )
        for each in result.edges
    ]
    lines = table([head, *rows])
    for each in result.edges:
        if each.shed:
            lines.append(f"shed of {each.name}: {each.shed} attempts, by the callee's sidecars")
        if each.hedges:
            lines.append(f"hedges of {each.name}: {', '.join(f'{word} {count}' for word, count in each.hedges)}")
    words = ", ".join(f"{name} {value:.2f}" for name, value in result.amplification.items())
    return [*lines, f"amplification: {words}"]


def _outcomes(result: Result) -> list[str]:
    lines = []
    for each in result.edges:
        outcomes = ", ".join(f"{reason} {count}" for reason, count in each.outcomes) or "nothing"
        statuses = ", ".join(f"{status}: {count}" for status, count in each.statuses)
        unfinished = f", unfinished {each.unfinished}" if each.unfinished else ""
        lines.append((each.name, f"{outcomes}{unfinished}" + (f"  ({statuses})" if statuses else "")))
    if result.unsent:
        lines.append(("never sent", f"{result.unsent}: no caller was up"))
    return table([("OUTCOMES", ""), *lines], left=2)


def _over_time(scenario: Scenario, result: Result) -> list[str]:
    series = result.series
    top_flight, top_attempts = max(series.in_flight, default=0), max(series.attempts, default=0)
    top_open = max(series.open_breakers, default=0.0)
    rows = [
        ("success", sparkline(series.success, 1.0), f"lowest {percent(min(_known(series.success), default=1.0))}"),
        ("in flight", sparkline(series.in_flight, top_flight), f"at most {top_flight}"),
        ("attempts", sparkline(series.attempts, top_attempts), f"at most {top_attempts / result.width_s:.0f}/s"),
        ("open breakers", sparkline(series.open_breakers, top_open), f"at most {top_open:.1f}"),
    ]
    if result.ejections:
        top_ejected = max(series.ejected, default=0.0)
        rows.append(("ejected", sparkline(series.ejected, top_ejected), f"at most {top_ejected:.1f}"))
    rows += [(f"outage {number}", _span(each, result), each.label) for number, each in enumerate(scenario.outages, 1)]
    head = (f"OVER TIME ({result.width_s:g}s each)", "", "")
    return table([head, *rows], left=3)


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _span(outage: Outage, result: Result) -> str:
    width_s = result.width_s
    return "".join(
        "█" if outage.at_s < (index + 1) * width_s and index * width_s < outage.ends_s else NOTHING
        for index in range(len(result.series.in_flight))
    )


def _endpoints(result: Result) -> list[str]:
    rows = [
        (each.name, sparkline(each.open_shares, 1.0), str(each.attempts), percent(each.actual), str(each.refusals),
         str(each.openings))
        for each in result.endpoints
    ]  # fmt: skip
    lines = table([("ENDPOINT", "BREAKERS NOT CLOSED", "ATTEMPTS", "ACTUAL", "FULL", "OPENED"), *rows], left=2)
    if result.ejections:
        ejected = [
            (each.name, sparkline(each.ejected_shares, 1.0), str(each.ejections))
            for each in result.endpoints
            if each.ejections
        ]
        lines += ["", *table([("ENDPOINT", "EJECTED", "TIMES"), *ejected], left=2)]
    return lines


def _events(result: Result, events_max: int) -> list[str]:
    shown = result.changes[:events_max]
    rows = [(f"{each.at_s:.3f}s", f"{each.caller} → {each.endpoint}", each.text) for each in shown]
    breakers = all(each.state not in (*OUTLIERS, "panic") for each in result.changes)
    lines = table([("BREAKERS" if breakers else "EVENTS", "", ""), *rows], left=3)
    more = len(result.changes) - len(shown)
    return [*lines, f"and {more} more"] if more else lines


def _verdicts(verdicts: Sequence[Verdict]) -> list[str]:
    rows = [("kept" if each.holds else "BROKEN", *_terms(each)) for each in verdicts]
    return table([("OBJECTIVES", "", "", ""), *rows], left=4)


def _terms(verdict: Verdict) -> tuple[str, str, str]:
    objective = verdict.objective
    show = _unit(objective.metric)
    sign = "≥" if objective.metric in AT_LEAST else "≤"
    where = f" of {objective.service}" if objective.service is not None else ""
    if objective.after_s or objective.before_s is not None:
        until = f" to {objective.before_s:g}s" if objective.before_s is not None else ""
        where += f" from {objective.after_s:g}s{until}"
    return f"{objective.metric}{where}", f"{sign} {show(objective.bound)}", f"is {show(verdict.value)}"


def _unit(metric: str) -> Any:
    if metric in AT_LEAST:
        return percent
    return seconds if metric in ("p50", "p99") else lambda value: f"{value:.4g}"


def comparison(results: Sequence[Result], verdicts: Sequence[Sequence[Verdict]]) -> str:
    """Two runs side by side."""
    first, second = results
    rows: list[Sequence[str]] = [("", first.policy, second.policy)]
    for one, other in zip(first.edges, second.edges, strict=True):
        both = (one, other)
        rows += [
            (f"{one.name}: requests", *(str(each.requests) for each in both)),
            ("  success effective", *(percent(each.effective) for each in both)),
            ("  success actual", *(percent(each.actual) for each in both)),
            ("  p50", *(seconds(each.p50_s) for each in both)),
            ("  p99", *(seconds(each.p99_s) for each in both)),
            ("  attempts", *(str(each.attempts) for each in both)),
            ("  retries", *(str(each.retries) for each in both)),
            ("  refused by the budget", *(str(each.budget_refusals) for each in both)),
            ("  overflows", *(str(each.overflows) for each in both)),
        ]
        if one.shed or other.shed:
            rows.append(("  shed by the callee", *(str(each.shed) for each in both)))
        if one.hedges or other.hedges:
            sent = [sum(count for word, count in each.hedges if word not in NOT_SENT) for each in both]
            rows.append(("  hedges", *map(str, sent)))
    for name in first.amplification:
        rows.append((f"amplification: {name}", *(f"{each.amplification[name]:.2f}" for each in results)))
    rows.append(("openings of breakers", *(str(each.openings) for each in results)))
    if any(each.ejections for each in results):
        rows.append(("ejections", *(str(each.ejections) for each in results)))
    lines = table(rows)
    if verdicts[0]:
        lines += ["", *_compared(results, verdicts)]
    return "\n".join(lines) + "\n"


def _compared(results: Sequence[Result], verdicts: Sequence[Sequence[Verdict]]) -> list[str]:
    rows = [("OBJECTIVES", "", *(each.policy for each in results))]
    for pair in zip(*verdicts, strict=True):
        name, bound, _ = _terms(pair[0])
        rows.append((name, bound, *(f"{_terms(each)[2]}, {'kept' if each.holds else 'BROKEN'}" for each in pair)))
    return table(rows, left=4)


# -- JSON


def json_of(
    scenario: Scenario, seed: int, results: Sequence[Result], verdicts: Sequence[Sequence[Verdict]]
) -> dict[str, Any]:
    return {
        "scenario": scenario.name,
        "seed": seed,
        "duration_s": scenario.duration_s,
        "kept": all(each.holds for run in verdicts for each in run),
        "runs": [_run(result, run) for result, run in zip(results, verdicts, strict=True)],
    }


def _run(result: Result, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    series = result.series
    return {
        "policy": result.policy,
        "requests": result.requests,
        "unsent": result.unsent,
        "amplification": {name: _round(value) for name, value in result.amplification.items()},
        "openings": result.openings,
        "ejections": result.ejections,
        "edges": [
            {
                "from": each.caller,
                "to": each.to,
                "load": each.root,
                "requests": each.requests,
                "attempts": each.attempts,
                "success_effective": _round(each.effective),
                "success_actual": _round(each.actual),
                "p50_s": _round(each.p50_s),
                "p99_s": _round(each.p99_s),
                "retries": each.retries,
                "resends": each.resends,
                "budget_refusals": each.budget_refusals,
                "overflows": each.overflows,
                "shed": each.shed,
                "hedges": dict(each.hedges),
                "unfinished": each.unfinished,
                "outcomes": dict(each.outcomes),
                "statuses": {str(status): count for status, count in each.statuses},
            }
            for each in result.edges
        ],
        "endpoints": [
            {
                "service": each.service,
                "name": each.name,
                "attempts": each.attempts,
                "success_actual": _round(each.actual),
                "full": each.refusals,
                "openings": each.openings,
                "open_shares": [_round(value) for value in each.open_shares],
                "ejections": each.ejections,
                "ejected_shares": [_round(value) for value in each.ejected_shares],
            }
            for each in result.endpoints
        ],
        "over_time": {
            "width_s": result.width_s,
            "success": [None if value is None else _round(value) for value in series.success],
            "in_flight": list(series.in_flight),
            "attempts": list(series.attempts),
            "open_breakers": [_round(value) for value in series.open_breakers],
            "ejected": [_round(value) for value in series.ejected],
            "p50_s": [None if value is None else _round(value) for value in series.p50_s],
            "p99_s": [None if value is None else _round(value) for value in series.p99_s],
            "requests": list(series.requests),
            "retries": list(series.retries),
            "endpoints": {name: list(values) for name, values in series.endpoints},
            "groups": {name: list(values) for name, values in series.groups},
        },
        "breakers": [_change(each) for each in result.changes if each.state not in (*OUTLIERS, "panic")],
        "outliers": [_change(each) for each in result.changes if each.state in OUTLIERS],
        "panic": [_change(each) for each in result.changes if each.state == "panic"],
        "objectives": [
            {
                "metric": each.objective.metric,
                "service": each.objective.service,
                "after_s": each.objective.after_s,
                "before_s": each.objective.before_s,
                "bound": each.objective.bound,
                "value": _round(each.value),
                "kept": each.holds,
            }
            for each in verdicts
        ],
    }


def _change(change: Change) -> dict[str, Any]:
    return {
        "at_s": _round(change.at_s),
        "caller": change.caller,
        "service": change.service,
        "endpoint": change.endpoint,
        "state": change.state,
        "text": change.text,
    }


def _round(value: float) -> float:
    return round(value, 6)
