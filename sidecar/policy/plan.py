"""From a snapshot to what requests follow: clever here, flat at request time.

`compile_plans` turns the frozen policy into look-up tables: hosts to services, routes to RoutePlans, ports to what the
inbound side admits. Mutable state (clusters with their endpoints, breakers and budgets) is taken from `ClusterState`,
kept by service and port, and survives every swap. Filters and counters are made by callables that the composition
root passes in: this module knows neither plug-ins nor telemetry.
Invariants: nothing is changed in `ClusterState` unless the whole snapshot compiles; two services never share a host.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from sidecar.model.snapshot import (
    NONE,
    AuthzLevel,
    Call,
    EndpointSpec,
    Fallback,
    Limits,
    Match,
    Mirror,
    Mtls,
    PathHandling,
    Port,
    Protocol,
    Retry,
    Route,
    Service,
    Snapshot,
    Timeouts,
    Tls,
)
from sidecar.model.source import Source

from .authz import Authorizer, compile_authz
from .balancing import Balancing, Subset
from .cluster import Cluster, Destination, FallbackPlan, MirrorPlan, RoutePlan
from .endpoint import Endpoint
from .hashing import KeyOf, compile_key
from .matching import compile_match
from .overload import Gate
from .paths import Reader, judge, opaque
from .routing import RouteTable
from .sticky import Former, Sticky
from .targets import redirecting, respond_fields, rewriting

UNLIMITED = Limits(connections=1 << 30, pending=1 << 30, requests=1 << 30)
APP_POOL_IDLE_S = 4.0  # uvicorn closes at 5 s
MESH_POOL_IDLE_S = 60.0
NO_RETRY = Retry(max_retries=0)
DEFAULT_PORT = Port("http", 0)
MIRROR = "mirror"  # the side of clusters that only copies of requests go to


class PlanError(Exception):
    """The snapshot cannot be served. `problems` are (place, what is wrong)."""

    def __init__(self, problems: list[tuple[Source, str]]) -> None:
        super().__init__("; ".join(f"{source}: {text}" for source, text in problems))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class ServicePlan:
    """One HTTP port of a service, as one side of a sidecar serves it."""

    name: str
    port: str
    table: RouteTable[RoutePlan]
    read: Reader
    cluster: Cluster


@dataclass(frozen=True, slots=True)
class TcpPlan:
    """One TCP port of a service."""

    name: str
    port: str
    cluster: Cluster
    subset: Subset
    timeouts: Timeouts
    retry: Retry
    authz: Authorizer | None
    key_of: KeyOf | None = None


@dataclass(frozen=True, slots=True)
class LocalPort:
    """A port on loopback that leads to one upstream."""

    number: int
    service: str
    port: str
    http: ServicePlan | None
    tcp: TcpPlan | None
    source: Source


@dataclass(frozen=True, slots=True)
class PortPlan:
    """What the inbound side serves under one port of the own service; exactly one of the two is set."""

    name: str
    number: int
    http: ServicePlan | None
    tcp: TcpPlan | None


@dataclass(frozen=True, slots=True)
class Plans:
    """Everything that one snapshot compiles to; replaced as a whole."""

    snapshot: Snapshot = field(default_factory=Snapshot)
    own: str = ""
    outbound: Mapping[bytes, ServicePlan] = field(default_factory=dict)
    outbound_tcp: Mapping[tuple[str, str], TcpPlan] = field(default_factory=dict)
    by_port: Mapping[tuple[str, str], ServicePlan] = field(default_factory=dict)
    inbound: Mapping[str, PortPlan] = field(default_factory=dict)
    local_ports: tuple[LocalPort, ...] = ()
    own_hosts: frozenset[bytes] = frozenset()  # hosts that name the own service
    foreign_hosts: frozenset[bytes] = frozenset()  # hosts that name another service of the snapshot
    mtls: Mtls = Mtls.STRICT
    chains: tuple[Any, ...] = ()  # every filter chain
    connection_hooks: tuple[Any, ...] = ()  # chains that look at inbound connections
    max_connection_age_s: float = NONE

    def service_names(self) -> list[str]:
        return sorted(self.snapshot.services)


class ClusterState:
    """The clusters of a sidecar by (side, service, port)."""

    def __init__(self) -> None:
        self.clusters: dict[tuple[str, str, str], Cluster] = {}
        self.gates: dict[str, Gate] = {}  # before the own application, by service

    def __iter__(self) -> Iterator[Cluster]:
        return iter(self.clusters.values())


MakeChain = Callable[[str, Service, Route], Any]
MakeStats = Callable[[str, str, str, str], Any]
FindBalancer = Callable[[Service], Balancing]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a sidecar knows beside the policy."""

    own: str
    trust_domain: str
    apps: Mapping[str, tuple[str, int]]  # port name (or "") -> the application's address; ("unix:/path", 0)
    sticky_key: bytes = field(repr=False)
    chain: MakeChain
    stats: MakeStats
    balancer: FindBalancer
    on_breaker: Callable[[Cluster, Endpoint, str], None] | None = None
    on_panic: Callable[[Cluster, str], None] | None = None
    on_outlier: Callable[[Cluster, Endpoint, str], None] | None = None
    zone: str = ""  # where this sidecar is
    on_overload: Callable[[str, str], None] | None = None
    rnd: Callable[[], float] = lambda: 0.5
    sticky_former: Former = field(default=(), repr=False)


