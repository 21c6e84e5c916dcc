"""The sidecar of one endpoint: the real plans, clusters, breakers, budgets and balancers of one caller.

Everything that decides is the sidecar's own code; only what would need bytes (filters, codecs, pools) is left out, and
of the filters the rate limit and injected faults are asked the way the built-in ones ask.
Invariant: `routes[ask.number]` is what the sidecar's table of routes finds for that request.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from sidecar.model.snapshot import Fault, RateLimit, Service, Snapshot
from sidecar.model.source import BUILT_IN
from sidecar.plugins.loader import Loader, PluginError
from sidecar.policy.balancing import Balancing
from sidecar.policy.cluster import Cluster, RoutePlan
from sidecar.policy.endpoint import Endpoint
from sidecar.policy.limits import Limiter, make
from sidecar.policy.overload import Gate
from sidecar.policy.plan import ClusterState, PlanError, Surroundings, compile_plans

from .life import Ask
from .scenario import EndpointModel

OnBreaker = Callable[["Sidecar", Endpoint, str], None]
GONE = "gone: callers no longer know the endpoint"
ENDED = "gone: the caller has ended"


class Sidecar:
    """`faults` by number of what is asked, where a route injects any; `limits` by number of what is asked of it."""

    __slots__ = ("_asks", "_balancers", "_buckets", "_loader", "_on_breaker", "_served", "faults", "gate", "limits",
                 "name", "past", "plans", "routes", "service", "state", "zone")  # fmt: skip

    def __init__(
        self,
        endpoint: EndpointModel,
        service: str,
        asks: Sequence[Ask],
        served: Sequence[Ask],
        on_breaker: OnBreaker,
        loader: Loader,
    ) -> None:
        self.service, self.name, self.zone = service, endpoint.name, endpoint.zone
        self._loader = loader
        self._asks, self._served, self._on_breaker = asks, served, on_breaker
        self.past: list[Cluster] = []  # of processes that have ended, for their counts
        self.state = ClusterState()
        self.restart()

    def restart(self) -> None:
        """A new process knows nothing."""
        for cluster in self.state:
            for endpoint in cluster.endpoints.values():
                if endpoint.breaker.tripped or endpoint.ejected:
                    self._on_breaker(self, endpoint, ENDED)
            cluster.outliers = None
        self.past += self.state
        self.state = ClusterState()
        self._buckets: dict[RateLimit, Limiter] = {}
        self._balancers: dict[tuple[str, str], Balancing] = {}
        self.routes: dict[int, RoutePlan | None] = {}
        self.faults: dict[int, Fault] = {}
        self.limits: dict[int, tuple[Limiter, str]] = {}
        self.gate: Gate | None = None

    def apply(self, snapshot: Snapshot, now: float) -> None:
        """Serve by this policy. Raises PlanError."""
        around = Surroundings(
            own=self.service,
            trust_domain="mesh.local",
            apps={},
            sticky_key=b"",
            chain=lambda side, service, route: None,
            stats=lambda side, service, route, version: None,
            on_breaker=self._changed,
            on_outlier=self._changed,
            on_panic=self._panicked,
            balancer=self._balancer,
            zone=self.zone,
        )
        self.plans, stale = compile_plans(snapshot, around, self.state, now)
        for endpoint in stale:
            if endpoint.breaker.tripped or endpoint.ejected:
                self._on_breaker(self, endpoint, GONE)
        self._find_routes(snapshot)
        self._find_limits(snapshot)
        self.gate = self.state.gates.get(self.service)

    def _balancer(self, service: Service) -> Balancing:
        """The one that runs already, if it is named in the same way; else a new one."""
        try:
            prepared = self._loader.balancer(service)
            key = (service.name, prepared.key)
            found = self._balancers.get(key)
            if found is None:
                found = self._balancers[key] = prepared.make(lambda text: None)
        except PluginError as error:
            raise PlanError([(error.source, error.text)]) from error
        return found

    def _changed(self, cluster: Cluster, endpoint: Endpoint, text: str) -> None:
        self._on_breaker(self, endpoint, text)

    def _panicked(self, cluster: Cluster, text: str) -> None:
        for endpoint in cluster.endpoints.values():
            self._on_breaker(self, endpoint, text)
            return  # it is the service's, and any of its endpoints tells which that is

    def clusters(self, service: str) -> list[Cluster]:
        """What it has had of one upstream service."""
        return [each for each in (*self.past, *self.state) if each.side == "out" and each.name == service]

    def _find_routes(self, snapshot: Snapshot) -> None:
        self.routes, self.faults = {}, {}
        for ask in self._asks:
            service = self.plans.outbound[ask.to.encode()]
            plan = service.table.find(ask.method, ask.target, ask.headers, self.service)
            self.routes[ask.number] = plan
            if plan is not None:
                route = next(each for each in snapshot.services[ask.to].routes if each.name == plan.name)
                if route.fault is not None:
                    self.faults[ask.number] = route.fault

    def _find_limits(self, snapshot: Snapshot) -> None:
        self.limits = {}
        for ask in self._served:
            for port in self.plans.inbound.values():
                if port.http is None:
                    continue
                plan = port.http.table.find(ask.method, ask.target, ask.headers, ask.edge.caller)
                routes = snapshot.services[self.service].routes
                limit = next((each.rate_limit for each in routes if plan is not None and each.name == plan.name), None)
                if limit is not None:
                    same = replace(limit, source=BUILT_IN)
                    bucket = self._buckets.get(same)
                    if bucket is None:
                        made = make(limit.requests, limit.per_s, limit.burst, limit.algorithm)
                        bucket = self._buckets[same] = made
                    self.limits[ask.number] = bucket, limit.key or ""
                break


def key_of(key: str, ask: Ask, caller: Sidecar) -> str:
    """Whose bucket a request takes from; as the filter `rate-limit` has it."""
    if key == "caller":
        return caller.service
    if key == "address":
        return caller.name
    if key.startswith("header:"):
        wanted = key.removeprefix("header:").encode().lower()
        return "\n".join(value.decode("latin-1") for name, value in ask.headers if name == wanted)
    return ""
