"""The sidecar's own metrics by name: every family that is not a request duration, its help text and its labels.

Handles are asked for when a plan is compiled (or at start) and kept; asking again gives the same numbers. Must not
know how values come about. Invariant: a name and its help text stand here and nowhere else.
"""

from collections.abc import Callable, Iterable

from .metrics import Registry
from .slots import Counter, CounterSet, Histogram, Level

BREAKER_CLOSED, BREAKER_HALF_OPEN, BREAKER_OPEN = 0, 1, 2

LAG_BOUNDS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class SideMeters:
    """Connections of one side: "in" faces other sidecars and serves the application, "out" the reverse."""

    __slots__ = (
        "connections_down",
        "connections_down_total",
        "connections_up",
        "connections_up_total",
        "handshakes_failed",
        "handshakes_ok",
        "http2_limits",
        "passthrough",
        "tcp_tunnels",
        "tcp_tunnels_total",
    )

    def __init__(self, registry: Registry, side: str) -> None:
        def level(name: str, help_text: str, direction: str = "") -> Level:
            return registry.level(name, help_text, side=side, direction=direction)

        def counter(name: str, help_text: str, direction: str = "") -> Counter:
            return registry.counter(name, help_text, side=side, direction=direction)

        open_now = ("pillion_connections", "Open connections; down is the caller's side, up the server's.")
        opened = ("pillion_connections_opened_total", "Connections opened.")
        self.connections_down = level(*open_now, direction="down")
        self.connections_up = level(*open_now, direction="up")
        self.connections_down_total = counter(*opened, direction="down")
        self.connections_up_total = counter(*opened, direction="up")
        self.handshakes_ok: Counter = counter("pillion_tls_handshakes_total", "TLS handshakes completed.")
        self.handshakes_failed: CounterSet = registry.counters(
            "pillion_tls_handshakes_failed_total", "TLS handshakes that failed, by reason.", "reason", side=side
        )
        self.http2_limits: CounterSet = registry.counters(
            "pillion_http2_limits_total",
            'HTTP/2 connections ended because their caller hit a limit, by limit; "protocol": broke the protocol.',
            "limit",
            side=side,
        )
        self.tcp_tunnels = level("pillion_tcp_tunnels", "Open TCP tunnels, upgraded connections included.")
        self.tcp_tunnels_total = counter(
            "pillion_tcp_tunnels_opened_total", "TCP tunnels opened, upgraded connections included."
        )
        self.passthrough = counter(
            "pillion_passthrough_connections_total", "Intercepted connections to unknown destinations, passed through."
        )


ENDPOINT_RESULTS = "pillion_endpoint_attempts_total"

CLUSTER_COUNTS = (
    ("attempts", "pillion_attempts_total", "Attempts, each retry and hedge included."),
    ("retries", "pillion_retries_total", "Retries made."),
    ("resends", "pillion_resends_total", "Requests sent again because a reused connection had died."),
    ("cancelled", "pillion_cancelled_total", "Requests whose caller went away."),
    ("overflows", "pillion_overflows_total", "Requests refused because a limit was full."),
    ("budget_exhausted", "pillion_retry_budget_exhausted_total", "Retries not made because the budget was spent."),
    ("panic_picks", "pillion_panic_picks_total", "Attempts sent to unhealthy endpoints, because too few are healthy."),
    (
        "ejections_capped",
        "pillion_outlier_ejections_capped_total",
        "Outliers that were not ejected, because too many endpoints are.",
    ),
    ("spilled_picks", "pillion_spilled_picks_total", "Attempts sent to endpoints of a worse priority."),
    ("zone_picks", "pillion_zone_picks_total", "Attempts kept in the caller's own zone."),
)
"""What a cluster counts by itself: attribute, name, help."""


GATE_LEVELS = (
    ("limit", "pillion_concurrency_limit", "Requests that the application may work on at a time now."),
    ("in_flight", "pillion_concurrency_in_flight", "Requests that it works on, of those that the limit counts."),
    ("waiting", "pillion_concurrency_queued", "Requests that wait before it."),
)
"""What the gate before the own application shows: attribute, name, help."""

GATE_SHED = ("pillion_shed_total", "Requests refused to keep the application from overload, by class.")


