"""One HTTP/1.1 connection to an endpoint: what a Serving has as its `up`.

Knows framing on the wire; knows nothing of routes, retries or limits. A connection is at any moment either lent to one
Serving, or idle in its endpoint's list, or closed.
Invariants: bytes that nobody asked for close the connection; one that served an unfinished exchange is never lent
again.
"""

from typing import TYPE_CHECKING, Any

from sidecar.model.snapshot import Tls
from sidecar.policy.cluster import Cluster
from sidecar.policy.endpoint import Endpoint
from sidecar.policy.outcome import Failure
from sidecar.wire.http1 import Message, ProtocolError, Responses, chunk, encode_request, last_chunk

from .channel import HIGH_BYTES, Channel

if TYPE_CHECKING:
    from .pool import Pool
    from .serving import Serving


class Upstream:
    """One HTTP/1.1 connection to an endpoint. `used` counts the responses it has completed."""

    __slots__ = (
        "ch",
        "cluster",
        "codec",
        "endpoint",
        "got",
        "host",
        "idle_since",
        "mesh",
        "pool",
        "serving",
        "stale",
        "used",
    )

    def __init__(self, pool: "Pool", cluster: Cluster, endpoint: Endpoint) -> None:
        self.pool, self.cluster, self.endpoint = pool, cluster, endpoint
        self.mesh = endpoint.mesh
        self.host = host_of(endpoint)
        self.codec = Responses(endpoint.mesh)
        self.ch: Channel
        self.serving: Serving | None = None
        self.used = 0
        self.idle_since = 0.0
        self.got = False  # a byte of the current response has arrived
        self.stale = False  # may finish what it serves, then closes

    error_code = 0  # HTTP/1.1 has none

    def begin(self, sock: Any, peer: str, fingerprint: str) -> None:
        """Take the socket."""
        self.ch = Channel(self.pool.world.reactor, sock, self, watch_hangup=False, peer=peer, fingerprint=fingerprint)

    # -- for the Serving that has borrowed it

    def send_request(self, serving: "Serving", m: Message, body: bytes) -> bool:
        """Send head and what there is of the body in one write. False: stop the source until drained."""
        upgrade = serving.upgrade_token() if m.upgrade is not None else None
        self.codec.expect(m.method, upgrade is not None)
        self.got = False
        host = serving.host
        if self.host and not serving.host_rewritten:
            host = self.host
        head = encode_request(m, host, serving.entry.request_fields(serving, self), upgrade)
        if m.chunked:
            if body:
                head += chunk(body)
            if m.done:
                head += last_chunk(m.trailers)
        elif body:
            head += body
        return self.ch.write(head)

    def send_body(self, data: bytes, m: Message) -> bool:
        """More of the body, or its end. False: stop the source until drained."""
        if m.chunked:
            data = chunk(data) if data else b""
            if m.done:
                data += last_chunk(m.trailers)
        if data:
            return self.ch.write(data)
        return self.ch.out_bytes < HIGH_BYTES

    def pause(self) -> None:
        self.ch.pause()

    def resume(self) -> None:
        self.ch.resume()

    def release(self, m: Message) -> None:
        """The exchange is complete on both sides: keep the connection if the peer lets us."""
        self.serving = None
        if m.keep_alive and not m.until_close and self.ch.open and not self.stale:
            self.used += 1
            if not self.ch.reading:
                self.ch.resume()
            self.pool.give_back(self)
        else:
            self.discard()

    def abandon(self) -> None:
        """The exchange is over before its end: nobody can use this connection again."""
        self.serving = None
        self.discard()

    def end(self, why: str) -> None:
        """Now, whatever is under way."""
        if self.ch.open and self.serving is not None:
            self.ch.cut()
            self.lost(ConnectionAbortedError(why))

    def discard(self) -> None:
        if self.ch.open:
            self.ch.close()
            self.pool.closed(self)

    # -- from the channel

    def received(self, data: bytes) -> None:
        serving = self.serving
        if serving is None:
            self._unasked()
            return
        self.got = True
        codec = self.codec
        try:
            codec.receive(data)
        except ProtocolError as exc:
            m = codec.m
            if m is not None and m.done:
                self.stale = True  # whole, but followed by bytes nobody asked for
                serving.respond(m)
            else:
                serving.world.note_bad_response(serving, exc)
                serving.upstream_failed(Failure.BROKEN, False)
            return
        if codec.informational:
            for m in codec.informational:
                serving.informational(m)
            codec.informational.clear()
            if self.serving is not serving:
                return
        m = codec.m
        if m is not None and m.head:
            serving.respond(m)

    def drained(self) -> None:
        if self.serving is not None:
            self.serving.upstream_drained()

    def ended(self) -> None:
        raise AssertionError("half-close is not asked for")

    def lost(self, exc: Exception | None) -> None:
        self.pool.closed(self)
        serving = self.serving
        if serving is None:
            self._leave_pool()
            return
        codec = self.codec
        if exc is None and codec.m is not None and codec.eof():
            self.stale = True
            serving.respond(codec.m)
        else:
            serving.upstream_failed(Failure.RESET, self.used > 0 and not self.got)

    def _unasked(self) -> None:
        self._leave_pool()
        self.discard()

    def _leave_pool(self) -> None:
        try:
            self.endpoint.idle.remove(self)
        except ValueError:
            pass


def host_of(endpoint: Endpoint) -> bytes:
    """What Host says to an ordinary TLS server (RFC 9110, section 7.2); empty for every other endpoint."""
    if endpoint.tls is not Tls.ORIGINATE:
        return b""
    key = endpoint.key.encode()  # has an IPv6 address's brackets
    return key.removesuffix(b":443") if endpoint.port == 443 else key
