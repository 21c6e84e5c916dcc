"""Hedges in a run: two calls that race for one, as sidecar.proxy.hedge has it on sockets.

A hedge is a Call of its own, with an Exchange of its own, which nobody waits for but the call that it belongs to. Must
not decide what a good answer is: sidecar.policy.hedging does. Invariant: a call has at most one hedge, and when either
of the two is over they know nothing of each other any more.
"""

from typing import TYPE_CHECKING

from sidecar.policy import hedging
from sidecar.policy.endpoint import Endpoint
from sidecar.policy.exchange import Exchange
from sidecar.policy.hedging import Head
from sidecar.policy.outcome import Failure

from .life import Attempt, Call

if TYPE_CHECKING:
    from .engine import Engine


class Hedges:
    """Those of one run."""

    def __init__(self, engine: "Engine") -> None:
        self.engine = engine

    def arm(self, call: Call, ex: Exchange, now: float) -> None:
        """An attempt goes out on a route that hedges."""
        if not call.hedged and hedging.hedgeable(ex, call.ask.method):
            self.engine.push(now + ex.plan.hedge_s, self._late, call, call.serial)

    def _late(self, call: Call, serial: int, now: float) -> None:
        ex = call.ex
        if call.serial != serial or call.over or ex is None or not hedging.awaited(ex):
            return
        found = hedging.hedge(ex, now)
        if isinstance(found, str):
            call.edge.hedged(found)
            return
        call.hedged = True
        hedge = Call(call.ask, call.sidecar, call.parent, call.started)
        hedge.first, hedge.hedged, hedge.ex = False, True, found
        hedge.other, call.other = call, hedge
        hedge.is_hedge = True
        self.engine.send(hedge, found, now)

    # -- what happens to either; None or True: it is settled

    def answered(self, call: Call, attempt: Attempt, status: int, now: float) -> Call | None:
        """The call that this is the answer of."""
        ex, other = call.ex, call.other
        assert ex is not None and other is not None and ex.endpoint is not None
        lost_at = ex.endpoint
        if hedging.judge(ex, status, attempt.reason, None, True, True) is Head.BAD:
            call.attempt = attempt.call = None
            call.serial += 1
            hedging.answered(ex, status, attempt.reason, None, now)
            self._lost(call, other, lost_at, now)
            return None
        if not call.is_hedge:
            self._drop(other, call, "lost", now)
            return call
        assert other.ex is not None and other.ex.endpoint is not None
        lost_at = other.ex.endpoint
        self._forget(other, True, now)
        hedging.beaten(other.ex, now)
        self._take_over(other, call, lost_at, "won", now)
        return other

    def failed(self, call: Call, failure: Failure | None, reused: bool, now: float) -> bool:
        """None: its time is up. Its attempt is given up already."""
        ex, other = call.ex, call.other
        if other is None or ex is None or ex.endpoint is None:
            return False
        if failure is None and now >= ex.ends and not call.is_hedge:
            self._drop(other, call, "cancelled", now, late=True)
            return False
        lost_at = ex.endpoint
        call.serial += 1
        if failure is None and call.is_hedge:
            ex.deadline(now)
        else:
            hedging.failed(ex, failure, reused, now)
        self._lost(call, other, lost_at, now)
        return True

    def cancelled(self, call: Call, now: float) -> None:
        """Nobody waits for the call any more."""
        if call.other is not None:
            self._drop(call.other, call, "cancelled", now)

    # -- inside

    def _lost(self, call: Call, other: Call, lost_at: Endpoint, now: float) -> None:
        if call.is_hedge:
            assert call.ex is not None
            hedging.close(call.ex, now)
            self._part(call, other, "failed")
        else:
            self._take_over(call, other, lost_at, "promoted", now)

    def _drop(self, hedge: Call, call: Call, result: str, now: float, late: bool = False) -> None:
        assert hedge.ex is not None
        self._forget(hedge, result == "lost", now)
        hedging.drop(hedge.ex, now, late)
        self._part(hedge, call, result)

    def _forget(self, call: Call, beaten: bool, now: float) -> None:
        """Its attempt is cancelled; one that was `beaten` is neither a good one nor a bad one."""
        attempt = call.attempt
        if attempt is not None:
            if beaten:
                call.edge.beaten += 1
                attempt.server.beaten += 1
            self.engine.abandon(attempt, call, now)

    def _take_over(self, call: Call, hedge: Call, lost_at: Endpoint, result: str, now: float) -> None:
        """The call goes on with the hedge's attempt."""
        assert call.ex is not None and hedge.ex is not None
        hedging.adopt(call.ex, hedge.ex, lost_at, now)
        call.attempt, hedge.attempt = hedge.attempt, None
        if call.attempt is not None:
            call.attempt.call = call
        self._part(hedge, call, result)
        call.serial += 1
        self.engine.watch(call, call.ex.due)

    def _part(self, hedge: Call, call: Call, result: str) -> None:
        hedge.other = call.other = None
        hedge.over = True
        hedge.serial += 1
        hedge.edge.hedged(result)
