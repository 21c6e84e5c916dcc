"""Ejections in a rehearsal: when they begin and end, what is said of them, and what ends them early."""

import json

import pytest
from support.scenarios import pair, read, run

from sidecar.simulate.picture import svg_of
from sidecar.simulate.report import comparison, json_of, text_of
from sidecar.simulate.results import Result


def scenario(outliers: str, *outages: str, duration: str = "60s") -> str:
    """300 requests a second, evenly, to six endpoints of which one fails wholly from 12 s to 32 s."""
    bad = "{at: 12s, for: 20s, service: reviews, endpoint: reviews-1, errors: {rate: 100%}}"
    return pair(
        f"{{retry: {{max_retries: 0}}, balance: {{policy: round-robin}}, outliers: {outliers}, "
        "circuit_breaker: {consecutive_failures: 1000000}}",
        "{latency: 5ms, endpoints: 6}",
        "{from: web, to: reviews, rate: 300, arrivals: even}",
        [f"duration: {duration}", "network: 0s", f"outages: [{', '.join((bad, *outages))}]"],
    )


def told(result: Result) -> list[tuple[float, str, str]]:
    return [(change.at_s, change.endpoint, change.text.partition(":")[0]) for change in result.changes]


def test_ejected_at_the_end_of_the_interval_and_back_after_eject_for() -> None:
    """At 20 s it has failed for 8 s of ten; at 50 s its 30 s are over, and it is well."""
    result = run(scenario("{interval: 10s}"))
    assert told(result) == [(20.0, "reviews-1", "ejected"), (50.0, "reviews-1", "returned")]
    assert result.changes[0].text.startswith("ejected: success rate 20.")
    assert result.changes[0].text.endswith("; for 30s (1st time)")
    assert result.ejections == 1 and [each.ejections for each in result.endpoints] == [1, 0, 0, 0, 0, 0]
    assert result.series.ejected[19] == 0.0 and result.series.ejected[21:49] == pytest.approx((1.0,) * 28)
    assert result.series.ejected[51] == 0.0
    assert result.endpoints[0].ejected_shares[30] == 1.0
    in_between = [sum(values[22:48]) for name, values in result.series.endpoints if name == "reviews-1"]
    assert in_between == [0]


def test_a_process_that_ends_is_ejected_no_more() -> None:
    """The endpoint is down from 30 s and forgotten with its lease at 45 s; the new process begins without a record."""
    gone = "{at: 30s, for: 40s, service: reviews, endpoint: reviews-1, down: refused}"
    result = run(scenario("{interval: 10s, eject_for: 60s}", gone))
    assert told(result)[:2] == [(20.0, "reviews-1", "ejected"), (45.0, "reviews-1", "gone")]
    assert result.series.ejected[46] == 0.0


def test_a_caller_that_ends_forgets_whom_it_has_ejected() -> None:
    ends = "{at: 25s, for: 5s, service: web, endpoint: web-1, down: refused}"
    result = run(scenario("{interval: 10s}", ends))
    assert (20.0, "reviews-1", "ejected") in told(result)
    assert [at for at, _, what in told(result) if what == "gone"] == [30.0]


def test_panic_is_told() -> None:
    result = run(scenario("{interval: 10s, panic_threshold: 90%}"))
    assert told(result) == [
        (20.0, "reviews-1", "ejected"),
        (20.0, "reviews", "panic"),
        (50.0, "reviews-1", "returned"),
        (50.0, "reviews", "panic is over"),
    ]
    during = [sum(values[22:48]) for name, values in result.series.endpoints if name == "reviews-1"]
    assert during[0] > 1000  # it serves again


def test_what_is_printed() -> None:
    text = scenario("{interval: 10s}")
    play, result, without = read(text).scenario, run(text), run(scenario("{max_ejected: 0%}"))
    assert play is not None
    shown = text_of(play, result, (), 5)
    for words in ("\nejected  ", "\nENDPOINT   EJECTED ", "\nEVENTS\n", "; for 30s (1st time)"):
        assert words in shown, words
    assert "EJECTED" not in text_of(play, without, (), 5)
    assert "ejections" in comparison([result, without], ((), ()))
    data = json_of(play, 1, [result], ((),))
    assert json.loads(json.dumps(data)) == data
    (played,) = data["runs"]
    assert played["ejections"] == 1 and [each["state"] for each in played["outliers"]] == ["ejected", "returned"]
    assert played["breakers"] == [] and played["panic"] == []
    assert "ejected" in svg_of(read(f"{text}\npicture: [ejected]").scenario or play, [result])
