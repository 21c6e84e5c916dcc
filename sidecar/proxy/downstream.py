"""A caller's HTTP/1.1 connection: requests come in one after the other, answers go out in the same order.

Knows framing and keep-alive on the caller's side; each request is handed to a Serving. Pipelined requests wait in the
codec with the connection unread.
Invariants: at most one request is served at a time; an answer is never completed cleanly when it was cut short; after
a request that broke the protocol nothing more is read; answers that follow one another do not recurse.
"""

from typing import TYPE_CHECKING, Any

from sidecar.policy.outcome import Outcome
from sidecar.wire.http1 import Message, ProtocolError, Requests, chunk, encode_response, last_chunk
from sidecar.wire.http2 import PREFACE

from . import answers
from .channel import Channel
from .http2_down import Http2Downstream
from .serving import Serving
from .timers import Timer

if TYPE_CHECKING:
    from .entries import Entry
    from .world import World

HEAD_TIMEOUT_S = 10.0  # from a head's first byte to its last
KEEP_ALIVE_S = 300.0  # between requests; longer than any peer's pool keeps a connection
FLUSH_TIMEOUT_S = 10.0  # for the last answer to leave
DRAIN_IDLE_S = 0.5  # without a request, before a drain closes a connection
HALF_CLOSE_S = 0.1  # after a request, for an end that is meant as "no more requests"
PREFACE_LINE = PREFACE[: PREFACE.index(b"\r\n") + 2]  # no request line of HTTP/1.1, so it decides


