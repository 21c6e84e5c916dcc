"""Hedges in pure policy: who may be hedged, what it costs, what the two endpoints hear."""

from typing import Any

import pytest
from support.memory_exchange import at_rest, endpoints_of, make_cluster, make_exchange, make_plan

from sidecar.model.snapshot import Budget, CircuitBreaker, Limits, Retry, Timeouts
from sidecar.policy import hedging
from sidecar.policy.breaker import BEATEN_MIN, Breaker
from sidecar.policy.budget import Budget as Purse
from sidecar.policy.exchange import RELAY, SEND, Exchange
from sidecar.policy.hedging import Head
from sidecar.policy.outcome import Failure

RICH = Retry(max_retries=1, statuses=frozenset({503, 409}), budget=Budget(100.0, 1.0), base_s=0.0)


def begun(method: bytes = b"GET", endpoints: int = 2, **options: Any) -> Exchange:
    retry = options.pop("retry", RICH)
    cluster = make_cluster(endpoints=endpoints, retry=retry, **options.pop("cluster", {}))
    ex = make_exchange(make_plan(cluster, Timeouts(total_s=10.0, try_s=1.0), retry), method, **options)
    assert ex.begin(0.0) is SEND
    return ex


def hedged(ex: Exchange, now: float = 0.05) -> Exchange:
    found = hedging.hedge(ex, now)
    assert isinstance(found, Exchange)
    return found


def test_a_hedge_has_its_own_endpoint_number_slot_and_time():
    ex = begun()
    other = hedged(ex, 0.25)
    assert other.endpoint is not ex.endpoint and other.inherited == 1
    assert (ex.cluster.active, ex.cluster.attempts, ex.cluster.retries) == (2, 2, 0)
    assert (ex.due, other.due, other.ends) == (1.0, 1.25, ex.ends)
    hedging.drop(other, 0.3)
    assert ex.cluster.active == 1 and other.endpoint is None
    assert ex.response_head(200, 0.4) is RELAY
    ex.response_end(0.4)
    assert at_rest(ex.cluster)


@pytest.mark.parametrize(
    ("options", "yes"),
    [
        ({}, True),
        ({"method": b"PUT"}, False),
        ({"method": b"PUT", "retry": Retry(methods=frozenset({"PUT"}))}, True),
        ({"method": b"POST"}, False),
        ({"method": b"POST", "idempotency_key": True}, False),
        ({"method": b"POST", "idempotency_key": True, "retry": Retry(methods=frozenset({"HEAD"}))}, False),
        ({"method": b"POST", "retry": Retry(methods=frozenset({"any"}))}, True),
        ({"method": b"GET", "retry": Retry(methods=frozenset({"HEAD"}))}, False),
        ({"inherited": 1}, False),
    ],
)
def test_who_may_be_hedged(options, yes):
    assert hedging.hedgeable(begun(**options), options.get("method", b"GET")) is yes


def test_only_a_whole_request_that_waits_for_its_head_is_hedged():
    ex = begun()
    assert hedging.awaited(ex)
    ex.request_done = False
    assert not hedging.awaited(ex)
    ex.request_done, ex.replayable = True, False
    assert not hedging.awaited(ex)
    ex.replayable = True
    ex.failed(Failure.CONNECT, 0.1)
    assert ex.waiting and not hedging.awaited(ex)
    ex.deadline(0.1)
    ex.response_head(200, 0.2)
    assert not hedging.awaited(ex)


def test_why_there_is_none():
    assert hedging.hedge(begun(endpoints=1), 0.1) == hedging.NO_ENDPOINT
    assert hedging.hedge(begun(cluster={"limits": Limits(requests=1)}), 0.1) == hedging.OVERFLOW
    assert hedging.hedge(begun(retry=Retry(budget=Budget(0.0, 0.0))), 0.1) == hedging.NO_BUDGET
    ex = begun(cluster={"breaker": CircuitBreaker(1)})
    for endpoint in endpoints_of(ex.cluster):
        if endpoint is not ex.endpoint:
            endpoint.breaker.failure(0, 0.05, lambda: 0.0)
    assert hedging.hedge(ex, 0.1) == hedging.NO_ENDPOINT
    ex = begun()
    ex.cluster.waiters.append(object())
    assert hedging.hedge(ex, 0.1) == hedging.OVERFLOW and ex.cluster.active == 1


def test_hedges_leave_half_of_the_budget_to_retries():
    purse = Purse(20.0, 0.0, 0.0)
    for _ in range(100):
        purse.deposit(0.0)
    assert [purse.withdraw_spare(0.0) for _ in range(12)] == [True] * 10 + [False] * 2
    assert [purse.withdraw(0.0) for _ in range(12)] == [True] * 10 + [False] * 2
    purse = Purse(0.0, 1.0, 0.0)
    assert [purse.withdraw(0.0) for _ in range(4)] == [True] * 4
    assert [purse.withdraw_spare(0.0) for _ in range(2)] == [True, False]
    assert purse.withdraw_spare(11.0)


@pytest.mark.parametrize(
    ("status", "reason", "worth"),
    [
        (200, None, Head.GOOD),
        (404, None, Head.GOOD),
        (501, None, Head.GOOD),
        (500, None, Head.BAD),
        (503, "overflow", Head.BAD),
        (503, "draining", Head.BAD),
        (429, "rate_limited", Head.BAD),
        (403, "denied", Head.GOOD),
        (409, None, Head.BAD),  # `when` lists it
    ],
)
def test_what_an_answer_is_worth(status, reason, worth):
    assert hedging.judge(begun(), status, reason, None, True, True) is worth


