"""The arithmetic of the benchmark, and the readers of what other programs print.

Pure: text and numbers in, numbers out; no processes, files or clocks. Invariants: a spread is always the smallest and
the greatest value seen; a ratio is taken within a round and only then summarized, so that a machine that slows down
between rounds does not move it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

Value = float | None  # of one round; None: it did not finish


@dataclass(frozen=True, slots=True)
class Summary:
    """What several rounds gave."""

    median: float
    low: float
    high: float
    rounds: int


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What the program that makes the load counted, from its start to its end."""

    requests: int
    bad_status: int
    socket_errors: int
    body_bytes: int | None = None  # of all responses, where it says so

    @property
    def errors(self) -> int:
        return self.bad_status + self.socket_errors


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident memory of a process, in bytes."""

    resident: int
    peak: int


class Unreadable(ValueError):
    """A program printed something that this harness does not understand; holds the text."""


def finished(values: Sequence[Value]) -> list[float]:
    return [value for value in values if value is not None]


def summarize(values: Sequence[Value]) -> Summary | None:
    """None where no round has finished."""
    done = finished(values)
    return Summary(median(done), min(done), max(done), len(done)) if done else None


def paired_ratios(ours: Sequence[Value], theirs: Sequence[Value]) -> list[float]:
    """The ratio in each round that both have finished."""
    pairs = zip(ours, theirs, strict=False)
    return [a / b for a, b in pairs if a is not None and b is not None and b > 0]


def better_of(series: Mapping[str, Sequence[Value]], names: Sequence[str], *, lower: bool) -> str | None:
    """The rival with the better median; None where none of them was measured."""
    measured = {name: median(done) for name in names if (done := finished(series.get(name, ())))}
    if not measured:
        return None
    return (min if lower else max)(measured, key=lambda name: measured[name])


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile: a value that was really seen."""
    if not values:
        raise ValueError("there is nothing to rank")
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)  # rounded up
    return ordered[max(0, min(len(ordered), int(rank)) - 1)]


# -- readers


def parse_wrk(text: str) -> LoadReport:
    """wrk's closing report. It leaves out the lines about errors where there were none."""
    total = re.search(r"^\s*(\d+) requests in ", text, re.MULTILINE)
    if total is None:
        raise Unreadable(f"wrk: no line with the number of requests in {text!r}")
    bad = re.search(r"Non-2xx or 3xx responses: (\d+)", text)
    sockets = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", text)
    return LoadReport(
        int(total[1]), int(bad[1]) if bad else 0, sum(int(count) for count in sockets.groups()) if sockets else 0
    )


def parse_h2load(text: str) -> LoadReport:
    """h2load's closing report. What was under way when the time was over is not among the requests that are done."""
    counts = re.search(r"^requests: .* (\d+) done, \d+ succeeded, (\d+) failed, ", text, re.MULTILINE)
    statuses = re.search(r"^status codes: \d+ 2xx, (\d+) 3xx, (\d+) 4xx, (\d+) 5xx", text, re.MULTILINE)
    data = re.search(r"^traffic: .* \((\d+)\) data$", text, re.MULTILINE)
    if counts is None or statuses is None or data is None:
        raise Unreadable(f"h2load: no lines with requests, status codes and traffic in {text!r}")
    bad = sum(int(count) for count in statuses.groups())
    return LoadReport(int(counts[1]), bad, max(0, int(counts[2]) - bad), int(data[1]))


def parse_proc_stat(text: str, ticks_per_second: int) -> tuple[float, float]:
    """User and system seconds of a process with all its threads, from /proc/PID/stat."""
    fields = text.rpartition(")")[2].split()  # the name before may hold spaces and parentheses
    if len(fields) < 13:
        raise Unreadable(f"/proc/PID/stat: {text!r}")
    return int(fields[11]) / ticks_per_second, int(fields[12]) / ticks_per_second


def parse_proc_status(text: str) -> Memory:
    """Resident memory now and at its peak, from /proc/PID/status."""
    found = {key: int(kib) * 1024 for key, kib in re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB", text, re.MULTILINE)}
    if len(found) != 2:
        raise Unreadable(f"/proc/PID/status: {text[:200]!r}")
    return Memory(found["VmRSS"], found["VmHWM"])


def parse_stub_status(text: str) -> int:
    """The number of requests that an nginx has served, the one that asks included."""
    found = re.search(r"^\s*\d+\s+\d+\s+(\d+)\s*$", text, re.MULTILINE)
    if found is None:
        raise Unreadable(f"stub_status: {text!r}")
    return int(found[1])


def lost_or_repeated(report: LoadReport, served: int, in_flight: int) -> int:
    """How many requests were answered without reaching the backend, or reached it more than once.

    The load is stopped in the middle of requests, so as many as are in flight may be counted by the backend only.
    """
    good = report.requests - report.bad_status
    return max(0, good - served, served - good - 2 * in_flight)
