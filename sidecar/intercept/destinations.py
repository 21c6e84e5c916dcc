"""Which service a captured connection is for: (address, port) -> (service, port), built from a snapshot.

An endpoint at address A of a service that declares port number P is meant by (A, P), where the application would
listen, and by (A, endpoint.port), where its sidecar does. Pure: names are resolved elsewhere and passed in, and it
never sees a socket. Invariants: a destination that two services claim is refused, never given to one of them by
chance; a connection that nobody redirected is refused as a loop.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv6Address, ip_address

from sidecar.model.snapshot import Port, Protocol, Service, Snapshot

Address = tuple[str, int]
"""A canonical address and a port."""


class Way(Enum):
    """What becomes of a captured connection."""

    HTTP = "http"  # to the HTTP driver, for Decision.service and Decision.port
    TCP = "tcp"  # a tunnel, for Decision.service and Decision.port
    PASSTHROUGH = "passthrough"  # copied to Decision.original as it is
    REFUSED = "refused"
    LOOP = "loop"  # its destination is the sidecar itself: refused


@dataclass(frozen=True, slots=True)
class Target:
    """A port of a service."""

    service: str
    port: Port


@dataclass(frozen=True, slots=True)
class Decision:
    """`reason` is for log and metrics; empty where a service was found."""

    way: Way
    original: Address | None = None
    target: Target | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Conflict:
    """A destination that more than one port claims."""

    address: Address
    claims: tuple[Target, ...]

    def __str__(self) -> str:
        return f"{join(self.address)} is claimed by " + " and ".join(f"{t.service}/{t.port.name}" for t in self.claims)


def canonical(host: str) -> str:
    """One spelling for one address: lower case, shortest form, IPv4 where IPv6 only wraps it, without a zone.

    Raises ValueError for a name."""
    address = ip_address(host)
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        if address.scope_id is not None:
            return str(IPv6Address(int(address)))
    return str(address)


def join(address: Address) -> str:
    """`10.0.0.1:80` or `[fd00::1]:80`."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class DestinationMap:
    """Built anew from each snapshot; reading it costs one look-up.

    `resolved` gives the addresses of endpoints whose host is a name; names it does not hold are in `unresolved`.
    `conflicts` is for the log: what the snapshot says twice.
    """

    __slots__ = ("_claimed", "_own", "conflicts", "own_service", "unresolved")

    def __init__(
        self, snapshot: Snapshot, own_service: str | None, resolved: Mapping[str, tuple[str, ...]] | None = None
    ) -> None:
        own = snapshot.services.get(own_service) if own_service is not None else None
        self.own_service = own_service
        self._own: dict[int, Port] = {port.number: port for port in own.ports} if own is not None else {}
        unresolved: set[str] = set()
        exact: dict[Address, tuple[Target, ...]] = {}
        declared: dict[Address, tuple[Target, ...]] = {}
        for service in snapshot.services.values():
            _claim(service, resolved or {}, exact, declared, unresolved)
        # Where a sidecar or server is said to be (an endpoint's own port) beats where an application is inferred.
        self._claimed = declared | exact
        self.unresolved = tuple(sorted(unresolved))
        self.conflicts = tuple(
            Conflict(address, claims) for address, claims in sorted(self._claimed.items()) if len(claims) > 1
        )

    def __len__(self) -> int:
        return len(self._claimed)

    def find(self, host: str, port: int) -> Target | None:
        """The one port of a service at this destination, or None (unknown, or claimed twice)."""
        claims = self._claimed.get((canonical(host), port), ())
        return claims[0] if len(claims) == 1 else None

    def outbound(self, original: Address | None, arrived: Address, strict: bool = False) -> Decision:
        """What becomes of a connection accepted at `arrived` on the transparent outbound port."""
        if original is None or original == arrived:
            return _loop(arrived)
        claims = self._claimed.get(original, ())
        if len(claims) == 1:
            return Decision(_WAY[claims[0].port.protocol], original, claims[0])
        if claims:
            return Decision(Way.REFUSED, original, reason=f"ambiguous destination: {Conflict(original, claims)}")
        if strict:
            return Decision(Way.REFUSED, original, reason=f"unknown destination {join(original)}")
        return Decision(Way.PASSTHROUGH, original, reason=f"unknown destination {join(original)}")

    def inbound(self, original: Address | None, arrived: Address) -> Decision:
        """Which of the own service's ports a connection to the inbound port was meant for.

        LOOP: it was made to the inbound port itself, the ordinary case between sidecars; SNI then names the port.
        REFUSED: it was meant for a port that the service does not declare. Whether a connection without mutual TLS
        is admitted at all is not decided here."""
        if original is None or original == arrived:
            return _loop(arrived)
        port = self._own.get(original[1])
        if port is None:
            reason = f"port {original[1]} is not a declared port of {self.own_service}"
            return Decision(Way.REFUSED, original, reason=reason)
        assert self.own_service is not None
        return Decision(_WAY[port.protocol], original, Target(self.own_service, port))


_WAY = {protocol: Way.HTTP if protocol.is_http else Way.TCP for protocol in Protocol}


def _loop(arrived: Address) -> Decision:
    reason = f"the original destination is the sidecar itself ({join(arrived)}): nothing redirected this connection"
    return Decision(Way.LOOP, reason=reason)


def _claim(
    service: Service,
    resolved: Mapping[str, tuple[str, ...]],
    exact: dict[Address, tuple[Target, ...]],
    declared: dict[Address, tuple[Target, ...]],
    unresolved: set[str],
) -> None:
    if not service.ports:
        return
    # One tuple for each port, shared by all endpoints: there may be ten thousand.
    alone = {port.number: (Target(service.name, port),) for port in service.ports}
    first = alone[service.ports[0].number]
    for endpoint in service.endpoints:
        for address in _addresses(endpoint.host, resolved, unresolved):
            for number, claim in alone.items():
                _add(declared, (address, number), claim)
            # A sidecar's port carries every port of the service: nothing in (A, endpoint.port) says which is meant,
            # so it is the first, as for a name without a port.
            _add(exact, (address, endpoint.port), alone.get(endpoint.port, first))


def _addresses(host: str, resolved: Mapping[str, tuple[str, ...]], unresolved: set[str]) -> tuple[str, ...]:
    known = resolved.get(host)
    if known is not None:
        return tuple(map(canonical, known))
    try:
        return (canonical(host),)
    except ValueError:
        unresolved.add(host)
        return ()


def _add(claims: dict[Address, tuple[Target, ...]], address: Address, claim: tuple[Target]) -> None:
    known = claims.setdefault(address, claim)
    if known is not claim and claim[0] not in known:
        claims[address] = (*known, *claim)
