"""The clock of outliers in virtual time: each step comes when it is due, with no request to bring it."""

from types import SimpleNamespace
from typing import Any

import trio
from trio.testing import MockClock

from sidecar.model.snapshot import CircuitBreaker, EndpointSpec, Limits, Outliers, Retry
from sidecar.policy.cluster import Cluster
from sidecar.proxy.watch import Watch


def world_of(*clusters: Cluster) -> Any:
    reactor = SimpleNamespace(call=lambda fn, *arguments: fn(*arguments))
    return SimpleNamespace(state=list(clusters), clock=trio.current_time, reactor=reactor)


def bad_of_six() -> Cluster:
    cluster = Cluster("reviews", "out", Limits(), Retry(), trio.current_time())
    cluster.update([EndpointSpec(f"e{n}", 80) for n in range(6)], CircuitBreaker(), {}, "", "")
    return cluster


async def test_judged_and_back_when_due(autojump_clock: MockClock) -> None:
    cluster, watch = bad_of_six(), Watch()
    world = world_of(cluster)
    first, *others = cluster.endpoints.values()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.run, world)
        await trio.sleep(50)  # nothing to watch
        cluster.eject_outliers(Outliers(), trio.current_time())
        watch.rouse()  # from 50 s on
        await trio.sleep(9.99)
        first.failures += 100
        for endpoint in others:
            endpoint.successes += 100
        assert not first.ejected
        await trio.sleep(0.02)
        assert first.ejected and not first.healthy
        await trio.sleep(29.97)  # 89.98
        assert first.ejected
        await trio.sleep(0.05)
        assert not first.ejected and first.healthy
        cluster.eject_outliers(None, trio.current_time())
        watch.rouse()
        await trio.sleep(1000)
        nursery.cancel_scope.cancel()
    assert cluster.ejections == 1
