"""A stream as a channel, on a pair of real codecs: what a Tunnel relies on."""

from collections.abc import Callable
from typing import Any

import pytest
from support.fakesock import FakeReactor

from sidecar.proxy.stream_channel import HIGH_BYTES, StreamChannel
from sidecar.wire.http2 import ErrorCode, Http2, Stream, open_codec

FIELDS = [
    (b":method", b"CONNECT"), (b":protocol", b"websocket"), (b":scheme", b"http"), (b":path", b"/"),
    (b":authority", b"a"),
]  # fmt: skip


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


class Rig:
    """A server's stream as a channel; the client is the bare codec."""

    def __init__(self, engine: str) -> None:
        self.client: Http2 = open_codec(False, engine=engine)
        self.codec: Http2 = open_codec(True, engine=engine)
        self.waiting: dict[Any, None] = {}
        self.forgotten: list[Stream] = []
        self.reactor = FakeReactor()
        self.move()
        self.far = Stream(method=b"CONNECT")
        self.client.request(self.far, FIELDS, False)
        self.move()
        self.stream = next(iter(self.codec.streams.values()))
        assert self.stream.m is not None
        self.codec.respond(self.stream, [(b":status", b"200")], False)
        self.channel = StreamChannel(self, self.stream, self.reactor)
        self.owner = Owner()
        self.channel.owner = self.owner
        self.channel.half_close = True
        self.move()

    def mark(self) -> None:
        pass

    def forget(self, stream: Stream) -> None:
        self.forgotten.append(stream)

    def move(self) -> None:
        """Both sides send what they may, until nothing moves."""
        while True:
            self.reactor.batch_end() if hasattr(self, "far") else None
            up, down = self.client.to_send(), self.codec.to_send()
            for each in list(self.waiting):
                each.flushed()
            self.codec.receive(up, 0.0)
            self.client.receive(down, 0.0)
            for stream in self.codec.take_news():
                if stream.owner is not None:
                    stream.owner.news()
            self.client.take_news()
            if not up and not down:
                return

    def says(self, data: bytes, end: bool = False) -> None:
        self.client.send(self.far, data, end)
        self.move()

    def got(self) -> bytes:
        assert self.far.m is not None
        return self.far.m.take()


@pytest.fixture(params=["ngh2", "h2"])
def rig(request: pytest.FixtureRequest) -> Rig:
    return Rig(request.param)


def test_it_begins_paused_and_delivers_in_order(rig: Rig) -> None:
    rig.says(b"one")
    assert rig.owner.heard == []
    rig.channel.resume()
    rig.move()
    rig.says(b"two", end=True)
    assert rig.owner.heard == [b"one", b"two", "ended"] and rig.channel.eof and rig.channel.open


def test_what_is_unread_is_bounded_by_the_window(rig: Rig) -> None:
    rig.channel.resume()
    rig.owner.then = rig.channel.pause
    rig.says(b"x" * 500_000)
    assert sum(map(len, rig.owner.heard)) <= 65536 and rig.stream.unread_bytes <= 65536
    for _ in range(40):
        rig.channel.resume()
        rig.move()
    assert sum(map(len, rig.owner.heard)) == 500_000


def test_a_full_channel_says_so_and_drains(rig: Rig) -> None:
    assert not rig.channel.write(b"y" * (HIGH_BYTES + 200_000))
    rig.move()
    assert rig.owner.heard == [] and rig.channel.out_bytes
    taken = 0
    while rig.channel.out_bytes:
        taken += len(rig.got())
        rig.client.consumed(rig.far)
        rig.move()
    taken += len(rig.got())
    assert taken == HIGH_BYTES + 200_000 and rig.owner.heard == ["drained"] and not rig.waiting


def test_empty_is_told_where_it_is_asked_for(rig: Rig) -> None:
    rig.channel.notify_empty = True
    rig.channel.write(b"z")
    rig.move()
    assert rig.owner.heard == ["drained"] and rig.got() == b"z"


def test_both_ends_and_a_close_are_clean(rig: Rig) -> None:
    rig.channel.resume()
    rig.channel.write(b"last")
    rig.channel.end()
    rig.says(b"", end=True)
    rig.channel.close()
    rig.move()
    assert rig.got() == b"last" and rig.far.ended and rig.far.error is None and rig.far.closed
    assert rig.forgotten == [rig.stream] and not rig.channel.open and not rig.waiting
    with pytest.raises(StopIteration):
        next(iter(rig.codec.streams))


def test_a_close_with_bytes_that_have_not_left_is_a_cut(rig: Rig) -> None:
    rig.channel.write(b"y" * 200_000)
    rig.channel.close()
    rig.move()
    assert rig.far.error == ErrorCode.CANCEL and not rig.far.ended and rig.forgotten == [rig.stream]


def test_lingering_flushes_and_discards_what_comes(rig: Rig) -> None:
    rig.channel.write(b"y" * 200_000)
    rig.channel.linger_close()
    taken = 0
    for _ in range(20):
        rig.says(b"x" * 20_000)
        taken += len(rig.got())
        rig.client.consumed(rig.far)
        rig.move()
    assert taken + len(rig.got()) == 200_000 and rig.far.ended
    assert rig.owner.heard == [] and rig.forgotten == [rig.stream] and rig.stream.unread_bytes == 0


@pytest.mark.parametrize("paused", [True, False])
def test_a_reset_is_a_cut(rig: Rig, paused: bool) -> None:
    if not paused:
        rig.channel.resume()
    rig.says(b"some")
    rig.client.reset(rig.far, ErrorCode.CANCEL)
    rig.move()
    assert rig.owner.heard == (["cut"] if paused else [b"some", "cut"])
    assert rig.forgotten == [rig.stream] and not rig.channel.open


def test_a_cut_is_a_reset(rig: Rig) -> None:
    rig.channel.cut()
    rig.move()
    assert rig.far.error == ErrorCode.CANCEL and rig.owner.heard == [] and rig.forgotten == [rig.stream]
    rig.channel.write(b"nobody hears")
    rig.channel.close()
    rig.channel.resume()
    rig.move()


def test_the_end_of_the_connection_is_a_cut(rig: Rig) -> None:
    rig.channel.resume()
    rig.channel.gone(None)
    assert rig.owner.heard == ["cut"] and rig.forgotten == [rig.stream]
    rig.channel.gone(None)
    assert rig.owner.heard == ["cut"]


def test_nothing_is_written_after_the_end(rig: Rig) -> None:
    rig.channel.end()
    with pytest.raises(RuntimeError):
        rig.channel.write(b"more")
