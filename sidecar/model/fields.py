"""Every key of a policy file, declared once.

The strict decoder, the JSON Schema and the reference tables of docs/policy.md are made from these declarations. What
is built in is taken from the frozen types of snapshot.py. Must not hold logic: kinds decode, merge.py combines,
resolve.py judges what one key says of another.
"""

from dataclasses import replace
from typing import Any

from . import words
from .forms import (
    ASKED_HEADER,
    CALLER,
    EDITED_HEADER,
    HEADER_NAME,
    HEADER_VALUE,
    LABEL,
    METHOD,
    PATH_GLOB,
    PORT_REF,
    REGEX,
    RETRY_METHOD,
    SERVICE,
    SERVICE_REF,
    VERSION_REF,
    BalancerName,
    Destinations,
    GrpcHealth,
    OrAddress,
    RetryCondition,
    ValueForm,
)
from .kinds import Choice, Duration, Flag, Kind, Number, Percent, Status, Text
from .snapshot import (
    CONCURRENCY_MAX,
    NONE,
    Balancing,
    Budget,
    CircuitBreaker,
    Concurrency,
    Fault,
    Health,
    Limits,
    Mirror,
    Mtls,
    Outliers,
    PathHandling,
    Protocol,
    Retry,
    Service,
    Timeouts,
    Tls,
)
from .tables import Anything, Clampable, Field, ListOf, MapOf, Table

_LIMIT = Duration(none=True)
_TIME = Duration()
_TIMEOUTS, _RETRY, _BUDGET, _LIMITS, _BREAKER = Timeouts(), Retry(), Budget(), Limits(), CircuitBreaker()

TIMEOUT = Table(
    "timeout",
    (
        Field("total", _LIMIT, "From the request head to the last byte of the response head, all tries and back-offs "
              "included. Restarts at the end of the request body. Of a gRPC call: the whole "
              "call, and no limit where none is stated.", _TIMEOUTS.total_s),
        Field("try", _LIMIT, "One try, to the end of its response head; the last try gets what is left of `total`.",
              _TIMEOUTS.try_s),
        Field("idle", _LIMIT, "Longest silence of a body, an upgraded connection or a TCP connection.",
              _TIMEOUTS.idle_s, builtin_text="5m (TCP 1h)"),
        Field("body", _LIMIT, "Longest time for a whole body, each way.", _TIMEOUTS.body_s),
        Field("connect", _LIMIT, "TCP and TLS together.", _TIMEOUTS.connect_s),
    ),
)  # fmt: skip

BUDGET = Table(
    "retry.budget",
    (
        Field("percent", Percent(), "Retries allowed, as a share of the original requests of the last 10s.",
              _BUDGET.percent),
        Field("min_per_second", Number(0, 10_000, whole=False), "Retries allowed each second in any case.",
              _BUDGET.min_per_second),
    ),
)  # fmt: skip

RETRY = Table(
    "retry",
    (
        Field("max_retries", Number(0, 10), "Retries after the first try.", _RETRY.max_retries),
        Field("when", ListOf(RetryCondition(), "a list of failures and statuses"), "What is retried: `connect-error`, "
              "`refused-stream`, `reset`, `timeout` (the try's), statuses such as `503`, and the classes `5xx`, `4xx`, "
              "`gateway-error` (502-504), `retriable-4xx` (409, 425); of calls that got no message, gRPC statuses such "
              "as `unavailable`. Failures that cannot have reached the application are always retried.",
              ("connect-error", "refused-stream", "reset")),
        Field("methods", ListOf(RETRY_METHOD, "a list of methods", 1), "Methods whose requests may be repeated; "
              "`any` is every method. Safe are GET, HEAD, OPTIONS, PUT, DELETE, TRACE, and any request with an "
              "`Idempotency-Key`.", builtin_text="safe"),
        Field("base", _TIME, "First upper bound of the back-off; it doubles with each retry, with full jitter.",
              _RETRY.base_s),
        Field("max", _TIME, "Greatest upper bound of the back-off.", _RETRY.max_s, builtin_text="10 x base"),
        Field("max_server_delay", Duration(min_s=0.0), "Longest `Retry-After` or `grpc-retry-pushback-ms` that is "
              "waited for; a longer one means: do not retry.", _RETRY.max_server_delay_s),
        Field("honour_retry_after", Flag(), "Whether `Retry-After` and `grpc-retry-pushback-ms` are obeyed.",
              _RETRY.honour_retry_after),
        Field("budget", BUDGET, "Bounds all retries of one caller towards one service."),
    ),
)  # fmt: skip