@pytest.mark.parametrize(
    ("grpc_status", "message", "ended", "worth"),
    [
        (None, False, False, Head.OPEN),
        (None, True, False, Head.GOOD),
        (0, True, True, Head.GOOD),
        (5, False, True, Head.GOOD),
        (8, False, True, Head.BAD),
        (14, False, True, Head.BAD),
    ],
)
def test_what_a_calls_answer_is_worth(grpc_status, message, ended, worth):
    ex = begun(b"POST", grpc=True, idempotency_key=True)
    assert hedging.judge(ex, 200, None, grpc_status, message, ended) is worth
    assert hedging.judge(ex, 503, None, None, False, True) is Head.BAD


def test_the_hedge_wins():
    ex = begun()
    other, loser = hedged(ex), ex.endpoint
    winner = other.endpoint
    assert loser is not None and winner is not None
    hedging.beaten(ex, 0.1)
    hedging.adopt(ex, other, loser, 0.1)
    assert ex.endpoint is winner and other.finished and ex.cluster.active == 1 and ex.tried == (loser,)
    assert ex.response_head(200, 0.1) is RELAY
    ex.response_end(0.2)
    assert at_rest(ex.cluster)
    assert (winner.successes, winner.failures, loser.successes, loser.failures) == (1, 0, 0, 0)


def test_the_first_attempt_fails_and_then_the_hedge_so_that_it_is_retried():
    ex = begun(endpoints=3)
    other, first = hedged(ex), ex.endpoint
    assert first is not None
    hedging.failed(ex, Failure.RESET, False, 0.1)
    hedging.adopt(ex, other, first, 0.1)
    assert first.failures == 1 and ex.due == 1.05
    second = ex.endpoint
    ex.failed(Failure.RESET, 0.2)
    assert ex.waiting and ex.deadline(0.2) is SEND
    assert ex.endpoint not in (first, second)


def test_a_connection_that_died_idle_and_a_server_that_had_not_begun_are_nobodys_fault():
    for failure, reused in ((Failure.RESET, True), (Failure.REFUSED, False)):
        ex = begun()
        endpoint = ex.endpoint
        hedging.failed(ex, failure, reused, 0.1)
        assert endpoint is not None and endpoint.failures == 0 and ex.endpoint is None


class Told:
    def __init__(self) -> None:
        self.heard: list[tuple[str, float]] = []

    def began(self, endpoint: Any, now: float) -> None:
        pass

    def ended(self, endpoint: Any, result: str, latency_s: float, now: float) -> None:
        self.heard.append((result, round(latency_s, 6)))


def test_a_balancer_hears_of_each_attempt_once_and_that_the_beaten_one_takes_at_least_so_long():
    cluster = make_cluster(retry=RICH)
    told = cluster.feedback = Told()
    ex = make_exchange(make_plan(cluster, retry=RICH))
    ex.begin(0.0)
    other, loser = hedged(ex), ex.endpoint
    assert loser is not None
    hedging.beaten(ex, 0.08)
    hedging.adopt(ex, other, loser, 0.08)
    ex.response_head(200, 0.08)
    ex.response_end(0.1)
    assert told.heard == [("failure", 0.08), ("success", 0.03)]
    ex = make_exchange(make_plan(cluster, retry=RICH))
    ex.begin(1.0)
    hedging.drop(hedged(ex, 1.05), 1.06)
    assert told.heard[2:] == [("neutral", 0.01)]


def breaker(threshold: int = 7) -> tuple[Breaker, list[str]]:
    changes: list[str] = []
    return Breaker(CircuitBreaker(threshold, 1.0, 60.0), changes.append), changes


def lose(each: Breaker, now: float, answers: int) -> None:
    each.beaten(each.generation, now, lambda: 0.0, answers)


def test_an_endpoint_that_hedges_beat_time_and_again_is_left_alone():
    each, changes = breaker()
    for number in range(BEATEN_MIN - 1):
        lose(each, float(number), 0)
    assert not each.tripped
    lose(each, 7.0, 1)  # an answer in between
    assert not each.tripped
    for number in range(BEATEN_MIN - 1):
        lose(each, 8.0 + number, 1)
    assert each.tripped and changes == ["open for 1.000 s: hedges were faster 7 times in a row"]
    assert each.start_probe(20.0, 1.0)
    lose(each, 20.1, 1)
    assert each.state(20.2) == "open" and changes[-1] == "open for 2.000 s: the probe failed: a hedge was faster"


@pytest.mark.parametrize(("threshold", "opens_at"), [(1, BEATEN_MIN), (20, 20)])
def test_a_hedge_is_less_than_a_failure(threshold, opens_at):
    each, _ = breaker(threshold)
    for _ in range(opens_at):
        assert not each.tripped
        lose(each, 1.0, 0)
    assert each.tripped


def test_being_beaten_neither_adds_to_failures_nor_hides_them():
    each, _ = breaker(2)
    each.failure(0, 0.0, lambda: 0.0)
    lose(each, 0.1, 0)
    assert not each.tripped and each.failures == 1
    each.failure(0, 0.2, lambda: 0.0)
    assert each.tripped
    each.beaten(0, 0.3, lambda: 0.0, 0)  # of an older generation
    assert each.state(0.4) == "open"
