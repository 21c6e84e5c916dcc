"""One address of a service, with everything that outlives a policy: requests in flight, breaker, pool, counters.

Balancers and subsets come and go with each policy; an Endpoint is kept by its key and handed to the next ones. Must not
know how connections are made: `idle`, `dials` and `muxes` belong to the proxy, which alone looks into them.
"""

from collections.abc import Mapping
from typing import Any

from sidecar.model.snapshot import CircuitBreaker, EndpointSpec, Tls

from .breaker import Breaker

UNIX = "unix:"
EVENTS_MAX = 4


def endpoint_key(host: str, port: int) -> str:
    """host:port, with brackets where the host is an IPv6 address; `unix:/path` as it is."""
    if host.startswith(UNIX):
        return host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Endpoint:
    """`active` counts attempts in flight and is written by the exchange alone. `healthy` is what balancing goes by:
    what the snapshot last said of it (`stated_healthy`), and not `ejected` as an outlier. `identity` is the SPIFFE ID
    that must answer, `sni` the server name to ask for; whoever knows the service completes them. `http2`: the
    application there speaks HTTP/2 without being asked; between sidecars it says nothing. `weight` is what balancers go
    by: the stated one, or less while the endpoint starts slowly; `memo` is the balancer's."""

    __slots__ = (
        "active",
        "address",
        "breaker",
        "dials",
        "ejected",
        "events",
        "failures",
        "healthy",
        "host",
        "http2",
        "identity",
        "idle",
        "key",
        "labels",
        "memo",
        "mesh",
        "muxes",
        "port",
        "priority",
        "sni",
        "stated_healthy",
        "stated_weight",
        "successes",
        "throttled",
        "tls",
        "version",
        "weight",
        "zone",
    )

    def __init__(self, spec: EndpointSpec, circuit_breaker: CircuitBreaker = CircuitBreaker()) -> None:  # noqa: B008
        self.host = spec.host
        self.port = spec.port
        self.address = (spec.host, spec.port)
        self.key = endpoint_key(spec.host, spec.port)
        self.labels: Mapping[str, str] = spec.labels
        self.stated_weight = spec.weight
        self.weight = float(spec.weight)
        self.zone, self.priority = spec.zone, spec.priority
        self.memo: Any = None
        self.tls: Tls = spec.tls
        self.identity = spec.identity
        self.mesh = spec.tls is Tls.MESH
        self.http2 = False
        self.sni = ""
        self.version = ""
        self.active = 0
        self.breaker = Breaker(circuit_breaker)
        self.idle: list[Any] = []  # last in, first out, so that spare connections age and close
        self.dials: Any = None  # the connections being made, likewise the proxy's
        self.muxes: Any = None  # the multiplexed ones, and who waits for them
        self.healthy = self.stated_healthy = spec.healthy
        self.ejected = False
        self.successes = 0
        self.failures = 0
        self.events: tuple[str, ...] = ()  # what has happened to it, for people, the latest first
        self.throttled = 0  # 429 and RESOURCE_EXHAUSTED: neither of the two

    @property
    def placeholder(self) -> bool:
        """Whether this stands for an application that nobody can reach: its service has no port and no address."""
        return not self.port and not self.host.startswith(UNIX)

    def update(self, spec: EndpointSpec) -> None:
        """A new policy names the same address reached in the same way. Health alone changes nothing else."""
        assert (spec.host, spec.port) == self.address and spec.tls is self.tls
        self.labels = spec.labels
        self.stated_weight = spec.weight
        self.weight = float(spec.weight)
        self.zone, self.priority = spec.zone, spec.priority
        self.identity = spec.identity
        self.stated_healthy = spec.healthy
        self.healthy = spec.healthy and not self.ejected

    def eject(self) -> None:
        """It serves worse than its peers, and is left out."""
        self.ejected = True
        self.healthy = False

    def readmit(self) -> None:
        """Its ejection is over; whether it is well is another matter."""
        self.ejected = False
        self.healthy = self.stated_healthy

    def note(self, line: str) -> None:
        """Something has happened to it that people may ask for."""
        self.events = (line, *self.events[: EVENTS_MAX - 1])

    def __repr__(self) -> str:
        return f"<Endpoint {self.key} active={self.active}>"
