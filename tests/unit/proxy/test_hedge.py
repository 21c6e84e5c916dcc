"""Hedges, through the real data path on memory channels, in virtual time."""

from typing import Any

import pytest
import trio
import trio.testing
from support.memory_net import DialError, Net, Peer, memory_world

from sidecar.model.snapshot import (
    Budget,
    CircuitBreaker,
    EndpointSpec,
    Limits,
    Retry,
    Route,
    Service,
    Snapshot,
    Sticky,
    Timeouts,
)

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
OTHER = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nother"
DOWN = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 4\r\n\r\ndown"
GET = b"GET / HTTP/1.1\r\nhost: shop\r\n\r\n"
ONCE = Retry(max_retries=0)
ANY = Retry(max_retries=0, methods=frozenset({"any"}))
AGAIN = Retry(max_retries=1, statuses=frozenset({503}), base_s=0.0, max_s=0.0)
AFTER_S = 0.05
RESULTS = ("won", "lost", "failed", "cancelled", "promoted", "no_budget", "no_endpoint", "overflow")


def network(*, endpoints: int = 2, after_s: float = AFTER_S, **options: Any) -> Any:
    route = {key: options.pop(key) for key in list(options) if key in Route.__dataclass_fields__}
    route.setdefault("retry", ONCE)
    specs = tuple(EndpointSpec(f"10.0.0.{n + 1}", 15006) for n in range(endpoints))
    shop = Service("shop", endpoints=specs, routes=(Route("default", hedge_after_s=after_s, **route),), **options)
    web = Service("web", routes=(Route("default"),))
    return memory_world(Snapshot({"web": web, "shop": shop}))


def lines(head: bytes) -> dict[bytes, bytes]:
    fields = head.partition(b"\r\n\r\n")[0].split(b"\r\n")[1:]
    return dict(line.split(b": ", 1) for line in fields)


def results(net: Net) -> dict[str, int]:
    meters = net.world.service_meters("out", "shop").hedges
    return {each: int(meters.get(each)) for each in RESULTS if meters.get(each)}


def at_rest(net: Net) -> bool:
    cluster = net.cluster("shop")
    return cluster.active == 0 and all(each.active == 0 for each in cluster.endpoints.values())


async def quiet() -> None:
    await trio.testing.wait_all_tasks_blocked()


async def raced(net: Net, request: bytes = GET) -> tuple[Peer, Peer, Peer]:
    """The caller, the server of the first attempt and that of its hedge."""
    app = net.caller()
    app.send(request)
    first = await net.accepted()
    await quiet()
    hedge = await net.accepted()
    await quiet()
    return app, first, hedge


async def test_a_hedge_goes_to_another_endpoint_and_its_answer_counts(autojump_clock):
    async with network() as net:
        began = trio.current_time()
        app, first, hedge = await raced(net)
        assert trio.current_time() - began == pytest.approx(AFTER_S)
        assert first.endpoint is not hedge.endpoint
        sent, again = lines(first.read()), lines(hedge.read())
        assert (sent[b"x-pillion-attempt"], again[b"x-pillion-attempt"]) == (b"0", b"1")
        assert sent[b"traceparent"] == again[b"traceparent"]
        hedge.send(OK)
        await quiet()
        assert app.read() == OK and first.ended == "close" and hedge.ended is None
        assert results(net) == {"won": 1} and at_rest(net)
        cluster = net.cluster("shop")
        assert (cluster.attempts, cluster.retries) == (2, 0)
        assert hedge.endpoint is not None and first.endpoint is not None
        assert [(e.successes, e.failures) for e in (hedge.endpoint, first.endpoint)] == [(1, 0), (0, 0)]
        assert [len(e.idle) for e in (hedge.endpoint, first.endpoint)] == [1, 0]
        assert net.log == [(200, "ok")]


async def test_the_first_attempt_may_still_be_first(autojump_clock):
    async with network() as net:
        app, first, hedge = await raced(net)
        first.send(OK)
        await quiet()
        assert app.read() == OK and hedge.ended == "close" and first.ended is None
        assert results(net) == {"lost": 1} and at_rest(net)
        assert [(e.successes, e.failures) for e in (hedge.endpoint, first.endpoint)] == [(0, 0), (1, 0)]


async def test_an_answer_in_time_is_not_hedged(autojump_clock):
    async with network() as net:
        app = net.caller()
        app.send(GET)
        first = await net.accepted()
        first.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n")  # the head counts, not the body
        await trio.sleep(1.0)
        first.send(b"ok")
        assert app.read() == OK and net.cluster("shop").attempts == 1 and not results(net)


