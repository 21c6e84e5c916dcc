"""The exchange as a state machine: every step's exact answer, with time passed in."""

from typing import Any

import pytest
from support.memory_exchange import EVERYTHING, at_rest, endpoints_of, make_cluster, make_exchange, make_plan

from sidecar.model.snapshot import Budget, CircuitBreaker, Limits, Respond, Retry, Timeouts
from sidecar.policy.cluster import FallbackPlan, Subset
from sidecar.policy.exchange import ANSWER, CUT, DONE, OFF, RELAY, SEND, WAIT, Do, Exchange
from sidecar.policy.outcome import Failure, Outcome

HARD = 1.0 - 1e-12  # chance at its maximum


def start(
    retry: Retry = Retry(),  # noqa: B008
    timeouts: Timeouts = Timeouts(),  # noqa: B008
    *,
    endpoints: int = 2,
    method: bytes = b"GET",
    rnd: float = 0.0,
    breaker: CircuitBreaker = CircuitBreaker(),  # noqa: B008
    **options: Any,
) -> Exchange:
    cluster = make_cluster(endpoints=endpoints, retry=retry, breaker=breaker)
    ex = make_exchange(make_plan(cluster, timeouts, retry), method, rnd=lambda: rnd, **options)
    assert ex.begin(0.0) is SEND
    return ex


def ended(ex: Exchange, outcome: Outcome) -> bool:
    return ex.finished and ex.outcome is outcome and ex.due == OFF and at_rest(ex.cluster)


# One attempt


def test_success_gives_everything_back_at_the_end_of_the_response():
    ex = start()
    endpoint = ex.endpoint
    assert endpoint is not None and endpoint.active == 1 and ex.cluster.active == 1 and ex.due == 15.0
    assert ex.response_head(200, 1.0) is RELAY
    assert ex.due == OFF and ex.begun and endpoint.active == 1
    assert ex.response_end(2.0) is DONE
    assert ended(ex, Outcome.OK) and endpoint.successes == 1


def test_a_response_that_breaks_off_is_cut_and_blamed():
    ex = start()
    endpoint = ex.endpoint
    assert ex.response_head(200, 1.0) is RELAY
    assert ex.failed(Failure.RESET, 2.0, reused=True) is CUT
    assert ended(ex, Outcome.CUT_SHORT)
    assert endpoint is not None and endpoint.breaker.failures == 1


@pytest.mark.parametrize("begun", [False, True])
def test_a_caller_that_leaves_blames_nobody(begun):
    ex = start()
    endpoint = ex.endpoint
    if begun:
        ex.response_head(200, 1.0)
    assert ex.caller_gone(2.0) is DONE
    assert ex.caller_gone(2.0) is DONE  # more does no harm
    assert ended(ex, Outcome.CALLER_GONE) and ex.cluster.cancelled == 1
    assert endpoint is not None and endpoint.failures == 0


def test_a_caller_that_leaves_during_a_back_off():
    ex = start(Retry(base_s=1.0, max_s=1.0), rnd=0.5)
    assert ex.failed(Failure.CONNECT, 0.0) is WAIT
    ex.caller_gone(0.1)
    assert ended(ex, Outcome.CALLER_GONE)


def test_requests_over_the_limit_overflow_and_are_counted():
    cluster = make_cluster(limits=Limits(requests=2))
    plan = make_plan(cluster)
    first, second, third = (make_exchange(plan) for _ in range(3))
    assert [first.begin(0.0), second.begin(0.0), third.begin(0.0)] == [SEND, SEND, ANSWER]
    assert third.outcome is Outcome.OVERFLOW and third.status == 503 and cluster.active == 2
    assert cluster.overflows == 1
    first.caller_gone(0.0)
    assert make_exchange(plan).begin(0.0) is SEND


def test_a_full_queue_is_answered_without_blame():
    ex = start()
    endpoint = ex.endpoint
    assert ex.refused(Outcome.OVERFLOW, 1.0) is ANSWER
    assert ended(ex, Outcome.OVERFLOW)
    assert endpoint is not None and endpoint.failures == 0


def test_a_silent_body():
    ex = start(method=b"POST")
    assert ex.body_timeout(3.0) is ANSWER
    assert ended(ex, Outcome.REQUEST_TIMEOUT) and ex.status == 408
    ex = start()
    ex.response_head(200, 1.0)
    assert ex.body_timeout(3.0) is CUT
    assert ended(ex, Outcome.CUT_SHORT)


