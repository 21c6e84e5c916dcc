"""Opaque bytes both ways between two channels: TCP, and connections or HTTP/2 streams that have been upgraded.

Each direction has its own end. Plain sides and streams half-close; a framed side (ALPN `pillion-tcp`) says the end in
the stream; a bare TLS side (after `Upgrade` over mutual TLS) cannot, so there the end of one direction ends the tunnel
once what has been received is flushed.
Must not know HTTP, policy or who the peers are. Invariants: a direction is ended only after its last byte has been
written; a cut of one side resets the other and is never turned into a clean end; what is buffered is bounded by one
read and the channel's high mark, each way; `on_done` is called exactly once, when nothing more will move, and never
from inside the constructor.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from sidecar.wire.tcp_frames import END, FRAME_BYTES_MAX, FrameDecoder, FrameError, header

from .channel import HIGH_BYTES, RECORD_BYTES, Channel, Data
from .stream_channel import StreamChannel
from .timers import Timer, Timers

AnyChannel = Channel | StreamChannel

FLUSH_S = 20.0  # after both ends, for what is still buffered; the idle timeout where that is shorter


class End(Enum):
    """How a tunnel ended."""

    CLEAN = "clean"  # both directions have ended and are flushed
    IDLE = "idle"  # nothing moved for too long
    CUT = "cut"  # a side was reset, broke the framing, or went away before its end
    CLOSED = "closed"  # by us: a drain, a policy


@dataclass(frozen=True, slots=True)
class TunnelResult:
    """`bytes_from_a` counts payload received from side a. `by` is the side that caused the end: "a", "b" or ""."""

    end: End
    by: str
    bytes_from_a: int
    bytes_from_b: int
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class _Verdict:
    end: End
    by: str = ""
    error: Exception | None = None


CLEANLY = _Verdict(End.CLEAN)


class _Side:
    """The owner of one channel."""

    __slots__ = ("bytes_in", "channel", "decoder", "ended_in", "framed", "name", "other", "tunnel")

    def __init__(self, tunnel: "Tunnel", name: str, channel: AnyChannel, framed: bool) -> None:
        self.tunnel = tunnel
        self.name = name
        self.channel = channel
        self.framed = framed
        self.decoder = FrameDecoder() if framed else None
        self.ended_in = False  # the peer of this side will send nothing more
        self.bytes_in = 0
        self.other: _Side

    # -- from the channel
    def received(self, data: Data) -> None:
        tunnel, decoder = self.tunnel, self.decoder
        tunnel.timer.due = tunnel.timers.clock() + tunnel.idle_s
        if decoder is None:
            self.bytes_in += len(data)
            if not self.other.put(data):
                self.channel.pause()
            return
        try:
            pieces = decoder.feed(bytes(data) if isinstance(data, memoryview) else data)
        except FrameError as exc:
            tunnel.finish(_Verdict(End.CUT, self.name, exc))
            return
        room = True
        for piece in pieces:
            self.bytes_in += len(piece)
            room = self.other.put(piece)
        if not room:
            self.channel.pause()
        if decoder.ended and not self.ended_in:
            self.over()

    def drained(self) -> None:
        tunnel = self.tunnel
        tunnel.timer.due = tunnel.timers.clock() + tunnel.idle_s
        if tunnel.verdict is None or not tunnel.verdict.error:
            self.other.channel.resume()
        tunnel.settle()

    def ended(self) -> None:
        if self.framed:
            self.lost(None)  # its end frame has not come, or the peer gave up the other direction
        else:
            self.over()

    def lost(self, exc: Exception | None) -> None:
        tunnel = self.tunnel
        if tunnel.done:
            return
        if exc is None and not self.framed and not self.ended_in:
            self.over()
        elif exc is None and self.ended_in and self.other.ended_in:
            tunnel.settle()
        else:
            self.other.channel.pause()
            error = exc if exc is not None else ConnectionResetError("the stream was cut before its end")
            tunnel.flush(_Verdict(End.CUT, self.name, error))

    # -- from the other side
    def put(self, data: Data) -> bool:
        channel = self.channel
        if not self.framed:
            return channel.write(data)
        size = len(data)
        if size <= RECORD_BYTES:
            return channel.write(b"".join((header(size), data)))  # one record
        room = True
        view = memoryview(data)
        for at in range(0, size, FRAME_BYTES_MAX):
            part = view[at : at + FRAME_BYTES_MAX]
            channel.write(header(len(part)))
            room = channel.write(part)
        return room

    def over(self) -> None:
        """Its peer will send nothing more: tell the other side, after all that has been written there."""
        self.ended_in = True
        other, tunnel = self.other, self.tunnel
        if other.framed:
            other.channel.write(END)
        elif not other.channel.tls:
            other.channel.end()
        if other.ended_in or not self.channel.open or (other.channel.tls and not other.framed):
            tunnel.flush(CLEANLY)


class Tunnel:
    """Takes over two channels. Make it inside the reactor; what a codec had read beyond its message goes in as
    `leftover_a` and `leftover_b` (received from that side). `framed_a`: side a speaks `pillion-tcp`."""

    def __init__(
        self,
        a: AnyChannel,
        b: AnyChannel,
        *,
        timers: Timers,
        idle_s: float,
        on_done: Callable[[TunnelResult], object],
        framed_a: bool = False,
        framed_b: bool = False,
        leftover_a: bytes = b"",
        leftover_b: bytes = b"",
    ) -> None:
        self.timers = timers
        self.idle_s = idle_s
        self.on_done: Callable[[TunnelResult], object] | None = on_done  # None: it has ended
        self._begun = False
        self.verdict: _Verdict | None = None  # set: only flushing is left
        self._seen = (0, 0)
        self.timer = Timer(timers, self._due)
        self.timer.set(timers.clock() + idle_s)
        self.a, self.b = _Side(self, "a", a, framed_a), _Side(self, "b", b, framed_b)
        self.a.other, self.b.other = self.b, self.a
        sides = (self.a, self.b)
        for side in sides:
            channel = side.channel
            channel.owner = side
            channel.half_close = not channel.tls
            channel.watch_hangup = False  # what a paused side sent before it went is still wanted
        for side, leftover in zip(sides, (leftover_a, leftover_b), strict=True):
            if leftover and side.channel.open:
                side.received(leftover)
        for side in sides:
            self._begin(side)
        self._begun = True

    @property
    def done(self) -> bool:
        return self.on_done is None

    def close(self) -> None:
        """By us: both sides are reset, since neither has come to its end."""
        self.finish(_Verdict(End.CLOSED))

    # -- inside
    def _begin(self, side: _Side) -> None:
        channel = side.channel
        if self.done:
            return
        if channel.eof:
            side.ended()
        elif not channel.open:
            side.lost(ConnectionResetError("closed before the tunnel began"))
        elif side.other.channel.out_bytes < HIGH_BYTES:
            channel.resume()

    def flush(self, verdict: _Verdict) -> None:
        """It is decided how this ends, but what is buffered goes out first."""
        if self.done:
            return
        if self.verdict is None or self.verdict.end is End.CLEAN:
            self.verdict = verdict
            self.timer.set(self.timers.clock() + min(FLUSH_S, self.idle_s))
            for side in (self.a, self.b):
                side.channel.notify_empty = True
        self.settle()

    def settle(self) -> None:
        if self.verdict is not None and not (self.a.channel.out_bytes or self.b.channel.out_bytes):
            self.finish(self.verdict)

    def finish(self, verdict: _Verdict) -> None:
        on_done = self.on_done
        if on_done is None:
            return
        self.on_done = None
        self.timer.close()
        for side in (self.a, self.b):
            channel = side.channel
            if verdict.end is End.CUT:
                channel.cut()
            elif verdict.end is not End.CLEAN:
                channel.abort()
            elif side.ended_in:
                channel.close()
            else:
                channel.linger_close()  # it may still be sending, and a reset would take our last bytes from it
        result = TunnelResult(verdict.end, verdict.by, self.a.bytes_in, self.b.bytes_in, verdict.error)
        if self._begun:
            on_done(result)
        else:  # whoever is making us does not have us yet
            self.a.channel.reactor.soon.append(lambda: on_done(result))

    def _due(self) -> None:
        """Silence, or a flush that takes too long. Bytes that leave a buffer are no silence."""
        seen = (self.a.channel.out_bytes, self.b.channel.out_bytes)
        if seen != self._seen:
            self._seen = seen
            self.timer.set(self.timers.clock() + (min(FLUSH_S, self.idle_s) if self.verdict else self.idle_s))
        elif self.verdict is not None:
            self.finish(
                _Verdict(End.CUT, self.verdict.by, self.verdict.error or TimeoutError("the peer does not read"))
            )
        else:
            self.finish(_Verdict(End.IDLE))
