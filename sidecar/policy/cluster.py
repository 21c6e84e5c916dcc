"""A service as one caller's sidecar sees it: its endpoints and the state that outlives policy.

`Cluster` is the mutable half (requests and connections in flight, retry budget, endpoints with their breakers); it is
kept by service over every swap of the policy. `RoutePlan` is the compiled, immutable half that a request follows.
Must not know sockets, bytes or time's source. Invariants: `active` and `connections` never go below zero; an endpoint
keeps its identity, breaker and pool as long as its address stays in the snapshot.
"""

from collections import deque
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sidecar.model.snapshot import (
    CircuitBreaker,
    EndpointSpec,
    Limits,
    Outliers,
    Respond,
    Retry,
    Timeouts,
    Tls,
)

from .authz import Authorizer
from .balancing import Aimed, Balancing, Counts, Subset
from .budget import Budget
from .endpoint import Endpoint, endpoint_key
from .hashing import KeyOf
from .levels import panics
from .outliers import Detector
from .overload import Gate
from .slow_start import Warmup
from .sticky import Sticky
from .targets import Field, Redirecting, Rewriting
from .weights import Weighted

__all__ = ["ANY_METHOD", "Aimed", "Cluster", "Endpoint", "FallbackPlan", "RoutePlan", "Subset"]

