"""Hedges: a second attempt of a request, beside a first one that is slow (docs/hedging.md).

A Race belongs to one Serving and decides, by sidecar.policy.hedging, which of two attempts it goes on with. The hedge
is one more Serving, which borrows a connection as any other does and hands it over with the first response head that is
good; nothing of it reaches the caller, the filters or the log. Must not decide by itself what a good answer is.
Invariants: at most one hedge for each request, and none where it could not be sent again as a retry; the attempt that
is not wanted any more is cancelled at once; every hedge ends in exactly one count.
"""

from typing import TYPE_CHECKING, Any

from sidecar.policy import hedging
from sidecar.policy.exchange import SEND, Exchange
from sidecar.policy.hedging import Head
from sidecar.policy.outcome import Failure, Outcome
from sidecar.wire.http1 import Message

from .serving import Serving
from .timers import Timer
from .up_stream import UpStream

if TYPE_CHECKING:
    from sidecar.policy.cluster import Cluster

    from .pool import Up
    from .world import World

BODY_BYTES_MAX = 64 * 1024  # as for retries


class Hedges:
    """Begins the races of one sidecar."""

    __slots__ = ("world",)

    def __init__(self, world: "World") -> None:
        self.world = world

    def arm(self, serving: Serving, ex: Exchange) -> None:
        """An attempt of a request on a route that hedges goes out."""
        race = serving.race
        if race is None:
            m = serving.m
            if m.upgrade is not None or m.extended or not hedging.hedgeable(ex, m.method):
                return
            race = serving.race = Race(serving, ex)
        race.arm()


class Race:
    """The one hedge that a request may have. `sent`: 1 from when it has gone out; `rival`: as long as it is under way;
    `early`: a gRPC call's head without a message, which decides nothing yet."""

    __slots__ = ("early", "ex", "rival", "sent", "serving", "timer", "world")

    def __init__(self, serving: Serving, ex: Exchange) -> None:
        self.serving, self.ex = serving, ex
        self.world: World = serving.world
        self.timer = Timer(self.world.timers, self._late)
        self.rival: Rival | None = None
        self.early: Message | None = None
        self.sent = 0

    def arm(self) -> None:
        """An attempt goes out, or the request is whole: from now on its response is late after `hedge.after`."""
        if not self.sent:
            self.timer.set(self.world.reactor.now + self.ex.plan.hedge_s)

    def _late(self) -> None:
        serving, ex, now = self.serving, self.ex, self.world.reactor.now
        waits = not serving.over and serving.held is None and not serving.waiting_filter
        if self.sent or not waits or serving.ex is not ex or not hedging.awaited(ex):
            return
        if ex.cluster is not ex.plan.cluster or serving.unsent_bytes > BODY_BYTES_MAX:
            return  # it has gone over to a fallback, say
        found = hedging.hedge(ex, now)
        if isinstance(found, str):
            self.count(found)
            return
        self.sent = 1
        rival = self.rival = Rival(self, found, now)
        rival.drive(SEND)

    def count(self, result: str) -> None:
        self.world.service_meters("out", self.ex.plan.service).hedges.inc(result)

    # -- what the request's own attempt meets; True: that is settled

    def decides(self, m: Message, up: "Up") -> bool:
        """It has a response head."""
        rival = self.rival
        if rival is None:
            return False
        serving, ex, now = self.serving, self.ex, self.world.reactor.now
        worth = _worth(ex, m, up)
        if worth is Head.OPEN:
            self.early = m
            return True
        self.early = None
        if worth is Head.GOOD:
            self.rival = None
            rival.drop("lost")
            return False
        assert serving.endpoint is not None
        lost_at = serving.endpoint
        hedging.answered(ex, m.status, _reason(m, up), m.grpc_status, now)
        if m.done:
            serving.up = None
            up.release(m)
        else:
            serving.drop_upstream()
        self._take_over(rival, lost_at, now)
        return True

    def survives(self, failure: Failure | None, reused: bool = False) -> bool:
        """It has failed, or (None) its time is up; its connection is given up already."""
        rival = self.rival
        if rival is None:
            return False
        now, lost_at = self.world.reactor.now, self.serving.endpoint
        assert lost_at is not None
        self.early = None
        hedging.failed(self.ex, failure, reused, now)
        self._take_over(rival, lost_at, now)
        return True

    def over(self) -> None:
        """The request has ended, however."""
        self.timer.close()
        rival, self.rival = self.rival, None
        if rival is not None:
            rival.drop("cancelled", late=self.ex.outcome is Outcome.TIMEOUT_TOTAL)

    # -- what the hedge meets

    def won(self, rival: "Rival", m: Message) -> None:
        """It has a good response head: the request's own attempt is cancelled."""
        serving, now, up = self.serving, self.world.reactor.now, rival.up
        assert serving.endpoint is not None
        lost_at = serving.endpoint
        self.early = None
        serving.drop_upstream()
        hedging.beaten(self.ex, now)
        self._take_over(rival, lost_at, now, "won")
        if isinstance(up, UpStream):  # it has begun to tell a Serving that is over
            self.world.reactor.soon.append(up.news)
        serving.respond(m)

    def fallen(self) -> None:
        """It has failed: the request's own attempt goes on alone."""
        self.rival = None
        early, self.early = self.early, None
        if early is not None:
            self.serving.respond(early)

    def _take_over(self, rival: "Rival", lost_at: Any, now: float, result: str = "promoted") -> None:
        """The hedge's attempt is the request's own from now on."""
        serving, ex = self.serving, self.ex
        self.rival = None
        serving.held = None
        up, early, connecting = rival.up, rival.early, rival.connecting
        rival.up = None
        rival.drop_upstream()  # its place in a queue
        hedging.adopt(ex, rival.ex_, lost_at, now)
        rival.end(result)
        serving.endpoint, serving.up = ex.endpoint, up
        serving.timer.set(ex.due)
        if up is not None:
            up.serving = serving
            if early is not None:
                serving.respond(early)
        elif connecting:
            assert ex.endpoint is not None
            found = self.world.pool.take(ex.endpoint, serving, ex)
            if found is not None:
                serving._attach(found)


