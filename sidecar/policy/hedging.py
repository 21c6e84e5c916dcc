"""Hedging, sans-IO: a second attempt beside one that is slow (docs/hedging.md).

A hedge is an Exchange of its own that makes one attempt and never another; the request's own Exchange goes on with
whichever of the two is left, or has answered. Pure: time is an argument; connections and bytes never appear.
Invariants: a hedge has paid for itself with a retry of the budget and a slot of `limits.requests`; it never goes where
the request has been; each of the two endpoints hears of its attempt exactly once.
"""

from enum import Enum

from .balancing import Aimed
from .endpoint import Endpoint
from .exchange import Exchange
from .outcome import BY_REASON, GRPC_FAILURES, GRPC_OF_HTTP, Failure, Grpc, Outcome

NO_BUDGET = "no_budget"
NO_ENDPOINT = "no_endpoint"
OVERFLOW = Outcome.OVERFLOW.reason
READING = frozenset({b"GET", b"HEAD", b"OPTIONS", b"TRACE"})  # RFC 9110, section 9.2.1


class Head(Enum):
    """What a response head means while another attempt is under way."""

    GOOD = "good"  # it is the answer
    BAD = "bad"  # the other one may do better
    OPEN = "open"  # of a gRPC call: neither its status nor a message has come


def hedgeable(ex: Exchange, method: bytes) -> bool:
    """Whether the request is of a kind that may be sent twice at a time, and nobody above has sent it before. To be
    idempotent, as PUT and DELETE are, is not enough: of two at a time the late one may undo what has come after them.
    Nor is a key: servers answer the second of two at a time with 409. Where a cookie names the endpoint, the client is
    to stay there."""
    plan = ex.plan
    if ex.inherited or plan.pinned or ex.cluster is not plan.cluster:
        return False
    return method in (READING if plan.retry.methods is None else plan.retry_methods)


def awaited(ex: Exchange) -> bool:
    """Whether the whole request is at hand, and a response head is what is missing."""
    waits = ex.endpoint is not None and not ex.begun and not ex.finished and not ex.waiting
    return waits and ex.replayable and ex.request_done


def hedge(ex: Exchange, now: float) -> Exchange | str:
    """A second attempt, on its way to an endpoint; or why there is none. It is numbered as a retry would be, so that
    nobody below repeats it."""
    cluster = ex.cluster
    if cluster.active >= cluster.limits.requests or cluster.waiters:
        return OVERFLOW  # and one more that waits for a connection would not be faster
    assert ex.endpoint is not None
    tried = (*ex.tried, ex.endpoint)
    endpoint = ex.subset.pick(now, tried, ex.rnd)
    subset = ex.subset.subset if isinstance(ex.subset, Aimed) else ex.subset
    if endpoint is None or endpoint in tried or not subset.takes(endpoint, now):
        return NO_ENDPOINT
    if not cluster.budget.withdraw_spare(now):
        return NO_BUDGET
    aimed = Aimed(subset, None, endpoint)
    other = Exchange(ex.plan, aimed, b"", now, ex.rnd, inherited=ex.attempt + 1, grpc=ex.grpc)
    other.ends, other.cap, other.total_s, other.own_deadline = ex.ends, ex.cap, ex.total_s, ex.own_deadline
    other.safe, other.replayable = True, False  # nothing of it is sent again
    cluster.active += 1
    other._try(now)
    return other


def judge(ex: Exchange, status: int, reason: str | None, grpc_status: int | None, message: bool, ended: bool) -> Head:
    """What a head is worth. `message`: some of a gRPC call's answer has come; `ended`: all of it has. An answer that
    would be retried, or that says that the server is not well, is not worth more than one that is still to come."""
    if ex.grpc and status == 200 and grpc_status is None and not message and not ended:
        return Head.OPEN
    status, _, grpc_status = _read(ex, status, reason, grpc_status)
    if ex.grpc:
        bad = grpc_status in GRPC_FAILURES or grpc_status == Grpc.RESOURCE_EXHAUSTED
    else:
        bad = status == 429 or (status >= 500 and status != 501)
    return Head.BAD if bad or ex._listed(status, None if message else grpc_status) else Head.GOOD


def answered(ex: Exchange, status: int, reason: str | None, grpc_status: int | None, now: float) -> None:
    """The attempt's answer is bad, and the other one goes on."""
    status, said, grpc_status = _read(ex, status, reason, grpc_status)
    ex._judge(status, said, grpc_status, now)
    ex._leave()


def failed(ex: Exchange, failure: Failure | None, reused: bool, now: float) -> None:
    """The attempt has ended without an answer (None: its time was up), and the other one goes on. A connection that
    was closed for idleness, or a server that had not begun, is nobody's fault."""
    if reused or failure is Failure.REFUSED:
        ex._neutral(now)
    else:
        ex._blame(now, failure.value if failure is not None else "timeout")


def beaten(ex: Exchange, now: float) -> None:
    """The hedge has answered first. That is neither a failure of the endpoint nor a success; but a balancer that goes
    by latency is to know that it takes at least so long, and its breaker if that comes many times in a row."""
    endpoint = ex.endpoint
    assert endpoint is not None
    endpoint.breaker.beaten(ex.generation, now, ex.rnd, endpoint.successes)
    if ex.feedback is not None:
        ex._tell("failure", now)
    ex._neutral(now)


def drop(other: Exchange, now: float, late: bool = False) -> None:
    """A hedge that nobody waits for any more. `late`: the time of the whole request is up."""
    if not other.finished:
        if late:
            other.deadline(now)
        else:
            other.refused(Outcome.CALLER_GONE, now)


def close(other: Exchange, now: float) -> None:
    """A hedge that has been told of its end gives its slot back."""
    if not other.finished:
        other._leave()
        other._finish(Outcome.CALLER_GONE, now)


def adopt(ex: Exchange, other: Exchange, lost_at: Endpoint, now: float) -> None:
    """The request goes on with the hedge's attempt; its own, at `lost_at`, is over and has been judged."""
    assert ex.endpoint is None and other.endpoint is not None
    ex.tried = (*ex.tried, lost_at)
    ex.endpoint, ex.generation, ex.judged, ex.fresh = other.endpoint, other.generation, other.judged, other.fresh
    ex.feedback = other.feedback
    if ex.feedback is not None:
        ex.sent_at, ex.head_at = other.sent_at, other.head_at
    ex.try_ends = other.try_ends
    ex.due = min(ex.ends, ex.try_ends)
    other.endpoint = other.feedback = None
    other._finish(Outcome.OK, now)


def _read(
    ex: Exchange, status: int, reason: str | None, grpc_status: int | None
) -> tuple[int, Outcome | None, int | None]:
    """As the Exchange reads a head."""
    said = BY_REASON.get(reason) if reason else None
    if not ex.grpc:
        return status, said, None
    if grpc_status is None and status != 200:
        grpc_status = GRPC_OF_HTTP.get(status, Grpc.UNKNOWN)
    if said is not None and said.status:
        status = said.status
    return status, said, grpc_status
