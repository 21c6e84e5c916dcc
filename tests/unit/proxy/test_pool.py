"""The pool on memory channels: limits, the waiting queue, connections being made, and what becomes of spare ones."""

from typing import Any

import pytest
import trio
import trio.testing
from support.memory_net import DialError, Net, Peer, memory_world

from sidecar.model.snapshot import EndpointSpec, Limits, Retry, Route, Service, Snapshot, Timeouts, Tls
from sidecar.proxy.pool import DIALS_MAX

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
GET = b"GET / HTTP/1.1\r\nhost: shop\r\n\r\n"


def network(
    connections: int = 1024, pending: int = 1024, *, endpoints: int = 1, tls: Tls = Tls.MESH, **options: Any
) -> Any:
    route: dict[str, Any] = {"retry": options.pop("retry", Retry(max_retries=0))}
    route["timeouts"] = options.pop("timeouts", Timeouts(total_s=60.0))
    specs = tuple(EndpointSpec(f"10.0.0.{n + 1}", 1, tls=tls) for n in range(endpoints))
    shop = Service(
        "shop",
        endpoints=specs,
        routes=(Route("default", **route),),
        limits=Limits(connections, pending),
        **options,
    )
    return memory_world(Snapshot({"web": Service("web", routes=(Route("default"),)), "shop": shop}))


async def quiet() -> None:
    await trio.testing.wait_all_tasks_blocked()


def get(n: int) -> bytes:
    return GET.replace(b"/ ", b"/%d " % n)


def number(request: bytes) -> int:
    return int(request.split(b" ")[1][1:])


async def callers(net: Net, count: int, first: int = 0) -> list[Peer]:
    apps = []
    for n in range(first, first + count):
        apps.append(net.caller())
        apps[-1].send(get(n))
        await quiet()  # in this order
    return apps


# The limit and the queue


async def test_never_more_connections_than_the_limit_and_first_come_first_served(autojump_clock):
    async with network(connections=2) as net:
        apps = await callers(net, 10)
        servers = [await net.accepted(), await net.accepted()]
        cluster = net.cluster("shop")
        assert net.dials == 2 and len(cluster.waiters) == 8 and cluster.connections == 2
        order = []
        for turn in range(10):
            server = servers[turn % 2]
            order.append(number(server.read()))
            server.send(OK)
            await quiet()
        assert order == list(range(10)) and net.dials == 2
        assert all(app.read() == OK for app in apps)


async def test_a_full_queue_overflows_at_once(autojump_clock):
    async with network(connections=1, pending=2) as net:
        apps = await callers(net, 4)
        assert b"x-pillion-reason: overflow" in apps[3].read()
        server = await net.accepted()
        for _ in range(3):
            server.send(OK)
            await quiet()
        assert [app.read() for app in apps[:3]] == [OK] * 3 and net.cluster("shop").overflows == 1


async def test_queueing_is_within_the_total_and_leaves_the_queue(autojump_clock):
    async with network(connections=1, timeouts=Timeouts(total_s=2.0)) as net:
        first, second = await callers(net, 2)
        await trio.sleep(1.0)
        (third,) = await callers(net, 1, 2)
        await trio.sleep(1.1)
        assert b"timeout_total" in first.read() and b"timeout_total" in second.read()
        await net.accepted()
        server = await net.accepted()  # the place that the first left
        await quiet()
        assert number(server.read()) == 2
        server.send(OK)
        assert third.read() == OK


async def test_waiters_that_leave_are_skipped(autojump_clock):
    async with network(connections=1) as net:
        apps = await callers(net, 4)
        server = await net.accepted()
        apps[1].reset()
        apps[2].reset()
        assert number(server.read()) == 0
        server.send(OK)
        await quiet()
        assert number(server.read()) == 3
        server.send(OK)


@pytest.mark.parametrize("how", ["close", "reset", "connection: close", "cut"])
async def test_no_wake_up_is_lost_when_the_connection_goes(autojump_clock, how):
    async with network(connections=1) as net:
        apps = await callers(net, 4)
        for n in range(4):
            server = await net.accepted()
            await quiet()
            assert number(server.read()) == n
            if how == "connection: close":
                server.send(OK.replace(b"content", b"connection: close\r\ncontent"))
            elif how == "cut":
                server.send(OK[:-1])
                server.close()
            else:
                server.send(OK)
                getattr(server, how)()
        await quiet()
        assert net.dials == 4 or how in ("close", "reset")
        assert all(app.got or app.ended for app in apps)


async def test_a_failed_dial_makes_room_for_the_next_in_the_queue(autojump_clock):
    async with network(connections=1) as net:
        fates: list[Any] = [DialError("refused"), DialError("refused"), None]
        net.on_dial = lambda endpoint: fates.pop(0)
        apps = await callers(net, 3)
        assert [b"connect_failed" in app.read() for app in apps[:2]] == [True, True]
        server = await net.accepted()
        await quiet()
        server.send(OK)
        assert apps[2].read() == OK and net.cluster("shop").connections == 1


