"""What the sidecars count, as figures for people: who calls whom, how it goes, and how long it takes.

Pure: text and JSON of a sidecar's admin interface in, numbers out. Must not know how they are fetched.
Effective is what the calling application sees, one a request, from the caller's sidecar's request durations. Actual is
what the endpoints answered, one an attempt, from that same sidecar's endpoint counters.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

DURATION = "http_client_request_duration_seconds"
RETRIES = "pillion_retries_total"

_SAMPLE = re.compile(r"([a-z_]+)(?:\{(.*)\})? (\S+)$")
_LABEL = re.compile(r'([a-z_]+)="((?:[^"\\]|\\.)*)"')

Key = tuple[str, str, str]
"""Calling service, called service, version of the latter ("": none was chosen, or it has no versions)."""

BREAKERS = ("closed", "half-open", "open")  # from good to bad


@dataclass(slots=True)
class Counts:
    """What happened on one way. Numbers only grow; the difference of two Counts is what happened between them."""

    requests: float = 0
    good: float = 0  # answered below 400
    denied: float = 0
    attempts_good: float = 0
    attempts_bad: float = 0
    retries: float = 0
    buckets: dict[float, float] = field(default_factory=dict)  # requests that took at most so many seconds

    def __iadd__(self, other: "Counts") -> "Counts":
        self._combine(other, 1)
        return self

    def __sub__(self, other: "Counts") -> "Counts":
        result = Counts()
        result._combine(self, 1)
        result._combine(other, -1)
        return result

    def _combine(self, other: "Counts", sign: int) -> None:
        self.requests += sign * other.requests
        self.good += sign * other.good
        self.denied += sign * other.denied
        self.attempts_good += sign * other.attempts_good
        self.attempts_bad += sign * other.attempts_bad
        self.retries += sign * other.retries
        for bound, count in other.buckets.items():
            self.buckets[bound] = self.buckets.get(bound, 0) + sign * count

    @property
    def effective(self) -> float | None:
        return self.good / self.requests if self.requests > 0 else None

    @property
    def attempts(self) -> float:
        return self.attempts_good + self.attempts_bad

    @property
    def actual(self) -> float | None:
        return self.attempts_good / self.attempts if self.attempts > 0 else None

    def quantile_s(self, share: float) -> float | None:
        """As Prometheus' histogram_quantile: within a bucket the durations are taken to be spread evenly."""
        bounds = sorted(self.buckets)
        total = self.buckets[bounds[-1]] if bounds else 0
        if total <= 0:
            return None
        wanted = share * total
        low, below = 0.0, 0.0
        for bound in bounds:
            count = self.buckets[bound]
            if count >= wanted and count > below:
                return low if bound == float("inf") else low + (bound - low) * (wanted - below) / (count - below)
            low, below = bound, count
        return low


@dataclass(slots=True)
class Sample:
    """All sidecars at one moment."""

    at_s: float = 0.0
    calls: dict[Key, Counts] = field(default_factory=dict)
    breakers: dict[Key, str] = field(default_factory=dict)

    def add(self, other: "Sample", *, breakers: bool = True) -> None:
        """Add what other sidecars count; without breakers where those are no more."""
        for key, counts in other.calls.items():
            held = self.calls.setdefault(key, Counts())
            held += counts
        for key, state in other.breakers.items() if breakers else ():
            self.breakers[key] = max(self.breakers.get(key, BREAKERS[0]), state, key=BREAKERS.index)

    def total(self, source: str, service: str) -> Counts:
        """Over all versions."""
        result = Counts()
        for (caller, callee, _), counts in self.calls.items():
            if (caller, callee) == (source, service):
                result += counts
        return result

    def of(self, source: str, service: str, version: str) -> Counts:
        return self.calls.get((source, service, version)) or Counts()

    def breaker(self, source: str, service: str) -> str:
        """The worst of a service's."""
        states = [state for key, state in self.breakers.items() if key[:2] == (source, service)]
        return max(states, key=BREAKERS.index, default="")


def read_samples(text: str) -> Iterable[tuple[str, dict[str, str], float]]:
    """The samples of a Prometheus page that matter here: name, labels, value."""
    for line in text.splitlines():
        if line.startswith((DURATION, RETRIES)):
            found = _SAMPLE.match(line)
            if found is not None:
                yield found[1], dict(_LABEL.findall(found[2] or "")), float(found[3])


