"""Hedges in rehearsals: the tail of one slow endpoint, and what hedges may cost where all are slow."""

from support.scenarios import engine, pair, run

from sidecar.simulate.report import NOT_SENT
from sidecar.simulate.results import Result

REVIEWS = "{latency: {p50: 10ms, p99: 30ms}, endpoints: 6}"
LOAD = "{from: web, to: reviews, rate: 200}"
HEDGED = "{hedge: {after: 30ms}, retry: {max_retries: 0}}"


def slow(what: str, policy: str = HEDGED, load: str = LOAD) -> Result:
    return run(pair(policy, REVIEWS, load, ["duration: 20s", "outages:", f"  - {{at: 0s, service: reviews, {what}}}"]))


def sent(result: Result) -> int:
    return sum(count for word, count in result.edges[0].hedges if word not in NOT_SENT)


def test_one_slow_endpoint_is_not_waited_for() -> None:
    hedged = slow("endpoint: reviews-2, slowdown: 20")
    plain = slow("endpoint: reviews-2, slowdown: 20", "{retry: {max_retries: 0}}")
    assert plain.edges[0].p99_s > 0.15 and not plain.edges[0].hedges
    assert hedged.edges[0].p99_s < 0.06
    assert hedged.edges[0].effective == hedged.edges[0].actual == 1.0  # what has lost is no failure
    assert hedged.edges[0].attempts == hedged.edges[0].requests + sent(hedged)
    assert hedged.openings and any("hedges were faster 7 times in a row" in change.text for change in hedged.changes)


def test_a_hanging_endpoint_is_found_out() -> None:
    result = slow("endpoint: reviews-2, errors: {rate: 100%, statuses: [hang]}")
    assert result.edges[0].effective == 1.0 and result.openings >= 3
    (hanging,) = [each for each in result.endpoints if each.name == "reviews-2"]
    assert hanging.attempts < 60  # some probes, and what the breaker of each caller has taken to open


def test_where_all_are_slow_half_of_the_budget_bounds_hedges() -> None:
    result = slow("slowdown: 20")
    assert 0.08 < sent(result) / result.edges[0].requests <= 0.105
    assert dict(result.edges[0].hedges)["no_budget"] > result.edges[0].requests / 2
    assert result.openings == 0


def test_writes_are_not_hedged() -> None:
    load = "{from: web, to: reviews, rate: 200, requests: [{method: POST}]}"
    result = slow("endpoint: reviews-2, slowdown: 20", load=load)
    assert not result.edges[0].hedges and result.edges[0].attempts == result.edges[0].requests


def test_an_endpoint_that_fails_or_goes_down_under_a_hedge() -> None:
    for what in ("errors: {rate: 50%, statuses: [503, reset], latency: 60ms}", "down: silent", "down: refused"):
        policy = "{hedge: {after: 30ms}, timeout: {connect: 200ms}, retry: {max_retries: 2, when: [503, reset]}}"
        outage = f"  - {{at: 2s, for: 3s, service: reviews, endpoint: reviews-1, {what}}}"
        result = run(pair(policy, REVIEWS, LOAD, ["duration: 10s", "outages:", outage]))
        assert result.edges[0].effective > 0.999 and sent(result) and not result.edges[0].unfinished


def test_the_same_seed_gives_the_same_hedges() -> None:
    assert slow("slowdown: 4").edges == slow("slowdown: 4").edges


def test_one_layer_only_hedges() -> None:
    text = """
    version: 1
    policy:
      version: 1
      defaults: {hedge: {after: 20ms}, retry: {max_retries: 0, budget: {percent: 100%, min_per_second: 1000}}}
      services: {web: {}, orders: {}, stock: {}}
    services:
      web: {}
      orders: {endpoints: 4, latency: 10ms, calls: [{to: stock}]}
      stock: {endpoints: 4, latency: 200ms}
    load: [{from: web, to: orders, rate: 20, arrivals: even}]
    duration: 5s
    """
    done = engine(text)
    done.run()
    orders, stock = done.stage.edges["web", "orders"], done.stage.edges["orders", "stock"]
    assert orders.attempts == 2 * orders.started  # every one of them is late
    assert stock.started == orders.attempts
    assert stock.attempts == 3 * orders.started  # the first attempt's is hedged, the hedge's not
