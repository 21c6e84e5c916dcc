"""A request of an application, and each of its attempts, as they pass through a run. Plain records.

Invariant: a call that is over has no attempt, and an attempt whose caller has gone has no call, so that what is over is
forgotten at once.
"""

from typing import TYPE_CHECKING

from sidecar.policy.exchange import Exchange
from sidecar.policy.overload import Gate, Ticket

from .scenario import Step

if TYPE_CHECKING:
    from .record import Edge
    from .server import Server
    from .sidecars import Sidecar


class Ask:
    """What is asked for: one kind of request of a load, or one call of an application. `number` is its place in every
    table of routes."""

    __slots__ = ("edge", "headers", "idempotent", "method", "number", "status", "step_share", "target", "to")

    def __init__(self, number: int, to: str, method: bytes, target: bytes, headers: tuple[tuple[bytes, bytes], ...]):
        self.number, self.to = number, to
        self.method, self.target, self.headers = method, target, headers
        self.idempotent = any(name == b"idempotency-key" for name, _ in headers)
        self.edge: Edge
        self.step_share = 1.0
        self.status = 500

    @classmethod
    def of_step(cls, number: int, step: Step) -> "Ask":
        ask = cls(number, step.to, step.method, step.target, step.headers)
        ask.step_share, ask.status = step.share, step.status
        return ask


class Call:
    """One request, as the sidecar of its caller sees it. `parent`: the attempt that it works for. `first`: nothing
    above it is a retry. `serial` grows with every step, so that an older timer means nothing. `other`: the call that
    it races with, one of which `is_hedge`; `hedged`: there has been one."""

    __slots__ = ("ask", "attempt", "edge", "ex", "exhausted", "first", "hedged", "is_hedge", "other", "over", "parent",
                 "serial", "sidecar", "started")  # fmt: skip

    def __init__(self, ask: Ask, sidecar: "Sidecar", parent: "Attempt | None", now: float) -> None:
        self.ask, self.sidecar, self.parent = ask, sidecar, parent
        self.edge = ask.edge
        self.started = now
        self.first = parent is None or parent.first
        self.ex: Exchange | None = None
        self.attempt: Attempt | None = None
        self.other: Call | None = None
        self.serial = 0
        self.exhausted = self.over = self.hedged = self.is_hedge = False


class Attempt:
    """One attempt, as its server sees it. `ends` and `number` are what the callee's sidecar remembers of it; `status`
    is what it will be answered; `child` the call that it waits for."""

    __slots__ = ("call", "child", "ends", "exhausted", "first", "gate", "number", "over", "reason", "retry_after_s",
                 "server", "status", "step", "ticket", "working")  # fmt: skip

    def __init__(self, call: Call, server: "Server", ends: float, number: int, first: bool) -> None:
        self.call: Call | None = call
        self.server = server
        self.ends, self.number, self.first = ends, number, first
        self.child: Call | None = None
        self.status = 200
        self.reason: str | None = None
        self.retry_after_s: float | None = None
        self.step = 0
        self.gate: Gate | None = None  # where it has a ticket
        self.ticket: Ticket | None = None
        self.exhausted = self.over = self.working = False
