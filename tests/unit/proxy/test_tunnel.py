"""Tunnels over scripted sockets, in virtual time."""

from collections.abc import Callable
from typing import Any

import pytest
from support.fakesock import FakeReactor, PlainSocket, TlsSocket

from sidecar.proxy.channel import HIGH_BYTES, Channel
from sidecar.proxy.reactor import ERR, HUP, IN, OUT
from sidecar.proxy.tunnel import FLUSH_S, End, Tunnel, TunnelResult
from sidecar.wire.tcp_frames import END, header


class Nobody:
    def received(self, data: bytes) -> None: ...
    def drained(self) -> None: ...
    def ended(self) -> None: ...
    def lost(self, exc: Exception | None) -> None: ...


class Bench:
    """A tunnel between scripted sockets a and b. `now` is its clock."""

    def __init__(self, a: Any, b: Any, prepare: Callable[["Bench"], Any] = lambda bench: None, **options: Any) -> None:
        self.now = 1000.0
        self.socks = {"a": a, "b": b}
        self.reactors = {name: FakeReactor(lambda: self.now) for name in "ab"}
        self.channels = {
            name: Channel(self.reactors[name], self.socks[name], Nobody(), False)  # type: ignore[arg-type]
            for name in "ab"
        }
        prepare(self)
        self.results: list[TunnelResult] = []
        self.timers = self.reactors["a"].timers
        self.tunnel = Tunnel(
            self.channels["a"],
            self.channels["b"],
            timers=self.timers,
            on_done=self.results.append,
            **{"idle_s": 60.0, **options},
        )
        self.settle()

    def settle(self) -> None:
        for _ in range(3):
            for reactor in self.reactors.values():
                reactor.batch_end()

    def event(self, name: str, events: int) -> None:
        mask = self.reactors[name].mask
        assert mask is not None and events & (mask | ERR | HUP), "epoll would not tell"
        self.channels[name].ready(events)
        self.settle()

    def arrive(self, name: str, *steps: Any) -> None:
        for step in steps:
            self.socks[name].reads.append(step)
            self.event(name, IN)

    def sent(self, name: str) -> bytes:
        return b"".join(self.socks[name].sent)

    def at(self, now: float) -> None:
        self.now = now
        self.timers.fire_due()
        self.settle()

    @property
    def end(self) -> End | None:
        assert len(self.results) <= 1
        return self.results[0].end if self.results else None


def test_bytes_go_both_ways_and_are_counted() -> None:
    bench = Bench(PlainSocket(), PlainSocket())
    bench.arrive("a", b"to b")
    bench.arrive("b", b"to a!")
    assert (bench.sent("b"), bench.sent("a")) == (b"to b", b"to a!")
    bench.arrive("a", b"")
    assert (bench.socks["b"].calls, bench.end) == (["fin"], None)
    bench.arrive("b", b"more", b"")
    assert bench.results == [TunnelResult(End.CLEAN, "", 4, 9)]
    assert bench.sent("a") == b"to a!more"


def test_the_framed_side_says_lengths_and_the_end_in_the_stream() -> None:
    bench = Bench(PlainSocket(), TlsSocket(), framed_b=True)
    bench.arrive("a", b"hello", b"")
    assert bench.sent("b") == header(5) + b"hello" + END
    assert bench.socks["b"].calls == []
    bench.arrive("b", header(3) + b"ab", b"c" + END)
    assert bench.sent("a") == b"abc"
    assert bench.end is End.CLEAN
    assert bench.socks["b"].calls == ["close_notify"]
    assert bench.results[0].bytes_from_b == 3


def test_large_chunks_are_framed_without_copying_and_within_the_limit() -> None:
    bench = Bench(PlainSocket(), TlsSocket(), framed_b=True, leftover_a=b"x" * (3 << 20))
    assert bench.sent("b") == (header(1 << 20) + b"x" * (1 << 20)) * 3