HEDGE = Table(
    "hedge",
    (
        Field("after", _LIMIT, "How long an attempt may be without a response head before a second one goes to another "
              "endpoint; the first good answer counts.", NONE),
    ),
    doc="Of GET, HEAD, OPTIONS and TRACE, or of what `retry.methods` names. Each costs one retry of `retry.budget`.",
)  # fmt: skip

LIMITS = Table(
    "limits",
    (
        Field("connections", Number(1, 1_000_000), "Connections of one caller to the service.", _LIMITS.connections),
        Field("pending", Number(0, 1_000_000), "Requests that wait for a connection.", _LIMITS.pending),
        Field("requests", Number(1, 1_000_000), "Requests in flight from one caller.", _LIMITS.requests),
    ),
)

CIRCUIT_BREAKER = Table(
    "circuit_breaker",
    (
        Field("consecutive_failures", Number(1, 1_000_000), "Failures in a row that open an endpoint's breaker.",
              _BREAKER.consecutive_failures),
        Field("open_for", _TIME, "How long it stays open at first; doubles with each failed probe.",
              _BREAKER.open_for_s),
        Field("max_open", _TIME, "Longest time that it stays open, before jitter.", _BREAKER.max_open_s),
        Field("success_rate", Percent(none=True), "Opens, too, when the success rate of the last 10s (5 requests at "
              "least) falls below; `none` switches that off.", 0.0),
    ),
)  # fmt: skip

_BALANCING = Balancing()
BALANCE = Table(
    "balance",
    (
        Field("policy", BalancerName(), "How an endpoint is picked: `least-request`, `round-robin`, `random`, "
              "`peak-ewma`, `ring-hash`, `maglev`, an entry point's name, or `module:Class` where the sidecar's own "
              "`--allow-filters` permits it.", Service("").balance),
        Field("by", Text("header:NAME, cookie:NAME, caller or address", words.hash_key, 256,
                         "^(caller|address|(header|cookie):[!#$%&'*+.^_`|~0-9A-Za-z-]+)$"),
              "What `ring-hash` and `maglev` go by: requests that are alike in it go to the same endpoint.",
              builtin_text="nothing"),
        Field("with", Anything(), "The balancer's own settings, which the balancer itself judges."),
        Field("zone", Choice(("prefer", "ignore")), "Whether a caller prefers endpoints of its own zone, while at "
              "least 2 of them are usable.", _BALANCING.zone),
    ),
)  # fmt: skip

_OUTLIERS = Outliers()
OUTLIERS = Table(
    "outliers",
    (
        Field("stdev_factor", Number(0, 100, whole=False), "An endpoint whose success rate is so many standard "
              "deviations below the mean of all is ejected.", _OUTLIERS.stdev_factor),
        Field("interval", Duration(min_s=0.1, max_s=3600), "How long is counted before endpoints are compared: those, "
              "5 at least, that have had 100 requests each.", _OUTLIERS.interval_s),
        Field("eject_for", _TIME, "How long the first ejection lasts; the second lasts twice as long, and so on.",
              _OUTLIERS.eject_for_s),
        Field("max_eject_for", _TIME, "Longest ejection.", _OUTLIERS.max_eject_for_s),
        Field("max_ejected", Percent(), "How many of the endpoints may be ejected at once; at least one of two or "
              "more. `0%`: nobody.", _OUTLIERS.max_ejected),
        Field("panic_threshold", Percent(), "Where a smaller share of the endpoints is healthy and not ejected, "
              "neither is asked any more; `0%`: both always are.", _BALANCING.panic_threshold),
    ),
    doc="Ejection is off until any of these keys but `panic_threshold` is stated; the others are then as built in.",
)  # fmt: skip
OUTLIER_KEYS = frozenset(f"outliers.{each.key}" for each in OUTLIERS.fields if each.key != "panic_threshold")
"""Whatever states one of these turns ejection on."""

