"""Multiplexed connections: which one gives a request its stream, and when another one is opened.

One is made at a time for an endpoint, however many requests wait for it; the next only once those there are full. A
peer between sidecars that does not know HTTP/2 is spoken to in HTTP/1.1 for a while. Must not know routes, retries or
frames. Invariants: a request waits here or in its cluster's queue, never in both; a connection that lends no more has
left `open`; every connection that is being made or open counts as one of its cluster's.
"""

from collections import deque
from typing import TYPE_CHECKING

import trio

from sidecar.policy.cluster import Cluster
from sidecar.policy.endpoint import Endpoint
from sidecar.policy.exchange import Exchange
from sidecar.wire.websocket import WEBSOCKET

from .connect import DialError, OtherProtocol
from .http2_up import Http2Upstream
from .reactor import IN
from .tls import HTTP2
from .up_stream import UpStream, connects

if TYPE_CHECKING:
    from .pool import Pool
    from .serving import Serving

WITHOUT_HTTP2_S = 60.0  # after a peer has refused it: it may be upgraded any time
AFTER_FAILURE_S = 1.0  # HTTP/1.1 where it can do as well
STAY_S = 0.5  # with streams, after the last time that many requests were in flight


class Muxes:
    """The multiplexed connections of one endpoint, and the requests that wait for the next, oldest first."""

    __slots__ = ("busy_until", "http1_until", "making", "open", "stale", "waiting")

    def __init__(self) -> None:
        self.open: list[Http2Upstream] = []
        self.waiting: deque[Serving] = deque()
        self.making = False
        self.stale = False  # what is being made was begun under other terms
        self.busy_until = self.http1_until = 0.0


def needs_http2(endpoint: Endpoint, serving: "Serving") -> bool:
    """Whether HTTP/1.1 would not do."""
    return serving.m.grpc or (endpoint.http2 and not endpoint.mesh)


def may_multiplex(endpoint: Endpoint, serving: "Serving") -> bool:
    """Whether a stream would do. Between sidecars upgrades have connections of their own."""
    if endpoint.mesh:
        return serving.m.upgrade is None or serving.upgrade_token() is None
    return needs_http2(endpoint, serving)


def would_do(conn: Http2Upstream, serving: "Serving") -> bool:
    """The same where connections are at their limit: rather an extended CONNECT than no upgrade."""
    if may_multiplex(conn.endpoint, serving):
        return True
    return serving.m.upgrade == WEBSOCKET and connects(serving.m) and conn.codec.extended_connect