def compile_plans(
    snapshot: Snapshot, around: Surroundings, state: ClusterState, now: float
) -> tuple[Plans, list[Endpoint]]:
    """The plans, and the endpoints whose idle connections must be closed. Raises PlanError."""
    return _Compiler(snapshot, around, state, now).run()


Key = tuple[str, str]
Shells = list[tuple[Route, RoutePlan]]


class _Compiler:
    """First everything that can fail, on shells without state; then the binding to clusters, which cannot."""

    def __init__(self, snapshot: Snapshot, around: Surroundings, state: ClusterState, now: float) -> None:
        self.snapshot, self.around, self.now = snapshot, around, now
        self.state = state
        self.clusters: dict[tuple[str, str, str], Cluster] = {}
        self.budgets = {(side, name): cluster.budget for (side, name, _), cluster in state.clusters.items()}
        self.outbound: dict[Key, Cluster] = {}
        self.stale: list[Endpoint] = []
        self.chains: list[Any] = []
        self.problems: list[tuple[Source, str]] = []
        self.balancing: dict[str, Balancing] = {}
        self.gate: Gate | None = None
        self.compiled: set[Match] = set()  # matches in which nothing is wrong

    def run(self) -> tuple[Plans, list[Endpoint]]:
        snapshot, own = self.snapshot, self.around.own
        service = snapshot.services.get(own)
        if service is None:
            known = ", ".join(sorted(snapshot.services)) or "none"
            raise PlanError(
                [(Source(""), f'this sidecar\'s own service "{own}" is not in the policy (known: {known})')]
            )
        all_ports = [(s, p) for s in snapshot.services.values() for p in ports(s)]
        outbound = {s.name: self._shells("out", s) for s in snapshot.services.values() if _has_http(s)}
        inbound = self._shells("in", service)
        tcp_authz = self._authz(service.authz, service.source)
        for call in service.calls.values():
            self._check_call(call)
        for each in snapshot.services.values():
            self._find_balancer(each)
        self._check_classes(service)
        if self.problems:
            raise PlanError(self.problems)

        for s, p in all_ports:
            self.outbound[s.name, p.name] = self._outbound_cluster(s, p)
        http: dict[Key, ServicePlan] = {}
        tcp: dict[Key, TcpPlan] = {}
        for s, p in all_ports:
            cluster = self.outbound[s.name, p.name]
            if p.protocol.is_http:
                table = self._table(outbound[s.name], partial(self._outbound_route, s, p, cluster))
                http[s.name, p.name] = ServicePlan(s.name, p.name, table, reader(s, p), cluster)
            else:
                tcp[s.name, p.name] = self._outbound_tcp(s, p, cluster)
        self.gate = self._gate(service)
        here = {p.name: self._inbound(service, p, inbound, tcp_authz) for p in ports(service)}
        for key, cluster in self.state.clusters.items():
            if key not in self.clusters:
                self.stale.extend(cluster.endpoints.values())
                cluster.endpoints = {}  # what is still being made for it is not kept
                cluster.outliers = None
        self.state.clusters = self.clusters
        own_hosts = frozenset(_hosts_of(service))
        foreign = (host for s in snapshot.services.values() if s.name != own for host in _hosts_of(s))
        plans = Plans(
            snapshot=snapshot,
            own=own,
            outbound=_hosts(http),
            outbound_tcp=tcp,
            by_port=http,
            inbound=here,
            local_ports=tuple(self._local_port(call, http, tcp) for call in service.calls.values() if call.local_port),
            own_hosts=own_hosts,
            foreign_hosts=frozenset(foreign) - own_hosts,
            mtls=service.mtls,
            chains=tuple(self.chains),
            connection_hooks=tuple(
                shell.filters for _, shell in inbound[-1:] if shell.filters is not None and shell.filters.on_connection
            ),
            max_connection_age_s=service.max_connection_age_s,
        )
        return plans, self.stale

    # -- what can fail

    def _shells(self, side: str, service: Service) -> Shells:
        """A RoutePlan for each route, with all that can be wrong in it, not yet bound to a cluster."""
        shells: Shells = []
        for route in service.routes:
            plan = RoutePlan(route.name, service.name)
            plan.upgrade = frozenset(token.encode() for token in route.upgrade)
            if side == "in":
                plan.authz = self._authz(route.authz, route.source)
            try:
                chain = self.around.chain(side, service, route)
            except PlanError as exc:
                self.problems.extend(exc.problems)
                chain = None
            if chain is not None:
                plan.filters = chain
                plan.body_hooks = chain.has_body_hooks
                self.chains.append(chain)
            shells.append((route, plan))
            if route.match in self.compiled:
                continue
            try:
                compile_match(route.match)
                self.compiled.add(route.match)
            except ValueError as exc:
                self.problems.append((route.source, f'route "{route.name}" of "{service.name}": {exc}'))
        return shells

    def _authz(self, levels: tuple[AuthzLevel, ...], source: Source) -> Authorizer | None:
        try:
            return compile_authz(levels, self.around.trust_domain)
        except ValueError as exc:
            self.problems.append((source, str(exc)))
            return None

    def _check_classes(self, service: Service) -> None:
        policy = service.concurrency
        for each in policy.priorities if policy is not None else ():
            try:
                compile_match(Match(headers=each.headers, callers=each.callers))
            except ValueError as exc:
                assert policy is not None
                self.problems.append((policy.source, f'class "{each.name}" of "{service.name}": {exc}'))

    def _check_call(self, call: Call) -> None:
        service = self.snapshot.services.get(call.service)
        if service is None:
            self.problems.append((call.source, f'calls names an unknown service "{call.service}"'))
        elif call.port is not None and call.port not in {p.name for p in ports(service)}:
            names = ", ".join(p.name for p in ports(service))
            self.problems.append((call.source, f'service "{call.service}" has no port "{call.port}" (it has: {names})'))

    def _find_balancer(self, service: Service) -> None:
        stated = service.balancing
        try:
            found = self.balancing[service.name] = self.around.balancer(service)
            if found.keyed and stated.by is None:
                text = f'"{service.balance}" chooses by a key; say which, for example `by: header:x-user`'
                self.problems.append((stated.source, text))
            elif found.keyed:
                compile_key(stated.by or "")
        except PlanError as exc:
            self.problems.extend(exc.problems)
        except ValueError as exc:
            self.problems.append((stated.source, str(exc)))

    # -- clusters

    def _cluster(self, side: str, service: Service, port: Port, limits: Limits, retry: Retry) -> Cluster:
        key = (side, service.name, port.name)
        cluster = self.state.clusters.get(key)
        if cluster is None:
            cluster = Cluster(service.name, side, limits, retry, self.now)
            cluster.budget = self.budgets.setdefault((side, service.name), cluster.budget)  # one for all its ports
        cluster.limits = limits
        cluster.budget.configure(retry.budget.percent, retry.budget.min_per_second)
        around = self.around
        cluster.breaker_events = partial(around.on_breaker, cluster) if around.on_breaker is not None else None
        cluster.outlier_events = partial(around.on_outlier, cluster) if around.on_outlier is not None else None
        cluster.panic_events = partial(around.on_panic, cluster) if around.on_panic is not None else None
        self.clusters[key] = cluster
        return cluster

    def _outbound_cluster(self, service: Service, port: Port) -> Cluster:
        retry = service.routes[-1].retry if service.routes else Retry()
        cluster = self._cluster("out", service, port, service.limits, retry)
        self._endpoints_of(service, port, cluster, service.balancing.slow_start_s)
        cluster.balance_by(self.balancing[service.name])
        cluster.subsets = {name: held for name, held in cluster.subsets.items() if not name or name in service.versions}
        cluster.eject_outliers(service.outliers, self.now)
        cluster.judge_panic(service.balancing.panic_threshold)
        return cluster

    def _endpoints_of(self, service: Service, port: Port, cluster: Cluster, slow_start_s: float = 0.0) -> None:
        """What is known of the service's endpoints, to a cluster of its callers."""
        cluster.pool_idle_s = service.pool_idle_s if service.pool_idle_s is not None else MESH_POOL_IDLE_S
        identity = f"spiffe://{self.around.trust_domain}/service/{service.name}"
        sni = f"{port.name}.{service.name}.mesh"
        self.stale += cluster.update(
            service.endpoints, service.circuit_breaker, service.versions, identity, sni, port.protocol.is_http2,
            now=self.now, slow_start_s=slow_start_s,
        )  # fmt: skip

    def _gate(self, service: Service) -> Gate | None:
        """The one that stands, with what it has learnt and who waits there; without a policy all who wait go on."""
        policy, gates = service.concurrency, self.state.gates
        gate = gates.get(service.name)
        if policy is None:
            if gate is not None:
                del gates[service.name]
                gate.open(self.now)
            return None
        if gate is None:
            told = self.around.on_overload
            note = partial(told, service.name) if told is not None else lambda text: None
            gate = gates[service.name] = Gate(policy, self.now, self.around.rnd, note)
        elif gate.policy != policy:
            gate.configure(policy, self.now)
        return gate

    def _app_cluster(self, service: Service, port: Port) -> Cluster:
        cluster = self._cluster("in", service, port, UNLIMITED, NO_RETRY)
        cluster.pool_idle_s = APP_POOL_IDLE_S
        apps = self.around.apps
        host, number = apps.get(port.name) or apps.get("") or ("127.0.0.1", port.number)
        never_opens = replace(service.circuit_breaker, consecutive_failures=1 << 60, success_rate=None)
        there = [EndpointSpec(host, number, tls=Tls.PLAIN)]
        self.stale += cluster.update(there, never_opens, {}, "", "", port.protocol.is_http2)
        return cluster

    def _subset(self, service: Service, cluster: Cluster, version: str | None) -> Subset:
        """The same object as long as nothing about it changes: its tables may have been dear."""
        labels = service.versions.get(version, {}) if version is not None else {}
        endpoints = tuple([e for e in cluster.endpoints.values() if not labels or _selected(e, labels)])
        stated = service.balancing
        zone = self.around.zone if stated.zone == "prefer" else ""
        weights = [(e.stated_weight, e.zone, e.priority) for e in endpoints]
        made_of = (endpoints, weights, stated.panic_threshold, zone, stated.slow_start_s)
        held = cluster.subsets.get(version or "")
        if held is not None and held[0] == made_of:
            return held[1]
        how = self.balancing[service.name]
        subset = Subset(
            version or "",
            endpoints,
            how.arrange,
            stated.panic_threshold,
            keyed=how.keyed,
            zone=zone,
            counts=cluster.counts,
            warmup=cluster.warmup,
        )
        cluster.subsets[version or ""] = (made_of, subset)
        return subset

    def _key_of(self, service: Service) -> KeyOf | None:
        by = service.balancing.by
        return compile_key(by) if by is not None and self.balancing[service.name].keyed else None

    # -- outbound

    def _table(self, shells: Shells, bind: Callable[[Route], RoutePlan]) -> RouteTable[RoutePlan]:
        return RouteTable([(route.match, bind(route).dressed_as(shell)) for route, shell in shells])

    def _outbound_route(self, service: Service, port: Port, cluster: Cluster, route: Route) -> RoutePlan:
        call = self.snapshot.services[self.around.own].calls.get(service.name)
        plan = RoutePlan(route.name, service.name)
        destinations = [
            (Destination(d.version, self._subset(service, cluster, d.version)), d.weight) for d in route.destinations
        ]
        plan.bind(cluster, *tighten(route.timeouts, route.retry, call), destinations)
        plan.hedge_s = route.hedge_after_s if route.hedge_after_s != NONE else 0.0
        plan.key_of = self._key_of(service)
        if route.sticky is not None:
            stuck = route.sticky
            sticky = plan.sticky = Sticky(
                stuck.cookie,
                stuck.ttl_s,
                self.around.sticky_key,
                service.name,
                by_endpoint=stuck.level == "endpoint",
                former=self.around.sticky_former,
            )
            if sticky.by_endpoint:
                subsets = [destination.subset for destination, _ in destinations]
                plan.pinned = {
                    token: (e, subset) for subset in subsets for e in subset.endpoints for token in sticky.tokens(e.key)
                }
        if route.fallback is not None:
            plan.fallback = self._fallback(service, route.fallback, cluster)
        if route.mirror is not None:
            plan.mirror = self._mirror(service, port, route, route.mirror, plan.timeouts)
        plan.respond, plan.rewrite = route.respond, rewriting(route.rewrite, route.match)
        if route.respond is not None:
            plan.respond_fields = respond_fields(route.respond.body, route.response_headers)
        plan.redirect = redirecting(route.redirect, route.match, route.response_headers)
        stats = self.around.stats
        plan.stats = {name: stats("out", service.name, route.name, name) for name in ("", *service.versions)}
        return plan

    def _fallback(self, service: Service, fallback: Fallback, cluster: Cluster) -> FallbackPlan:
        other = self.snapshot.services.get(fallback.service or "")
        if other is not None:
            port = next((p for p in ports(other) if p.protocol.is_http), ports(other)[0])
            there = self.outbound[other.name, port.name]
            return FallbackPlan(there, self._subset(other, there, fallback.version), fallback.respond)
        subset = self._subset(service, cluster, fallback.version) if fallback.version is not None else None
        return FallbackPlan(cluster, subset, fallback.respond)

    def _mirror(
        self, service: Service, port: Port, route: Route, mirror: Mirror, timeouts: Timeouts
    ) -> MirrorPlan | None:
        """Copies have connections, breakers and limits of their own, so that nothing of theirs acts on originals; they
        are not balanced by what a balancer has learnt, nor teach it anything."""
        other = self.snapshot.services.get(mirror.service) if mirror.service is not None else service
        if other is None:
            return None  # not held (yet)
        if other is not service:
            port = next((p for p in ports(other) if p.protocol.is_http), ports(other)[0])
        cluster = self.clusters.get((MIRROR, other.name, port.name))
        if cluster is None:
            cluster = self._cluster(MIRROR, other, port, other.limits, NO_RETRY)
            cluster.breaker_events = cluster.outlier_events = cluster.panic_events = None
            self._endpoints_of(other, port, cluster)
            cluster.judge_panic(other.balancing.panic_threshold)
        labels = other.versions.get(mirror.version, {}) if mirror.version is not None else {}
        endpoints = tuple([e for e in cluster.endpoints.values() if not labels or _selected(e, labels)])
        zone = self.around.zone if other.balancing.zone == "prefer" else ""
        subset = Subset(
            mirror.version or "", endpoints, panic_threshold=other.balancing.panic_threshold, zone=zone,
            counts=cluster.counts,
        )  # fmt: skip
        most_s = Timeouts().total_s
        timeouts = replace(
            timeouts,
            total_s=min(timeouts.total_s, most_s),
            total_grpc_s=min(timeouts.of_grpc_s, most_s),
            body_s=min(timeouts.body_s, most_s),
        )
        plan = RoutePlan(route.name, other.name)
        plan.bind(cluster, timeouts, NO_RETRY, [(Destination(mirror.version, subset), 100)])
        plan.rewrite = rewriting(route.rewrite, route.match) if other is service else None
        return MirrorPlan(plan, subset, mirror.percent / 100.0, mirror.writes, other is service)

    def _outbound_tcp(self, service: Service, port: Port, cluster: Cluster) -> TcpPlan:
        call = self.snapshot.services[self.around.own].calls.get(service.name)
        retry = service.routes[-1].retry if service.routes else Retry()
        timeouts, retry = tighten(service.timeouts, retry, call)
        subset = self._subset(service, cluster, None)
        return TcpPlan(service.name, port.name, cluster, subset, timeouts, retry, None, self._key_of(service))

    def _local_port(self, call: Call, http: Mapping[Key, ServicePlan], tcp: Mapping[Key, TcpPlan]) -> LocalPort:
        assert call.local_port is not None
        service = self.snapshot.services[call.service]
        port = next(p for p in ports(service) if call.port in (None, p.name))
        key = (service.name, port.name)
        return LocalPort(call.local_port, service.name, port.name, http.get(key), tcp.get(key), call.source)

    # -- inbound

    def _inbound(self, service: Service, port: Port, shells: Shells, tcp_authz: Authorizer | None) -> PortPlan:
        cluster = self._app_cluster(service, port)
        subset = Subset("", tuple(cluster.endpoints.values()))
        if port.protocol is Protocol.TCP:
            tcp = TcpPlan(service.name, port.name, cluster, subset, service.timeouts, NO_RETRY, tcp_authz)
            return PortPlan(port.name, port.number, None, tcp)
        table = self._table(shells, partial(self._inbound_route, service, cluster, subset))
        return PortPlan(
            port.name, port.number, ServicePlan(service.name, port.name, table, reader(service, port), cluster), None
        )

    def _inbound_route(self, service: Service, cluster: Cluster, subset: Subset, route: Route) -> RoutePlan:
        plan = RoutePlan(route.name, service.name)
        plan.gate = self.gate
        timeouts = replace(
            route.timeouts, total_s=NONE, total_grpc_s=NONE, try_s=NONE
        )  # the caller's sidecar keeps these
        retry = replace(NO_RETRY, methods=route.retry.methods)  # what is safe holds for the free resend too
        plan.bind(cluster, timeouts, retry, [(Destination(None, subset), 100)])
        plan.stats = {"": self.around.stats("in", service.name, route.name, "")}
        return plan


