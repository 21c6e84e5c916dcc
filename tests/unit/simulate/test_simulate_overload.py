"""The gate before an application in a rehearsal: what an overload leaves, and who is shed."""

from collections import Counter
from typing import Any

import pytest
from support.scenarios import at_rest, engine

CAPACITY = 8 / 0.02  # threads, and the time that each takes for a request
SERVERS = "{latency: 20ms, capacity: {concurrency: 8, queue: 5000}}"
PLAIN = (
    "timeout: {total: 500ms}, limits: {requests: 100000}, retry: {max_retries: 0},"
    " circuit_breaker: {consecutive_failures: 1000000}"
)


def ready(load: float, concurrency: str = "", routes: str = "", seconds: int = 8) -> Any:
    limit = f", concurrency: {concurrency}" if concurrency else ""
    routed = f", routes: [{routes}]" if routes else ""
    return engine(f"""
version: 1
policy: {{version: 1, services: {{web: {{}}, batch: {{}}, spare: {{}}, reviews: {{{PLAIN}{limit}{routed}}}}}}}
services:
  web: {{}}
  batch: {{}}
  spare: {{latency: 5ms}}
  reviews: {SERVERS}
load:
  - {{from: web, to: reviews, rate: {load * 0.25}}}
  - {{from: batch, to: reviews, rate: {load * 0.75}}}
duration: {seconds}s
""")


def outcomes(run: Any, caller: str) -> Counter[str]:
    return Counter(dict(run.stage.edges[caller, "reviews"].outcomes))


def goodput(run: Any, seconds: int = 8) -> float:
    run.run()
    return sum(run.stage.edges[caller, "reviews"].statuses[200] for caller in ("web", "batch")) / seconds


def gates(run: Any) -> list[Any]:
    return [server.gate for server in run.stage.servers.values() if server.gate is not None]


def test_goodput_at_three_times_the_capacity_is_that_of_the_peak_and_nothing_without_the_limit() -> None:
    peak = goodput(ready(CAPACITY * 0.95))
    kept = goodput(ready(CAPACITY * 3, "{adaptive: true}"))
    collapsed = goodput(ready(CAPACITY * 3))
    assert peak > CAPACITY * 0.9
    assert kept > peak * 0.9
    assert collapsed < peak * 0.2


def test_below_the_capacity_nobody_is_shed_once_the_limit_is_learnt() -> None:
    run = ready(CAPACITY * 0.6, "{adaptive: true, min: 8}")
    run.run()
    assert not any(gate.shed for gate in gates(run))


def test_the_higher_class_is_served_and_the_same_seed_sheds_the_same() -> None:
    limit = "{adaptive: true, min: 8, priorities: [{class: default}, {class: low, from: [batch]}]}"
    runs = [ready(CAPACITY * 3, limit) for _ in range(2)]
    for run in runs:
        run.run()
        assert outcomes(run, "web")["overflow"] <= 0.01 * outcomes(run, "web")["ok"]
        assert outcomes(run, "batch")["overflow"] > outcomes(run, "batch")["ok"]
        (gate,) = gates(run)
        assert at_rest(run)
        assert gate.started == sum(outcomes(run, caller)["ok"] for caller in ("web", "batch"))
        assert sum(gate.shed.values()) == sum(edge.shed for edge in run.stage.edges.values()) > 0
    first, second = runs
    assert [gate.shed for gate in gates(first)] == [gate.shed for gate in gates(second)]
    assert outcomes(first, "batch") == outcomes(second, "batch")


@pytest.mark.parametrize(
    ("fallback", "reason"), [("{status: 200, body: later}", "overflow"), ("{service: spare}", "ok")]
)
def test_a_fallback_stands_in_for_what_is_shed(fallback: str, reason: str) -> None:
    run = ready(CAPACITY * 3, "{max: 8}", f"{{name: all, fallback: {fallback}}}")
    run.run()
    for caller in ("web", "batch"):
        edge = run.stage.edges[caller, "reviews"]
        assert set(edge.statuses) == {200}
        assert set(edge.outcomes) == {"ok", reason}
