"""The driver of one request: it moves bytes between a caller and an upstream connection, and obeys the Exchange.

It decides nothing about policy and knows no socket: `down` is the caller's side (a connection, later a stream), `up`
the upstream's; a Message is what both speak. All of it is synchronous and runs in the reactor; what must wait
(connecting, asynchronous filters) is asked of the world and answers by a method call.
Invariants: `_over` runs exactly once; after it nothing is sent or received for this request; at most 64 KiB of the
request's body are held for a retry, and a reader that is slow stops its source.
"""

from typing import TYPE_CHECKING, Any

from sidecar.policy.backoff import retry_after_s
from sidecar.policy.cluster import Aimed, Cluster, RoutePlan, Subset
from sidecar.policy.endpoint import Endpoint
from sidecar.policy.exchange import ANSWER, CUT, OFF, RELAY, SEND, WAIT, Do, Exchange
from sidecar.policy.outcome import Failure, Outcome
from sidecar.policy.overload import Ticket
from sidecar.policy.replay import ReplayBuffer
from sidecar.wire.grpc import read_pushback_ms, read_status
from sidecar.wire.http1 import Message, ProtocolError

from . import answers, overload
from .channel import TIGHT_BYTES
from .filtering import FAILED, PENDING

if TYPE_CHECKING:
    from .entries import Entry
    from .hedge import Race
    from .mirror import Copy
    from .pool import Up
    from .world import World

HOLD_S = 0.1  # how long a gRPC response's head may wait for the trailers
UNSENT_BYTES_MAX = 64 * 1024  # how much of a body is read before a connection can take it