class ServiceMeters:
    """What one side counts of one service; belongs to the policy."""

    __slots__ = (
        "balancer_errors",
        "denied",
        "filter_errors",
        "filter_overruns",
        "hedges",
        "mirrored",
        "rate_limited",
        "would_deny",
    )

    def __init__(self, registry: Registry, side: str, service: str) -> None:
        def counter(name: str, help_text: str) -> Counter:
            return registry.counter(name, help_text, expires=True, side=side, service=service)

        def counters(name: str, help_text: str, label: str) -> CounterSet:
            return registry.counters(name, help_text, label, expires=True, side=side, service=service)

        self.balancer_errors = counter(
            "pillion_balancer_errors_total", "Mistakes of a balancer that is not built in; one was picked by weight."
        )
        self.rate_limited = counter("pillion_rate_limited_total", "Requests refused by a rate limit.")
        self.mirrored = counters(
            "pillion_mirrored_requests_total",
            "Copies of requests, sent by a mirror (out) or received (in), by the class of their status or what went "
            "wrong.",
            "result",
        )
        self.hedges = counters(
            "pillion_hedges_total",
            "Second attempts beside a slow one: won, lost, failed, cancelled, promoted (the first failed meanwhile); "
            "or not made: no_budget, no_endpoint, overflow.",
            "result",
        )
        self.denied = counters(
            "pillion_authz_denied_total", "Requests and connections refused, by the rule that refused.", "rule"
        )
        self.would_deny = counters(
            "pillion_authz_would_deny_total", "What a rule in audit mode would have refused.", "rule"
        )
        self.filter_errors = counters("pillion_filter_errors_total", "Hooks of filters that raised.", "filter")
        self.filter_overruns = counters(
            "pillion_filter_overruns_total", "Hooks of filters that took longer than their budget.", "filter"
        )


class EndpointMeters:
    """Circuit breaker and ejections of one endpoint; belongs to the policy."""

    __slots__ = ("breaker_openings", "breaker_state", "ejections")

    def __init__(self, registry: Registry, service: str, endpoint: str) -> None:
        self.breaker_state: Level = registry.level(
            "pillion_breaker_state",
            "State of the circuit breaker: 0 closed, 1 half-open, 2 open.",
            expires=True,
            service=service,
            endpoint=endpoint,
        )
        self.breaker_openings: Counter = registry.counter(
            "pillion_breaker_openings_total",
            "Times that the circuit breaker opened.",
            expires=True,
            service=service,
            endpoint=endpoint,
        )
        self.ejections: Counter = registry.counter(
            "pillion_outlier_ejections_total",
            "Times that it was ejected as an outlier.",
            expires=True,
            service=service,
            endpoint=endpoint,
        )


class Meters:
    """The sidecar's metrics. `inbound`, `outbound` and the process-wide handles exist from the start."""

    __slots__ = (
        "_registry",
        "crashes",
        "inbound",
        "intercepted",
        "outbound",
        "reactor_lag",
        "reloads_failed",
        "reloads_ok",
    )

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self.inbound = SideMeters(registry, "in")
        self.outbound = SideMeters(registry, "out")
        self.intercepted: Counter = registry.counter(
            "pillion_intercepted_connections_total", "Connections that came by transparent interception."
        )
        self.reactor_lag: Histogram = registry.histogram(
            "pillion_reactor_lag_seconds", "How late the reactor's turns came.", LAG_BOUNDS_S
        )
        reloads = ("pillion_policy_reloads_total", "Policies offered, by result.")
        self.reloads_ok: Counter = registry.counter(*reloads, result="ok")
        self.reloads_failed: Counter = registry.counter(*reloads, result="failed")
        self.crashes: CounterSet = registry.counters(
            "pillion_crashes_total", "Exceptions that nobody expected, by the place that caught them.", "place"
        )

    def service(self, side: str, service: str) -> ServiceMeters:
        return ServiceMeters(self._registry, side, service)

    def endpoint(self, service: str, endpoint: str) -> EndpointMeters:
        return EndpointMeters(self._registry, service, endpoint)

    def log_drops(self, log: str, read: Callable[[], float]) -> None:
        """`read` gives the number of lines of this log ("access", "own") that were not written so far."""
        self._registry.reading_counter(
            "pillion_log_lines_dropped_total", "Log lines lost to a full queue or a failed write.", read, log=log
        )

    def certificate_expiry(self, read: Callable[[], float]) -> None:
        self._registry.gauge(
            "pillion_certificate_expiry_timestamp_seconds", "When the sidecar's certificate ends, in Unix time.", read
        )

    def global_limits(self, share: Callable[[], float], demand: Callable[[], float]) -> None:
        """Of the rate limits that all instances of the service keep together."""
        self._registry.gauge(
            "pillion_rate_limit_share", "This instance's part of the global rate limits, 0 to 1.", share
        )
        self._registry.gauge(
            "pillion_rate_limit_demand_ratio", "What is asked of this instance, as a part of the global limits.", demand
        )

    def build_info(self, version: Callable[[], str], python: str, revision: Callable[[], str]) -> None:
        """`version` gives the program's, asked for by the scrape; `revision` that of the policy in force."""

        def program() -> Iterable[tuple[dict[str, str], float]]:
            return [({"version": version(), "python": python}, 1.0)]

        self._registry.gauge("pillion_build_info", "The running program; always 1.", program)

        def read() -> Iterable[tuple[dict[str, str], float]]:
            return [({"revision": revision()}, 1.0)]

        self._registry.gauge("pillion_policy_info", "The policy in force; always 1.", read)
