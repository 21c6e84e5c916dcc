"""Tunnels over real sockets: application ↔ sidecar ═ mutual TLS, framed ═ sidecar ↔ application, all in one process."""

import os
import socket
import ssl
from typing import Any

import pytest
import trio
from support.pki import Pki
from support.tlskit import Recorder, identity_files, read_all, running_reactor, send_all, tcp_pair, tls_pair, until

from sidecar.proxy.channel import Channel
from sidecar.proxy.reactor import Reactor
from sidecar.proxy.tls import Identity
from sidecar.proxy.tunnel import End, Tunnel, TunnelResult
from sidecar.wire.tcp_frames import header

BIG = os.urandom(1 << 16) * 48  # 3 MB


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    pki, tmp_path = Pki(), tmp_path_factory.mktemp("identities")
    web, reviews = (Identity(identity_files(pki, tmp_path, name)) for name in ("web", "reviews"))
    return web.current.client_tcp, reviews.current.server


def open_tunnel(reactor: Reactor, a: Any, b: Any, results: list[TunnelResult], **options: Any) -> Tunnel:
    made: list[Tunnel] = []

    def begin() -> None:
        nobody = Recorder()
        channels = [Channel(reactor, sock, nobody, False) for sock in (a, b)]
        made.append(Tunnel(*channels, timers=reactor.timers, on_done=results.append, **{"idle_s": 10.0, **options}))

    reactor.call(begin)
    return made[0]


class Hops:
    """caller ↔ [tunnel ═ TLS ═ tunnel] ↔ callee"""

    def __init__(self, reactor: Reactor, contexts: tuple[ssl.SSLContext, ssl.SSLContext], **options: Any) -> None:
        self.caller, near = tcp_pair()
        self.callee, far = tcp_pair()
        client, server = tls_pair(*contexts)
        self.results: list[TunnelResult] = []
        self.out = open_tunnel(reactor, near, client, self.results, framed_b=True, **options)
        self.into = open_tunnel(reactor, server, far, self.results, framed_a=True, **options)

    async def done(self) -> list[TunnelResult]:
        await until(lambda: len(self.results) == 2)
        return self.results

    def close(self) -> None:
        self.caller.close()
        self.callee.close()


async def test_half_close_each_way_with_data_in_flight_both_ways(contexts):
    """CVE-2025-62409: one side ends while the other is still sending, in full flight."""
    async with running_reactor() as reactor:
        hops = Hops(reactor, contexts)
        got: dict[str, bytes] = {}

        async def caller() -> None:
            await send_all(hops.caller, BIG)
            hops.caller.shutdown(socket.SHUT_WR)

        async def callee() -> None:
            for _ in range(4):
                await send_all(hops.callee, BIG)
            hops.callee.shutdown(socket.SHUT_WR)

        async def read(name: str, sock: socket.socket) -> None:
            got[name] = await read_all(sock)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(caller)
            nursery.start_soon(callee)
            nursery.start_soon(read, "caller", hops.caller)
            nursery.start_soon(read, "callee", hops.callee)
        assert got["callee"] == BIG
        assert got["caller"] == BIG * 4
        results = await hops.done()
        assert {result.end for result in results} == {End.CLEAN}
        assert {result.bytes_from_a + result.bytes_from_b for result in results} == {5 * len(BIG)}
        assert not reactor.conns
        hops.close()


async def test_the_answer_comes_after_the_question_has_ended(contexts):
    async with running_reactor() as reactor:
        hops = Hops(reactor, contexts)
        await send_all(hops.caller, b"question")
        hops.caller.shutdown(socket.SHUT_WR)
        assert await read_all(hops.callee) == b"question"
        await trio.sleep(0.02)
        assert hops.results == []
        await send_all(hops.callee, BIG)
        hops.callee.close()
        assert await read_all(hops.caller) == BIG
        assert {result.end for result in await hops.done()} == {End.CLEAN}
        hops.close()


async def test_the_server_speaks_first(contexts):
    async with running_reactor() as reactor:
        hops = Hops(reactor, contexts)
        await send_all(hops.callee, b"220 ready\r\n")
        assert await read_all(hops.caller, 11) == b"220 ready\r\n"
        hops.close()


@pytest.mark.parametrize("who", ["caller", "callee"])
async def test_a_reset_arrives_as_a_reset(contexts, who):
    async with running_reactor() as reactor:
        hops = Hops(reactor, contexts)
        left, right = (hops.caller, hops.callee) if who == "caller" else (hops.callee, hops.caller)
        await send_all(left, b"half a mess")
        assert await read_all(right, 11) == b"half a mess"
        left.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        left.close()
        with pytest.raises(ConnectionResetError):
            await read_all(right)
        results = await hops.done()
        assert [result.end for result in results] == [End.CUT, End.CUT]
        hops.close()


async def test_what_came_before_a_cut_is_delivered_first(contexts):
    async with running_reactor() as reactor:
        app, near = tcp_pair()
        peer, far = tls_pair(*contexts)
        results: list[TunnelResult] = []
        open_tunnel(reactor, far, near, results, framed_a=True)
        for at in range(0, len(BIG), 1 << 20):
            part = BIG[at : at + (1 << 20)]
            await send_all(peer, header(len(part)))
            await send_all(peer, part)
        peer.close()  # no end frame, no close_notify
        with pytest.raises(ConnectionResetError):
            await read_all(app)
        await until(lambda: results)
        assert (results[0].end, results[0].by) == (End.CUT, "a")
        assert results[0].bytes_from_a == len(BIG)
        app.close()


