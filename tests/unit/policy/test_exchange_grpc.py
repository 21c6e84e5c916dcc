"""What an exchange makes of gRPC calls: the deadline of a whole call, statuses at the head and at the end, retries."""

from typing import Any

import pytest
from support.memory_exchange import at_rest, make_cluster, make_exchange, make_plan

from sidecar.model.snapshot import NONE, CircuitBreaker, Retry, Timeouts
from sidecar.policy.exchange import ANSWER, CUT, DONE, OFF, RELAY, RESENDS_MAX, SEND, WAIT, Exchange
from sidecar.policy.outcome import Failure, Grpc, Outcome

UNAVAILABLE = Retry(max_retries=1, grpc=frozenset({Grpc.UNAVAILABLE}), base_s=0.0, max_s=0.0)


def call(
    retry: Retry = Retry(),  # noqa: B008
    timeouts: Timeouts = Timeouts(),  # noqa: B008
    breaker: CircuitBreaker = CircuitBreaker(),  # noqa: B008
    **options: Any,
) -> Exchange:
    cluster = make_cluster(endpoints=2, retry=retry, breaker=breaker)
    ex = make_exchange(make_plan(cluster, timeouts, retry), b"POST", grpc=True, **options)
    assert ex.begin(0.0) is SEND
    return ex


def ended(ex: Exchange, outcome: Outcome) -> bool:
    return ex.finished and ex.outcome is outcome and ex.due == OFF and at_rest(ex.cluster)


# Deadlines


@pytest.mark.parametrize(
    ("timeouts", "told_s", "ends"),
    [
        (Timeouts(), OFF, OFF),  # the built-in total is not for calls
        (Timeouts(total_s=2.0), OFF, 2.0),
        (Timeouts(total_s=15.0, total_grpc_s=15.0), OFF, 15.0),  # the same, but stated
        (Timeouts(total_s=15.0), 3.0, 3.0),
        (Timeouts(total_s=2.0), 3.0, 2.0),
        (Timeouts(total_s=4.0), 3.0, 3.0),
        (Timeouts(total_s=20.0, total_grpc_s=NONE), OFF, OFF),
    ],
)
def test_the_smaller_of_what_is_told_and_what_is_stated(timeouts: Timeouts, told_s: float, ends: float) -> None:
    ex = call(timeouts=timeouts, told_s=told_s)
    assert ex.ends == ends and ex.due == ends


def test_a_deadline_covers_the_whole_call() -> None:
    ex = call(timeouts=Timeouts(total_s=2.0, try_s=0.5), told_s=OFF)
    ex.request_done = False
    ex.connected(0.1)
    assert ex.due == 2.0  # the request goes on: the try's clock stands still, the call's does not
    ex.request_end(1.0)
    assert ex.due == 1.5 and ex.ends == 2.0
    assert ex.response_head(200, 1.2) is RELAY
    assert ex.due == 2.0
    assert ex.deadline(2.0) is CUT
    assert ended(ex, Outcome.TIMEOUT_TOTAL)


@pytest.mark.parametrize(("told_s", "failures"), [(OFF, 1), (1.0, 0)])
def test_only_the_policy_own_deadline_blames(told_s: float, failures: int) -> None:
    ex = call(timeouts=Timeouts(total_s=2.0), told_s=told_s)
    endpoint = ex.endpoint
    assert endpoint is not None
    ex.response_head(200, 0.5)
    assert ex.deadline(ex.due) is CUT
    assert endpoint.failures == failures


def test_a_cap_of_the_inbound_request_holds_for_its_calls() -> None:
    ex = call(cap=0.7)
    assert ex.ends == 0.7
    assert ex.deadline(0.7) is ANSWER and ended(ex, Outcome.TIMEOUT_TOTAL)


# Who is to blame


def outcome_at_end(grpc_status: int | None, ex: Exchange | None = None) -> tuple[int, int, int]:
    """Successes, failures, consecutive failures of the endpoint after a response with a message."""
    ex = ex or call()
    endpoint = ex.endpoint
    assert endpoint is not None
    assert ex.response_head(200, 0.1) is RELAY
    assert (endpoint.successes, endpoint.failures) == (0, 0)  # it is not known yet
    assert ex.response_end(0.2, grpc_status) is DONE
    return endpoint.successes, endpoint.failures, endpoint.breaker.failures


