"""One request's policy, sans-IO: it is told what happened and answers what to do next.

Pure: time and randomness are arguments; connections and bytes never appear. The driver does what a `Do` says, then
reports back by one of the methods. `due` is the one deadline that the driver must watch for it at any moment; when it
comes, the driver calls `deadline`.

A gRPC call differs in three things. Its deadline covers the whole call, so `due` stays set until the end. Its status
may come with the trailers, so the endpoint is judged there, unless the head has to do (a breaker's probe). And what
`when` says by a gRPC status holds for a call that got no message, POST though it is.
Invariants: every path ends in `_finish` exactly once, with the endpoint and the request slot given back; at most
1 + max_retries attempts, one free resend (RESENDS_MAX where the server has said that it had not begun), and one more to
the service of a `fallback` after an overflow; after the response has begun nothing is sent again. (A hedge has an
Exchange of its own: hedging.py.)
"""

import math
from collections.abc import Callable
from enum import Enum, auto

from .backoff import backoff_s, server_delay_s
from .cluster import Aimed, Cluster, RoutePlan, Subset
from .endpoint import Endpoint
from .outcome import (
    BY_REASON,
    GRPC_FAILURES,
    GRPC_OF_HTTP,
    OF_FAILURE,
    Blame,
    Failure,
    Grpc,
    Outcome,
    Retryable,
)


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
RESENDS_MAX = 3  # of a request that a server going away has not begun; its next connection may be going away as well
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
        "feedback",
        "finished",
        "fresh",
        "generation",
        "grpc",
        "head_at",
        "inherited",
        "judged",
        "outcome",
        "own_deadline",
        "plan",
        "replayable",
        "request_done",
        "resends",
        "rnd",
        "safe",
        "sent_at",
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
        subset: Subset | Aimed,
        method: bytes,
        now: float,
        rnd: Callable[[], float],
        told_s: float = OFF,
        cap: float = OFF,
        inherited: int = 0,
        idempotency_key: bool = False,
        grpc: bool = False,
    ) -> None:
        """`told_s`: the seconds that the caller says are left; `cap`: the moment at which the inbound request ends
        that this one serves; `inherited`: the attempt number of that inbound request; `grpc`: it is a gRPC call."""
        self.plan = plan
        self.cluster: Cluster = plan.cluster
        self.subset = subset
        self.rnd = rnd
        self.started = now
        self.grpc = grpc
        total_s = plan.timeouts.of_grpc_s if grpc else plan.timeouts.total_s
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
        self.fresh = self.begun = self.finished = self.waiting = self.exhausted = False
        self.judged = False  # what the endpoint's breaker is to hear of this attempt has been said
        self.resends = 0  # free of charge
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
        """A connection was taken and the request is on its way: a body still arriving stops the clock, but for that of
        a gRPC call as a whole."""
        if not self.request_done:
            self.due = self.ends if self.grpc else OFF

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
        grpc_status: int | None = None,
        message: bool = True,
    ) -> Do:
        """A final response head arrived. `reason` and `exhausted` are what a mesh peer's sidecar said of it;
        `retry_after_s` is what the server asks for, wanted only where the policy may retry this status. Of a gRPC call:
        its status, where it is known by now, and whether any message came."""
        self.status = status
        said = BY_REASON.get(reason) if reason else None
        if not self.grpc:
            grpc_status = None
        else:
            if grpc_status is None and status != 200:
                grpc_status = GRPC_OF_HTTP.get(status, Grpc.UNKNOWN)
            if said is not None and said.status:
                status = said.status  # gRPC has it as 200
        empty = None if message else grpc_status
        retry = self._listed(status, empty) if said is None else self._retryable(said, status, empty, now)
        if retry and not exhausted and self._take_retry(now, retry_after_s):
            self._judge(status, said, grpc_status, now)
            self._leave()
            return WAIT
        self._judge(status, said, grpc_status, now)
        if said is Outcome.OVERFLOW and self._may_fall_back():
            self._leave()
            if self.due == OFF:
                self._restart(now)
            return self._fall_back(now)
        self.begun = True
        self.due = self.ends if self.grpc else OFF
        return RELAY

    def response_end(self, now: float, grpc_status: int | None = None) -> Do:
        """The last byte of the response arrived; a gRPC call's status with it. One without a status is UNKNOWN to its
        caller."""
        if not self.judged:
            self._judge(self.status, None, Grpc.UNKNOWN if grpc_status is None else grpc_status, now)
        self._leave()
        self._finish(OK, now)
        return DONE

    def failed(self, failure: Failure, now: float, reused: bool = False) -> Do:
        """The attempt ended without a complete response. `reused`: the connection had served before and died before
        the first byte of this response; with REFUSED, that it was going away. A refusal says nothing of the endpoint's
        health: the server is up, and has told us in good order that it has not begun."""
        if self.begun:
            self._blame(now, failure.value)
            self._finish(Outcome.CUT_SHORT, now)
            return CUT
        connect, refused = failure is Failure.CONNECT, failure is Failure.REFUSED
        may_resend = self.resends < RESENDS_MAX if refused else self.safe and not connect and not self.resends
        if reused and may_resend and self.replayable:
            self.resends += 1  # the idle-close race: neither a retry nor the endpoint's fault
            self.cluster.resends += 1
            self.fresh = True
            if self.due == OFF:
                self._restart(now)
            return SEND
        outcome = OF_FAILURE[failure]
        retry = self.replayable if connect or refused else self._covered("reset", outcome)
        waits = retry and self._take_retry(now)
        if refused:
            self._neutral(now)
        else:
            self._blame(now, failure.value)
        return WAIT if waits else self._answer(outcome, now)

    def refused(self, outcome: Outcome, now: float) -> Do:
        """This sidecar itself could not go on (a full queue, say): answered at once, nobody blamed."""
        self._neutral(now)
        return self._answer(outcome, now) if outcome is not Outcome.OVERFLOW else self._fall_back(now)

    def deadline(self, now: float) -> Do:
        """`due` has come: the end of a back-off, of the attempt, or of the whole request."""
        if self.waiting:
            self.waiting = False
            if now >= self.ends:  # woken too late: nobody has been asked again, so nobody is to blame
                return self._answer(Outcome.TIMEOUT_TOTAL, now)
            return self._try(now)
        if self.begun:  # of a gRPC call
            if self.own_deadline:
                self._blame(now)
            else:
                self._neutral(now)
            self._finish(Outcome.TIMEOUT_TOTAL, now)
            return CUT
        if self.due < self.ends:
            if self._covered("timeout", Outcome.TIMEOUT_TRY) and self._take_retry(now):
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

    @property
    def awaits_status(self) -> bool:
        """Whether a gRPC status that follows the head at once may be retried: then the head is worth holding back."""
        retry = self.plan.retry
        return bool(retry.grpc) and self.request_done and self.attempt < retry.max_retries and self._repeatable(True)

    # -- decisions

    def _restart(self, now: float) -> None:
        """The clocks of the request and of the attempt begin anew: they stood still while the body came. (A gRPC
        call's own one did not.)"""
        timeouts = self.plan.timeouts
        if not self.grpc:
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
        self.fresh = self.judged = False
        self.cluster.attempts += 1
        breaker = endpoint.breaker
        self.generation = breaker.generation
        if breaker.tripped:
            breaker.start_probe(now, min(timeouts.try_s, PROBE_MAX_S))
            self.generation = breaker.generation
        feedback = self.feedback = self.cluster.feedback
        if feedback is not None:
            self.sent_at = now
            self.head_at: float | None = None
            feedback.began(endpoint, now)
        self.try_ends = now + timeouts.try_s
        self.due = self.ends if self.ends <= self.try_ends else self.try_ends
        return SEND

    def _no_endpoint(self, now: float) -> Do:
        fallback = self.plan.fallback
        subset = self.subset.instead(fallback.subset) if fallback is not None and fallback.subset is not None else None
        if fallback is not None and subset is not None:
            return self._go_over(fallback.cluster, subset, now)
        circuit = self.subset.why_none(now) == "circuit_open"
        return self._answer(Outcome.CIRCUIT_OPEN if circuit else Outcome.NO_HEALTHY_ENDPOINT, now)

    def _may_fall_back(self) -> bool:
        """Whether something else stands in for an overflow: a fixed response, or another service, that has not been
        asked yet. Another version would be the same service, which is not asked again."""
        fallback = self.plan.fallback
        return fallback is not None and (
            fallback.respond is not None
            or (fallback.subset is not None and fallback.cluster is not self.cluster and self.replayable)
        )

    def _fall_back(self, now: float) -> Do:
        """There is too much of this for the service, or for what this caller may ask of it."""
        fallback = self.plan.fallback
        if fallback is not None and fallback.subset is not None and self._may_fall_back() and now < self.ends:
            subset = self.subset.instead(fallback.subset)
            if subset is not None:
                return self._go_over(fallback.cluster, subset, now)
        return self._answer(Outcome.OVERFLOW, now)

    def _go_over(self, cluster: Cluster, subset: Subset | Aimed, now: float) -> Do:
        """On with the fallback, by the limits, budget and breakers of its service."""
        if cluster is not self.cluster:
            self.cluster.active -= 1
            self.cluster = cluster
            cluster.active += 1
            if cluster.active > cluster.limits.requests:
                return self._overflow(now)
            if not self.attempt:
                cluster.budget.deposit(now)
        self.subset = subset
        self.tried = ()
        return self._try(now)

    def _repeatable(self, safe: bool) -> bool:
        """Whether the request may be sent again although the application may have seen it."""
        return safe and self.replayable and self.inherited == 0

    def _listed(self, status: int, grpc_status: int | None) -> bool:
        """Whether the policy has such an answer of the application retried, and may."""
        retry = self.plan.retry
        if grpc_status in retry.grpc:
            return self._repeatable(True)
        return status in retry.statuses and self._repeatable(self.safe)

    def _covered(self, word: str, outcome: Outcome) -> bool:
        """Whether the policy has a failure without an answer retried, and may: by its word, or by what it would be to
        the caller of a gRPC method."""
        retry = self.plan.retry
        if self.grpc and outcome.grpc in retry.grpc:
            return self._repeatable(True)
        return word in retry.failures and self._repeatable(self.safe)

    def _elsewhere(self, now: float) -> bool:
        """Whether there is an endpoint that this request has not tried."""
        return any(
            endpoint is not self.endpoint and endpoint not in self.tried and endpoint.breaker.allows(now)
            for endpoint in self.subset.endpoints
        )

    def _retryable(self, said: Outcome, status: int, grpc_status: int | None, now: float) -> bool:
        """What a peer's sidecar answered by itself; the table beats the rules for status classes."""
        kind = said.retryable
        if kind is Retryable.ANY:
            return self.replayable and (said is not Outcome.DRAINING or self._elsewhere(now))
        if kind is Retryable.NEVER:
            return False
        return self._listed(status, grpc_status) or (kind is Retryable.SAFE and self._covered(WORD_OF[said], said))

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

    def _judge(self, status: int, said: Outcome | None, grpc_status: int | None, now: float) -> None:
        """A response head is the verdict, and of a gRPC call its status, which may come later; a probe is judged by
        the head all the same. The endpoint is given back at the end of the response."""
        endpoint = self.endpoint
        assert endpoint is not None
        breaker = endpoint.breaker
        if self.grpc and grpc_status is None and not breaker.tripped:
            if self.feedback is not None:
                self.head_at = now
            return  # until the end
        self.judged = True
        if said is not None and (said.blame is Blame.NO or (said is Outcome.TIMEOUT_TOTAL and not self.own_deadline)):
            breaker.neutral(self.generation, now)
            result = "neutral"
        elif status == 429 or grpc_status == Grpc.RESOURCE_EXHAUSTED:
            endpoint.throttled += 1
            breaker.throttled(self.generation, now, self.rnd)
            result = "throttled"
        elif (grpc_status in GRPC_FAILURES) if self.grpc else (status >= 500 and status != 501):
            endpoint.failures += 1
            what = str(status) if grpc_status is None else Grpc(grpc_status).name
            breaker.failure(self.generation, now, self.rnd, what)
            result = "failure"
        else:
            endpoint.successes += 1
            breaker.success(self.generation, now)
            result = "success"
        if self.feedback is not None:
            self._tell(result, now)

    def _blame(self, now: float, what: str = "timeout") -> None:
        endpoint = self.endpoint
        if endpoint is not None:
            endpoint.failures += 1
            endpoint.breaker.failure(self.generation, now, self.rnd, what)
            if self.feedback is not None:
                self._tell("failure", now)
            self._leave()

    def _neutral(self, now: float) -> None:
        endpoint = self.endpoint
        if endpoint is not None:
            endpoint.breaker.neutral(self.generation, now)
            if self.feedback is not None:
                self._tell("neutral", now)
            self._leave()

    def _tell(self, result: str, now: float) -> None:
        """The balancer hears of each attempt once, with the time to its response head."""
        feedback, self.feedback = self.feedback, None
        endpoint = self.endpoint
        assert endpoint is not None
        head_at = self.head_at
        feedback.ended(endpoint, result, (now if head_at is None else head_at) - self.sent_at, now)

    def _leave(self) -> None:
        endpoint = self.endpoint
        if endpoint is not None:
            endpoint.active -= 1
            self.endpoint = None

    def _overflow(self, now: float) -> Do:
        self.cluster.overflows += 1
        return self._fall_back(now)

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
