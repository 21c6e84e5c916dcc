"""Copies of requests: sent beside the original, their answers thrown away (docs/traffic-shaping.md).

A copy is one more Serving and Exchange, on clusters of its own and with nobody on its caller's side, so nothing that
happens to it can reach the original: neither its breakers, budget, limits and connections nor its time. Must not decide
where copies go: the plan does. Invariants: a copy is sent whole or not at all, once the original's request is whole; at
most COPY_BYTES_MAX of it are held, and HELD_BYTES_MAX of all copies, UNDER_WAY_MAX of which are on their way; none
begins while memory is short; each ends in exactly one count, when its answer has, or ANSWER_BYTES_MAX of it have come.
"""

from typing import TYPE_CHECKING, Any

from sidecar.policy.cluster import Aimed, MirrorPlan, RoutePlan, Subset
from sidecar.policy.exchange import Exchange
from sidecar.policy.outcome import Outcome
from sidecar.wire.http1 import Message

from .channel import TIGHT_BYTES
from .entries import MIRROR_MARK, Field, Outbound, copy_result, marked
from .overload import is_event_stream
from .serving import Serving
from .timers import Timer

if TYPE_CHECKING:
    from .pool import Up
    from .world import World

COPY_BYTES_MAX = 64 * 1024  # of one copy's body
HELD_BYTES_MAX = 1024 * 1024  # of heads, and of bodies until a connection has taken them
WAITING_BYTES_MAX = TIGHT_BYTES // 2  # on all connections, from which on none begins: copies never make memory short
UNDER_WAY_MAX = 256
ANSWER_BYTES_MAX = 256 * 1024  # more is not worth the reading: the connection, or the stream, ends
HEAD_BYTES = 512  # what a head costs beside its values
READING_METHODS = frozenset({b"GET", b"HEAD", b"OPTIONS", b"TRACE"})  # RFC 9110, section 9.2.1


class Copies:
    """Those of one sidecar that are under way."""

    __slots__ = ("entry", "held_bytes", "servings", "traces", "world")

    def __init__(self, world: "World") -> None:
        self.world = world
        self.entry = _CopyEntry(world)
        self.held_bytes = 0
        self.servings: dict[Serving, None] = {}
        self.traces: dict[bytes, tuple[bytes, int]] = {}  # of copies received: mark and number by trace-id

    def begin(self, serving: Serving, plan: MirrorPlan, data: bytes) -> "Copy | None":
        """A request goes out: perhaps a copy of it too. One whose body is still to come is to be told of it."""
        m, world = serving.m, self.world
        if m.upgrade is not None or not (plan.writes or m.method in READING_METHODS) or world.rnd() >= plan.share:
            return None
        if world.draining or (m.forwarded and marked(m)):
            return None  # copies of copies would multiply
        copy = Copy(self, serving, plan)
        short = len(self.servings) >= UNDER_WAY_MAX or world.reactor.held_bytes >= WAITING_BYTES_MAX
        if short or not copy.hold(_size(m)):
            copy.drop("no_room")
            return None
        copy.add(data, m)
        return copy if copy.open else None

    # -- copies that the own application works on

    def arrived(self, m: Message, trace_id: bytes) -> None:
        mark = next(value for name, value in m.forwarded if name == MIRROR_MARK)
        self.traces[trace_id] = (mark, self.traces.get(trace_id, (mark, 0))[1] + 1)

    def ended(self, trace_id: bytes) -> None:
        mark, count = self.traces.get(trace_id, (b"", 0))
        if count > 1:
            self.traces[trace_id] = (mark, count - 1)
        else:
            self.traces.pop(trace_id, None)

    def inherit(self, m: Message, trace_id: bytes) -> None:
        """What is sent for a copy is marked as it is."""
        found = self.traces.get(trace_id)
        if found is not None and not marked(m):
            m.forwarded.append((MIRROR_MARK, found[0]))

    # -- counting

    def count(self, service: str, result: str) -> None:
        self.world.service_meters("out", service).mirrored.inc(result)