class Rival(Serving):
    """The hedge, until it has a response head. `early`: as of the Race."""

    __slots__ = ("early", "ex_", "of")

    def __init__(self, race: Race, ex: Exchange, now: float) -> None:
        original = race.serving
        super().__init__(race.world, original.entry, _Beside(race.world, self), original.m, now)
        self.of = race
        self.ex = self.ex_ = ex
        self.early: Message | None = None
        self.plan, self.host, self.trace = original.plan, original.host, original.trace
        self.continued = True
        if original.replay is not None:
            self.unsent += original.replay.chunks
        self.unsent += original.unsent

    # -- from the connection or the pool

    def respond(self, m: Message) -> None:
        up, ex = self.up, self.ex_
        assert up is not None
        worth = _worth(ex, m, up)
        if worth is Head.OPEN:
            self.early = m
        elif worth is Head.GOOD:
            self.early = None
            self.of.won(self, m)
        else:
            hedging.answered(ex, m.status, _reason(m, up), m.grpc_status, self.world.reactor.now)
            if m.done:
                self.up = None
                up.release(m)
            self._fail()

    def informational(self, m: Message) -> None:
        pass

    def upstream_failed(self, failure: Failure, reused: bool) -> None:
        if not self.over:
            self.drop_upstream()
            hedging.failed(self.ex_, failure, reused, self.world.reactor.now)
            self._fail()

    def connect_failed(self, detail: str) -> None:
        self.connecting = False
        self.world.note_connect_failure(self, detail)
        hedging.failed(self.ex_, Failure.CONNECT, False, self.world.reactor.now)
        self._fail()

    def overflow(self, cluster: "Cluster") -> None:
        hedging.failed(self.ex_, Failure.REFUSED, False, self.world.reactor.now)
        self._fail(Outcome.OVERFLOW.reason)

    def upstream_drained(self) -> None:
        pass

    def due(self) -> None:
        """Its own time, or all of the request's, is up."""
        if not self.over:
            self.drop_upstream()
            self.ex_.deadline(self.world.reactor.now)
            self._fail()

    def caller_gone(self) -> None:
        """A mistake of ours has ended it."""
        if not self.over:
            self.drop("failed")
            self.of.fallen()

    # -- the end

    def _fail(self, result: str = "failed") -> None:
        self.drop_upstream()
        self.end(result)
        self.of.fallen()

    def drop(self, result: str, late: bool = False) -> None:
        """Nobody waits for it any more."""
        self.drop_upstream()
        hedging.drop(self.ex_, self.world.reactor.now, late)
        self.end(result)

    def end(self, result: str) -> None:
        if self.over:
            return
        self.over = True
        self.timer.close()
        self.forget_body()
        hedging.close(self.ex_, self.world.reactor.now)
        self.of.count(result)


class _Beside:
    """The caller's side of a hedge: there is none."""

    __slots__ = ("rival", "serving", "timer")

    peer = ""
    address = ""
    relayed = False
    last = False

    def __init__(self, world: "World", rival: Rival) -> None:
        self.rival = rival
        self.timer = Timer(world.timers, self._due)
        self.serving: Serving | None = None

    def _due(self) -> None:
        self.rival.due()

    def pause(self) -> None:
        pass

    def resume(self) -> None:
        pass

    def cut(self) -> None:
        pass


def _reason(m: Message, up: "Up") -> str | None:
    return m.reason.decode() if m.reason and up.mesh else None


def _worth(ex: Exchange, m: Message, up: "Up") -> Head:
    return hedging.judge(ex, m.status, _reason(m, up), m.grpc_status, bool(m.body), m.done)
