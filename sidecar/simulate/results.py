"""What a run says when it is over: numbers for each edge, each service and each endpoint, and series over time.

Pure arithmetic on what was recorded. Invariant: equal runs give equal results, to the last digit and in the same order.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from .engine import Engine
from .record import Change, Edge, open_spans, percentile, share_open
from .scenario import Scenario


@dataclass(frozen=True, slots=True)
class EdgeResult:
    """`effective`: the share of requests that ended well; `actual`: of attempts. `unfinished`: still under way when
    nothing could happen any more."""

    caller: str
    to: str
    root: bool
    requests: int
    attempts: int
    effective: float
    actual: float
    p50_s: float
    p99_s: float
    retries: int
    resends: int
    budget_refusals: int
    overflows: int
    unfinished: int
    outcomes: tuple[tuple[str, int], ...]
    statuses: tuple[tuple[int, int], ...]

    @property
    def name(self) -> str:
        return f"{self.caller} → {self.to}"


@dataclass(frozen=True, slots=True)
class EndpointResult:
    """`open_shares`: of the callers' breakers, how many were not closed, by bucket of time; 1.0 is all of them."""

    service: str
    name: str
    attempts: int
    actual: float
    refusals: int
    openings: int
    open_shares: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Series:
    """By bucket of time, of the load: `success` None where nothing ended; `open_breakers` is an average."""

    success: tuple[float | None, ...]
    in_flight: tuple[int, ...]
    attempts: tuple[int, ...]
    open_breakers: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Result:
    """`amplification`: attempts that a service received, for each request that nothing above had retried, by service;
    `worst_amplification` the greatest of them. `edges` are live, for objectives."""

    policy: str
    requests: int
    unsent: int
    events: int
    edges: tuple[EdgeResult, ...]
    endpoints: tuple[EndpointResult, ...]
    amplification: dict[str, float]
    openings: int
    series: Series
    changes: tuple[Change, ...]
    width_s: float
    records: tuple[Edge, ...]

    @property
    def worst_amplification(self) -> float:
        return max(self.amplification.values(), default=1.0)


def result_of(engine: Engine, policy: str) -> Result:
    edges = list(engine.stage.edges.values())
    spans = open_spans(engine.changes, engine.scenario.duration_s)
    services = list(dict.fromkeys(edge.to for edge in edges))
    return Result(
        policy=policy,
        requests=engine.requests,
        unsent=engine.unsent,
        events=engine.agenda.events,
        edges=tuple(_edge(engine, edge) for edge in edges),
        endpoints=tuple(_endpoints(engine, services, spans)),
        amplification={name: amplification(edge for edge in edges if edge.to == name) for name in services},
        openings=sum(change.state == "open" for change in engine.changes),
        series=_series(engine, [edge for edge in edges if edge.root], spans),
        changes=tuple(engine.changes),
        width_s=engine.agenda.width_s,
        records=tuple(edges),
    )


def amplification(edges: Iterable[Edge]) -> float:
    """Attempts for each request that is no part of a retry."""
    attempts = first = 0
    for edge in edges:
        attempts += edge.attempts
        first += edge.first
    return attempts / first if first else 1.0


def share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0


def _edge(engine: Engine, edge: Edge) -> EdgeResult:
    took, good = edge.within(0.0, None)
    sidecars = [s.sidecar for s in engine.stage.of(edge.caller) if s.sidecar is not None]
    clusters = [cluster for sidecar in sidecars for cluster in sidecar.clusters(edge.to)]
    return EdgeResult(
        caller=edge.caller,
        to=edge.to,
        root=edge.root,
        requests=edge.started,
        attempts=edge.attempts,
        effective=share(good, len(took)),
        actual=share(edge.good_attempts, edge.attempts),
        p50_s=percentile(took, 0.50),
        p99_s=percentile(took, 0.99),
        retries=sum(cluster.retries for cluster in clusters),
        resends=sum(cluster.resends for cluster in clusters),
        budget_refusals=sum(cluster.budget_exhausted for cluster in clusters),
        overflows=sum(cluster.overflows for cluster in clusters),
        unfinished=edge.in_flight,
        outcomes=tuple(sorted(edge.outcomes.items(), key=lambda item: (-item[1], item[0]))),
        statuses=tuple(sorted(edge.statuses.items())),
    )


Spans = dict[tuple[str, str], list[tuple[float, float]]]


def _endpoints(engine: Engine, services: list[str], spans: Spans) -> Iterable[EndpointResult]:
    for service in services:
        edges = [edge for edge in engine.stage.edges.values() if edge.to == service]
        callers = sum(len(engine.stage.of(name)) for name in dict.fromkeys(edge.caller for edge in edges))
        for server in engine.stage.of(service):
            name = server.model.name
            own = [span for (_, endpoint), found in spans.items() if endpoint == name for span in found]
            shares = share_open(own, engine.agenda.width_s, engine.agenda.buckets)
            yield EndpointResult(
                service=service,
                name=name,
                attempts=server.attempts,
                actual=share(server.good, server.attempts),
                refusals=server.refusals,
                openings=sum(change.state == "open" and change.endpoint == name for change in engine.changes),
                open_shares=tuple(each / max(1, callers) for each in shares),
            )


def _series(engine: Engine, roots: list[Edge], spans: Spans) -> Series:
    buckets = range(engine.agenda.buckets)
    ended = [sum(edge.bucket_ended[n] for edge in roots) for n in buckets]
    good = [sum(edge.bucket_good[n] for edge in roots) for n in buckets]
    every = [span for found in spans.values() for span in found]
    return Series(
        success=tuple(g / e if e else None for g, e in zip(good, ended, strict=True)),
        in_flight=tuple(sum(edge.bucket_peak[n] for edge in roots) for n in buckets),
        attempts=tuple(sum(edge.bucket_attempts[n] for edge in engine.stage.edges.values()) for n in buckets),
        open_breakers=tuple(share_open(every, engine.agenda.width_s, engine.agenda.buckets)),
    )


def scenario_line(scenario: Scenario, seed: int) -> str:
    """A run in one line, but for its policy."""
    pairs = ", ".join(dict.fromkeys(f"{load.caller} → {load.to}" for load in scenario.load))
    return f"{scenario.name}: {pairs}, {scenario.duration_s:g}s, seed {seed}"
