"""Every metric of the sidecar: its name, and that both formats accept it."""

from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from sidecar.telemetry.catalogue import BREAKER_OPEN, CLUSTER_COUNTS, Meters
from sidecar.telemetry.metrics import Registry

NAMES = {
    "http_client_active_requests",
    "http_client_request_duration_seconds",
    "http_server_active_requests",
    "http_server_request_duration_seconds",
    "pillion_attempts",
    "pillion_authz_denied",
    "pillion_authz_would_deny",
    "pillion_balancer_errors",
    "pillion_breaker_openings",
    "pillion_breaker_state",
    "pillion_build_info",
    "pillion_cancelled",
    "pillion_certificate_expiry_timestamp_seconds",
    "pillion_connections",
    "pillion_connections_opened",
    "pillion_crashes",
    "pillion_filter_errors",
    "pillion_filter_overruns",
    "pillion_intercepted_connections",
    "pillion_log_lines_dropped",
    "pillion_outlier_ejections",
    "pillion_outlier_ejections_capped",
    "pillion_overflows",
    "pillion_panic_picks",
    "pillion_passthrough_connections",
    "pillion_policy_info",
    "pillion_policy_reloads",
    "pillion_rate_limit_demand_ratio",
    "pillion_rate_limit_share",
    "pillion_rate_limited",
    "pillion_reactor_lag_seconds",
    "pillion_resends",
    "pillion_retries",
    "pillion_retry_budget_exhausted",
    "pillion_scrape_errors",
    "pillion_spilled_picks",
    "pillion_tcp_tunnels",
    "pillion_tcp_tunnels_opened",
    "pillion_tls_handshakes",
    "pillion_tls_handshakes_failed",
    "pillion_zone_picks",
}


def test_every_metric_has_its_name_in_both_formats() -> None:
    registry = Registry(lambda: 0.0)
    meters = Meters(registry)
    meters.build_info(lambda: "0.1.0", "3.11.2", lambda: "abc")
    meters.certificate_expiry(lambda: 1.7e9)
    meters.global_limits(lambda: 0.5, lambda: 2.0)
    meters.log_drops("access", lambda: 3)
    meters.inbound.handshakes_failed.inc("expired")
    meters.outbound.connections_up_total.inc(10)
    meters.crashes.inc("reactor")
    meters.reactor_lag.observe(0.001)
    for side in ("in", "out"):
        registry.requests(side=side, service="a", route="b").record(b"GET", 200, "ok", 0.1)
    service = meters.service("out", "reviews")
    for counters in (service.denied, service.would_deny, service.filter_errors, service.filter_overruns):
        counters.inc("x")
    for _, name, help_text in CLUSTER_COUNTS:
        registry.reading_counter(name, help_text, lambda: [({"side": "out", "service": "reviews"}, 1.0)])
    meters.endpoint("reviews", "10.0.0.1:80").breaker_state.value = BREAKER_OPEN

    plain = {family.name for family in parse_text(b"".join(registry.render()).decode())}
    assert plain == NAMES
    openmetrics = {family.name for family in parse_openmetrics(b"".join(registry.render(openmetrics=True)).decode())}
    assert openmetrics == NAMES


def test_numbers_survive_a_policy_that_asks_again() -> None:
    registry = Registry(lambda: 0.0)
    meters = Meters(registry)
    meters.service("out", "reviews").rate_limited.inc()
    registry.swapped()
    assert meters.service("out", "reviews").rate_limited.value == 1
    meters.endpoint("reviews", "e").breaker_openings.inc()
    assert meters.endpoint("reviews", "e").breaker_openings.value == 1
