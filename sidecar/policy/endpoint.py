"""One address of a service, with everything that outlives a policy: requests in flight, breaker, pool, counters.

Balancers and subsets come and go with each policy; an Endpoint is kept by its key and handed to the next ones. Must not
know how connections are made: `idle` and `dials` belong to the proxy, which alone looks into them.
"""

from collections.abc import Mapping
from typing import Any

from sidecar.model.snapshot import CircuitBreaker, EndpointSpec, Tls

from .breaker import Breaker


def endpoint_key(host: str, port: int) -> str:
    """host:port, with brackets where the host is an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Endpoint:
    """`active` counts attempts in flight and is written by the exchange alone; `healthy` is written by health checks.
    `identity` is the SPIFFE ID that must answer, `sni` the server name to ask for; whoever knows the service completes
    them."""

    __slots__ = (
        "active",
        "address",
        "breaker",
        "dials",
        "failures",
        "healthy",
        "host",
        "identity",
        "idle",
        "key",
        "labels",
        "mesh",
        "port",
        "sni",
        "successes",
        "tls",
        "version",
        "weight",
    )

    def __init__(self, spec: EndpointSpec, circuit_breaker: CircuitBreaker = CircuitBreaker()) -> None:  # noqa: B008
        self.host = spec.host
        self.port = spec.port
        self.address = (spec.host, spec.port)
        self.key = endpoint_key(spec.host, spec.port)
        self.labels: Mapping[str, str] = spec.labels
        self.weight = spec.weight
        self.tls: Tls = spec.tls
        self.identity = spec.identity
        self.mesh = spec.tls is Tls.MESH
        self.sni = ""
        self.version = ""
        self.active = 0
        self.breaker = Breaker(circuit_breaker)
        self.idle: list[Any] = []  # last in, first out, so that spare connections age and close
        self.dials: Any = None  # the connections being made, likewise the proxy's
        self.healthy = True
        self.successes = 0
        self.failures = 0

    def update(self, spec: EndpointSpec) -> None:
        """A new policy names the same address reached in the same way."""
        assert (spec.host, spec.port) == self.address and spec.tls is self.tls
        self.labels = spec.labels
        self.weight = spec.weight
        self.identity = spec.identity

    def __repr__(self) -> str:
        return f"<Endpoint {self.key} active={self.active}>"