_CONCURRENCY = Concurrency()
_VALUES_OF_CLASS = MapOf(ASKED_HEADER, ValueForm(), "a map of names and values", 64, lower=True)
PRIORITY = Table(
    "concurrency.priorities",
    (
        Field("class", LABEL, "Its name, in metrics and log. `default` is what no other takes, and says no more.",
              required=True),
        Field("from", ListOf(CALLER, "a list of callers", 1), "Services whose requests belong to it."),
        Field("headers", _VALUES_OF_CLASS, "Headers that must match, all of them."),
    ),
    doc="The highest class first; the first that takes a request counts. `default` is the last where it is not listed.",
)  # fmt: skip
CONCURRENCY = Table(
    "concurrency",
    (
        Field("adaptive", Flag(), "Whether the limit is learnt from latency, between `min` and `max`.",
              _CONCURRENCY.adaptive),
        Field("min", Number(1, 1_000_000), "The least that is allowed at a time, and what is while the least latency "
              "is measured.", _CONCURRENCY.least),
        Field("max", Number(1, 1_000_000), "The most at a time; not `adaptive`: the limit.",
              builtin_text=f"{CONCURRENCY_MAX} where adaptive, else no limit"),
        Field("queue", Number(0, 10_000), "Requests that wait for their turn.", _CONCURRENCY.queue),
        Field("queue_timeout", _TIME, "The longest that one waits.", _CONCURRENCY.queue_timeout_s),
        Field("priorities", ListOf(PRIORITY, "a list of classes", items_max=16), "Classes, the highest first.", ()),
    ),
    doc="Off until `adaptive: true` or `max` is stated. Kept by the callee's sidecar, for each instance.",
)  # fmt: skip

RATE_LIMIT = Table(
    "rate_limit",
    (
        Field("requests", Number(1, 10_000_000), "Requests allowed in each `per`. Needed for a limit.",
              builtin_text="no limit"),
        Field("per", Duration(min_s=0.1, max_s=86400), "The period.", 1.0),
        Field("burst", Number(1, 10_000_000), "Requests allowed at once; a sliding window has none.",
              builtin_text="as requests"),
        Field("key", Text("caller, address, header:NAME or none", words.rate_key, 256,
                          "^(caller|address|none|header:[!#$%&'*+.^_`|~0-9A-Za-z-]+)$"),
              "What has a bucket of its own: `caller`, `address`, `header:NAME`; `none` is one for all.", "none"),
        Field("algorithm", Choice(("token-bucket", "sliding-window")), "How requests are counted.", "token-bucket"),
        Field("scope", Choice(("local", "global")), "Whose limit it is: `local`, of each instance of the callee; "
              "`global`, of all of them together (by shares from the control plane).", "local"),
    ),
)  # fmt: skip

FILTER = Table(
    "filter",
    (
        Field("use", Text("the name of a filter", words.filter_use, 256), "An entry point's name, or `module:Class` "
              "where the sidecar's own `--allow-filters` permits it.", required=True),
        Field("with", Anything(), "The filter's configuration, which the filter itself judges."),
        Field("side", Choice(("in", "out")), "`in`: in the callee's sidecar; `out`: in the caller's.", "in"),
        Field("on_error", Choice(("open", "closed")), "What a failing filter means: go on, or refuse.",
              builtin_text="as the filter declares"),
    ),
)  # fmt: skip
FILTERS = ListOf(FILTER, "a list of filters", items_max=64)

_VALUES = MapOf(HEADER_NAME, ValueForm(), "a map of names and values", 64, lower=True)
_HEADERS = MapOf(ASKED_HEADER, ValueForm(), "a map of names and values", 64, lower=True)
_QUERY = MapOf(Text("a query name", words.message, 256), ValueForm(), "a map of names and values", 64)
_METHODS = ListOf(METHOD, "a list of methods", 1)
_CALLERS = ListOf(CALLER, "a list of callers", 1)