def _hosts(http: Mapping[Key, ServicePlan]) -> dict[bytes, ServicePlan]:
    """`port.service` and `port.service.mesh` for each HTTP port; the bare name is the first one's."""
    hosts: dict[bytes, ServicePlan] = {}
    for (name, port), plan in http.items():
        for host in (f"{port}.{name}", f"{port}.{name}.mesh"):
            hosts[host.encode()] = plan
    for (name, _), plan in reversed(list(http.items())):
        for host in (name, f"{name}.mesh"):
            hosts[host.encode()] = plan
    return hosts


def _hosts_of(service: Service) -> Iterator[bytes]:
    """Every host that names a service or one of its ports."""
    for name in (service.name, *(f"{port.name}.{service.name}" for port in ports(service))):
        yield name.encode()
        yield f"{name}.mesh".encode()


def _has_http(service: Service) -> bool:
    return any(p.protocol.is_http for p in ports(service))


def ports(service: Service) -> tuple[Port, ...]:
    """A service that declares no port has one for HTTP."""
    return service.ports or (DEFAULT_PORT,)


def reader(service: Service, port: Port) -> Reader:
    """How paths are read: strictly where path rules exist, exactly as they came elsewhere (docs/policy.md, Paths)."""
    handling = port.path_handling
    if handling is None:
        handling = PathHandling.STRICT if _has_path_rules(service) else PathHandling.OPAQUE
    return judge if handling is PathHandling.STRICT else opaque


