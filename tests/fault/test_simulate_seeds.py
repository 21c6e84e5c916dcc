"""Random meshes under random outages, each replayed exactly by its seed, on the policy code that serves requests.

Services, capacities, policies, load and outages are drawn at random; what must hold in every run is checked while it
runs and when all is quiet: a request ends exactly once; attempts are no more than requests, paid retries and free
resends together; the budget is kept; no open breaker is ever picked; no slot of any limit is left taken.

To replay one: `SEED=123 pytest tests/fault/test_simulate_seeds.py`.
"""

import os
import random
from typing import Any

import pytest
from support.scenarios import at_rest

from sidecar.model.snapshot import (
    Budget,
    CircuitBreaker,
    Destination,
    EndpointSpec,
    Fallback,
    Fault,
    Limits,
    Match,
    RateLimit,
    Respond,
    Retry,
    Route,
    Service,
    Snapshot,
    Timeouts,
)
from sidecar.policy.exchange import Exchange
from sidecar.simulate.engine import Engine
from sidecar.simulate.life import Call
from sidecar.simulate.report import NOT_SENT, json_of
from sidecar.simulate.results import result_of
from sidecar.simulate.scenario import (
    HANG,
    RESET,
    Behaviour,
    Capacity,
    ColdStart,
    Down,
    EndpointModel,
    Errors,
    Latency,
    Load,
    Outage,
    Scenario,
    ServiceModel,
    Shape,
    Step,
)

CORE, LONG = 120, 2_000
SEEDS = [int(os.environ["SEED"])] if "SEED" in os.environ else list(range(CORE))
BLOCK = 20  # seeds a test: fewer lines
DURATION_S = 12.0
CHAIN = ("web", "shop", "stock")  # each may call the next


class Watched(Engine):
    """An engine under observation."""

    def send(self, call: Call, ex: Exchange, now: float) -> None:
        assert not call.over and ex.endpoint is not None and ex.endpoint.active > 0
        assert ex.attempt <= ex.plan.retry.max_retries
        if not ex.fresh:
            assert ex.endpoint.breaker.state(now) != "open", "an open breaker was picked"
        if call.is_hedge:
            assert call.other is not None and call.other.ex is not None and call.other.other is call
            assert ex.endpoint is not call.other.ex.endpoint, "a hedge where the request has been"
            assert call.ask.method == b"GET" or ex.plan.retry.methods is not None
        super().send(call, ex, now)

    def _finish(self, call: Call, status: int, reason: str, now: float) -> None:
        assert not call.over, "a request ended twice"
        assert call.ex is None or call.ex.finished
        assert call.other is None and not call.is_hedge
        super()._finish(call, status, reason, now)


def policy(rnd: random.Random, slow: random.Random) -> Snapshot:
    services = {}
    for name in CHAIN:
        timeouts = Timeouts(
            total_s=rnd.choice([0.2, 1.0, 3.0]),
            try_s=rnd.choice([0.05, 0.3, float("inf")]),
            connect_s=rnd.choice([0.1, 1.0]),
        )
        retry = Retry(
            max_retries=rnd.randrange(4),
            failures=frozenset(rnd.sample(["connect-error", "reset", "timeout"], rnd.randrange(4))),
            statuses=frozenset(rnd.sample([429, 500, 503], rnd.randrange(4))),
            methods=rnd.choice([None, frozenset({"any"})]),
            budget=Budget(rnd.choice([0.0, 20.0, 100.0]), rnd.choice([0.0, 1.0, 50.0])),
        )
        fallback = rnd.choice([None, None, Fallback(version="v1"), Fallback(respond=Respond(503))])
        split = rnd.choice([(Destination(None),), (Destination("v1", 70), Destination("v2", 30))])
        limit = rnd.choice([None, None, RateLimit(20, 1.0, 10, rnd.choice([None, "caller", "address"]))])
        fault = rnd.choice([None, None, None, Fault(0.05, 20.0, 503, 5.0)])
        routes = (
            Route(
                "writes", Match(methods=frozenset({"POST"})), split, timeouts, Retry(max_retries=0), rate_limit=limit
            ),
            Route("default", Match(), split, timeouts, retry, fault=fault, fallback=fallback, rate_limit=limit,
                  hedge_after_s=slow.choice([float("inf"), 0.001, 0.02, 0.1])),
        )  # fmt: skip
        services[name] = Service(
            name,
            versions={"v1": {"version": "1"}, "v2": {"version": "2"}},
            routes=routes,
            limits=Limits(requests=rnd.choice([2, 20, 1024])),
            circuit_breaker=CircuitBreaker(
                rnd.choice([1, 3, 7]), rnd.choice([0.1, 1.0]), 2.0, rnd.choice([None, 70.0])
            ),
            balance=rnd.choice(["round-robin", "least-request"]),
        )
    return Snapshot(services)


def latency(rnd: random.Random) -> Latency:
    return rnd.choice([Latency("fixed", 0.01), Latency("uniform", 0.0, 0.1), Latency("lognormal", 0.02, 0.3)])


def errors(rnd: random.Random) -> Errors:
    statuses = tuple(rnd.sample([500, 503, 404, 429, RESET, HANG], rnd.randrange(1, 4)))
    slow = rnd.choice([None, Latency("fixed", 0.001)])
    return Errors(rnd.choice([0.01, 0.3, 1.0]), statuses, slow, rnd.choice([None, 0.0, 1.0, 60.0]))