# Back-off


def back_offs(ex: Exchange, attempts: int) -> list[float]:
    """The waits before each retry, in milliseconds, when every attempt meets a connect error."""
    waits, now = [], 0.0
    for _ in range(attempts):
        assert ex.failed(Failure.CONNECT, now) is WAIT
        waits.append(round((ex.due - now) * 1e3, 6))
        now = ex.due
        assert ex.deadline(now) is SEND
    assert ex.failed(Failure.CONNECT, now) is ANSWER
    return waits


def test_upper_bounds_of_the_back_off():
    ex = start(Retry(max_retries=6), rnd=HARD)
    assert back_offs(ex, 6) == pytest.approx([25, 50, 100, 200, 250, 250])
    assert ended(ex, Outcome.CONNECT_FAILED) and ex.exhausted and ex.cluster.retries == 6


def test_full_jitter_reaches_down_to_nothing():
    assert back_offs(start(Retry(max_retries=3), rnd=0.0), 3) == [0, 0, 0]
    assert back_offs(start(Retry(max_retries=3), rnd=0.5), 3) == [12.5, 25, 50]


def test_a_back_off_that_would_pass_the_deadline_returns_the_last_response_now():
    ex = start(Retry(statuses=frozenset({503}), base_s=2.0, max_s=2.0), Timeouts(total_s=3.0), rnd=0.5)
    assert ex.response_head(503, 2.0) is RELAY  # 2 + 1 is no sooner than 3
    assert not ex.exhausted and ex.cluster.retries == 0
    assert ex.cluster.budget.balance(2.0) == pytest.approx(10.2)  # nothing was withdrawn
    ex = start(Retry(base_s=2.0, max_s=2.0), Timeouts(total_s=3.0), rnd=0.5)
    assert ex.failed(Failure.CONNECT, 2.0) is ANSWER
    assert ended(ex, Outcome.CONNECT_FAILED)
    ex = start(Retry(statuses=frozenset({503}), base_s=2.0, max_s=2.0), Timeouts(total_s=3.0), rnd=0.5)
    assert ex.response_head(503, 1.999) is WAIT


def test_the_last_attempt_gets_what_is_left_of_the_total():
    retry = Retry(failures=EVERYTHING, base_s=1.0, max_s=1.0)
    ex = start(retry, Timeouts(total_s=5.0, try_s=3.0), rnd=0.5)
    assert ex.due == 3.0
    assert ex.deadline(3.0) is WAIT and ex.due == 3.5
    assert ex.deadline(3.5) is SEND and ex.due == 5.0  # not 6.5
    assert ex.deadline(5.0) is ANSWER
    assert ended(ex, Outcome.TIMEOUT_TOTAL)


def test_a_driver_that_wakes_too_late_from_a_back_off_asks_nobody():
    ex = start(Retry(base_s=1.0, max_s=1.0), Timeouts(total_s=2.0), rnd=0.5)
    endpoint = ex.endpoint
    assert ex.failed(Failure.CONNECT, 1.0) is WAIT and ex.due == 1.5
    assert ex.deadline(2.5) is ANSWER
    assert ended(ex, Outcome.TIMEOUT_TOTAL) and ex.cluster.attempts == 1
    assert sum(e.failures for e in endpoints_of(ex.cluster)) == 1
    assert endpoint is not None and endpoint.failures == 1  # the connect error


def test_a_late_driver_still_calls_a_try_timeout_by_its_name():
    ex = start(Retry(failures=frozenset()), Timeouts(total_s=5.0, try_s=3.0), told_s=5.0 - 1e-6)
    assert ex.deadline(6.0) is ANSWER
    assert ended(ex, Outcome.TIMEOUT_TRY)


# Retry-After


@pytest.mark.parametrize(
    ("asked_s", "rnd", "wait_s"),
    [(2.0, 0.0, 2.0), (2.0, 0.5, 2.5), (5.0, HARD, 7.5), (0.0, 0.5, 0.0), (5.1, 0.0, None)],
)
def test_retry_after_is_obeyed_with_jitter_up_to_the_limit(asked_s, rnd, wait_s):
    ex = start(Retry(statuses=frozenset({503})), rnd=rnd)
    do = ex.response_head(503, 1.0, retry_after_s=asked_s)
    if wait_s is None:
        assert do is RELAY and not ex.exhausted
    else:
        assert do is WAIT and ex.due == pytest.approx(1.0 + wait_s)


