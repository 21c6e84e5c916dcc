"""The table of what a sidecar answers itself, row by row, and what its peer makes of it."""

import pytest
from support.memory_exchange import EVERYTHING, make_cluster, make_exchange, make_plan

from sidecar.model.snapshot import CircuitBreaker, Retry
from sidecar.policy.exchange import WAIT, Exchange
from sidecar.policy.outcome import BY_REASON, OF_FAILURE, Blame, Failure, Grpc, Outcome, Retryable

ANY, SAFE, LISTED, NEVER = Retryable
YES, NO, STATUS = Blame

ROWS = {  # reason: HTTP, gRPC, retried by the caller's sidecar, endpoint failure
    "connect_failed": (503, Grpc.UNAVAILABLE, ANY, YES),
    "draining": (503, Grpc.UNAVAILABLE, ANY, NO),
    "upstream_reset": (502, Grpc.UNAVAILABLE, SAFE, YES),
    "bad_response": (502, Grpc.INTERNAL, SAFE, YES),
    "timeout_try": (504, Grpc.DEADLINE_EXCEEDED, SAFE, YES),
    "timeout_total": (504, Grpc.DEADLINE_EXCEEDED, NEVER, YES),  # by the policy's own deadline
    "overflow": (503, Grpc.UNAVAILABLE, NEVER, NO),
    "circuit_open": (503, Grpc.UNAVAILABLE, NEVER, NO),
    "no_healthy_endpoint": (503, Grpc.UNAVAILABLE, NEVER, NO),
    "no_route": (404, Grpc.UNIMPLEMENTED, NEVER, NO),
    "rate_limited": (429, Grpc.RESOURCE_EXHAUSTED, LISTED, STATUS),
    "denied": (403, Grpc.PERMISSION_DENIED, NEVER, NO),
    "misdirected": (421, None, NEVER, NO),
    "bad_request": (400, Grpc.INTERNAL, NEVER, NO),
    "uri_too_long": (414, Grpc.INTERNAL, NEVER, NO),
    "headers_too_large": (431, Grpc.INTERNAL, NEVER, NO),
    "payload_too_large": (413, Grpc.INTERNAL, NEVER, NO),
    "filter_error": (500, Grpc.INTERNAL, NEVER, NO),
    "fault_injected": (0, None, NEVER, NO),  # as configured
}
SAFE_ENDINGS = {Outcome.OK, Outcome.RESPONDED, Outcome.CUT_SHORT, Outcome.CALLER_GONE}

ALL = frozenset(range(400, 600))


def status_of(reason: str) -> int:
    return ROWS[reason][0] or 503


def begun(method: bytes, retry: Retry) -> Exchange:
    cluster = make_cluster(retry=retry, breaker=CircuitBreaker(consecutive_failures=100, success_rate=1.0))
    ex = make_exchange(make_plan(cluster, retry=retry), method)
    ex.begin(0.0)
    return ex


@pytest.mark.parametrize("reason", ROWS)
def test_what_callers_see(reason):
    status, grpc, retryable, blame = ROWS[reason]
    outcome = BY_REASON[reason]
    assert (outcome.status, outcome.retryable, outcome.blame) == (status, retryable, blame)
    assert grpc is None or outcome.grpc is grpc


def test_reasons_are_words_and_differ():
    assert len({outcome.reason for outcome in Outcome}) == len(Outcome)
    assert all(outcome.reason.replace("_", "").isalpha() and outcome.reason.islower() for outcome in Outcome)
    assert set(OF_FAILURE) == set(Failure)
    assert set(ROWS) <= set(BY_REASON)


def test_every_answer_of_our_own_has_a_status():
    for outcome in Outcome:
        assert outcome.status >= 400 or outcome in SAFE_ENDINGS or outcome is Outcome.FAULT_INJECTED


@pytest.mark.parametrize("reason", ROWS)
@pytest.mark.parametrize("method", [b"GET", b"POST"])
def test_retried_with_every_status_and_failure_listed(reason, method):
    """The table beats the rules for status classes."""
    retry = Retry(failures=EVERYTHING, statuses=ALL)
    kind = ROWS[reason][2]
    expected = kind is ANY or (kind in (SAFE, LISTED) and method == b"GET")
    assert (begun(method, retry).response_head(status_of(reason), 0.0, reason) is WAIT) == expected


@pytest.mark.parametrize("reason", ROWS)
def test_retried_with_nothing_listed(reason):
    retry = Retry(failures=frozenset())
    expected = ROWS[reason][2] is ANY
    assert (begun(b"GET", retry).response_head(status_of(reason), 0.0, reason) is WAIT) == expected


@pytest.mark.parametrize("reason", ROWS)
def test_retried_as_built_in(reason):
    expected = reason in ("connect_failed", "draining", "upstream_reset", "bad_response")
    assert (begun(b"GET", Retry()).response_head(status_of(reason), 0.0, reason) is WAIT) == expected


@pytest.mark.parametrize(("reason", "word"), [("upstream_reset", "reset"), ("timeout_try", "timeout")])
def test_the_word_of_when_covers_a_peers_answer(reason, word):
    assert begun(b"GET", Retry(failures=frozenset({word}))).response_head(status_of(reason), 0.0, reason) is WAIT
    other = Retry(failures=EVERYTHING - {word})
    assert begun(b"GET", other).response_head(status_of(reason), 0.0, reason) is not WAIT


@pytest.mark.parametrize("reason", ROWS)
def test_what_the_breaker_learns(reason):
    ex = begun(b"GET", Retry(max_retries=0))
    endpoint = ex.endpoint
    assert endpoint is not None
    endpoint.breaker.failures = 3
    ex.response_head(status_of(reason), 0.0, reason)
    counted = endpoint.breaker.failures
    assert counted == (4 if ROWS[reason][3] is YES else 3)  # neutral: neither failure nor success
    assert endpoint.successes == 0


def test_rate_limited_counts_as_any_429():
    for reason in ("rate_limited", None):
        ex = begun(b"GET", Retry(max_retries=0))
        endpoint = ex.endpoint
        assert endpoint is not None and endpoint.breaker._rate is not None
        ex.response_head(429, 0.0, reason)
        assert (endpoint.breaker._rate.failures, endpoint.breaker.failures) == (1, 0)


def test_an_unknown_reason_is_judged_by_its_status():
    retry = Retry(statuses=frozenset({503}))
    ex = begun(b"GET", retry)
    endpoint = ex.endpoint
    assert ex.response_head(503, 0.0, "from_a_later_version") is WAIT
    assert endpoint is not None and endpoint.breaker.failures == 1