@pytest.mark.parametrize(
    "status", [Grpc.UNAVAILABLE, Grpc.INTERNAL, Grpc.UNKNOWN, Grpc.DATA_LOSS, Grpc.DEADLINE_EXCEEDED, None]
)
def test_failures(status: int | None) -> None:
    assert outcome_at_end(status) == (0, 1, 1)


@pytest.mark.parametrize("status", [Grpc.OK, Grpc.NOT_FOUND, Grpc.ABORTED, Grpc.UNIMPLEMENTED, Grpc.CANCELLED])
def test_successes(status: int) -> None:
    assert outcome_at_end(status) == (1, 0, 0)


def test_resource_exhausted_is_neither() -> None:
    ex = call()
    endpoint = ex.endpoint
    assert endpoint is not None
    endpoint.breaker.failures = 3
    assert outcome_at_end(Grpc.RESOURCE_EXHAUSTED, ex) == (0, 0, 3)


def test_trailers_only_is_judged_at_the_head() -> None:
    ex = call()
    endpoint = ex.endpoint
    assert endpoint is not None
    assert ex.response_head(200, 0.1, grpc_status=Grpc.UNAVAILABLE, message=False) is RELAY
    assert endpoint.failures == 1
    ex.response_end(0.1, Grpc.UNAVAILABLE)
    assert endpoint.failures == 1 and ended(ex, Outcome.OK)


@pytest.mark.parametrize(("status", "failures"), [(503, 1), (500, 1), (404, 0), (401, 0)])
def test_an_answer_that_is_not_grpc_counts_as_what_a_client_makes_of_it(status: int, failures: int) -> None:
    ex = call()
    endpoint = ex.endpoint
    assert endpoint is not None
    ex.response_head(status, 0.1)
    assert endpoint.failures == failures and endpoint.successes == 1 - failures


def test_a_probe_is_judged_by_the_head() -> None:
    ex = call(breaker=CircuitBreaker(consecutive_failures=1, open_for_s=1.0))
    endpoint = ex.endpoint
    assert endpoint is not None
    ex.response_head(200, 0.0, grpc_status=Grpc.INTERNAL, message=False)
    ex.response_end(0.0, Grpc.INTERNAL)
    states = [endpoint.breaker.state(0.5)]
    other = next(each for each in ex.cluster.endpoints.values() if each is not endpoint)
    other.healthy = False
    other.breaker.failure(other.breaker.generation, 0.0, lambda: 0.0)
    probe = make_exchange(ex.plan, b"POST", now=1.0, grpc=True)
    assert probe.begin(1.0) is SEND and probe.endpoint is not None
    assert probe.response_head(200, 1.1) is RELAY
    states.append(probe.endpoint.breaker.state(1.1))
    assert states == ["open", "closed"]
    probe.response_end(9.0, Grpc.OK)


# Retries


def test_a_named_status_is_retried_although_calls_are_post() -> None:
    ex = call(UNAVAILABLE)
    first = ex.endpoint
    assert ex.awaits_status
    assert ex.response_head(200, 0.1, grpc_status=Grpc.UNAVAILABLE, message=False) is WAIT
    assert ex.deadline(ex.due) is SEND and ex.endpoint is not first
    assert not ex.awaits_status  # none are left
    assert ex.response_head(200, 0.2, grpc_status=Grpc.UNAVAILABLE, message=False) is RELAY
    assert ex.exhausted


@pytest.mark.parametrize(
    "told",
    [
        {"grpc_status": Grpc.UNAVAILABLE, "message": True},  # a message has come
        {"grpc_status": Grpc.INTERNAL, "message": False},  # not named
        {"grpc_status": Grpc.OK, "message": False},
        {"grpc_status": None, "message": False},
        {"grpc_status": Grpc.UNAVAILABLE, "message": False, "exhausted": True},
        {"grpc_status": Grpc.UNAVAILABLE, "message": False, "reason": "overflow"},  # the table says never
        {"grpc_status": Grpc.UNAVAILABLE, "message": False, "retry_after_s": -0.001},  # a push-back: not again
        {"grpc_status": Grpc.UNAVAILABLE, "message": False, "retry_after_s": 60.0},
    ],
)
def test_what_is_not_retried(told: dict[str, Any]) -> None:
    assert call(UNAVAILABLE).response_head(200, 0.1, **told) is RELAY


