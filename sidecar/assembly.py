"""From a policy to running plans: filters are found, made and opened, plans compiled, the old ones retired.

A new policy is started completely before the old one stops; where anything in it fails, it is refused as a whole and
the old one serves on. A filter whose use has not changed goes on with its state (the buckets of a rate limit, say).
Must not know files or sockets. Invariants: after `apply` returns or raises, every open filter belongs to the plans in
force or is being closed; a filter is closed only when no request uses it, or 30 s later.
"""

import hashlib
import logging
import math
import random
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import trio

from sidecar.api import Counter as FilterCounter
from sidecar.api import FilterBase, FilterContext
from sidecar.model.snapshot import Route, Service, Snapshot
from sidecar.model.source import Source
from sidecar.plugins.builtin import uses
from sidecar.plugins.loader import Loader, PluginError, Prepared, describe
from sidecar.policy.balancing import Balancing
from sidecar.policy.cluster import Cluster
from sidecar.policy.endpoint import Endpoint
from sidecar.policy.limits import Limits
from sidecar.policy.plan import PlanError, Surroundings, compile_plans
from sidecar.policy.sticky import Former
from sidecar.proxy.filtering import Chain, Link
from sidecar.telemetry.events import Events

if TYPE_CHECKING:
    from sidecar.proxy.world import World

log = logging.getLogger(__name__)

RETIRE_S = 30.0
OPEN_S = 10.0
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

FilterKey = tuple[str, str, str]


@dataclass(slots=True)
class _Running:
    """A filter and the place in the policy that asked for it."""

    filter: FilterBase
    context: FilterContext
    prepared: Prepared


