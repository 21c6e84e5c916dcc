"""A caller's HTTP/2 connection: its streams are requests, each for a Serving, or tunnels.

Knows frames through a codec, and the life of the connection; what a request is made of, `http2_down_stream` knows.
Must not know routes or policy. Invariants: what is written leaves once a batch; who does not read what we write is not
read either; a connection ends with a GOAWAY, and only after every request that came before it has been served, unless
the caller broke the protocol, ran out of time or is not to be served any more.
"""

from typing import TYPE_CHECKING, Any

from sidecar.policy.outcome import Outcome
from sidecar.wire.http2 import PEERS, STRANGERS, ErrorCode, Http2, Http2Error, Stream, open_codec
from sidecar.wire.http2_guard import SECTION_BYTES_MAX

from .channel import HIGH_BYTES, Channel
from .http2_down_stream import DownStream
from .serving import Serving
from .stream_channel import StreamChannel
from .timers import OFF, Timer

if TYPE_CHECKING:
    from .entries import Entry
    from .world import World

GREETING_S = 10.0  # for the preface and the first SETTINGS
HEAD_TIMEOUT_S = 10.0  # from a head's first byte to its last
KEEP_ALIVE_S = 300.0  # without a stream; longer than any peer's pool keeps a connection
NOTICE_S = 0.5  # between the two GOAWAYs: what is on its way meanwhile is served (RFC 9113, section 6.8)
FLUSH_S = 10.0  # for the last frames to leave


