"""The kit's requests, responses and contexts."""

import pytest

from sidecar.testing import Surroundings, make_context, make_request, make_response


def test_what_a_peer_could_send_goes_in_unchecked() -> None:
    request = make_request("GET", "/a?b", [("Accept", "a"), ("accept", b"\xff"), ("Host", "x")])
    assert request.headers.get_all("accept") == ["a", "\xff"] and request.headers.get("host") == "x"
    assert make_request(host=None).host == ""


def test_the_context_keeps_what_a_filter_did() -> None:
    around = Surroundings()
    context = make_context(around, service="ratings", side="out", clock=lambda: 7.0, random=lambda: 0.1)
    context.log("warning", "careful")
    context.counter("seen", "Seen.").inc()
    context.counter("seen", "Seen.").inc(2)
    assert around.logged == [("warning", "careful")]
    assert around.counters["seen"].value == 3
    assert (context.service, context.side, context.clock(), context.random()) == ("ratings", "out", 7.0, 0.1)
    limiter = context.limiter(1, 60.0, 1)
    assert limiter.take("k", 0.0).allowed
    assert limiter.take("k", 0.0).retry_after_s == pytest.approx(60.0)


def test_a_response() -> None:
    assert make_response(404, {"X-A": "1"}).headers.items() == [("x-a", "1")]