@pytest.mark.parametrize(
    ("request_", "route"),
    [
        (b"POST / HTTP/1.1\r\nhost: shop\r\ncontent-length: 1\r\n\r\nx", {}),
        (b"PATCH / HTTP/1.1\r\nhost: shop\r\ncontent-length: 0\r\n\r\n", {}),
        (b"GET / HTTP/1.1\r\nhost: shop\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
         {"upgrade": frozenset({"websocket"})}),
        (GET, {"sticky": Sticky("stay", 60.0, "endpoint")}),
        (b"PUT / HTTP/1.1\r\nhost: shop\r\ncontent-length: 1\r\n\r\nx", {}),
        (b"POST / HTTP/1.1\r\nhost: shop\r\nidempotency-key: 7\r\ncontent-length: 1\r\n\r\nx", {}),
        (b"DELETE / HTTP/1.1\r\nhost: shop\r\n\r\n", {}),
        (b"PUT / HTTP/1.1\r\nhost: shop\r\ncontent-length: 70000\r\n\r\n" + b"x" * 70_000, {"retry": ANY}),
        (b"PUT / HTTP/1.1\r\nhost: shop\r\ncontent-length: 9\r\n\r\nx", {"retry": ANY}),
        (b"GET / HTTP/1.1\r\nhost: shop\r\n\r\n", {"retry": Retry(methods=frozenset({"HEAD"}))}),
    ],
)  # fmt: skip
async def test_what_is_never_sent_twice(request_, route, autojump_clock):
    async with network(**route) as net:
        app = net.caller()
        app.send(request_)
        await net.accepted()
        await trio.sleep(1.0)
        assert net.cluster("shop").attempts == 1 and not results(net)
        app.reset()


async def test_a_post_that_may_be_repeated_is_hedged_with_its_body(autojump_clock):
    async with network(retry=ANY) as net:
        app = net.caller()
        app.send(b"POST / HTTP/1.1\r\nhost: shop\r\ncontent-length: 6\r\n\r\nabc")
        first = await net.accepted()
        await trio.sleep(1.0)
        assert net.cluster("shop").attempts == 1  # not whole
        app.send(b"def")
        began = trio.current_time()
        hedge = await net.accepted()
        await quiet()
        assert trio.current_time() - began == pytest.approx(AFTER_S)
        assert first.read().endswith(b"\r\n\r\nabcdef") and hedge.read().endswith(b"\r\n\r\nabcdef")
        hedge.send(OK)
        await quiet()
        assert app.read() == OK and net.world.replay.bytes_held == 0 and at_rest(net)


async def test_inside_anothers_retry_nothing_is_hedged(autojump_clock):
    async with network() as net:
        trace = b"0123456789abcdef0123456789abcdef"
        token = net.world.memory.enter(trace, trio.current_time() + 60.0, 1)
        app = net.caller()
        app.send(GET[:-2] + b"traceparent: 00-%b-0123456789abcdef-01\r\n\r\n" % trace)
        await net.accepted()
        await trio.sleep(1.0)
        net.world.memory.leave(token)
        assert net.cluster("shop").attempts == 1 and not results(net)
        app.reset()


async def test_without_another_endpoint_budget_or_slot_there_is_none(autojump_clock):
    for options, result in (
        ({"endpoints": 1}, "no_endpoint"),
        ({"retry": Retry(max_retries=0, budget=Budget(0.0, 0.0))}, "no_budget"),
        ({"limits": Limits(requests=1)}, "overflow"),
    ):
        async with network(**options) as net:
            app = net.caller()
            app.send(GET)
            first = await net.accepted()
            await trio.sleep(1.0)
            first.send(OK)
            assert app.read() == OK and results(net) == {result: 1} and net.cluster("shop").attempts == 1


async def test_hedges_and_retries_share_a_budget(autojump_clock):
    async with network(endpoints=3, retry=Retry(max_retries=0, budget=Budget(20.0, 0.0))) as net:
        for number in range(20):
            app = net.caller()
            app.send(GET)
            await quiet()
            await trio.sleep(AFTER_S + 0.01)
            app.reset()
            await quiet()
            assert net.cluster("shop").attempts <= (number + 1) * 1.2
        assert net.cluster("shop").attempts == 22  # half of it is left to retries
        assert results(net) == {"cancelled": 2, "no_budget": 18}


async def test_an_open_breaker_is_not_hedged_to(autojump_clock):
    async with network(circuit_breaker=CircuitBreaker(1, 60.0, 60.0)) as net:
        app = net.caller()
        app.send(GET)
        first = await net.accepted()
        for endpoint in net.cluster("shop").endpoints.values():
            if endpoint is not first.endpoint:
                endpoint.breaker.failure(0, trio.current_time(), lambda: 0.0)
        await trio.sleep(1.0)
        first.send(OK)
        assert app.read() == OK and results(net) == {"no_endpoint": 1}