class Streams:
    """Lends streams. The pool's other half: limits and queues are its."""

    def __init__(self, pool: "Pool") -> None:
        self.pool = pool
        self.world = pool.world

    def worthwhile(self, endpoint: Endpoint, busy: bool) -> bool:
        """Whether so much is under way, or was a moment ago, that streams cost less than connections; both kinds side
        by side cost more than either. Never where the peer is known to want HTTP/1.1."""
        now = self.world.reactor.now
        muxes = self._of(endpoint)
        if busy:
            muxes.busy_until = now + STAY_S
        return muxes.busy_until > now >= muxes.http1_until

    def take(self, endpoint: Endpoint, serving: "Serving", ex: Exchange) -> UpStream | None:
        """A stream that is to be had at once."""
        muxes: Muxes | None = endpoint.muxes
        if muxes is not None:
            for conn in muxes.open:
                if conn.lends(ex.fresh):
                    if not conn.active and (not ex.safe or serving.unsent) and conn.ch.unread():
                        conn.ch.ready(IN)  # what cannot be sent twice: see first whether it is the end
                        return self.take(endpoint, serving, ex)
                    return conn.stream()
        return None

    def instead(self, endpoint: Endpoint, serving: "Serving", ex: Exchange) -> UpStream | None:
        """A stream for a request that should have a pooled connection, and no more can be made."""
        muxes: Muxes | None = endpoint.muxes
        if muxes is not None:
            for conn in muxes.open:
                if conn.lends(ex.fresh) and would_do(conn, serving):
                    return conn.stream()
        return None

    def expect(self, endpoint: Endpoint, ex: Exchange) -> None:
        """More connections would be used if they were there; nobody waits for this one."""
        muxes = self._of(endpoint)
        if not muxes.making and ex.cluster.connections < ex.cluster.limits.connections:
            self._make(muxes, ex.cluster, endpoint, ex.plan.timeouts.connect_s)

    def wait(self, endpoint: Endpoint, serving: "Serving", ex: Exchange) -> None:
        """Until a connection is made, or a place for one is free."""
        muxes, cluster = self._of(endpoint), ex.cluster
        if not muxes.making:
            if not self.pool.room(cluster):
                self.pool.queue(cluster, serving)
                return
            self._make(muxes, cluster, endpoint, ex.plan.timeouts.connect_s)
        muxes.waiting.append(serving)

    def forget(self, endpoint: Endpoint, serving: "Serving") -> None:
        muxes: Muxes | None = endpoint.muxes
        if muxes is not None and serving in muxes.waiting:
            muxes.waiting.remove(serving)

    def retire(self, endpoint: Endpoint) -> None:
        """No more streams on the connections of now."""
        muxes: Muxes | None = endpoint.muxes
        if muxes is not None:
            muxes.stale = muxes.making
            for conn in list(muxes.open):
                conn.retire()

    def idle(self, endpoint: Endpoint) -> list[Http2Upstream]:
        """The connections on which nothing is under way."""
        muxes: Muxes | None = endpoint.muxes
        return [conn for conn in muxes.open if not conn.active] if muxes is not None else []

    def next_for_http1(self, endpoint: Endpoint, used: bool) -> "Serving | None":
        """The oldest that waits here and for which a pooled connection, which has just come free, does as well."""
        muxes: Muxes | None = endpoint.muxes
        if muxes is not None:
            for serving in muxes.waiting:
                fresh = serving.ex is not None and serving.ex.fresh
                if not needs_http2(endpoint, serving) and not (used and fresh):
                    muxes.waiting.remove(serving)
                    return serving
        return None

    # -- making them

    def _of(self, endpoint: Endpoint) -> Muxes:
        muxes: Muxes | None = endpoint.muxes
        if muxes is None:
            muxes = endpoint.muxes = Muxes()
        return muxes

    def _make(self, muxes: Muxes, cluster: Cluster, endpoint: Endpoint, timeout_s: float) -> None:
        muxes.making = True
        cluster.connections += 1
        self.world.errand(self._connect, cluster, endpoint, timeout_s)

    async def _connect(self, cluster: Cluster, endpoint: Endpoint, timeout_s: float) -> None:
        world = self.world
        until = world.clock() + timeout_s
        refused = False
        try:
            with trio.fail_after(timeout_s):
                dialled = await world.dial(endpoint, HTTP2, timeout_s)
        except trio.Cancelled:
            cluster.connections -= 1
            raise
        except OtherProtocol as other:
            refused, detail = True, str(other)
        except (DialError, trio.TooSlowError) as exc:
            detail = str(exc) or f"no connection within {timeout_s:g} s"
        except Exception as bug:  # or an address that TLS cannot ask for: this connection's end, not ours
            detail = f"{type(bug).__name__}: {bug}"
        else:
            conn = Http2Upstream(self, cluster, endpoint)
            world.reactor.call(conn.begin, dialled.sock, dialled.peer, dialled.fingerprint, until)
            return
        world.reactor.call(self._failed, cluster, endpoint, detail, refused)

    def _failed(self, cluster: Cluster, endpoint: Endpoint, detail: str, refused: bool) -> None:
        """All who wait have waited for this one, so all are told; whom HTTP/1.1 serves as well turns to that if the
        peer has refused nothing but HTTP/2."""
        muxes = self._of(endpoint)
        waiting, muxes.waiting = muxes.waiting, deque()
        muxes.making = muxes.stale = False
        muxes.http1_until = self.world.reactor.now + (WITHOUT_HTTP2_S if refused else AFTER_FAILURE_S)
        self.pool.gone(cluster)
        for serving in waiting:
            if refused and not needs_http2(endpoint, serving):
                self.pool.again(serving)
            else:
                serving.connect_failed(detail)

    # -- what the connections tell

    def settled(self, conn: Http2Upstream) -> None:
        """It can be used."""
        endpoint, cluster = conn.endpoint, conn.cluster
        muxes = self._of(endpoint)
        meters = self.pool.meters(cluster)
        meters.connections_up.value += 1
        meters.connections_up_total.inc()
        if conn.mesh:
            meters.handshakes_ok.inc()
        stale = muxes.stale or not cluster.holds(endpoint)
        muxes.making = muxes.stale = False
        muxes.open.append(conn)
        self._serve(conn, muxes)
        if stale:
            conn.retire()
        self._serve_rest(muxes)

    def not_settled(self, conn: Http2Upstream, detail: str) -> None:
        self._failed(conn.cluster, conn.endpoint, f"{conn.endpoint.key}: {detail}", False)

    def left(self, conn: Http2Upstream) -> None:
        """It lends no more."""
        muxes = self._of(conn.endpoint)
        if conn in muxes.open:
            muxes.open.remove(conn)

    def closed(self, conn: Http2Upstream) -> None:
        self.pool.meters(conn.cluster).connections_up.value -= 1
        self.pool.gone(conn.cluster)

    def streams_free(self, conn: Http2Upstream) -> None:
        """A stream may have come free."""
        cluster = conn.cluster
        muxes = self._of(conn.endpoint)
        if muxes.waiting:
            self._serve(conn, muxes)
        if cluster.waiters:
            self._serve_queue(conn, cluster)

    def _serve(self, conn: Http2Upstream, muxes: Muxes) -> None:
        for serving in list(muxes.waiting):
            ex = serving.ex
            if ex is not None and serving in muxes.waiting and conn.lends(ex.fresh):
                muxes.waiting.remove(serving)
                serving.connected(conn.stream())

    def _serve_rest(self, muxes: Muxes) -> None:
        """More wait than the new connection takes."""
        if not muxes.making:
            waiting, muxes.waiting = muxes.waiting, deque()
            for serving in waiting:
                self.pool.again(serving)

    def _serve_queue(self, conn: Http2Upstream, cluster: Cluster) -> None:
        """Connections are at their limit. A stream serves whom it can; an idle connection makes room for others."""
        for serving in list(cluster.waiters):
            ex = serving.ex
            if ex.endpoint is conn.endpoint and would_do(conn, serving) and conn.lends(ex.fresh):
                cluster.waiters.remove(serving)
                serving.connected(conn.stream())
        if cluster.waiters and not conn.active and cluster.connections >= cluster.limits.connections:
            conn.retire()