class Downstream:
    """One connection. `peer` is the caller's SPIFFE ID, "" where it has none."""

    __slots__ = (
        "address",
        "born",
        "broken",
        "ch",
        "chunked_out",
        "codec",
        "ending",
        "entry",
        "flushing",
        "head_due",
        "heard",
        "last",
        "peer",
        "relayed",
        "serving",
        "timer",
        "world",
    )

    def __init__(self, world: "World", entry: "Entry", peer: str, address: str) -> None:
        self.world, self.entry, self.peer, self.address = world, entry, peer, address
        self.codec = Requests(bool(peer))
        self.ch: Channel
        self.serving: Serving | None = None
        self.timer = Timer(world.timers, self._due)
        self.born = self.heard = 0.0
        self.flushing = 0  # bytes that the last answer still had to send, when last looked at
        self.broken: ProtocolError | None = None
        self.ending = False  # the last answer is on its way; nothing more is read
        self.chunked_out = False
        self.relayed = False  # the head of the current answer has gone
        self.last = False  # the answer under way is this connection's last
        self.head_due = False  # the timer watches an unfinished head

    def begin(self, sock: Any) -> None:
        """Take the socket; the connection is alive from here to `lost`."""
        self.world.downstreams.add(self)
        meters = self.entry.meters
        meters.connections_down.value += 1
        meters.connections_down_total.inc()
        self.born = self.heard = self.world.reactor.now
        self.ch = Channel(
            self.world.reactor, sock, self, watch_hangup=True, peer=self.peer, fingerprint=self.entry.fingerprint
        )
        if not self.ch.tls:
            self.ch.half_close = True
            self.ch.owner = _FirstBytes(self)
        self.timer.set(self.world.reactor.now + KEEP_ALIVE_S)

    # -- from the channel

    def received(self, data: bytes) -> None:
        if self.ending or self.broken is not None:
            return
        codec = self.codec
        serving = self.serving
        whole = serving is not None and serving.m.done  # what comes belongs to the requests behind it
        try:
            codec.receive(data)
        except ProtocolError as exc:
            self._malformed(exc)
            if serving is not None and not whole and serving.m.done and self.serving is serving:
                self.heard = self.world.reactor.now
                serving.request_body(serving.m)  # whole before the error
            return
        if serving is None:
            if codec.messages:
                self._next()
            else:
                self._watch_head()
        elif not whole:
            m = serving.m
            if m.body or m.done:
                self.heard = self.world.reactor.now
                serving.request_body(m)
        if codec.messages:
            self.ch.pause()

    def drained(self) -> None:
        serving = self.serving
        if serving is not None and serving.up is not None and not serving.waiting_filter:
            serving.up.resume()

    def ended(self) -> None:
        """A plain caller closed its sending side. TCP does not say whether it still reads: one that shuts its side
        does so right behind its request, one that has lost patience later, or when its own caller has left."""
        serving = self.serving
        if (
            serving is None
            or not serving.m.done
            or self._silent_s(serving) > HALF_CLOSE_S
            or self.entry.orphaned(serving)
        ):
            self.ch.close()
            self.lost(None)
        else:
            self.last = True  # the answer is still wanted; `served` closes

    def _silent_s(self, serving: Serving) -> float:
        """How long ago the last byte of the request came."""
        return self.world.reactor.now - max(serving.started, self.heard)

    def lost(self, exc: Exception | None) -> None:
        self._forget()
        serving = self.serving
        if serving is not None:
            self.serving = None
            serving.caller_gone()

    # -- heads

    def _next(self) -> None:
        codec = self.codec
        if self.serving is not None or self.ending or not self.ch.open:
            return
        if not codec.messages:
            if self.broken is not None:
                self._answer_malformed(self.broken)
            return
        if self.head_due:
            self._head_came()
        m = codec.messages.popleft()
        if self.broken is not None and not m.done:  # its body came broken with its head: nothing of it goes on
            self._answer_malformed(self.broken)
            return
        if self.world.plans.max_connection_age_s < self.world.reactor.now - self.born and self.peer:
            self.last = True  # the caller comes back on a new connection, with a new handshake
        now = self.world.reactor.now
        self.relayed = False
        self.serving = serving = Serving(self.world, self.entry, self, m, now)
        serving.start(now)

    def _watch_head(self) -> None:
        """Part of a head is here: it must be whole in time, and all such parts share 4 MB."""
        if not self.codec.started:
            return
        if not self.head_due:
            self.head_due = True
            self.timer.set(self.world.reactor.now + HEAD_TIMEOUT_S)
        self.world.heads.hold(self, self.codec.head_buffered_bytes)

    def _head_came(self) -> None:
        self.head_due = False
        self.world.heads.leave(self)

    def _due(self) -> None:
        serving = self.serving
        if serving is not None:
            serving.due()
        elif self.ending:
            if self.ch.out_bytes < self.flushing:  # it moves: another period
                self._watch_flush()
                return
            self.ch.abort()
            self.lost(None)
        elif self.codec.started:
            self.give_up_head()
        else:
            self.ch.close()
            self.lost(None)

    def give_up_head(self) -> None:
        """An unfinished head took too long, or too much of what all of them share."""
        self.world.heads.leave(self)
        self._own(None, Outcome.REQUEST_TIMEOUT, "the request's head did not arrive in time")

    def _malformed(self, exc: ProtocolError) -> None:
        """Requests that were whole before the error are still served; then the error is answered."""
        self.broken = exc.with_traceback(None)  # whose frames would keep this connection alive
        self.ch.pause()
        serving = self.serving
        if serving is not None and not serving.m.done:  # its body is what broke
            self.serving = None
            serving.caller_gone()
            if self.relayed:
                self.cut()
            else:
                self._answer_malformed(exc)
        elif serving is None:
            self._next()

    def _answer_malformed(self, exc: ProtocolError) -> None:
        outcome = answers.OF_STATUS.get(exc.status, Outcome.BAD_REQUEST)
        self.world.note_malformed(self, outcome, exc.detail)
        self._own(None, outcome, exc.detail)

    def _own(self, m: Message | None, outcome: Outcome, detail: str) -> None:
        body, headers = answers.body_of(outcome, detail, self.world.new_trace()[3:35].decode())
        self.ending = True
        self.ch.write(answers.encode(outcome.status, headers, body, outcome.reason.encode(), close=True, head=False))
        self._close_after_answer()

    # -- for the Serving

    def pause(self) -> None:
        self.ch.pause()

    def resume(self) -> None:
        if not self.codec.messages and not self.ending and self.broken is None:
            self.ch.resume()

    def informational(self, m: Message) -> None:
        serving = self.serving
        if serving is not None and not serving.m.http10:
            self.ch.write(encode_response(m, chunked=False, close=False))

    def relay_head(self, request: Message, m: Message, data: bytes, extra: list[tuple[bytes, bytes]]) -> None:
        """The head of an upstream's response, with what there is of its body, in one write."""
        bodiless = request.method == b"HEAD" or m.status in (204, 304)
        self.chunked_out = (m.length is None or m.chunked) and not bodiless and not request.http10
        until_close = m.length is None and not bodiless and request.http10
        if (
            not request.keep_alive
            or until_close
            or (m.done and not request.done)
            or self.last
            or self.broken is not None
        ):
            self.ending = True
        head = encode_response(
            m,
            chunked=self.chunked_out or (bodiless and m.chunked and not request.http10),
            close=self.ending,
            extra=extra,
            http10_keep_alive=request.http10 and not self.ending,
        )
        if not bodiless:
            if self.chunked_out:
                if data:
                    head += chunk(data)
                if m.done:
                    head += last_chunk(m.trailers)
            elif data:
                head += data
        self.relayed = True
        if not self.ch.write(head) and not m.done:
            serving = self.serving
            if serving is not None and serving.up is not None:
                serving.up.pause()

    def relay_body(self, data: bytes) -> bool:
        """More of the body. False: stop the source until drained."""
        return self.ch.write(chunk(data) if self.chunked_out else data)

    def relay_end(self, m: Message, data: bytes) -> None:
        if self.chunked_out:
            data = (chunk(data) if data else b"") + last_chunk(m.trailers)
        if data:
            self.ch.write(data)

    def answer(
        self,
        request: Message,
        status: int,
        headers: Any,
        body: bytes,
        reason: bytes | None,
    ) -> None:
        """A response of the sidecar's own. A request whose body has not all come costs the connection."""
        if not request.keep_alive or not request.done or self.last or self.broken is not None:
            self.ending = True
        self.relayed = True
        self.ch.write(answers.encode(status, headers, body, reason, close=self.ending, head=request.method == b"HEAD"))

    def served(self, serving: Serving) -> None:
        """The answer is complete: on to the next request, or close."""
        self.serving = None
        request = serving.m
        if self.ending or not request.keep_alive or not request.done or self.ch.eof:
            self.ending = True
            self._close_after_answer()
            return
        self.heard = now = self.world.reactor.now
        self.timer.set(now + KEEP_ALIVE_S)
        codec = self.codec
        if codec.error is not None and self.broken is None:
            self.broken = codec.error  # found among bytes that were kept until it was clear how to read them
        if codec.messages or self.broken is not None:
            self.world.reactor.soon.append(self._next)  # not a call: pipelined answers must not recurse
        else:
            if codec.started:
                self._watch_head()
            if not self.ch.reading:
                self.ch.resume()

    def cut(self) -> None:
        """The answer had begun and cannot be completed: only a broken connection tells."""
        self.ending = True
        self.serving = None
        self.ch.cut()
        self.lost(None)

    def _close_after_answer(self) -> None:
        self._watch_flush()
        self.ch.linger_close()

    def _watch_flush(self) -> None:
        self.flushing = self.ch.out_bytes
        self.timer.set(self.world.reactor.now + FLUSH_TIMEOUT_S)

    def switch(self, m: Message, extra: list[tuple[bytes, bytes]]) -> tuple[Channel, bytes]:
        """Pass the upstream's 101 on; the connection becomes one side of a tunnel, and this object lets go of it.
        Gives the channel, and what was read behind the request."""
        leftover = self.codec.leftover()
        self._forget()
        self.serving = None
        self.ch.write(encode_response(m, chunked=False, close=False, extra=extra))
        return self.ch, leftover

    def _forget(self) -> None:
        self.timer.close()
        self.world.heads.leave(self)
        if self in self.world.downstreams:
            self.world.downstreams.remove(self)
            self.entry.meters.connections_down.value -= 1

    only_tunnels = False  # a connection that has become a tunnel is not one of these any more

    def servings(self) -> tuple[Serving, ...]:
        """The requests under way."""
        return (self.serving,) if self.serving is not None else ()

    def become_http2(self, data: bytes) -> None:
        """The first bytes, `data`, say HTTP/2: another object takes the connection."""
        self._forget()
        Http2Downstream(self.world, self.entry, self.peer, self.address).adopt(self.ch, data)

    # -- draining

    def drain(self) -> None:
        """The next answer says `connection: close`. Call it again: who has been idle for a while is closed, since his
        next request is not on its way right now (one that is would be lost, and a POST could not be sent again), nor
        here already and only unread."""
        self.last = True
        idle = self.serving is None and not self.codec.started and not self.ending
        if idle and self.world.reactor.now - self.heard > DRAIN_IDLE_S and not self.ch.unread():
            self.ch.close()
            self.lost(None)

    def end(self) -> None:
        """Now, whatever is under way."""
        serving = self.serving
        if serving is not None:
            self.serving = None
            serving.caller_gone()
        self.cut()


class _FirstBytes:
    """Owns the channel of a plain connection until its first bytes have told HTTP/1.1 from HTTP/2 with prior knowledge
    (RFC 9113, section 3.3). HTTP/1.1 hears everything meanwhile, so that nothing is late for it."""

    __slots__ = ("down", "held")

    def __init__(self, down: Downstream) -> None:
        self.down = down
        self.held = b""

    def received(self, data: bytes) -> None:
        down = self.down
        whole = self.held + data if self.held else data
        if whole.startswith(PREFACE_LINE):
            down.become_http2(whole)
        elif PREFACE_LINE.startswith(whole):
            self.held = whole
            down.received(data)
        else:
            down.ch.owner = down
            down.received(data)

    def drained(self) -> None:
        self.down.drained()

    def ended(self) -> None:
        self.down.ended()

    def lost(self, exc: Exception | None) -> None:
        self.down.lost(exc)
