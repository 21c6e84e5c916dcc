"""Channel over real loopback sockets, plain and TLS."""

import itertools
import os
import socket
import ssl
import struct
import time

import pytest
import trio
import trio.lowlevel
from support.pki import Pki
from support.tlskit import Recorder, identity_files, read_all, running_reactor, send_all, tcp_pair, tls_pair, until

from sidecar.proxy.channel import HIGH_BYTES, Channel
from sidecar.proxy.reactor import Reactor
from sidecar.proxy.tls import Identity, why

BIG = os.urandom(1 << 16) * 64  # 4 MB


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    pki, tmp_path = Pki(), tmp_path_factory.mktemp("identities")
    web, reviews = (Identity(identity_files(pki, tmp_path, name)) for name in ("web", "reviews"))
    return web.current.client_http, reviews.current.server


@pytest.fixture(params=["plain", "tls"])
def pair(request: pytest.FixtureRequest, contexts: tuple[ssl.SSLContext, ssl.SSLContext]):
    """(the test's socket, the channel's socket)"""
    ours, theirs = tcp_pair() if request.param == "plain" else tls_pair(*contexts)
    yield ours, theirs
    ours.close()
    theirs.close()


@pytest.fixture
def tls(contexts: tuple[ssl.SSLContext, ssl.SSLContext]):
    ours, theirs = tls_pair(*contexts)
    yield ours, theirs
    ours.close()
    theirs.close()


@pytest.fixture
def plain():
    ours, theirs = tcp_pair()
    yield ours, theirs
    ours.close()
    theirs.close()


def open_channel(reactor, sock, *, watch_hangup=False, half_close=False) -> Recorder:
    owner = Recorder()

    def begin() -> None:
        owner.channel = Channel(reactor, sock, owner, watch_hangup)
        owner.channel.half_close = half_close

    reactor.call(begin)
    return owner


def reset(sock) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    socket.socket.close(sock)


async def test_bytes_both_ways(pair):
    ours, theirs = pair
    async with running_reactor() as reactor:
        owner = open_channel(reactor, theirs)
        owner.on_received = lambda data: owner.channel.write(data)
        await send_all(ours, b"hello")
        assert await read_all(ours, 5) == b"hello"
        assert owner.data == b"hello"


async def test_bulk_arrives_whole_and_in_order_then_the_clean_end(pair):
    ours, theirs = pair
    async with running_reactor() as reactor:
        owner = open_channel(reactor, theirs)
        await send_all(ours, BIG)
        if isinstance(ours, ssl.SSLSocket):
            with pytest.raises(ssl.SSLWantReadError):
                ours.unwrap()
        ours.close()
        await until(lambda: owner.losses)
        assert owner.data == BIG
        assert owner.losses == [None]


