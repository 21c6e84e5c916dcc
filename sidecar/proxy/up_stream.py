"""One request on an HTTP/2 connection to an endpoint: what a Serving has as its `up`.

Turns a request's Message into a stream's frames and hands over the response's; an upgrade becomes an extended CONNECT.
Must not know routes, retries, or other streams. Invariants: a stream that is paused costs its window and nothing else;
every stream ends exactly once, by `release`, `abandon` or as a tunnel's; after a failure has been told nothing is.
"""

from functools import partial
from typing import TYPE_CHECKING

from sidecar.policy.cluster import Cluster
from sidecar.policy.endpoint import Endpoint
from sidecar.policy.outcome import Failure
from sidecar.wire.http1 import Message, ProtocolError
from sidecar.wire.http2 import ErrorCode, Http2Error, Stream, name_of
from sidecar.wire.http2_heads import announces_trailers, connect_fields, request_fields
from sidecar.wire.websocket import complete_response, without_handshake

from .channel import HIGH_BYTES, LOW_BYTES, TIGHT_BYTES, Channel, share
from .stream_channel import StreamChannel
from .timers import OFF

if TYPE_CHECKING:
    from .http2_up import Http2Upstream
    from .serving import Serving

_NO_EXTENDED_CONNECT = b"the application speaks HTTP/2, but takes no upgrade there (RFC 8441, extended CONNECT)\n"


def connects(m: Message) -> bool:
    """Whether an upgrade can be an extended CONNECT, which has no other method and no content: what followed would be
    the tunnel's. Another one is sent as if it did not ask (RFC 9110, section 7.8: a server may ignore it)."""
    return m.method == b"GET" and not m.chunked and not m.length


def _has_content(stream: Stream, head: Message) -> bool:
    return stream.method != b"HEAD" and head.status != 204 and head.status != 304


