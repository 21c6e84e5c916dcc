"""What a sidecar serves by: the effective policy of every service, as frozen values.

A Snapshot is complete and validated: merged by precedence (built-in < defaults < service < route < enforced), every
name resolved, every duration in seconds, every limit a number. It is plain data: compiled matchers, breakers and
pools live elsewhere and are built from it. Invariant: two equal policies give equal snapshots.
Sources differ (a file, a control plane), this type does not.
"""

import math
from collections.abc import Mapping
from dataclasses import field
from enum import Enum

from .records import record
from .source import BUILT_IN, Source

NONE = math.inf
"""A duration that never ends ("none" in the policy file)."""


class Protocol(Enum):
    """The protocol of a service's port: what its application speaks. A sidecar takes HTTP/1.1 and HTTP/2 from callers
    on every port that is not `tcp`."""

    HTTP = "http"
    HTTP2 = "http2"  # HTTP/2 alone
    GRPC = "grpc"
    TCP = "tcp"

    @property
    def is_http(self) -> bool:
        """Whether requests are served there; else connections are."""
        return self is not Protocol.TCP

    @property
    def is_http2(self) -> bool:
        """Whether every request reaches the application over HTTP/2."""
        return self is Protocol.GRPC or self is Protocol.HTTP2


class Tls(Enum):
    """How a caller's sidecar reaches an endpoint."""

    MESH = "mesh"  # a sidecar is there: mutual TLS, SPIFFE identity
    ORIGINATE = "originate"  # an ordinary TLS server, checked by host name
    PLAIN = "plain"


class Mtls(Enum):
    """What an inbound listener admits."""

    STRICT = "strict"
    PERMISSIVE = "permissive"
    OFF = "off"


class PathHandling(Enum):
    STRICT = "strict"
    OPAQUE = "opaque"


class Level(Enum):
    """Where an effective value comes from, weakest first."""

    BUILT_IN = "built-in"
    DEFAULTS = "defaults"
    SERVICE = "service"
    ROUTE = "route"
    CALLER = "caller"  # tightened under `calls`
    ENFORCED = "enforced"


@record(frozen=True, slots=True)
class Origin:
    """The provenance of one effective value: its text, its level, its place, and what it overrode (nearest first)."""

    value: str
    level: Level
    source: Source
    overrode: tuple["Origin", ...] = ()


BUILT_IN_TOTAL_S = 15.0


@record(frozen=True, slots=True)
class Timeouts:
    """Seconds; NONE where there is no limit. Meanings: docs/policy.md, Timeouts."""

    total_s: float = BUILT_IN_TOTAL_S
    try_s: float = NONE
    idle_s: float = 300.0
    body_s: float = NONE
    connect_s: float = 5.0
    idle_tcp_s: float = 3600.0  # equals idle_s where the policy states `idle`
    total_grpc_s: float | None = None  # of gRPC calls, where it is not what `of_grpc_s` makes of total_s

    @property
    def of_grpc_s(self) -> float:
        """The whole time of a gRPC call: as other requests, where that is not the built-in one. (`total: 15s` is the
        case that needs a value of its own.)"""
        if self.total_grpc_s is not None:
            return self.total_grpc_s
        return NONE if self.total_s == BUILT_IN_TOTAL_S else self.total_s


@record(frozen=True, slots=True)
class Budget:
    percent: float = 20.0
    min_per_second: float = 1.0


@record(frozen=True, slots=True)
class Retry:
    """`failures` holds the words connect-error, refused-stream, reset, timeout; `statuses` the HTTP status codes;
    `grpc` the codes of gRPC statuses."""

    max_retries: int = 1
    failures: frozenset[str] = frozenset({"connect-error", "refused-stream", "reset"})
    statuses: frozenset[int] = frozenset()
    grpc: frozenset[int] = frozenset()
    methods: frozenset[str] | None = None  # None: the safe ones; "any" is every method
    base_s: float = 0.025
    max_s: float = 0.25
    max_server_delay_s: float = 5.0
    honour_retry_after: bool = True
    budget: Budget = Budget()


@record(frozen=True, slots=True)
class Limits:
    connections: int = 1024
    pending: int = 1024
    requests: int = 1024


@record(frozen=True, slots=True)
class Balancing:
    """What is said of balancing beside the balancer's name. `by`: what hashing balancers go by, header:NAME,
    cookie:NAME, caller or address. `config`: the balancer's own settings, plain JSON data. `zone`: whether endpoints of
    the caller's zone are preferred."""

    by: str | None = None
    config: Mapping[str, object] = field(default_factory=dict)
    zone: str = "prefer"  # or ignore
    slow_start_s: float = 0.0  # 0: none
    panic_threshold: float = 50.0  # percent; 0: never
    source: Source = BUILT_IN


@record(frozen=True, slots=True)
class CircuitBreaker:
    consecutive_failures: int = 7
    open_for_s: float = 1.0
    max_open_s: float = 60.0
    success_rate: float | None = None  # percent


OUTLIER_ENDPOINTS_MIN = 5  # among fewer nobody is an outlier
OUTLIER_REQUESTS_MIN = 100  # in one interval: below that a success rate says little


