"""Connections to endpoints: one HTTP/1.1 connection, and the pool that lends them out.

Knows framing on the wire and the limits on connections; knows nothing of routes or retries. A connection is at any
moment either lent to one Serving, or idle in its endpoint's list, or closed.
Invariants: bytes that nobody asked for close the connection; one that served an unfinished exchange is never lent
again; `cluster.connections` counts every open or opening connection exactly once.
"""

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from sidecar.model.snapshot import Tls
from sidecar.policy.cluster import Cluster
from sidecar.policy.endpoint import Endpoint
from sidecar.policy.exchange import Exchange
from sidecar.policy.outcome import Failure, Outcome
from sidecar.telemetry.catalogue import SideMeters
from sidecar.wire.http1 import Message, ProtocolError, Responses, chunk, encode_request, last_chunk

from .channel import HIGH_BYTES, Channel
from .connect import DialError
from .tls import HTTP1

if TYPE_CHECKING:
    from .serving import Serving
    from .world import World


DIALS_MAX = 16  # connections being made to one endpoint at a time: handshakes cost both ends a millisecond each


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
        self.host = _authority(endpoint) if endpoint.tls is Tls.ORIGINATE else b""
        self.codec = Responses(endpoint.mesh)
        self.ch: Channel
        self.serving: Serving | None = None
        self.used = 0
        self.idle_since = 0.0
        self.got = False  # a byte of the current response has arrived
        self.stale = False  # may finish what it serves, then closes

    # -- for the Serving that has borrowed it

    def send_request(self, serving: "Serving", m: Message, body: bytes) -> bool:
        """Send head and what there is of the body in one write. False: stop the source until drained."""
        upgrade = serving.upgrade_token() if m.upgrade is not None else None
        self.codec.expect(m.method, upgrade is not None)
        self.got = False
        host = serving.host
        if self.host and not serving.host_rewritten:
            host = self.host
        head = encode_request(m, host, serving.entry.request_lines(serving, self, upgrade))
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


def _authority(endpoint: Endpoint) -> bytes:
    """What Host says to an ordinary TLS server (RFC 9110, section 7.2)."""
    key = endpoint.key.encode()  # has an IPv6 address's brackets
    return key.removesuffix(b":443") if endpoint.port == 443 else key


class _Dials:
    """The connections being made to one endpoint, and the requests that wait for one, oldest first.

    Whichever connection is there first, new or given back, serves the oldest request. At most DIALS_MAX are made at a
    time; the others are `queued`, which costs nothing if a connection that is given back comes first. One that is made
    when nobody waits for it any more becomes a spare, so the pool grows to what is used at a time, and stays there."""

    __slots__ = ("queued", "stale", "under_way", "wanting")

    def __init__(self) -> None:
        self.under_way = 0  # the queued ones included
        self.queued: deque[tuple[Serving, float]] = deque()
        self.stale = False  # what is being made was begun under other terms
        self.wanting: deque[Serving] = deque()


