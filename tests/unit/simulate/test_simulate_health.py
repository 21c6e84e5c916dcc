"""Outages in which health checks fail: when callers hear of it, and panic."""

from support.scenarios import codes, pair, run

from sidecar.simulate.results import Result


def scenario(*outages: str, policy: str = "{health: {interval: 4s}, retry: {max_retries: 0}}") -> str:
    """Four endpoints in turn, 100 requests a second."""
    return pair(
        policy.replace("{health", "{balance: {policy: round-robin}, health"),
        "{latency: 5ms, endpoints: 4}",
        "{from: web, to: reviews, rate: 100, arrivals: even}",
        ["duration: 60s", "network: 0s", "discovery: 1s", f"outages: [{', '.join(outages)}]"],
    )


def ill(number: int, at: str = "10s", lasts: str = "20s") -> str:
    return f"{{at: {at}, for: {lasts}, service: reviews, endpoint: reviews-{number}, unhealthy: true}}"


def seconds_without(result: Result, name: str) -> list[int]:
    (values,) = [values for each, values in result.series.endpoints if each == name]
    return [second for second, value in enumerate(values) if not value]


def test_an_unhealthy_endpoint_is_left_out_once_the_checks_have_found_it() -> None:
    """Three checks, 4 s apart, and 1 s until callers hear of it: from 23 s on; two checks to be well again: at 39 s."""
    result = run(scenario(ill(1)))
    assert seconds_without(result, "reviews-1") == list(range(23, 39))
    assert [each.effective for each in result.edges] == [1.0]


def test_one_that_is_over_before_the_checks_have_found_it_is_never_heard_of() -> None:
    assert seconds_without(run(scenario(ill(1, lasts="11s"))), "reviews-1") == []


def test_two_that_overlap_are_one() -> None:
    result = run(scenario(ill(1), ill(1, at="20s")))
    assert seconds_without(result, "reviews-1") == list(range(23, 49))


def test_panic_when_most_are_unhealthy() -> None:
    result = run(scenario(ill(1), ill(2), ill(3)))
    assert [(each.at_s, each.text.partition(":")[0]) for each in result.changes] == [
        (23.0, "panic"),
        (39.0, "panic is over"),
    ]
    assert all(seconds_without(result, f"reviews-{number}") == [] for number in (1, 2, 3, 4))


def test_nobody_is_left_without_panic() -> None:
    policy = "{health: {interval: 4s}, retry: {max_retries: 0}, outliers: {panic_threshold: 0%}}"
    result = run(scenario(*map(ill, (1, 2, 3, 4)), policy=policy))
    (edge,) = result.edges
    assert dict(edge.outcomes)["no_healthy_endpoint"] == 1600


def test_what_is_not_unhealthy_is_no_outage() -> None:
    assert codes(scenario("{at: 1s, service: reviews, unhealthy: false}")) == ["P0502"]
    assert codes(scenario("{at: 1s, service: reviews, unhealthy: maybe}"))