@record(frozen=True, slots=True)
class Outliers:
    """Statistical ejection: every `interval_s` the success rates of a service's endpoints are compared, of those that
    have had OUTLIER_REQUESTS_MIN requests, if they are OUTLIER_ENDPOINTS_MIN or more."""

    stdev_factor: float = 1.9
    interval_s: float = 10.0
    eject_for_s: float = 30.0
    max_eject_for_s: float = 300.0
    max_ejected: float = 50.0  # percent

    def ejected_max(self, endpoints: int) -> int:
        """How many of so many may be ejected at once: one at least of two or more, unless it is 0 %."""
        if self.max_ejected <= 0.0:
            return 0
        share = math.floor(self.max_ejected * endpoints / 100.0 + 1e-9)
        return max(share, 1) if endpoints > 1 else share


@record(frozen=True, slots=True)
class Health:
    """How a sidecar checks its own application. `http`: the path to ask for; `grpc`: the service to ask for by gRPC's
    health protocol, "" for the server as a whole; neither: it is enough that it accepts a TCP connection. `healthy` and
    `unhealthy`: results in a row that turn the verdict."""

    http: str | None = None
    interval_s: float = 10.0
    timeout_s: float = 2.0
    healthy: int = 2
    unhealthy: int = 3
    grpc: str | None = None


@record(frozen=True, slots=True)
class RateLimit:
    requests: int
    per_s: float
    burst: int
    key: str | None = None  # None, "caller", "address" or "header:NAME"
    source: Source = BUILT_IN
    algorithm: str = "token-bucket"  # or "sliding-window"
    scope: str = "local"  # each instance for itself; or "global"


@record(frozen=True, slots=True)
class ValueMatch:
    """One header or query value: `kind` is exact, prefix, regex or present."""

    kind: str
    value: str = ""


@record(frozen=True, slots=True)
class Priority:
    """A class of requests. None or empty: any; but `default`, which is everything that no class takes."""

    name: str
    callers: frozenset[str] | None = None
    headers: tuple[tuple[str, ValueMatch], ...] = ()


CONCURRENCY_MAX = 1000


@record(frozen=True, slots=True)
class Concurrency:
    """Requests that an instance's application works on at a time, kept by its own sidecar. Not `adaptive`: `most`."""

    adaptive: bool = False
    least: int = 3
    most: int = CONCURRENCY_MAX
    queue: int = 100
    queue_timeout_s: float = 0.1
    priorities: tuple[Priority, ...] = ()  # the highest first
    source: Source = BUILT_IN


@record(frozen=True, slots=True)
class Match:
    """None or empty: matches everything. Paths are globs; header and query names are lower case and exact."""

    path: str | None = None
    path_regex: str | None = None
    methods: frozenset[str] | None = None
    headers: tuple[tuple[str, ValueMatch], ...] = ()
    query: tuple[tuple[str, ValueMatch], ...] = ()
    callers: frozenset[str] | None = None
    cookies: tuple[tuple[str, ValueMatch], ...] = ()  # names are case-sensitive


@record(frozen=True, slots=True)
class Rule:
    """One rule of authorization. None: any. `callers` are service names of the own trust domain or SPIFFE IDs."""

    name: str  # e.g. "services.reviews.authz.allow[0]"
    callers: tuple[str, ...] | None = None
    methods: frozenset[str] | None = None
    paths: tuple[str, ...] | None = None
    headers: tuple[tuple[str, ValueMatch], ...] = ()
    message: str | None = None
    source: Source = BUILT_IN

    @property
    def http_only(self) -> bool:
        """Whether the rule asks for an attribute that plain TCP does not have."""
        return self.methods is not None or self.paths is not None or bool(self.headers)


@record(frozen=True, slots=True)
class AuthzLevel:
    """What one level of a policy says of authorization. `allow` None: nothing stated (an empty tuple states nothing
    too, but as a ceiling it refuses everything)."""

    level: Level
    allow: tuple[Rule, ...] | None = None
    deny: tuple[Rule, ...] = ()
    default: str | None = None  # mesh | allow | deny
    mode: str | None = None  # enforce | audit
    source: Source = BUILT_IN


@record(frozen=True, slots=True)
class HeaderEdit:
    """Applied in the order remove, set, add. Names are lower case."""

    set: tuple[tuple[str, str], ...] = ()
    add: tuple[tuple[str, str], ...] = ()
    remove: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.set or self.add or self.remove)


@record(frozen=True, slots=True)
class Fault:
    """Percentages are 0 to 100; the delay comes before the abort."""

    delay_s: float = 0.0
    delay_percent: float = 100.0
    abort_status: int | None = None
    abort_percent: float = 100.0
    source: Source = BUILT_IN


@record(frozen=True, slots=True)
class FilterUse:
    """One use of a filter: an entry point's name, or `module:Class`. `config` is plain JSON data."""

    use: str
    config: Mapping[str, object] = field(default_factory=dict)
    side: str = "in"  # in | out
    on_error: str | None = None  # closed | open; None: as the filter declares
    source: Source = BUILT_IN