async def test_a_slow_reader_makes_write_say_stop_and_drained_says_go(pair):
    ours, theirs = pair
    async with running_reactor() as reactor:
        owner = open_channel(reactor, theirs)
        sent = 0
        chunk = BIG[:100_000]

        def fill() -> None:
            nonlocal sent
            while True:
                sent += len(chunk)
                if not owner.channel.write(chunk):
                    break

        reactor.call(fill)
        assert HIGH_BYTES <= owner.channel.out_bytes < HIGH_BYTES + len(chunk)
        assert owner.drains == 0
        got = await read_all(ours, sent)
        assert len(got) == sent
        assert got == chunk * (sent // len(chunk))
        await until(lambda: owner.drains)
        assert owner.drains == 1
        assert owner.channel.out_bytes == 0


async def test_a_paused_channel_reads_nothing_and_resume_goes_on(pair):
    ours, theirs = pair
    async with running_reactor() as reactor:
        owner = open_channel(reactor, theirs)
        owner.on_received = lambda data: owner.channel.pause()
        await send_all(ours, b"1")
        await until(lambda: owner.size == 1)
        await send_all(ours, b"2")
        await trio.sleep(0.02)
        assert owner.data == b"1"
        reactor.call(owner.channel.resume)
        await until(lambda: owner.size == 2)


async def test_a_clean_end_behind_a_burst_waits_for_resume(pair):
    ours, theirs = pair
    async with running_reactor() as reactor:
        owner = open_channel(reactor, theirs)
        reactor.call(owner.channel.pause)
        owner.on_received = lambda data: owner.channel.pause()
        await send_all(ours, BIG[: 16384 + 10])
        if isinstance(ours, ssl.SSLSocket):
            with pytest.raises(ssl.SSLWantReadError):
                ours.unwrap()
        ours.close()
        await trio.sleep(0.02)
        assert (owner.size, owner.losses) == (0, [])
        reactor.call(owner.channel.resume)
        await until(lambda: owner.size == 16394)
        await trio.sleep(0.02)
        assert owner.losses == []
        reactor.call(owner.channel.resume)
        await until(lambda: owner.losses)
        assert owner.losses == [None]


async def test_tls_truncation_is_never_a_clean_end(tls):
    ours, theirs = tls
    async with running_reactor() as reactor:
        owner = open_channel(reactor, theirs, half_close=True)
        await send_all(ours, b"half of it")
        socket.socket.shutdown(ours, socket.SHUT_WR)  # a FIN without close_notify
        await until(lambda: owner.losses)
        assert owner.data == b"half of it"
        assert why(owner.losses[0]) == "the peer has closed the connection within TLS"
        assert owner.ends == 0


async def test_truncation_behind_a_full_burst_is_told_after_the_data(tls):
    ours, theirs = tls
    async with running_reactor() as reactor:
        owner = open_channel(reactor, theirs)
        reactor.call(owner.channel.pause)
        await send_all(ours, BIG[: 3 * 16384])
        socket.socket.shutdown(ours, socket.SHUT_WR)
        reactor.call(owner.channel.resume)
        await until(lambda: owner.losses)
        assert owner.size == 3 * 16384
        assert why(owner.losses[0]) == "the peer has closed the connection within TLS"


async def test_garbage_on_a_tls_connection_is_a_loss_even_if_the_peer_stays(tls):
    ours, theirs = tls
    async with running_reactor() as reactor:
        owner = open_channel(reactor, theirs)
        await send_all(ours, b"x" * 16384)
        socket.socket.send(ours, b"\x17\x03\x03\x00\x20" + bytes(32))  # a record that does not decrypt
        await until(lambda: owner.losses)
        assert owner.size == 16384
        assert isinstance(owner.losses[0], ssl.SSLError)


async def test_a_reset_is_a_loss_with_its_error(plain):
    ours, theirs = plain
    async with running_reactor() as reactor:
        owner = open_channel(reactor, theirs)
        reset(ours)
        await until(lambda: owner.losses)
        assert isinstance(owner.losses[0], ConnectionResetError)


async def test_a_reset_that_a_write_has_used_up_is_not_a_clean_end(plain):
    """The failed write takes the socket's error; the next read says b"" as if the peer had finished."""
    ours, theirs = plain
    owner = Recorder()
    async with running_reactor() as reactor:

        def begin() -> None:
            owner.channel = Channel(reactor, theirs, owner, False)
            reset(ours)
            owner.channel.write(b"x")  # before epoll has told

        reactor.call(begin)
        await until(lambda: owner.losses)
        assert isinstance(owner.losses[0], ConnectionResetError)


async def test_an_early_answer_is_read_although_writing_failed(plain):
    ours, theirs = plain
    async with running_reactor() as reactor:
        owner = open_channel(reactor, theirs)
        await send_all(ours, b"413")
        ours.close()
        answers = []

        def upload() -> None:
            for _ in range(3):
                owner.channel.write(b"x" * 1000)
                answers.append(owner.losses[:])

        reactor.call(upload)
        await until(lambda: owner.losses)
        assert answers == [[], [], []]  # never from inside write
        assert owner.data == b"413"


async def test_half_close_leaves_the_other_direction(plain):
    ours, theirs = plain
    async with running_reactor() as reactor:
        owner = open_channel(reactor, theirs, half_close=True)
        await send_all(ours, b"question")
        ours.shutdown(socket.SHUT_WR)
        await until(lambda: owner.ends)
        assert (owner.data, owner.losses, owner.channel.eof) == (b"question", [], True)
        reactor.call(owner.channel.write, BIG)
        reactor.call(owner.channel.end)
        assert await read_all(ours) == BIG
        assert owner.losses == []
        assert owner.channel.open
        reactor.call(owner.channel.close)


async def test_nothing_spins_after_both_half_closes(plain):
    ours, theirs = plain
    async with running_reactor() as reactor:
        owner = open_channel(reactor, theirs, half_close=True)
        ours.shutdown(socket.SHUT_WR)
        await until(lambda: owner.ends)
        reactor.call(owner.channel.end)
        await trio.sleep(0.01)
        assert await turns_in(reactor, 0.03) < 5
        reactor.call(owner.channel.close)


async def turns_in(reactor, seconds: float) -> int:
    """How often connections were woken in that time."""
    counter = itertools.count()
    for conn in reactor.conns.values():
        reactor.conns[conn.fd] = _Counted(conn, counter)
    await trio.sleep(seconds)
    for fd, counted in list(reactor.conns.items()):
        reactor.conns[fd] = counted.conn
    return next(counter)


class _Counted:
    def __init__(self, conn, counter) -> None:
        self.conn, self.counter, self.fd = conn, counter, conn.fd

    def ready(self, events: int) -> None:
        next(self.counter)
        self.conn.ready(events)

    def crashed(self, exc: Exception) -> None:
        self.conn.crashed(exc)


async def test_a_paused_channel_without_watch_survives_a_reset_and_does_not_spin(plain):
    ours, theirs = plain
    async with running_reactor() as reactor:
        owner = open_channel(reactor, theirs)
        reactor.call(owner.channel.pause)
        await send_all(ours, b"answer")
        theirs.send(b"x")  # unread at the peer, so that closing resets
        await trio.sleep(0.01)
        ours.close()
        await trio.sleep(0.01)
        assert await turns_in(reactor, 0.03) < 5
        assert owner.losses == []
        reactor.call(owner.channel.resume)
        await until(lambda: owner.losses)
        assert owner.data == b"answer"
        assert isinstance(owner.losses[0], ConnectionResetError)


async def test_a_watched_channel_hears_of_a_hangup_while_paused(pair):
    ours, theirs = pair
    async with running_reactor() as reactor:
        owner = open_channel(reactor, theirs, watch_hangup=True)
        reactor.call(owner.channel.pause)
        ours.close()
        await until(lambda: owner.losses)
        assert isinstance(owner.losses[0], ConnectionResetError)


async def test_a_watched_plain_channel_that_allows_half_close_hears_only_of_a_reset(plain):
    ours, theirs = plain
    async with running_reactor() as reactor:
        owner = open_channel(reactor, theirs, watch_hangup=True, half_close=True)
        reactor.call(owner.channel.pause)
        ours.shutdown(socket.SHUT_WR)
        await trio.sleep(0.02)
        assert owner.losses == []
        reset(ours)
        await until(lambda: owner.losses)
        assert isinstance(owner.losses[0], ConnectionResetError)


async def test_close_notify_then_fin_is_gone_even_where_half_close_is_allowed(tls):
    ours, theirs = tls
    async with running_reactor() as reactor:
        owner = open_channel(reactor, theirs, watch_hangup=True, half_close=True)
        with pytest.raises(ssl.SSLWantReadError):
            ours.unwrap()
        await until(lambda: owner.ends)
        reactor.call(owner.channel.write, b"still heard")
        assert await read_all(ours, 11) == b"still heard"
        assert owner.losses == []
        ours.close()
        await until(lambda: owner.losses)
        assert isinstance(owner.losses[0], ConnectionResetError)


async def test_close_is_a_clean_end_for_the_peer(pair):
    ours, theirs = pair
    async with running_reactor() as reactor:
        owner = open_channel(reactor, theirs)
        reactor.call(owner.channel.write, b"bye")
        reactor.call(owner.channel.close)
        assert await read_all(ours) == b"bye"
        assert owner.losses == []
        assert not owner.channel.open


async def test_close_with_bytes_left_is_not_a_clean_end_for_the_peer(pair):
    ours, theirs = pair
    async with running_reactor() as reactor:
        owner = open_channel(reactor, theirs)
        reactor.call(owner.channel.write, BIG * 4)
        assert owner.channel.out_bytes
        reactor.call(owner.channel.close)
        with pytest.raises(OSError):
            await read_all(ours)


async def test_close_when_flushed_sends_everything_first(pair):
    ours, theirs = pair
    async with running_reactor() as reactor:
        owner = open_channel(reactor, theirs)

        def finish() -> None:
            owner.channel.write(BIG * 4)
            owner.channel.close_when_flushed()

        reactor.call(finish)
        assert owner.channel.open
        assert len(await read_all(ours)) == len(BIG) * 4
        assert not owner.channel.open
        assert owner.losses == []


async def test_abort_resets(plain):
    ours, theirs = plain
    async with running_reactor() as reactor:
        owner = open_channel(reactor, theirs)
        reactor.call(owner.channel.abort)
        with pytest.raises(ConnectionResetError):
            await read_all(ours)


async def test_linger_close_lets_the_answer_through_an_upload(pair):
    """Closing with unread bytes would reset the connection, and the answer on its way with it."""
    ours, theirs = pair
    async with running_reactor() as reactor:
        owner = open_channel(reactor, theirs)

        def refuse(data: bytes) -> None:
            if owner.channel.reading:
                owner.channel.write(b"413 too large")
                owner.channel.linger_close()

        owner.on_received = refuse
        await send_all(ours, BIG[:2_000_000])
        await trio.sleep(0.05)  # a client that is in no hurry to read
        assert await read_all(ours) == b"413 too large"
        assert owner.size < 2_000_000
        ours.close()
        await until(lambda: owner.losses)
        assert owner.losses == [None]


async def test_linger_close_ends_by_its_time_and_by_its_bytes(plain):
    ours, theirs = plain
    async with running_reactor() as reactor:
        owner = open_channel(reactor, theirs)
        reactor.call(owner.channel.linger_close, 0.05)
        await until(lambda: owner.losses, 1)
        assert not owner.channel.open
        assert not reactor.conns
    ours, theirs = tcp_pair()
    async with running_reactor() as reactor:
        owner = open_channel(reactor, theirs)
        reactor.call(owner.channel.linger_close, 60)
        with pytest.raises(OSError):
            await send_all(ours, BIG * 8)
        assert not owner.channel.open
        assert not reactor.timers.heap[0][2].fire
    ours.close()


async def test_linger_close_flushes_a_slow_reader_for_longer_than_it_lingers(pair):
    ours, theirs = pair
    async with running_reactor() as reactor:
        owner = open_channel(reactor, theirs)

        def finish() -> None:
            owner.channel.write(BIG * 4)
            owner.channel.linger_close(0.02)

        reactor.call(finish)
        await trio.sleep(0.1)
        assert len(await read_all(ours)) == len(BIG) * 4


async def test_unread_tells_data_and_ends_apart_from_quiet(pair):
    ours, theirs = pair
    async with running_reactor() as reactor:
        owner = open_channel(reactor, theirs)
        reactor.call(owner.channel.pause)
        assert not owner.channel.unread()
        await send_all(ours, b"x")
        await until(owner.channel.unread)
        reactor.call(owner.channel.resume)
        await until(lambda: owner.size)
        assert not owner.channel.unread()
        reactor.call(owner.channel.pause)
        ours.close()
        await until(owner.channel.unread)


async def test_one_owner_that_raises_loses_its_connection_only():
    a, b = tcp_pair(), tcp_pair()
    crashes = []
    async with trio.open_nursery() as nursery:
        reactor = Reactor()
        reactor.on_crash = crashes.append
        nursery.start_soon(reactor.run)
        bad, good = open_channel(reactor, a[1]), open_channel(reactor, b[1])
        bad.on_received = lambda data: 1 / 0
        good.on_received = lambda data: good.channel.write(data)
        await send_all(a[0], b"x")
        await send_all(b[0], b"y")
        assert await read_all(b[0], 1) == b"y"
        with pytest.raises(ConnectionResetError):
            await read_all(a[0])
        assert isinstance(bad.losses[0], ZeroDivisionError)
        assert good.losses == []
        assert reactor.crashes == 1
        nursery.cancel_scope.cancel()
    for sock in (a[0], b[0]):
        sock.close()
    assert isinstance(good.losses[0], ConnectionAbortedError)


async def test_small_writes_to_a_slow_reader_cost_no_more_than_their_bytes(plain):
    ours, theirs = plain
    async with running_reactor() as reactor:
        owner = open_channel(reactor, theirs)

        def drip() -> None:
            owner.channel.write(BIG * 4)
            for _ in range(50_000):
                owner.channel.write(b"x")

        reactor.call(drip)
        assert len(owner.channel.out) <= 6
        got = await read_all(ours, len(BIG) * 4 + 50_000)
        assert got.endswith(b"x" * 50_000)


async def test_a_callback_that_blocks_is_named_with_its_stack(plain):
    ours, theirs = plain
    reports: list[str] = []
    async with trio.open_nursery() as nursery:
        reactor = Reactor()
        reactor.on_slow = reports.append
        nursery.start_soon(reactor.run)
        await trio.lowlevel.checkpoint()
        owner = open_channel(reactor, theirs)

        def a_filter_that_blocks(data: bytes) -> None:
            time.sleep(0.3)

        owner.on_received = a_filter_that_blocks
        await send_all(ours, b"x")
        await until(lambda: reports)
        assert "a_filter_that_blocks" in reports[0]
        assert reactor.take_lag_max_s() >= 0.3
        nursery.cancel_scope.cancel()
