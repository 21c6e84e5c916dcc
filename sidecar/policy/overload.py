"""The gate before an application: so many requests at a time, a short queue, the least important shed first.

A request arrives with its class and the end of its time. It starts, waits or is shed; a Ticket says which, and is
handed back (`leave`) on every path. A request waits no longer than `queue_timeout`, nor beyond the moment from which
even an idle application could not answer in time. Of the waiting the highest class starts first, and within a class
the oldest; a full queue gives up the newest of a lower class for a higher one.
Pure: time is an argument. Must not know connections: what becomes of a waiting request is told to its `tell`.
Invariants: `in_flight` is the number of tickets that run; nobody waits while there is room, nor behind a lower class;
the queue never grows beyond its length (a new policy may state less than wait); each waiting ticket is told once,
unless it leaves first.
"""

from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum, auto

from sidecar.model.snapshot import Concurrency, Match

from .gradient import Gradient
from .matching import compile_match

Headers = Sequence[tuple[bytes, bytes]]

QUIET_S = 5.0  # without shedding for so long, it has ended
COPIES = "copies"  # their class, in metrics and log
MATERIAL, MATERIAL_EVERY_S = 2.0, 10.0  # the log hears of a limit that has changed by this factor, and how often


class At(Enum):
    """Where a request is."""

    RUNS = auto()
    WAITS = auto()
    SHED = auto()
    OVER = auto()


RUNS, WAITS, SHED, OVER = At


class Ticket:
    """One request. `begun`: when it arrived or, once it runs, began to be worked on. `until`: it is not worth waiting
    for longer. `why`: of one that was shed: full, evicted or late."""

    __slots__ = ("at", "begun", "rank", "sampled", "tell", "until", "why")

    def __init__(self, rank: int, sampled: bool, tell: Callable[[], object]) -> None:
        self.rank, self.sampled, self.tell = rank, sampled, tell
        self.at = WAITS
        self.begun = self.until = 0.0
        self.why = ""