class Serving:
    """One request. `m` is the request's message; `plan` is None until a route has been found."""

    __slots__ = (
        "asked",
        "body_ends",
        "caller_rule",
        "connecting",
        "continued",
        "copy",
        "cut_code",
        "down",
        "endpoint",
        "entry",
        "ex",
        "extra",
        "filter_scope",
        "grpc_status",
        "held",
        "host",
        "m",
        "nested",
        "over",
        "pinned",
        "plan",
        "race",
        "reason",
        "received_bytes",
        "remembered",
        "replay",
        "request_view",
        "response",
        "sent_bytes",
        "set_cookie",
        "started",
        "subset",
        "ticket",
        "timer",
        "trace",
        "unsent",
        "unsent_bytes",
        "up",
        "waiting_filter",
        "world",
    )

    def __init__(self, world: "World", entry: "Entry", down: Any, m: Message, now: float) -> None:
        self.world, self.entry, self.down, self.m = world, entry, down, m
        self.timer = down.timer
        self.started = now
        self.plan: RoutePlan | None = None
        self.ex: Exchange | None = None
        self.up: Up | None = None
        self.endpoint: Endpoint | None = None  # the last one tried, for log and metrics
        self.subset: Subset | None = None
        self.pinned: Endpoint | None = None  # the endpoint that a cookie names
        self.request_view: Any = None
        self.response: Message | None = None  # held while an asynchronous filter looks at it
        self.extra: list[tuple[bytes, bytes]] = []
        self.grpc_status: int | None = None  # how the call ended, if this is one
        self.held: Message | None = None  # a gRPC response that may yet turn out to be a failure to retry
        self.filter_scope: Any = None  # of the task that runs an asynchronous filter
        self.unsent: list[bytes] = []  # body bytes that wait for a connection
        self.replay: ReplayBuffer | None = None  # body bytes that were sent and may be sent again
        self.unsent_bytes = self.received_bytes = self.sent_bytes = 0
        self.connecting = self.continued = self.over = self.waiting_filter = False
        self.nested = False  # it was made for an inbound request in flight
        self.cut_code = 0  # of HTTP/2: what a gRPC caller is told if its answer is cut
        self.remembered: Any = None
        self.copy: Copy | None = None  # what a mirror is to get, while the body comes
        self.ticket: Ticket | None = None  # of the gate before the own application
        self.race: Race | None = None  # of two attempts at a time, where the route hedges
        self.body_ends = 0.0  # 0: the body under way has not begun
        self.reason = ""
        self.caller_rule: str = ""
        self.set_cookie = b""
        self.asked: tuple[bytes, list[tuple[bytes, bytes]]] = (b"", [])  # path and headers as they were judged
        self.host = m.host or b""
        self.trace = m.traceparent

    # -- the request

    def start(self, now: float) -> None:
        """The head is complete: find the route, ask authorization and filters, begin."""
        plan = self.entry.admit(self, self.m, now)
        if plan is None:
            return  # answered, or parked
        self.follow(plan)
        chain = plan.filters
        if chain is not None and chain.on_request:
            reply = chain.request(self)
            if reply is PENDING:
                self.waiting_filter = True
                self.timer.set(self._ends(plan))
                if not self.m.done:
                    self.down.pause()  # else it reads on, to hear of a caller that leaves
                return
            if reply is not None:
                self._replied(reply)
                return
        self._begin(now)

    def _ends(self, plan: RoutePlan) -> float:
        """When the total time of a request is over that has not been sent yet: what filters take is part of it."""
        m, timeouts = self.m, plan.timeouts
        total_s = timeouts.of_grpc_s if m.grpc else timeouts.total_s
        if m.deadline_ms is not None:
            total_s = min(total_s, m.deadline_ms / 1000)
        return self.started + total_s

    def park(self) -> None:
        """The service that is asked for must be fetched first."""
        self.waiting_filter = True
        if not self.m.done:
            self.down.pause()  # else it reads on, to hear of a caller that leaves

    def unpark(self, problem: str) -> None:
        """Go on by the plans of the moment; with a `problem`, answer that nothing can serve."""
        if self.over:
            return
        self.waiting_filter = False
        if problem:
            self.refuse(Outcome.NO_HEALTHY_ENDPOINT, problem)
            return
        if not self.m.done:
            self.down.resume()
        self.start(self.world.reactor.now)

    def follow(self, plan: RoutePlan) -> None:
        """From here on the request counts as one of this route's."""
        self.plan = plan
        plan.stats[""].active += 1

    def filtered(self, reply: Any) -> None:
        """The asynchronous request hooks are through. `reply`: None, or the answer that one of them gave."""
        if self.over:
            return
        self.waiting_filter = False
        if reply is not None:
            self._replied(reply)
            return
        if not self.m.done:
            self.down.resume()
        self._begin(self.world.reactor.now)

    def let_in(self) -> None:
        """The gate before the application lets the request through, after a wait."""
        if not self.m.done:
            self.down.resume()
        self._begin(self.world.reactor.now)

    def _replied(self, reply: Any) -> None:
        """A filter answers in the application's place, or has failed."""
        self.drop_upstream()
        ex, self.ex = self.ex, None
        if ex is not None:
            ex.refused(Outcome.FILTER_ERROR if reply is FAILED else Outcome.RESPONDED, self.world.reactor.now)
        if reply is FAILED:
            self.refuse(Outcome.FILTER_ERROR)
        else:
            self.answer_with(reply.status, reply.headers, reply.body, reply.reason)

    def _begin(self, now: float) -> None:
        plan, m = self.plan, self.m
        assert plan is not None
        if plan.respond is not None:
            self.answer_with(plan.respond.status, plan.respond_fields, plan.respond.body.encode(), "responded")
            return
        if plan.redirect is not None:
            location = plan.redirect.location(m.path, m.host or self.host)
            fields = ((b"location", location), *plan.redirect.fields)
            self.answer_with(plan.redirect.status, fields, b"", "responded")
            return
        if m.extended and self.upgrade_token() is None:
            self.refuse(Outcome.NOT_IMPLEMENTED, "this route allows no such upgrade")
            return
        if plan.gate is not None and self.ticket is None and not overload.enter(self, plan.gate, now):
            return
        subset = plan.subset
        if subset is None or plan.sticky is not None:
            subset = self._choose(plan)
        self.subset = subset
        if plan.body_hooks:
            plan.filters.reframe_request(m)
        data = b""
        if not m.done or m.body:
            data = self._request_data(m)
            if self.over:
                return
            if data:
                self.unsent.append(data)
                self.unsent_bytes = len(data)
        aimed: Subset | Aimed = subset
        if plan.key_of is not None or self.pinned is not None:
            key = plan.key_of(m.headers, self.entry.caller_service, self.down.address) if plan.key_of else None
            aimed = Aimed(subset, key, self.pinned)
        ex = self.entry.exchange(self, plan, aimed, m, self.started)  # what filters took is within the total
        self.ex = ex
        if not m.done:
            ex.request_done = False
        self.drive(ex.begin(now))
        if plan.mirror is not None and not self.over:
            self.copy = self.world.copies.begin(self, plan.mirror, data)

    def _choose(self, plan: RoutePlan) -> Subset:
        """By the cookie if it is ours and what it names still serves; else by weight."""
        sticky = plan.sticky
        world = self.world
        if sticky is not None and sticky.by_endpoint:
            named = plan.pinned.get(sticky.read(_cookies(self.m), world.epoch()) or "")
            if named is not None:
                self.pinned, subset = named
                return subset
        elif sticky is not None:
            stated = sticky.read(_cookies(self.m), world.epoch())
            for destination in plan.destinations.items:
                if destination.version == stated and destination.subset.endpoints:
                    return destination.subset
        destination = plan.destinations.pick(world.rnd)
        if sticky is not None and not sticky.by_endpoint and destination.version is not None:
            self.set_cookie = sticky.issue(destination.version, world.epoch())
        return destination.subset

    def _pin(self, plan: RoutePlan) -> None:
        """From now on the client stays with the endpoint that has served it, unless that was a fallback's."""
        sticky, endpoint = plan.sticky, self.endpoint
        assert sticky is not None and endpoint is not None
        token = sticky.token(endpoint.key)
        if token in plan.pinned:
            self.set_cookie = sticky.issue(token, self.world.epoch())

    def request_body(self, m: Message) -> None:
        """More of the request's body, or its end, has arrived."""
        ex = self.ex
        if ex is None:
            return  # a filter is still thinking; the source is paused
        data = self._request_data(m)
        if self.over:
            return
        if self.copy is not None:
            self.copy.add(data, m)
        up = self.up
        if up is None:
            if data:
                self.unsent.append(data)
                self.unsent_bytes += len(data)
                if self.unsent_bytes >= UNSENT_BYTES_MAX and not m.done:
                    self.down.pause()  # until connected
            if m.done:
                ex.request_done = True
                if self.race is not None:
                    self.race.arm()
            return
        if data and not ex.begun:
            self._remember(data, ex)
        if not up.send_body(data, m) and not m.done:
            self.down.pause()
        if m.done and not ex.request_done:
            ex.request_end(self.world.reactor.now)
            if self.race is not None:
                self.race.arm()
            if self.ticket is not None:
                overload.whole(self, self.world.reactor.now)
            if self.remembered is not None and not ex.begun and not m.grpc:
                self.remembered.deadline = ex.ends
        self._arm()

    def _request_data(self, m: Message) -> bytes:
        data = m.take()
        self.received_bytes += len(data)
        plan = self.plan
        if plan is not None and plan.body_hooks:
            changed: bytes | None = plan.filters.request_data(self, data, m.done)
            if changed is None:
                self._filter_broke()
                return b""
            return changed
        return data

    def _remember(self, data: bytes, ex: Exchange) -> None:
        """Keep what is sent as long as it fits; what does not fit is not replayable."""
        replay = self.replay
        if replay is None:
            self.replay = replay = self.world.replay.buffer()
        if self.world.reactor.held_bytes >= TIGHT_BYTES:
            replay.release()  # memory is short: what others wait for is worth more than a retry
        if ex.replayable and not replay.add(data):
            ex.replayable = False

    def forget_body(self) -> None:
        """The request will not be sent again."""
        if self.replay is not None:
            self.replay.release()
            self.replay = None

    # -- obeying the exchange

    def drive(self, do: Do) -> None:
        """The one place where an Exchange's next step becomes deeds."""
        ex = self.ex
        assert ex is not None
        if do is SEND:
            self.timer.set(ex.due)
            endpoint = ex.endpoint
            assert endpoint is not None
            self.endpoint = endpoint
            if ex.plan.hedge_s:
                self.world.hedges.arm(self, ex)
            up = self.world.pool.take(endpoint, self, ex)
            if up is not None:
                self._attach(up)
        elif do is WAIT:
            self.timer.set(ex.due)
        elif do is ANSWER:
            self.refuse(ex.outcome)
        elif do is CUT:
            if ex.outcome is Outcome.TIMEOUT_TOTAL:
                self._end_call()
                return
            self._over(0, ex.outcome.reason)
            self.down.cut()
        else:
            assert do is not RELAY, "only a response head may be relayed"

    def connected(self, up: "Up") -> None:
        """The pool found or made a connection for this request."""
        assert self.connecting and not self.over
        self.connecting = False
        self._attach(up)

    def connect_failed(self, detail: str) -> None:
        """The pool could not connect; `detail` is for the log."""
        ex = self.ex
        assert self.connecting and not self.over and ex is not None
        self.connecting = False
        self.world.note_connect_failure(self, detail)
        if self.race is not None and self.race.survives(Failure.CONNECT):
            return
        self.drive(ex.failed(Failure.CONNECT, self.world.reactor.now))

    def overflow(self, cluster: Cluster) -> None:
        """The pool's queue is full."""
        ex = self.ex
        assert ex is not None
        cluster.overflows += 1
        if self.race is not None and self.race.survives(Failure.REFUSED):
            return
        self.drive(ex.refused(Outcome.OVERFLOW, self.world.reactor.now))

    def _attach(self, up: "Up") -> None:
        ex, m = self.ex, self.m
        assert ex is not None
        self.up = up
        self.held = None
        up.serving = self
        if ex.cluster is not ex.plan.cluster:
            self.host = ex.cluster.name.encode()  # a fallback: to that service this one's name would be misdirected
        body = b""
        if self.replay is not None:
            body = b"".join(self.replay.chunks)
        if self.unsent:
            unsent = self.unsent[0] if len(self.unsent) == 1 else b"".join(self.unsent)
            self.unsent = []
            self.unsent_bytes = 0
            body = body + unsent if body else unsent
            self._remember(unsent, ex)
        room = up.send_request(self, m, body)
        if not m.done or not ex.request_done:
            ex.connected(self.world.reactor.now)
            if self.remembered is not None and not m.grpc:
                self.remembered.deadline = OFF  # it begins with the last byte
            self._arm()
            if room:
                self.down.resume()
            else:
                self.down.pause()

    def upstream_failed(self, failure: Failure, reused: bool) -> None:
        """The connection that served this request died or broke the protocol."""
        ex, up = self.ex, self.up
        if up is not None and self.m.grpc:
            self.cut_code = up.error_code
        self.drop_upstream()
        if self.race is not None and self.race.survives(failure, reused):
            return
        if ex is not None and not self.over:
            self.drive(ex.failed(failure, self.world.reactor.now, reused))

    def drop_upstream(self) -> None:
        """Stop whatever is under way upstream; a connection with an unfinished exchange cannot be used again."""
        up = self.up
        if up is not None:
            self.up = None
            up.abandon()
        if self.connecting:
            self.world.pool.forget(self)
            self.connecting = False

    # -- time

    def _arm(self) -> None:
        """The next moment at which something is due while a body is under way."""
        ex = self.ex
        assert ex is not None
        if ex.request_done and not ex.begun:
            self.timer.set(ex.due)  # neither body is under way: only the server is waited for
            return
        timeouts = ex.plan.timeouts
        now = self.world.reactor.now
        if not self.body_ends:
            self.body_ends = now + timeouts.body_s
        self.timer.set(min(now + timeouts.idle_s, self.body_ends, ex.due))

    def due(self) -> None:
        """The timer fired."""
        ex = self.ex
        if ex is None or self.over:
            if self.ticket is not None:
                overload.late(self)
            elif self.filter_scope is not None and not self.over:
                self.refuse(Outcome.TIMEOUT_TOTAL)
            return
        now = self.world.reactor.now
        if self.held is not None and self.up is not None and not ex.begun:
            self._response_head(self.held, ex, self.up)  # no status has followed: on with the head
        elif now >= ex.due:
            self.drop_upstream()
            if self.race is not None and now < ex.ends and self.race.survives(None):
                return
            self.drive(ex.deadline(now))
        else:
            self.drop_upstream()
            self.drive(ex.body_timeout(now))

    # -- the response

    def informational(self, m: Message) -> None:
        """A 1xx of the upstream: passed on, a 100 only where the caller waits for it and once."""
        if m.status == 100:
            if not self.m.expect_continue or self.continued:
                return
            self.continued = True
        self.down.informational(m)

    def respond(self, m: Message) -> None:
        """The upstream's response: its head is complete, more of its body may have come."""
        ex, up = self.ex, self.up
        assert ex is not None and up is not None
        if not ex.begun:
            self._response_head(m, ex, up)
            return
        if self.response is not None:
            return  # a filter is still thinking
        data = self._response_data(m)
        if self.over:
            return
        if m.done:
            self._complete(m, ex, up)
            self.down.relay_end(m, data)
            self._finish(ex, m)
        elif data:
            if not self.down.relay_body(data):
                up.pause()
            self._arm()

    def _response_head(self, m: Message, ex: Exchange, up: "Up") -> None:
        now = self.world.reactor.now
        if self.ticket is not None:
            overload.answered(self, m, now)
        if self.race is not None and self.race.decides(m, up):
            return
        mesh = up.mesh
        reason = m.reason.decode() if m.reason and mesh else None
        if m.status == 101:
            self.world.upgrade(self, m, ex, up, now)
            return
        if self.m.extended and m.status < 300:  # over HTTP/2 it would say that the tunnel is open
            self.world.note_bad_response(self, ProtocolError(502, "the server has not switched protocols"))
            self.upstream_failed(Failure.BROKEN, False)
            return
        if self.m.grpc and self._holds(m, ex, now):
            return
        asked_s = self._asked_s(m) if m.status in ex.plan.retry.statuses or (self.m.grpc and m.grpc_status) else None
        do = ex.response_head(m.status, now, reason, mesh and m.exhausted, asked_s, m.grpc_status, bool(m.body))
        if do is not RELAY:
            if m.done and self.m.done:
                self.up = None
                up.release(m)
            else:
                self.drop_upstream()
            self.drive(do)
            return
        if self.replay is not None:
            self.forget_body()
        if reason:
            self.reason = reason
        if ex.plan.pinned and self.endpoint is not self.pinned:
            self._pin(ex.plan)
        self.extra = self.entry.response_fields(self, m, ex, reason)
        if m.done:
            self._complete(m, ex, up)
        chain = ex.plan.filters
        if chain is not None:
            if chain.on_response:
                reply = chain.response(self, m)
                if reply is PENDING:
                    self.waiting_filter = True
                    self.timer.off()  # the filter has its own limit
                    self.response = m
                    if not m.done:
                        up.pause()
                    return
                if reply is not None:
                    self._replied(reply)
                    return
            chain.reframe_response(m)
        self._relay_head(m, ex)

    def _holds(self, m: Message, ex: Exchange, now: float) -> bool:
        """Whether to wait for what follows a gRPC response's head: many servers send a failure's trailers apart from
        it. A message is never held."""
        if self.held is not None or m.done or m.body or m.status != 200 or not ex.awaits_status:
            return False
        self.held = m
        self.timer.set(min(now + HOLD_S, ex.due))
        return True

    def _asked_s(self, m: Message) -> float | None:
        """How long the server asks not to be asked again."""
        asked_ms = read_pushback_ms((*m.trailers, *m.headers)) if self.m.grpc else None
        return asked_ms / 1000 if asked_ms is not None else retry_after_s(m.headers, self.world.epoch())

    def response_filtered(self, reply: Any) -> None:
        """The asynchronous response hooks are through."""
        m, ex = self.response, self.ex
        if self.over or m is None or ex is None:
            return
        self.waiting_filter = False
        self.response = None
        if reply is not None:
            self._replied(reply)
            return
        ex.plan.filters.reframe_response(m)
        up = self.up
        if up is not None:
            if m.done:
                self._complete(m, ex, up)
            else:
                up.resume()
        self._relay_head(m, ex)

    def _relay_head(self, m: Message, ex: Exchange) -> None:
        data = self._response_data(m)
        if self.over:
            return
        extra = self.extra
        if self.set_cookie:
            extra = [*extra, (b"set-cookie", self.set_cookie)]
        if self.m.grpc:
            m.length = None  # it would pass for metadata of the call
        self.down.relay_head(self.m, m, data, extra)
        if m.done:
            self._finish(ex, m)
        else:
            endless = ex.plan.timeouts.body_s != OFF and overload.is_event_stream(m)
            self.body_ends = OFF if endless else 0.0
            self._arm()

    def _response_data(self, m: Message) -> bytes:
        data = m.take()
        plan = self.plan
        if plan is not None and plan.body_hooks:
            changed: bytes | None = plan.filters.response_data(self, data, m.done)
            if changed is None:
                self._filter_broke()
                return b""
            data = changed
        self.sent_bytes += len(data)
        return data

    def _filter_broke(self) -> None:
        """A body hook of a filter that fails closed has raised."""
        if not self.down.relayed:
            self._replied(FAILED)
            return
        self.drop_upstream()
        ex = self.ex
        if ex is not None and not ex.finished:
            ex.caller_gone(self.world.reactor.now)
        self._over(0, Outcome.FILTER_ERROR.reason)
        self.down.cut()

    def _complete(self, m: Message, ex: Exchange, up: "Up") -> None:
        """The response is whole: the upstream connection goes back to its pool."""
        self.up = None
        if self.m.done:
            up.release(m)
        else:
            up.abandon()

    def _finish(self, ex: Exchange, m: Message) -> None:
        if self.m.grpc:
            status = m.grpc_status
            self.grpc_status = answers.grpc_status(m.status, None) if status is None else status
        ex.response_end(self.world.reactor.now, self.grpc_status)
        self._over(ex.status, self.reason or "ok")
        self.down.served(self)

    def _end_call(self) -> None:
        """The deadline of a gRPC call has come behind its response's head: the status can still be told. (Where a
        message is cut short, clients go by the status, since it is not OK.)"""
        if not self.down.relayed:
            self.refuse(Outcome.TIMEOUT_TOTAL)
            return
        self._over(200, Outcome.TIMEOUT_TOTAL.reason)
        self.down.relay_end(answers.grpc_trailers(Outcome.TIMEOUT_TOTAL), b"")
        self.down.served(self)

    # -- own answers and the end

    def refuse(self, outcome: Outcome, message: str = "") -> None:
        """Answer by this sidecar itself, as the table of outcomes says."""
        ex = self.ex
        fallback = self.plan.fallback if self.plan is not None else None
        if fallback is not None and fallback.respond is not None and outcome in answers.NOTHING_SERVES:
            respond = fallback.respond
            status, body = respond.status, respond.body.encode()
            fields: Any = (answers.PLAIN_TEXT,) if body else ()
            if self.m.grpc:
                self.grpc_status = answers.grpc_status(status, None)
                fields, body, status = answers.grpc_answer(status, (), body, None), b"", 200
            self._over(status, outcome.reason)
            self.down.answer(self.m, status, fields, body, None)
            self.down.served(self)
            return
        if ex is not None and ex.exhausted:
            self.entry.spent(self)
        status = outcome.status
        if self.m.grpc:
            status, body = 200, b""
            headers: Any = answers.grpc_fields(outcome.grpc, message or answers.MESSAGES.get(outcome, ""))
        else:
            body, headers = answers.body_of(outcome, message, self.request_id())
            if self.ticket is not None and outcome is Outcome.OVERFLOW:
                headers = (*headers, overload.RETRY_AFTER)
        self._over(status, outcome.reason)
        self.down.answer(self.m, status, headers, body, outcome.reason.encode())
        self.down.served(self)

    def answer_with(self, status: int, headers: Any, body: bytes, reason: str) -> None:
        """Answer with what a policy or a filter gave."""
        word = None if reason == "responded" else reason.encode()
        if reason == Outcome.RATE_LIMITED.reason and self.plan is not None:
            self.world.service_meters(self.entry.side, self.plan.service).rate_limited.inc()
        if self.m.grpc:
            headers, body, status = answers.grpc_answer(status, headers, body, reason), b"", 200
            self.grpc_status = read_status(dict(headers)[b"grpc-status"])
        self._over(status, reason)
        self.down.answer(self.m, status, headers, body, word)
        self.down.served(self)

    def caller_gone(self) -> None:
        """The caller left or broke the protocol: cancel what is under way."""
        if self.over:
            return
        self.drop_upstream()
        ex = self.ex
        if ex is not None:
            ex.caller_gone(self.world.reactor.now)
        self._over(499, Outcome.CALLER_GONE.reason)

    def upstream_drained(self) -> None:
        """The upstream connection takes more."""
        if not self.m.done and not self.over:
            self.down.resume()

    @property
    def host_rewritten(self) -> bool:
        """Whether the route says which host to ask for."""
        rewrite = self.plan.rewrite if self.plan is not None else None
        return rewrite is not None and rewrite.host is not None

    def upgrade_token(self) -> bytes | None:
        """What the request may upgrade to: only what its route allows."""
        token, plan = self.m.upgrade, self.plan
        return token if plan is not None and token in plan.upgrade else None

    def finish_tunnel(self, status: int, reason: str) -> None:
        """The tunnel that this exchange became has ended."""
        self._over(status, reason)

    def request_id(self) -> str:
        """The trace id, so that an error's body, the log and the trace name the same request."""
        if self.trace is None:
            self.trace = self.world.new_trace()
        return self.trace[3:35].decode()

    def _over(self, status: int, reason: str) -> None:
        assert not self.over
        self.over = True
        self.timer.off()
        if self.ticket is not None:
            overload.left(self)
        if self.m.grpc and self.grpc_status is None:
            self.grpc_status = answers.grpc_status(status, reason)
        if self.filter_scope is not None:
            self.filter_scope.cancel()
        if self.request_view is not None and self.plan is not None:
            self.plan.filters.active -= 1
        if self.replay is not None:
            self.forget_body()
        if self.copy is not None:
            self.copy.drop()
        if self.race is not None:
            self.race.over()
        self.entry.over(self, status, reason)


def _cookies(m: Message) -> bytes:
    return b"; ".join(value for name, value in m.headers if name == b"cookie")