class Pool:
    """Lends connections. Idle ones are used last in, first out, so that spare ones age and close."""

    def __init__(self, world: "World") -> None:
        self.world = world

    def take(self, endpoint: Endpoint, serving: "Serving", ex: Exchange) -> Upstream | None:
        """An idle connection at once; otherwise None, and `serving.connected`, `connect_failed` or `overflow`
        follows."""
        cluster = ex.cluster
        if not ex.fresh:
            idle = endpoint.idle
            while idle:
                up: Upstream = idle.pop()
                if self.world.reactor.now - up.idle_since > cluster.pool_idle_s:
                    up.discard()
                elif (not ex.safe or serving.unsent) and up.ch.unread():
                    up.discard()  # what cannot be sent twice: look before we leap
                else:
                    return up
        serving.connecting = True
        if cluster.connections < cluster.limits.connections or self._evict(cluster):
            self._dial(cluster, endpoint, serving, ex)
        elif len(cluster.waiters) < cluster.limits.pending:
            cluster.waiters.append(serving)
        else:
            serving.connecting = False
            serving.overflow(cluster)
        return None

    def give_back(self, up: Upstream) -> None:
        """A connection is free: it serves the oldest request that waits for its endpoint, or makes room for one that
        waits for another, or rests."""
        endpoint, cluster = up.endpoint, up.cluster
        if endpoint.dials is not None or cluster.waiters:
            serving = self._next_for(up, endpoint, cluster)
            if serving is not None:
                # not a call: whoever gives back still has to finish
                assert serving.ex is not None
                self.world.reactor.soon.append(partial(self._hand_over, up, serving, serving.ex))
                return
            if cluster.waiters:
                up.discard()  # `closed` serves the queue
                return
        up.idle_since = self.world.reactor.now
        endpoint.idle.append(up)

    def forget(self, serving: "Serving") -> None:
        """A request that waits for a connection is over, or has its turn elsewhere."""
        ex = serving.ex
        if ex is None:
            return
        if serving in ex.cluster.waiters:
            ex.cluster.waiters.remove(serving)
        endpoint = serving.endpoint
        if endpoint is not None and endpoint.dials is not None and serving in endpoint.dials.wanting:
            endpoint.dials.wanting.remove(serving)
            self._unqueue(endpoint.dials, ex.cluster)

    def closed(self, up: Upstream) -> None:
        self._meters(up.cluster).connections_up.value -= 1
        self._gone(up.cluster)

    def _meters(self, cluster: Cluster) -> SideMeters:
        return self.world.meters.inbound if cluster.side == "in" else self.world.meters.outbound

    def close_idle(self, endpoint: Endpoint) -> None:
        """Close an endpoint's idle connections: it left, or they were made under other terms."""
        for up in endpoint.idle:
            up.discard()
        endpoint.idle.clear()

    def retire(self, endpoints: Iterable[Endpoint]) -> None:
        """Endpoints have left, or are reached under other terms: idle connections close now, busy ones with the answer
        under way."""
        gone = dict.fromkeys(endpoints)
        for endpoint in gone:
            self.close_idle(endpoint)
            if endpoint.dials is not None:
                endpoint.dials.stale = True
        for up in self.busy() if gone else ():
            if up.endpoint in gone:
                up.stale = True

    def busy(self) -> list[Upstream]:
        """The connections that are lent out."""
        servings = [down.serving for down in self.world.downstreams]
        return [serving.up for serving in servings if serving is not None and serving.up is not None]

    def end_banned(self, banned: Callable[[Channel], bool]) -> list[Upstream]:
        """Close the idle connections to whom we no longer speak; returns the busy ones, which close after the answer
        under way."""
        for cluster in self.world.state:
            for endpoint in cluster.endpoints.values():
                for up in [up for up in endpoint.idle if banned(up.ch)]:
                    endpoint.idle.remove(up)
                    up.discard()
        busy = [up for up in self.busy() if banned(up.ch)]
        for up in busy:
            up.stale = True
        return busy

    def sweep(self, clusters: Any, now: float) -> None:
        """Close what has been idle for too long; called once a second or so."""
        for cluster in clusters:
            for endpoint in cluster.endpoints.values():
                idle = endpoint.idle
                while idle and now - idle[0].idle_since > cluster.pool_idle_s:
                    idle.pop(0).discard()

    # -- inside

    def _next_for(self, up: Upstream, endpoint: Endpoint, cluster: Cluster) -> "Serving | None":
        """The oldest request that this endpoint's connection can serve, taken from its queue. One that is sent again
        because a used connection has died is not given another used one."""
        dials: _Dials | None = endpoint.dials
        if dials is not None:
            for serving in dials.wanting:
                if not up.used or serving.ex is None or not serving.ex.fresh:
                    dials.wanting.remove(serving)
                    self._unqueue(dials, cluster)
                    return serving
        waiters = cluster.waiters
        if waiters and waiters[0].ex.endpoint is endpoint and not (up.used and waiters[0].ex.fresh):
            return waiters.popleft()  # type: ignore[no-any-return]
        return None

    def _hand_over(self, up: Upstream, serving: "Serving", ex: Exchange) -> None:
        wanted = serving.connecting and serving.ex is ex and not serving.over and ex.endpoint is up.endpoint
        if wanted and not ex.safe and up.ch.unread():
            up.discard()  # as in `take`
        if wanted and up.ch.open:
            serving.connected(up)
        elif up.ch.open:
            self.give_back(up)
        elif wanted:  # it closed in between; the place that it left is taken again
            serving.connecting = False
            found = self.take(up.endpoint, serving, ex)
            if found is not None:
                serving.connected(found)

    def _gone(self, cluster: Cluster) -> None:
        """A connection, or the attempt at one, is no more."""
        cluster.connections -= 1
        if cluster.waiters:
            self.world.reactor.soon.append(partial(self._serve_waiters, cluster))

    def _serve_waiters(self, cluster: Cluster) -> None:
        while cluster.waiters and cluster.connections < cluster.limits.connections:
            serving: Serving = cluster.waiters.popleft()
            ex = serving.ex
            if serving.connecting and not serving.over and ex is not None and ex.endpoint is not None:
                self._dial(cluster, ex.endpoint, serving, ex)

    def _evict(self, cluster: Cluster) -> bool:
        """Make room by closing an idle connection to some other endpoint."""
        for endpoint in cluster.endpoints.values():
            if endpoint.idle:
                endpoint.idle.pop(0).discard()
                return True
        return False

    def _dial(self, cluster: Cluster, endpoint: Endpoint, serving: "Serving", ex: Exchange) -> None:
        dials: _Dials | None = endpoint.dials
        if dials is None:
            dials = endpoint.dials = _Dials()
        cluster.connections += 1
        dials.under_way += 1
        dials.wanting.append(serving)
        timeout_s = ex.plan.timeouts.connect_s
        if dials.under_way - len(dials.queued) > DIALS_MAX:
            dials.queued.append((serving, timeout_s))
        else:
            self.world.errand(self._connect, cluster, endpoint, dials, serving, timeout_s)

    def _unqueue(self, dials: _Dials, cluster: Cluster) -> None:
        """A request waits no more: one connection less is wanted."""
        if dials.queued:
            dials.queued.pop()
            dials.under_way -= 1
            self._gone(cluster)

    async def _connect(
        self, cluster: Cluster, endpoint: Endpoint, dials: _Dials, serving: "Serving", timeout_s: float
    ) -> None:
        world = self.world
        ex = serving.ex
        if ex is not None and ex.outcome is Outcome.CALLER_GONE and dials.under_way > len(dials.wanting):
            world.reactor.call(self._not_made, cluster, endpoint, dials)
            return
        try:
            with trio.fail_after(timeout_s):
                dialled = await world.dial(endpoint, HTTP1, timeout_s)
        except (DialError, trio.TooSlowError) as exc:
            detail = str(exc) or f"no connection within {timeout_s:g} s"
            world.reactor.call(self._failed, cluster, endpoint, dials, serving, detail)
            return
        except trio.Cancelled:
            cluster.connections -= 1
            raise
        except Exception as exc:  # a bug, or an address that TLS cannot ask for: this connection's end, not ours
            detail = f"{type(exc).__name__}: {exc}"
            world.reactor.call(self._failed, cluster, endpoint, dials, serving, detail)
            return
        up = Upstream(self, cluster, endpoint)
        up.ch = Channel(
            world.reactor, dialled.sock, up, watch_hangup=False, peer=dialled.peer, fingerprint=dialled.fingerprint
        )
        world.reactor.call(self._made, up, dials)

    def _done(self, cluster: Cluster, endpoint: Endpoint, dials: _Dials) -> None:
        dials.under_way -= 1
        if dials.queued:
            serving, timeout_s = dials.queued.popleft()
            self.world.errand(self._connect, cluster, endpoint, dials, serving, timeout_s)
        if not dials.under_way and not dials.wanting:
            endpoint.dials = None

    def _not_made(self, cluster: Cluster, endpoint: Endpoint, dials: _Dials) -> None:
        self._done(cluster, endpoint, dials)
        self._gone(cluster)

    def _failed(self, cluster: Cluster, endpoint: Endpoint, dials: _Dials, serving: "Serving", detail: str) -> None:
        """Told to the request that asked for this connection, or, where another one has served that already, to the
        oldest that no connection under way is left for."""
        if serving in dials.wanting:
            dials.wanting.remove(serving)
            victim: Serving | None = serving
        else:
            victim = dials.wanting.popleft() if len(dials.wanting) >= dials.under_way else None
        # The queued ones would find the same: a share of them is told now, so that all are within one more time-out.
        victims = [victim] if victim is not None else []
        for _ in range(len(dials.queued) // DIALS_MAX):
            other, _timeout_s = dials.queued.popleft()
            dials.under_way -= 1
            self._gone(cluster)
            if other in dials.wanting:
                dials.wanting.remove(other)
                victims.append(other)
        self._done(cluster, endpoint, dials)
        self._gone(cluster)
        for each in victims:
            each.connect_failed(detail)

    def _made(self, up: Upstream, dials: _Dials) -> None:
        meters = self._meters(up.cluster)
        meters.connections_up.value += 1
        meters.connections_up_total.inc()
        if up.mesh:
            meters.handshakes_ok.inc()
        up.stale = dials.stale or not up.cluster.holds(up.endpoint)
        wanting = dials.wanting
        serving = wanting.popleft() if wanting else None
        self._done(up.cluster, up.endpoint, dials)
        if serving is not None:
            serving.connected(up)
        elif up.stale:
            up.discard()
        else:
            self.give_back(up)
