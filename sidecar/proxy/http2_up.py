"""One HTTP/2 connection to an endpoint, whose streams Servings borrow.

Knows frames through a codec, and the life of the connection: until the peer's SETTINGS have come it lends nothing, so
that a server which does not speak HTTP/2 never sees a request; a GOAWAY, ours or the peer's, lets the streams finish;
a silent connection is asked for a sign of life. Must not know routes, retries, or which connection a request takes.
Invariants: what is written leaves once a batch; whoever borrows a stream is told of the connection's end exactly once,
after what had come before it.
"""

from typing import TYPE_CHECKING, Any, Protocol

from sidecar.model.snapshot import Tls
from sidecar.policy.cluster import Cluster
from sidecar.policy.endpoint import Endpoint
from sidecar.policy.outcome import Failure
from sidecar.wire.http2 import PEERS, STRANGERS, ErrorCode, Http2, Http2Error, Stream, open_codec

from .channel import HIGH_BYTES, SMALL_BYTES, TIGHT_BYTES, Channel
from .timers import Timer
from .up_stream import UpStream
from .upstream import host_of

if TYPE_CHECKING:
    from .world import World

SILENT_S = 1.0  # without a byte from the peer, before a stream that is given up makes us doubt the connection
PONG_S = 5.0  # for the answer to the PING that follows
PING_EVERY_S = 10.0  # gRPC servers end connections that ping often

NARROW_BYTES, NARROW_S = SMALL_BYTES, 1.0  # each stream's window while memory is short, and for how long at least

NOT_HTTP2 = (
    "it does not speak HTTP/2 with prior knowledge ({}); if the application speaks HTTP/1.1, declare the port's "
    "protocol as http"
)


class Owner(Protocol):
    """Who keeps the connections."""

    world: "World"

    def settled(self, conn: "Http2Upstream") -> None: ...
    def not_settled(self, conn: "Http2Upstream", detail: str) -> None: ...
    def left(self, conn: "Http2Upstream") -> None: ...
    def streams_free(self, conn: "Http2Upstream") -> None: ...
    def closed(self, conn: "Http2Upstream") -> None: ...


