"""The pool: which connection a request is sent on, and who waits for one.

Knows the limits on connections; knows nothing of routes or retries. Requests to an application go over the protocol of
its port. Between sidecars few requests at a time have pooled connections of HTTP/1.1, which cost the least each; from
MULTIPLEX_FROM on they share multiplexed ones (`streams`), whose bytes leave once a batch.
Invariants: `cluster.connections` counts every open or opening connection exactly once; who waits is in one queue.
"""

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from sidecar.policy.cluster import Cluster
from sidecar.policy.endpoint import Endpoint
from sidecar.policy.exchange import Exchange
from sidecar.policy.outcome import Outcome
from sidecar.telemetry.catalogue import SideMeters

from .channel import Channel
from .connect import DialError
from .streams import Streams, may_multiplex, needs_http2
from .tls import HTTP1
from .up_stream import UpStream
from .upstream import Upstream

if TYPE_CHECKING:
    from .serving import Serving
    from .world import World

Up = Upstream | UpStream
"""What a Serving has of the upstream side."""

MULTIPLEX_FROM = 6
"""Requests in flight to one endpoint, the new one included, from which multiplexing costs less CPU: some 35 % more than
HTTP/1.1 with one at a time, 10 % more with 4, 8 % less with 6, 12 % with 8 to 32 and 20 % with 128 (two hops of mutual
TLS, libnghttp2, both sidecars together; on a busy machine)."""
DIALS_MAX = 16  # connections being made to one endpoint at a time: handshakes cost both ends a millisecond each


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
        self.streams = Streams(self)
        self.multiplex_from = float(MULTIPLEX_FROM)

    def take(self, endpoint: Endpoint, serving: "Serving", ex: Exchange) -> Up | None:
        """A connection or a stream at once; otherwise None, and `serving.connected`, `connect_failed` or `overflow`
        follows."""
        if self._multiplexes(endpoint, serving):
            stream = self.streams.take(endpoint, serving, ex)
            if stream is not None:
                return stream
            if not needs_http2(endpoint, serving):
                up = self._idle(endpoint, serving, ex)
                if up is not None:
                    self.streams.expect(endpoint, ex)
                    return up
            serving.connecting = True
            self.streams.wait(endpoint, serving, ex)
            return None
        up = self._idle(endpoint, serving, ex)
        if up is not None:
            return up
        cluster = ex.cluster
        if self.room(cluster):
            serving.connecting = True
            self._dial(cluster, endpoint, serving, ex)
            return None
        stream = self.streams.instead(endpoint, serving, ex)
        if stream is None:
            serving.connecting = True
            self.queue(cluster, serving)
        return stream

    def _multiplexes(self, endpoint: Endpoint, serving: "Serving") -> bool:
        if not endpoint.mesh or serving.m.grpc:
            return needs_http2(endpoint, serving)
        busy = endpoint.active >= self.multiplex_from
        if not busy and endpoint.muxes is None:
            return False
        return self.streams.worthwhile(endpoint, busy) and may_multiplex(endpoint, serving)

    def _idle(self, endpoint: Endpoint, serving: "Serving", ex: Exchange) -> Upstream | None:
        if not ex.fresh:
            idle = endpoint.idle
            while idle:
                up: Upstream = idle.pop()
                if self.world.reactor.now - up.idle_since > ex.cluster.pool_idle_s:
                    up.discard()
                elif (not up.mesh or not ex.safe or serving.unsent) and up.ch.unread():
                    # What cannot be sent twice: look before we leap. And an application may have sent what nobody asked
                    # for, which would be taken for the answer.
                    up.discard()
                else:
                    return up
        return None

    def room(self, cluster: Cluster) -> bool:
        """Whether another connection may be made, if need be in the place of an idle one."""
        return cluster.connections < cluster.limits.connections or self._evict(cluster)

    def queue(self, cluster: Cluster, serving: "Serving") -> None:
        """Connections are at their limit: wait, if there is room for that."""
        if len(cluster.waiters) < cluster.limits.pending:
            cluster.waiters.append(serving)
        else:
            serving.connecting = False
            serving.overflow(cluster)

    def again(self, serving: "Serving") -> None:
        """What a request has waited for is not to be had: it takes its turn anew."""
        ex = serving.ex
        if serving.connecting and not serving.over and ex is not None and ex.endpoint is not None:
            found = self.take(ex.endpoint, serving, ex)
            if found is not None:
                serving.connected(found)

    def give_back(self, up: Upstream) -> None:
        """A connection is free: it serves the oldest request that waits for its endpoint, or makes room for one that
        waits for another, or rests."""
        endpoint, cluster = up.endpoint, up.cluster
        if endpoint.dials is not None or endpoint.muxes is not None or cluster.waiters:
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
        if endpoint is None:
            return
        if endpoint.dials is not None and serving in endpoint.dials.wanting:
            endpoint.dials.wanting.remove(serving)
            self._unqueue(endpoint.dials, ex.cluster)
        self.streams.forget(endpoint, serving)

    def closed(self, up: Upstream) -> None:
        self.meters(up.cluster).connections_up.value -= 1
        self.gone(up.cluster)

    def meters(self, cluster: Cluster) -> SideMeters:
        return self.world.meters.inbound if cluster.side == "in" else self.world.meters.outbound

    def close_idle(self, endpoint: Endpoint) -> None:
        """Close an endpoint's idle connections: it left, or they were made under other terms."""
        for up in endpoint.idle:
            up.discard()
        endpoint.idle.clear()
        self.streams.retire(endpoint)

    def retire(self, endpoints: Iterable[Endpoint]) -> None:
        """Endpoints have left, or are reached under other terms: idle connections close now, busy ones with the answers
        under way."""
        gone = dict.fromkeys(endpoints)
        for endpoint in gone:
            self.close_idle(endpoint)
            if endpoint.dials is not None:
                endpoint.dials.stale = True
        for up in self.busy() if gone else ():
            if up.endpoint in gone:
                up.stale = True

    def busy(self) -> list[Up]:
        """The connections and streams that are lent out."""
        servings = [serving for down in self.world.downstreams for serving in down.servings()]
        servings += [s.race.rival for s in servings if s.race is not None and s.race.rival is not None]
        return [serving.up for serving in (*servings, *self.world.copies.servings) if serving.up is not None]

    def end_banned(self, banned: Callable[[Channel], bool]) -> list[Up]:
        """Close the idle connections to whom we no longer speak; returns the busy ones, which close after the answer
        under way."""
        for cluster in self.world.state:
            for endpoint in cluster.endpoints.values():
                for up in [up for up in endpoint.idle if banned(up.ch)]:
                    endpoint.idle.remove(up)
                    up.discard()
                for conn in [conn for conn in self.streams.idle(endpoint) if banned(conn.ch)]:
                    conn.retire()
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
                if endpoint.muxes is not None:
                    for conn in self.streams.idle(endpoint):
                        if now - conn.idle_since > cluster.pool_idle_s:
                            conn.retire()

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
        waiting = self.streams.next_for_http1(endpoint, up.used > 0)
        if waiting is not None:
            return waiting
        if cluster.waiters:
            oldest: Serving = cluster.waiters[0]
            ex = oldest.ex
            assert ex is not None
            if ex.endpoint is endpoint and not (up.used and ex.fresh) and not needs_http2(endpoint, oldest):
                cluster.waiters.popleft()
                return oldest
        return None

    def _hand_over(self, up: Upstream, serving: "Serving", ex: Exchange) -> None:
        wanted = serving.connecting and serving.ex is ex and not serving.over and ex.endpoint is up.endpoint
        if wanted and (not up.mesh or not ex.safe) and up.ch.unread():
            up.discard()  # as in `take`
        if wanted and up.ch.open:
            serving.connected(up)
        elif up.ch.open:
            self.give_back(up)
        elif wanted:  # it closed in between; the place that it left is taken again
            self.again(serving)

    def gone(self, cluster: Cluster) -> None:
        """A connection, or the attempt at one, is no more."""
        cluster.connections -= 1
        if cluster.waiters:
            self.world.reactor.soon.append(partial(self._serve_waiters, cluster))

    def _serve_waiters(self, cluster: Cluster) -> None:
        while cluster.waiters and cluster.connections < cluster.limits.connections:
            self.again(cluster.waiters.popleft())

    def _evict(self, cluster: Cluster) -> bool:
        """Make room by closing an idle connection to some other endpoint."""
        for endpoint in cluster.endpoints.values():
            if endpoint.idle:
                endpoint.idle.pop(0).discard()
                return True
            for conn in self.streams.idle(endpoint):
                conn.retire_now()
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
            self.gone(cluster)

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
        except Exception as bug:  # or an address that TLS cannot ask for: this connection's end, not ours
            detail = f"{type(bug).__name__}: {bug}"
            world.reactor.call(self._failed, cluster, endpoint, dials, serving, detail)
            return
        up = Upstream(self, cluster, endpoint)
        up.begin(dialled.sock, dialled.peer, dialled.fingerprint)
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
        self.gone(cluster)

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
            self.gone(cluster)
            if other in dials.wanting:
                dials.wanting.remove(other)
                victims.append(other)
        self._done(cluster, endpoint, dials)
        self.gone(cluster)
        for each in victims:
            each.connect_failed(detail)

    def _made(self, up: Upstream, dials: _Dials) -> None:
        meters = self.meters(up.cluster)
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
