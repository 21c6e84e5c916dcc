"""What a run does, held against what is known without it: queueing theory, and the exact rules of the policies."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.scenarios import engine, pair, run

from sidecar.simulate.results import Result

ROOT = Path(__file__).parents[3]
EVEN = "{from: web, to: reviews, rate: 10, arrivals: even}"
STORM_POLICY = """{{version: 1,
  defaults: {{retry: {{max_retries: 3, when: [connect-error, reset, timeout, 5xx], budget: {budget}}},
             circuit_breaker: {{consecutive_failures: 100000}}}},
  services: {{web: {{}}, reviews: {{timeout: {{total: 5s, try: 1s}}}},
             ratings: {{timeout: {{total: 2s, try: 200ms}}}}}}}}"""


def storm(budget: str, propagates: str = "false", slowdown: str = "4") -> str:
    return f"""
version: 1
policy: {STORM_POLICY.format(budget=budget)}
services:
  web: {{endpoints: 2}}
  reviews: {{endpoints: 3, latency: 5ms, propagates: {propagates}, calls: [{{to: ratings, on_failure: 503}}]}}
  ratings: {{endpoints: 3, latency: {{p50: 20ms, p99: 80ms}}, capacity: {{concurrency: 4, queue: 50}}}}
load: [{{from: web, to: reviews, rate: 300}}]
duration: 40s
outages: [{{at: 10s, for: 5s, service: ratings, slowdown: {slowdown}}}]
"""


def outcomes(result: Result, edge: int = 0) -> dict[str, int]:
    return dict(result.edges[edge].outcomes)


def statuses(result: Result, edge: int = 0) -> dict[int, int]:
    return dict(result.edges[edge].statuses)


# -- chance


def test_the_same_seed_gives_the_same_run_whatever_the_hash_seed() -> None:
    """Exactly, in other processes too: no set's and no hash's order decides anything."""
    scenario = ROOT / "examples" / "scenarios" / "retry-storm.yaml"
    program = "import sys; from control_plane.cli import main; sys.exit(main())"
    said = []
    for seed in ("0", "1", "77"):
        done = subprocess.run(
            [sys.executable, "-P", "-c", program, "simulate", str(scenario), "-o", "json"],
            capture_output=True,
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            check=True,
            timeout=60,
        )
        said.append(done.stdout)
    assert said[0] == said[1] == said[2]


def test_another_seed_gives_another_run() -> None:
    one, other = (run(pair(), seed=seed) for seed in (1, 2))
    assert one.requests != other.requests


def test_two_policies_meet_the_same_arrivals() -> None:
    """However many draws each of them makes."""
    begun = []
    for policy in ("{}", "{retry: {max_retries: 3, when: [503]}, balance: {policy: round-robin}}"):
        reviews = "{endpoints: 3, latency: {p50: 10ms, p99: 90ms}, errors: {rate: 30%, statuses: [503]}}"
        ready = engine(pair(policy, reviews, web="{endpoints: 4}"))
        ready.run()
        begun.append(sorted(ready.stage.edges["web", "reviews"].begun_s))
    assert begun[0] == begun[1]


# -- capacity


def test_a_queue_waits_as_long_as_theory_says() -> None:
    """M/D/1: at a load of 0.8 a request waits 0.8 · 8 ms / (2 · 0.2) = 16 ms on average."""
    text = pair(
        reviews="{latency: 8ms, capacity: {concurrency: 1, queue: 100000}}",
        load="{from: web, to: reviews, rate: 100}",
        more=["duration: 1000s", "network: 0s"],
    )
    ready = engine(text)
    ready.run()
    took = ready.stage.edges["web", "reviews"].took_s
    assert min(took) == pytest.approx(0.008)
    assert sum(took) / len(took) == pytest.approx(0.024, rel=0.05)


def test_littles_law() -> None:
    """What is in the system on average, looked at from outside, is the rate times the time spent in it."""
    text = pair(
        reviews="{latency: {p50: 20ms, p99: 100ms}, capacity: {concurrency: 4, queue: 1000}}",
        load="{from: web, to: reviews, rate: 100}",
        more=["duration: 500s", "network: 0s"],
    )
    ready = engine(text)
    (server,) = [each for each in ready.stage.servers.values() if each.service.name == "reviews"]
    seen: list[int] = []
    for look in range(50_000):
        ready.agenda.push(look * 0.01 + 0.005, lambda *_: seen.append(server.busy + len(server.queue)), None, None)
    ready.run()
    edge = ready.stage.edges["web", "reviews"]
    rate, spent_s = edge.started / 500.0, sum(edge.took_s) / edge.started
    assert sum(seen) / len(seen) == pytest.approx(rate * spent_s, rel=0.02)
    assert max(seen) > 4  # some waited


def test_a_full_queue_refuses_as_often_as_theory_says() -> None:
    """Erlang's formula: one place, no queue, a load of one: every second request is lost."""
    text = pair(
        "{circuit_breaker: {consecutive_failures: 1000000}}",
        "{latency: 10ms, capacity: {concurrency: 1, status: 529}}",
        more=["duration: 300s", "network: 0s"],
    )
    result = run(text)
    assert result.edges[0].effective == pytest.approx(0.5, abs=0.01)
    assert set(statuses(result)) == {200, 529}
    assert result.endpoints[0].refusals == statuses(result)[529]


