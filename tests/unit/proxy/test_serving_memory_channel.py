"""What the data path relies on, promised by the real Channel (on a scripted socket) and by the MemoryChannel alike."""

from collections.abc import Callable
from typing import Any

import pytest
from support.fakesock import FakeReactor, PlainSocket
from support.memory_net import MemoryChannel

from sidecar.proxy.channel import HIGH_BYTES, LOW_BYTES, Channel
from sidecar.proxy.reactor import HUP, IN, OUT, RDHUP


class Owner:
    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.then: Callable[[], Any] = lambda: None

    def received(self, data: bytes) -> None:
        self.heard.append(data)
        self.then()

    def drained(self) -> None:
        self.heard.append("drained")

    def ended(self) -> None:
        self.heard.append("ended")

    def lost(self, exc: Exception | None) -> None:
        self.heard.append("cut" if exc else "lost")


class Real:
    """The peer's side, played by scripts."""

    def __init__(self, **options: Any) -> None:
        self.owner, self.reactor, self.sock = Owner(), FakeReactor(), PlainSocket()
        self.channel: Any = Channel(self.reactor, self.sock, self.owner, **options)  # type: ignore[arg-type]

    def event(self, mask: int) -> None:
        if self.reactor.mask is not None and mask & (self.reactor.mask | HUP):
            self.channel.ready(mask)
        self.reactor.batch_end()

    def says(self, *what: Any) -> None:
        ends = {"end": b"", "reset": ConnectionResetError()}
        self.sock.reads += [ends.get(part, part) if isinstance(part, str) else part for part in what]
        for part in what:
            self.event(IN | (RDHUP if isinstance(part, str) else 0) | (HUP if part == "reset" else 0))

    def batch_end(self) -> None:
        self.reactor.batch_end()
        if self.channel.open and self.channel.reading and self.sock.reads:
            self.event(IN)

    def takes(self, count: int) -> None:
        """From now on only so many bytes more."""
        self.sock.sends = [count, BlockingIOError()] if count else [BlockingIOError()]
        if self.channel.out_bytes:
            self.event(OUT)

    def takes_all(self) -> None:
        self.sock.sends = []
        self.event(OUT)

    @property
    def closed(self) -> str | None:
        return None if self.channel.open else "reset" if "reset" in self.sock.calls else "close"


class Memory:
    def __init__(self, **options: Any) -> None:
        from support.memory_net import Peer

        self.owner, self.reactor = Owner(), FakeReactor()

        class Nets:
            channels: set[Any] = set()

            @staticmethod
            def call(fn: Callable[..., Any], *args: Any) -> None:
                fn(*args)
                self.reactor.batch_end()

        self.peer = Peer(Nets())  # type: ignore[arg-type]
        self.channel: Any = MemoryChannel(self.reactor, self.peer, self.owner, **options)

    def says(self, *what: Any) -> None:
        for part in what:
            self.peer._tell(part)

    def batch_end(self) -> None:
        self.reactor.batch_end()

    def takes(self, count: int) -> None:
        self.peer.window = 0
        self.peer.accept(count)

    def takes_all(self) -> None:
        self.peer.accept()

    @property
    def closed(self) -> str | None:
        return self.peer.ended


BOTH = pytest.mark.parametrize("make", [Real, Memory])


@BOTH
def test_what_is_said_is_heard_in_order(make):
    rig = make(watch_hangup=False)
    rig.says(b"one", b"two", "end")
    assert rig.owner.heard == [b"one", b"two", "lost"] and not rig.channel.open


@BOTH
def test_a_reset_is_a_cut(make):
    rig = make(watch_hangup=True)
    rig.says("reset")
    assert rig.owner.heard == ["cut"]


@BOTH
def test_nothing_is_heard_while_paused_and_everything_after(make):
    rig = make(watch_hangup=False)
    rig.channel.pause()
    rig.says(b"later", "end")
    assert rig.owner.heard == []
    rig.channel.resume()
    rig.batch_end()
    rig.batch_end()
    assert rig.owner.heard == [b"later", "lost"]


@BOTH
def test_a_caller_that_goes_away_is_noticed_while_paused_if_asked(make):
    rig = make(watch_hangup=True)
    rig.channel.pause()
    rig.says("end")
    assert rig.owner.heard == ["cut"] and not rig.channel.open


@BOTH
def test_half_close_is_told_to_who_asked(make):
    rig = make(watch_hangup=True)
    rig.channel.half_close = True
    rig.says(b"x", "end")
    assert rig.owner.heard == [b"x", "ended"]
    assert rig.channel.open and rig.channel.eof and not rig.channel.reading
    rig.channel.resume()
    assert not rig.channel.reading


@BOTH
def test_nothing_is_heard_after_close(make):
    rig = make(watch_hangup=True)
    rig.owner.then = rig.channel.close
    rig.says(b"one", b"two", "end")
    assert rig.owner.heard == [b"one"] and rig.closed == "close"


@BOTH
def test_high_and_low_marks(make):
    rig = make(watch_hangup=False)
    rig.takes(0)
    assert rig.channel.write(b"x" * (HIGH_BYTES - 1))
    assert not rig.channel.write(b"x")
    rig.takes(HIGH_BYTES - 1 - LOW_BYTES)
    assert rig.owner.heard == []
    rig.takes(1)
    assert rig.owner.heard == ["drained"]
    rig.takes_all()
    assert rig.owner.heard == ["drained"] and rig.channel.out_bytes == 0


@BOTH
@pytest.mark.parametrize("unsent", [True, False])
def test_close_with_bytes_left_is_a_cut(make, unsent):
    rig = make(watch_hangup=False)
    if unsent:
        rig.takes(0)
        rig.channel.write(b"x")
    rig.channel.close()
    assert rig.closed == ("reset" if unsent else "close")


@BOTH
def test_a_crash_is_a_cut_and_told_once(make):
    rig = make(watch_hangup=False)
    rig.channel.crashed(ValueError())
    rig.channel.crashed(ValueError())
    assert rig.owner.heard == ["cut"] and rig.closed == "reset"


@BOTH
def test_a_closed_channel_ignores_everything(make):
    rig = make(watch_hangup=False)
    rig.channel.close()
    for use in (rig.channel.close, rig.channel.abort, rig.channel.cut, rig.channel.pause, rig.channel.resume):
        use()
    assert rig.channel.write(b"x") and rig.channel.unread()
    rig.channel.linger_close()
    assert rig.owner.heard == []
