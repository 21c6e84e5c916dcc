"""Where a request meets the gate before the application: it goes on, waits, or is answered `overflow`.

The gate decides (sidecar/policy/overload.py); here its word becomes deeds of a Serving. While a request waits it has no
exchange and its body is not read, as while an asynchronous filter looks at it. Whoever is called up goes on after the
callback that made room, never within it.
Invariant: a ticket is handed back when its Serving is over, whatever the way.
"""

from functools import partial
from typing import TYPE_CHECKING

from sidecar.policy.exchange import OFF
from sidecar.policy.outcome import GRPC_FAILURES, Outcome
from sidecar.policy.overload import RUNS, SHED, Gate, Ticket
from sidecar.wire.http1 import Message

if TYPE_CHECKING:
    from .serving import Serving

RETRY_AFTER = (b"retry-after", b"1")
"""Overload lasts; a client that has no sidecar should not come back at once."""
_MESSAGE = "too many requests for this instance"


def enter(serving: "Serving", gate: Gate, now: float) -> bool:
    """Whether the request may go on now. Else it waits, or has been answered."""
    m = serving.m
    ends = serving.started + m.deadline_ms / 1000 if m.deadline_ms is not None else OFF
    entry = serving.entry
    copy = m.forwarded and entry.is_copy(m)
    rank = gate.copies if copy else gate.class_of(entry.caller_service or None, m.headers)
    ticket = serving.ticket = gate.arrive(rank, ends, now, partial(_called, serving), m.done)
    if ticket.at is RUNS:
        return True
    if ticket.at is SHED:
        serving.refuse(Outcome.OVERFLOW, _MESSAGE)
        return False
    serving.waiting_filter = True
    if not m.done:
        serving.down.pause()  # else it reads on, to hear of a caller that leaves
    serving.timer.set(ticket.until)
    return False


def _called(serving: "Serving") -> None:
    serving.world.reactor.soon.append(partial(_go_on, serving))


def _go_on(serving: "Serving") -> None:
    ticket = serving.ticket
    if serving.over or ticket is None:
        return
    serving.timer.off()
    serving.waiting_filter = False
    try:
        if ticket.at is RUNS:
            serving.let_in()
        else:
            serving.refuse(Outcome.OVERFLOW, _MESSAGE)
    except Exception as exc:  # a bug: no connection's event led here, so nobody else would end it and free its place
        serving.world.reactor.report(exc)
        if not serving.over:
            serving.caller_gone()
            serving.down.cut()


def late(serving: "Serving") -> None:
    """It has waited for as long as is worth it."""
    gate, ticket = _of(serving)
    if not serving.over:
        gate.expire(ticket, max(serving.world.reactor.now, ticket.until))


def whole(serving: "Serving", now: float) -> None:
    """The last byte of the request has gone out."""
    gate, ticket = _of(serving)
    gate.complete(ticket, now)


def answered(serving: "Serving", m: Message, now: float) -> None:
    """The application's response head. What has no end of its own keeps no place: events, an upgrade, a gRPC call (a
    stream looks like any other)."""
    gate, ticket = _of(serving)
    good = m.status < 500 and m.status != 429 and m.grpc_status not in GRPC_FAILURES
    endless = m.status == 101 or serving.m.grpc or serving.m.extended or is_event_stream(m)
    gate.answered(ticket, good, endless, now)


def left(serving: "Serving") -> None:
    gate, ticket = _of(serving)
    serving.ticket = None  # else only the collector would free the two
    gate.leave(ticket, serving.world.reactor.now)


def _of(serving: "Serving") -> tuple[Gate, Ticket]:
    plan, ticket = serving.plan, serving.ticket
    assert plan is not None and plan.gate is not None and ticket is not None
    return plan.gate, ticket


def is_event_stream(m: Message) -> bool:
    """Server-sent events have no end."""
    for name, value in m.headers:
        if name == b"content-type":
            return value.lower().startswith(b"text/event-stream")
    return False