@pytest.mark.parametrize(
    "bad",
    [
        DOWN,
        b"HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 429 No\r\ncontent-length: 0\r\n\r\n",
        b"?\r\n\r\n",
        None,
    ],
)
async def test_a_bad_hedge_costs_the_caller_nothing(bad, autojump_clock):
    async with network() as net:
        app, first, hedge = await raced(net)
        if bad is None:
            hedge.reset()
        else:
            hedge.send(bad)
        await quiet()
        assert not app.read() and first.ended is None
        first.send(OK)
        assert app.read() == OK and results(net) == {"failed": 1} and at_rest(net)
        assert hedge.endpoint is not None and hedge.endpoint.failures == (0 if bad is not None and b"429" in bad else 1)


@pytest.mark.parametrize("bad", [DOWN, b"HTTP/1.1 429 No\r\ncontent-length: 0\r\n\r\n", None])
async def test_where_the_first_attempt_fails_the_hedge_goes_on(bad, autojump_clock):
    async with network(retry=AGAIN) as net:
        app, first, hedge = await raced(net)
        if bad is None:
            first.reset()
        else:
            first.send(bad)
        await quiet()
        assert not app.read() and hedge.ended is None and net.cluster("shop").attempts == 2
        hedge.send(OK)
        assert app.read() == OK and results(net) == {"promoted": 1} and at_rest(net)
        assert net.cluster("shop").retries == 0


async def test_when_both_have_failed_the_rules_for_retries_hold(autojump_clock):
    async with network(endpoints=3, retry=AGAIN) as net:
        app, first, hedge = await raced(net)
        first.send(DOWN)
        hedge.send(DOWN)
        third = await net.accepted()
        await quiet()
        assert lines(third.read())[b"x-pillion-attempt"] == b"2"
        assert len({first.endpoint, hedge.endpoint, third.endpoint}) == 3
        await trio.sleep(1.0)
        assert net.cluster("shop").attempts == 3  # one hedge for a request
        third.send(OK)
        assert app.read() == OK and at_rest(net)


async def test_when_both_have_failed_and_no_retry_is_left_the_last_answer_counts(autojump_clock):
    async with network() as net:
        app, first, hedge = await raced(net)
        hedge.send(b"HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n")
        first.send(DOWN)
        await quiet()
        assert app.read().startswith(b"HTTP/1.1 503") and at_rest(net)


async def test_a_retry_may_be_hedged(autojump_clock):
    async with network(endpoints=3, retry=AGAIN) as net:
        app = net.caller()
        app.send(GET)
        first = await net.accepted()
        first.send(DOWN)
        await net.accepted()
        hedge = await net.accepted()
        await quiet()
        assert lines(hedge.read())[b"x-pillion-attempt"] == b"2"
        hedge.send(OK)
        await quiet()
        assert app.read() == OK and net.cluster("shop").attempts == 3 and at_rest(net)


async def test_the_time_of_the_first_attempt_is_up_while_the_hedge_goes_on(autojump_clock):
    async with network(timeouts=Timeouts(total_s=1.0, try_s=0.2)) as net:
        app, first, hedge = await raced(net)
        await trio.sleep(0.16)
        await quiet()
        assert first.ended == "close" and hedge.ended is None and not app.read()
        assert first.endpoint is not None and first.endpoint.failures == 1
        hedge.send(OK)
        assert app.read() == OK and results(net) == {"promoted": 1}


async def test_the_time_of_the_hedge_is_its_own(autojump_clock):
    async with network(timeouts=Timeouts(total_s=1.0, try_s=0.2)) as net:
        app, first, hedge = await raced(net)
        await trio.sleep(0.3)
        await quiet()
        assert app.read().startswith(b"HTTP/1.1 504") and first.ended == hedge.ended == "close" and at_rest(net)
        assert net.log == [(504, "timeout_try")]


async def test_the_total_covers_both_and_blames_both(autojump_clock):
    async with network(timeouts=Timeouts(total_s=0.5)) as net:
        app, first, hedge = await raced(net)
        await trio.sleep(0.5)
        await quiet()
        assert app.read().startswith(b"HTTP/1.1 504") and first.ended == hedge.ended == "close" and at_rest(net)
        assert [e.failures for e in net.cluster("shop").endpoints.values()] == [1, 1]
        assert results(net) == {"cancelled": 1}


async def test_a_caller_that_leaves_cancels_both(autojump_clock):
    async with network() as net:
        app, first, hedge = await raced(net)
        app.reset()
        await quiet()
        assert first.ended == hedge.ended == "close" and at_rest(net) and results(net) == {"cancelled": 1}
        assert net.cluster("shop").cancelled == 1