class Gate:
    """`note` takes what people should know, with the evidence. State survives `configure`."""

    def __init__(
        self,
        policy: Concurrency,
        now: float,
        rnd: Callable[[], float] = lambda: 0.5,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.note = note
        self.in_flight = self.waiting = self.started = 0
        self.shed: dict[str, int] = {}  # by class
        self.shed_why = {"full": 0, "evicted": 0, "late": 0}
        self._rnd = rnd
        self.gradient: Gradient | None = None
        self._queues: list[deque[Ticket]] = []
        self._classes: list[str] = []
        self._told_limit, self._told_at = 0, 0.0
        self._shedding_since: float | None = None
        self._shed_at = 0.0
        self._shed_before: dict[str, int] = {}
        self.configure(policy, now)

    def configure(self, policy: Concurrency, now: float) -> None:
        self.policy = policy
        before = [(self._classes[ticket.rank], ticket) for queue in self._queues for ticket in queue]
        self._classes = [each.name for each in policy.priorities]
        if "default" not in self._classes:
            self._classes.append("default")
        self._default = self._classes.index("default")
        self.copies = len(self._classes)  # the rank of what a mirror has sent: shed before all that somebody waits for
        self._classes.append(COPIES)
        found = [compile_match(Match(headers=each.headers, callers=each.callers)) for each in policy.priorities]
        self._matches = [(rank, matches) for rank, matches in enumerate(found) if matches is not None]
        if not policy.adaptive:
            self.gradient = None
        elif self.gradient is None:
            self.gradient = Gradient(policy.least, policy.most, now, self._rnd)
        else:
            self.gradient.bound(policy.least, policy.most)
        self._queues = [deque() for _ in self._classes]
        for name, ticket in sorted(before, key=lambda each: each[1].begun):
            ticket.rank = self._classes.index(name) if name in self._classes else self._default
            self._queues[ticket.rank].append(ticket)
        self._wake(now)

    def open(self, now: float) -> None:
        """There is no limit from now on."""
        self.configure(Concurrency(most=1 << 60), now)

    @property
    def limit(self) -> int:
        return self.gradient.limit if self.gradient is not None else self.policy.most

    def class_of(self, caller: str | None, headers: Headers) -> int:
        """The first class that takes the request, as a rank: 0 is shed last."""
        for rank, matches in self._matches:
            if matches(b"", b"", b"", headers, caller):
                return rank
        return self._default

    # -- the life of a request

    def arrive(self, rank: int, ends: float, now: float, tell: Callable[[], object], sampled: bool = True) -> Ticket:
        """`ends`: when its caller stops waiting. `sampled`: whether the time to its answer says something of the
        application yet (not where its body is still to come: `complete` says so later). `tell` is called where a
        waiting one starts or is shed."""
        ticket = Ticket(rank, sampled, tell)
        ticket.begun = now
        gradient = self.gradient
        if gradient is not None:
            self._step(gradient, now)
        needs_s = gradient.min_rtt_s if gradient is not None and not gradient.measuring else 0.0
        if self.in_flight and ends - needs_s <= now:
            self._shed(ticket, "late", now)
            return ticket
        if self.in_flight < self.limit and not self.waiting:
            self._start(ticket, now)
            return ticket
        if gradient is not None:
            gradient.contended = True
        ticket.until = min(now + self.policy.queue_timeout_s, ends - needs_s)
        self._expire(now)
        if self.waiting >= self.policy.queue and not self._evict_below(rank, now):
            self._shed(ticket, "full", now)
            return ticket
        self._queues[rank].append(ticket)
        self.waiting += 1
        self._wake(now)
        return ticket

    def complete(self, ticket: Ticket, now: float) -> None:
        """The last byte of the request has gone out: from here on the application is at work."""
        if ticket.at is RUNS and not ticket.sampled:
            ticket.begun, ticket.sampled = now, True

    def answered(self, ticket: Ticket, good: bool, endless: bool, now: float) -> None:
        """Its response head is here: how long it took is known. `endless`: what follows has no end of its own (events,
        an upgrade, a gRPC stream), so the place is given back now; what its caller has yet to send may have none."""
        if ticket.at is not RUNS:
            return
        if (ticket.sampled or endless) and self.gradient is not None:
            ticket.sampled = False
            if good:
                self.gradient.sample(now - ticket.begun, ticket.begun, now)
        if endless:
            self.leave(ticket, now)

    def leave(self, ticket: Ticket, now: float) -> None:
        """It is over, or its caller has gone. May be said twice."""
        if ticket.at is WAITS:
            ticket.at = OVER
            self._queues[ticket.rank].remove(ticket)
            self.waiting -= 1
        elif ticket.at is RUNS:
            ticket.at = OVER
            self.in_flight -= 1
            gradient = self.gradient
            if gradient is not None:
                if ticket.sampled:
                    gradient.lost(now - ticket.begun)
                self._step(gradient, now)
            self._quiet(now)
            self._wake(now)

    def expire(self, ticket: Ticket, now: float) -> None:
        """`until` has come for a ticket that waits."""
        if ticket.at is WAITS and now >= ticket.until:
            self._drop(ticket, "late", now)

    # -- within

    def _start(self, ticket: Ticket, now: float) -> None:
        ticket.at = RUNS
        ticket.begun = now
        self.in_flight += 1
        self.started += 1
        if self.gradient is not None and self.in_flight > self.gradient.peak:
            self.gradient.peak = self.in_flight

    def _wake(self, now: float) -> None:
        while self.waiting and self.in_flight < self.limit:
            ticket = next(queue for queue in self._queues if queue)[0]
            if now >= ticket.until:
                self._drop(ticket, "late", now)
                continue
            self._queues[ticket.rank].popleft()
            self.waiting -= 1
            self._start(ticket, now)
            ticket.tell()

    def _expire(self, now: float) -> None:
        """Those whose time is up make room; in a class the oldest come first."""
        for queue in self._queues:
            while queue and now >= queue[0].until:
                self._drop(queue[0], "late", now)

    def _evict_below(self, rank: int, now: float) -> bool:
        for lower in range(len(self._queues) - 1, rank, -1):
            if self._queues[lower]:
                self._drop(self._queues[lower][-1], "evicted", now)
                return True
        return False

    def _drop(self, ticket: Ticket, why: str, now: float) -> None:
        self._queues[ticket.rank].remove(ticket)
        self.waiting -= 1
        self._shed(ticket, why, now)
        ticket.tell()

    def _shed(self, ticket: Ticket, why: str, now: float) -> None:
        ticket.at, ticket.why = SHED, why
        name = self._classes[ticket.rank]
        if self._shedding_since is None:
            self._shedding_since = now
            self._shed_before = dict(self.shed)
            self.note(f"shedding began: class {name}, {self._reason(why)}; {self._evidence()}")
        self._shed_at = now
        self.shed[name] = self.shed.get(name, 0) + 1
        self.shed_why[why] += 1

    def _reason(self, why: str) -> str:
        if why == "late":
            return "its time would not have sufficed"
        return "the queue was full" if why == "full" else "the queue was full and a higher class came"

    def _evidence(self) -> str:
        text = f"limit {self.limit}, {self.in_flight} in flight, {self.waiting} waiting"
        gradient = self.gradient
        if gradient is not None and gradient.min_rtt_s:
            text += f", median {gradient.median_s * 1e3:.1f} ms against {gradient.min_rtt_s * 1e3:.1f} ms"
        return text

    def _quiet(self, now: float) -> None:
        since = self._shedding_since
        if since is not None and now - self._shed_at >= QUIET_S:
            self._shedding_since = None
            counts = {name: count - self._shed_before.get(name, 0) for name, count in self.shed.items()}
            parts = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
            self.note(f"shedding ended: {parts} in {self._shed_at - since:.1f} s")

    def _step(self, gradient: Gradient, now: float) -> None:
        if not gradient.step(now) or gradient.measuring:
            return
        self._wake(now)
        limit, told = gradient.limit, self._told_limit
        if not told:
            self._told_limit, self._told_at = limit, now
        elif (limit >= told * MATERIAL or limit * MATERIAL <= told) and now >= self._told_at + MATERIAL_EVERY_S:
            self._told_limit, self._told_at = limit, now
            self.note(f"limit {limit}, was {told}: {self._evidence()}")

    def shown(self, now: float) -> dict[str, object]:
        """For people."""
        self._quiet(now)
        gradient = self.gradient
        return {
            "limit": self.limit,
            "adaptive": gradient is not None,
            "measuring": gradient is not None and gradient.measuring,
            "in_flight": self.in_flight,
            "queued": self.waiting,
            "queued_by_class": {
                name: len(queue) for name, queue in zip(self._classes, self._queues, strict=True) if queue
            },
            "started": self.started,
            "shed_by_class": dict(self.shed),
            "shed_by_cause": dict(self.shed_why),
            "shedding": self._shedding_since is not None,
            "min_rtt_ms": round(gradient.min_rtt_s * 1e3, 3) if gradient is not None else None,
            "median_ms": round(gradient.median_s * 1e3, 3) if gradient is not None else None,
        }
