"""Lives of the inbound side behind a gate: too many requests for the own application, of several classes.

As `support.lives_http2`, but every caller comes from the mesh and asks the sidecar's own service, whose policy states a
limit of concurrency that changes while requests run and wait. The gate's own books are checked at each of its steps.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import trio

from sidecar.model.snapshot import Concurrency, Port, Priority, Protocol, Snapshot, ValueMatch
from sidecar.policy import plan
from sidecar.policy.overload import OVER, RUNS, SHED, WAITS, Gate, Ticket

from .http2_caller import Asked, Http2Caller
from .lives_http2 import METHODS, Http2Life

CLASSES = (
    Priority("vip", callers=frozenset({"front"}), headers=(("x-priority", ValueMatch("exact", "vip")),)),
    Priority("default"),
    Priority("back", callers=frozenset({"back"})),
    Priority("batch", headers=(("x-priority", ValueMatch("exact", "batch")),)),
)


class WatchedGate(Gate):
    """A gate under observation."""

    life: "OverloadLife"

    def configure(self, policy: Concurrency, now: float) -> None:
        fresh = not hasattr(self, "tickets")
        if fresh:
            self.tickets: list[Ticket] = []
            self.told: list[Ticket] = []
            self.kept = 0
            self.life.gates.append(self)
        super().configure(policy, now)
        self.kept = self.waiting  # a policy may state less
        self.check()

    def arrive(self, rank: int, ends: float, now: float, tell: Any, sampled: bool = True) -> Ticket:
        def telling() -> None:
            self.told.append(ticket)
            tell()

        ticket = super().arrive(rank, ends, now, telling, sampled)
        self.tickets.append(ticket)
        self.life.seen.add(ticket.why or ticket.at.name)
        self.check()
        return ticket

    def _start(self, ticket: Ticket, now: float) -> None:
        assert not any(self._queues[: ticket.rank]), "a lower class was let in while a higher one waits"
        assert self.in_flight < self.limit, "let in beyond the limit"
        assert not ticket.until or now < ticket.until, "waited too long, and was let in"
        super()._start(ticket, now)

    def _shed(self, ticket: Ticket, why: str, now: float) -> None:
        super()._shed(ticket, why, now)
        self.life.seen.add(why)
        if why == "evicted":
            assert not any(self._queues[ticket.rank + 1 :]), "not the lowest was given up"

    def leave(self, ticket: Ticket, now: float) -> None:
        if ticket.at is WAITS:
            self.life.seen.add("left")
        super().leave(ticket, now)
        self.check()

    def expire(self, ticket: Ticket, now: float) -> None:
        super().expire(ticket, now)
        self.check()

    def check(self) -> None:
        assert self.in_flight == sum(ticket.at is RUNS for ticket in self.tickets), "a place has leaked"
        assert self.waiting == sum(ticket.at is WAITS for ticket in self.tickets) == sum(map(len, self._queues))
        assert self.waiting <= max(self.policy.queue, self.kept), "the queue has no bound"
        assert not self.waiting or self.in_flight >= self.limit, "somebody waits although there is room"
        assert len(self.told) == len(set(map(id, self.told))), "somebody was told twice"

    def check_quiet(self) -> None:
        assert self.in_flight == self.waiting == 0, "a place has leaked"
        assert all(ticket.at in (OVER, SHED) for ticket in self.tickets)
        assert sum(ticket.at is SHED for ticket in self.tickets) == sum(self.shed.values())


class OverloadLife(Http2Life):
    """`seen`: what became of requests at gates. A class of callers says that it is one by the service that it is, or by
    a header."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.gates: list[WatchedGate] = []
        self.seen: set[str] = set()
        self.inbound_share = 1.0
        self.protocols["web"] = self.rnd.choice([Protocol.HTTP, Protocol.HTTP, Protocol.GRPC])

    def policy(self) -> Snapshot:
        snapshot = super().policy()
        own = replace(snapshot.services["web"], ports=self.ports("web"), concurrency=self.concurrency())
        return replace(snapshot, services={**snapshot.services, "web": own})

    def ports(self, name: str) -> tuple[Port, ...]:
        return (Port("http", 80, self.protocols[name]),)

    def concurrency(self) -> Concurrency | None:
        rnd = self.rnd
        if rnd.random() < 0.1:
            return None
        adaptive = rnd.random() < 0.4
        return Concurrency(
            adaptive=adaptive,
            least=1,
            most=rnd.choice([1, 1, 2, 3]),
            queue=rnd.choice([0, 1, 2, 2, 5]),
            queue_timeout_s=rnd.choice([0.05, 0.1, 0.5, 2.0]),
            priorities=tuple(rnd.sample(CLASSES, rnd.randrange(5))),
        )

    def ties(self, inbound: bool) -> bytes:
        stated = self.priority()
        return super().ties(inbound) + (b"x-priority: %b\r\n" % stated if stated else b"")

    def priority(self) -> bytes:
        return self.places.choice([b"", b"", b"vip", b"batch"])

    async def caller(self) -> None:
        rnd = self.rnd
        if rnd.random() < 0.5:
            return await super(Http2Life, self).caller()
        caller = Http2Caller(self.net, rnd.choice(["front", "back"]), window=rnd.choice([math.inf, 30_000]),
                             engine=self.engine)  # fmt: skip
        with trio.move_on_after(rnd.choice([0.3, 30.0, 30.0, 30.0])):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.listen, caller, nursery)
                async with trio.open_nursery() as asking:
                    for _ in range(rnd.randrange(1, 7)):
                        asking.start_soon(self.stream, caller)
                nursery.cancel_scope.cancel()
        caller.peer.reset() if rnd.random() < 0.3 else caller.peer.close()

    def ask_request(self, caller: Http2Caller) -> Asked:
        method = self.rnd.choice(METHODS)
        return caller.ask("/", "web", method, extra=self.fields(), end=method not in ("PUT", "POST"))

    def ask_call(self, caller: Http2Caller) -> Asked:
        kind = (b"content-type", b"application/grpc")
        return caller.ask("/again", "web", "POST", extra=[kind, (b"te", b"trailers"), *self.fields()], end=False)

    def fields(self) -> list[tuple[bytes, bytes]]:
        stated, told = self.priority(), self.places.choice([b"", b"50", b"3000"])
        fields = [(b"x-priority", stated)] if stated else []
        return [*fields, (b"x-request-deadline-ms", told)] if told else fields

    async def run(self, seed: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plan, "Gate", type("WatchedGate", (WatchedGate,), {"life": self}))
            await super().run(seed)

    def check_quiet(self) -> None:
        super().check_quiet()
        for gate in self.gates:
            gate.check_quiet()