SAFE_METHODS = frozenset({b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE", b"TRACE"})


class _Any:
    def __contains__(self, item: object) -> bool:
        return True


ANY_METHOD: Container[bytes] = _Any()


def retry_methods(retry: Retry) -> Container[bytes]:
    """The methods that may be sent again although the application may have seen them (RFC 9110, 9.2.2)."""
    if retry.methods is None:
        return SAFE_METHODS
    if "any" in retry.methods:
        return ANY_METHOD
    return frozenset(method.encode() for method in retry.methods)


class Cluster:
    """The state of one service in one sidecar. `waiters` is the proxy's queue of requests without a connection."""

    __slots__ = (
        "active",
        "attempts",
        "balancer",
        "breaker_events",
        "budget",
        "budget_exhausted",
        "cancelled",
        "connections",
        "counts",
        "ejections",
        "ejections_capped",
        "endpoints",
        "feedback",
        "limits",
        "name",
        "outlier_events",
        "outliers",
        "overflows",
        "panic",
        "panic_events",
        "panic_threshold",
        "pool_idle_s",
        "resends",
        "retries",
        "side",
        "subsets",
        "waiters",
        "warmup",
    )

    def __init__(self, name: str, side: str, limits: Limits, retry: Retry, now: float) -> None:
        self.name, self.side = name, side
        self.limits = limits
        self.budget = Budget(retry.budget.percent, retry.budget.min_per_second, now)
        self.endpoints: dict[str, Endpoint] = {}
        self.waiters: deque[Any] = deque()
        self.breaker_events: Callable[[Endpoint, str], None] | None = None
        self.outlier_events: Callable[[Endpoint, str], None] | None = None
        self.panic_events: Callable[[str], None] | None = None
        self.outliers: Detector | None = None
        self.ejections = self.ejections_capped = 0
        self.balancer: Any = None  # sidecar.api.Balancer
        self.feedback: Any = None  # the same, where it wants to be told of attempts
        self.subsets: dict[str, tuple[object, Subset]] = {}  # by version, with what each was made of
        self.counts = Counts()
        self.warmup = Warmup()
        self.panic = False  # whether health is asked no more, because too few are well
        self.panic_threshold = 50.0
        self.pool_idle_s = 60.0
        self.active = self.connections = 0
        self.attempts = self.retries = self.resends = self.cancelled = self.overflows = self.budget_exhausted = 0

    def update(
        self,
        specs: Iterable[EndpointSpec],
        breaker: CircuitBreaker,
        versions: Mapping[str, Mapping[str, str]],
        identity: str,
        sni: str,
        http2: bool = False,
        now: float = 0.0,
        slow_start_s: float = 0.0,
    ) -> list[Endpoint]:
        """Bring the endpoints up to date; returns those whose pooled connections must be closed: they left, or were
        made under other terms. `http2`: the application speaks HTTP/2 alone."""
        kept: dict[str, Endpoint] = {}
        fresh: list[Endpoint] = []
        stale: list[Endpoint] = []
        for spec in specs:
            answers = spec.identity or identity
            key = _key(spec.tls, endpoint_key(spec.host, spec.port))
            if key in kept:
                continue  # stated twice: one address is one endpoint
            endpoint = self.endpoints.pop(key, None)
            if endpoint is None:
                endpoint = Endpoint(spec, breaker)
                endpoint.breaker.on_change = _Reporter(self, endpoint)
                fresh.append(endpoint)
            else:
                if endpoint.identity != answers or endpoint.http2 is not http2:
                    stale.append(endpoint)
                endpoint.update(spec)
                endpoint.breaker.configure(breaker)
            endpoint.identity = answers
            endpoint.sni = sni
            endpoint.http2 = http2
            endpoint.version = version_of(spec.labels, versions) if versions else ""
            kept[key] = endpoint
        stale.extend(self.endpoints.values())
        self.endpoints = kept
        self.warmup.begin(fresh, kept, slow_start_s, now)
        self.counts.turn += 1  # somebody's health may be another
        return stale

    def balance_by(self, balancing: Balancing) -> None:
        """Who orders the endpoints from now on. Another balancer begins without what this one had learnt."""
        if balancing.balancer is not self.balancer:
            self.balancer = balancing.balancer
            self.subsets = {}
            for endpoint in self.endpoints.values():
                endpoint.memo = None
        self.feedback = balancing.balancer if balancing.told else None

    def eject_outliers(self, policy: Outliers | None, now: float) -> None:
        """How outliers are judged from now on; None: not at all, and whoever is ejected comes back."""
        detector = self.outliers
        if policy is None:
            if detector is not None:
                self.outliers = None
                detector.release()
            return
        if detector is None:
            detector = self.outliers = Detector(policy, now, self._outlier)
        detector.configure(policy, self.endpoints.values(), now)

    def step(self, now: float) -> None:
        """What is due of the outliers: somebody watches `outliers.due`, for no request comes by here."""
        detector = self.outliers
        if detector is not None and now >= detector.due and detector.step(now):
            self.judge_panic(self.panic_threshold)

    def _outlier(self, endpoint: Endpoint, text: str) -> None:
        self.counts.turn += 1
        if endpoint.ejected:
            self.ejections += 1
        elif text.startswith("spared"):
            self.ejections_capped += 1
        if self.outlier_events is not None:
            self.outlier_events(endpoint, text)

    @property
    def ejected(self) -> int:
        """Endpoints that are left out as outliers now."""
        return self.outliers.ejected if self.outliers is not None else 0

    def judge_panic(self, threshold: float) -> str:
        """Whether so few endpoints are usable that health and ejection are not asked; what to say where that has
        changed, else "". Whoever listens is told."""
        self.panic_threshold = threshold
        levels: dict[int, list[bool]] = {}
        for endpoint in self.endpoints.values():
            if endpoint.stated_weight > 0:
                levels.setdefault(endpoint.priority, []).append(endpoint.healthy)
        found = panics([(sum(each), len(each)) for each in levels.values()], threshold)
        before, self.panic = self.panic, any(found)
        if before is self.panic:
            return ""
        well, total = sum(map(sum, levels.values())), sum(map(len, levels.values()))
        ejected = f" ({self.ejected} ejected)" if self.ejected else ""
        if self.panic:
            text = (
                f"panic: {well} of {total} endpoints are healthy{ejected}, under {threshold:g}%: "
                "health is not asked any more"
            )
        else:
            text = f"panic is over: {well} of {total} endpoints are healthy{ejected}"
        if self.panic_events is not None:
            self.panic_events(text)
        return text

    @property
    def panic_picks(self) -> int:
        return self.counts.panic_picks

    @property
    def spilled_picks(self) -> int:
        return self.counts.spilled_picks

    @property
    def zone_picks(self) -> int:
        return self.counts.zone_picks

    def holds(self, endpoint: Endpoint) -> bool:
        """Whether an endpoint is still one of these."""
        return self.endpoints.get(_key(endpoint.tls, endpoint.key)) is endpoint


def _key(tls: Tls, address: str) -> str:
    """An address that is reached in another way is another endpoint."""
    return f"{tls.value}+{address}"


def version_of(labels: Mapping[str, str], versions: Mapping[str, Mapping[str, str]]) -> str:
    """The first declared version whose labels are all there; "" where none is."""
    for version, wanted in versions.items():
        if wanted and all(labels.get(name) == value for name, value in wanted.items()):
            return version
    return ""


class _Reporter:
    """Hands a breaker's change, with its evidence, to whoever listens on the cluster."""

    __slots__ = ("cluster", "endpoint")

    def __init__(self, cluster: Cluster, endpoint: Endpoint) -> None:
        self.cluster, self.endpoint = cluster, endpoint

    def __call__(self, text: str) -> None:
        self.cluster.counts.turn += 1
        if self.cluster.breaker_events is not None:
            self.cluster.breaker_events(self.endpoint, text)


@dataclass(frozen=True, slots=True)
class FallbackPlan:
    """What serves when nothing of the chosen version can: other endpoints, or a fixed response."""

    cluster: Cluster
    subset: Subset | None
    respond: Respond | None


@dataclass(frozen=True, slots=True)
class MirrorPlan:
    """Where copies of a route's requests go: a route of their own, on a cluster of their own. `share` of 1; where not
    `writes`, only requests that read are copied."""

    route: "RoutePlan"
    subset: Subset
    share: float
    writes: bool
    same_host: bool  # as the original has it; else that of the other service


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a route's requests may go; `version` None: every endpoint of the service."""

    version: str | None
    subset: Subset


class RoutePlan:
    """A route, compiled: every absent feature is None or empty, so that it costs one falsy test."""

    __slots__ = (
        "authz",
        "body_hooks",
        "cluster",
        "destinations",
        "fallback",
        "filters",
        "gate",
        "hedge_s",
        "key_of",
        "mirror",
        "name",
        "pinned",
        "redirect",
        "respond",
        "respond_fields",
        "retry",
        "retry_methods",
        "rewrite",
        "service",
        "stats",
        "sticky",
        "subset",
        "timeouts",
        "upgrade",
    )

    def __init__(self, name: str, service: str) -> None:
        self.name, self.service = name, service
        self.sticky: Sticky | None = None
        self.pinned: Mapping[str, tuple[Endpoint, Subset]] = {}  # by what a cookie says of an endpoint
        self.key_of: KeyOf | None = None  # what a hashing balancer goes by
        self.fallback: FallbackPlan | None = None
        self.mirror: MirrorPlan | None = None
        self.hedge_s = 0.0  # after which an attempt is hedged; 0: none is
        self.gate: Gate | None = None  # before the own application
        self.authz: Authorizer | None = None
        self.filters: Any = None  # proxy.filtering.Chain
        self.respond: Respond | None = None
        self.respond_fields: tuple[Field, ...] = ()
        self.redirect: Redirecting | None = None
        self.rewrite: Rewriting | None = None
        self.upgrade: frozenset[bytes] = frozenset()
        self.stats: Mapping[str, Any] = {}  # telemetry's counters by version
        self.body_hooks = False

    def bind(
        self, cluster: Cluster, timeouts: Timeouts, retry: Retry, destinations: Sequence[tuple[Destination, int]]
    ) -> None:
        """Where the requests go; before the first of them."""
        self.cluster = cluster
        self.timeouts, self.retry = timeouts, retry
        self.retry_methods = retry_methods(retry)
        self.destinations = Weighted(destinations)
        items = self.destinations.items
        self.subset = items[0].subset if len(items) == 1 else None

    def dressed_as(self, shell: "RoutePlan") -> "RoutePlan":
        """Take over what was compiled once for the same route of every port."""
        self.authz, self.filters, self.body_hooks = shell.authz, shell.filters, shell.body_hooks
        self.upgrade = shell.upgrade
        return self