async def test_an_idle_connection_elsewhere_makes_room(autojump_clock):
    async with network(connections=1, endpoints=2) as net:
        net.world.rnd = lambda: 0.0
        app = net.caller()
        seen = set()
        last = None
        for _ in range(6):
            app.send(GET)
            await quiet()
            if net.pending():
                if last is not None:
                    assert last.ended is not None
                last = await net.accepted()
                seen.add(last.endpoint.key)
                await quiet()
            last.send(OK)
            last.endpoint.weight = 0.01  # the other one is picked next
            assert net.cluster("shop").connections == 1
        assert len(seen) == 2


async def test_a_queue_head_for_another_endpoint_gets_the_place(autojump_clock):
    async with network(connections=1, endpoints=2) as net:
        one, two = await callers(net, 2)
        first = await net.accepted()
        first.send(OK)
        second = await net.accepted()  # least-request had picked the other one
        await quiet()
        assert second.endpoint is not first.endpoint and first.ended is not None
        second.send(OK)
        assert one.read() == OK and two.read() == OK


# Connections being made


async def test_whichever_connection_is_there_first_serves_the_oldest(autojump_clock):
    async with network() as net:
        waits = [3.0, 1.0]
        net.on_dial = lambda endpoint: waits.pop(0)
        await callers(net, 2)
        quick = await net.accepted()
        await quiet()
        assert number(quick.read()) == 0
        slow = await net.accepted()
        await quiet()
        assert number(slow.read()) == 1
        for server in (quick, slow):
            server.send(OK)


async def test_a_connection_given_back_serves_who_waits_for_a_dial_and_the_dial_is_a_spare(autojump_clock):
    async with network() as net:
        waits = [0.0, 3.0]
        net.on_dial = lambda endpoint: waits.pop(0)
        app = net.caller()
        app.send(get(0))
        server = await net.accepted()
        await quiet()
        await callers(net, 1, 1)
        server.read()
        server.send(OK)
        await quiet()
        assert number(server.read()) == 1
        server.send(OK)
        spare = await net.accepted()
        await quiet()
        endpoint = spare.endpoint
        assert len(endpoint.idle) == 2 and spare.read() == b"" and net.cluster("shop").connections == 2


async def test_a_dial_that_nobody_waits_for_is_not_made(autojump_clock):
    async with network() as net:
        app = net.caller()
        app.send(GET)
        app.reset()
        await quiet()
        assert net.dials == 0 and net.cluster("shop").connections == 0


async def test_the_result_of_a_dial_whose_request_is_over_is_a_spare_or_nothing(autojump_clock):
    async with network(timeouts=Timeouts(total_s=1.0)) as net:
        fates: list[Any] = [2.0, 2.0]
        net.on_dial = lambda endpoint: fates.pop(0)
        (app,) = await callers(net, 1)
        await trio.sleep(1.1)
        assert b"timeout_total" in app.read()
        spare = await net.accepted()
        await quiet()
        (again,) = await callers(net, 1)
        assert net.dials == 1 and spare.read()
        spare.send(OK)
        assert again.read() == OK


async def test_a_failure_is_told_to_who_asked_or_to_whom_no_dial_is_left_for(autojump_clock):
    """Two wait; the first one's dial fails: the first is told. Then the second one's succeeds."""
    async with network() as net:

        async def refuse() -> Any:
            await trio.sleep(1.0)
            return DialError("refused")

        fates: list[Any] = [refuse(), 2.0]
        net.on_dial = lambda endpoint: fates.pop(0)
        one, two = await callers(net, 2)
        await trio.sleep(1.1)
        assert b"connect_failed" in one.read() and two.read() == b""
        server = await net.accepted()
        await quiet()
        assert number(server.read()) == 1
        server.send(OK)
        assert any("connect_failed: shop at 10.0.0.1:1: refused" in text for _, text in net.notes)


async def test_a_dial_that_takes_too_long(autojump_clock):
    async with network(timeouts=Timeouts(total_s=60.0, connect_s=2.0)) as net:
        net.on_dial = lambda endpoint: 5.0
        (app,) = await callers(net, 1)
        await trio.sleep(2.1)
        assert b"connect_failed" in app.read() and net.cluster("shop").connections == 0
        assert any("no connection within 2 s" in text for _, text in net.notes)