def test_back_pressure_pauses_the_source_and_drained_resumes_it() -> None:
    bench = Bench(PlainSocket(), PlainSocket())
    bench.socks["b"].sends = [BlockingIOError()]
    big = b"x" * 65536
    for _ in range(HIGH_BYTES // len(big)):
        bench.arrive("a", big)
    assert not bench.channels["a"].reading
    assert bench.channels["b"].reading
    bench.event("b", OUT)
    assert bench.channels["a"].reading


def test_an_end_waits_for_the_bytes_before_it() -> None:
    bench = Bench(PlainSocket(), PlainSocket())
    bench.socks["b"].sends = [BlockingIOError()]
    bench.arrive("a", b"last words", b"")
    bench.arrive("b", b"")
    assert bench.end is None
    assert bench.socks["b"].calls == []
    bench.event("b", OUT)
    assert bench.socks["b"].calls == ["fin"]
    assert bench.end is End.CLEAN


def test_a_cut_flushes_what_came_before_it_and_is_no_clean_end() -> None:
    bench = Bench(TlsSocket(), PlainSocket(), framed_a=True)
    bench.socks["b"].sends = [BlockingIOError()]
    bench.arrive("a", header(5) + b"hello", ConnectionResetError())
    assert bench.end is None
    bench.event("b", OUT)
    assert bench.sent("b") == b"hello" * 2
    assert (bench.end, bench.results[0].by) == (End.CUT, "a")
    assert bench.socks["b"].calls == ["reset"]


def test_a_cut_towards_a_framed_side_sends_no_end_frame_and_no_close_notify() -> None:
    bench = Bench(PlainSocket(), TlsSocket(), framed_b=True)
    bench.arrive("a", b"hello", ConnectionResetError())
    assert bench.end is End.CUT
    assert END not in bench.sent("b")[4:]
    assert bench.socks["b"].calls == []


def test_close_notify_before_the_end_frame_is_a_cut() -> None:
    bench = Bench(TlsSocket(), PlainSocket(), framed_a=True)
    bench.arrive("a", header(5) + b"hel", b"")
    assert bench.end is End.CUT
    bench = Bench(TlsSocket(), PlainSocket(), framed_a=True)
    bench.arrive("a", END, b"")  # its own direction ended, but it has not waited for ours
    assert bench.end is End.CUT


@pytest.mark.parametrize("silent_from", [0.0, 59.0])
def test_silence_ends_it_and_traffic_puts_that_off(silent_from: float) -> None:
    bench = Bench(PlainSocket(), PlainSocket())
    if silent_from:
        bench.now += silent_from
        bench.arrive("b", b"x")
    bench.at(1000 + silent_from + 59.9)
    assert bench.end is None
    bench.at(1000 + silent_from + 60.0)
    assert bench.end is End.IDLE
    for sock in bench.socks.values():
        assert sock.calls == ["reset"]
    assert bench.timers.heap == [] or bench.timers.heap[0][2].fire is None


def test_a_reader_that_drinks_slowly_is_not_silent() -> None:
    bench = Bench(PlainSocket(), PlainSocket())
    bench.socks["b"].sends = [BlockingIOError()]
    bench.arrive("a", b"x" * 50_000)
    for _ in range(5):
        bench.socks["b"].sends = [1000, BlockingIOError()]
        bench.event("b", OUT)
        bench.at(bench.now + 60)
        assert bench.end is None
    bench.at(bench.now + 60)
    assert bench.end is End.IDLE


def test_the_last_flush_has_a_limit() -> None:
    bench = Bench(PlainSocket(), PlainSocket())
    bench.socks["b"].sends = [BlockingIOError()] * 5
    bench.arrive("a", b"never read", b"")
    bench.arrive("b", b"")
    bench.at(bench.now + FLUSH_S)
    assert bench.end is None  # the buffer was seen to change once
    bench.at(bench.now + FLUSH_S)
    assert bench.end is End.CUT
    assert bench.socks["b"].calls == ["reset"]


def test_leftovers_go_first() -> None:
    bench = Bench(PlainSocket(), PlainSocket(), leftover_a=b"head", leftover_b=b"start")
    bench.arrive("a", b"er")
    assert (bench.sent("b"), bench.sent("a")) == (b"header", b"start")


def test_a_paused_channel_is_resumed_and_an_end_told_earlier_counts() -> None:
    def half_closed(bench: Bench) -> None:
        bench.channels["a"].half_close = True
        bench.arrive("a", b"")
        bench.channels["b"].pause()

    bench = Bench(PlainSocket(), PlainSocket(), half_closed)
    assert bench.socks["b"].calls == ["fin"]
    assert bench.channels["b"].reading
    bench.arrive("b", b"answer", b"")
    assert bench.end is End.CLEAN


def test_the_result_never_comes_before_the_maker_has_the_tunnel() -> None:
    results: list[TunnelResult] = []
    reactor = FakeReactor()
    a, b = (Channel(each, PlainSocket(), Nobody(), False) for each in (reactor, FakeReactor()))  # type: ignore[arg-type]
    b.close()
    tunnel = Tunnel(a, b, timers=reactor.timers, idle_s=60.0, on_done=results.append)
    assert tunnel.done
    assert tunnel.on_done is None
    assert results == []
    reactor.batch_end()
    assert len(results) == 1


def test_a_channel_that_has_gone_meanwhile_is_a_cut() -> None:
    bench = Bench(PlainSocket(), PlainSocket(), lambda bench: bench.channels["b"].close())
    assert (bench.end, bench.results[0].by) == (End.CUT, "b")


def test_closing_tells_once_and_resets_both() -> None:
    bench = Bench(PlainSocket(), TlsSocket(), framed_b=True)
    bench.tunnel.close()
    bench.tunnel.close()
    assert bench.end is End.CLOSED
    assert [sock.calls for sock in bench.socks.values()] == [["reset"], ["reset"]]
