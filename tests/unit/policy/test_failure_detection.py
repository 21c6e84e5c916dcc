"""From a policy file to endpoints left out: what an exchange tells breaker and outliers, with exact numbers."""

import pytest

from sidecar.model.load import load_texts
from sidecar.model.snapshot import EndpointSpec, Service
from sidecar.policy.cluster import Cluster, Destination, RoutePlan, Subset
from sidecar.policy.exchange import Do, Exchange
from sidecar.policy.outcome import Failure


def service_of(policy: str) -> Service:
    loaded = load_texts({"mesh.yaml": f"version: 1\nservices: {{shop: {{retry: {{max_retries: 0}}, {policy}}}}}\n"})
    assert loaded.snapshot is not None, loaded.errors
    return loaded.snapshot.services["shop"]


class Caller:
    """One caller of a service with so many endpoints, which are asked in turn."""

    def __init__(self, policy: str, endpoints: int = 1) -> None:
        service = service_of(policy)
        route = service.routes[-1]
        self.cluster = Cluster("shop", "out", service.limits, route.retry, 0.0)
        specs = [EndpointSpec(f"e{number}", 80) for number in range(endpoints)]
        self.cluster.update(specs, service.circuit_breaker, {}, "", "")
        self.told: list[str] = []
        self.cluster.breaker_events = self.cluster.outlier_events = lambda _, text: self.told.append(text)
        self.cluster.eject_outliers(service.outliers, 0.0)
        self.subset = Subset("", tuple(self.cluster.endpoints.values()), counts=self.cluster.counts)
        self.plan = RoutePlan("default", "shop")
        self.plan.bind(self.cluster, route.timeouts, route.retry, [(Destination(None, self.subset), 100)])

    def ask(self, answer: int | Failure, now: float, share: float = 0.0, *, grpc: int | None = None) -> str:
        ex = Exchange(self.plan, self.subset, b"GET", now, lambda: share, grpc=grpc is not None)
        if ex.begin(now) is not Do.SEND:
            return ex.outcome.reason
        if isinstance(answer, Failure):
            ex.failed(answer, now)
        elif ex.response_head(answer, now, grpc_status=grpc) is Do.RELAY:
            ex.response_end(now, grpc)
        return ex.outcome.reason


def test_the_success_rate_of_the_last_ten_seconds() -> None:
    """Ten one-second buckets: what happened in second 0 counts until 9.999 and no longer."""
    rate = "circuit_breaker: {consecutive_failures: 1000, success_rate: 50%}"
    early = Caller(rate)
    for answer in (500, 500, 500):
        early.ask(answer, 0.0)
    for answer in (200, 200):
        early.ask(answer, 9.9)
    assert early.told == ["open for 1.000 s: success rate 40% of 5 requests in 10 s"]
    late = Caller(rate)
    for answer in (500, 500, 500):
        late.ask(answer, 0.0)
    for answer in (200, 200, 200, 500):
        late.ask(answer, 10.0)
    assert late.told == []
    assert late.ask(500, 10.0) == "ok" and late.told == []  # 3 of 5
    assert late.ask(429, 10.0) == "ok"  # 3 of 6 is not under 50 %
    late.ask(429, 10.0)
    assert late.told == ["open for 1.000 s: success rate 43% of 7 requests in 10 s"]
    assert late.ask(200, 10.5) == "circuit_open"


@pytest.mark.parametrize(
    ("answer", "grpc", "what"),
    [
        (503, None, "503"),
        (500, None, "500"),
        (200, 14, "UNAVAILABLE"),
        (503, 0, "503 is no failure of a call that ended OK"),
        (Failure.CONNECT, None, "connect-error"),
        (Failure.RESET, None, "reset"),
        (Failure.BROKEN, None, "bad-response"),
    ],
)
def test_the_evidence_of_consecutive_failures(answer: int | Failure, grpc: int | None, what: str) -> None:
    caller = Caller("circuit_breaker: {consecutive_failures: 2}")
    for _ in range(2):
        caller.ask(answer, 1.0, grpc=grpc)
    expected = [] if "no failure" in what else [f"open for 1.000 s: 2 consecutive failures, the last {what}"]
    assert caller.told == expected
    if expected:
        caller.ask(answer, 2.0, grpc=grpc)
        assert caller.told[1:] == [
            "half-open: one request probes",
            f"open for 2.000 s: the probe failed: {what}",
        ]


def test_what_counts_for_outliers_counts_as_for_the_breaker() -> None:
    """Answers of each kind, a hundred times, to one of six: 5xx but 501 and 429 are against it, 4xx and 501 are not."""
    for answer, good in ((200, True), (404, True), (501, True), (500, False), (429, False), (Failure.RESET, False)):
        caller = Caller("outliers: {interval: 10s}, circuit_breaker: {consecutive_failures: 1000}", 6)
        for number in range(600):
            index = number % 6
            caller.ask(200 if index else answer, 1.0, (index + 0.5) / 6)
        endpoints = list(caller.cluster.endpoints.values())
        assert [e.successes + e.failures + e.throttled for e in endpoints] == [100] * 6
        caller.cluster.step(10.0)
        assert [e.ejected for e in endpoints] == [not good, *[False] * 5], answer
        if not good:
            assert caller.told == [
                "ejected: success rate 0.0% of 100 requests, mean 83.3%, threshold 12.5%; for 30s (1st time)"
            ]
            assert {caller.ask(200, 11.0, (index + 0.5) / 6) for index in range(6)} == {"ok"}
            assert endpoints[0].successes == 0


def test_a_refusal_of_the_callees_sidecar_says_nothing() -> None:
    caller = Caller("outliers: {interval: 10s}", 6)
    for number in range(600):
        caller.ask(Failure.REFUSED, 1.0, (number % 6 + 0.5) / 6)
    assert all(e.successes == e.failures == e.throttled == 0 for e in caller.cluster.endpoints.values())