async def test_a_connection_that_never_comes_about_is_hedged(autojump_clock):
    async with network() as net:
        usual, hosts = net.dial, []

        async def dial(endpoint: Any, alpn: str) -> Any:
            hosts.append(endpoint.host)
            if len(hosts) == 1:
                await trio.sleep(3.0)
                raise DialError("silence")
            return await usual(endpoint, alpn)

        net.dial = dial
        app = net.caller()
        app.send(GET)
        hedge = await net.accepted()
        await quiet()
        hedge.send(OK)
        await quiet()
        assert app.read() == OK and at_rest(net) and results(net) == {"won": 1} and len(set(hosts)) == 2
        await trio.sleep(4.0)
        assert net.cluster("shop").connections == 1


async def test_a_hedge_whose_connection_is_still_being_made_takes_over(autojump_clock):
    async with network() as net:
        usual, count = net.dial, [0]

        async def dial(endpoint: Any, alpn: str) -> Any:
            count[0] += 1
            if count[0] == 2:
                await trio.sleep(0.5)
            return await usual(endpoint, alpn)

        net.dial = dial
        app = net.caller()
        app.send(GET)
        first = await net.accepted()
        await trio.sleep(0.1)
        first.reset()
        second = await net.accepted()
        await quiet()
        assert second.endpoint is not first.endpoint
        second.send(OK)
        await quiet()
        assert app.read() == OK and at_rest(net) and results(net) == {"promoted": 1}
        await trio.sleep(1.0)
        assert net.cluster("shop").connections == 2 and net.cluster("shop").attempts == 2


async def test_a_probe_that_a_hedge_beats_has_failed(autojump_clock):
    async with network(circuit_breaker=CircuitBreaker(1, 1.0, 60.0)) as net:
        cluster = net.cluster("shop")
        suspect, other = cluster.endpoints.values()
        suspect.breaker.failure(0, trio.current_time(), lambda: 0.0)
        other.breaker.failure(0, trio.current_time(), lambda: 0.0)
        await trio.sleep(1.01)
        app, first, hedge = await raced(net)
        assert {first.endpoint, hedge.endpoint} == {suspect, other}
        hedge.send(OK)
        await quiet()
        now = trio.current_time()
        assert app.read() == OK and first.endpoint is not None and hedge.endpoint is not None
        assert first.endpoint.breaker.state(now) == "open" and hedge.endpoint.breaker.state(now) == "closed"


async def test_the_log_counts_both_attempts(autojump_clock):
    async with network() as net:
        entries: list[Any] = []
        net.world.access.enabled = True
        net.world.access.http = entries.append
        app, _first, hedge = await raced(net)
        hedge.send(OK)
        await quiet()
        assert app.read() == OK and hedge.endpoint is not None
        (entry,) = entries
        assert entry[11] == 2 and hedge.endpoint.key in entry


async def test_whoever_is_banned_is_not_heard_on_either_of_the_two(autojump_clock):
    async with network() as net:
        app, first, hedge = await raced(net)
        assert {up.endpoint for up in net.world.pool.busy()} == {first.endpoint, hedge.endpoint}
        net.world.ban(["spiffe://mesh.local/service/shop"])
        await trio.sleep(6.0)
        assert first.ended and hedge.ended and app.read().startswith(b"HTTP/1.1 50") and at_rest(net)


async def test_endpoints_leave_while_two_attempts_race(autojump_clock):
    async with network() as net:
        app, first, hedge = await raced(net)
        shop = Service("shop", endpoints=(EndpointSpec("10.0.0.9", 15006),), routes=(Route("default"),))
        net.apply(Snapshot({"web": Service("web", routes=(Route("default"),)), "shop": shop}))
        await quiet()
        assert first.ended is None and hedge.ended is None
        hedge.send(OK)
        await quiet()
        assert app.read() == OK and first.ended and hedge.ended  # busy ones close with their answer


async def test_what_is_answered_while_a_hedge_waits_for_a_connection_frees_its_place(autojump_clock):
    async with network(limits=Limits(connections=1)) as net:
        app = net.caller()
        app.send(GET)
        first = await net.accepted()
        await trio.sleep(0.2)  # the hedge stands in the queue
        assert len(net.cluster("shop").waiters) == 1
        other = net.caller()
        other.send(GET)
        await quiet()
        assert len(net.cluster("shop").waiters) in (1, 2)
        first.send(OK)
        await quiet()
        assert app.read() == OK and results(net) == {"lost": 1}
        second = first if not first.ended else await net.accepted()
        await quiet()
        second.send(OK)
        await quiet()
        assert other.read() == OK and at_rest(net) and not net.cluster("shop").waiters