class Http2Downstream:
    """One connection. `peer` is the caller's SPIFFE ID, "" where it has none."""

    __slots__ = (
        "_dirty", "_farewell", "_highest", "address", "born", "ch", "closing", "codec", "entry", "flushing", "greeting",
        "head_due", "held_bytes", "leaving", "peer", "spare", "streams", "timer", "tunnels", "waiting", "world",
    )  # fmt: skip

    def __init__(self, world: "World", entry: "Entry", peer: str, address: str) -> None:
        self.world, self.entry, self.peer, self.address = world, entry, peer, address
        self.codec: Http2 = open_codec(
            True, PEERS if peer else STRANGERS, between_sidecars=bool(peer), engine=world.http2_engine
        )
        self.ch: Channel
        self.streams: dict[DownStream, None] = {}  # with a request under way
        self.tunnels: dict[Stream, StreamChannel] = {}
        self.waiting: dict[Any, None] = {}  # who is told of each flush
        self.timer = Timer(world.timers, self._due)
        self.spare: list[Timer] = []  # of streams that are over
        self.born = 0.0
        self.flushing = 0  # bytes that still had to leave, when last looked at
        self.greeting = True  # the caller's SETTINGS have not come
        self.held_bytes = 0  # of the codec's backlog, what the reactor counts
        self.head_due = False  # the timer watches an unfinished head
        self.leaving = False  # our notice has gone; no new streams soon
        self.closing = False  # nothing more is read or served; only what is written still leaves
        self._farewell: Timer | None = None
        self._dirty = False
        self._highest = 0  # the last stream that was opened

    def begin(self, sock: Any) -> None:
        """Take the socket; the connection is alive from here to `lost`."""
        reactor = self.world.reactor
        self._enter(Channel(reactor, sock, self, watch_hangup=True, peer=self.peer, fingerprint=self.entry.fingerprint))
        self.entry.meters.connections_down_total.inc()

    def adopt(self, ch: Channel, data: bytes) -> None:
        """Take a connection whose first bytes, `data`, have told that it is HTTP/2."""
        ch.owner = self
        ch.half_close = False
        self._enter(ch)
        self.received(data)

    def _enter(self, ch: Channel) -> None:
        self.ch = ch
        self.world.downstreams.add(self)
        self.entry.meters.connections_down.value += 1
        self.born = now = self.world.reactor.now
        self.timer.set(now + GREETING_S)
        self.mark()

    def servings(self) -> list[Serving]:
        """The requests under way."""
        return [down.serving for down in self.streams if down.serving is not None]

    @property
    def only_tunnels(self) -> bool:
        """Whether nothing but tunnels is left, which have an end of their own."""
        return bool(self.tunnels) and not self.streams

    # -- from the channel

    def received(self, data: bytes) -> None:
        if self.closing:
            return
        codec = self.codec
        codec.receive(data, self.world.reactor.now)
        if self.greeting and codec.settled:
            self.greeting = False
            self.timer.off()
        if codec.error is None or codec.error.code == ErrorCode.NO_ERROR:
            if codec.unfinished_head is not self.head_due:
                self._watch_head()
            self._tell()
        if codec.wants_to_send or codec.error is not None or self.waiting or not codec.streams:
            self.mark()

    def drained(self) -> None:
        self.ch.resume()
        self.mark()

    def ended(self) -> None:
        raise AssertionError("half-close is not asked for")

    def lost(self, exc: Exception | None) -> None:
        self._forget()
        self._let_go(exc)
        self.hold(-self.held_bytes)

    def _tell(self) -> None:
        for stream in self.codec.take_news():
            owner = stream.owner
            try:
                if owner is not None:
                    owner.news()
                elif stream.sid > self._highest:
                    self._highest = stream.sid
                    self._open(stream)
            except Exception as exc:
                self._crashed(stream, exc)

    def _crashed(self, stream: Stream, exc: Exception) -> None:
        """A bug of ours costs the stream that met it, and no other."""
        self.world.reactor.report(exc)
        owner = stream.owner
        if owner is not None:
            owner.crashed(exc)
        self.codec.reset(stream, ErrorCode.INTERNAL_ERROR)
        self.mark()

    def _open(self, stream: Stream) -> None:
        """A request has come."""
        if stream.error is not None or stream.closed or self.closing:
            return
        if not self.head_due:
            self.timer.off()
        world = self.world
        if self.peer and world.reactor.now - self.born > world.plans.max_connection_age_s:
            self.leave()  # the caller comes back on a new connection, with a new handshake
        down = DownStream(self, stream)
        if stream.status:
            down.refuse()
        else:
            down.start()

    # -- output, once a batch

    def mark(self) -> None:
        """The codec has something to send, or may have."""
        if not self._dirty:
            self._dirty = True
            self.world.reactor.soon.append(self._flush)

    def _flush(self) -> None:
        self._dirty = False
        ch, codec = self.ch, self.codec
        if self.closing or not ch.open:
            return
        if ch.out_bytes < HIGH_BYTES:
            data = codec.to_send()
            self.hold(codec.backlog_bytes - self.held_bytes)
            if data and not ch.write(data):
                ch.pause()  # who does not read our frames makes us send no more of them; `drained` goes on
            if codec.news:
                self._tell()
            if self.waiting:
                for each in list(self.waiting):
                    each.flushed()
        if codec.error is not None:
            self._broken(codec.error)
        elif not codec.streams and not self._dirty:
            self._at_rest()

    def hold(self, more_bytes: int) -> None:
        """The codec's backlog is part of what waits on all connections."""
        self.held_bytes += more_bytes
        self.world.reactor.held_bytes += more_bytes

    def _at_rest(self) -> None:
        """No stream is open."""
        if self.codec.closing:  # and none will follow
            self._close()
        elif self.timer.due == OFF and not self.greeting:
            self.timer.set(self.world.reactor.now + KEEP_ALIVE_S)

    def _watch_head(self) -> None:
        """Part of a head is here, or was: it must be whole in time, and all such parts share 4 MB. Meanwhile the caller
        can say nothing on any stream."""
        self.head_due = self.codec.unfinished_head
        if self.head_due:
            self.timer.set(self.world.reactor.now + HEAD_TIMEOUT_S)
            self.world.heads.hold(self, SECTION_BYTES_MAX)
        else:
            self.timer.off()
            self.world.heads.leave(self)

    def give_up_head(self) -> None:
        """An unfinished head took too long, or too much of what all of them share."""
        self.world.heads.leave(self)
        self.codec.goaway(ErrorCode.ENHANCE_YOUR_CALM)
        self._broken(Http2Error(ErrorCode.ENHANCE_YOUR_CALM, "the request's head did not arrive in time", "head_time"))

    def forget(self, stream: Stream) -> None:
        """A tunnel's stream is over."""
        self.tunnels.pop(stream, None)
        self.mark()

    # -- time

    def _due(self) -> None:
        if self.closing:
            if self.ch.out_bytes < self.flushing:  # it moves: another period
                self._watch_flush()
            else:
                self.ch.abort()
                self.lost(None)
        elif self.greeting:
            self.ch.close()
            self.lost(None)
        elif self.head_due:
            self.give_up_head()
        elif not self.codec.streams:
            self.codec.goaway()
            self._close()

    def _watch_flush(self) -> None:
        self.flushing = self.ch.out_bytes
        self.timer.set(self.world.reactor.now + FLUSH_S)

    # -- ends

    def drain(self) -> None:
        """Let the requests under way finish, and those on their way; then close."""
        self.leave()

    def leave(self) -> None:
        """In two steps: the first GOAWAY stops the caller from sending more, the second says what was the last."""
        if self.leaving or self.closing:
            return
        self.leaving = True
        self.codec.notice()
        self._farewell = Timer(self.world.timers, self._say_last)
        self._farewell.set(self.world.reactor.now + NOTICE_S)
        self.mark()

    def _say_last(self) -> None:
        if not self.closing:
            self.codec.goaway()
            self.mark()

    def _broken(self, error: Http2Error) -> None:
        """The caller has broken the protocol or hit a limit; or it is its own clean end."""
        if error.code != ErrorCode.NO_ERROR:
            self.entry.meters.http2_limits.inc(error.limit or "protocol")
            self.world.note_malformed(self, Outcome.BAD_REQUEST, f"HTTP/2: {error}", error.limit)
        self._close()

    def _close(self) -> None:
        """Send what there is, our GOAWAY last, and end."""
        self.closing = True
        data = self.codec.to_send()
        if data:
            self.ch.write(data)
        self._let_go(None)
        self._watch_flush()
        self.ch.linger_close()

    def end(self) -> None:
        """Now, whatever is under way."""
        self.closing = True
        self.codec.goaway()
        if self.ch.open and self.ch.out_bytes < HIGH_BYTES:
            self.ch.write(self.codec.to_send())
        self.ch.cut()
        self.lost(ConnectionAbortedError("ended by the sidecar"))

    def _let_go(self, exc: Exception | None) -> None:
        self.closing = True
        for down in list(self.streams):
            down.gone()
        for channel in list(self.tunnels.values()):
            channel.gone(exc)
        for each in list(self.waiting):
            if isinstance(each, DownStream):
                each.release()

    def _forget(self) -> None:
        self.timer.close()
        self.world.heads.leave(self)
        for timer in self.spare:
            timer.close()
        self.spare.clear()
        if self._farewell is not None:
            self._farewell.close()
        if self in self.world.downstreams:
            self.world.downstreams.remove(self)
            self.entry.meters.connections_down.value -= 1
