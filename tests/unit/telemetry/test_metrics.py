"""The registry's text is read by prometheus_client's own parsers, which are the oracle here."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from sidecar.telemetry.metrics import SERIES_PER_STEP, Registry
from sidecar.telemetry.slots import KEEP_GONE_S

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(clock: Clock) -> Registry:
    return Registry(clock)


def read(registry: Registry, *, openmetrics: bool = False) -> Samples:
    text = b"".join(registry.render(openmetrics=openmetrics)).decode()
    parse: Callable[..., object] = parse_openmetrics if openmetrics else parse_text
    samples: Samples = {}
    for family in parse(text):  # type: ignore[attr-defined]
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in samples, f"twice: {key}"
            samples[key] = sample.value
    return samples


def value(registry: Registry, name: str, /, **labels: str) -> float:
    return read(registry)[name, frozenset(labels.items())]


REQUEST = {
    "service": "reviews",
    "http_route": "canary",
    "version": "v2",
    "http_request_method": "GET",
    "http_response_status_code": "200",
    "reason": "ok",
}


@pytest.mark.parametrize(
    ("side", "grpc_status", "reason", "error_type"),
    [
        ("in", "OK", "ok", ""),
        ("in", "NOT_FOUND", "ok", ""),
        ("in", "INTERNAL", "ok", "INTERNAL"),
        ("out", "NOT_FOUND", "ok", "NOT_FOUND"),
        ("out", "UNAVAILABLE", "overflow", "overflow"),
    ],
)
def test_grpc_calls_are_counted_by_their_status(side: str, grpc_status: str, reason: str, error_type: str) -> None:
    registry = Registry(lambda: 0.0)
    registry.requests(side=side, service="a", route="b").record(b"POST", 200, reason, 0.1, grpc_status)
    text = b"".join(registry.render(openmetrics=False)).decode()
    assert f'grpc_status="{grpc_status}"' in text
    assert (f'error_type="{error_type}"' in text) if error_type else "error_type" not in text


@pytest.mark.parametrize("openmetrics", [False, True])
def test_a_request_is_a_histogram_with_opentelemetrys_names(registry: Registry, openmetrics: bool) -> None:
    stats = registry.requests(side="in", service="reviews", route="canary", version="v2")
    for duration_s in (0.005, 0.006, 0.3, 11.0):
        stats.record(b"GET", 200, "ok", duration_s)
    samples = read(registry, openmetrics=openmetrics)
    name = "http_server_request_duration_seconds"
    buckets = {dict(labels)["le"]: count for (sample, labels), count in samples.items() if sample == f"{name}_bucket"}
    assert buckets == {
        "0.005": 1, "0.01": 2, "0.025": 2, "0.05": 2, "0.075": 2, "0.1": 2, "0.25": 2, "0.5": 3, "0.75": 3,
        "1.0": 3, "2.5": 3, "5.0": 3, "7.5": 3, "10.0": 3, "+Inf": 4,
    }  # fmt: skip
    assert samples[f"{name}_count", frozenset(REQUEST.items())] == 4
    assert samples[f"{name}_sum", frozenset(REQUEST.items())] == pytest.approx(11.311)


@pytest.mark.parametrize(
    ("side", "status", "reason", "error_type"),
    [
        ("in", 200, "ok", None),
        ("in", 404, "ok", None),  # for a server 4xx is no error
        ("in", 403, "denied", None),
        ("in", 500, "ok", "500"),
        ("in", 503, "connect_failed", "connect_failed"),
        ("in", 0, "caller_gone", "caller_gone"),
        ("out", 404, "ok", "404"),
        ("out", 429, "rate_limited", "rate_limited"),
        ("out", 302, "responded", None),
        ("out", 503, "responded", "503"),
        ("out", 200, "cut_short", None),
    ],
)
def test_error_type_is_opentelemetrys(
    registry: Registry, side: str, status: int, reason: str, error_type: str | None
) -> None:
    registry.requests(side=side, service="a", route="b").record(b"GET", status, reason, 0.1)
    (labels,) = [dict(labels) for (name, labels) in read(registry) if name.endswith("duration_seconds_count")]
    assert labels.get("error_type") == error_type
    assert labels["reason"] == reason
    assert labels.get("http_response_status_code") == (str(status) if status else None)
    assert "version" not in labels


def test_methods_statuses_and_reasons_from_peers_are_bounded(registry: Registry) -> None:
    stats = registry.requests(side="in", service="a", route="b")
    for number in range(1000):
        stats.record(b"M%d" % number, 200, "ok", 0.1)
        stats.record(b"GET", number, "ok", 0.1)
    counts = {dict(k[1]).get("http_request_method", ""): v for k, v in read(registry).items() if k[0].endswith("count")}
    assert counts["_OTHER"] == 1000
    series = [dict(labels) for (name, labels) in read(registry) if name.endswith("_count")]
    assert len(series) <= 129
    overflow = {"service": "a", "http_route": "b", "otel_metric_overflow": "true"}
    assert overflow in series
    assert sum(v for k, v in read(registry).items() if k[0].endswith("_count")) == 2000


def test_active_requests_are_read_from_the_same_slots(registry: Registry) -> None:
    inbound = registry.requests(side="in", service="a", route="b")
    inbound.active += 3
    inbound.active -= 1
    registry.requests(side="out", service="a", route="b").active += 1
    assert value(registry, "http_server_active_requests", service="a", http_route="b") == 2
    assert value(registry, "http_client_active_requests", service="a", http_route="b") == 1


def test_equal_labels_give_the_same_slot(registry: Registry) -> None:
    first = registry.requests(side="in", service="a", route="b", version="v")
    assert registry.requests(side="in", service="a", route="b", version="v") is first
    assert registry.requests(side="out", service="a", route="b", version="v") is not first
    counter = registry.counter("pillion_x_total", "X.", a="1", b="2")
    counter.inc()
    counter.inc(2)
    assert registry.counter("pillion_x_total", "X.", b="2", a="1") is counter
    assert value(registry, "pillion_x_total", a="1", b="2") == 3


def test_series_of_a_route_that_is_gone_for_an_hour_are_dropped(registry: Registry, clock: Clock) -> None:
    def compile_policy(*routes: str) -> None:
        for route in routes:
            registry.requests(side="in", service="a", route=route).record(b"GET", 200, "ok", 0.1)
        registry.swapped()

    def routes() -> set[str]:
        return {dict(labels)["http_route"] for (name, labels) in read(registry) if name.endswith("_count")}

    forever = registry.counter("pillion_forever_total", "F.")
    registry.counter("pillion_policy_total", "P.", expires=True).inc()
    compile_policy("old", "kept")
    clock.now_s = 100
    compile_policy("kept", "new")
    assert routes() == {"old", "kept", "new"}
    clock.now_s = 100 + KEEP_GONE_S - 1
    assert routes() == {"old", "kept", "new"}
    clock.now_s += 1
    assert routes() == {"kept", "new"}
    assert ("pillion_policy_total", frozenset()) not in read(registry)
    assert value(registry, "pillion_forever_total") == forever.value


def test_a_route_that_comes_back_or_is_still_in_use_keeps_its_numbers(registry: Registry, clock: Clock) -> None:
    back = registry.requests(side="in", service="a", route="back")
    used = registry.requests(side="in", service="a", route="used")
    registry.swapped()
    registry.swapped()  # now neither is wanted
    clock.now_s = 1800
    assert registry.requests(side="in", service="a", route="back") is back
    used.record(b"GET", 200, "ok", 0.1)  # a long request of the old policy
    clock.now_s = 3600
    read(registry)
    assert registry.requests(side="in", service="a", route="back") is back
    assert registry.requests(side="in", service="a", route="used") is used


def test_counter_sets_are_bounded_and_keep_their_sum(registry: Registry) -> None:
    reasons = registry.counters("pillion_failed_total", "Failed.", "reason", side="in")
    for number in range(1000):
        reasons.inc(f"reason-{number}")
    samples = {k: v for k, v in read(registry).items() if k[0] == "pillion_failed_total"}
    assert len(samples) == 129
    assert sum(samples.values()) == 1000
    assert value(registry, "pillion_failed_total", side="in", reason="_OTHER") == 872
    assert reasons.get("reason-1") == 1
    assert registry.counters("pillion_failed_total", "Failed.", "reason", side="in") is reasons


def test_gauges_are_read_at_the_scrape(registry: Registry) -> None:
    numbers = {"a": 1.0, "b": 2.5}
    registry.gauge("pillion_one", "One.", lambda: len(numbers))
    registry.gauge("pillion_many", "Many.", lambda: (({"name": name}, number) for name, number in numbers.items()))
    assert value(registry, "pillion_one") == 2
    assert value(registry, "pillion_many", name="b") == 2.5
    numbers["c"] = math.inf
    assert value(registry, "pillion_one") == 3
    assert value(registry, "pillion_many", name="c") == math.inf
    registry.gauge("pillion_one", "One.", lambda: 7)  # the last one stays
    assert value(registry, "pillion_one") == 7


def test_a_gauge_that_raises_or_repeats_itself_does_not_spoil_the_scrape(registry: Registry) -> None:
    def broken() -> float:
        raise RuntimeError

    registry.gauge("pillion_broken", "Broken.", broken)
    registry.gauge("pillion_twice", "Twice.", lambda: [({"a": "1"}, 1.0), ({"a": "1"}, 2.0)])
    samples = read(registry)  # asserts that nothing comes twice
    assert not [name for name, _ in samples if name == "pillion_broken"]
    assert value(registry, "pillion_scrape_errors_total") == 1


@pytest.mark.parametrize("openmetrics", [False, True])
def test_histograms_levels_and_kept_counters(registry: Registry, openmetrics: bool) -> None:
    lag = registry.histogram("pillion_lag_seconds", "Lag.", (0.01, 0.1))
    for seconds in (0.01, 0.05, 5):
        lag.observe(seconds)
    registry.level("pillion_open", "Open.", side="in").value += 4
    registry.reading_counter("pillion_drops_total", "Drops.", lambda: 9, log="access")
    samples = read(registry, openmetrics=openmetrics)
    assert samples["pillion_lag_seconds_bucket", frozenset({("le", "0.01")})] == 1
    assert samples["pillion_lag_seconds_bucket", frozenset({("le", "0.1")})] == 2
    assert samples["pillion_lag_seconds_bucket", frozenset({("le", "+Inf")})] == 3
    assert samples["pillion_lag_seconds_sum", frozenset()] == pytest.approx(5.06)
    assert samples["pillion_open", frozenset({("side", "in")})] == 4
    assert samples["pillion_drops_total", frozenset({("log", "access")})] == 9


@given(st.text(max_size=60))
def test_any_label_value_survives_the_parser(text: str) -> None:
    registry = Registry(lambda: 0.0)
    registry.counter("pillion_x_total", 'Help with \\ and "\n lines.', name=text).inc()
    registry.counter("pillion_x_total", 'Help with \\ and "\n lines.', name="end").inc(2)
    for openmetrics in (False, True):
        samples = {k: v for k, v in read(registry, openmetrics=openmetrics).items() if k[0] == "pillion_x_total"}
        assert len(samples) == (1 if text == "end" else 2)
        if text != "end":
            assert samples["pillion_x_total", frozenset({("name", text)} if text else set())] == 1


def test_label_values_are_cut_and_may_be_broken_unicode(registry: Registry) -> None:
    registry.counter("pillion_x_total", "X.", name="\udcff" + "x" * 1000).inc()
    ((_, labels),) = [key for key in read(registry) if key[0] == "pillion_x_total"]
    (text,) = (dict(labels)["name"],)
    assert len(text) < 300


@pytest.mark.parametrize(
    ("name", "labels", "complaint"),
    [
        ("pillion_x", {}, "end in _total"),
        ("pillion x_total", {}, "not a metric name"),
        ("pillion_x_total", {"le": "1"}, "not a label name"),
        ("pillion_x_total", {"a-b": "1"}, "not a label name"),
    ],
)
def test_names_that_prometheus_refuses_are_refused_here(
    registry: Registry, name: str, labels: dict[str, str], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        registry.counter(name, "X.", **labels)


def test_one_name_has_one_meaning(registry: Registry) -> None:
    registry.counter("pillion_x_total", "X.")
    with pytest.raises(ValueError, match="already registered"):
        registry.counter("pillion_x_total", "Y.")
    registry.level("pillion_y", "Y.")
    with pytest.raises(ValueError, match="already registered"):
        registry.gauge("pillion_y", "Y.", lambda: 0)
    with pytest.raises(ValueError, match="do not rise"):
        registry.histogram("pillion_h", "H.", (1.0, 1.0))


def test_a_large_scrape_comes_in_small_steps_and_bears_changes_between_them(registry: Registry) -> None:
    for number in range(500):
        registry.requests(side="in", service="a", route=f"r{number}").record(b"GET", 200, "ok", 0.1)
    steps = 0
    for step in registry.render():
        steps += 1
        assert step.count(b"_count{") <= SERIES_PER_STEP
        registry.requests(side="in", service="a", route=f"new-{steps}").record(b"GET", 200, "ok", 0.1)
    assert steps > 500 / SERIES_PER_STEP