RULE = Table(
    "rule",
    (
        Field("from", _CALLERS, "Callers: services of the own trust domain, or SPIFFE IDs."),
        Field("methods", _METHODS, "HTTP methods."),
        Field("paths", ListOf(PATH_GLOB, "a list of paths", 1), "Paths: exact, or with `*` (within one segment) and "
              "`**` (any number of segments)."),
        Field("headers", _HEADERS, "Headers that must match, all of them."),
        Field("message", Text("a text", words.message, 200), "Why; shown in log and `can`, never to the caller."),
    ),
    doc="What is left out matches everything; what is stated must match together.",
)  # fmt: skip
RULES = ListOf(RULE, "a list of rules", items_max=1000)

AUTHZ = Table(
    "authz",
    (
        Field("default", Choice(("mesh", "allow", "deny")), "Decides where no level states any allow: `mesh` lets in "
              "the peers of the mesh.", "mesh"),
        Field("mode", Choice(("enforce", "audit")), "`audit` only logs.", "enforce"),
        Field("allow", RULES, "Who may. The allows of all levels add up; under `enforced` they are a ceiling."),
        Field("deny", RULES, "Who may not; beats every allow."),
    ),
    doc="Levels add up: nothing here overrides by closeness but `default` and `mode`.",
)  # fmt: skip
_AUTHZ_NULL = "rules of all levels add up and none can be reset; {default: mesh} overrides the default"
AUTHZ_FIELD = Field("authz", AUTHZ, "Who may call.", null=_AUTHZ_NULL)

POOL = Table(
    "pool",
    (Field("idle", _TIME, "How long an idle pooled connection is kept.",
           builtin_text="4s to the application, 1m between sidecars"),),
)  # fmt: skip

_HEALTH = Health()
HEALTH = Table(
    "health",
    (
        Field("http", Text("a path", words.exact_path, 2048, "^/"), "GET this path on the first HTTP port; a status "
              "from 200 to 399 is healthy.", builtin_text="TCP only"),
        Field("grpc", GrpcHealth(), "Ask by gRPC's health protocol on the first `grpc` port (else on the first HTTP "
              "port): `true` for the server as a whole, or a service's name.", builtin_text="no"),
        Field("tcp", Flag(), "Only connect to the first port, whatever a weaker level says.", False),
        Field("interval", Duration(min_s=0.1, max_s=3600), "Between two checks, give or take 10%.",
              _HEALTH.interval_s),
        Field("timeout", Duration(max_s=600), "A check that takes longer has failed.", _HEALTH.timeout_s),
        Field("healthy", Number(1, 100), "Good checks in a row that make it healthy.", _HEALTH.healthy),
        Field("unhealthy", Number(1, 100), "Failed checks in a row that make it unhealthy.", _HEALTH.unhealthy),
    ),
    doc="How the service's sidecar checks its own application. Callers avoid an instance that is unhealthy; it stays "
    "registered.",
)  # fmt: skip

_TRAFFIC = (
    Field("timeout", TIMEOUT, "Deadlines."),
    Field("retry", RETRY, "Retries, by the caller's sidecar."),
    Field("hedge", HEDGE, "A second attempt beside a slow one, by the caller's sidecar."),
    Field("rate_limit", RATE_LIMIT, "Requests in a time, counted by the callee's sidecar."),
    Field("filters", FILTERS, "Filters, in this order.", ()),
)
"""Settings of a route, which every level may state."""

_SERVICE_ONLY = (
    Field("limits", LIMITS, "What one caller's sidecar may have open towards the service."),
    Field("circuit_breaker", CIRCUIT_BREAKER, "Keeps one caller from an endpoint that fails."),
    Field("balance", BALANCE, "Load balancing."),
    Field("slow_start", Duration(min_s=0.0, max_s=3600), "How long an endpoint that appears among others takes to its "
          "full share; `0s`: no time.", _BALANCING.slow_start_s, builtin_text="none"),
    Field("outliers", OUTLIERS, "Endpoints that are worse than the others."),
    Field("concurrency", CONCURRENCY, "Requests that each instance's application works on at a time."),
    Field("mtls", Choice(("strict", "permissive", "off"), convert=Mtls), "What the service's sidecar lets in: only "
          "peers of the mesh, also plain peers (counted), or plain peers only.", Service("").mtls),
    Field("max_connection_age", _LIMIT, "Connections older than this are drained.", Service("").max_connection_age_s),
    Field("pool", POOL, "Pooled connections."),
    Field("health", HEALTH, "Checks of the application, by its own sidecar."),
)  # fmt: skip
"""Settings that belong to a service as a whole."""