async def test_close_notify_without_the_end_frame_is_a_cut(contexts):
    async with running_reactor() as reactor:
        app, near = tcp_pair()
        peer, far = tls_pair(*contexts)
        results: list[TunnelResult] = []
        open_tunnel(reactor, far, near, results, framed_a=True)
        await send_all(peer, header(10) + b"hello")
        with pytest.raises(ssl.SSLWantReadError):
            peer.unwrap()
        await until(lambda: results)
        assert results[0].end is End.CUT
        with pytest.raises(ConnectionResetError):
            await read_all(app)
        app.close()
        peer.close()


@pytest.mark.parametrize("hostile", [b"\xff\xff\xff\xff", b"\0\0\0\0more"])
async def test_broken_framing_is_a_cut(contexts, hostile):
    async with running_reactor() as reactor:
        app, near = tcp_pair()
        peer, far = tls_pair(*contexts)
        results: list[TunnelResult] = []
        open_tunnel(reactor, far, near, results, framed_a=True)
        await send_all(peer, hostile)
        await until(lambda: results)
        assert results[0].end is End.CUT
        app.close()
        peer.close()


async def test_silence_ends_both_sides(contexts):
    async with running_reactor() as reactor:
        hops = Hops(reactor, contexts, idle_s=0.05)
        assert End.IDLE in {result.end for result in await hops.done()}
        with pytest.raises(ConnectionResetError):
            await read_all(hops.caller)
        hops.close()


async def test_a_slow_reader_stops_the_sender_and_memory_stays_bounded(contexts):
    async with running_reactor() as reactor:
        hops = Hops(reactor, contexts)
        sent = 0
        peak = 0
        with trio.move_on_after(0.5):
            while True:
                await send_all(hops.caller, BIG[:65536])
                sent += 65536
                buffered = sum(
                    side.channel.out_bytes for tunnel in (hops.out, hops.into) for side in (tunnel.a, tunnel.b)
                )
                peak = max(peak, buffered)
        assert peak <= 2 * (512 << 10) + 4096
        hops.caller.shutdown(socket.SHUT_WR)
        hops.callee.shutdown(socket.SHUT_WR)
        got = len(await read_all(hops.callee))
        assert sent <= got <= sent + 65536
        assert {result.end for result in await hops.done()} == {End.CLEAN}
        hops.close()


async def test_an_upgraded_tls_side_ends_as_a_whole_after_its_last_byte(contexts):
    """Unframed TLS cannot half-close: the application's end closes the caller's side, flushed and lingering."""
    async with running_reactor() as reactor:
        app, near = tcp_pair()
        peer, far = tls_pair(*contexts)
        results: list[TunnelResult] = []
        open_tunnel(reactor, far, near, results, leftover_a=b"early ")
        await send_all(peer, b"frame")
        assert await read_all(app, 11) == b"early frame"
        await send_all(app, BIG)
        app.shutdown(socket.SHUT_WR)
        await send_all(peer, b"unread at the end")
        assert await read_all(peer) == BIG
        await until(lambda: results)
        assert results[0].end is End.CLEAN
        app.close()
        peer.close()


async def test_the_last_bytes_reach_an_upgraded_side_that_is_still_sending(contexts):
    """Closing with its bytes unread would reset the connection under our own last ones."""
    async with running_reactor() as reactor:
        app, near = tcp_pair()
        app.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        peer, far = tls_pair(*contexts)
        results: list[TunnelResult] = []
        open_tunnel(reactor, far, near, results)
        with trio.move_on_after(0.1):
            await send_all(peer, BIG)  # the application reads none of it yet
        await send_all(app, b"that was the last")
        app.shutdown(socket.SHUT_WR)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_all, app)
            await until(lambda: results)
            await trio.sleep(0.02)
            assert results[0].end is End.CLEAN
            assert results[0].bytes_from_a < len(BIG)
            assert await read_all(peer) == b"that was the last"
        app.close()
        peer.close()


async def test_an_upgraded_tls_sides_end_ends_the_application_side(contexts):
    async with running_reactor() as reactor:
        app, near = tcp_pair()
        peer, far = tls_pair(*contexts)
        results: list[TunnelResult] = []
        open_tunnel(reactor, far, near, results)
        await send_all(peer, BIG)
        with pytest.raises(ssl.SSLWantReadError):
            peer.unwrap()
        peer.close()
        assert await read_all(app) == BIG
        await until(lambda: results)
        assert results[0].end is End.CLEAN
        app.close()


async def test_closing_a_tunnel_resets_both_sides(contexts):
    async with running_reactor() as reactor:
        hops = Hops(reactor, contexts)
        reactor.call(hops.out.close)
        results = await hops.done()
        assert [result.end for result in results] == [End.CLOSED, End.CUT]
        for sock in (hops.caller, hops.callee):
            with pytest.raises(ConnectionResetError):
                await read_all(sock)
        hops.close()