def add_sidecar(sample: Sample, source: str, metrics: str, clusters: Iterable[Mapping[str, Any]]) -> None:
    """Add what one sidecar, that of an instance of `source`, shows under /metrics and /clusters."""
    ways: dict[Key, Counts] = defaultdict(Counts)
    for name, labels, value in read_samples(metrics):
        service = labels.get("service", "")
        if name == RETRIES:
            if labels.get("side") == "out" and value:
                ways[source, service, ""].retries += value
        elif value:
            _add_duration(ways[source, service, labels.get("version", "")], name, labels, value)
    for row in clusters:
        if row["side"] != "out":
            continue
        key = (source, row["service"], row["version"])
        ways[key].attempts_good += row["successes"]
        ways[key].attempts_bad += row["failures"]
        if row["breaker"] in BREAKERS:
            worst = sample.breakers.get(key, BREAKERS[0])
            sample.breakers[key] = max(worst, row["breaker"], key=BREAKERS.index)
    for key, counts in ways.items():
        if counts.requests or counts.attempts or counts.retries:
            held = sample.calls.setdefault(key, Counts())
            held += counts


@dataclass(slots=True)
class Endpoints:
    """The endpoints of one sidecar, with those that it no longer has: an endpoint's counters go with it, but what they
    counted has happened."""

    held: dict[tuple[str, ...], Mapping[str, Any]] = field(default_factory=dict)
    past: dict[tuple[str, ...], dict[str, Any]] = field(default_factory=dict)

    def take(self, clusters: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """What /clusters shows now; the same, and a row for each of what has gone."""
        now = {tuple(str(row[key]) for key in ("side", "service", "version", "endpoint")): row for row in clusters}
        for key, row in self.held.items():
            if key not in now or any(now[key][counter] < row[counter] for counter in ("successes", "failures")):
                past = self.past.setdefault(key, {**row, "breaker": "", "successes": 0, "failures": 0})
                past["successes"] += row["successes"]
                past["failures"] += row["failures"]
        self.held = now
        return [*now.values(), *self.past.values()]


def _add_duration(counts: Counts, name: str, labels: Mapping[str, str], value: float) -> None:
    if name == f"{DURATION}_bucket":
        bound = float(labels["le"])
        counts.buckets[bound] = counts.buckets.get(bound, 0) + value
    elif name == f"{DURATION}_count":
        counts.requests += value
        status = labels.get("http_response_status_code", "")
        if status and int(status) < 400:
            counts.good += value
        if labels.get("reason") == "denied":
            counts.denied += value


def difference(new: Sample, old: Sample) -> Sample:
    """What happened between two moments; breakers are as they are at the end."""
    calls = {key: counts - old.calls.get(key, Counts()) for key, counts in new.calls.items()}
    return Sample(new.at_s - old.at_s, calls, dict(new.breakers))


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; None: nothing to say."""

    source: str
    service: str
    version: str
    effective: float | None
    actual: float | None
    rate: float
    p50_s: float | None
    p99_s: float | None
    retries: float | None
    breaker: str
    denied: bool = False


def rows(window: Sample, ways: Iterable[tuple[str, str]], versions: Mapping[str, tuple[str, ...]]) -> list[Row]:
    """A line for each way, and one for each version below it. `window` is a difference of two samples."""
    found = []
    for source, service in ways:
        known = versions.get(service, ())
        counts = window.total(source, service)
        found.append(
            _row(
                window, source, service, "all" if known else "", counts, counts.retries, window.breaker(source, service)
            )
        )
        for version in known:
            own = window.of(source, service, version)
            # The sidecar counts retries by service only. A retry stays within its version and follows a bad attempt.
            retries = max(0.0, min(own.attempts - own.requests, own.attempts_bad))
            breaker = window.breakers.get((source, service, version), "")
            found.append(_row(window, source, service, version, own, retries, breaker))
    return found


def _row(window: Sample, source: str, service: str, version: str, counts: Counts, retries: float, breaker: str) -> Row:
    seconds = window.at_s or 1.0
    return Row(
        source,
        service,
        version,
        counts.effective,
        counts.actual,
        counts.requests / seconds,
        counts.quantile_s(0.5),
        counts.quantile_s(0.99),
        retries / seconds,
        breaker,
        counts.denied > 0,
    )