async def test_dials_to_one_endpoint_at_a_time_are_bounded(autojump_clock):
    async with network(timeouts=Timeouts(total_s=60.0, connect_s=10.0)) as net:
        under_way = most = 0

        async def slow() -> None:
            nonlocal under_way, most
            under_way += 1
            most = max(most, under_way)
            await trio.sleep(1.0)
            under_way -= 1

        net.on_dial = lambda endpoint: slow()
        apps = await callers(net, 3 * DIALS_MAX)
        servers: list[Peer] = []
        while not all(app.got for app in apps):
            servers.append(await net.accepted())
            await quiet()
            for server in servers:
                while server.read():
                    server.send(OK)
                    await quiet()
        assert most == DIALS_MAX and all(app.read() == OK for app in apps)
        assert net.dials < 3 * DIALS_MAX  # some were served before their turn to dial came
        await trio.sleep(5.0)


# Idle connections


async def test_idle_connections_are_used_last_in_first_out_and_age(autojump_clock):
    async with network(pool_idle_s=4.0) as net:
        net.world.nursery.start_soon(net.world.sweep)
        apps = await callers(net, 2)
        servers = [await net.accepted(), await net.accepted()]
        for server in servers:
            server.read()
            server.send(OK)
        await trio.sleep(3.0)
        apps[0].send(GET)
        assert servers[1].read() and not servers[0].got  # the one that rested last
        servers[1].send(OK)
        await trio.sleep(2.5)
        assert servers[0].ended is not None and servers[1].ended is None
        await trio.sleep(4.0)
        assert servers[1].ended is not None and net.cluster("shop").connections == 0


async def test_one_that_is_too_old_is_not_used_even_before_the_sweep(autojump_clock):
    async with network(pool_idle_s=4.0) as net:
        (app,) = await callers(net, 1)
        server = await net.accepted()
        server.send(OK)
        await trio.sleep(4.1)
        app.send(GET)
        again = await net.accepted()
        await quiet()
        assert server.ended is not None
        again.send(OK)


@pytest.mark.parametrize("how", ["send", "close", "reset"])
async def test_an_idle_connection_that_says_something_is_closed(autojump_clock, how):
    async with network() as net:
        (app,) = await callers(net, 1)
        server = await net.accepted()
        await quiet()
        server.send(OK)
        server.send(b"x") if how == "send" else getattr(server, how)()
        await quiet()
        assert net.cluster("shop").connections == 0 and app.read() == OK


async def test_what_an_application_has_sent_unasked_answers_no_request(autojump_clock):
    """Also where it is read only after the next request has come: both were ready at the same time."""
    async with network(tls=Tls.PLAIN) as net:
        (app,) = await callers(net, 1)
        server = await net.accepted()
        server.send(OK)
        assert app.read() == OK and server.channel is not None
        server.channel.inbox.append(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil")
        app.send(GET)
        again = await net.accepted()
        await quiet()
        assert server.ended is not None
        again.send(OK)
        await quiet()
        assert app.read() == OK


async def test_a_connection_lost_between_two_requests_is_made_again(autojump_clock):
    """Given back and promised to the next in the queue, it dies before it is handed over."""
    async with network(connections=1) as net:
        one, two = await callers(net, 2)
        server = await net.accepted()
        await quiet()

        def answer_and_die() -> None:
            assert server.channel is not None
            server.channel.arrive(OK)
            server.over = True
            server.channel.arrive("end")

        net.call(answer_and_die)
        again = await net.accepted()
        await quiet()
        assert number(again.read()) == 1 and one.read() == OK
        again.send(OK)
        assert two.read() == OK and net.cluster("shop").resends == 0


async def test_connections_under_way_to_an_endpoint_that_leaves_do_not_stay(autojump_clock):
    async with network() as net:
        net.on_dial = lambda endpoint: 2.0
        (app,) = await callers(net, 1)
        old = net.cluster("shop")
        net.apply(Snapshot({"web": Service("web", routes=(Route("default"),))}))
        server = await net.accepted()
        await quiet()
        server.send(OK)
        await quiet()
        assert app.read() == OK and server.ended is not None and old.connections == 0


async def test_a_root_that_is_not_trusted_any_more_ends_connections_within_five_seconds(autojump_clock):
    async with network() as net:
        apps = await callers(net, 3)
        servers = [await net.accepted() for _ in apps]
        await quiet()
        servers[0].send(OK)
        net.call(net.world.distrust)
        assert servers[0].ended is not None  # idle: now
        servers[1].send(OK)
        await quiet()
        assert apps[1].read() == OK and servers[1].ended is not None  # busy: with its answer
        await trio.sleep(4.9)
        assert servers[2].ended is not None and b"upstream_reset" in apps[2].read()


async def test_a_failing_policy_of_dialling_never_takes_the_sidecar_with_it(autojump_clock):
    """Whatever a dial raises, it is this request's failure."""
    async with network() as net:
        net.on_dial = lambda endpoint: ValueError("server_hostname cannot be an empty string")
        (app,) = await callers(net, 1)
        await quiet()
        assert b"connect_failed" in app.read() and net.cluster("shop").connections == 0
