"""What a run says when it is over: numbers for each edge, each service and each endpoint, and series over time.

Pure arithmetic on what was recorded. Invariant: equal runs give equal results, to the last digit and in the same order.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from .engine import Engine
from .record import EJECTED, Change, Edge, open_spans, percentile, share_open
from .scenario import Scenario


@dataclass(frozen=True, slots=True)
class EdgeResult:
    """`effective`: the share of requests that ended well; `actual`: of attempts, but for those that another one has
    made needless. `shed`: attempts that the callee's sidecar had no room for. `hedges`: by what has become of them, or
    why there was none. `unfinished`: still under way when nothing could happen any more."""

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
    shed: int
    hedges: tuple[tuple[str, int], ...]
    unfinished: int
    outcomes: tuple[tuple[str, int], ...]
    statuses: tuple[tuple[int, int], ...]

    @property
    def name(self) -> str:
        return f"{self.caller} → {self.to}"


@dataclass(frozen=True, slots=True)
class EndpointResult:
    """`open_shares`: of the callers' breakers, how many were not closed, by bucket of time; 1.0 is all of them.
    `ejected_shares`: by how many of the callers it was ejected."""

    service: str
    name: str
    attempts: int
    actual: float
    refusals: int
    openings: int
    open_shares: tuple[float, ...]
    ejections: int
    ejected_shares: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Series:
    """By bucket of time, of the load: `success` None where nothing ended, percentiles where nothing began;
    `open_breakers` and `ejected` are averages. `attempts` and `retries` are those of all services, `endpoints` and
    `groups` attempts by name, of the services that the load asks."""

    success: tuple[float | None, ...]
    in_flight: tuple[int, ...]
    attempts: tuple[int, ...]
    open_breakers: tuple[float, ...]
    ejected: tuple[float, ...]
    p50_s: tuple[float | None, ...]
    p99_s: tuple[float | None, ...]
    requests: tuple[int, ...]
    retries: tuple[int, ...]
    endpoints: tuple[tuple[str, tuple[int, ...]], ...]
    groups: tuple[tuple[str, tuple[int, ...]], ...]


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
    ejections: int
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
    ejected = open_spans(engine.changes, engine.scenario.duration_s, *EJECTED)
    services = list(dict.fromkeys(edge.to for edge in edges))
    return Result(
        policy=policy,
        requests=engine.requests,
        unsent=engine.unsent,
        events=engine.agenda.events,
        edges=tuple(_edge(engine, edge) for edge in edges),
        endpoints=tuple(_endpoints(engine, services, spans, ejected)),
        amplification={name: amplification(edge for edge in edges if edge.to == name) for name in services},
        openings=sum(change.state == "open" for change in engine.changes),
        ejections=sum(change.state == EJECTED[0] for change in engine.changes),
        series=_series(engine, [edge for edge in edges if edge.root], spans, ejected),
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
        actual=share(edge.good_attempts, edge.attempts - edge.beaten),
        p50_s=percentile(took, 0.50),
        p99_s=percentile(took, 0.99),
        retries=sum(cluster.retries for cluster in clusters),
        resends=sum(cluster.resends for cluster in clusters),
        budget_refusals=sum(cluster.budget_exhausted for cluster in clusters),
        overflows=sum(cluster.overflows for cluster in clusters),
        shed=edge.shed,
        hedges=tuple(sorted(edge.hedges.items(), key=lambda item: (-item[1], item[0]))),
        unfinished=edge.in_flight,
        outcomes=tuple(sorted(edge.outcomes.items(), key=lambda item: (-item[1], item[0]))),
        statuses=tuple(sorted(edge.statuses.items())),
    )


Spans = dict[tuple[str, str], list[tuple[float, float]]]


def _of(name: str, spans: Spans) -> Spans:
    """Those of one endpoint."""
    return {key: found for key, found in spans.items() if key[1] == name}


def _shares(engine: Engine, spans: Spans, of: int = 1) -> tuple[float, ...]:
    """How many of so many hold, by bucket of time."""
    every = [span for found in spans.values() for span in found]
    return tuple(each / max(1, of) for each in share_open(every, engine.agenda.width_s, engine.agenda.buckets))


def _endpoints(engine: Engine, services: list[str], spans: Spans, ejected: Spans) -> Iterable[EndpointResult]:
    for service in services:
        edges = [edge for edge in engine.stage.edges.values() if edge.to == service]
        callers = sum(len(engine.stage.of(name)) for name in dict.fromkeys(edge.caller for edge in edges))
        for server in engine.stage.of(service):
            name = server.model.name
            yield EndpointResult(
                service=service,
                name=name,
                attempts=server.attempts,
                actual=share(server.good, server.attempts - server.beaten),
                refusals=server.refusals,
                openings=sum(change.state == "open" and change.endpoint == name for change in engine.changes),
                open_shares=_shares(engine, _of(name, spans), callers),
                ejections=sum(change.state == EJECTED[0] and change.endpoint == name for change in engine.changes),
                ejected_shares=_shares(engine, _of(name, ejected), callers),
            )


def _series(engine: Engine, roots: list[Edge], spans: Spans, ejected: Spans) -> Series:
    buckets = range(engine.agenda.buckets)
    ended = [sum(edge.bucket_ended[n] for edge in roots) for n in buckets]
    good = [sum(edge.bucket_good[n] for edge in roots) for n in buckets]
    width_s = engine.agenda.width_s
    took: list[list[float]] = [[] for _ in buckets]
    for edge in roots:
        for begun, lasted in zip(edge.begun_s, edge.took_s, strict=True):
            index = int(begun / width_s)
            if index < len(took):
                took[index].append(lasted)
    for each in took:
        each.sort()
    started = [sum(edge.bucket_started[n] for edge in roots) for n in buckets]
    asked = dict.fromkeys(edge.to for edge in engine.stage.edges.values())
    servers = [server for name in asked for server in engine.stage.of(name)]
    groups: dict[str, list[int]] = {}
    for server in servers:
        group = groups.setdefault(server.model.name.rpartition("-")[0] or server.model.name, [0] * len(buckets))
        for n in buckets:
            group[n] += server.bucket_attempts[n]
    return Series(
        success=tuple(g / e if e else None for g, e in zip(good, ended, strict=True)),
        in_flight=tuple(sum(edge.bucket_peak[n] for edge in roots) for n in buckets),
        attempts=tuple(sum(edge.bucket_attempts[n] for edge in engine.stage.edges.values()) for n in buckets),
        open_breakers=_shares(engine, spans),
        ejected=_shares(engine, ejected),
        p50_s=tuple(percentile(each, 0.50) if each else None for each in took),
        p99_s=tuple(percentile(each, 0.99) if each else None for each in took),
        requests=tuple(started),
        retries=tuple(sum(edge.bucket_retries[n] for edge in engine.stage.edges.values()) for n in buckets),
        endpoints=tuple((server.model.name, tuple(server.bucket_attempts[: len(buckets)])) for server in servers),
        groups=tuple((name, tuple(values)) for name, values in groups.items()),
    )


def scenario_line(scenario: Scenario, seed: int) -> str:
    """A run in one line, but for its policy."""
    pairs = ", ".join(dict.fromkeys(f"{load.caller} → {load.to}" for load in scenario.load))
    return f"{scenario.name}: {pairs}, {scenario.duration_s:g}s, seed {seed}"
