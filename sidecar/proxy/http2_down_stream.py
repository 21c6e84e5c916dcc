"""A request on a caller's HTTP/2 connection: what a Serving has as its `down`.

The Serving drives it as it drives a connection of HTTP/1.1. Must not know routes, policy or the socket. Invariants: a
Serving's Message changes only when the Serving is told; a stream that is paused costs its window and nothing else; what
waits for a caller that does not read is bounded, and ends after STALL_S without progress; an answer that was cut short
ends with RST_STREAM, never like a whole one.
"""

from typing import TYPE_CHECKING, Any

from sidecar.policy.outcome import Outcome
from sidecar.wire.http1 import Message
from sidecar.wire.http2 import ErrorCode, Fields, Stream
from sidecar.wire.http2_heads import announces_trailers, response_fields
from sidecar.wire.websocket import KEY_BITS, WEBSOCKET, complete_request, without_handshake

from . import answers
from .channel import HIGH_BYTES, TIGHT_BYTES, WIDE_BYTES_MAX, share
from .serving import Serving
from .stream_channel import StreamChannel
from .timers import OFF, Timer

if TYPE_CHECKING:
    from .http2_down import Http2Downstream

END_S = 5.0  # for the END_STREAM of a request all of whose content has come, once it has been answered
STALL_S = 60.0  # without progress of an answer that is whole, before its stream is given up
STREAM_HIGH_BYTES, STREAM_LOW_BYTES = 64 * 1024, 16 * 1024  # of one stream's answer; above, its source is paused
BACKLOG_BYTES_MAX = 8 << 20  # of all answers on a connection, likewise; more than a hundred streams at their mark


def _nothing() -> None:
    """What a timer fires that no stream has."""


