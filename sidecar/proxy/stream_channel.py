"""One stream of an HTTP/2 connection as a channel, for a Tunnel (RFC 8441): its DATA both ways.

END_STREAM is the end of a direction, RST_STREAM with CANCEL a cut. Whoever owns the connection (the Link) makes this
the stream's owner and tells it: `news` when the codec has some of the stream, `flushed` after a flush while it is in
`waiting`, `gone` when the connection ends. Must not know sockets or what the bytes mean.
Invariants: as those of `Channel`, which it stands for: `lost` comes at most once, after everything that was readable;
a cut stream never looks like a clean end; what is unread is bounded by the stream's window, since only what the owner
took is given back to the peer; the stream is let go of (`forget`) exactly once.
"""

from typing import Any, Protocol

from sidecar.wire.http2 import ErrorCode, Http2, Http2Error, Stream, name_of

from .channel import NOBODY, Data, Owner

HIGH_BYTES, LOW_BYTES = 64 * 1024, 16 * 1024  # of one stream; a connection has many


class Link(Protocol):
    """The connection, as far as its streams need it."""

    codec: Http2
    waiting: dict[Any, None]
    """Who is told `flushed` after each flush, until it takes itself out."""

    def mark(self) -> None:
        """Something is to be sent: flush at the end of the batch."""

    def forget(self, stream: Stream) -> None:
        """A tunnel's stream is over, for its channel."""