SETTINGS = Table("settings", (*_TRAFFIC, *_SERVICE_ONLY))
"""Everything that merges by precedence."""
ROUTE_SETTINGS = Table("route settings", _TRAFFIC)

DEFAULTS = Table("defaults", (*_TRAFFIC, *_SERVICE_ONLY, AUTHZ_FIELD), nothing=True,
                 doc="The lowest level that a file states: holds for every service.")  # fmt: skip

_LABELS = MapOf(Text("a label", words.message, 63), Text("a label's value", words.plain_text, 255), "a map of labels")
VERSION = Table(
    "version",
    (Field("labels", _LABELS, "Labels that an endpoint of this version carries, all of them.", required=True),),
)  # fmt: skip

PORT = Table(
    "port",
    (
        Field("port", Number(1, 65535), "The application's port.", required=True),
        Field("protocol", Choice(("http", "http2", "grpc", "tcp"), dict.fromkeys(("udp", "auto"), "P0201"), Protocol),
              "What the application speaks there: `http` is HTTP/1.1 (and HTTP/2 for gRPC calls), `http2` and `grpc` "
              "are HTTP/2 without TLS. Callers may use HTTP/1.1 or HTTP/2 with each of the three.", Protocol.HTTP),
        Field("path_handling", Choice(("strict", "opaque"), convert=PathHandling), "`strict` answers 400 to paths "
              "that servers read differently; `opaque` passes them on.",
              builtin_text="strict where rules or routes have paths"),
        Field("detect_timeout", _TIME, "", later="P0212"),
    ),
)  # fmt: skip

_AT = Text("host:port", words.address, 320, convert=words.split_address)
_TLS = Choice(("mesh", "originate", "plain"), convert=Tls)
ADDRESS = Table(
    "address",
    (
        Field("at", _AT, "Where the endpoint listens.", required=True),
        Field("labels", _LABELS, "What versions select by."),
        Field("weight", Number(0, 1000), "Its share, relative to the others.", 1),
        Field("tls", _TLS, "As the service's `tls`, for this endpoint."),
        Field("identity", Text("a SPIFFE ID", words.spiffe_id, 2048), "The SPIFFE ID that must answer.",
              builtin_text="the service's own"),
        Field("zone", Text("a zone", words.zone, 63), "Where it is; callers of the same zone prefer it."),
        Field("priority", Number(0, 100), "0 serves first; the others when too few of those before them are usable.",
              0),
    ),
)  # fmt: skip

GRPC_MATCH = Table(
    "match.grpc",
    (
        Field("service", Text("the name of a gRPC service", words.grpc_service, 255), "The service, with its package, "
              "as in `shop.v1.Cart`.", builtin_text="any"),
        Field("method", Text("the name of a gRPC method", words.grpc_method, 255), "The method, as in `AddItem`.",
              builtin_text="any"),
    ),
    doc="Stands for `path: /SERVICE/METHOD`, which is what gRPC asks for.",
)  # fmt: skip
MATCH = Table(
    "match",
    (
        Field("path", PATH_GLOB, "Exact, or with `*` (within one segment) and `**` (any number of segments)."),
        Field("path_regex", REGEX, "The whole path, in RE2 syntax."),
        Field("methods", _METHODS, "HTTP methods."),
        Field("headers", _HEADERS, "Header values: exact, or `{prefix: ...}`, `{regex: ...}`, `{present: true}`."),
        Field("query", _QUERY, "Query values, in the same forms."),
        Field("cookies", MapOf(Text("a cookie's name", words.cookie_name, 128, words.TOKEN_PATTERN), ValueForm(),
                               "a map of names and values", 64), "Cookies that must match, in the same forms; their "
              "names are case-sensitive."),
        Field("from", _CALLERS, "Callers."),
        Field("grpc", GRPC_MATCH, "A gRPC service, or one method."),
    ),
    doc="What is stated must match together.",
)  # fmt: skip

