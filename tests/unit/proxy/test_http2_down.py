"""The caller's side of HTTP/2 in virtual time, without sockets: streams, their Servings, the end of connections."""

import math
from typing import Any

import pytest
import trio
import trio.testing
from support.http2_caller import Http2Caller
from support.memory_net import Net, Peer, memory_world

from sidecar.model.snapshot import EndpointSpec, Mtls, Route, Service, Snapshot, Timeouts
from sidecar.proxy.http2_down import FLUSH_S, GREETING_S, KEEP_ALIVE_S, NOTICE_S
from sidecar.proxy.http2_down_stream import END_S, STALL_S
from sidecar.wire.http2 import PREFACE, ErrorCode, Stream
from sidecar.wire.websocket import accept_of

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
ENGINES = pytest.mark.parametrize("engine", ["ngh2", "h2"])


def shop(**route: Any) -> Service:
    return Service("shop", endpoints=(EndpointSpec("10.0.0.1", 15006),), routes=(Route("default", **route),))


def policy(**route: Any) -> Snapshot:
    return Snapshot({"web": Service("web", routes=(Route("default"),)), "shop": shop(**route)})


def network(engine: str = "ngh2", *, at_rest: bool = True, **route: Any) -> Any:
    return memory_world(policy(**route), http2_engine=engine, at_rest=at_rest)


async def quiet() -> None:
    await trio.testing.wait_all_tasks_blocked()


async def settled(caller: Http2Caller) -> None:
    for _ in range(3):
        await quiet()
        caller.settle()


async def server_of(net: Net) -> Peer:
    server = await net.accepted()
    await quiet()
    return server


# -- requests and answers


@ENGINES
async def test_a_request_is_served_from_an_upstream_of_http1(autojump_clock: Any, engine: str) -> None:
    async with network(engine) as net:
        caller = Http2Caller(net)
        asked = caller.ask("/a?b", extra=[(b"x-a", b"1")])
        server = await server_of(net)
        head = server.read()
        assert head.startswith(b"GET /a?b HTTP/1.1\r\nhost: shop\r\nx-a: 1\r\n")
        server.send(OK)
        await settled(caller)
        assert (asked.status, asked.body, asked.done, asked.error) == (200, b"ok", True, None)
        assert asked.stream.m is not None and asked.stream.m.length == 2
        assert net.log == [(200, "ok")]


@ENGINES
async def test_requests_are_served_side_by_side(autojump_clock: Any, engine: str) -> None:
    async with network(engine) as net:
        caller = Http2Caller(net)
        first, second = caller.ask("/1"), caller.ask("/2")
        one, two = await server_of(net), await server_of(net)
        if b" /1 " in two.got:
            one, two = two, one
        two.send(OK)
        await settled(caller)
        assert second.done and not first.done
        one.send(OK)
        await settled(caller)
        assert first.done


@ENGINES
async def test_a_body_of_unknown_length_goes_up_in_chunks_with_its_trailers(autojump_clock: Any, engine: str) -> None:
    async with network(engine) as net:
        caller = Http2Caller(net)
        asked = caller.ask(method="POST", body=b"one", end=False)
        server = await server_of(net)
        assert b"\r\ntransfer-encoding: chunked\r\n" in (head := server.read()) and head.endswith(b"\r\n3\r\none\r\n")
        asked.send(b"two")
        await quiet()
        assert server.read().endswith(b"3\r\ntwo\r\n")
        asked.trail([(b"x-sum", b"6")])
        await quiet()
        assert server.read() == b"0\r\nx-sum: 6\r\n\r\n"
        server.send(OK)
        await settled(caller)
        assert asked.body == b"ok"