def test_retry_after_may_be_disregarded_by_policy():
    ex = start(Retry(statuses=frozenset({503}), honour_retry_after=False), rnd=0.5)
    assert ex.response_head(503, 1.0, retry_after_s=60.0) is WAIT
    assert ex.due == pytest.approx(1.0125)


def test_retry_after_beyond_the_deadline_returns_the_response_now():
    ex = start(Retry(statuses=frozenset({429})), Timeouts(total_s=3.0))
    assert ex.response_head(429, 1.0, retry_after_s=2.0) is RELAY


# What is retried


def test_max_retries_counts_retries():
    ex = start(Retry(max_retries=2, statuses=frozenset({503})))
    for _ in range(2):
        assert ex.response_head(503, 0.0) is WAIT
        assert ex.deadline(0.0) is SEND
    assert ex.response_head(503, 0.0) is RELAY
    assert ex.exhausted and ex.status == 503 and ex.cluster.attempts == 3
    ex.response_end(0.0)
    assert ended(ex, Outcome.OK)


def test_without_retries_nothing_is_exhausted():
    ex = start(Retry(max_retries=0, statuses=frozenset({503})))
    assert ex.response_head(503, 0.0) is RELAY
    assert not ex.exhausted
    ex = start(Retry(max_retries=2, statuses=frozenset({503})))
    assert ex.response_head(500, 0.0) is RELAY  # not listed
    assert not ex.exhausted


def test_a_retry_avoids_what_was_tried():
    ex = start(Retry(max_retries=2), endpoints=3)
    seen = set()
    for _ in range(3):
        assert ex.endpoint is not None
        seen.add(ex.endpoint.key)
        if ex.failed(Failure.CONNECT, 0.0) is WAIT:
            ex.deadline(0.0)
    assert len(seen) == 3


def test_a_retry_stays_within_the_version_that_was_chosen():
    cluster = make_cluster(endpoints=3)
    plan = make_plan(cluster, retry=Retry(max_retries=3))
    v1 = Subset("v1", endpoints_of(cluster)[:1])
    ex = Exchange(plan, v1, b"GET", 0.0, lambda: 0.0)
    ex.begin(0.0)
    for _ in range(3):
        assert ex.endpoint is endpoints_of(cluster)[0]
        assert ex.failed(Failure.CONNECT, 0.0) is WAIT
        assert ex.deadline(0.0) is SEND


