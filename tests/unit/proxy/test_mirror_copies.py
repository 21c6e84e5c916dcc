"""Copies of requests, through the real data path on memory channels."""

from typing import Any

import pytest
import trio
import trio.testing
from support.http2_caller import Http2Caller
from support.memory_net import DialError, Net, Peer, memory_world

from sidecar.model.snapshot import (
    CircuitBreaker,
    Destination,
    EndpointSpec,
    Limits,
    Mirror,
    Mtls,
    Retry,
    Rewrite,
    Route,
    Service,
    Snapshot,
    Timeouts,
)
from sidecar.proxy import mirror as mirror_module

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
GET = b"GET / HTTP/1.1\r\nhost: shop\r\n\r\n"
TO_V2 = Mirror(version="v2")
HEAD = mirror_module.HEAD_BYTES + len("/")


def shop(mirror: Mirror | None = TO_V2, name: str = "shop", **options: Any) -> Service:
    route = {key: options.pop(key) for key in list(options) if key in Route.__dataclass_fields__ and key != "name"}
    route.setdefault("destinations", (Destination("v1"),))
    specs = tuple(EndpointSpec(f"10.0.{len(name)}.{n}", 15006, {"version": str(n)}) for n in (1, 2))
    return Service(
        name,
        endpoints=specs,
        versions={"v1": {"version": "1"}, "v2": {"version": "2"}},
        routes=(Route("default", mirror=mirror, **route),),
        **options,
    )


def policy(*services: Service) -> Snapshot:
    return Snapshot({s.name: s for s in (Service("web", routes=(Route("default"),)), *services)})


def network(*services: Service, **options: Any) -> Any:
    return memory_world(policy(*services), **options)