class StreamChannel:
    """Begins paused. `leftover` in the stream's Message is delivered first, by `resume`."""

    __slots__ = (
        "_before", "_delivering", "_dropping", "_ended_out", "_full", "eof", "fingerprint", "half_close", "link",
        "notify_empty", "open", "owner", "peer", "reactor", "reading", "stream", "watch_hangup",
    )  # fmt: skip

    tls = False  # as for what half-close means

    def __init__(self, link: Link, stream: Stream, reactor: Any, *, peer: str = "", fingerprint: str = "") -> None:
        """`peer` and `fingerprint`: whom the connection's other end has proven to be."""
        self.link, self.stream, self.reactor = link, stream, reactor
        self.peer, self.fingerprint = peer, fingerprint
        self.owner: Owner = NOBODY
        self.open = True
        self.reading = False
        self.eof = False  # the peer's end has been told
        self.half_close = self.watch_hangup = self.notify_empty = False
        self._before = 0  # bytes queued, when last looked at
        self._full = False  # `write` has said False
        self._ended_out = False
        self._dropping = False  # only what is queued still has to leave
        self._delivering = False
        stream.owner = self

    @property
    def out_bytes(self) -> int:
        return self.link.codec.queued_bytes(self.stream) if self.open or self._dropping else 0

    # -- for the owner

    def write(self, data: Data) -> bool:
        if not self.open or not data:
            return True
        if self._ended_out:
            raise RuntimeError("write after end()")
        codec = self.link.codec
        codec.send(self.stream, bytes(data))
        self._watch()
        self._before = queued = codec.queued_bytes(self.stream)
        if queued >= HIGH_BYTES:
            self._full = True
        return not self._full

    def pause(self) -> None:
        self.reading = False

    def resume(self) -> None:
        if not self.reading and self.open and not self.eof:
            self.reading = True
            if not self._delivering:
                self._delivering = True
                self.reactor.soon.append(self._resumed)  # not a call: whoever resumes is not done yet

    def end(self) -> None:
        """Half-close."""
        if self.open and not self._ended_out:
            self._ended_out = True
            self.link.codec.send(self.stream, b"", True)
            self._watch()

    def close(self) -> None:
        """Silently. Bytes of ours that have not left make it a cut, which must not look like an end."""
        if self.open:
            if self.link.codec.queued_bytes(self.stream):
                self.cut()
            else:
                self._finish()

    def linger_close(self, timeout_s: float = 0.0) -> None:
        """Flush, then end; what the peer still sends is discarded. The peer's window bounds the flush, and its stream
        ends with the connection at the latest."""
        if self.open:
            self._finish()

    def cut(self) -> None:
        """RFC 8441, section 5: what a reset is to TCP, RST_STREAM with CANCEL is here."""
        if self.open or self._dropping:
            self.link.codec.reset(self.stream, ErrorCode.CANCEL)
            self.link.mark()
            self._dismiss()

    abort = cut

    # -- from the connection

    def news(self) -> None:
        """Something has come, or the stream has ended."""
        if self._dropping:
            self._discard()
        elif self.open and not self._delivering:
            self._deliver()

    def flushed(self) -> None:
        """The codec has given what it may send now."""
        queued = self.link.codec.queued_bytes(self.stream)
        before, self._before = self._before, queued
        if not queued:
            self.link.waiting.pop(self, None)
        if self._dropping:
            if not queued:
                self._drop()
            return
        room = self._full and queued <= LOW_BYTES
        if room:
            self._full = False
        if room or (self.notify_empty and before and not queued):
            self.owner.drained()

    def gone(self, exc: Exception | None) -> None:
        """The connection is over: of what has come nothing more is told, since it may not be all. `exc` says why."""
        if self.open:
            self._lost(exc or ConnectionResetError("the connection that carried the stream is over"))
        elif self._dropping:
            self._dismiss()

    def crashed(self, exc: Exception) -> None:
        """Our own failure on this stream."""
        owner, was_open = self.owner, self.open
        self.cut()
        if was_open:
            owner.lost(exc)

    # -- inside

    def _watch(self) -> None:
        self.link.waiting[self] = None
        self.link.mark()

    def _resumed(self) -> None:
        self._delivering = False
        if self.open:
            self._deliver()

    def _deliver(self) -> None:
        stream, codec = self.stream, self.link.codec
        m = stream.m
        if m is not None and m.body and self.reading:
            self.owner.received(m.take())
        if not self.open:
            return
        if self.reading and stream.unread_bytes:
            codec.consumed(stream)
            self.link.mark()
        if stream.error is not None:
            if not (m is not None and m.body) or stream.by_peer:
                self._lost(
                    ConnectionResetError(f"the stream was reset by the peer ({name_of(stream.error)})")
                    if stream.by_peer
                    else Http2Error(stream.error, stream.detail or "the stream has ended")
                )
        elif stream.ended and self.reading and not (m is not None and m.body):
            codec.consumed(stream)
            self.eof, self.reading = True, False
            if self.half_close:
                self.owner.ended()
            else:
                self._lost(None)

    def _lost(self, exc: Exception | None) -> None:
        owner = self.owner
        if exc is None:
            self._finish()
        else:
            if self.stream.error is None:
                self.link.codec.reset(self.stream, ErrorCode.CANCEL)
                self.link.mark()
            self._dismiss()
        owner.lost(exc)

    def _finish(self) -> None:
        """Our direction ends with what is queued; the peer's is of no interest any more."""
        codec, stream = self.link.codec, self.stream
        if not self._ended_out:
            self._ended_out = True
            codec.send(stream, b"", True)
        self.open = self.reading = False
        self.owner = NOBODY
        self._dropping = True
        self._discard()
        if self._dropping:
            self._watch()

    def _discard(self) -> None:
        stream = self.stream
        if stream.m is not None:
            stream.m.body.clear()
        self.link.codec.consumed(stream)
        if stream.closed or stream.error is not None:
            self._dismiss()

    def _drop(self) -> None:
        """All of ours has gone. A peer that has not ended is told that it need not go on (RFC 9113, section 8.1)."""
        codec, stream = self.link.codec, self.stream
        if not stream.ended and not stream.closed:
            codec.reset(stream, ErrorCode.NO_ERROR if codec.server else ErrorCode.CANCEL)
            self.link.mark()
        self._dismiss()

    def _dismiss(self) -> None:
        self.open = self.reading = self._dropping = False
        self.owner = NOBODY
        self.link.waiting.pop(self, None)
        if self.stream.owner is self:
            self.stream.owner = None
            if self.stream.m is not None:
                self.stream.m.body.clear()
            self.link.codec.consumed(self.stream)
            self.link.forget(self.stream)