_STATUS = Number(200, 599)
DELAY = Table(
    "fault.delay",
    (
        Field("fixed", Duration(max_s=3600), "How long requests wait.", required=True),
        Field("percent", Percent(), "The share of requests.", Fault().delay_percent),
    ),
)
ABORT = Table(
    "fault.abort",
    (
        Field("status", _STATUS, "The answer's status.", required=True),
        Field("percent", Percent(), "The share of requests.", Fault().abort_percent),
    ),
)
FAULT = Table(
    "fault",
    (
        Field("delay", DELAY, "Delays requests, before `abort`."),
        Field("abort", ABORT, "Answers requests without sending them."),
    ),
    doc="Injected by the caller's sidecar.",
)

_EDITS = MapOf(EDITED_HEADER, HEADER_VALUE, "a map of headers", 64, lower=True)
HEADER_EDIT = Table(
    "header edit",
    (
        Field("set", _EDITS, "Headers to replace or make."),
        Field("add", _EDITS, "Header lines to add."),
        Field("remove", ListOf(EDITED_HEADER, "a list of headers", items_max=64), "Headers to remove."),
    ),
    doc="In the order remove, set, add.",
)
HEADERS = Table(
    "headers",
    (
        Field("request", HEADER_EDIT, "On the way to the service."),
        Field("response", HEADER_EDIT, "On the way back."),
    ),
)
REWRITE = Table(
    "rewrite",
    (
        Field("path", Text("a path", words.exact_path, 2048, "^/"), "Replaces the path; the query stays. Where it ends "
              "with `/**` it keeps what `**` stands for in `match.path`."),
        Field("host", Text("a host", words.authority, 320), "Replaces Host."),
    ),
)  # fmt: skip
REDIRECT = Table(
    "redirect",
    (
        Field("to", Text("a URL or a path", words.redirect_target, 2048), "Where to: `https://shop.example`, "
              "`https://`, `/new` or `/new/**`; what it leaves out is the request's.", required=True),
        Field("status", Status((301, 302, 303, 307, 308)), "The status.", 302),
    ),
)  # fmt: skip
RESPOND = Table(
    "respond",
    (
        Field("status", _STATUS, "The status.", required=True),
        Field("body", Text("a text", words.plain_text, 65536), "The body, as text/plain unless `headers.response` sets "
              "another `content-type`.", ""),
    ),
)  # fmt: skip
STICKY = Table(
    "sticky",
    (
        Field("level", Choice(("version", "endpoint")), "What a client stays with.", "version"),
        Field("cookie", Text("a cookie's name", words.cookie_name, 128, words.TOKEN_PATTERN), "The cookie.",
              builtin_text="pillion_version, pillion_endpoint"),
        Field("ttl", Duration(min_s=1), "How long it holds.", 3600.0),
    ),
)  # fmt: skip
FALLBACK = Table(
    "fallback",
    (
        Field("version", VERSION_REF, "Another version of the service."),
        Field("service", SERVICE_REF, "Another service."),
        Field("status", _STATUS, "A fixed response: its status."),
        Field("body", Text("a text", words.plain_text, 65536), "A fixed response: its body."),
    ),
    doc="What serves when nothing else can: exactly one of version, service, or status with body. The last two stand in"
    " for an overflow too.",
)
_MIRROR = Mirror()
MIRROR = Table(
    "mirror",
    (
        Field("to", VERSION_REF, "A version of the service."),
        Field("service", SERVICE_REF, "Another service."),
        Field("percent", Percent(), "The share of requests.", _MIRROR.percent),
        Field("writes", Flag(), "Whether methods other than GET, HEAD, OPTIONS and TRACE are copied too.",
              _MIRROR.writes),
    ),
    doc="Sends copies of requests to exactly one of `to` or `service`, and discards their answers.",
)  # fmt: skip