class UpStream:
    """One request on such a connection: what a Serving has as its `up`. `on` is the codec's half."""

    __slots__ = ("conn", "failure", "held_bytes", "on", "paused", "sent_at", "serving", "switching", "told")

    def __init__(self, conn: "Http2Upstream") -> None:
        self.conn = conn
        self.on = Stream(self)
        self.serving: Serving | None = None
        self.paused = False
        self.held_bytes = 0  # came while it was paused
        self.told = False  # the Serving has the response's head
        self.switching = b""  # to what an extended CONNECT asks to switch
        self.failure: tuple[Failure, bool] | None = None
        self.sent_at = OFF

    @property
    def mesh(self) -> bool:
        return self.conn.mesh

    @property
    def endpoint(self) -> Endpoint:
        return self.conn.endpoint

    @property
    def cluster(self) -> Cluster:
        return self.conn.cluster

    @property
    def ch(self) -> Channel:
        return self.conn.ch

    @property
    def stale(self) -> bool:
        return self.conn.retired

    @stale.setter
    def stale(self, stale: bool) -> None:
        if stale:
            self.conn.retire()

    @property
    def error_code(self) -> int:
        """By which the peer has reset the stream; 0 where it has not."""
        return (self.on.error or 0) if self.on.by_peer else 0

    @property
    def untouched(self) -> bool:
        """Whether nothing of the response has come."""
        return self.on.m is None and not self.told

    # -- for the Serving that has borrowed it

    def send_request(self, serving: "Serving", m: Message, body: bytes) -> bool:
        """Send the head and what there is of the body. False: stop the source until drained."""
        conn, stream = self.conn, self.on
        codec = conn.codec
        host = serving.host
        if conn.host and not serving.host_rewritten:
            host = conn.host
        extra = serving.entry.request_fields(serving, self)
        upgrade = serving.upgrade_token() if m.upgrade is not None and connects(m) else None
        self.sent_at = conn.world.reactor.now
        if upgrade is not None:
            self._ask_to_switch(m, upgrade, host, extra)
            return True
        stream.method = m.method
        whole = m.done and not m.trailers
        try:
            codec.request(stream, request_fields(m, host, conn.secure, extra), whole and not body)
        except Http2Error:
            self._not_sent()
            return True
        conn.last_sid = stream.sid
        if body:
            codec.send(stream, body, whole)
            conn.count(len(body))
        if m.done and m.trailers:
            codec.trail(stream, m.trailers)
        conn.mark()
        return m.done or not body or self._room()  # once it has all, nobody asks for room

    def _ask_to_switch(self, m: Message, protocol: bytes, host: bytes, extra: list[tuple[bytes, bytes]]) -> None:
        """An upgrade, as an extended CONNECT."""
        conn, stream = self.conn, self.on
        if not conn.codec.extended_connect:
            conn.world.reactor.soon.append(self._cannot_switch)
            return
        stream.method = b"CONNECT"
        self.switching = protocol
        fields = connect_fields(m, protocol, host, conn.secure, extra)
        try:
            conn.codec.request(stream, without_handshake(fields), False)
        except Http2Error:
            self._not_sent()
            return
        conn.last_sid = stream.sid
        conn.mark()

    def _cannot_switch(self) -> None:
        """The peer has not announced that it takes an extended CONNECT (RFC 8441, section 3): answer in its place."""
        if self.serving is not None:
            self.on.m = m = Message()
            m.head = m.done = True
            m.status = 501
            m.headers.append((b"content-type", b"text/plain"))
            m.body.append(_NO_EXTENDED_CONNECT)
            m.length = len(_NO_EXTENDED_CONNECT)
            self.news()

    def _switched(self, m: Message) -> None:
        """A 2xx to an extended CONNECT is what 101 is to an upgrade."""
        serving, protocol = self.serving, self.switching
        self.switching = b""
        if serving is None or not 200 <= m.status < 300:
            return
        m.status, m.upgrade, m.length = 101, protocol, None
        complete_response(serving.m, m)

    def _not_sent(self) -> None:
        """The connection has no stream left for it, which shows only now. Not a call: whoever sends goes on first."""
        self.conn.retire()
        self.conn.world.reactor.soon.append(partial(self.fail, Failure.REFUSED, True))

    def send_body(self, data: bytes, m: Message) -> bool:
        """More of the body, or its end. False: stop the source until drained."""
        codec, stream = self.conn.codec, self.on
        if not stream.sid:
            return True  # `_not_sent`: it will be told
        if m.done and m.trailers:
            if data:
                codec.send(stream, data)
            codec.trail(stream, m.trailers)
        elif data or m.done:
            codec.send(stream, data, m.done)
        self.conn.count(len(data))
        self.conn.mark()
        return self._room()

    def _room(self) -> bool:
        conn = self.conn
        held = conn.world.reactor.held_bytes
        high = HIGH_BYTES if held < TIGHT_BYTES else share(held)
        if conn.gone or (conn.ch.out_bytes < HIGH_BYTES and conn.codec.queued_bytes(self.on) < high):
            return True
        conn.waiting[self] = None
        return False

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        if self.paused:
            self.paused = False
            self.conn.world.reactor.soon.append(self.news)  # not a call: whoever resumes us is not done yet

    def release(self, m: Message) -> None:
        """The exchange is complete on both sides."""
        self.serving = None
        self.conn.used += 1
        self._leave()

    def abandon(self) -> None:
        """The exchange is over before its end: the peer need not go on with it."""
        self.serving = None
        conn = self.conn
        if self.untouched and self.failure is None and self.sent_at >= conn.heard:
            conn.doubt()
        self._leave()

    def _leave(self) -> None:
        conn, stream = self.conn, self.on
        stream.owner = None
        if not conn.gone and stream.sid:
            conn.codec.consumed(stream)
            if not stream.closed and stream.error is None:
                conn.codec.reset(stream, ErrorCode.CANCEL)
        conn.over(self)

    def switch(self) -> StreamChannel:
        """The stream becomes one side of a tunnel, and this object lets go of it."""
        conn = self.conn
        self.serving = None
        conn.tunnels[self.on] = self
        return StreamChannel(conn, self.on, conn.world.reactor, peer=conn.ch.peer, fingerprint=conn.ch.fingerprint)

    def end(self, why: str) -> None:
        """The whole connection, now: whoever is at its other end is not trusted any more."""
        self.conn.end(why)

    # -- from the connection

    def flushed(self) -> None:
        """More of the body may have left."""
        conn = self.conn
        low = LOW_BYTES if conn.world.reactor.held_bytes < TIGHT_BYTES else 0
        if conn.codec.queued_bytes(self.on) <= low:
            conn.waiting.pop(self, None)
            if self.serving is not None:
                self.serving.upstream_drained()

    def news(self) -> None:
        """Hand on what has come, as far as the Serving wants it now."""
        serving, stream = self.serving, self.on
        if serving is None:
            return
        try:
            if stream.informational:
                early, stream.informational = stream.informational, []
                for m in early:
                    serving.informational(m)
                if self.serving is not serving:
                    return
            if self.paused:
                self.conn.hold(self, stream.unread_bytes)
                return
            head = stream.m
            if head is not None and head.length == 0 and not self.told and not head.done and _has_content(stream, head):
                head = None  # over HTTP/1.1 it would be whole: content may yet come, which makes it malformed
            if head is not None and (not self.told or head.body or head.done):
                if not self.told:
                    self.told = True
                    if self.switching:
                        self._switched(head)
                    elif not _has_content(stream, head):
                        head.done = True  # the caller has all of it, however late the server says so
                    elif head.length is not None and not head.done:
                        head.chunked = announces_trailers(head)
                    elif head.trailers:
                        head.chunked = True
                serving.respond(head)
                if self.serving is not serving:
                    return
        except Exception as exc:
            self._cannot_serve(serving, exc)
            return
        if stream.unread_bytes and not self.paused:  # also where all of it had gone on when it was paused
            self.conn.codec.consumed(stream)
            self.conn.nudge()
            if self.held_bytes:
                self.conn.hold(self, 0)
        self._fail(serving)

    def _cannot_serve(self, serving: "Serving", exc: Exception) -> None:
        """A bug of ours costs the request that met it, and no other of the connection's."""
        self.conn.world.reactor.report(exc)
        if not serving.over:
            try:
                serving.upstream_failed(Failure.BROKEN, False)
            except Exception as second:
                self.conn.world.reactor.report(second)
                serving.caller_gone()
        if serving.over and serving.down.serving is serving:
            serving.down.cut()

    def crashed(self, exc: Exception) -> None:
        """Our own failure on this stream."""
        serving = self.serving
        self.abandon()
        if serving is not None and not serving.over:
            serving.caller_gone()
            serving.down.cut()

    def _fail(self, serving: "Serving") -> None:
        """Tell what the stream has come to, once all that came before has been told."""
        if self.on.error is not None:
            self._judge()
        if self.failure is not None and not self.paused:
            serving.upstream_failed(*self.failure)

    def _judge(self) -> None:
        """The stream has ended before its response."""
        stream, conn = self.on, self.conn
        if self.failure is not None:
            return
        if stream.refused:
            # With the connection going away it is the race of an idle connection; else the server has had enough.
            self.failure = (Failure.REFUSED, conn.codec.closing)
        elif stream.by_peer:
            self.failure = (Failure.RESET, False)
            if stream.error == ErrorCode.HTTP_1_1_REQUIRED:
                self._note("the server asks for HTTP/1.1: declare the port's protocol as http")
        else:
            self.failure = (Failure.BROKEN, False)
            self._note(stream.detail or f"stream ended by {name_of(stream.error or 0)}")

    def fail(self, failure: Failure, reused: bool, detail: str = "") -> None:
        """The connection is over. What has come of a response that is paused is kept until it is resumed."""
        if self.serving is None:
            self.conn.over(self)
        elif self.failure is None:
            self.failure = (failure, reused)
            if detail:
                self._note(detail)
            self.news()

    def _note(self, detail: str) -> None:
        if self.serving is not None:
            self.conn.world.note_bad_response(self.serving, ProtocolError(502, detail))