METHODS = [b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE", b"TRACE", b"POST", b"PATCH", b"get"]


@pytest.mark.parametrize("method", METHODS)
def test_what_the_server_cannot_have_seen_is_retried_for_every_method_even_unlisted(method):
    assert start(Retry(failures=frozenset()), method=method).failed(Failure.CONNECT, 0.0) is WAIT


@pytest.mark.parametrize("method", METHODS)
def test_anything_else_only_where_repeating_is_safe(method):
    everything = Retry(failures=EVERYTHING, statuses=frozenset({503}))
    expected = WAIT if method in METHODS[:6] else ANSWER
    timeouts = Timeouts(total_s=9.0, try_s=1.0)
    assert start(everything, method=method).failed(Failure.RESET, 0.0) is expected
    assert start(everything, method=method).failed(Failure.BROKEN, 0.0) is expected
    assert start(everything, timeouts, method=method).deadline(1.0) is expected
    assert (start(everything, method=method).response_head(503, 0.0) is WAIT) == (expected is WAIT)


def test_an_idempotency_key_or_the_policy_makes_a_method_safe():
    assert start(method=b"POST", idempotency_key=True).failed(Failure.RESET, 0.0) is WAIT
    assert start(Retry(methods=frozenset({"any"})), method=b"POST").failed(Failure.RESET, 0.0) is WAIT
    assert start(Retry(methods=frozenset({"POST"})), method=b"POST").failed(Failure.RESET, 0.0) is WAIT


@pytest.mark.parametrize("failure", [Failure.RESET, Failure.BROKEN])
def test_a_reset_is_retried_only_where_listed(failure):
    assert start(Retry(failures=frozenset({"timeout"}))).failed(failure, 0.0) is ANSWER


def test_a_try_timeout_is_retried_only_where_listed():
    timeouts = Timeouts(total_s=9.0, try_s=1.0)
    ex = start(timeouts=timeouts)
    assert ex.deadline(1.0) is ANSWER
    assert ended(ex, Outcome.TIMEOUT_TRY) and ex.status == 504
    assert start(Retry(failures=frozenset({"timeout"})), timeouts).deadline(1.0) is WAIT


def test_what_cannot_be_replayed_is_not_sent_again():
    ex = start(Retry(statuses=frozenset({503})))
    ex.replayable = False
    assert ex.response_head(503, 0.0) is RELAY
    for failure in Failure:
        ex = start()
        ex.replayable = False
        assert ex.failed(failure, 0.0, reused=True) is ANSWER


@pytest.mark.parametrize("inherited", [1, 2])
def test_inside_another_layers_retry_only_what_the_application_cannot_have_seen(inherited):
    listed = Retry(failures=EVERYTHING, statuses=frozenset({503}))
    assert start(listed, inherited=inherited).response_head(503, 0.0) is RELAY
    assert start(listed, inherited=inherited).failed(Failure.RESET, 0.0) is ANSWER
    assert start(listed, Timeouts(try_s=1.0), inherited=inherited).deadline(1.0) is ANSWER
    assert start(listed, inherited=inherited).failed(Failure.CONNECT, 0.0) is WAIT
    assert start(listed, inherited=inherited).response_head(503, 0.0, "draining") is WAIT
    assert start(listed, inherited=inherited).response_head(503, 0.0, "connect_failed") is WAIT
    assert start(listed, inherited=inherited).response_head(502, 0.0, "upstream_reset") is RELAY


def test_a_response_whose_retries_were_spent_below_is_not_retried():
    ex = start(Retry(statuses=frozenset({503})))
    assert ex.response_head(503, 0.0, exhausted=True) is RELAY
    assert ex.cluster.retries == 0


# The budget


def test_the_budget_bounds_retries_and_the_original_response_is_returned():
    retry = Retry(statuses=frozenset({503}), budget=Budget(percent=20.0, min_per_second=0.2))  # reserve 2
    cluster = make_cluster(retry=retry)
    plan = make_plan(cluster, retry=retry)
    results = []
    for _ in range(10):
        ex = make_exchange(plan)
        ex.begin(0.0)
        results.append(ex.response_head(503, 0.0))
        ex.caller_gone(0.0)
    # 2 in reserve; each original adds 0.2; each retry takes 1: the balance before each is 2.2, 1.4, 0.6, 0.8, 1.0, …
    assert results == [WAIT, WAIT, RELAY, RELAY, WAIT, RELAY, RELAY, RELAY, RELAY, WAIT]
    assert cluster.retries == 4 and cluster.budget_exhausted == 6
    assert ex.attempt == 1 and not ex.exhausted


def test_a_retry_that_the_budget_refused_was_spent_elsewhere():
    retry = Retry(statuses=frozenset({503}), budget=Budget(percent=0.0, min_per_second=0.0))
    ex = start(retry)
    assert ex.response_head(503, 0.0) is RELAY
    assert ex.exhausted and ex.cluster.budget_exhausted == 1


# The free resend


def test_a_reused_connection_that_died_costs_nothing():
    ex = start(Retry(failures=frozenset()), Timeouts(total_s=9.0, try_s=3.0))
    endpoint = ex.endpoint
    assert ex.failed(Failure.RESET, 2.0, reused=True) is SEND
    assert ex.fresh and ex.endpoint is endpoint and ex.due == 3.0  # the same attempt, the same deadline
    assert ex.cluster.resends == 1 and ex.cluster.retries == 0 and ex.attempt == 0
    assert endpoint is not None and endpoint.failures == 0 and endpoint.active == 1
    assert ex.failed(Failure.RESET, 2.5, reused=True) is ANSWER  # once
    assert ended(ex, Outcome.UPSTREAM_RESET) and endpoint.failures == 1


def test_the_resend_comes_on_top_of_the_retries():
    ex = start(Retry(max_retries=1))
    steps = [ex.failed(Failure.RESET, 0.0, reused=True), ex.failed(Failure.RESET, 0.0)]
    steps += [ex.deadline(0.0), ex.failed(Failure.RESET, 0.0, reused=True)]
    assert steps == [SEND, WAIT, SEND, ANSWER]
    assert not ex.fresh


def test_what_is_not_safe_gets_upstream_reset():
    ex = start(method=b"POST")
    assert ex.failed(Failure.RESET, 0.0, reused=True) is ANSWER
    assert ended(ex, Outcome.UPSTREAM_RESET) and ex.status == 502


# Deadlines


def test_the_smaller_deadline_wins():
    assert start(timeouts=Timeouts(total_s=3.0), told_s=2.0).due == 2.0
    assert start(timeouts=Timeouts(total_s=3.0), told_s=4.0).due == 3.0
    assert start(timeouts=Timeouts(total_s=3.0), told_s=4.0, cap=1.0).due == 1.0
    assert start(timeouts=Timeouts(total_s=OFF)).due == OFF


@pytest.mark.parametrize("options", [{"told_s": 0.0}, {"cap": 0.0}, {"cap": -1.0}])
def test_nothing_left_is_answered_at_once(options):
    cluster = make_cluster()
    ex = make_exchange(make_plan(cluster), **options)
    assert ex.begin(0.0) is ANSWER
    assert ended(ex, Outcome.TIMEOUT_TOTAL) and ex.status == 504
    assert cluster.attempts == 0


@pytest.mark.parametrize(
    ("options", "blamed"),
    [({}, 1), ({"told_s": 3.0}, 1), ({"told_s": 2.9}, 0), ({"cap": 2.9}, 0), ({"told_s": 9.0, "cap": 9.0}, 1)],
)
def test_a_total_timeout_blames_the_endpoint_only_if_it_was_the_policys_own(options, blamed):
    ex = start(timeouts=Timeouts(total_s=3.0), **options)
    endpoint = ex.endpoint
    assert ex.deadline(ex.due) is ANSWER
    assert ended(ex, Outcome.TIMEOUT_TOTAL)
    assert endpoint is not None and endpoint.breaker.failures == blamed
    ex = start(timeouts=Timeouts(total_s=3.0), **options)  # the callee's sidecar was a little faster
    endpoint = ex.endpoint
    assert ex.response_head(504, 2.8, "timeout_total") is RELAY
    assert endpoint is not None and endpoint.breaker.failures == blamed


def test_total_and_try_restart_at_the_last_byte_of_the_request():
    ex = start(timeouts=Timeouts(total_s=10.0, try_s=4.0), method=b"PUT")
    ex.request_done = False
    ex.connected(1.0)
    assert ex.due == OFF  # a long upload is not a slow server
    ex.request_end(60.0)
    assert ex.ends == 70.0 and ex.due == 64.0 and ex.request_done


def test_a_body_that_was_whole_when_the_connection_came_restarts_nothing():
    ex = start(timeouts=Timeouts(total_s=10.0), method=b"PUT")
    ex.connected(3.0)
    assert ex.due == 10.0


def test_queueing_for_a_connection_is_within_the_total():
    ex = start(timeouts=Timeouts(total_s=10.0), method=b"PUT")
    ex.request_done = False
    assert ex.due == 10.0
    assert ex.deadline(10.0) is ANSWER


def test_a_restart_remembers_whose_deadline_it_is():
    ex = start(timeouts=Timeouts(total_s=10.0), method=b"PUT", cap=12.0)
    endpoint = ex.endpoint
    assert ex.own_deadline
    ex.request_done = False
    ex.connected(1.0)
    ex.request_end(5.0)
    assert ex.due == 12.0 and not ex.own_deadline
    ex.deadline(12.0)
    assert endpoint is not None and endpoint.failures == 0


def test_a_retry_during_a_long_upload_is_not_measured_by_a_clock_that_stood_still():
    ex = start(timeouts=Timeouts(total_s=10.0, try_s=4.0), method=b"PUT")
    ex.request_done = False
    ex.connected(1.0)
    assert ex.failed(Failure.RESET, 60.0) is WAIT
    assert ex.deadline(60.0) is SEND
    assert ex.due == 64.0 and ex.ends == 70.0  # bounded again until there is a connection


def test_a_resend_during_an_upload_is_bounded_until_there_is_a_connection():
    ex = start(timeouts=Timeouts(total_s=10.0), method=b"PUT")
    ex.request_done = False
    ex.connected(1.0)
    assert ex.failed(Failure.RESET, 60.0, reused=True) is SEND
    assert ex.due == 70.0


def test_connect_errors_before_any_connection_do_not_move_the_total():
    ex = start(timeouts=Timeouts(total_s=10.0), method=b"PUT")
    ex.request_done = False
    assert ex.failed(Failure.CONNECT, 6.0) is WAIT
    assert ex.deadline(6.0) is SEND
    assert ex.due == 10.0


def test_the_last_byte_after_an_early_response_moves_nothing():
    ex = start(method=b"PUT")
    ex.request_done = False
    ex.connected(0.0)
    assert ex.response_head(413, 1.0) is RELAY
    ex.request_end(2.0)
    assert ex.due == OFF


# No endpoint, and fallback


def open_all(ex_cluster: Any, now: float = 0.0) -> None:
    for endpoint in endpoints_of(ex_cluster):
        for _ in range(endpoint.breaker.config.consecutive_failures):
            endpoint.breaker.failure(endpoint.breaker.generation, now, lambda: 0.0)


def test_open_breakers_and_no_endpoints_have_their_own_words():
    cluster = make_cluster()
    open_all(cluster)
    ex = make_exchange(make_plan(cluster))
    assert ex.begin(0.5) is ANSWER
    assert ended(ex, Outcome.CIRCUIT_OPEN) and cluster.attempts == 0
    ex = make_exchange(make_plan(make_cluster(endpoints=0)))
    assert ex.begin(0.0) is ANSWER
    assert ended(ex, Outcome.NO_HEALTHY_ENDPOINT)


def with_fallback(limits: Limits = Limits()) -> tuple[Any, Any, Any]:  # noqa: B008
    cluster, other = make_cluster(), make_cluster("backup", limits=limits)
    plan = make_plan(cluster)
    plan.fallback = FallbackPlan(other, Subset("", endpoints_of(other)), None)
    return cluster, other, plan


def test_a_fallback_to_another_service_uses_its_state():
    cluster, other, plan = with_fallback()
    open_all(cluster)
    ex = make_exchange(plan)
    assert ex.begin(0.5) is SEND
    assert ex.cluster is other and ex.endpoint in endpoints_of(other)
    assert (cluster.active, other.active) == (0, 1)
    assert other.budget.balance(0.5) == pytest.approx(10.2)  # the original request's deposit
    assert ex.failed(Failure.CONNECT, 0.5) is WAIT
    assert other.retries == 1 and cluster.retries == 0
    assert ex.deadline(ex.due) is SEND
    ex.response_head(200, 1.0)
    ex.response_end(1.0)
    assert ended(ex, Outcome.OK) and at_rest(cluster) and at_rest(other)


def test_the_limit_of_the_service_that_falls_back_holds():
    cluster, other, plan = with_fallback(Limits(requests=1))
    open_all(cluster)
    assert make_exchange(plan).begin(0.5) is SEND
    ex = make_exchange(plan)
    assert ex.begin(0.5) is ANSWER
    assert ex.outcome is Outcome.OVERFLOW and (cluster.active, other.active, other.overflows) == (0, 1, 1)


def test_a_fallback_that_cannot_serve_either_ends():
    cluster, other, plan = with_fallback()
    open_all(cluster)
    open_all(other)
    ex = make_exchange(plan)
    assert ex.begin(0.5) is ANSWER
    assert ended(ex, Outcome.CIRCUIT_OPEN) and at_rest(cluster)


def test_a_fallback_to_another_service_serves_what_an_instance_has_shed():
    cluster, other, plan = with_fallback()
    ex = make_exchange(plan, method=b"POST")
    assert ex.begin(0.0) is SEND
    assert ex.response_head(503, 0.1, "overflow") is SEND
    assert ex.cluster is other and ex.endpoint in endpoints_of(other) and ex.attempt == 0
    assert at_rest(cluster) and cluster.retries == other.retries == 0  # it is no retry: nobody pays for it
    assert not any(endpoint.failures for endpoint in endpoints_of(cluster))
    assert ex.due == pytest.approx(ex.ends)  # within the time of the whole
    ex.response_head(200, 0.2)
    ex.response_end(0.2)
    assert ended(ex, Outcome.OK) and at_rest(other)


def test_one_that_sheds_too_is_believed():
    _, other, plan = with_fallback()
    ex = make_exchange(plan)
    ex.begin(0.0)
    ex.response_head(503, 0.1, "overflow")
    assert ex.response_head(503, 0.2, "overflow") is RELAY
    ex.response_end(0.2)
    assert at_rest(other)


def test_an_application_that_says_503_is_not_taken_for_one_that_sheds():
    _, _, plan = with_fallback()
    ex = make_exchange(plan)
    ex.begin(0.0)
    assert ex.response_head(503, 0.1) is RELAY


def test_what_cannot_be_sent_again_gets_the_overflow():
    _, _, plan = with_fallback()
    ex = make_exchange(plan)
    ex.begin(0.0)
    ex.replayable = False
    assert ex.response_head(503, 0.1, "overflow") is RELAY


def test_a_fixed_response_stands_in_for_an_overflow():
    cluster = make_cluster()
    plan = make_plan(cluster)
    plan.fallback = FallbackPlan(cluster, None, Respond(200, "[]"))
    ex = make_exchange(plan)
    ex.begin(0.0)
    ex.replayable = False
    assert ex.response_head(503, 0.1, "overflow") is ANSWER
    assert ended(ex, Outcome.OVERFLOW) and at_rest(cluster)


def test_another_version_does_not():
    cluster = make_cluster()
    plan = make_plan(cluster)
    plan.fallback = FallbackPlan(cluster, Subset("v1", endpoints_of(cluster)), None)
    ex = make_exchange(plan)
    ex.begin(0.0)
    assert ex.response_head(503, 0.1, "overflow") is RELAY


def test_the_own_limits_of_a_caller_lead_to_the_fallback_as_well():
    other = make_cluster("backup")
    cluster = make_cluster(limits=Limits(requests=1))
    plan = make_plan(cluster)
    plan.fallback = FallbackPlan(other, Subset("", endpoints_of(other)), None)
    first, second = make_exchange(plan), make_exchange(plan)
    assert first.begin(0.0) is SEND and second.begin(0.0) is SEND
    assert second.cluster is other and (cluster.active, cluster.overflows) == (1, 1)
    assert second.refused(Outcome.OVERFLOW, 0.1) is ANSWER  # a full queue, there
    assert ended(second, Outcome.OVERFLOW) and at_rest(other)
    assert first.refused(Outcome.OVERFLOW, 0.1) is SEND and first.cluster is other
    assert at_rest(cluster)


def test_nothing_is_sent_to_a_fallback_when_the_time_is_up():
    _, other, plan = with_fallback()
    ex = make_exchange(plan)
    ex.begin(0.0)
    assert ex.response_head(503, ex.ends, "overflow") is ANSWER
    assert ended(ex, Outcome.OVERFLOW) and at_rest(other)


# The breaker, through the exchange


def send(plan: Any, now: float) -> Exchange | None:
    ex = make_exchange(plan, now=now)
    return ex if ex.begin(now) is SEND else None


def test_two_failures_open_for_a_second_one_probe_open_for_two_closed():
    breaker = CircuitBreaker(consecutive_failures=2, open_for_s=1.0)
    retry = Retry(max_retries=0)
    cluster = make_cluster(endpoints=1, breaker=breaker, retry=retry)
    plan = make_plan(cluster, retry=retry)
    (endpoint,) = endpoints_of(cluster)

    def respond(ex: Exchange | None, status: int, now: float) -> None:
        assert ex is not None
        ex.response_head(status, now)
        ex.response_end(now)

    early = send(plan, 0.0)
    respond(send(plan, 0.0), 500, 0.0)
    respond(send(plan, 0.1), 503, 0.1)  # open until 1.1
    assert send(plan, 1.09) is None
    respond(early, 200, 1.095)  # sent before it opened: ignored
    assert endpoint.breaker.state(1.095) == "open"
    probe = send(plan, 1.1)
    assert send(plan, 1.1) is None and send(plan, 1.2) is None  # exactly one
    respond(probe, 500, 1.3)  # open for 2 s, until 3.3
    assert send(plan, 3.29) is None
    probe = send(plan, 3.3)
    assert probe is not None and probe.response_head(200, 3.4) is RELAY
    assert endpoint.breaker.state(3.4) == "closed"  # judged at the response head
    both = [send(plan, 3.4), send(plan, 3.4)]
    assert None not in both
    probe.response_end(5.0)
    for ex in both:
        respond(ex, 200, 5.0)
    assert at_rest(cluster)


def half_open(timeouts: Timeouts = Timeouts(), **options: Any) -> tuple[Exchange, Any]:  # noqa: B008
    """A probe, begun at 1 s."""
    breaker = CircuitBreaker(consecutive_failures=1, open_for_s=1.0)
    retry = Retry(max_retries=0)
    cluster = make_cluster(endpoints=1, breaker=breaker, retry=retry)
    open_all(cluster)
    ex = make_exchange(make_plan(cluster, timeouts, retry), now=1.0, **options)
    assert ex.begin(1.0) is SEND
    return ex, endpoints_of(cluster)[0].breaker


@pytest.mark.parametrize(("try_s", "limit_s"), [(OFF, 5.0), (3.0, 3.0), (8.0, 5.0)])
def test_a_probe_past_its_limit_re_opens_and_its_request_goes_on(try_s, limit_s):
    ex, breaker = half_open(Timeouts(total_s=60.0, try_s=try_s))
    assert breaker.state(1.0 + limit_s - 0.01) == "half-open"
    assert breaker.state(1.0 + limit_s) == "open"  # for 2 s
    assert not breaker.allows(1.0 + limit_s + 1.99)
    assert breaker.allows(1.0 + limit_s + 2.0)
    if try_s != 3.0:
        assert ex.response_head(200, 6.5) is RELAY  # an answer, but no verdict any more
        assert breaker.state(6.5) == "open"


@pytest.mark.parametrize("end", ["gone", "refused", "neutral answer", "callers deadline"])
def test_an_abandoned_probe_makes_room_for_another(end):
    ex, breaker = half_open(Timeouts(total_s=60.0), told_s=2.0 if end == "callers deadline" else OFF)
    assert not breaker.allows(1.5)
    if end == "gone":
        ex.caller_gone(1.5)
    elif end == "refused":
        ex.refused(Outcome.OVERFLOW, 1.5)
    elif end == "neutral answer":
        ex.response_head(403, 1.5, "denied")
    else:
        ex.deadline(3.0)
    assert breaker.tripped and breaker.allows(3.0)


def test_a_throttled_probe_has_failed():
    ex, breaker = half_open()
    ex.response_head(429, 1.5)
    assert breaker.state(1.5) == "open"


@pytest.mark.parametrize("status", [200, 301, 404, 409, 501])
def test_what_closes(status):
    ex, breaker = half_open()
    ex.response_head(status, 1.5)
    assert breaker.state(1.5) == "closed"


def test_429_neither_counts_nor_resets():
    cluster = make_cluster(endpoints=1, breaker=CircuitBreaker(consecutive_failures=3))
    plan = make_plan(cluster, retry=Retry(max_retries=0))
    (endpoint,) = endpoints_of(cluster)
    for status, failures in ((500, 1), (502, 2), (429, 2), (501, 0), (503, 1), (404, 0)):
        ex = make_exchange(plan)
        ex.begin(0.0)
        ex.response_head(status, 0.0)
        ex.response_end(0.0)
        assert endpoint.breaker.failures == failures, status


def test_a_resend_goes_on_as_the_same_probe():
    ex, breaker = half_open()
    assert ex.failed(Failure.RESET, 1.2, reused=True) is SEND
    assert not breaker.allows(1.2)
    ex.response_head(200, 1.4)
    assert breaker.state(1.4) == "closed"


def test_draining_is_retried_elsewhere_or_not_at_all():
    def answer(endpoints: int) -> Do:
        return start(endpoints=endpoints, method=b"POST").response_head(503, 0.0, "draining")

    assert answer(1) is RELAY
    ex = start(method=b"POST")
    first = ex.endpoint
    assert ex.response_head(503, 0.0, "draining") is WAIT
    assert first is not None and first.failures == 0 and first.successes == 0
    assert ex.deadline(0.0) is SEND and ex.endpoint is not first
    ex = start()
    open_all(ex.cluster)
    assert ex.response_head(503, 0.0, "draining") is RELAY
