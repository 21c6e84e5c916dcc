"""One request's policy, sans-IO: it is told what happened and answers what to do next.

Pure: time and randomness are arguments; connections and bytes never appear. The driver does what a `Do` says, then
reports back by one of the methods. `due` is the one deadline that the driver must watch for it at any moment; when it
comes, the driver calls `deadline`.
Invariants: every path ends in `_finish` exactly once, with the endpoint and the request slot given back; at most
1 + max_retries attempts and one free resend; after the response has begun nothing is sent again.
"""

import math
from collections.abc import Callable
from enum import Enum, auto

from .backoff import backoff_s, server_delay_s
from .cluster import Cluster, RoutePlan, Subset
from .endpoint import Endpoint
from .outcome import BY_REASON, OF_FAILURE, Blame, Failure, Outcome, Retryable


class Do(Enum):
    """The next step of whoever drives an Exchange."""

    SEND = auto()  # send the request to `endpoint`; on a new connection if `fresh`
    WAIT = auto()  # back off: nothing to do until `due`
    RELAY = auto()  # the response is the caller's: pass head and body on
    ANSWER = auto()  # give `outcome`'s own response
    CUT = auto()  # the response had begun: only closing the caller's connection can tell
    DONE = auto()  # finished; nothing more to do


SEND, WAIT, RELAY, ANSWER, CUT, DONE = Do
OK = Outcome.OK
OFF = math.inf
IDEMPOTENT = frozenset({b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE", b"TRACE"})
PROBE_MAX_S = 5.0
WORD_OF = {
    Outcome.UPSTREAM_RESET: "reset",
    Outcome.BAD_RESPONSE: "reset",
    Outcome.TIMEOUT_TRY: "timeout",
}
"""Which word of `retry.when` covers an answer that a peer's sidecar gave by itself."""


class Exchange:
    """The life of one request, from its head to the end of its answer."""

    __slots__ = (
        "attempt",
        "begun",
        "cap",
        "cluster",
        "due",
        "endpoint",
        "ends",
        "exhausted",
        "finished",
        "fresh",
        "generation",
        "inherited",
        "outcome",
        "own_deadline",
        "plan",
        "replayable",
        "request_done",
        "resent",
        "rnd",
        "safe",
        "started",
        "status",
        "subset",
        "total_s",
        "tried",
        "try_ends",
        "waiting",
    )

    def __init__(
        self,
        plan: RoutePlan,
        subset: Subset,
        method: bytes,
        now: float,
        rnd: Callable[[], float],
        told_s: float = OFF,
        cap: float = OFF,
        inherited: int = 0,
        idempotency_key: bool = False,
    ) -> None:
        """`told_s`: the seconds that the caller says are left; `cap`: the moment at which the inbound request ends
        that this one serves; `inherited`: the attempt number of that inbound request."""
        self.plan = plan
        self.cluster: Cluster = plan.cluster
        self.subset = subset
        self.rnd = rnd
        self.started = now
        total_s = plan.timeouts.total_s
        self.own_deadline = total_s <= told_s  # a total timeout blames the endpoint only if it was the policy's own
        self.total_s = total_s if total_s <= told_s else told_s
        self.ends = now + self.total_s
        self.cap = cap
        if cap < self.ends:
            self.ends = cap
            self.own_deadline = False
        self.due = OFF
        self.try_ends = OFF
        self.attempt = 0
        self.inherited = inherited
        self.safe = method in plan.retry_methods or idempotency_key
        self.endpoint: Endpoint | None = None
        self.generation = 0
        self.tried: tuple[Endpoint, ...] = ()
        self.fresh = self.begun = self.finished = self.waiting = self.resent = self.exhausted = False
        self.replayable = True  # the driver clears it once a byte of the body has been discarded
        self.request_done = True  # the driver clears it while the body is still arriving
        self.outcome = OK
        self.status = 0

    # -- what happened

    def begin(self, now: float) -> Do:
        """The request's head is here and allowed."""
        cluster = self.cluster
        cluster.active += 1  # given back by _finish
        if cluster.active > cluster.limits.requests:
            return self._overflow(now)
        if now >= self.ends:
            return self._answer(Outcome.TIMEOUT_TOTAL, now)
        cluster.budget.deposit(now)
        return self._try(now)

    def connected(self, now: float) -> None:
        """A connection was taken and the request is on its way: a body still arriving stops the clock."""
        if not self.request_done:
            self.due = OFF

    def request_end(self, now: float) -> None:
        """The last byte of the request's body went out: total and try restart here (a long upload is not a slow
        server)."""
        self.request_done = True
        if self.begun or self.finished or self.waiting or self.endpoint is None:
            return
        self._restart(now)

    def response_head(
        self,
        status: int,
        now: float,
        reason: str | None = None,
        exhausted: bool = False,
        retry_after_s: float | None = None,
    ) -> Do:
        """A final response head arrived. `reason` and `exhausted` are what a mesh peer's sidecar said of it;
        `retry_after_s` is what the server asks for, wanted only where the policy may retry this status."""
        self.status = status
        said = BY_REASON.get(reason) if reason else None
        if said is None:
            retry = status in self.plan.retry.statuses and self._repeatable(self.safe)
        else:
            retry = self._retryable(said, status, now)
        if retry and not exhausted and self._take_retry(now, retry_after_s):
            self._judge(status, said, now)
            return WAIT
        self._judge(status, said, now)
        self.begun = True
        self.due = OFF
        return RELAY

    def response_end(self, now: float) -> Do:
        """The last byte of the response arrived."""
        self._leave()
        self._finish(OK, now)
        return DONE

    def failed(self, failure: Failure, now: float, reused: bool = False) -> Do:
        """The attempt ended without a complete response. `reused`: the connection had served before and died before
        the first byte of this response."""
        if self.begun:
            self._blame(now)
            self._finish(Outcome.CUT_SHORT, now)
            return CUT
        connect = failure is Failure.CONNECT
        if reused and not connect and self.safe and self.replayable and not self.resent:
            self.resent = True  # the idle-close race: neither a retry nor the endpoint's fault
            self.cluster.resends += 1
            self.fresh = True
            if self.due == OFF:
                self._restart(now)
            return SEND
        listed = "reset" in self.plan.retry.failures
        retry = self.replayable if connect else listed and self._repeatable(self.safe)
        if retry and self._take_retry(now):
            self._blame(now)
            return WAIT
        self._blame(now)
        return self._answer(OF_FAILURE[failure], now)

    def refused(self, outcome: Outcome, now: float) -> Do:
        """This sidecar itself could not go on (a full queue, say): answered at once, nobody blamed."""
        self._neutral(now)
        return self._answer(outcome, now)

    def deadline(self, now: float) -> Do:
        """`due` has come: the end of a back-off, of the attempt, or of the whole request."""
        if self.waiting:
            self.waiting = False
            if now >= self.ends:  # woken too late: nobody has been asked again, so nobody is to blame
                return self._answer(Outcome.TIMEOUT_TOTAL, now)
            return self._try(now)
        if self.due < self.ends:
            if "timeout" in self.plan.retry.failures and self._repeatable(self.safe) and self._take_retry(now):
                self._blame(now)
                return WAIT
            self._blame(now)
            return self._answer(Outcome.TIMEOUT_TRY, now)
        if self.own_deadline:
            self._blame(now)
        else:
            self._neutral(now)
        return self._answer(Outcome.TIMEOUT_TOTAL, now)

    def body_timeout(self, now: float) -> Do:
        """A body, either way, was silent for too long, or took longer than allowed."""
        if self.begun:
            self._neutral(now)
            self._finish(Outcome.CUT_SHORT, now)
            return CUT
        self._neutral(now)
        return self._answer(Outcome.REQUEST_TIMEOUT, now)

    def caller_gone(self, now: float) -> Do:
        """The caller closed its connection, or broke the protocol: the upstream work is cancelled."""
        if not self.finished:
            self.cluster.cancelled += 1
            self._neutral(now)
            self._finish(Outcome.CALLER_GONE, now)
        return DONE

    # -- decisions

    def _restart(self, now: float) -> None:
        """The clocks of the request and of the attempt begin anew: they stood still while the body came."""
        timeouts = self.plan.timeouts
        self.ends = now + self.total_s
        self.own_deadline = self.total_s >= timeouts.total_s
        if self.cap < self.ends:
            self.ends = self.cap
            self.own_deadline = False
        self.try_ends = now + timeouts.try_s
        self.due = self.ends if self.ends <= self.try_ends else self.try_ends

    def _try(self, now: float) -> Do:
        endpoint = self.subset.pick(now, self.tried, self.rnd)
        if endpoint is None:
            return self._no_endpoint(now)
        timeouts = self.plan.timeouts
        endpoint.active += 1
        self.endpoint = endpoint
        self.fresh = False
        self.cluster.attempts += 1
        breaker = endpoint.breaker
        self.generation = breaker.generation
        if breaker.tripped:
            breaker.start_probe(now, min(timeouts.try_s, PROBE_MAX_S))
            self.generation = breaker.generation
        self.try_ends = now + timeouts.try_s
        self.due = self.ends if self.ends <= self.try_ends else self.try_ends
        return SEND

    def _no_endpoint(self, now: float) -> Do:
        fallback = self.plan.fallback
        if fallback is not None and self.subset is not fallback.subset and fallback.subset is not None:
            cluster = fallback.cluster
            if cluster is not self.cluster:
                self.cluster.active -= 1
                self.cluster = cluster
                cluster.active += 1
                if cluster.active > cluster.limits.requests:
                    return self._overflow(now)
                if not self.attempt:
                    cluster.budget.deposit(now)
            self.subset = fallback.subset
            self.tried = ()
            return self._try(now)
        circuit = self.subset.why_none(now) == "circuit_open"
        return self._answer(Outcome.CIRCUIT_OPEN if circuit else Outcome.NO_HEALTHY_ENDPOINT, now)

    def _repeatable(self, safe: bool) -> bool:
        """Whether the request may be sent again although the application may have seen it."""
        return safe and self.replayable and self.inherited == 0

    def _elsewhere(self, now: float) -> bool:
        """Whether there is an endpoint that this request has not tried."""
        return any(
            endpoint is not self.endpoint and endpoint not in self.tried and endpoint.breaker.allows(now)
            for endpoint in self.subset.endpoints
        )

    def _retryable(self, said: Outcome, status: int, now: float) -> bool:
        """What a peer's sidecar answered by itself; the table beats the rules for status classes."""
        kind = said.retryable
        if kind is Retryable.ANY:
            return self.replayable and (said is not Outcome.DRAINING or self._elsewhere(now))
        if kind is Retryable.NEVER:
            return False
        listed = status in self.plan.retry.statuses
        if kind is Retryable.SAFE:
            listed = listed or WORD_OF[said] in self.plan.retry.failures
        return listed and self._repeatable(self.safe)

    def _take_retry(self, now: float, asked_s: float | None = None) -> bool:
        """Spend one retry if there is one, the budget allows it and the wait ends in time; arm the wait. `asked_s`: how
        long the server asks to be left alone."""
        retry = self.plan.retry
        if self.attempt >= retry.max_retries:
            self.exhausted = retry.max_retries > 0
            return False
        if self.due == OFF:
            self._restart(now)
        delay_s: float | None
        if asked_s is not None and retry.honour_retry_after:
            delay_s = server_delay_s(asked_s, retry.max_server_delay_s, self.rnd)
            if delay_s is None:
                return False
        else:
            delay_s = backoff_s(self.attempt + 1, retry.base_s, retry.max_s, self.rnd)
        if now + delay_s >= self.ends:
            return False
        cluster = self.cluster
        if not cluster.budget.withdraw(now):
            cluster.budget_exhausted += 1
            self.exhausted = True
            return False
        self.attempt += 1
        cluster.retries += 1
        endpoint = self.endpoint
        assert endpoint is not None
        self.tried += (endpoint,)
        self.waiting = True
        self.due = now + delay_s
        return True

    # -- what the endpoint's breaker is told; each of them gives the endpoint back

    def _judge(self, status: int, said: Outcome | None, now: float) -> None:
        """A response head is the verdict; the endpoint is given back at the end of the response, unless it is
        retried."""
        endpoint = self.endpoint
        assert endpoint is not None
        breaker = endpoint.breaker
        if said is not None and (said.blame is Blame.NO or (said is Outcome.TIMEOUT_TOTAL and not self.own_deadline)):
            breaker.neutral(self.generation, now)
        elif status == 429:
            breaker.throttled(self.generation, now, self.rnd)
        elif status >= 500 and status != 501:
            endpoint.failures += 1
            breaker.failure(self.generation, now, self.rnd)
        else:
            endpoint.successes += 1
            breaker.success(self.generation, now)
        if self.waiting:
            self._leave()

    def _blame(self, now: float) -> None:
        endpoint = self.endpoint
        if endpoint is not None:
            endpoint.failures += 1
            endpoint.breaker.failure(self.generation, now, self.rnd)
            self._leave()

    def _neutral(self, now: float) -> None:
        endpoint = self.endpoint
        if endpoint is not None:
            endpoint.breaker.neutral(self.generation, now)
            self._leave()

    def _leave(self) -> None:
        endpoint = self.endpoint
        if endpoint is not None:
            endpoint.active -= 1
            self.endpoint = None

    def _overflow(self, now: float) -> Do:
        self.cluster.overflows += 1
        return self._answer(Outcome.OVERFLOW, now)

    def _answer(self, outcome: Outcome, now: float) -> Do:
        self.status = outcome.status
        self._finish(outcome, now)
        return ANSWER

    def _finish(self, outcome: Outcome, now: float) -> None:
        assert not self.finished
        self.finished = True
        self.due = OFF
        self.outcome = outcome
        self.cluster.active -= 1