class DownStream:
    """One request on such a connection, as a Serving sees it. `stream` is the codec's half."""

    __slots__ = (
        "conn", "ended_out", "flushing", "held_back", "held_bytes", "missing", "paused", "relayed", "released", "rest",
        "serving", "stream", "timer", "wide_bytes",
    )  # fmt: skip

    def __init__(self, conn: "Http2Downstream", stream: Stream) -> None:
        self.conn, self.stream = conn, stream
        stream.owner = self
        self.serving: Serving | None = None
        self.rest: Message | None = None  # what is still to come of the request
        self.paused = self.released = False
        self.held_bytes = self.wide_bytes = 0  # came while it was paused; its window beyond the first one
        self.held_back = False  # not served before its end is here
        self.relayed = False  # the head of the answer has gone
        self.ended_out = False  # all of the answer has been given to the codec
        self.flushing = 0  # of an answer that is whole: bytes that waited, when last looked at; -1 awaits END_STREAM
        self.missing = -1  # content still to come of a request that says its length
        spare = conn.spare
        if spare:
            self.timer = spare.pop()
            self.timer.fire = self._due
        else:
            self.timer = Timer(conn.world.timers, self._due)

    @property
    def peer(self) -> str:
        return self.conn.peer

    @property
    def address(self) -> str:
        return self.conn.address

    @property
    def last(self) -> bool:
        """Whether the connection takes no further requests."""
        return self.conn.leaving

    @last.setter
    def last(self, last: bool) -> None:
        if last:
            self.conn.leave()

    def start(self) -> None:
        conn, stream = self.conn, self.stream
        m = stream.m
        assert m is not None
        if m.length == 0 and not stream.ended and not m.extended:
            # Whole by its own words; but content may follow, and nobody is to have acted on it then.
            self.held_back = True
            conn.streams[self] = None
            self.timer.set(conn.world.reactor.now + END_S)
            return
        if m.extended or not stream.ended:
            # What follows gathers in a Message of its own, so that the Serving's does not change behind its back.
            self.rest = stream.m = Message()
            if m.extended:
                m.body, self.rest.body = self.rest.body, m.body  # belongs to the tunnel
                if m.upgrade == WEBSOCKET:
                    complete_request(m, conn.world.getrandbits(KEY_BITS))
            elif m.length is not None:
                self.missing = m.length - sum(map(len, m.body))
                m.chunked = announces_trailers(m)
        elif m.trailers and m.length is not None:
            m.chunked = True
        now = conn.world.reactor.now
        conn.streams[self] = None
        self.serving = serving = Serving(conn.world, conn.entry, self, m, now)
        serving.start(now)
        if stream.unread_bytes and not m.extended:
            if self.paused:
                self._hold(stream.unread_bytes)
            else:
                conn.codec.consumed(stream)

    def _held_back_news(self) -> None:
        stream = self.stream
        if stream.error is not None:
            if stream.detail and not stream.by_peer:
                self.conn.world.note_malformed(self.conn, Outcome.BAD_REQUEST, f"HTTP/2: {stream.detail}")
            self.release()
        elif stream.ended:
            self.held_back = False
            self.timer.due = OFF
            self.start()

    def refuse(self) -> None:
        """A head that could be read but is not served."""
        conn, stream = self.conn, self.stream
        assert stream.m is not None
        outcome = answers.OF_STATUS.get(stream.status, Outcome.BAD_REQUEST)
        conn.world.note_malformed(conn, outcome, stream.detail)
        headers: Any
        if stream.m.grpc:
            body, headers = b"", answers.grpc_fields(outcome.grpc, stream.detail)
        else:
            body, headers = answers.body_of(outcome, stream.detail, conn.world.new_trace()[3:35].decode())
        self.answer(stream.m, outcome.status, headers, body, outcome.reason.encode())
        self._finish()

    # -- from the connection

    def news(self) -> None:
        """More of the request has come, or the stream has ended."""
        stream, serving = self.stream, self.serving
        if self.held_back:
            self._held_back_news()
        elif stream.error is not None:
            self.serving = None
            if serving is not None:
                if stream.detail and not stream.by_peer:
                    self.conn.world.note_malformed(self.conn, Outcome.BAD_REQUEST, f"HTTP/2: {stream.detail}")
                serving.caller_gone()
            self.release()
        elif serving is None:
            self._discard()
        elif not serving.m.extended:
            if self.paused:
                self._hold(stream.unread_bytes)
            else:
                self._hand_on(serving)

    def _hand_on(self, serving: Serving) -> None:
        rest, stream = self.rest, self.stream
        if self.held_bytes:
            self._hold(0)
        if rest is not None and (rest.body or rest.done):
            m = serving.m
            self.missing -= sum(map(len, rest.body))
            m.body += rest.body
            rest.body.clear()
            if rest.done:
                m.trailers = rest.trailers
                m.done = True
                self.rest = None
            serving.request_body(m)
        if stream.unread_bytes and not self.paused:
            conn = self.conn
            codec, unread = conn.codec, stream.unread_bytes
            codec.consumed(stream)
            if unread >= codec.limits.first_window_bytes >> 1 and not stream.ended:
                self._widen()
            conn.mark()

    def _hold(self, size: int) -> None:
        """So much of the request waits for who is to take it: part of what is held for all."""
        self.conn.world.reactor.held_bytes += size - self.held_bytes
        self.held_bytes = size

    def _widen(self) -> None:
        """A request whose content is taken as it comes gets a larger window, as long as all those together are small:
        nobody knows yet whether it will be taken to its end."""
        conn = self.conn
        reactor, limits = conn.world.reactor, conn.codec.limits
        more = limits.window_bytes - limits.first_window_bytes
        if not self.wide_bytes and reactor.held_bytes < TIGHT_BYTES and reactor.wide_bytes + more <= WIDE_BYTES_MAX:
            self.wide_bytes = more
            reactor.wide_bytes += more
            conn.codec.widen(self.stream)

    def flushed(self) -> None:
        """The connection has sent what it may."""
        conn, stream, serving = self.conn, self.stream, self.serving
        codec = conn.codec
        if serving is not None:
            low = STREAM_LOW_BYTES if conn.world.reactor.held_bytes < TIGHT_BYTES else 0
            if codec.queued_bytes(stream) <= low and self._room():
                del conn.waiting[self]
                if serving.up is not None and not serving.waiting_filter:
                    serving.up.resume()
            return
        if stream.closed or stream.error is not None:
            self.release()
            return
        queued = codec.queued_bytes(stream)
        if not queued and not stream.ended and not self.missing:
            # Many callers end a stream with a frame of its own. Those are not to find it reset.
            if self.flushing >= 0:
                self.flushing = -1
                self.timer.set(conn.world.reactor.now + END_S)
        elif not queued and not stream.ended:
            codec.reset(stream, ErrorCode.NO_ERROR)  # RFC 9113, section 8.1: the rest of the request is not wanted
            conn.mark()
            self.release()
        elif self.timer.due == OFF:
            self.flushing = queued
            self.timer.set(conn.world.reactor.now + STALL_S)

    def gone(self) -> None:
        """The connection is over."""
        serving, self.serving = self.serving, None
        if serving is not None:
            serving.caller_gone()
        self.release()

    def crashed(self, exc: Exception) -> None:
        """Our own failure on this stream."""
        self.conn.codec.reset(self.stream, ErrorCode.INTERNAL_ERROR)
        self.gone()

    def release(self) -> None:
        """Nothing more is done for this request."""
        conn, stream = self.conn, self.stream
        conn.streams.pop(self, None)
        conn.waiting.pop(self, None)
        if stream.owner is self:
            stream.owner = None  # else only the collector would free the two, and the whole connection with them
        if self.held_bytes:
            self._hold(0)
        if self.wide_bytes:
            conn.world.reactor.wide_bytes -= self.wide_bytes
            self.wide_bytes = 0
        if not self.released:  # else the timer is not ours any more
            self.released = True
            timer = self.timer
            timer.due = OFF
            if conn.ch.open and timer.fire is not None:
                timer.fire = _nothing
                conn.spare.append(timer)
            else:
                timer.close()

    def _discard(self) -> None:
        stream = self.stream
        if stream.m is not None and stream.m.body:
            self.missing -= sum(map(len, stream.m.body))
            stream.m.body.clear()
        if self.held_bytes:
            self._hold(0)
        if stream.unread_bytes:
            self.conn.codec.consumed(stream)
            self.conn.mark()

    def _due(self) -> None:
        if self.serving is not None:
            self.serving.due()
            return
        if self.held_back:
            self.held_back = False
            self.stream.status, self.stream.detail = Outcome.REQUEST_TIMEOUT.status, "the request has not ended in time"
            self.refuse()
            return
        queued = self.conn.codec.queued_bytes(self.stream)
        if queued < self.flushing:  # it moves: another period
            self.flushing = queued
            self.timer.set(self.conn.world.reactor.now + STALL_S)
        else:
            self._reset(ErrorCode.CANCEL if queued else ErrorCode.NO_ERROR)

    def _reset(self, code: int) -> None:
        self.conn.codec.reset(self.stream, code)
        self.conn.mark()
        self.release()

    # -- for the Serving

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        if self.paused:
            self.paused = False
            self.conn.world.reactor.soon.append(self._resumed)  # not a call: whoever resumes is not done yet

    def _resumed(self) -> None:
        serving = self.serving
        if serving is not None and not self.paused and self.stream.error is None:
            self._hand_on(serving)

    def informational(self, m: Message) -> None:
        self.conn.codec.inform(self.stream, response_fields(m))
        self.conn.mark()

    def relay_head(self, request: Message, m: Message, data: bytes, extra: Fields) -> None:
        """The head of an upstream's response, with what there is of its body."""
        conn, stream = self.conn, self.stream
        codec = conn.codec
        fields = response_fields(m, extra)
        self.relayed = True
        if request.method == b"HEAD" or m.status in (204, 304) or (m.done and not data and not m.trailers):
            self.ended_out = True
            codec.respond(stream, fields, True)
        else:
            codec.respond(stream, fields, False)
            if m.done:
                self.relay_end(m, data)
                return
            if data and not self.relay_body(data):
                serving = self.serving
                if serving is not None and serving.up is not None:
                    serving.up.pause()
        conn.mark()

    def relay_body(self, data: bytes) -> bool:
        """More of the body. False: stop the source until drained."""
        if self.ended_out:
            return True
        conn, stream = self.conn, self.stream
        conn.codec.send(stream, data)
        conn.hold(len(data))
        conn.mark()
        held = conn.world.reactor.held_bytes
        high = STREAM_HIGH_BYTES if held < TIGHT_BYTES else share(held)
        if conn.codec.queued_bytes(stream) < high and self._room():
            return True
        conn.waiting[self] = None
        return False

    def _room(self) -> bool:
        """Whether the connection takes more."""
        conn = self.conn
        return conn.ch.out_bytes < HIGH_BYTES and conn.codec.backlog_bytes < BACKLOG_BYTES_MAX

    def relay_end(self, m: Message, data: bytes) -> None:
        if self.ended_out:
            return
        self.ended_out = True
        conn, stream = self.conn, self.stream
        codec = conn.codec
        if m.trailers:
            if data:
                codec.send(stream, data)
            codec.trail(stream, m.trailers)
        else:
            codec.send(stream, data, True)
        if data:
            conn.hold(len(data))
        conn.mark()

    def answer(self, request: Message, status: int, headers: Any, body: bytes, reason: bytes | None) -> None:
        """A response of the sidecar's own."""
        if request.extended and 200 <= status < 300:
            status = Outcome.NOT_IMPLEMENTED.status  # it would say that the tunnel is open (RFC 8441, section 5)
        fields, content = answers.fields(request, status, headers, body, reason)
        self.relayed = self.ended_out = True
        codec = self.conn.codec
        codec.respond(self.stream, fields, not content)
        if content:
            codec.send(self.stream, content, True)
        self.conn.mark()

    def served(self, serving: Serving) -> None:
        """The answer is complete."""
        self.serving = None
        self._finish()

    def _finish(self) -> None:
        conn = self.conn
        conn.streams.pop(self, None)
        self.timer.due = OFF
        if self.stream.unread_bytes or self.rest is not None:
            self._discard()
        conn.waiting[self] = None  # until all of it has left
        conn.mark()

    def cut(self) -> None:
        """The answer had begun and cannot be completed."""
        serving, self.serving = self.serving, None
        self._reset((serving.cut_code if serving is not None else 0) or ErrorCode.INTERNAL_ERROR)

    def switch(self, m: Message, extra: Fields) -> tuple[StreamChannel, bytes]:
        """Say that the tunnel is open, which the upstream's 101 `m` stands for; from here on the stream's bytes are the
        tunnel's. Gives its channel, and what was read beyond the request."""
        conn, stream = self.conn, self.stream
        fields: Fields = [(b":status", b"200"), *without_handshake(m.headers), *extra]
        conn.codec.respond(stream, fields, False)
        self.serving = None
        self.timer.close()  # not a spare one: the Serving still has it
        self.release()
        channel = StreamChannel(conn, stream, conn.world.reactor, peer=conn.peer, fingerprint=conn.entry.fingerprint)
        conn.tunnels[stream] = channel
        conn.mark()
        return channel, b""