def test_push_back_is_waited_for() -> None:
    ex = call(UNAVAILABLE)
    assert ex.response_head(200, 0.0, retry_after_s=0.25, grpc_status=Grpc.UNAVAILABLE, message=False) is WAIT
    assert ex.due == 0.25


def test_within_another_layer_retry_nothing_is_repeated() -> None:
    ex = call(UNAVAILABLE, inherited=1)
    assert not ex.awaits_status
    assert ex.response_head(200, 0.0, grpc_status=Grpc.UNAVAILABLE, message=False) is RELAY


def test_a_status_of_http_counts_as_what_a_client_makes_of_it() -> None:
    assert call(UNAVAILABLE).response_head(503, 0.0, message=False) is WAIT
    assert call(UNAVAILABLE).response_head(500, 0.0, message=False) is RELAY


def test_what_would_be_unavailable_to_the_caller_is_covered_too() -> None:
    assert call(UNAVAILABLE).failed(Failure.RESET, 0.0) is WAIT
    assert call().failed(Failure.RESET, 0.0) is ANSWER  # `reset` alone is for what is safe
    late = Retry(max_retries=1, grpc=frozenset({Grpc.DEADLINE_EXCEEDED}), base_s=0.0, max_s=0.0)
    assert call(late, Timeouts(try_s=1.0)).deadline(1.0) is WAIT
    assert call(UNAVAILABLE, Timeouts(try_s=1.0)).deadline(1.0) is ANSWER


@pytest.mark.parametrize(
    ("reason", "status", "retry", "retried"),
    [
        ("connect_failed", Grpc.UNAVAILABLE, Retry(), True),  # it cannot have been seen
        ("draining", Grpc.UNAVAILABLE, Retry(), True),
        ("upstream_reset", Grpc.UNAVAILABLE, Retry(), False),
        ("upstream_reset", Grpc.UNAVAILABLE, UNAVAILABLE, True),
        ("timeout_total", Grpc.DEADLINE_EXCEEDED, Retry(grpc=frozenset({Grpc.DEADLINE_EXCEEDED})), False),
        ("rate_limited", Grpc.RESOURCE_EXHAUSTED, Retry(), False),
        ("rate_limited", Grpc.RESOURCE_EXHAUSTED, Retry(grpc=frozenset({Grpc.RESOURCE_EXHAUSTED})), True),
        ("rate_limited", Grpc.RESOURCE_EXHAUSTED, Retry(statuses=frozenset({429})), False),  # POST is not safe
        ("denied", Grpc.PERMISSION_DENIED, Retry(grpc=frozenset({Grpc.PERMISSION_DENIED})), False),
    ],
)
def test_answers_of_a_peers_sidecar(reason: str, status: int, retry: Retry, retried: bool) -> None:
    ex = call(retry)
    do = ex.response_head(200, 0.0, reason, grpc_status=status, message=False)
    assert do is (WAIT if retried else RELAY)


@pytest.mark.parametrize(
    ("reason", "status", "failures"),
    [
        ("overflow", Grpc.UNAVAILABLE, 0),
        ("denied", Grpc.PERMISSION_DENIED, 0),
        ("connect_failed", Grpc.UNAVAILABLE, 1),
        ("timeout_try", Grpc.DEADLINE_EXCEEDED, 1),
    ],
)
def test_blame_goes_by_the_table(reason: str, status: int, failures: int) -> None:
    ex = call(Retry(max_retries=0))
    endpoint = ex.endpoint
    assert endpoint is not None
    assert ex.response_head(200, 0.0, reason, grpc_status=status, message=False) is RELAY
    assert endpoint.failures == failures and endpoint.successes == 0


def test_a_refused_stream_is_retried_for_every_method() -> None:
    ex = call()
    assert ex.failed(Failure.REFUSED, 0.0) is WAIT
    ex = call(Retry(max_retries=0))
    for _ in range(RESENDS_MAX):
        assert ex.failed(Failure.REFUSED, 0.0, reused=True) is SEND and ex.fresh  # free of charge
    assert ex.failed(Failure.REFUSED, 0.0, reused=True) is ANSWER
    assert ended(ex, Outcome.CONNECT_FAILED)
