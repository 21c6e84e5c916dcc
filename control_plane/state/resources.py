"""What sidecars are sent: resources with versions, and which of them each sidecar needs.

A resource is a name, JSON data and a version made of that data alone, so that two replicas agree and a sidecar that
comes back is sent only what differs. Endpoints stand apart from policy: one that flaps resends no policy. Of other
services a sidecar gets the caller's view: what the callee's own sidecar enforces is left out. Pure.
Invariant: a resource whose data did not change is the same object.
"""

import hashlib
import json
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from sys import intern

from sidecar.model.canonical import service_policy_to_json, value_to_json
from sidecar.model.snapshot import EndpointSpec, Route, Service

BUNDLE, BANS, NAMES = "bundle", "bans", "names"
ENDPOINTS, SERVICE, OWN = "endpoints/", "service/", "own/"
SHARE = "share"  # each sidecar has its own
COOKIES = "cookies"  # each service has its own


@dataclass(frozen=True, slots=True)
class Resource:
    """`line` is what goes over the wire, made once for all who get it. `name` and `version` are interned: every stream
    holds them."""

    name: str
    version: str
    line: bytes


def resource(name: str, data: object) -> Resource:
    content = json.dumps(data, separators=(",", ":"), sort_keys=True).encode()
    version = hashlib.sha256(content).hexdigest()[:16]
    line = b'{"name":%b,"version":"%b","data":%b}' % (json.dumps(name).encode(), version.encode(), content)
    return Resource(intern(name), intern(version), line)


class Resources:
    """All resources of a mesh. An own view stands under `own/<name>` and is sent as `service/<name>`."""

    def __init__(self) -> None:
        self.held: dict[str, Resource] = {}
        self.services: Mapping[str, Service] = {}

    def put(self, key: str, data: object, name: str | None = None) -> bool:
        """Whether it has changed."""
        fresh = resource(name or key, data)
        old = self.held.get(key)
        if old is not None and old.version == fresh.version:
            return False
        self.held[key] = fresh
        return True

    def put_endpoints(self, service: str, endpoints: Iterable[EndpointSpec]) -> bool:
        return self.put(ENDPOINTS + service, [value_to_json(each) for each in endpoints])

    def put_services(self, services: Mapping[str, Service]) -> set[str]:
        """Bring the policy up to date; the keys of what has changed. A service that is the same object is not looked
        into."""
        changed: set[str] = set()
        for name, service in services.items():
            if self.services.get(name) is service:
                continue
            if self.put(OWN + name, service_policy_to_json(service), SERVICE + name):
                changed.add(OWN + name)
            if self.put(SERVICE + name, service_policy_to_json(callers_view(service))):
                changed.add(SERVICE + name)
        for name in self.services.keys() - services.keys():
            for key in (OWN + name, SERVICE + name, ENDPOINTS + name):
                if self.held.pop(key, None) is not None:
                    changed.add(key)
        if self.services.keys() != services.keys() and self.put(NAMES, sorted(services)):
            changed.add(NAMES)
        self.services = services
        return changed

    def needed(self, own: str, uses: Collection[str], everything: bool) -> set[str]:
        """The services that a sidecar is sent: its own, those it calls or uses, and those that these
        fall back or mirror to."""
        if everything:
            return set(self.services)
        service = self.services.get(own)
        wanted = deque((own, *uses, *(service.calls if service is not None else ())))
        found: set[str] = set()
        while wanted:
            name = wanted.popleft()
            if name in found or name not in self.services:
                continue
            found.add(name)
            wanted.extend(_led_to(self.services[name]))
        return found

    def of(self, own: str, uses: Collection[str], everything: bool) -> Iterator[Resource]:
        """What a sidecar should hold, in the order in which it must be told: nothing is named before it is there."""
        held = self.held
        needed = sorted(self.needed(own, uses, everything))
        keys = [BUNDLE, BANS, NAMES, *(ENDPOINTS + name for name in needed)]
        keys += [(OWN if name == own else SERVICE) + name for name in needed]
        return (held[key] for key in keys if key in held)


def callers_view(service: Service) -> Service:
    """What a caller's sidecar needs of a service: nothing of what the callee enforces, nor of whom it calls."""
    return replace(
        service,
        authz=(),
        calls={},
        owners=(),
        health=None,
        concurrency=None,
        provenance={},
        routes=tuple(_callers_route(route) for route in service.routes),
    )


def _callers_route(route: Route) -> Route:
    filters = tuple(each for each in route.filters if each.side == "out")
    return replace(route, authz=(), rate_limit=None, filters=filters, provenance={})


def _led_to(service: Service) -> Iterator[str]:
    """Other services that a caller's sidecar turns to by itself."""
    for route in service.routes:
        if route.fallback is not None and route.fallback.service is not None:
            yield route.fallback.service
        if route.mirror is not None and route.mirror.service is not None:
            yield route.mirror.service