def upload(body: bytes, method: bytes = b"POST", length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return b"%b / HTTP/1.1\r\nhost: shop\r\ncontent-length: %d\r\n\r\n%b" % (method, size, body)


def lines(head: bytes) -> dict[bytes, bytes]:
    fields = head.partition(b"\r\n\r\n")[0].split(b"\r\n")[1:]
    return dict(line.split(b": ", 1) for line in fields)


def copies(net: Net, result: str, service: str = "shop", side: str = "out") -> int:
    return net.world.service_meters(side, service).mirrored.get(result)


async def both(net: Net) -> tuple[Peer, Peer]:
    """The servers of the original and of the copy."""
    original, copy = await net.accepted(), await net.accepted()
    await trio.testing.wait_all_tasks_blocked()
    if original.endpoint.host.endswith(".2"):
        original, copy = copy, original
    return original, copy


async def test_a_copy_is_marked_and_its_answer_thrown_away(autojump_clock):
    async with network(shop()) as net:
        app = net.caller()
        app.send(b"GET /x?y HTTP/1.1\r\nhost: shop\r\naccept: a\r\n\r\n")
        original, copy = await both(net)
        sent, copied = original.read(), copy.read()
        assert copied.startswith(b"GET /x?y HTTP/1.1\r\nhost: shop\r\naccept: a\r\n")
        trace = lines(sent)[b"traceparent"][3:35]
        assert lines(copied)[b"x-pillion-mirror"] == trace
        assert lines(copied)[b"traceparent"][3:35] != trace
        assert lines(copied)[b"x-pillion-attempt"] == b"0"
        assert b"x-pillion-mirror" not in lines(sent)
        copy.send(b"HTTP/1.1 500 No\r\ncontent-length: 3\r\n\r\nbad")
        assert not app.read() and copies(net, "5xx") == 1
        original.send(OK)
        assert app.read() == OK
        assert net.log == [(200, "ok")]
        assert not net.world.copies.servings


async def test_the_original_is_answered_first_and_the_copy_goes_on(autojump_clock):
    async with network(shop()) as net:
        app = net.caller()
        app.send(GET)
        original, copy = await both(net)
        original.send(OK)
        assert app.read() == OK
        app.close()
        copy.send(OK)
        await trio.testing.wait_all_tasks_blocked()
        assert copies(net, "2xx") == 1 and not copy.ended


async def test_nothing_of_a_copy_is_told_to_the_originals_breaker_budget_or_limits(autojump_clock):
    service = shop(
        circuit_breaker=CircuitBreaker(consecutive_failures=1),
        limits=Limits(connections=1, pending=0, requests=1),
        retry=Retry(max_retries=3, statuses=frozenset({503})),
    )
    async with network(service) as net:
        app = net.caller()
        app.send(GET)
        original, copy = await both(net)
        assert net.cluster("shop").active == 1 and net.cluster("shop", side="mirror").active == 1
        copy.send(b"HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n")
        original.send(OK)
        assert app.read() == OK
        out, shadow = net.cluster("shop"), net.cluster("shop", side="mirror")
        assert (out.attempts, out.retries, shadow.attempts, shadow.retries) == (1, 0, 1, 0)
        assert not any(e.failures or e.breaker.tripped for e in out.endpoints.values())
        assert any(e.breaker.tripped for e in shadow.endpoints.values())
        app.send(GET)  # the breaker of copies is open: the original does not know
        await trio.testing.wait_all_tasks_blocked()
        original.send(OK)
        assert app.read() == OK and copies(net, "circuit_open") == 1


async def test_a_mirror_that_cannot_be_reached_costs_nothing(autojump_clock):
    async with network(shop()) as net:

        async def dial(endpoint: Any, alpn: str) -> Any:
            if endpoint.host.endswith(".2"):
                raise DialError("refused")
            return await usual(endpoint, alpn)

        usual, net.dial = net.dial, dial
        app = net.caller()
        app.send(GET)
        original = await net.accepted()
        original.send(OK)
        await trio.testing.wait_all_tasks_blocked()
        assert app.read() == OK and copies(net, "connect_failed") == 1


@pytest.mark.parametrize("method", [b"POST", b"PUT", b"DELETE", b"PATCH"])
@pytest.mark.parametrize("writes", [False, True])
async def test_writes_are_copied_only_where_asked(autojump_clock, method, writes):
    async with network(shop(Mirror(version="v2", writes=writes))) as net:
        net.caller().send(upload(b"x", method))
        servers = [await net.accepted()]
        await trio.testing.wait_all_tasks_blocked()
        if writes:
            servers.append(await net.accepted())
            await trio.testing.wait_all_tasks_blocked()
        assert not net.pending()
        for server in servers:
            assert server.read().endswith(b"\r\n\r\nx")
            server.send(OK)


async def test_a_copy_waits_for_the_whole_body(autojump_clock):
    async with network(shop(Mirror(version="v2", writes=True))) as net:
        app = net.caller()
        app.send(upload(b"abc", length=6))
        original = await net.accepted()
        await trio.testing.wait_all_tasks_blocked()
        assert not net.pending() and net.world.copies.held_bytes == HEAD + 3
        app.send(b"def")
        copy = await net.accepted()
        await trio.testing.wait_all_tasks_blocked()
        assert copy.read().endswith(b"\r\n\r\nabcdef")
        copy.send(OK)
        original.send(OK)
        await trio.testing.wait_all_tasks_blocked()
        assert app.read() == OK and net.world.copies.held_bytes == 0 and copies(net, "2xx") == 1


async def test_an_answer_that_comes_before_the_end_of_a_whole_body(autojump_clock):
    """Over HTTP/2 the end may come in a frame of its own, when all the content that was announced is there."""
    async with network(shop(Mirror(version="v2", writes=True))) as net:
        caller = Http2Caller(net)
        asked = caller.ask("/", method="POST", extra=[(b"content-length", b"3")], body=b"abc", end=False)
        original, copy = await both(net)
        original.send(OK)
        await trio.testing.wait_all_tasks_blocked()
        asked.send(end=True)
        assert copy.read().endswith(b"\r\n\r\nabc")
        copy.send(OK)
        await trio.testing.wait_all_tasks_blocked()
        assert caller.settle() and asked.status == 200 and copies(net, "2xx") == 1 and not copies(net, "unfinished")


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_over_64_kib_drops_the_copy_not_the_original(autojump_clock, chunked):
    body = b"x" * (64 * 1024 + 1)
    async with network(shop(Mirror(version="v2", writes=True))) as net:
        app = net.caller()
        if chunked:
            head = b"POST / HTTP/1.1\r\nhost: shop\r\ntransfer-encoding: chunked\r\n\r\n"
            app.send(head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
        else:
            app.send(upload(body))
        original = await net.accepted()
        await trio.testing.wait_all_tasks_blocked()
        assert body in original.read().replace(b"\r\n", b"") and not net.pending()
        original.send(OK)
        await trio.testing.wait_all_tasks_blocked()
        assert app.read() == OK and copies(net, "too_large") == 1 and net.world.copies.held_bytes == 0


async def test_all_copies_together_hold_a_bounded_number_of_bytes(autojump_clock, monkeypatch):
    monkeypatch.setattr(mirror_module, "HELD_BYTES_MAX", 2 * HEAD + 4)
    async with network(shop(Mirror(version="v2", writes=True))) as net:
        for _ in range(2):
            net.caller().send(upload(b"abc", length=6))
        servers = [await net.accepted() for _ in range(2)]
        await trio.testing.wait_all_tasks_blocked()
        assert net.world.copies.held_bytes == HEAD + 3 and copies(net, "no_room") == 1
        for server in servers:
            server.send(OK)  # an early answer: the rest of the body will not come
        await trio.testing.wait_all_tasks_blocked()
        assert net.world.copies.held_bytes == 0 and copies(net, "unfinished") == 1


async def test_a_caller_that_leaves_in_the_middle_of_its_body_leaves_no_copy(autojump_clock):
    async with network(shop(Mirror(version="v2", writes=True))) as net:
        app = net.caller()
        app.send(upload(b"abc", length=6))
        await net.accepted()
        app.reset()
        await trio.testing.wait_all_tasks_blocked()
        assert copies(net, "unfinished") == 1 and not net.pending() and net.world.copies.held_bytes == 0


async def test_a_copy_that_hangs_ends_by_its_deadline_and_is_not_retried(autojump_clock):
    async with network(shop(timeouts=Timeouts(total_s=3.0), retry=Retry(max_retries=2))) as net:
        app = net.caller()
        app.send(GET)
        original, copy = await both(net)
        original.send(OK)
        await trio.sleep(3.1)
        assert copies(net, "timeout_total") == 1 and copy.ended and net.cluster("shop", side="mirror").attempts == 1
        assert app.read() == OK


async def test_a_share_of_the_requests(autojump_clock):
    async with network(shop(Mirror(version="v2", percent=25.0))) as net:
        app = net.caller()
        app.send(GET)
        original, copy = await net.accepted(), None
        for _ in range(79):
            await trio.testing.wait_all_tasks_blocked()
            if net.pending():
                copy = await net.accepted()
                await trio.testing.wait_all_tasks_blocked()
            if copy is not None and copy.read():
                copy.send(OK)
            original.send(OK)
            app.send(GET)
        original.send(OK)
        await trio.testing.wait_all_tasks_blocked()
        assert net.cluster("shop").attempts == 80
        assert 12 <= net.cluster("shop", side="mirror").attempts <= 28


async def test_to_another_service_by_its_own_name(autojump_clock):
    spare = shop(None, name="spare", destinations=(Destination(None),))
    mirror = Mirror(service="spare")
    async with network(shop(mirror, rewrite=Rewrite("/new", "other.example")), spare) as net:
        app = net.caller()
        app.send(GET)
        servers = [await net.accepted() for _ in range(2)]
        await trio.testing.wait_all_tasks_blocked()
        by_name = {server.endpoint.identity: server for server in servers}
        copy = by_name["spiffe://mesh.local/service/spare"].read()
        assert copy.startswith(b"GET /new HTTP/1.1\r\nhost: spare\r\n")
        assert (
            by_name["spiffe://mesh.local/service/shop"]
            .read()
            .startswith(b"GET /new HTTP/1.1\r\nhost: other.example\r\n")
        )
        for server in servers:
            server.send(OK)
        await trio.testing.wait_all_tasks_blocked()
        assert copies(net, "2xx", "spare") == 1 and app.read() == OK


async def test_what_works_for_a_copy_is_not_copied_again(autojump_clock):
    async with network(shop()) as net:
        net.caller().send(b"GET / HTTP/1.1\r\nhost: shop\r\nx-pillion-mirror: 1\r\n\r\n")
        server = await net.accepted()
        await trio.testing.wait_all_tasks_blocked()
        assert not net.pending() and lines(server.read())[b"x-pillion-mirror"] == b"1"  # told on
        server.send(OK)


async def test_an_upgrade_is_not_copied(autojump_clock):
    async with network(shop(upgrade=frozenset({"websocket"}))) as net:
        net.caller().send(
            b"GET / HTTP/1.1\r\nhost: shop\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
            b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n"
        )
        server = await net.accepted()
        await trio.testing.wait_all_tasks_blocked()
        assert not net.pending()
        server.send(OK)


async def test_the_callee_counts_copies_apart(autojump_clock):
    async with network(own="web") as net:
        net.mesh_caller("api").send(b"GET / HTTP/1.1\r\nhost: web\r\nx-pillion-mirror: 1\r\n\r\n")
        server = await net.accepted()
        await trio.testing.wait_all_tasks_blocked()
        assert lines(server.read())[b"x-pillion-mirror"] == b"1"  # so that the application can tell
        server.send(OK)
        await trio.testing.wait_all_tasks_blocked()
        assert copies(net, "2xx", "web", "in") == 1


async def test_no_more_than_so_many_copies_are_on_their_way(autojump_clock, monkeypatch):
    monkeypatch.setattr(mirror_module, "UNDER_WAY_MAX", 1)
    async with network(shop(timeouts=Timeouts(total_s=3.0))) as net:
        app = net.caller()
        app.send(GET)
        original, copy = await both(net)
        for _ in range(3):
            original.send(OK)
            app.send(GET)
        original.send(OK)
        assert app.read() == OK * 4 and copies(net, "no_room") == 3
        copy.send(OK)
        app.send(GET)
        original.send(OK)
        assert app.read() == OK and len(net.world.copies.servings) == 1  # there is room again
        copy.send(OK)


async def test_copies_that_began_together_are_counted_when_they_are_sent(autojump_clock, monkeypatch):
    monkeypatch.setattr(mirror_module, "UNDER_WAY_MAX", 1)
    async with network(shop(Mirror(version="v2", writes=True))) as net:
        apps = [net.caller() for _ in range(3)]
        for app in apps:
            app.send(upload(b"abc", length=6))
        servers = [await net.accepted() for _ in apps]
        for app in apps:
            app.send(b"def")
        servers.append(await net.accepted())
        await trio.testing.wait_all_tasks_blocked()
        assert not net.pending() and copies(net, "no_room") == 2
        for server in servers:
            server.send(OK)
        await trio.testing.wait_all_tasks_blocked()
        assert [app.read() for app in apps] == [OK] * 3 and net.world.copies.held_bytes == 0


async def test_none_begins_while_memory_is_short(autojump_clock):
    async with network(shop()) as net:
        net.world.reactor.held_bytes += mirror_module.WAITING_BYTES_MAX
        app = net.caller()
        app.send(GET)
        original = await net.accepted()
        await trio.testing.wait_all_tasks_blocked()
        net.world.reactor.held_bytes -= mirror_module.WAITING_BYTES_MAX
        original.send(OK)
        assert app.read() == OK and copies(net, "no_room") == 1 and net.world.copies.held_bytes == 0


async def test_a_large_answer_is_left_and_counted_by_its_status(autojump_clock):
    async with network(shop()) as net:
        app = net.caller()
        app.send(GET)
        original, copy = await both(net)
        copy.send(b"HTTP/1.1 404 No\r\ncontent-length: 10000000\r\n\r\n")
        for _ in range(mirror_module.ANSWER_BYTES_MAX // 65536):
            copy.send(b"x" * 65536)
        await trio.testing.wait_all_tasks_blocked()
        assert not copy.ended and not copies(net, "4xx")
        copy.send(b"x")
        await trio.testing.wait_all_tasks_blocked()
        assert copy.ended and copies(net, "4xx") == 1 and not net.world.copies.servings
        original.send(OK)
        assert app.read() == OK and net.cluster("shop", side="mirror").active == 0


async def test_an_event_stream_is_left_at_once(autojump_clock):
    async with network(shop()) as net:
        app = net.caller()
        app.send(GET)
        original, copy = await both(net)
        stream = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        for server in (original, copy):
            server.send(stream + b"3\r\na\n\n\r\n")
        await trio.testing.wait_all_tasks_blocked()
        assert copy.ended and copies(net, "2xx") == 1
        assert not original.ended and app.read().endswith(b"a\n\n\r\n")
        original.send(b"0\r\n\r\n")


@pytest.mark.parametrize(
    ("answer", "result"),
    [
        (b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n", "bad_response"),
        (b"nonsense\r\n\r\n", "bad_response"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\n\r\n" + OK, "2xx"),
    ],
)
async def test_odd_answers_end_the_copy_alone(autojump_clock, answer, result):
    async with network(shop()) as net:
        app = net.caller()
        app.send(GET)
        original, copy = await both(net)
        copy.send(answer)
        await trio.testing.wait_all_tasks_blocked()
        assert copies(net, result) == 1 and not app.read()
        original.send(OK)
        assert app.read() == OK


async def test_the_state_of_another_trace_does_not_go_along(autojump_clock):
    trace = b"traceparent: 00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01\r\ntracestate: x=y\r\n"
    async with network(shop()) as net:
        app = net.caller()
        app.send(GET[:-2] + trace + b"\r\n")
        original, copy = await both(net)
        assert b"tracestate" in lines(original.read()) and b"tracestate" not in (copied := lines(copy.read()))
        assert copied[b"x-pillion-mirror"] == b"a" * 32
        original.send(OK)
        copy.send(OK)


async def test_a_retry_is_not_copied(autojump_clock):
    async with network(shop(retry=Retry(max_retries=2, statuses=frozenset({503}), base_s=0.001, max_s=0.001))) as net:
        app = net.caller()
        app.send(GET)
        original, copy = await both(net)
        copy.send(OK)
        copy.read()
        for _ in range(2):
            original.send(b"HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n")
            await trio.sleep(0.1)
        original.send(OK)
        assert app.read() == OK and not copy.read()
        out, shadow = net.cluster("shop"), net.cluster("shop", side="mirror")
        assert (out.attempts, shadow.attempts) == (3, 1)


async def test_what_an_application_sends_for_a_copy_is_marked_and_not_copied(autojump_clock):
    """Though it passes on no more than the trace: or two services that mirror to each other would never rest."""
    trace = b"traceparent: 00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01\r\n"
    async with network(shop()) as net:
        net.mesh_caller("api").send(b"GET / HTTP/1.1\r\nhost: web\r\nx-pillion-mirror: 77\r\n" + trace + b"\r\n")
        own = await net.accepted()
        await trio.testing.wait_all_tasks_blocked()
        assert own.read()
        app = net.caller()
        app.send(GET[:-2] + trace + b"\r\n")
        server = await net.accepted()
        await trio.testing.wait_all_tasks_blocked()
        assert not net.pending() and lines(server.read())[b"x-pillion-mirror"] == b"77"
        server.send(OK)
        own.send(OK)
        await trio.testing.wait_all_tasks_blocked()
        assert not net.world.copies.traces
        app.send(GET[:-2] + trace + b"\r\n")  # the copy has ended
        another = await net.accepted()
        await trio.testing.wait_all_tasks_blocked()
        for each in (server, another):
            sent = each.read()
            assert (b"x-pillion-mirror" in lines(sent)) == each.endpoint.host.endswith(".2")
            each.send(OK)


async def test_a_new_policy_lets_copies_end(autojump_clock):
    async with network(shop()) as net:
        app = net.caller()
        app.send(GET)
        original, copy = await both(net)
        net.apply(policy(shop(None)))
        original.send(OK)
        assert app.read() == OK
        copy.send(OK)
        await trio.testing.wait_all_tasks_blocked()
        assert copies(net, "2xx") == 1 and copy.ended and not net.world.copies.servings
        app.send(GET)
        original.send(OK)
        await trio.testing.wait_all_tasks_blocked()
        assert app.read() == OK and not net.pending() and net.world.copies.held_bytes == 0


async def test_the_mark_of_who_is_not_of_the_mesh_is_not_believed(autojump_clock):
    web = Service("web", routes=(Route("default"),), mtls=Mtls.PERMISSIVE)
    async with memory_world(Snapshot({"web": web})) as net:
        net.mesh_caller("").send(b"GET / HTTP/1.1\r\nhost: web\r\nx-pillion-mirror: 1\r\n\r\n")
        server = await net.accepted()
        await trio.testing.wait_all_tasks_blocked()
        assert b"x-pillion-mirror" not in lines(server.read()) and not net.world.copies.traces
        server.send(OK)
        await trio.testing.wait_all_tasks_blocked()
        assert copies(net, "2xx", "web", "in") == 0


async def test_no_mirror_costs_no_cluster(autojump_clock):
    async with network(shop(None)) as net:
        assert {side for side, _, _ in net.world.state.clusters} == {"in", "out"}
