"""What a scenario says, as frozen values: services with their models, outages, load, objectives.

Complete and resolved: every service names its endpoints, every outage the endpoints it hits, every duration is in
seconds, every share between 0 and 1. Pure data; must not know files or policies. Invariant: whoever holds a Scenario
needs nothing else but a policy's Snapshot and a seed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from sidecar.model.snapshot import EndpointSpec
from sidecar.model.source import BUILT_IN, Source

RESET, HANG = 0, -1
"""In place of a status: the application drops the connection, or never answers."""

PANELS = (
    "success",
    "in-flight",
    "open-breakers",
    "p50",
    "p99",
    "requests",
    "attempts",
    "retries",
    "groups",
    "endpoints",
    "ejected",
)
"""What a picture can show."""


@dataclass(frozen=True, slots=True)
class Latency:
    """`kind` fixed: always `a`; uniform: between `a` and `b`; lognormal: median `a`, and 1 in 100 takes `b` or more."""

    kind: str
    a: float
    b: float = 0.0


@dataclass(frozen=True, slots=True)
class Errors:
    """A share of requests answered by one of `statuses`, each as likely; `latency` None: as long as a success takes."""

    rate: float = 0.0
    statuses: tuple[int, ...] = (500,)
    latency: Latency | None = None
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Capacity:
    """How many requests an endpoint works on at a time, how many wait, and what the others are answered."""

    concurrency: int
    queue: int = 0
    status: int = 503


@dataclass(frozen=True, slots=True)
class ColdStart:
    """After its start an endpoint is `slowdown` times as slow, falling evenly to 1 within `for_s`."""

    for_s: float
    slowdown: float


@dataclass(frozen=True, slots=True)
class Step:
    """A call that the application makes, after its own work and before its answer. `status`: what it answers where the
    call fails; 0: it does not mind."""

    to: str
    method: bytes = b"GET"
    target: bytes = b"/"
    headers: tuple[tuple[bytes, bytes], ...] = ()
    times: int = 1
    share: float = 1.0
    status: int = 500


@dataclass(frozen=True, slots=True)
class Behaviour:
    latency: Latency = Latency("fixed", 0.0)
    errors: Errors | None = None
    capacity: Capacity | None = None
    cold_start: ColdStart | None = None


@dataclass(frozen=True, slots=True)
class EndpointModel:
    """One instance of a service: application and sidecar. Serves from `starts_s` on, until `ends_s`."""

    name: str
    spec: EndpointSpec
    behaviour: Behaviour
    zone: str = ""
    starts_s: float = 0.0
    ends_s: float | None = None


@dataclass(frozen=True, slots=True)
class ServiceModel:
    """`steps`: the calls of one request. `propagates`: whether its application passes the trace context on, so that
    deadlines and attempts travel. `stops`: whether it stops working when its caller has gone."""

    name: str
    endpoints: tuple[EndpointModel, ...]
    steps: tuple[Step, ...] = ()
    propagates: bool = True
    stops: bool = False


class Down(Enum):
    REFUSED = "refused"  # the machine says so at once: the process is gone
    SILENT = "silent"  # nobody answers: the machine or its network is gone


@dataclass(frozen=True, slots=True)
class Outage:
    """From `at_s` until `ends_s` these endpoints are otherwise than stated; what is None is as stated. `unhealthy`:
    their own health checks fail, whatever they answer to others."""

    at_s: float
    ends_s: float
    service: str
    endpoints: tuple[str, ...]
    label: str
    latency: Latency | None = None
    slowdown: float | None = None
    errors: Errors | None = None
    down: Down | None = None
    unhealthy: bool = False


@dataclass(frozen=True, slots=True)
class Shape:
    """One kind of request, with its share of a load."""

    method: bytes = b"GET"
    target: bytes = b"/"
    headers: tuple[tuple[bytes, bytes], ...] = ()
    weight: int = 1


@dataclass(frozen=True, slots=True)
class Load:
    """Requests of `caller`'s application to `to`. `points` are (time, requests per second): `ramp` joins them by
    straight lines, otherwise each holds until the next. `even`: evenly spaced, otherwise as a Poisson process."""

    caller: str
    to: str
    points: tuple[tuple[float, float], ...]
    ramp: bool = False
    even: bool = False
    shapes: tuple[Shape, ...] = (Shape(),)


@dataclass(frozen=True, slots=True)
class Objective:
    """`metric` is a key of `objectives`; `bound` its limit, a share, seconds or a number. Of calls to `service`, or of
    the load; of requests that began within `after_s` and `before_s`."""

    metric: str
    bound: float
    service: str | None = None
    after_s: float = 0.0
    before_s: float | None = None
    source: Source = field(default=BUILT_IN, compare=False)


@dataclass(frozen=True, slots=True)
class Scenario:
    """`network_s`: between any two services, there and back, sidecars included. `discovery_s`: until callers hear of an
    endpoint that comes or goes in good order; `lease_s`: until they hear of one that is lost."""

    name: str
    services: Mapping[str, ServiceModel]
    load: tuple[Load, ...]
    outages: tuple[Outage, ...] = ()
    objectives: tuple[Objective, ...] = ()
    picture: tuple[str, ...] = PANELS[:3]
    duration_s: float = 60.0
    seed: int = 1
    network_s: float = 0.0005
    discovery_s: float = 1.0
    lease_s: float = 15.0