ROUTE = Table(
    "route",
    (
        Field("name", Text("the name of a route", words.route_name, 63), "Shown in log and metrics.",
              builtin_text="route-1, route-2, ..."),
        Field("match", MATCH, "Which requests.", builtin_text="all"),
        Field("to", Destinations(), "A version, or weights by version that sum to 100.",
              builtin_text="every endpoint"),
        *_TRAFFIC,
        AUTHZ_FIELD,
        Field("fault", FAULT, "Fault injection."),
        Field("sticky", STICKY, "Keeps a client with the version or endpoint it was given."),
        Field("fallback", FALLBACK, "When nothing can serve."),
        Field("rewrite", REWRITE, "Changes the target."),
        Field("redirect", REDIRECT, "Answers with a redirect."),
        Field("respond", RESPOND, "Answers with a fixed response."),
        Field("headers", HEADERS, "Edits headers."),
        Field("upgrade", ListOf(Text("an upgrade", words.upgrade_token, 40, convert=str.lower), "a list of upgrades"),
              "Upgrades that may pass, such as websocket."),
        Field("mirror", MIRROR, "Copies of requests, to try something out."),
    ),
    doc="The first route that matches serves; where none does, every endpoint of the service does.",
)  # fmt: skip

_CALL_RETRY = Table("calls.retry", (Field("max_retries", Number(0, 10), "No more retries than this."),))
_CALL_TIMEOUT = Table("calls.timeout", tuple(replace(each, builtin=None) for each in TIMEOUT.fields))
CALL = Table(
    "call",
    (
        Field("port", PORT_REF, "Which port of the service. Needed for `local_port` where it has several."),
        Field("local_port", Number(1, 65535), "A port on loopback that leads to the service."),
        Field("timeout", _CALL_TIMEOUT, "Shorter deadlines for this caller."),
        Field("retry", _CALL_RETRY, "Fewer retries for this caller."),
    ),
    nothing=True,
    doc="A caller may tighten for itself what the service says, never loosen it.",
)

SERVICE_TABLE = Table(
    "service",
    (
        Field("ports", MapOf(LABEL, PORT, "a map of ports", 64), "The application's ports, by name."),
        Field("address", ListOf(OrAddress(ADDRESS, _AT), "a list of addresses", items_max=10_000), "Static endpoints, "
              "for a service that does not register: `[10.0.3.7:8443]`, or maps."),
        Field("tls", _TLS, "How callers reach static endpoints: `mesh` (a sidecar is there), `originate` (an ordinary "
              "TLS server) or `plain`.", Tls.MESH),
        Field("versions", MapOf(LABEL, VERSION, "a map of versions", 64), "Versions, by name."),
        Field("routes", ListOf(ROUTE, "a list of routes", items_max=10_000), "First match wins."),
        *_TRAFFIC,
        *_SERVICE_ONLY,
        AUTHZ_FIELD,
        Field("calls", MapOf(SERVICE, CALL, "a map of services"), "What this service depends on."),
        Field("owners", ListOf(LABEL, "a list of teams"), "Teams that may apply this service."),
    ),
    nothing=True,
)  # fmt: skip


def _clampable(kind: Kind) -> Kind:
    if isinstance(kind, Table):
        return replace(kind, fields=tuple(_clampable_field(each) for each in kind.fields))
    return Clampable(kind) if kind.ordered else kind


def _clampable_field(declared: Field) -> Field:
    return declared if declared.key == "authz" else replace(declared, kind=_clampable(declared.kind))


ENFORCED = Table(
    "enforced",
    tuple(_clampable_field(each) for each in (*_TRAFFIC, *_SERVICE_ONLY, AUTHZ_FIELD)),
    nothing=True,
    doc="The highest level: owners cannot override it. A scalar may be `{min, max}`, which clamps.",
)

FILE = Table(
    "file",
    (
        Field("version", Number(1, 1), "The version of this format: 1.", required=True),
        Field("services", MapOf(SERVICE, SERVICE_TABLE, "a map of services"), "Services, by name."),
        Field("defaults", DEFAULTS, "Holds for every service; the weakest level."),
        Field("enforced", ENFORCED, "Holds for every service; the strongest level."),
    ),
)


def walk(table: Table, prefix: str = "") -> list[tuple[str, Field]]:
    """The leaves of a table that merges, with their dotted paths."""
    leaves: list[tuple[str, Any]] = []
    for declared in table.fields:
        path = prefix + declared.key
        if isinstance(declared.kind, Table):
            leaves += walk(declared.kind, f"{path}.")
        elif not declared.later:
            leaves.append((path, declared))
    return leaves