@ENGINES
async def test_an_answer_in_chunks_comes_with_its_trailers(autojump_clock: Any, engine: str) -> None:
    async with network(engine) as net:
        caller = Http2Caller(net)
        asked = caller.ask()
        server = await server_of(net)
        server.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n")
        await settled(caller)
        assert asked.status == 200 and asked.body == b"one" and not asked.done
        server.send(b"3\r\ntwo\r\n0\r\nx-sum: 6\r\n\r\n")
        await settled(caller)
        assert asked.body == b"onetwo" and asked.trailers == [(b"x-sum", b"6")] and asked.done


@ENGINES
@pytest.mark.parametrize(
    ("method", "answer", "length"),
    [
        ("HEAD", b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n", 5),
        ("GET", b"HTTP/1.1 204 No\r\n\r\n", None),
        ("GET", b"HTTP/1.1 304 Not\r\ncontent-length: 5\r\netag: a\r\n\r\n", 5),
        ("GET", b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", 0),
    ],
)
async def test_an_answer_without_content_ends_with_its_head(
    autojump_clock: Any, engine: str, method: str, answer: bytes, length: int | None
) -> None:
    async with network(engine) as net:
        caller = Http2Caller(net)
        asked = caller.ask(method=method)
        server = await server_of(net)
        server.send(answer)
        await settled(caller)
        assert asked.done and asked.error is None and asked.body == b""
        assert asked.stream.m is not None and asked.stream.m.length == length


@ENGINES
async def test_informational_responses_are_passed_on(autojump_clock: Any, engine: str) -> None:
    async with network(engine) as net:
        caller = Http2Caller(net)
        asked = caller.ask(method="POST", extra=[(b"expect", b"100-continue"), (b"content-length", b"3")], end=False)
        server = await server_of(net)
        assert b"expect: 100-continue" in server.read()
        server.send(b"HTTP/1.1 103 Early\r\nlink: a\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n")
        await settled(caller)
        assert [m.status for m in asked.stream.informational] == [103, 100]
        asked.send(b"abc", end=True)
        await quiet()
        assert server.read().endswith(b"abc")
        server.send(OK)
        await settled(caller)
        assert asked.done


async def test_own_answers_are_like_those_over_http1(autojump_clock: Any) -> None:
    async with network() as net:
        caller = Http2Caller(net)
        asked = caller.ask(host="nowhere")
        await settled(caller)
        assert asked.status == 404 and asked.reason == b"no_route" and b'no service is called \\"nowhere' in asked.body
        head = caller.ask(host="nowhere", method="HEAD")
        await settled(caller)
        assert head.status == 404 and head.body == b"" and head.done


@ENGINES
async def test_a_head_that_is_not_served_costs_its_stream_alone(autojump_clock: Any, engine: str) -> None:
    async with network(engine) as net:
        caller = Http2Caller(net)
        good = caller.ask("/good")
        server = await server_of(net)
        bad = caller.ask("/" + "x" * 9000)
        await settled(caller)
        assert bad.status == 414 and bad.done and bad.reason == b"uri_too_long"
        server.send(OK)
        await settled(caller)
        assert good.body == b"ok"
        assert net.notes[-1][1].startswith("uri_too_long: from 10.1.1.1:")


@ENGINES
async def test_an_early_answer_ends_the_upload_without_an_error(autojump_clock: Any, engine: str) -> None:
    async with network(engine) as net:
        caller = Http2Caller(net)
        asked = caller.ask(method="POST", host="nowhere", body=b"x" * 100, end=False)
        await settled(caller)
        assert asked.status == 404 and asked.done and asked.body
        assert asked.error in (None, ErrorCode.NO_ERROR, ErrorCode.CANCEL)
        assert not caller.down.codec.streams


EMPTY = [(b"content-length", b"0")]


@ENGINES
async def test_a_request_without_content_is_served_once_that_is_certain(autojump_clock: Any, engine: str) -> None:
    async with network(engine) as net:
        caller = Http2Caller(net)
        asked = caller.ask(method="POST", extra=EMPTY, end=False)
        await settled(caller)
        assert not net.dials
        asked.send(b"", True)
        server = await server_of(net)
        assert b"content-length: 0\r\n" in server.read()
        server.send(OK)
        await settled(caller)
        assert (asked.status, asked.body, asked.error) == (200, b"ok", None)


@ENGINES
async def test_content_behind_a_length_of_zero_reaches_nobody(autojump_clock: Any, engine: str) -> None:
    async with network(engine) as net:
        caller = Http2Caller(net)
        asked = caller.ask(method="POST", extra=EMPTY, end=False)
        await settled(caller)
        asked.send(b"x", True)
        await settled(caller)
        assert asked.error == ErrorCode.PROTOCOL_ERROR and not net.dials
        assert not caller.down.codec.streams and not caller.down.streams


@ENGINES
async def test_who_neither_ends_it_nor_goes_on_gets_408(autojump_clock: Any, engine: str) -> None:
    async with network(engine) as net:
        caller = Http2Caller(net)
        asked = caller.ask(method="POST", extra=EMPTY, end=False)
        gone = caller.ask(method="POST", extra=EMPTY, end=False)
        await settled(caller)
        gone.reset()
        await trio.sleep(END_S + 0.1)
        await settled(caller)
        assert (asked.status, asked.done) == (408, True) and not net.dials
        assert not caller.down.codec.streams and not caller.down.streams and not caller.down.waiting


# -- flow control


@ENGINES
async def test_who_ends_a_stream_behind_its_content_is_not_reset_before(autojump_clock: Any, engine: str) -> None:
    """The answer to all that content-length promised may come before END_STREAM does."""
    async with network(engine) as net:
        caller = Http2Caller(net)
        asked = caller.ask(method="POST", extra=[(b"content-length", b"5")], body=b"12", end=False)
        server = await server_of(net)
        asked.send(b"345")
        await settled(caller)
        assert server.read().endswith(b"12345")
        server.send(OK)
        await settled(caller)
        assert (asked.status, asked.body, asked.done, asked.error) == (200, b"ok", True, None)
        await trio.sleep(END_S / 2)
        assert caller.down.codec.streams
        asked.send(b"", True)
        await settled(caller)
        await trio.sleep(END_S * 2)
        await settled(caller)
        assert asked.error is None
        assert not caller.down.codec.streams and not caller.down.waiting


@ENGINES
async def test_who_never_ends_it_is_reset_after_a_while(autojump_clock: Any, engine: str) -> None:
    async with network(engine) as net:
        caller = Http2Caller(net)
        asked = caller.ask(method="POST", extra=[(b"content-length", b"5")], body=b"12345", end=False)
        server = await server_of(net)
        server.send(OK)
        await settled(caller)
        assert asked.done and caller.down.codec.streams
        await trio.sleep(END_S + 0.1)
        await settled(caller)
        assert asked.error in (None, ErrorCode.NO_ERROR)
        assert not caller.down.codec.streams and not caller.down.waiting


@ENGINES
async def test_a_slow_upstream_stops_one_stream_and_no_other(autojump_clock: Any, engine: str) -> None:
    async with network(engine) as net:
        net.on_dial = lambda endpoint: {"window": 1000} if net.dials == 1 else None
        caller = Http2Caller(net)
        big = caller.ask("/big", method="POST", body=b"x" * 1_000_000)
        slow = await server_of(net)
        other = caller.ask("/other")
        quick = await server_of(net)
        quick.send(OK)
        await settled(caller)
        assert other.body == b"ok"
        assert 0 < caller.codec.queued_bytes(big.stream) < 1_000_000 - 64000
        held = slow.channel.out_bytes if slow.channel is not None else 0
        assert held < 600_000
        slow.accept()
        for _ in range(30):
            await settled(caller)
        assert slow.read().count(b"x") >= 1_000_000
        slow.send(OK)
        await settled(caller)
        assert big.body == b"ok"


@ENGINES
async def test_a_reader_that_is_slow_on_one_stream_stops_its_source_alone(autojump_clock: Any, engine: str) -> None:
    async with network(engine) as net:
        caller = Http2Caller(net)
        big = caller.ask("/big")
        caller.unread.add(big)
        server = await server_of(net)
        server.send(b"HTTP/1.1 200 OK\r\ncontent-length: 5000000\r\n\r\n")
        sent = 0
        while sent < 5_000_000:
            server.send(b"y" * 50_000)
            sent += 50_000
            await quiet()
        (down,) = (stream.owner for stream in caller.down.codec.streams.values())
        assert caller.down.codec.queued_bytes(down.stream) < 300_000
        assert server.channel is not None and not server.channel.reading
        other = caller.ask("/other")
        quick = await server_of(net)
        quick.send(OK)
        await settled(caller)
        assert other.body == b"ok" and len(big.body) <= 65536
        caller.unread.clear()
        for _ in range(200):
            await settled(caller)
        assert len(big.body) == 5_000_000 and big.done


@ENGINES
async def test_a_stream_whose_reader_stalls_is_given_up(autojump_clock: Any, engine: str) -> None:
    async with network(engine, timeouts=Timeouts(idle_s=5.0)) as net:
        caller = Http2Caller(net)
        big = caller.ask("/big")
        caller.unread.add(big)
        server = await server_of(net)
        server.send(b"HTTP/1.1 200 OK\r\ncontent-length: 5000000\r\n\r\n" + b"y" * 1_000_000)
        await settled(caller)
        await trio.sleep(6)
        await settled(caller)
        assert big.error == ErrorCode.INTERNAL_ERROR and server.ended


@ENGINES
async def test_an_answer_that_is_whole_is_not_kept_for_ever(autojump_clock: Any, engine: str) -> None:
    async with network(engine) as net:
        caller = Http2Caller(net)
        big = caller.ask("/big")
        caller.unread.add(big)
        server = await server_of(net)
        server.send(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n" + b"y" * 100_000)
        await settled(caller)
        assert net.log == [(200, "ok")] and not big.done
        await trio.sleep(STALL_S * 2 + 1)
        await settled(caller)
        assert big.error == ErrorCode.CANCEL
        assert not caller.down.codec.streams and not caller.down.waiting


async def test_who_does_not_read_our_frames_is_not_read_either(autojump_clock: Any) -> None:
    async with network() as net:
        caller = Http2Caller(net)
        caller.peer.window = 0
        for _ in range(40):
            for _ in range(1000):
                caller.codec.ping()
            data = caller.codec.to_send()
            caller.peer.send(data)
            await quiet()
        assert not net.world.downstreams or not caller.down.ch.reading or caller.down.closing


# -- ends of streams


@ENGINES
async def test_a_caller_that_resets_its_stream_cancels_the_request(autojump_clock: Any, engine: str) -> None:
    async with network(engine) as net:
        caller = Http2Caller(net)
        asked, other = caller.ask("/1"), caller.ask("/2")
        one, two = await server_of(net), await server_of(net)
        if b" /1 " in two.got:
            one, two = two, one
        asked.reset()
        await quiet()
        assert one.ended and not two.ended
        assert net.log == [(499, "caller_gone")]
        two.send(OK)
        await settled(caller)
        assert other.body == b"ok"


@ENGINES
async def test_a_connection_that_is_lost_cancels_all_of_it(autojump_clock: Any, engine: str) -> None:
    async with network(engine) as net:
        caller = Http2Caller(net)
        caller.ask("/1")
        caller.ask("/2")
        one, two = await server_of(net), await server_of(net)
        caller.peer.reset()
        await quiet()
        assert one.ended and two.ended and not net.world.downstreams
        assert net.log == [(499, "caller_gone")] * 2


@ENGINES
async def test_an_answer_that_is_cut_short_is_a_reset(autojump_clock: Any, engine: str) -> None:
    async with network(engine) as net:
        caller = Http2Caller(net)
        asked = caller.ask()
        server = await server_of(net)
        server.send(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nfive!")
        await settled(caller)
        server.close()
        await settled(caller)
        assert asked.status == 200 and not asked.done and asked.error == ErrorCode.INTERNAL_ERROR
        again = caller.ask()
        server = await server_of(net)
        server.send(OK)
        await settled(caller)
        assert again.body == b"ok"


@ENGINES
async def test_a_caller_that_breaks_the_protocol_gets_goaway_and_is_counted(autojump_clock: Any, engine: str) -> None:
    async with network(engine) as net:
        caller = Http2Caller(net)
        caller.ask()
        server = await server_of(net)
        caller.peer.send(b"\x00\x00\x04\x08\x00\x00\x00\x00\x00\x00\x00\x00\x00")  # WINDOW_UPDATE of nothing
        await settled(caller)
        assert caller.codec.closing and server.ended
        await trio.sleep(FLUSH_S + 2)
        assert caller.peer.ended and not net.world.downstreams
        assert net.notes[-1][0] == "malformed" and "HTTP/2: PROTOCOL_ERROR" in net.notes[-1][1]
        counted = [
            line for line in b"".join(net.world.registry.render()).splitlines() if b"http2_limits_total{" in line
        ]
        assert len(counted) == 1 and b'limit="protocol"' in counted[0] and counted[0].endswith(b" 1")


# -- the end of a connection


@ENGINES
async def test_a_drain_says_goodbye_in_two_steps_and_loses_nothing(autojump_clock: Any, engine: str) -> None:
    async with network(engine) as net:
        caller = Http2Caller(net)
        asked = caller.ask("/1")
        server = await server_of(net)
        net.call(caller.down.drain)
        late = caller.ask("/late") if not caller.codec.closing else None  # was on its way
        await settled(caller)
        other = await server_of(net) if late is not None else None
        await trio.sleep(NOTICE_S + 0.1)
        await settled(caller)
        assert caller.codec.closing and caller.peer.ended is None
        server.send(OK)
        if other is not None:
            other.send(OK)
        await settled(caller)
        assert asked.body == b"ok" and (late is None or late.body == b"ok")
        await trio.sleep(2)
        assert caller.peer.ended == "close" and not net.world.downstreams


async def test_an_idle_connection_is_closed_with_goaway(autojump_clock: Any) -> None:
    async with network() as net:
        caller = Http2Caller(net)
        asked = caller.ask()
        server = await server_of(net)
        server.send(OK)
        await settled(caller)
        assert asked.done
        await trio.sleep(KEEP_ALIVE_S - 1)
        assert caller.peer.ended is None
        await trio.sleep(3)
        caller.settle()
        assert caller.codec.closing and caller.peer.ended == "close"


async def test_an_old_connection_of_a_peer_comes_to_its_end(autojump_clock: Any) -> None:
    snapshot = Snapshot({"web": Service("web", routes=(Route("default"),), max_connection_age_s=10.0)})
    async with memory_world(snapshot) as net:
        caller = Http2Caller(net, "shop")
        asked = caller.ask(host="web")
        server = await server_of(net)
        server.send(OK)
        await settled(caller)
        await trio.sleep(11)
        asked = caller.ask(host="web")
        await quiet()
        server = await server_of(net) if net.pending() else server
        server.send(OK)
        await settled(caller)
        assert asked.body == b"ok"
        await trio.sleep(2)
        caller.settle()
        assert caller.codec.closing and caller.peer.ended == "close"


@pytest.mark.parametrize("part", [b"", PREFACE[:5], PREFACE, PREFACE + b"\x00\x00\x06\x04\x00\x00"])
async def test_who_does_not_greet_in_time_is_let_go(autojump_clock: Any, part: bytes) -> None:
    async with network() as net:
        caller = Http2Caller(net, "shop", greet=False)
        if part:
            caller.peer.send(part)
        await trio.sleep(GREETING_S - 1)
        assert caller.peer.ended is None
        await trio.sleep(2)
        assert caller.peer.ended and not net.world.downstreams


async def test_a_head_that_does_not_come_in_time_ends_the_connection(autojump_clock: Any) -> None:
    async with network() as net:
        caller = Http2Caller(net)
        await quiet()
        caller.peer.send(b"\x00\x00\x05\x01\x00\x00\x00\x00\x01\x82\x84")  # HEADERS, cut
        await trio.sleep(9)
        assert caller.peer.ended is None
        await trio.sleep(3)
        assert caller.peer.ended and not net.world.downstreams


async def test_a_ban_ends_it_at_once_or_with_what_is_under_way(autojump_clock: Any) -> None:
    snapshot = Snapshot({"web": Service("web", routes=(Route("default"),))})
    async with memory_world(snapshot) as net:
        idle = Http2Caller(net, "shop")
        net.world.ban(["spiffe://mesh.local/service/shop"])
        await quiet()
        assert idle.peer.ended == "reset" and not net.world.downstreams
        net.world.ban([])
        busy = Http2Caller(net, "shop")
        asked = busy.ask(host="web")
        server = await server_of(net)
        net.world.ban(["spiffe://mesh.local/service/shop"])
        server.send(OK)
        await settled(busy)
        assert asked.body == b"ok"
        await trio.sleep(5)
        assert busy.peer.ended and not net.world.downstreams


async def test_a_plain_peer_is_refused_and_sent_away_once_mtls_is_strict(autojump_clock: Any) -> None:
    loose = Snapshot({"web": Service("web", routes=(Route("default"),), mtls=Mtls.PERMISSIVE)})
    async with memory_world(loose) as net:
        caller = Http2Caller(net, "")
        net.apply(Snapshot({"web": Service("web", routes=(Route("default"),), mtls=Mtls.STRICT)}))
        asked = caller.ask(host="web")
        await settled(caller)
        assert asked.status == 403
        await trio.sleep(3)
        assert caller.peer.ended


# -- telling HTTP/1.1 and HTTP/2 apart


@pytest.mark.parametrize("cut", range(len(PREFACE) + 1))
async def test_the_preface_is_known_wherever_it_is_cut(autojump_clock: Any, cut: int) -> None:
    async with network() as net:
        caller = Http2Caller(net, greet=False)
        stream = caller.codec
        data = stream.to_send()
        assert data.startswith(PREFACE)
        caller.peer.send(data[:cut])
        await quiet()
        caller.peer.send(data[cut:])
        await settled(caller)
        asked = caller.ask()
        server = await server_of(net)
        server.send(OK)
        await settled(caller)
        assert asked.body == b"ok"
        assert net.world.meters.outbound.connections_down.value == 1
        assert net.world.meters.outbound.connections_down_total.value == 1


@pytest.mark.parametrize("method", [b"PRI", b"P", b"PUT", b"POST"])
@pytest.mark.parametrize("cut", [1, 2, 3, 4, 6])
async def test_http1_that_begins_alike_is_http1(autojump_clock: Any, method: bytes, cut: int) -> None:
    async with network() as net:
        peer = net.caller()
        data = method + b" / HTTP/1.1\r\nhost: shop\r\ncontent-length: 0\r\n\r\n"
        peer.send(data[:cut])
        await quiet()
        peer.send(data[cut:])
        server = await server_of(net)
        assert server.read().startswith(method + b" / ")
        server.send(OK)
        await quiet()
        assert peer.read().endswith(b"ok")


async def test_part_of_a_preface_is_an_unfinished_head(autojump_clock: Any) -> None:
    async with network() as net:
        peer = net.caller()
        peer.send(PREFACE[:10])
        await trio.sleep(9)
        assert peer.ended is None and not peer.got
        await trio.sleep(15)
        assert b" 408 " in peer.read() and peer.ended


# -- tunnels


def sockets(**more: Any) -> Any:
    return network(upgrade=frozenset({"websocket"}), **more)


BARE_SWITCH = b"HTTP/1.1 101 X\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"
SWITCH = b"HTTP/1.1 101 X\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-accept: %b\r\nx-a: 1\r\n\r\n"


def key_in(head: bytes) -> bytes:
    (line,) = [line for line in head.split(b"\r\n") if line.startswith(b"sec-websocket-key: ")]
    return line.partition(b": ")[2]


@ENGINES
async def test_a_websocket_of_an_http2_caller_leads_to_an_http1_server(autojump_clock: Any, engine: str) -> None:
    async with sockets(engine=engine) as net:
        caller = Http2Caller(net, engine=engine)
        await settled(caller)
        assert caller.codec.extended_connect
        asked = caller.connect("/chat?room=1", extra=[(b"sec-websocket-version", b"13"), (b"origin", b"me")])
        server = await server_of(net)
        head = server.read()
        assert head.startswith(b"GET /chat?room=1 HTTP/1.1\r\n")
        assert b"connection: upgrade\r\nupgrade: websocket\r\n" in head and b"sec-websocket-version: 13" in head
        asked.send(b"early")
        await quiet()
        server.send(SWITCH % accept_of(key_in(head)) + b"hello")
        await settled(caller)
        assert asked.status == 200 and asked.body == b"hello" and asked.headers == {b"x-a": b"1"}
        assert server.read() == b"early"
        asked.send(b"ping" * 10)
        await quiet()
        assert server.read() == b"ping" * 10
        other = caller.ask("/other")
        (quick) = await server_of(net)
        quick.send(OK)
        await settled(caller)
        assert other.body == b"ok"
        asked.send(b"bye", end=True)
        await quiet()
        assert server.read() == b"bye"
        server.send(b"bye too")
        server.close()
        await settled(caller)
        assert asked.body.endswith(b"bye too") and asked.done and asked.error is None
        assert not caller.down.tunnels and not net.world.tunnels
        assert net.log[-1] == (101, "ok")


@ENGINES
@pytest.mark.parametrize("answer", [SWITCH % b"wrong", BARE_SWITCH, OK])
async def test_a_server_that_has_not_understood_opens_no_tunnel(
    autojump_clock: Any, engine: str, answer: bytes
) -> None:
    async with sockets(engine=engine) as net:
        caller = Http2Caller(net, engine=engine)
        await settled(caller)
        asked = caller.connect()
        for _ in range(3):
            with trio.move_on_after(1):
                server = await server_of(net)
                server.send(answer)
                await settled(caller)
        assert asked.status == 502 and asked.reason == b"bad_response" and asked.done


async def test_an_upgrade_that_the_route_does_not_allow_is_refused(autojump_clock: Any) -> None:
    async with network() as net:
        caller = Http2Caller(net)
        await settled(caller)
        asked = caller.connect()
        await settled(caller)
        assert asked.status == 501 and asked.done


async def test_what_a_server_answers_instead_is_passed_on(autojump_clock: Any) -> None:
    async with sockets() as net:
        caller = Http2Caller(net)
        await settled(caller)
        asked = caller.connect()
        server = await server_of(net)
        server.send(b"HTTP/1.1 403 No\r\ncontent-length: 2\r\n\r\nno")
        await settled(caller)
        assert asked.status == 403 and asked.body == b"no" and asked.done
        assert not caller.down.codec.streams


@ENGINES
async def test_a_cut_passes_through_a_tunnel_either_way(autojump_clock: Any, engine: str) -> None:
    async with sockets(engine=engine) as net:
        caller = Http2Caller(net, engine=engine)
        await settled(caller)
        for way in ("caller", "server"):
            asked = caller.connect()
            server = await server_of(net)
            server.send(SWITCH % accept_of(key_in(server.read())))
            await settled(caller)
            assert asked.status == 200
            if way == "caller":
                asked.reset()
                await settled(caller)
                assert server.ended == "reset"
            else:
                server.reset()
                await settled(caller)
                assert asked.error == ErrorCode.CANCEL and not asked.done
            assert not caller.down.tunnels and not net.world.tunnels


@ENGINES
async def test_a_tunnel_ends_with_its_connection(autojump_clock: Any, engine: str) -> None:
    async with sockets(engine=engine) as net:
        caller = Http2Caller(net, engine=engine)
        await settled(caller)
        asked = caller.connect()
        server = await server_of(net)
        server.send(SWITCH % accept_of(key_in(server.read())))
        await settled(caller)
        assert asked.status == 200
        caller.peer.reset()
        await quiet()
        assert server.ended == "reset" and not net.world.tunnels and not net.world.downstreams


@ENGINES
async def test_a_tunnel_is_bounded_both_ways(autojump_clock: Any, engine: str) -> None:
    async with sockets(engine=engine) as net:
        net.on_dial = lambda endpoint: {"window": 1000}
        caller = Http2Caller(net, engine=engine)
        await settled(caller)
        asked = caller.connect()
        server = await server_of(net)
        server.send(SWITCH % accept_of(key_in(server.read())))
        await settled(caller)
        asked.send(b"u" * 2_000_000)
        for _ in range(10):
            await settled(caller)
        assert server.channel is not None and server.channel.out_bytes < 600_000
        caller.unread.add(asked)
        server.send(b"d" * 200_000)
        server.send(b"d" * 200_000)
        for _ in range(3):
            await settled(caller)
        assert caller.down.codec.queued_bytes(next(iter(caller.down.tunnels))) <= 200_000
        server.accept()
        caller.unread.clear()
        for _ in range(60):
            await settled(caller)
        assert len(asked.body) == 400_000
        assert server.read().count(b"u") == 2_000_000
        asked.reset()
        await settled(caller)


async def test_a_tunnel_that_ends_leaves_the_deadlines_of_others(autojump_clock: Any) -> None:
    async with sockets(timeouts=Timeouts(total_s=5.0, try_s=math.inf)) as net:
        caller = Http2Caller(net)
        await settled(caller)
        tunnel = caller.connect()
        server = await server_of(net)
        server.send(SWITCH % accept_of(key_in(server.read())))
        await settled(caller)
        other = caller.ask("/other")
        await server_of(net)
        tunnel.reset()
        await settled(caller)
        await trio.sleep(6)
        await settled(caller)
        assert other.status == 504


async def test_unfinished_heads_share_what_heads_may_take(autojump_clock: Any) -> None:
    async with network() as net:
        callers = [Http2Caller(net) for _ in range(40)]
        await quiet()
        for caller in callers:
            caller.peer.send(b"\x00\x00\x05\x01\x00\x00\x00\x00\x01\x82\x84")
        await trio.sleep(2)
        left = [caller for caller in callers if not caller.peer.ended]
        assert left == callers[8:] and net.world.heads.bytes_held <= net.world.heads.bytes_max
        await trio.sleep(11)
        assert not net.world.downstreams and not net.world.heads.bytes_held


async def test_a_head_in_two_parts_is_a_head(autojump_clock: Any) -> None:
    async with network() as net:
        caller = Http2Caller(net)
        await settled(caller)
        stream = caller.codec
        asked = Stream(method=b"GET")
        stream.request(asked, caller.fields("/x", "shop", "GET", [(b"x-long", b"v" * 20_000)]), True)
        data = stream.to_send()
        assert len(data) > 16384
        for at in range(0, len(data), 5000):
            caller.peer.send(data[at : at + 5000])
            await trio.sleep(2)
        server = await server_of(net)
        assert server.read().startswith(b"GET /x ")
        assert not net.world.heads.bytes_held
        server.send(OK)
        await settled(caller)
        assert asked.ended
        await trio.sleep(20)
        assert caller.peer.ended is None