def test_a_cold_start_falls_evenly() -> None:
    text = pair(
        reviews="{latency: 10ms, cold_start: {for: 10s, slowdown: 11}, endpoints: {only: {from: 5s}}}",
        load="{from: web, to: reviews, steps: [{at: 10s, rate: 10}], arrivals: even}",
        more=["duration: 30s", "network: 0s", "discovery: 1s"],
    )
    ready = engine(text)
    ready.run()
    edge = ready.stage.edges["web", "reviews"]
    for begun, took in zip(edge.begun_s, edge.took_s, strict=True):
        assert took == pytest.approx(0.010 * (1.0 + 10.0 * max(0.0, 1.0 - (begun - 5.0) / 10.0)))


# -- breakers, retries, budgets


def test_a_breaker_opens_with_the_seventh_failure_exactly() -> None:
    """Ten requests a second, evenly: those of 2.05 s … 2.65 s fail, the last of them 10 ms later."""
    text = pair(
        "{retry: {max_retries: 0}}",
        load=EVEN,
        more=["duration: 10s", "network: 0s", "outages: [{at: 2s, for: 3s, service: reviews, errors: {rate: 100%}}]"],
    )
    ready = engine(text)
    ready.run()
    first, second = ready.changes[:2]
    assert first.at_s == pytest.approx(2.66, abs=1e-9)
    assert first.text.endswith("7 consecutive failures, the last 500") and first.state == "open"
    lasts_s = float(first.text.split()[2])
    assert 1.0 <= lasts_s <= 1.5
    probe = math.ceil((2.66 + lasts_s - 0.05) * 10) / 10 + 0.05  # the first request after that
    assert (second.at_s, second.text) == (pytest.approx(probe), "half-open: one request probes")
    assert ready.changes[-1].text == "closed: the probe succeeded"


@pytest.mark.parametrize("propagates", ["false", "true"])
def test_the_budget_caps_amplification(propagates: str) -> None:
    """Everything fails for thirty seconds: retries are a fifth of the requests, and the reserve of each caller. Of two
    layers that know of each other only the lower one retries."""
    result = run(storm("{percent: 20%, min_per_second: 1}", propagates, "1000"))
    upper, lower = result.edges
    for edge, callers in ((upper, 2), (lower, 3)):
        assert edge.retries <= 0.2 * edge.requests + callers * 10 * 4
    assert lower.retries > 0 and lower.budget_refusals > 0
    assert (upper.retries > 0) is (propagates == "false")
    assert result.worst_amplification < (1.25 if propagates == "true" else 1.25**2)


def test_without_a_budget_a_storm_grows_and_does_not_end() -> None:
    calm = run(storm("{percent: 20%, min_per_second: 1}"))
    stormy = run(storm("{percent: 100%, min_per_second: 10000}"))
    assert calm.worst_amplification < 1.5 < 8.0 < stormy.worst_amplification
    # Twenty seconds after the outage the one has long recovered, and the other never will.
    assert [run.series.success[55] for run in (calm, stormy)] == [1.0, pytest.approx(0.0, abs=0.1)]