@record(frozen=True, slots=True)
class Respond:
    status: int
    body: str = ""


@record(frozen=True, slots=True)
class Redirect:
    to: str
    status: int = 302


@record(frozen=True, slots=True)
class Rewrite:
    path: str | None = None
    host: str | None = None


@record(frozen=True, slots=True)
class Sticky:
    cookie: str
    ttl_s: float
    level: str = "version"  # or endpoint


@record(frozen=True, slots=True)
class Fallback:
    """What serves when the chosen version has no endpoint: another version, another service, or a fixed response."""

    version: str | None = None
    service: str | None = None
    respond: Respond | None = None


@record(frozen=True, slots=True)
class Mirror:
    """Where copies of a share of the requests go, beside the requests themselves: one version (None: all) of this
    service or, where `service` says so, to another one. `writes`: copies also of methods that are not safe."""

    version: str | None = None
    service: str | None = None
    percent: float = 100.0
    writes: bool = False
    source: Source = BUILT_IN


@record(frozen=True, slots=True)
class Destination:
    """`version` None: every endpoint of the service."""

    version: str | None
    weight: int = 100


@record(frozen=True, slots=True)
class Route:
    """One route with its effective values. A service always ends with a catch-all (`default` where none is written)."""

    name: str
    match: Match = Match()
    destinations: tuple[Destination, ...] = (Destination(None),)
    timeouts: Timeouts = Timeouts()
    retry: Retry = Retry()
    authz: tuple[AuthzLevel, ...] = ()  # effective stack: defaults, service, route, enforced; absent levels left out
    rate_limit: RateLimit | None = None
    fault: Fault | None = None
    filters: tuple[FilterUse, ...] = ()
    request_headers: HeaderEdit = HeaderEdit()
    response_headers: HeaderEdit = HeaderEdit()
    sticky: Sticky | None = None
    fallback: Fallback | None = None
    mirror: Mirror | None = None
    hedge_after_s: float = NONE
    respond: Respond | None = None
    redirect: Redirect | None = None
    rewrite: Rewrite | None = None
    upgrade: frozenset[str] = frozenset()  # lower-case Upgrade tokens that may pass
    source: Source = BUILT_IN
    provenance: Mapping[str, Origin] = field(default_factory=dict, compare=False)


@record(frozen=True, slots=True)
class Port:
    name: str
    number: int  # the application's port
    protocol: Protocol = Protocol.HTTP
    path_handling: PathHandling | None = None  # None: strict where path rules exist, else opaque


@record(frozen=True, slots=True)
class EndpointSpec:
    """One address; `host` may be `unix:/path`, then `port` is 0. `identity`: the SPIFFE ID that must answer; None: the
    service's own. `healthy`: what whoever watches over the endpoint last said of it."""

    host: str
    port: int
    labels: Mapping[str, str] = field(default_factory=dict)
    weight: int = 1
    tls: Tls = Tls.MESH
    identity: str | None = None
    healthy: bool = True
    zone: str = ""
    priority: int = 0  # 0 serves first


@record(frozen=True, slots=True)
class Call:
    """What one caller says of a service that it depends on. Timeouts and retries may only tighten: NONE and None mean
    'as the service says'."""

    service: str
    port: str | None = None
    local_port: int | None = None
    total_s: float = NONE
    try_s: float = NONE
    idle_s: float = NONE
    body_s: float = NONE
    connect_s: float = NONE
    max_retries: int | None = None
    source: Source = BUILT_IN
    provenance: Mapping[str, Origin] = field(default_factory=dict, compare=False)


@record(frozen=True, slots=True)
class Service:
    name: str
    ports: tuple[Port, ...] = ()
    endpoints: tuple[EndpointSpec, ...] = ()
    versions: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # version -> labels that select it
    routes: tuple[Route, ...] = ()
    balance: str = "least-request"  # a built-in balancer, an entry point's name, or `module:Class`
    balancing: Balancing = Balancing()
    limits: Limits = Limits()
    circuit_breaker: CircuitBreaker = CircuitBreaker()
    outliers: Outliers | None = None  # None: nobody is ejected
    concurrency: Concurrency | None = None  # None: no limit
    timeouts: Timeouts = Timeouts()  # for TCP ports; routes carry their own
    authz: tuple[AuthzLevel, ...] = ()  # for TCP ports; routes carry their own
    mtls: Mtls = Mtls.STRICT
    pool_idle_s: float | None = None  # None: 4 s towards the application, 60 s between sidecars
    max_connection_age_s: float = NONE
    health: Health | None = None  # None: nothing is stated
    calls: Mapping[str, Call] = field(default_factory=dict)
    owners: tuple[str, ...] = ()
    source: Source = BUILT_IN
    provenance: Mapping[str, Origin] = field(default_factory=dict, compare=False)


@record(frozen=True, slots=True)
class Snapshot:
    """`revision` names the state it was built from: for files a digest of their content."""

    services: Mapping[str, Service] = field(default_factory=dict)
    revision: str = ""