class Http2Upstream:
    """One connection. `used` counts the responses that it has completed; `active` are the streams that are lent."""

    __slots__ = (
        "_dirty", "_narrow_until", "_next_ping", "_pongs", "active", "backlog_bytes", "ch", "cluster", "codec",
        "doubtful", "endpoint", "flushed_sid", "gone", "heard", "host", "idle_since", "last_sid", "mesh", "owner",
        "ready", "retired", "secure", "timer", "tunnels", "used", "waiting", "world",
    )  # fmt: skip

    def __init__(self, owner: Owner, cluster: Cluster, endpoint: Endpoint) -> None:
        self.owner, self.cluster, self.endpoint = owner, cluster, endpoint
        self.world = world = owner.world
        self.mesh = endpoint.mesh
        self.secure = endpoint.tls is not Tls.PLAIN
        self.host = host_of(endpoint)
        self.codec: Http2 = open_codec(
            False, PEERS if self.mesh else STRANGERS, between_sidecars=self.mesh, engine=world.http2_engine
        )
        self.ch: Channel
        self.active: dict[UpStream, None] = {}
        self.waiting: dict[Any, None] = {}  # told `flushed` after each flush: their sources wait for room
        self.tunnels: dict[Stream, UpStream] = {}  # streams that have been switched
        self.timer = Timer(world.timers, self._due)
        self.used = 0
        self.idle_since = self.heard = world.reactor.now
        self.last_sid = self.flushed_sid = 0  # streams beyond the latter have not left this process
        self.ready = False  # the peer's SETTINGS have come
        self.retired = False  # lends no more streams; closes with the last one
        self.gone = False
        self.doubtful = False  # a PING of ours waits for its answer
        self._dirty = False
        self._pongs = 0
        self._next_ping = 0.0
        self.backlog_bytes = 0  # of the codec's, what the reactor counts
        self._narrow_until = 0.0  # 0: streams have their usual window

    def begin(self, sock: Any, peer: str, fingerprint: str, until: float) -> None:
        """Take the socket and greet. By `until` the peer's SETTINGS must be here."""
        self.ch = Channel(self.world.reactor, sock, self, watch_hangup=False, peer=peer, fingerprint=fingerprint)
        self.timer.set(until)
        self.mark()

    # -- lending

    def lends(self, fresh: bool) -> bool:
        """Whether a request may have a stream now. `fresh`: it was lost with a connection that its server may have
        closed for idleness, so it takes none that could suffer the same."""
        if self.doubtful or (fresh and self.used and not self.active):
            return False
        return self.codec.room > 0

    def stream(self) -> "UpStream":
        """A stream for one request, not open yet."""
        up = UpStream(self)
        self.active[up] = None
        return up

    def over(self, up: "UpStream") -> None:
        """A stream is given back."""
        self.active.pop(up, None)
        self.waiting.pop(up, None)
        if up.held_bytes:
            self.hold(up, 0)
        if self._narrow_until:
            self._widen()
        if not self.active:
            self.idle_since = self.world.reactor.now
        self.nudge()

    def count(self, more_bytes: int) -> None:
        """What waits in the codec is part of what waits on all connections."""
        if not self.gone:
            self.backlog_bytes += more_bytes
            self.world.reactor.held_bytes += more_bytes

    def hold(self, up: "UpStream", size: int) -> None:
        """So much of a stream's answer waits for its reader: part of what is held for all. Once that is much, streams
        get a small window, or each of many that nobody reads would bring us all of its own."""
        reactor = self.world.reactor
        reactor.held_bytes += size - up.held_bytes
        up.held_bytes = size
        if reactor.held_bytes >= TIGHT_BYTES and not self.gone:
            if not self._narrow_until:
                self.codec.resize(NARROW_BYTES)
                self.mark()
            self._narrow_until = reactor.now + NARROW_S

    def _widen(self) -> None:
        reactor = self.world.reactor
        if reactor.held_bytes < TIGHT_BYTES // 2 and reactor.now > self._narrow_until and not self.gone:
            self._narrow_until = 0.0
            self.codec.resize(self.codec.limits.window_bytes)
            self.mark()

    def forget(self, stream: Stream) -> None:
        """A tunnel on a stream is over."""
        up = self.tunnels.pop(stream, None)
        if up is not None:
            self.over(up)

    def retire(self) -> None:
        """No more streams; those under way finish."""
        if not self.retired:
            self.retired = True
            self.owner.left(self)
            self.mark()

    def retire_now(self) -> None:
        """The same for a connection on which nothing is under way, and whose place is wanted."""
        self.retire()
        self.close()

    def close(self) -> None:
        """Nothing is under way: end it in good order."""
        if not self.gone:
            self.codec.goaway()
            self._write()
            self.ch.close()
            self._forget()
            self.owner.closed(self)

    def end(self, why: str) -> None:
        """Now, whatever is under way."""
        if not self.gone:
            self.ch.cut()
            self._die(ConnectionAbortedError(why))

    def doubt(self) -> None:
        """A request had no answer in time: if nothing else has come either, ask whether anybody is there."""
        now = self.world.reactor.now
        if self.gone or self.doubtful or now - self.heard < SILENT_S or now < self._next_ping:
            return
        self.doubtful = True
        self._next_ping = now + PING_EVERY_S
        self._pongs = self.codec.pongs
        self.codec.ping()
        self.timer.set(now + PONG_S)
        self.mark()

    # -- output, once a batch

    def mark(self) -> None:
        """The codec has something to send, or may have."""
        if not self._dirty and not self.gone:
            self._dirty = True
            self.world.reactor.soon.append(self._flush)

    def nudge(self) -> None:
        """The same where most often it has not, and nobody waits for what a flush would tell."""
        if self._dirty:
            return
        muxes = self.endpoint.muxes
        if (
            self.codec.wants_to_send
            or self.waiting
            or self.retired
            or self.codec.error is not None
            or self.cluster.waiters
            or (muxes is not None and muxes.waiting)
        ):
            self.mark()

    def _flush(self) -> None:
        self._dirty = False
        if self.gone:
            return
        self._write()
        self._tell()
        if self.codec.error is not None:
            self._broken(self.codec.error)
            return
        if self.waiting and self.ch.out_bytes < HIGH_BYTES:
            for each in list(self.waiting):
                each.flushed()
        if self.retired and not self.active:
            self.close()
        elif self.ready and not self.retired and self.codec.room > 0:
            self.owner.streams_free(self)

    def _write(self) -> None:
        ch = self.ch
        if ch.out_bytes < HIGH_BYTES:
            data = self.codec.to_send()
            self.count(self.codec.backlog_bytes - self.backlog_bytes)
            self.flushed_sid = self.last_sid
            if data:
                ch.write(data)

    # -- from the channel

    def received(self, data: bytes) -> None:
        now = self.world.reactor.now
        self.heard = now
        codec = self.codec
        codec.receive(data, now)
        if not self.ready:
            if codec.error is not None:
                self._refuse(NOT_HTTP2.format(codec.error.detail))
                return
            if codec.closing:
                self._refuse("it has ended the connection at once, with a GOAWAY")
                return
            if codec.settled and codec.room > 0:  # one that takes no stream yet is no better than one not there
                self.ready = True
                self.timer.off()
                self.owner.settled(self)
        elif self.doubtful and codec.pongs > self._pongs:
            self.doubtful = False
            self.timer.off()
        self._tell()
        if codec.error is not None:
            self._write()  # our GOAWAY
            self._broken(codec.error)
            return
        if codec.closing:
            self.retire()
        self.nudge()

    def _tell(self) -> None:
        for stream in self.codec.take_news():
            owner = stream.owner
            if owner is not None:
                try:
                    owner.news()
                except Exception as exc:  # a bug of ours costs the stream that met it, and no other
                    self.world.reactor.report(exc)
                    owner.crashed(exc)

    def drained(self) -> None:
        self.mark()

    def ended(self) -> None:
        raise AssertionError("half-close is not asked for")

    def lost(self, exc: Exception | None) -> None:
        self._die(exc)

    # -- ends

    def _due(self) -> None:
        if not self.ready and self.codec.settled:
            self._refuse("its SETTINGS allow no stream")
        elif not self.ready:
            self._refuse("no SETTINGS within the connect timeout" if self.mesh else NOT_HTTP2.format("no SETTINGS"))
        elif self.doubtful:
            self.end(f"no sign of life within {PONG_S:g} s")

    def _refuse(self, detail: str) -> None:
        """It never became a connection that could be used."""
        self.ch.cut()
        self._forget()
        self.owner.not_settled(self, detail)

    def _broken(self, error: Http2Error) -> None:
        """The codec is at its end: by the peer's fault, or because everything is over."""
        self.ch.close()
        self._die(error)

    def _die(self, why: Exception | None) -> None:
        if self.gone:
            return
        if not self.ready:
            detail = NOT_HTTP2.format("it has closed the connection")
            if self.codec.settled:
                detail = "closed before its SETTINGS allowed a stream"
            elif self.mesh:
                detail = "closed before its SETTINGS came"
            self._forget()
            self.owner.not_settled(self, detail)
            return
        self._forget()
        self.owner.closed(self)
        broken = isinstance(why, Http2Error) and why.code != ErrorCode.NO_ERROR
        for stream in list(self.tunnels):
            stream.owner.gone(why)
        for up in list(self.active):
            if up.on.sid > self.flushed_sid or not up.on.sid:
                up.fail(Failure.REFUSED, True)  # nothing of it has left
            elif broken:
                up.fail(Failure.BROKEN, False, str(why))
            else:
                up.fail(Failure.RESET, self.used > 0 and up.untouched)

    def _forget(self) -> None:
        self.count(-self.backlog_bytes)
        self.gone = True
        self.timer.close()
        if not self.retired:
            self.retired = True
            self.owner.left(self)