class Copy:
    """One copy, from the head of the original to its own end. `open`: the original's body is still coming."""

    __slots__ = ("body_bytes", "chunks", "copies", "held_bytes", "host", "m", "open", "plan", "serving")

    def __init__(self, copies: Copies, original: Serving, plan: MirrorPlan) -> None:
        self.copies, self.plan, self.host = copies, plan, original.host
        self.serving: Serving | None = None
        self.chunks: list[bytes] = []
        self.body_bytes = self.held_bytes = 0
        self.open = True
        self.m = _message(original)

    def add(self, data: bytes, whole: Message) -> None:
        """More of the body of the original, as it is sent on."""
        if not self.open:
            return
        if data:
            self.body_bytes += len(data)
            if self.body_bytes > COPY_BYTES_MAX or not self.hold(len(data)):
                self.drop("too_large" if self.body_bytes > COPY_BYTES_MAX else "no_room")
                return
            self.chunks.append(data)
        if whole.done or self.body_bytes == self.m.length:  # over HTTP/2 the end may come behind the answer
            self.open = False
            self.m.done, self.m.trailers = True, list(whole.trailers)
            self.copies.world.reactor.soon.append(self._send)  # not a call: no mistake of ours is to reach the original

    def hold(self, size: int) -> bool:
        """Whether all copies together may hold so much more."""
        copies = self.copies
        if copies.held_bytes + size > HELD_BYTES_MAX:
            return False
        self.held_bytes += size
        copies.held_bytes += size
        return True

    def drop(self, result: str = "unfinished") -> None:
        """It is not sent: its body is too large, or the original ended before it was whole."""
        if self.open:
            self.open = False
            self.release()
            self.copies.count(self.plan.route.service, result)

    def release(self) -> None:
        self.copies.held_bytes -= self.held_bytes
        self.held_bytes = self.body_bytes = 0
        self.chunks = []

    def taken(self) -> None:
        """A connection has the body: what waits there is counted with all that waits."""
        self.held_bytes -= self.body_bytes
        self.copies.held_bytes -= self.body_bytes
        self.body_bytes = 0

    def _send(self) -> None:
        """The original's request is whole, and on its way."""
        m, copies, route = self.m, self.copies, self.plan.route
        if len(copies.servings) >= UNDER_WAY_MAX:  # they have begun together
            self.release()
            copies.count(route.service, "no_room")
            return
        now = copies.world.reactor.now
        chunks, self.chunks = self.chunks, []
        serving = self.serving = Serving(copies.world, copies.entry, _Nobody(copies, self), m, now)
        copies.servings[serving] = None
        serving.plan = route
        serving.host = self.host if self.plan.same_host else route.cluster.name.encode()
        if chunks:
            serving.unsent, serving.unsent_bytes = chunks, self.body_bytes
        ex = serving.ex = copies.entry.exchange(serving, route, self.plan.subset, m, now)
        ex.replayable = not chunks  # one shot, and no part of what originals may keep for theirs
        serving.drive(ex.begin(now))


def _message(serving: Serving) -> Message:
    """What the original sends on, marked with its trace-id; its trace is a new one, or what sidecars remember by
    trace-id would tie the two together."""
    m, copy = serving.m, Message()
    copy.method, copy.target, copy.path, copy.form = m.method, m.target, m.path, m.form
    copy.host, copy.host_key = m.host, m.host_key
    copy.headers = [field for field in m.headers if field[0] != b"tracestate"]  # it belongs to the trace
    copy.length, copy.chunked = m.length, m.chunked
    copy.grpc, copy.te_trailers, copy.deadline_ms = m.grpc, m.te_trailers, m.deadline_ms
    copy.forwarded = [*m.forwarded, (MIRROR_MARK, serving.request_id().encode())]
    copy.head = True
    return copy


def _size(m: Message) -> int:
    """About what the head of a copy keeps from being freed, or is itself."""
    return sum(len(value) for _, value in m.headers) + len(m.path) + HEAD_BYTES


class _CopyEntry(Outbound):
    """Outbound, but for how the end is recorded."""

    def exchange(self, serving: Serving, plan: RoutePlan, subset: Subset | Aimed, m: Message, now: float) -> Exchange:
        serving.trace = None
        return super().exchange(serving, plan, subset, m, now)

    def request_fields(self, serving: Serving, up: "Up") -> list[Field]:
        serving.down.copy.taken()  # it is being sent
        return super().request_fields(serving, up)

    def spent(self, serving: Serving) -> None:
        pass

    def over(self, serving: Serving, status: int, reason: str) -> None:
        """In its own metric, by the class of the status or by what went wrong; no line in the access log."""
        nobody: _Nobody = serving.down
        assert serving.plan is not None
        nobody.copies.servings.pop(serving, None)
        nobody.copy.release()
        nobody.timer.close()
        if nobody.left and serving.ex is not None and reason == Outcome.CALLER_GONE.reason:
            status, reason = serving.ex.status, serving.reason or "ok"
        nobody.copies.count(serving.plan.service, copy_result(status, reason))


class _Nobody:
    """The caller's side of a copy: takes whatever comes, at once, until it is too much."""

    __slots__ = ("answer_bytes", "copies", "copy", "last", "left", "relayed", "serving", "timer")

    peer = ""
    address = ""

    def __init__(self, copies: Copies, copy: Copy) -> None:
        self.copies, self.copy = copies, copy
        self.timer = Timer(copies.world.timers, self._due)
        self.answer_bytes = 0
        self.relayed = self.last = self.left = False
        self.serving: Serving | None = None

    def _due(self) -> None:
        if self.copy.serving is not None:
            self.copy.serving.due()

    def pause(self) -> None:
        pass

    def resume(self) -> None:
        pass

    def informational(self, m: Message) -> None:
        pass

    def relay_head(self, request: Message, m: Message, data: bytes, extra: Any) -> None:
        self.relayed = True
        if is_event_stream(m):
            self._leave()  # it has no end
        self.relay_body(data)

    def relay_body(self, data: bytes) -> bool:
        self.answer_bytes += len(data)
        if self.answer_bytes > ANSWER_BYTES_MAX:
            self._leave()
        return True

    def _leave(self) -> None:
        if not self.left and self.copy.serving is not None:
            self.left = True
            self.copies.world.reactor.soon.append(self.copy.serving.caller_gone)  # it is in the middle of the answer

    def relay_end(self, m: Message, data: bytes) -> None:
        pass

    def answer(self, request: Message, status: int, headers: Any, body: bytes, reason: bytes | None) -> None:
        pass

    def served(self, serving: Serving) -> None:
        pass

    def cut(self) -> None:
        pass