def _has_path_rules(service: Service) -> bool:
    for route in service.routes:
        for level in route.authz:
            if any(rule.paths is not None for rule in (*(level.allow or ()), *level.deny)):
                return True
        if route.match.path not in (None, "/**") or route.match.path_regex is not None:
            return True
    return False


def tighten(timeouts: Timeouts, retry: Retry, call: Call | None) -> tuple[Timeouts, Retry]:
    """A caller may shorten and reduce what a service says, never lengthen it."""
    if call is None:
        return timeouts, retry
    timeouts = replace(
        timeouts,
        total_s=min(timeouts.total_s, call.total_s),
        total_grpc_s=min(timeouts.of_grpc_s, call.total_s),
        try_s=min(timeouts.try_s, call.try_s),
        idle_s=min(timeouts.idle_s, call.idle_s),
        idle_tcp_s=min(timeouts.idle_tcp_s, call.idle_s),
        body_s=min(timeouts.body_s, call.body_s),
        connect_s=min(timeouts.connect_s, call.connect_s),
    )
    if call.max_retries is not None:
        retry = replace(retry, max_retries=min(retry.max_retries, call.max_retries))
    return timeouts, retry


def _selected(endpoint: Endpoint, labels: Mapping[str, str]) -> bool:
    return all(endpoint.labels.get(name) == value for name, value in labels.items())