class Assembly:
    """Owns the filters of one sidecar and swaps its plans."""

    def __init__(
        self,
        world: "World",
        loader: Loader,
        own: str,
        apps: Mapping[str, tuple[str, int]],
        sticky_key: bytes,
        zone: str = "",
    ) -> None:
        self.world, self.loader = world, loader
        self.own, self.apps, self.zone = own, apps, zone
        self._own_sticky_key = self.sticky_key = sticky_key
        self.sticky_former: Former = ()
        self.balancers: dict[tuple[str, str], Balancing] = {}  # by service, and by name and settings
        self._next_balancers: dict[tuple[str, str], Balancing] = {}
        self.events = Events(world.epoch)
        self.limits = Limits()
        self.running: dict[FilterKey, _Running] = {}
        self._next: dict[FilterKey, _Running] = {}

    async def apply(self, snapshot: Snapshot) -> None:
        """Serve by this snapshot from now on. Raises PlanError, with nothing changed, where it cannot be served."""
        world = self.world
        self._next = {}
        self._next_balancers = {}
        around = Surroundings(
            own=self.own,
            trust_domain=world.identity.current.trust_domain,
            apps=self.apps,
            sticky_key=self.sticky_key,
            chain=self._chain,
            stats=lambda side, service, route, version: world.registry.requests(
                side=side, service=service, route=route, version=version
            ),
            on_breaker=self._on_breaker,
            on_panic=self._on_panic,
            on_outlier=self._on_outlier,
            balancer=self._balancer,
            zone=self.zone,
            on_overload=self._on_overload,
            rnd=random.random,
            sticky_former=self.sticky_former,
        )
        fresh = await self._open_new(snapshot)
        try:
            plans, stale = compile_plans(snapshot, around, world.state, world.clock())
        except PlanError:
            await _close_all(fresh)
            raise
        old_chains, old = world.plans.chains, self.running
        self.running = self._next
        self.balancers = self._next_balancers
        world.swap(plans, stale)
        world.registry.swapped()
        world.reactor.call(world.woken)
        unused = [running for key, running in old.items() if key not in self.running]
        if unused:
            world.nursery.start_soon(self._retire, old_chains, unused)

    def stick(self, key: bytes, former: Former) -> None:
        """With the next `apply` sticky cookies are made with this key, which all instances of our service have. Those
        that we made with our own before we were told are honoured on."""
        self.sticky_key, self.sticky_former = key, (*former, (self._own_sticky_key, math.inf))

    async def aclose(self) -> None:
        """Close every filter: the sidecar ends."""
        running, self.running = self.running, {}
        await _close_all(running.values())

    def names(self) -> list[str]:
        """The filters that run, for people: side, service and name."""
        return sorted(
            {f"{side} {service} {running.prepared.name}" for (side, service, _), running in self.running.items()}
        )

    # -- filters

    async def _open_new(self, snapshot: Snapshot) -> list[_Running]:
        """Find, make and open every filter that is not yet running; all or nothing."""
        problems: list[tuple[Source, str]] = []
        opened: list[_Running] = []
        for side, service, route in self._sides(snapshot):
            for use in uses(route, side):
                try:
                    prepared = self.loader.prepare(use)
                    key = (side, service.name, prepared.key)
                    if key in self._next:
                        continue
                    running = self.running.get(key)
                    if running is None:
                        running = _Running(prepared.make(), self._context(side, service.name, prepared.name), prepared)
                        opened.append(running)
                    self._next[key] = running
                except PluginError as error:
                    problems.append((error.source, error.text))
        begun: list[_Running] = []
        for running in opened:
            if problems:
                break
            begun.append(running)
            problem = await _open(running)
            if problem is not None:
                problems.append((running.prepared.use.source, problem))
        if problems:
            await _close_all(begun)
            raise PlanError(list(dict.fromkeys(problems)))
        return opened

    def _sides(self, snapshot: Snapshot) -> Iterable[tuple[str, Service, Route]]:
        for service in snapshot.services.values():
            for route in service.routes:
                yield "out", service, route
                if service.name == self.own:
                    yield "in", service, route

    def _chain(self, side: str, service: Service, route: Route) -> Chain | None:
        links = []
        for use in uses(route, side):
            prepared = self.loader.prepare(use)
            running = self._next[side, service.name, prepared.key]
            links.append(Link(running.filter, prepared.name, not prepared.fails_open, running.context))
        if not links:
            return None
        return Chain(links, self.world.meters.service(side, service.name), self.world.note)

    def _context(self, side: str, service: str, name: str) -> FilterContext:
        registry = self.world.registry

        def note(level: str, text: str) -> None:
            log.log(LEVELS.get(level, logging.INFO), "filter %s: %s", name, text)

        def counter(short: str, help_text: str) -> FilterCounter:
            return registry.counter(f"pillion_filter_{short}_total", help_text, side=side, service=service)

        return FilterContext(
            service=service,
            side=side,
            clock=self.world.clock,
            random=random.random,
            log=note,
            counter=counter,
            limiter=self.limits.limiter,
            sleep=trio.sleep,
        )

    async def _retire(self, chains: Iterable[Chain], unused: list[_Running]) -> None:
        gone = {id(running.filter) for running in unused}
        using = [chain for chain in chains if any(id(link.filter) in gone for link in chain.links)]
        with trio.move_on_after(RETIRE_S):
            while any(chain.active > 0 for chain in using):  # noqa: ASYNC110
                await trio.sleep(0.1)  # rare and bounded: not worth an event on the data path
        await _close_all(unused)

    # -- balancers

    def _balancer(self, service: Service) -> Balancing:
        """The balancer that runs already, if it is named in the same way; else a new one."""
        try:
            prepared = self.loader.balancer(service)
            key = (service.name, prepared.key)
            found = self.balancers.get(key)
            if found is None:
                found = prepared.make(partial(self._balancer_failed, service.name, prepared.name))
        except PluginError as error:
            raise PlanError([(error.source, error.text)]) from error
        self._next_balancers[key] = found
        return found

    def _balancer_failed(self, service: str, name: str, text: str) -> None:
        self.world.meters.service("out", service).balancer_errors.inc()
        self.world.note(f"balancer {service}", f"balancer {name} of {service}: {text}")

    # -- what happens to endpoints

    def _on_panic(self, cluster: Cluster, text: str) -> None:
        self.events.add("panic", cluster.name, "", text)
        log.warning("%s: %s", cluster.name, text)

    def _on_overload(self, service: str, text: str) -> None:
        self.events.add("overload", service, "", text)
        log.warning("overload of %s: %s", service, text)

    def _on_outlier(self, cluster: Cluster, endpoint: Endpoint, text: str) -> None:
        if endpoint.ejected and text.startswith("ejected"):
            self.world.meters.endpoint(cluster.name, endpoint.key).ejections.inc()
        endpoint.note(self.events.add("outlier", cluster.name, endpoint.key, text))
        log.warning("outlier of %s at %s: %s", cluster.name, endpoint.key, text)

    def _on_breaker(self, cluster: Cluster, endpoint: Endpoint, text: str) -> None:
        meters = self.world.meters.endpoint(cluster.name, endpoint.key)
        state = text.partition(" ")[0].rstrip(":")
        meters.breaker_state.value = {"closed": 0, "half-open": 1, "open": 2}.get(state, 0)
        if state == "open":
            meters.breaker_openings.inc()
        endpoint.note(self.events.add("breaker", cluster.name, endpoint.key, text))
        log.info("breaker of %s at %s: %s", cluster.name, endpoint.key, text)


async def _open(running: _Running) -> str | None:
    """Open one filter; what is wrong, or None."""
    name = running.prepared.name
    try:
        with trio.fail_after(OPEN_S):
            await running.filter.open(running.context)
    except trio.TooSlowError:
        return f'filter "{name}" did not open within {OPEN_S:g} s'
    except Exception as error:
        return f'filter "{name}" could not be opened: {describe(error)}'
    return None


async def _close_all(all_running: Iterable[_Running]) -> None:
    for running in all_running:
        try:
            with trio.move_on_after(OPEN_S, shield=True):
                await running.filter.aclose()
        except Exception:
            log.warning("filter %s: aclose raised\n%s", running.prepared.name, traceback.format_exc())


def sticky_key_from(key_pem: bytes) -> bytes:
    """The key of sticky cookies: instances that share an identity accept one another's."""
    return hashlib.sha256(b"pillion sticky cookies\0" + key_pem).digest()