def test_layers_that_know_of_each_other_do_not_multiply() -> None:
    """Where the application passes the trace on, only one layer repeats what the application may have seen."""
    generous = "{percent: 100%, min_per_second: 10000}"
    ignorant, aware = (run(storm(generous, propagates, "1000")) for propagates in ("false", "true"))
    assert ignorant.worst_amplification > 1.4 * aware.worst_amplification
    assert aware.worst_amplification <= 4.0 + 0.01


# -- outages


def test_a_refused_connection_is_tried_elsewhere_and_forgotten_after_the_lease() -> None:
    text = pair(
        reviews="{endpoints: 2, latency: 10ms}",
        more=[
            "duration: 40s",
            "lease: 5s",
            "outages: [{at: 10s, for: 20s, service: reviews, endpoint: reviews-1, down: refused}]",
        ],
    )
    ready = engine(text)
    ready.run()
    edge = ready.stage.edges["web", "reviews"]
    assert dict(edge.outcomes) == {"ok": edge.started}
    assert 7 <= edge.attempts - edge.started < 100
    gone = [change.at_s for change in ready.changes if change.state == "gone"]
    assert gone == [15.0]


def test_requests_in_flight_are_lost_with_their_endpoint() -> None:
    text = pair(
        "{retry: {max_retries: 0}}",
        "{latency: 500ms}",
        EVEN,
        ["duration: 2s", "network: 0s", "outages: [{at: 1.2s, service: reviews, down: refused}]"],
    )
    result = run(text)
    # Five were answered by 1.2 s, seven were under way; they and all later ones find nobody.
    assert statuses(result)[200] == 7
    assert sum(statuses(result).values()) == 20


def test_silence_costs_the_time_of_a_connection() -> None:
    text = pair(
        "{retry: {max_retries: 0}, timeout: {connect: 300ms}}",
        load=EVEN,
        more=["duration: 2s", "network: 0s", "outages: [{at: 0s, service: reviews, down: silent}]"],
    )
    ready = engine(text)
    ready.run()
    edge = ready.stage.edges["web", "reviews"]
    assert set(edge.outcomes) == {"connect_failed", "circuit_open"}
    assert edge.took_s[0] == pytest.approx(0.3)


def test_an_endpoint_that_ends_in_good_order_loses_nothing() -> None:
    text = pair(
        reviews="{latency: 100ms, endpoints: {old: {until: 10s}, new: {from: 5s}}}",
        more=["duration: 20s", "discovery: 2s"],
    )
    result = run(text)
    assert outcomes(result) == {"ok": result.requests}
    old, new = result.endpoints
    assert 0.3 < old.attempts / result.requests < 0.7 and old.attempts + new.attempts == result.requests


@pytest.mark.parametrize(("on_cancel", "wasted"), [("finish", True), ("stop", False)])
def test_what_a_caller_no_longer_waits_for(on_cancel: str, wasted: bool) -> None:
    """A try of 50 ms against work of 200 ms, on a single place."""
    text = pair(
        "{retry: {max_retries: 0}, timeout: {total: 1s, try: 50ms}, circuit_breaker: {consecutive_failures: 1000}}",
        f"{{latency: 200ms, capacity: {{concurrency: 1, queue: 100}}, on_cancel: {on_cancel}}}",
        "{from: web, to: reviews, rate: 20, arrivals: even}",
        ["duration: 1s", "network: 0s"],
    )
    ready = engine(text)
    (server,) = [each for each in ready.stage.servers.values() if each.service.name == "reviews"]
    ready.run()
    assert ready.stage.edges["web", "reviews"].outcomes == {"timeout_try": 20}
    assert (ready.agenda.now > 3.0) is wasted  # twenty times 200 ms of work that nobody waits for
    assert server.busy == 0


def test_hanging_requests_end_with_their_deadline() -> None:
    text = pair(
        "{retry: {max_retries: 0}, timeout: {total: 250ms}, circuit_breaker: {consecutive_failures: 1000}}",
        "{errors: {rate: 100%, statuses: [hang]}}",
        EVEN,
        ["duration: 1s"],
    )
    result = run(text)
    assert outcomes(result) == {"timeout_total": 10}
    assert result.edges[0].p50_s == pytest.approx(0.25)


# -- other policies


