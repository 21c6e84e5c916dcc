"""Injected faults through the real data path on memory channels: what they count to, and what never happens to them."""

import random
from typing import Any

import pytest
import trio
import trio.testing
from support.memory_net import Net, memory_world

from sidecar.model.snapshot import CircuitBreaker, EndpointSpec, Retry, Route, Service, Snapshot, Timeouts
from sidecar.plugins.fault import FaultAbort, FaultDelay
from sidecar.proxy.filtering import Chain, Link
from sidecar.testing import make_context, make_request

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
GET = b"GET / HTTP/1.1\r\nhost: shop\r\n\r\n"


def delay(delay_s: float) -> FaultDelay:
    return FaultDelay(FaultDelay.decode({"delay_s": delay_s}))


def abort(status: int, percent: float = 100.0) -> FaultAbort:
    return FaultAbort(FaultAbort.decode({"status": status, "percent": percent}))


def network(fault: Any, **options: Any) -> Any:
    def chain(net: Net) -> Chain:
        fault.context = context = make_context(clock=trio.current_time)
        links = (Link(fault, "fault", True, context),)
        return Chain(links, net.world.meters.service("out", "shop"), net.world.note)

    routed = {key: options.pop(key) for key in list(options) if key in ("timeouts", "retry")}
    shop = Service(
        "shop", endpoints=(EndpointSpec("10.0.0.1", 15006),), routes=(Route("default", **routed),), **options
    )
    snapshot = Snapshot({"web": Service("web", routes=(Route("default"),)), "shop": shop})
    return memory_world(snapshot, chains={("out", "shop"): chain})


async def test_a_delay_is_part_of_the_total_time(autojump_clock):
    async with network(delay(2.0), timeouts=Timeouts(total_s=0.5)) as net:
        app = net.caller()
        began = trio.current_time()
        app.send(GET)
        answer = await app.until()
        assert answer.startswith(b"HTTP/1.1 504 ") and b"x-pillion-reason: timeout_total" in answer
        assert trio.current_time() - began == pytest.approx(0.5)
        await trio.sleep(5)
        assert not net.pending() and net.dials == 0


async def test_what_a_delay_leaves_of_the_total_is_the_services(autojump_clock):
    async with network(delay(2.0), timeouts=Timeouts(total_s=3.0), retry=Retry(max_retries=0)) as net:
        app = net.caller()
        began = trio.current_time()
        app.send(GET)
        await net.accepted()
        assert trio.current_time() - began == pytest.approx(2.0)
        assert (await app.until()).startswith(b"HTTP/1.1 504 ")
        assert trio.current_time() - began == pytest.approx(3.0)


async def test_without_a_total_time_a_delay_lasts(autojump_clock):
    async with network(delay(400.0), timeouts=Timeouts(total_s=float("inf"))) as net:
        app = net.caller()
        app.send(GET)
        server = await net.accepted()
        await trio.testing.wait_all_tasks_blocked()
        server.send(OK)
        assert app.read() == OK and trio.current_time() >= 400.0


async def test_an_abort_is_no_failure_of_the_service_and_is_not_retried(autojump_clock):
    options: dict[str, Any] = {
        "retry": Retry(max_retries=3, statuses=frozenset({503})),
        "circuit_breaker": CircuitBreaker(consecutive_failures=1),
    }
    async with network(abort(503), **options) as net:
        app = net.caller()
        for _ in range(5):
            app.send(GET)
            answer = app.read()
            assert answer.startswith(b"HTTP/1.1 503 ") and b"x-pillion-reason: fault_injected" in answer
        cluster = net.cluster("shop")
        assert (cluster.attempts, cluster.retries, cluster.active) == (0, 0, 0)
        assert not any(e.failures or e.breaker.tripped for e in cluster.endpoints.values())
        assert net.log == [(503, "fault_injected")] * 5


@pytest.mark.parametrize("percent", [0.1, 2.5, 50.0, 99.0])
@pytest.mark.parametrize("seed", range(3))
async def test_shares_converge_and_one_seed_gives_one_answer(percent: float, seed: int) -> None:
    count = 20_000
    request = make_request()

    async def hits() -> list[int]:
        filter_ = abort(503, percent)
        await filter_.open(make_context(random=random.Random(seed).random))
        return [number for number in range(count) if filter_.on_request(request) is not None]

    hit, share = await hits(), percent / 100.0
    assert hit == await hits()
    assert abs(len(hit) - count * share) < 5 * (count * share * (1.0 - share)) ** 0.5
