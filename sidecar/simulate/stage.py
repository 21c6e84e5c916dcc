"""The stage of a run: every server with its sidecar, what callers know of them, and the script of what goes wrong.

Must not know requests. Invariants: callers hear of a change as late as the scenario says; a sidecar is made anew where
its process starts again.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from sidecar.model.snapshot import Health, Snapshot
from sidecar.plugins.loader import Loader
from sidecar.policy.cluster import Cluster
from sidecar.policy.endpoint import endpoint_key

from .life import Ask
from .record import Edge
from .scenario import Down, EndpointModel, Load, Outage, Scenario, Step
from .server import Server
from .sidecars import OnBreaker, Sidecar

if TYPE_CHECKING:
    from .life import Attempt

Change = Callable[[float], "list[Attempt] | None"]


class Stage:
    """`servers` by the endpoint's key, `edges` by (caller, callee)."""

    def __init__(
        self, scenario: Scenario, snapshot: Snapshot, rnd: random.Random, on_breaker: OnBreaker, buckets: int
    ) -> None:
        self.scenario, self.snapshot = scenario, snapshot
        self._rnd = rnd
        self._loader = Loader()
        self._buckets = buckets
        self.edges: dict[tuple[str, str], Edge] = {}
        self._asks: list[Ask] = []
        self.load_asks = [self._asks_of_load(load) for load in scenario.load]
        self._steps = {
            name: [ask for step in model.steps for ask in [self._ask_of_step(name, step)] * step.times]
            for name, model in scenario.services.items()
        }
        self.servers: dict[str, Server] = {}
        self._by_name: dict[str, Server] = {}
        self._of: dict[str, list[Server]] = {}
        self._known: dict[str, None] = {}  # the endpoints that callers know of
        self._ill: dict[str, int] = {}  # those that callers know to be unhealthy; by how many outages
        self._live: dict[str, list[Sidecar]] = {}
        for name, model in scenario.services.items():
            for endpoint in model.endpoints:
                server = Server(endpoint, model, endpoint_key(endpoint.spec.host, endpoint.spec.port), rnd, buckets)
                server.steps = self._steps[name]
                server.sidecar = self._sidecar(endpoint, name, on_breaker)
                self.servers[server.key] = self._by_name[endpoint.name] = server
                self._of.setdefault(name, []).append(server)
                if endpoint.starts_s <= 0.0:
                    self._known[endpoint.name] = None
        for outage in scenario.outages:
            if outage.down is not None:
                for each in outage.endpoints:
                    self._by_name[each].running = {}

    # -- who asks for what

    def _edge(self, caller: str, to: str, root: bool) -> Edge:
        edge = self.edges.get((caller, to))
        if edge is None:
            edge = self.edges[caller, to] = Edge(caller, to, root, self._buckets)
        edge.root = edge.root or root
        return edge

    def _asks_of_load(self, load: Load) -> list[Ask]:
        found = []
        for shape in load.shapes:
            ask = Ask(len(self._asks), load.to, shape.method, shape.target, shape.headers)
            ask.edge = self._edge(load.caller, load.to, True)
            self._asks.append(ask)
            found.append(ask)
        return found

    def _ask_of_step(self, caller: str, step: Step) -> Ask:
        ask = Ask.of_step(len(self._asks), step)
        ask.edge = self._edge(caller, step.to, False)
        self._asks.append(ask)
        return ask

    def _sidecar(self, endpoint: EndpointModel, service: str, on_breaker: OnBreaker) -> Sidecar | None:
        """None: it would decide nothing."""
        asks = [ask for ask in self._asks if ask.edge.caller == service]
        policy = self.snapshot.services[service]
        routes = policy.routes
        served = [ask for ask in self._asks if ask.to == service] if any(r.rate_limit for r in routes) else []
        decides = asks or served or policy.concurrency is not None
        return Sidecar(endpoint, service, asks, served, on_breaker, self._loader) if decides else None

    def callers(self, service: str) -> list[Sidecar]:
        """The sidecars of a service whose applications are at work."""
        return self._live[service]

    def of(self, service: str) -> list[Server]:
        """The endpoints of a service, whatever has become of them."""
        return self._of[service]

    def ejecting(self) -> Iterator[Cluster]:
        """What sidecars know of services whose outliers are ejected."""
        for server in self.servers.values():
            for cluster in server.sidecar.state if server.sidecar is not None else ():
                if cluster.outliers is not None:
                    yield cluster

    def on_bucket(self, bucket: int) -> None:
        for edge in self.edges.values():
            edge.carry(bucket)

    # -- what callers know

    def publish(self, now: float) -> None:
        """Every sidecar learns of the endpoints that are known by now."""
        services = dict(self.snapshot.services)
        for name, model in self.scenario.services.items():
            specs = tuple(
                replace(each.spec, healthy=False) if self._ill.get(each.name) else each.spec
                for each in model.endpoints
                if each.name in self._known
            )
            services[name] = replace(services[name], endpoints=specs)
        snapshot = Snapshot(services, self.snapshot.revision)
        for server in self.servers.values():
            if server.sidecar is not None:
                server.sidecar.apply(snapshot, now)
                server.limits = server.sidecar.limits
                server.gate = server.sidecar.gate
        self._count_live(now)

    def _count_live(self, now: float) -> None:
        self._live = {
            name: [s.sidecar for s in servers if s.sidecar is not None and s.down is None and _serves(s, now)]
            for name, servers in self._of.items()
        }

    # -- the script

    def script(self) -> Iterator[tuple[float, Change]]:
        scenario = self.scenario
        for server in self.servers.values():
            model = server.model
            if model.starts_s > 0.0:
                yield model.starts_s, self._count
                yield model.starts_s + scenario.discovery_s, partial(self._know, [server])
            if model.ends_s is not None:
                yield model.ends_s, self._count
                yield model.ends_s + scenario.discovery_s, partial(self._forget, [server])
        for outage in scenario.outages:
            hit = [self._by_name[name] for name in outage.endpoints]
            yield outage.at_s, partial(self._begin, outage, hit)
            yield outage.ends_s, partial(self._end, outage, hit)
            if outage.down is not None and outage.at_s + scenario.lease_s < outage.ends_s:
                yield outage.at_s + scenario.lease_s, partial(self._forget, hit)
                yield outage.ends_s + scenario.discovery_s, partial(self._know, hit)
            if outage.unhealthy:
                yield from self._checks(outage, hit)

    def _checks(self, outage: Outage, hit: list[Server]) -> Iterator[tuple[float, Change]]:
        """When callers hear what their sidecars find out: after so many results in a row, at the latest."""
        for server in hit:
            health = self.snapshot.services[server.service.name].health or Health()
            found_s = outage.at_s + health.unhealthy * health.interval_s
            if found_s <= outage.ends_s:
                well_s = outage.ends_s + health.healthy * health.interval_s
                yield found_s + self.scenario.discovery_s, partial(self._judge, server, 1)
                yield well_s + self.scenario.discovery_s, partial(self._judge, server, -1)

    def _judge(self, server: Server, more: int, now: float) -> None:
        self._ill[server.model.name] = self._ill.get(server.model.name, 0) + more
        self.publish(now)

    def _count(self, now: float) -> None:
        self._count_live(now)

    def _know(self, servers: list[Server], now: float) -> None:
        for server in servers:
            if server.down is None and _serves(server, now):
                self._known[server.model.name] = None
        self.publish(now)

    def _forget(self, servers: list[Server], now: float) -> None:
        for server in servers:
            self._known.pop(server.model.name, None)
        self.publish(now)

    def _begin(self, outage: Outage, servers: list[Server], now: float) -> "list[Attempt]":
        lost: list[Attempt] = []
        for server in servers:
            was = server.down
            server.hits.append(outage)
            server.settle(self._rnd)
            if server.down is not None and was is None:
                lost += server.running or ()
                lost += server.queue
                server.busy = 0
                server.queue.clear()
                server.running = {}
        self._count_live(now)
        return lost

    def _end(self, outage: Outage, servers: list[Server], now: float) -> None:
        for server in servers:
            was = server.down
            server.hits.remove(outage)
            server.settle(self._rnd)
            if was is not None and server.down is None and was is Down.REFUSED:
                server.born = now  # the process starts again
                if server.sidecar is not None:
                    server.sidecar.restart()
        self.publish(now)


def _serves(server: Server, now: float) -> bool:
    model = server.model
    return model.starts_s <= now and (model.ends_s is None or now < model.ends_s)
