"""Requests through the real data path on memory channels: bytes in, bytes out, in virtual time."""

from typing import Any

import pytest
import trio
import trio.testing
from support.memory_net import DialError, Net, Peer, memory_world

from sidecar.model.snapshot import (
    Budget,
    CircuitBreaker,
    Destination,
    EndpointSpec,
    Fallback,
    Match,
    Port,
    Redirect,
    Respond,
    Retry,
    Rewrite,
    Route,
    Service,
    Snapshot,
    Sticky,
    Timeouts,
    Tls,
)

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
DOWN = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 4\r\n\r\ndown"
GET = b"GET / HTTP/1.1\r\nhost: shop\r\n\r\n"
FAST = Retry(max_retries=1, base_s=0.0, max_s=0.0)


def shop(*, endpoints: int = 1, tls: Tls = Tls.MESH, name: str = "shop", **options: Any) -> Service:
    route = {key: options.pop(key) for key in list(options) if key in Route.__dataclass_fields__ and key != "name"}
    specs = tuple(
        EndpointSpec(f"10.0.{len(name)}.{n + 1}", 15006, {"version": str(n + 1)}, tls=tls) for n in range(endpoints)
    )
    options.setdefault("routes", (Route("default", **route),))
    options.setdefault("versions", {"v1": {"version": "1"}, "v2": {"version": "2"}})
    return Service(name, endpoints=specs, **options)


def policy(*services: Service, **own: Any) -> Snapshot:
    own.setdefault("routes", (Route("default"),))
    return Snapshot({s.name: s for s in (Service("web", **own), *services)})


def network(*services: Service, own: dict[str, Any] | None = None, **options: Any) -> Any:
    return memory_world(policy(*services, **(own or {})), **options)


def upload(body: bytes, method: bytes = b"PUT", length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return b"%b / HTTP/1.1\r\nhost: shop\r\ncontent-length: %d\r\n\r\n%b" % (method, size, body)


def status(answer: bytes) -> int:
    return int(answer.split(b" ")[1])


def reason(answer: bytes) -> bytes | None:
    for line in answer.partition(b"\r\n\r\n")[0].split(b"\r\n"):
        if line.startswith(b"x-pillion-reason: "):
            return line.removeprefix(b"x-pillion-reason: ")
    return None


def lines(head: bytes) -> dict[bytes, bytes]:
    fields = head.partition(b"\r\n\r\n")[0].split(b"\r\n")[1:]
    return dict(line.split(b": ", 1) for line in fields)


async def quiet() -> None:
    await trio.testing.wait_all_tasks_blocked()


async def asked(net: Net, app: Peer, request: bytes = GET) -> Peer:
    """Send a request, wait for the connection that carries it."""
    app.send(request)
    server = await net.accepted()
    await quiet()
    return server


# One exchange


async def test_there_and_back(autojump_clock):
    async with network(shop()) as net:
        app = net.caller()
        server = await asked(net, app, b"GET /x?y HTTP/1.1\r\nhost: shop\r\naccept: a\r\nx-pillion-attempt: 7\r\n\r\n")
        head = server.read()
        assert head.startswith(b"GET /x?y HTTP/1.1\r\nhost: shop\r\naccept: a\r\n")
        told = lines(head)
        assert told[b"x-pillion-attempt"] == b"0" and told[b"x-request-deadline-ms"] == b"15000"
        assert b"traceparent" in told
        server.send(OK)
        assert app.read() == OK
        assert net.log == [(200, "ok")]


async def test_a_plain_endpoint_is_told_nothing_of_the_mesh(autojump_clock):
    async with network(shop(tls=Tls.PLAIN)) as net:
        server = await asked(net, net.caller())
        assert not [name for name in lines(server.read()) if name.startswith(b"x-")]
        server.send(OK.replace(b"content", b"x-pillion-reason: denied\r\ncontent"))
        await quiet()
        assert net.log == [(200, "ok")]  # not believed


async def test_connections_are_reused_last_in_first_out(autojump_clock):
    async with network(shop()) as net:
        app = net.caller()
        server = await asked(net, app)
        for _ in range(3):
            server.send(OK)
            app.send(GET)
        assert server.read().count(b"GET") == 4 and net.dials == 1
        server.send(OK)


async def test_a_chunked_body_with_trailers_both_ways(autojump_clock):
    body = b"3\r\nabc\r\n0\r\nx-sum: 1\r\n\r\n"
    async with network(shop()) as net:
        app = net.caller()
        server = await asked(net, app, b"POST / HTTP/1.1\r\nhost: shop\r\ntransfer-encoding: chunked\r\n\r\n" + body)
        assert server.read().endswith(b"\r\n\r\n" + body)
        server.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + body)
        assert app.read().endswith(b"\r\n\r\n" + body)


