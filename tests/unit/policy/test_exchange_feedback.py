"""What a balancer hears of attempts: each once, with the time to its response head."""

from typing import Any

import pytest
from support.memory_exchange import EVERYTHING, at_rest, make_cluster, make_exchange, make_plan

from sidecar.model.snapshot import Retry, Timeouts
from sidecar.policy.exchange import RELAY, SEND, WAIT, Exchange
from sidecar.policy.outcome import Failure, Grpc, Outcome

NO_WAIT = Retry(max_retries=1, failures=EVERYTHING, statuses=frozenset({503}), base_s=0.0, max_s=0.0)


class Ears:
    """A balancer that only listens."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def began(self, endpoint: Any, now: float) -> None:
        assert endpoint.active == 1
        self.heard.append(("began", endpoint.host[-1], now))

    def ended(self, endpoint: Any, result: str, latency_s: float, now: float) -> None:
        self.heard.append((result, endpoint.host[-1], latency_s, now))


def begun(retry: Retry = Retry(max_retries=0), **options: Any) -> tuple[Exchange, list[Any]]:  # noqa: B008
    cluster = make_cluster(retry=retry)
    ears = cluster.feedback = Ears()
    ex = make_exchange(make_plan(cluster, Timeouts(try_s=2.0), retry), rnd=lambda: 0.9, **options)
    assert ex.begin(1.0) is SEND
    return ex, ears.heard


@pytest.mark.parametrize(
    ("status", "result"),
    [(200, "success"), (404, "success"), (501, "success"), (429, "throttled"), (500, "failure"), (503, "failure")],
)
def test_a_response_head_ends_an_attempt(status: int, result: str) -> None:
    ex, heard = begun()
    assert ex.response_head(status, 1.25) is RELAY
    ex.response_end(9.0)
    assert heard == [("began", "1", 1.0), (result, "1", 0.25, 1.25)]


def test_one_that_breaks_off_after_its_head_is_not_heard_of_twice() -> None:
    ex, heard = begun()
    ex.response_head(200, 1.5)
    ex.failed(Failure.RESET, 2.0)
    assert [each[0] for each in heard] == ["began", "success"] and at_rest(ex.cluster)


def test_each_attempt_is_heard_of() -> None:
    ex, heard = begun(NO_WAIT)
    assert ex.response_head(503, 1.5) is WAIT
    assert ex.deadline(2.0) is SEND
    ex.failed(Failure.CONNECT, 2.5)
    assert heard == [("began", "1", 1.0), ("failure", "1", 0.5, 1.5), ("began", "2", 2.0), ("failure", "2", 0.5, 2.5)]


@pytest.mark.parametrize("how", ["gone", "refused", "timeout"])
def test_other_ends(how: str) -> None:
    ex, heard = begun()
    if how == "gone":
        ex.caller_gone(2.0)
    elif how == "refused":
        ex.refused(Outcome.OVERFLOW, 2.0)
    else:
        ex.deadline(3.0)
    expected = ("failure", "1", 2.0, 3.0) if how == "timeout" else ("neutral", "1", 1.0, 2.0)
    assert heard[1:] == [expected]


def test_a_grpc_call_is_judged_by_its_status_and_timed_by_its_head() -> None:
    ex, heard = begun(grpc=True)
    assert ex.response_head(200, 1.25) is RELAY
    assert heard[1:] == []
    ex.response_end(60.0, Grpc.RESOURCE_EXHAUSTED)
    assert heard[1:] == [("throttled", "1", 0.25, 60.0)]


def test_a_balancer_that_is_replaced_hears_the_end_of_what_it_heard_begin() -> None:
    ex, heard = begun()
    ex.cluster.feedback = None
    ex.response_head(200, 1.5)
    assert len(heard) == 2