def test_rate_limits_of_the_callee() -> None:
    text = pair(
        "{rate_limit: {requests: 5, per: 1s, burst: 1, key: caller}, ports: {http: {port: 80}}}",
        load=EVEN,
        more=["duration: 10s"],
    )
    result = run(text)
    assert outcomes(result) == {"ok": 50, "rate_limited": 50}
    assert statuses(result) == {200: 50, 429: 50}
    assert result.edges[0].effective == 0.5


def test_faults_and_responses_of_the_policy() -> None:
    routes = (
        "[{name: aborts, match: {path: /abort}, fault: {abort: {status: 418}}},"
        " {name: waits, match: {path: /wait}, fault: {delay: {fixed: 300ms}}},"
        " {name: says, match: {path: /say}, respond: {status: 204}}]"
    )
    asks = ", ".join(f"{{path: /{name}}}" for name in ("abort", "wait", "say"))
    ready = engine(
        pair(
            f"{{routes: {routes}}}",
            load=f"{{from: web, to: reviews, rate: 100, requests: [{asks}]}}",
            more=["network: 0s"],
        )
    )
    ready.run()
    edge = ready.stage.edges["web", "reviews"]
    assert set(edge.statuses) == {200, 204, 418}
    assert {round(took, 3) for took in edge.took_s} == {0.0, 0.31}
    assert edge.attempts == edge.statuses[200]


def test_a_fallback_answers_for_a_version_that_is_gone() -> None:
    policy = (
        "{retry: {max_retries: 0}, versions: {v1: {labels: {version: '1'}}},"
        " routes: [{name: only, to: v1, fallback: {status: 503, body: later}}]}"
    )
    reviews = "{latency: 10ms, endpoints: {v1: {labels: {version: '1'}}}}"
    outage = "outages: [{at: 5s, service: reviews, version: v1, down: refused}]"
    result = run(pair(policy, reviews, EVEN, ["duration: 20s", "lease: 1s", outage]))
    assert outcomes(result)["no_healthy_endpoint"] > 100


def test_retry_after_is_obeyed() -> None:
    text = pair(
        "{retry: {max_retries: 1, when: [503]}}",
        "{latency: 10ms, errors: {rate: 100%, statuses: [503], retry_after: 2s}}",
        "{from: web, to: reviews, rate: 1, arrivals: even}",
        ["duration: 3s", "network: 0s"],
    )
    ready = engine(text)
    ready.run()
    for took in ready.stage.edges["web", "reviews"].took_s:
        assert 2.02 <= took <= 3.02


def test_requests_go_by_their_shares() -> None:
    asks = "[{path: /a, weight: 9}, {method: POST, path: /b}]"
    text = pair(
        "{routes: [{name: b, match: {methods: [POST]}, respond: {status: 201}}]}",
        load=f"{{from: web, to: reviews, rate: 1000, requests: {asks}}}",
    )
    result = run(text)
    assert statuses(result)[201] / result.requests == pytest.approx(0.1, rel=0.05)


def test_calls_of_an_application_follow_one_another() -> None:
    text = """
        version: 1
        policy: {version: 1, services: {web: {}, page: {}, a: {}, b: {}}}
        services:
          web:
          page:
            latency: 5ms
            calls: [{to: a, times: 3}, {to: b, share: 50%, on_failure: ignore}]
          a: {latency: 10ms}
          b: {latency: 7ms, errors: {rate: 100%, statuses: [404, 500]}}
        load: [{from: web, to: page, rate: 10}]
        network: 0s
        """
    result = run(text)
    page, a, b = result.edges
    assert a.requests == 3 * page.requests
    assert b.requests / page.requests == pytest.approx(0.5, abs=0.05)
    assert page.effective == 1.0
    assert page.p99_s == pytest.approx(0.042) and page.p50_s in (pytest.approx(0.035), pytest.approx(0.042))


def test_the_load_can_be_cut_short() -> None:
    result = run(pair(), requests=500)
    assert result.requests == result.edges[0].requests == 500


def test_nobody_calls_while_every_caller_is_down() -> None:
    result = run(pair(load=EVEN, more=["duration: 10s", "outages: [{at: 5s, service: web, down: refused}]"]))
    assert (result.requests, result.unsent) == (50, 50)