def service(rnd: random.Random, name: str) -> ServiceModel:
    own = Behaviour(
        latency(rnd),
        rnd.choice([None, errors(rnd)]),
        rnd.choice([None, Capacity(rnd.choice([1, 4]), rnd.choice([0, 3, 50]), rnd.choice([503, 429]))]),
        rnd.choice([None, ColdStart(2.0, 5.0)]),
    )
    endpoints = []
    for number in range(rnd.randrange(1, 6)):
        spec = EndpointSpec(f"{name}-{number}", 80, {"version": str(number % 2 + 1)})
        starts_s = rnd.choice([0.0, 0.0, 0.0, rnd.uniform(1.0, 8.0)])
        ends_s = rnd.choice([None, None, starts_s + rnd.uniform(0.5, 5.0)])
        endpoints.append(EndpointModel(spec.host, spec, own, f"zone-{number % 3}", starts_s, ends_s))
    steps: tuple[Step, ...] = ()
    if name != CHAIN[-1]:
        below = CHAIN[CHAIN.index(name) + 1]
        steps = tuple(
            Step(below, rnd.choice([b"GET", b"POST"]), times=rnd.choice([1, 2]), share=rnd.choice([1.0, 0.5]),
                 status=rnd.choice([0, 500, 503]))
            for _ in range(rnd.randrange(3))
        )  # fmt: skip
    return ServiceModel(name, tuple(endpoints), steps, rnd.random() < 0.7, rnd.random() < 0.5)


def outage(rnd: random.Random, services: dict[str, ServiceModel]) -> Outage:
    model = services[rnd.choice(CHAIN)]
    names = [each.name for each in model.endpoints]
    at_s = rnd.uniform(0.0, DURATION_S)
    kind = rnd.randrange(4)
    return Outage(
        at_s,
        at_s + rnd.uniform(0.05, 6.0),
        model.name,
        tuple(rnd.sample(names, rnd.randrange(1, len(names) + 1))),
        "an outage",
        latency=latency(rnd) if kind == 0 else None,
        slowdown=rnd.choice([0.5, 20.0]) if kind == 1 else None,
        errors=errors(rnd) if kind == 2 else None,
        down=rnd.choice([Down.REFUSED, Down.SILENT]) if kind == 3 else None,
    )


def scenario(rnd: random.Random) -> Scenario:
    services = {name: service(rnd, name) for name in CHAIN}
    shapes = (Shape(weight=3), Shape(b"POST"), Shape(headers=((b"idempotency-key", b"1"),), method=b"POST"))
    points = ((0.0, 20.0), (3.0, rnd.choice([5.0, 80.0])), (9.0, 30.0))
    loads = (
        Load("web", "shop", points, rnd.random() < 0.5, rnd.random() < 0.3, shapes),
        Load("shop", "stock", ((0.0, 10.0),), shapes=shapes[:1]),
    )
    outages = tuple(outage(rnd, services) for _ in range(rnd.randrange(5)))
    return Scenario(
        "life", services, loads, outages, (), DURATION_S, 1, rnd.choice([0.0, 0.0005, 0.02]), rnd.choice([0.0, 1.0]),
        rnd.choice([0.0, 2.0, 15.0]),
    )  # fmt: skip


def live(seed: int) -> dict[str, Any]:
    rnd = random.Random(seed)
    snapshot, play = policy(rnd, random.Random(seed + 2_000_000)), scenario(rnd)
    engine = Watched(play, snapshot, seed, 1_000_000, 12)
    engine.run()
    assert at_rest(engine), "something was left"
    result = result_of(engine, "drawn")
    sidecars = [server.sidecar for server in engine.stage.servers.values() if server.sidecar is not None]
    for edge in result.edges:
        record = engine.stage.edges[edge.caller, edge.to]
        cancelled = sum(count for reason, count in edge.outcomes if reason == "caller_gone")
        assert record.started == record.ended + cancelled, "a request was lost"
        assert sum(count for _, count in edge.outcomes) == record.started
        sent = sum(count for word, count in edge.hedges if word not in NOT_SENT)
        # A service may be called as the fallback of none here, so its clusters belong to this edge alone.
        assert edge.attempts <= edge.requests + edge.retries + edge.resends + sent, "attempts that nothing paid for"
        assert record.beaten <= sent
    for sidecar in sidecars:
        for cluster in (*sidecar.past, *sidecar.state):
            budget = snapshot.services[cluster.name].routes[-1].retry.budget
            windows = DURATION_S / 10.0 + 3.0
            paid = cluster.attempts * budget.percent / 100.0 + budget.min_per_second * 10.0 * windows
            assert cluster.retries <= paid * windows, "the budget was overdrawn"
    return json_of(play, seed, [result], [()])


def check(seeds: list[int]) -> None:
    for seed in seeds:
        try:
            live(seed)
        except BaseException as error:
            error.add_note(f"replay with: SEED={seed} pytest tests/fault/test_simulate_seeds.py")
            raise


def blocks(seeds: list[int]) -> list[list[int]]:
    return [seeds[at : at + BLOCK] for at in range(0, len(seeds), BLOCK)]


@pytest.mark.parametrize("seeds", blocks(SEEDS), ids=lambda seeds: f"{seeds[0]}-{seeds[-1]}")
def test_random_meshes(seeds: list[int]) -> None:
    check(seeds)


@pytest.mark.long
@pytest.mark.skipif("SEED" in os.environ, reason="one seed is asked for")
@pytest.mark.parametrize("seeds", blocks(list(range(CORE, LONG))), ids=lambda seeds: f"{seeds[0]}-{seeds[-1]}")
def test_many_random_meshes(seeds: list[int]) -> None:
    check(seeds)


def test_a_seed_is_replayed_exactly() -> None:
    assert live(3) == live(3)
