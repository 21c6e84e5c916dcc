"""Warnings of hedges that can never act.

As in lint.py: only what is certain; of a value that several routes inherit one warning, at the place that states it.
"""

from collections.abc import Set

from .problems import Sink
from .snapshot import NONE, Level, Protocol, Route, Service, Snapshot
from .source import Source

_OWN = (Level.SERVICE, Level.ROUTE)
_READING = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})  # RFC 9110, section 9.2.1


def inert_hedges(snapshot: Snapshot, wanted: Set[str], sink: Sink) -> None:
    acting: set[Source] = set()
    inert: dict[Source, tuple[str, str]] = {}
    for service in snapshot.services.values():
        for route in service.routes:
            if route.hedge_after_s == NONE or route.respond is not None or route.redirect is not None:
                continue
            origin = route.provenance["hedge.after"]
            why = _why(service, route)
            if why is None:
                acting.add(origin.source)
            elif origin.level in _OWN and service.name in wanted:
                inert.setdefault(origin.source, why)
    for source, (message, help) in inert.items():
        if source not in acting:
            sink.warning("P0305", message, source, help=help)


def _why(service: Service, route: Route) -> tuple[str, str] | None:
    """Why no request of the route is hedged, and what to do about it; None: some may be."""
    after_s, timeouts, origins = route.hedge_after_s, route.timeouts, route.provenance
    for key, limit_s in (("try", timeouts.try_s), ("total", max(timeouts.total_s, timeouts.of_grpc_s))):
        if after_s >= limit_s:
            stated = origins[f"timeout.{key}"].value
            after = origins["hedge.after"].value
            return f"`hedge.after` ({after}) never comes: `timeout.{key}` is {stated}", "shorten `hedge.after`"
    budget = route.retry.budget
    if not budget.percent and not budget.min_per_second:
        return "`hedge` never acts: `retry.budget` allows nothing", ""
    if route.sticky is not None and route.sticky.level == "endpoint":
        return "`hedge` never acts: `sticky` keeps clients with one endpoint", "remove one of the two"
    addresses = [each for each in service.endpoints if each.weight]
    if len(addresses) == 1:
        return f"`hedge` never acts: `{service.name}` has one address", ""
    allowed = _READING if route.retry.methods is None else route.retry.methods
    asked = route.match.methods
    if asked is None and service.ports and all(port.protocol is Protocol.GRPC for port in service.ports):
        asked = frozenset({"POST"})
    if asked is not None and "any" not in allowed and not asked & allowed:
        names = ", ".join(sorted(asked))
        help = f"say retry.methods: [{names}] if two at a time do no harm"
        return f"`hedge` never acts: {names} may change something", help
    return None