async def test_head_204_304(autojump_clock):
    async with network(shop()) as net:
        app = net.caller()
        server = await asked(net, app, GET.replace(b"GET", b"HEAD"))
        server.send(b"HTTP/1.1 200 OK\r\ncontent-length: 999\r\n\r\n")
        assert app.read() == b"HTTP/1.1 200 OK\r\ncontent-length: 999\r\n\r\n"
        for code in (204, 304):
            app.send(GET)
            server.send(b"HTTP/1.1 %d X\r\netag: a\r\n\r\n" % code)
            assert app.read().count(b"\r\n") == 3
        assert net.dials == 1


async def test_a_body_that_ends_with_the_connection(autojump_clock):
    async with network(shop()) as net:
        app = net.caller()
        server = await asked(net, app)
        server.send(b"HTTP/1.1 200 OK\r\n\r\nabc")
        server.close()
        await quiet()
        assert app.read().endswith(b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
        assert net.log == [(200, "ok")] and app.ended is None


async def test_pipelined_requests_are_answered_in_order(autojump_clock):
    async with network(shop()) as net:
        app = net.caller()
        count = 300  # recursion would show
        server = await asked(net, app, b"".join(GET.replace(b"/ ", b"/%d " % n) for n in range(count)))
        for n in range(count):
            await quiet()
            assert server.read().startswith(b"GET /%d " % n)
            server.send(OK.replace(b"ok", b"%02d" % (n % 100)))
        assert app.read().count(b"HTTP/1.1 200") == count
        assert net.dials == 1


async def test_pipelined_own_answers_do_not_recurse(autojump_clock):
    async with network(shop(respond=Respond(418, "tea"))) as net:
        app = net.caller()
        app.send(GET * 1500)
        await quiet()
        assert app.read().count(b"HTTP/1.1 418") == 1500


async def test_informational_responses(autojump_clock):
    async with network(shop()) as net:
        app = net.caller()
        expecting = b"PUT / HTTP/1.1\r\nhost: shop\r\nexpect: 100-continue\r\ncontent-length: 3\r\n\r\n"
        server = await asked(net, app, expecting)
        assert lines(server.read())[b"expect"] == b"100-continue"
        server.send(b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n")
        server.send(b"HTTP/1.1 100 Continue\r\n\r\n" * 2)
        assert app.read() == b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n"
        app.send(b"abc")
        assert server.read() == b"abc"
        server.send(OK)
        assert app.read() == OK
        app.send(GET)
        server.send(b"HTTP/1.1 100 Continue\r\n\r\n" + OK)  # nobody asked
        assert app.read() == OK


async def test_an_early_response_is_passed_on_and_ends_both_connections(autojump_clock):
    async with network(shop()) as net:
        app = net.caller()
        server = await asked(net, app, upload(b"part", length=100))
        server.send(b"HTTP/1.1 413 Too Large\r\ncontent-length: 0\r\n\r\n")
        await quiet()
        answer = app.read()
        assert status(answer) == 413 and lines(answer)[b"connection"] == b"close"
        assert server.ended is not None and app.ended == "close"
        assert net.log == [(413, "ok")]


# Retries


async def test_a_retry_sends_the_whole_body_again(autojump_clock):
    retry = Retry(max_retries=1, statuses=frozenset({503}))
    async with network(shop(endpoints=2, retry=retry)) as net:
        app = net.caller()
        first = await asked(net, app, upload(b"a" * 10, length=20))
        app.send(b"b" * 10)
        one = first.read()
        first.send(DOWN)
        second = await net.accepted()
        await quiet()
        two = second.read()
        assert one.endswith(b"\r\n\r\n" + b"a" * 10 + b"b" * 10)
        assert two == one.replace(b"attempt: 0", b"attempt: 1") or lines(two)[b"x-pillion-attempt"] == b"1"
        assert two.endswith(b"\r\n\r\n" + b"a" * 10 + b"b" * 10)
        assert first.endpoint is not second.endpoint
        second.send(OK)
        assert app.read() == OK
        assert net.cluster("shop").retries == 1 and net.records[0][11] == 2


async def test_a_retry_while_the_body_is_still_coming(autojump_clock):
    async with network(shop(endpoints=2, retry=Retry(base_s=4.0, max_s=4.0))) as net:
        app = net.caller()
        first = await asked(net, app, upload(b"a" * 10, length=30))
        first.reset()
        app.send(b"b" * 10)  # during the back-off
        second = await net.accepted()
        await quiet()
        app.send(b"c" * 10)
        assert second.read().endswith(b"\r\n\r\n" + b"a" * 10 + b"b" * 10 + b"c" * 10)
        second.send(OK)
        assert app.read() == OK


async def test_64_kib_can_be_sent_again_and_a_byte_more_cannot(autojump_clock):
    async with network(shop(endpoints=2, retry=FAST)) as net:
        for size, again in ((65536, True), (65537, False)):
            app = net.caller()
            server = await asked(net, app, upload(b"x" * size))
            server.reset()
            await quiet()
            if again:
                server = await net.accepted()
                await quiet()
                assert server.read().endswith(b"\r\n\r\n" + b"x" * size)
                server.send(OK)
                assert app.read() == OK
                server.close()
            else:
                assert reason(app.read()) == b"upstream_reset"
        assert net.world.replay.refused == 0


async def test_a_large_upload_that_met_a_connect_error_before_a_byte_left(autojump_clock):
    async with network(shop(endpoints=2, retry=FAST)) as net:
        failures: list[Any] = [DialError("refused")]
        net.on_dial = lambda endpoint: failures.pop() if failures else None
        app = net.caller()
        whole = b"x" * 1_000_000
        app.send(upload(b"", b"POST", len(whole)))
        for n in range(0, len(whole), 50_000):
            app.send(whole[n : n + 50_000])
        server = await net.accepted()
        await quiet()
        assert server.read().endswith(b"\r\n\r\n" + whole)
        server.send(OK)
        assert app.read() == OK and net.cluster("shop").retries == 1


async def test_what_waits_for_a_connection_is_bounded(autojump_clock):
    async with network(shop()) as net:
        net.on_dial = lambda endpoint: 1.0
        app = net.caller()
        app.send(upload(b"", length=200_000))
        app.send(b"x" * 65536)
        (down,) = net.world.downstreams
        assert not down.ch.reading
        server = await net.accepted()
        await quiet()
        assert down.ch.reading
        app.send(b"x" * (200_000 - 65536))
        server.send(OK)
        assert app.read() == OK


async def test_all_replay_buffers_share_8_mib(autojump_clock):
    async with network(shop(endpoints=2, retry=FAST)) as net:
        apps, servers = [], []
        for _ in range(129):
            apps.append(net.caller())
            servers.append(await asked(net, apps[-1], upload(b"x" * 65536)))
        assert net.world.replay.bytes_held == 128 * 65536 and net.world.replay.refused == 1
        servers[-1].reset()
        await quiet()
        assert reason(apps[-1].read()) == b"upstream_reset"
        for app, server in zip(apps[:-1], servers[:-1], strict=True):
            server.send(OK)
            assert app.read() == OK
        assert net.world.replay.bytes_held == 0


async def test_retry_after_is_obeyed(autojump_clock):
    retry = Retry(max_retries=1, statuses=frozenset({503}))
    async with network(shop(endpoints=2, retry=retry)) as net:
        app = net.caller()
        server = await asked(net, app)
        before = trio.current_time()
        server.send(DOWN.replace(b"content", b"retry-after: 3\r\ncontent"))
        server = await net.accepted()
        assert 3.0 <= trio.current_time() - before <= 4.5
        await quiet()
        server.send(DOWN.replace(b"content", b"retry-after: 3\r\ncontent"))
        assert status(app.read()) == 503
        app.send(GET)
        server.send(DOWN.replace(b"content", b"retry-after: 30\r\ncontent"))  # more than is waited for
        answer = app.read()
        assert status(answer) == 503 and b"retry-after: 30\r\n" in answer


async def test_the_response_of_a_retried_attempt_keeps_its_connection(autojump_clock):
    retry = Retry(max_retries=1, statuses=frozenset({503}), base_s=0.0, max_s=0.0)
    async with network(shop(retry=retry)) as net:
        app = net.caller()
        server = await asked(net, app)
        server.send(DOWN)
        await quiet()
        assert server.read().count(b"GET") == 2 and net.dials == 1
        server.send(OK)
        assert app.read() == OK


async def test_a_half_read_response_that_is_retried_costs_its_connection(autojump_clock):
    retry = Retry(max_retries=1, statuses=frozenset({503}), base_s=0.0, max_s=0.0)
    async with network(shop(retry=retry)) as net:
        app = net.caller()
        first = await asked(net, app)
        first.send(DOWN[:-2])
        second = await net.accepted()
        await quiet()
        assert first.ended is not None
        first.send(b"wn")  # stale: nobody hears it
        second.send(OK)
        assert app.read() == OK


async def test_a_reused_connection_that_died_is_replaced_once_free_of_charge(autojump_clock):
    async with network(shop(retry=Retry(max_retries=0))) as net:
        app = net.caller()
        first = await asked(net, app)
        first.send(OK)
        app.read()
        app.send(GET)
        first.close()
        second = await net.accepted()
        await quiet()
        assert second.read().startswith(GET[:10])
        second.send(OK)
        assert app.read() == OK
        assert (net.cluster("shop").resends, net.cluster("shop").retries) == (1, 0)


async def test_a_post_on_a_dead_reused_connection_gets_upstream_reset(autojump_clock):
    async with network(shop()) as net:
        app = net.caller()
        first = await asked(net, app)
        first.send(OK)
        app.read()
        app.send(upload(b"x", b"POST"))
        assert first.read()
        first.close()
        await quiet()
        assert reason(app.read()) == b"upstream_reset" and net.dials == 1


async def test_a_post_looks_before_it_leaps(autojump_clock):
    async with network(shop()) as net:
        app = net.caller()
        first = await asked(net, app)
        first.send(OK)
        app.read()
        first.channel.inbox.append("end")  # arrived, but the reactor has not looked yet
        second = await asked(net, app, upload(b"x", b"POST"))
        assert second.read().endswith(b"x")
        second.send(OK)
        assert app.read() == OK


async def test_a_response_that_was_cut_is_never_completed(autojump_clock):
    async with network(shop()) as net:
        for framing in (b"content-length: 10\r\n\r\nabc", b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n"):
            app = net.caller()
            server = await asked(net, app)
            server.send(b"HTTP/1.1 200 OK\r\n" + framing)
            assert app.read().endswith(framing)
            server.close()
            await quiet()
            assert app.ended == "reset" and app.read() == b""
        assert net.log == [(0, "cut_short")] * 2


async def test_a_malformed_response_is_retried_if_safe_then_answered(autojump_clock):
    async with network(shop(endpoints=2, retry=FAST)) as net:
        app = net.caller()
        for _ in range(2):
            server = await asked(net, app) if not net.dials else await net.accepted()
            await quiet()
            server.send(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n")
        await quiet()
        answer = app.read()
        assert status(answer) == 502 and reason(answer) == b"bad_response"


async def test_what_follows_a_whole_response_unasked_costs_the_connection_only(autojump_clock):
    async with network(shop()) as net:
        app = net.caller()
        server = await asked(net, app)
        server.send(OK + b"HTTP/1.1 200 OK\r\n\r\n")
        await quiet()
        assert app.read() == OK and server.ended is not None
        server = await asked(net, app)
        server.send(OK)
        server.send(b"x")
        await quiet()
        assert app.read() == OK and server.ended is not None


async def test_the_budget_is_one_for_a_service_and_its_exhaustion_is_counted(autojump_clock):
    retry = Retry(max_retries=3, statuses=frozenset({503}), base_s=0.0, max_s=0.0, budget=Budget(0.0, 0.1))
    async with network(shop(retry=retry)) as net:
        app = net.caller()
        server = await asked(net, app)
        server.send(DOWN)
        await quiet()
        server.send(DOWN)
        await quiet()
        assert status(app.read()) == 503
        assert (net.cluster("shop").retries, net.cluster("shop").budget_exhausted) == (1, 1)


# Deadlines


async def test_the_total_covers_everything(autojump_clock):
    async with network(shop(timeouts=Timeouts(total_s=2.0))) as net:
        app = net.caller()
        server = await asked(net, app)
        await trio.sleep(1.99)
        assert app.read() == b""
        await trio.sleep(0.02)
        assert reason(app.read()) == b"timeout_total"
        assert server.ended is not None


async def test_told_deadlines_shrink_with_time(autojump_clock):
    retry = Retry(max_retries=1, failures=frozenset({"timeout"}), base_s=0.0, max_s=0.0)
    async with network(shop(endpoints=2, retry=retry, timeouts=Timeouts(total_s=4.0, try_s=1.0))) as net:
        app = net.caller()
        first = await asked(net, app, GET.replace(b"\r\n\r\n", b"\r\nx-request-deadline-ms: 2500\r\n\r\n"))
        assert lines(first.read())[b"x-request-deadline-ms"] == b"2500"
        second = await net.accepted()
        await quiet()
        assert lines(second.read())[b"x-request-deadline-ms"] == b"1500"
        second.send(OK)
        assert app.read() == OK


async def test_nothing_left_makes_no_upstream_call(autojump_clock):
    async with network(shop()) as net:
        app = net.caller()
        app.send(GET.replace(b"\r\n\r\n", b"\r\nx-request-deadline-ms: 0\r\n\r\n"))
        await quiet()
        answer = app.read()
        assert status(answer) == 504 and reason(answer) == b"timeout_total" and net.dials == 0


async def test_a_deadline_that_has_just_passed_is_told_as_nothing_left_not_as_nonsense(autojump_clock):
    async with network(shop(timeouts=Timeouts(total_s=1.0))) as net:
        app = net.caller()
        app.send(GET)
        serving = next(iter(net.world.downstreams)).serving
        assert serving is not None and serving.ex is not None
        serving.ex.ends -= 3.0  # the connection came in the same turn as the deadline
        server = await net.accepted()
        await quiet()
        assert lines(server.read())[b"x-request-deadline-ms"] == b"0"
        server.send(OK)


async def test_a_long_upload_is_not_a_slow_server(autojump_clock):
    async with network(shop(timeouts=Timeouts(total_s=5.0, idle_s=60.0))) as net:
        app = net.caller()
        server = await asked(net, app, upload(b"", length=4))
        for byte in (b"a", b"b", b"c", b"d"):
            await trio.sleep(4.0)
            app.send(byte)
        await trio.sleep(4.9)
        assert app.read() == b""
        server.send(OK)
        assert app.read() == OK
        app.send(upload(b"abcd"))
        await trio.sleep(5.1)
        assert reason(app.read()) == b"timeout_total"


async def test_waiting_for_the_head_is_not_a_silent_body(autojump_clock):
    """`idle` is for bodies: once the request is whole, only total and try count."""
    async with network(shop(timeouts=Timeouts(total_s=60.0, idle_s=2.0))) as net:
        app = net.caller()
        server = await asked(net, app, upload(b"a", length=2))
        app.send(b"b")
        await trio.sleep(30.0)
        server.send(OK)
        assert app.read() == OK


async def test_silent_bodies(autojump_clock):
    async with network(shop(timeouts=Timeouts(idle_s=2.0))) as net:
        app = net.caller()
        await asked(net, app, upload(b"a", length=2))
        await trio.sleep(2.1)
        assert reason(app.read()) == b"request_timeout"
        app = net.caller()
        server = await asked(net, app)
        server.send(OK[:-1])
        await trio.sleep(2.1)
        assert app.ended == "reset"
        assert net.log == [(408, "request_timeout"), (0, "cut_short")]


async def test_timeout_body_is_for_each_body(autojump_clock):
    async with network(shop(timeouts=Timeouts(total_s=60.0, idle_s=9.0, body_s=4.0))) as net:
        app = net.caller()
        server = await asked(net, app, upload(b"a", length=2))
        await trio.sleep(3.0)
        app.send(b"b")
        await trio.sleep(3.0)  # the server thinks
        server.send(OK[:-2])
        await trio.sleep(3.0)
        server.send(b"o")
        assert app.ended is None
        await trio.sleep(1.1)
        assert app.ended == "reset"


async def test_events_are_held_to_idle_only(autojump_clock):
    async with network(shop(timeouts=Timeouts(total_s=2.0, idle_s=3.0, body_s=4.0))) as net:
        app = net.caller()
        server = await asked(net, app)
        server.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(10):
            await trio.sleep(2.0)
            server.send(b"1\r\nx\r\n")
        assert app.ended is None
        await trio.sleep(3.1)
        assert app.ended == "reset"


async def test_the_breaker_through_the_data_path(autojump_clock):
    breaker = CircuitBreaker(consecutive_failures=2, open_for_s=1.0)
    async with network(shop(circuit_breaker=breaker, retry=Retry(max_retries=0))) as net:
        net.world.rnd = lambda: 0.0  # no jitter
        app = net.caller()
        server = await asked(net, app)
        seen = []
        answers = [DOWN, DOWN, DOWN, OK, OK, OK]
        for n in range(16):
            if n:
                app.send(GET)
            await quiet()
            if server.read():
                server.send(answers.pop(0) if answers else OK)
            answer = app.read()
            seen.append((reason(answer) or b"%d" % status(answer)).decode())
            await trio.sleep(0.25)
        opened = "circuit_open"
        assert seen == ["503", "503", *[opened] * 3, "503", *[opened] * 7, "200", "200", "200"]


# Deadlines and attempts across the application


async def test_an_outbound_request_inherits_deadline_and_attempt(autojump_clock):
    trace = b"traceparent: 00-%s-00f067aa0ba902b7-01\r\n" % (b"4bf92f3577b34da6a3ce929d0e0e4736")
    async with network(shop()) as net:
        peer = net.mesh_caller("front")
        extra = trace + b"x-pillion-attempt: 2\r\nx-request-deadline-ms: 800\r\n"
        inside = await asked(net, peer, b"GET / HTTP/1.1\r\nhost: web\r\n" + extra + b"\r\n")
        assert b"x-pillion-attempt" not in inside.read()
        app = net.caller()
        await trio.sleep(0.3)
        server = await asked(net, app, GET.replace(b"\r\n\r\n", b"\r\n" + trace + b"\r\n"))
        told = lines(server.read())
        assert told[b"x-pillion-attempt"] == b"2" and told[b"x-request-deadline-ms"] == b"500"
        server.send(DOWN.replace(b"content", b"x-pillion-retried: exhausted\r\ncontent"))
        assert status(app.read()) == 503
        inside.send(DOWN)
        assert b"x-pillion-retried: exhausted\r\n" in peer.read()
        app.send(GET.replace(b"\r\n\r\n", b"\r\n" + trace + b"\r\n"))
        assert lines(server.read())[b"x-pillion-attempt"] == b"0"  # the inbound request is over
        server.send(OK)


@pytest.mark.parametrize("told", [b"", b"x-request-deadline-ms: 8000\r\n"])
@pytest.mark.parametrize("gone", [False, True])
async def test_an_end_right_behind_a_request_is_the_end_where_its_own_caller_has_left(gone, told, autojump_clock):
    """Applications end their connections with the same FIN, whether they want the answer or are not waited for."""
    trace = b"traceparent: 00-%s-00f067aa0ba902b7-01\r\n" % (b"4bf92f3577b34da6a3ce929d0e0e4736")
    async with network(shop()) as net:
        peer = net.mesh_caller("front")
        inside = await asked(net, peer, b"GET / HTTP/1.1\r\nhost: web\r\n" + trace + told + b"\r\n")
        app = net.caller()
        server = await asked(net, app, GET.replace(b"\r\n\r\n", b"\r\n" + trace + b"\r\n"))
        if gone:
            peer.reset()
            await quiet()
            assert inside.ended is not None
        app.close()
        await quiet()
        assert (server.ended is not None) is gone
        if not gone:
            server.send(OK)
            inside.send(OK)
        await quiet()
        assert net.log == ([(499, "caller_gone")] * 2 if gone else [(200, "ok")] * 2)


async def test_a_success_is_not_marked(autojump_clock):
    trace = b"traceparent: 00-%s-00f067aa0ba902b7-01\r\n" % (b"4bf92f3577b34da6a3ce929d0e0e4736")
    async with network(shop()) as net:
        peer = net.mesh_caller("front")
        inside = await asked(net, peer, b"GET / HTTP/1.1\r\nhost: web\r\n" + trace + b"\r\n")
        net.world.memory.mark_exhausted(b"4bf92f3577b34da6a3ce929d0e0e4736")
        inside.send(OK)
        assert peer.read() == OK


async def test_the_deadline_to_inherit_restarts_with_the_last_byte_too(autojump_clock):
    trace = b"traceparent: 00-%s-00f067aa0ba902b7-01\r\n" % (b"4bf92f3577b34da6a3ce929d0e0e4736")
    async with network(shop()) as net:
        peer = net.mesh_caller("front")
        head = b"PUT / HTTP/1.1\r\nhost: web\r\ncontent-length: 2\r\nx-request-deadline-ms: 800\r\n" + trace + b"\r\na"
        inside = await asked(net, peer, head)
        await trio.sleep(5.0)
        app = net.caller()
        server = await asked(net, app, GET.replace(b"\r\n\r\n", b"\r\n" + trace + b"\r\n"))
        assert lines(server.read())[b"x-request-deadline-ms"] == b"15000"  # the clock has not begun
        server.send(OK)
        peer.send(b"b")
        app.send(GET.replace(b"\r\n\r\n", b"\r\n" + trace + b"\r\n"))
        assert int(lines(server.read())[b"x-request-deadline-ms"]) in (799, 800)
        server.send(OK)
        inside.send(OK)
        assert peer.read() == OK


async def test_a_peers_own_answer_keeps_its_reason(autojump_clock):
    async with network(shop()) as net:
        app = net.caller()
        server = await asked(net, app)
        server.send(OK.replace(b"200 OK\r\n", b"403 Forbidden\r\nx-pillion-reason: denied\r\n"))
        assert reason(app.read()) == b"denied" and net.log == [(403, "denied")]


# Where requests go


async def test_fallback_to_another_version(autojump_clock):
    routes = (Route("default", destinations=(Destination("v2"),), fallback=Fallback(version="v1")),)
    async with network(shop(endpoints=1, routes=routes)) as net:
        app = net.caller()
        server = await asked(net, app)
        server.send(OK)
        assert app.read() == OK


async def test_fallback_to_another_service_asks_for_it_by_its_own_name(autojump_clock):
    spare = shop(name="spare")
    async with network(shop(endpoints=0, fallback=Fallback(service="spare")), spare) as net:
        app = net.caller()
        server = await asked(net, app)
        assert server.endpoint.identity == "spiffe://mesh.local/service/spare"
        assert lines(server.read())[b"host"] == b"spare"  # as shop it would be misdirected
        server.send(OK)
        assert app.read() == OK and net.cluster("shop").active == 0


async def test_a_fixed_fallback(autojump_clock):
    async with network(shop(endpoints=0, fallback=Fallback(respond=Respond(503, "later")))) as net:
        app = net.caller()
        app.send(GET)
        answer = app.read()
        assert status(answer) == 503 and answer.endswith(b"later")
        assert net.log == [(503, "no_healthy_endpoint")]


async def test_no_endpoint(autojump_clock):
    async with network(shop(endpoints=0)) as net:
        app = net.caller()
        app.send(GET)
        assert reason(app.read()) == b"no_healthy_endpoint"


async def test_redirects_and_rewrites(autojump_clock):
    routes = (
        Route("r", Match(path="/r"), redirect=Redirect("https://elsewhere.example")),
        Route("default", rewrite=Rewrite("/new", "other.example")),
    )
    async with network(shop(routes=routes)) as net:
        app = net.caller()
        app.send(GET.replace(b"/ ", b"/r?x=1 "))
        answer = app.read()
        assert status(answer) == 302 and lines(answer)[b"location"] == b"https://elsewhere.example/r?x=1"
        server = await asked(net, app, GET.replace(b"/ ", b"/old?x=1 "))
        assert server.read().startswith(b"GET /new?x=1 HTTP/1.1\r\nhost: other.example\r\n")
        server.send(OK)


async def test_a_sticky_version(autojump_clock):
    destinations = (Destination("v1", 50), Destination("v2", 50))
    routes = (Route("default", destinations=destinations, sticky=Sticky("c", 60.0)),)
    async with network(shop(endpoints=2, routes=routes)) as net:
        servers: dict[str, Peer] = {}
        cookie, first = b"", ""
        for _ in range(12):
            app = net.caller()
            app.send(GET.replace(b"\r\n\r\n", b"\r\ncookie: " + cookie + b"\r\n\r\n") if cookie else GET)
            await quiet()
            if net.pending():
                server = await net.accepted()
                servers[server.endpoint.key] = server
                await quiet()
            (busy,) = [s for s in servers.values() if s.got]
            busy.read()
            busy.send(OK)
            answer = app.read()
            if not cookie:
                cookie = lines(answer)[b"set-cookie"].partition(b";")[0]
                first = busy.endpoint.key
            assert busy.endpoint.key == first
            assert (b"set-cookie" in lines(answer)) == (len(net.log) == 1)
            app.close()


# Callers that leave


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("step", ["head", "connecting", "waiting", "back-off", "uploading", "downloading"])
async def test_a_caller_leaves_at_every_step(autojump_clock, step, how):
    retry = Retry(max_retries=1, base_s=4.0, max_s=4.0)
    async with network(shop(endpoints=2, retry=retry)) as net:
        net.on_dial = lambda endpoint: 1.0
        app = net.caller()
        server = None
        app.send(GET[:20] if step == "head" else upload(b"a", length=2) if step == "uploading" else GET)
        if step not in ("head", "connecting"):
            server = await net.accepted()
            await quiet()
            if step == "back-off":
                server.reset()
            elif step == "downloading":
                server.send(OK[:-1])
        await trio.sleep(0.2)  # sooner it would be a half-close
        getattr(app, how)()
        await quiet()
        assert not net.world.downstreams
        assert net.log == ([] if step == "head" else [(499, "caller_gone")])
        if server is not None:
            assert server.ended is not None  # the upstream work is cancelled
        await trio.sleep(20.0)
        assert net.timers() == 0 and net.cluster("shop").retries == (step == "back-off")
        if step == "connecting":
            spare = await net.accepted()  # a connection that nobody waits for any more
            assert spare.read() == b""


async def test_a_caller_that_stops_reading_stops_the_server(autojump_clock):
    async with network(shop(timeouts=Timeouts(idle_s=60.0))) as net:
        app = net.caller(window=1000)
        server = await asked(net, app)
        server.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2000000\r\n\r\n")
        sent = 0
        while server.channel.reading:
            server.send(b"x" * 10_000)
            sent += 10_000
            assert sent < 400_000
        for _ in range(5):
            server.send(b"x" * 10_000)
        held = len(server.channel.inbox)
        assert held == 5
        app.accept()
        await quiet()
        assert server.channel.reading and not server.channel.inbox
        server.send(b"x" * (2_000_000 - sent - 50_000))
        assert len(app.read().partition(b"\r\n\r\n")[2]) == 2_000_000


async def test_a_server_that_stops_reading_stops_the_caller(autojump_clock):
    async with network(shop(timeouts=Timeouts(idle_s=60.0))) as net:
        net.on_dial = lambda endpoint: {"window": 1000}
        app = net.caller()
        server = await asked(net, app, upload(b"", length=2_000_000))
        sent = 0
        while app.channel.reading:
            app.send(b"x" * 10_000)
            sent += 10_000
            assert sent < 400_000
        server.accept()
        await quiet()
        assert app.channel.reading
        app.send(b"x" * (2_000_000 - sent))
        server.send(OK)
        assert app.read() == OK


async def test_malformed_requests_behind_a_good_one_wait_their_turn(autojump_clock):
    async with network(shop()) as net:
        app = net.caller()
        server = await asked(net, app, GET + b"GET / HTTP/1.1\r\n\r\n")
        server.send(OK)
        await quiet()
        answers = app.read()
        assert answers.startswith(b"HTTP/1.1 200 OK\r\n") and lines(answers)[b"connection"] == b"close"
        assert app.ended == "close" and net.dials == 1


async def test_a_swap_during_a_request(autojump_clock):
    """The request keeps its plan; its connection does not outlive it, because its endpoint has left."""
    async with network(shop()) as net:
        app = net.caller()
        old = net.cluster("shop")
        server = await asked(net, app)
        net.apply(policy(shop(name="other")))
        server.send(OK)
        await quiet()
        assert app.read() == OK
        assert server.ended is not None and old.connections == 0 and old.active == 0


async def test_a_connection_made_under_another_identity_is_not_used_again(autojump_clock):
    from dataclasses import replace

    one = shop()
    async with network(one) as net:
        app = net.caller()
        first = await asked(net, app)
        spec = replace(one.endpoints[0], identity="spiffe://mesh.local/service/else")
        net.apply(policy(replace(one, endpoints=(spec,))))
        first.send(OK)
        assert app.read() == OK
        second = await asked(net, app)
        assert second is not first and first.ended is not None
        second.send(OK)


async def test_inbound_adds_identity_and_hides_the_mesh(autojump_clock):
    async with network(shop(), own={"ports": (Port("http", 8000),)}) as net:
        peer = net.mesh_caller("front")
        fields = b"x-forwarded-client-cert: forged\r\nx-pillion-attempt: 1\r\n"
        inside = await asked(net, peer, b"GET / HTTP/1.1\r\nhost: web\r\n" + fields + b"\r\n")
        told = lines(inside.read())
        assert told[b"x-forwarded-client-cert"].endswith(b"URI=spiffe://mesh.local/service/front")
        assert b"x-pillion-attempt" not in told
        inside.send(OK.replace(b"content", b"x-pillion-reason: denied\r\nx-pillion-retried: exhausted\r\ncontent"))
        assert peer.read() == OK
        for host in (b"shop", b"shop.mesh:1", b"http.shop"):
            peer.send(GET.replace(b"shop", host))
            assert reason(peer.read()) == b"misdirected"
