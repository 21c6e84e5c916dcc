"""What a heartbeat tells of traffic: differences of counters that outlive policies."""

from sidecar.discovery.reports import EVIDENCE_CHARS_MAX, Edges, breakers, evidence
from sidecar.model.snapshot import CircuitBreaker, EndpointSpec, Limits, Retry
from sidecar.policy.cluster import Cluster


def cluster(name: str, *ports: int, side: str = "out") -> Cluster:
    made = Cluster(name, side, Limits(), Retry(), 0.0)
    made.update([EndpointSpec("10.0.0.1", port) for port in ports], CircuitBreaker(consecutive_failures=1), {}, "", "")
    return made


def test_edges_are_what_came_since_the_last_reading() -> None:
    reviews, app = cluster("reviews", 1, 2), cluster("web", 80, side="in")
    clusters = {("out", "reviews", "http"): reviews, ("in", "web", "http"): app}
    edges = Edges()
    assert edges.take(clusters) == []
    reviews.attempts = app.attempts = 7
    next(iter(reviews.endpoints.values())).failures = 2
    assert edges.take(clusters) == [("reviews", 7, 2)]
    assert edges.take(clusters) == []
    reviews.attempts += 1
    assert edges.take(clusters) == [("reviews", 1, 0)]


def test_what_a_retry_made_good_is_no_failure_and_it_is_no_request() -> None:
    reviews = cluster("reviews", 1)
    clusters = {("out", "reviews", "http"): reviews}
    edges = Edges()
    reviews.attempts, reviews.retries, reviews.resends = 12, 2, 1
    next(iter(reviews.endpoints.values())).failures = 4
    assert edges.take(clusters) == [("reviews", 9, 1)]


def test_ports_of_one_service_add_up_and_an_endpoint_may_go() -> None:
    http, api = cluster("reviews", 1), cluster("reviews", 1)
    clusters = {("out", "reviews", "http"): http, ("out", "reviews", "api"): api}
    edges = Edges()
    http.attempts = api.attempts = 3
    next(iter(http.endpoints.values())).failures = 1
    assert edges.take(clusters) == [("reviews", 6, 1)]
    http.endpoints = {}
    http.attempts += 2
    assert edges.take(clusters) == [("reviews", 2, 0)]


def test_breakers_that_are_not_closed() -> None:
    reviews = cluster("reviews", 1, 2)
    clusters = {("out", "reviews", "http"): reviews}
    assert breakers(clusters, 0.0) == []
    first = next(iter(reviews.endpoints.values()))
    first.breaker.failure(first.breaker.generation, 0.0, lambda: 0.5)
    assert breakers(clusters, 0.0) == [("reviews", "10.0.0.1:1", "open")]
    assert evidence(clusters) == []
    first.note("12:00 breaker open for 1.2 s: 1 consecutive failures")
    second = list(reviews.endpoints.values())[1]
    second.eject()
    second.note("12:01 outlier ejected: x" + "x" * 400)
    assert breakers(clusters, 0.0)[1] == ("reviews", second.key, "ejected")
    assert [(key, text[:14]) for _, key, text in evidence(clusters)] == [
        ("10.0.0.1:1", "12:00 breaker "),
        (second.key, "12:01 outlier "),
    ]
    assert max(len(text) for _, _, text in evidence(clusters)) == EVIDENCE_CHARS_MAX
