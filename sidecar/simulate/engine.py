"""The run: the real policy code between modelled applications, in virtual time.

The engine is the driver of every Exchange: it obeys a `Do`, and reports back what the models say has happened. Must not
know real time, files or reports.
Invariants: a call ends exactly once; a slot of a server is given back exactly once; an event of something that is over
does nothing.
"""

import math
from collections.abc import Callable
from functools import partial

from sidecar.model.snapshot import Snapshot
from sidecar.policy.cluster import Aimed, Cluster, RoutePlan, Subset
from sidecar.policy.endpoint import Endpoint
from sidecar.policy.exchange import OFF, RELAY, SEND, WAIT, Do, Exchange
from sidecar.policy.outcome import Failure, Outcome
from sidecar.policy.overload import RUNS, SHED, WAITS, Gate

from .agenda import Agenda
from .chance import source
from .hedges import Hedges
from .life import Ask, Attempt, Call
from .loads import Source
from .record import Change, is_good
from .scenario import HANG, RESET, Down, Scenario
from .server import Server
from .sidecars import Sidecar, key_of
from .stage import Stage

NOTHING_SERVES = (Outcome.CIRCUIT_OPEN, Outcome.NO_HEALTHY_ENDPOINT, Outcome.OVERFLOW)


class Engine:
    """One run of a scenario under one policy. `requests_max` ends the load early."""

    def __init__(self, scenario: Scenario, snapshot: Snapshot, seed: int, requests_max: int, buckets: int) -> None:
        self.scenario = scenario
        self.requests_max = requests_max
        self.requests = self.unsent = 0  # of the load; `unsent`: no caller was up
        self.changes: list[Change] = []
        self._watched: set[Cluster] = set()
        self._network_s = scenario.network_s
        models = source(seed, "models")
        self._draw = models.random
        self._policy_draw = source(seed, "policy").random
        self.stage = Stage(scenario, snapshot, models, self._on_breaker, buckets)
        self.agenda = Agenda(scenario.duration_s, buckets, self.stage.on_bucket)
        self._push = self.push = self.agenda.push
        self._hedges = Hedges(self)
        self._sources = [
            Source(load, asks, index, seed, scenario.duration_s)
            for index, (load, asks) in enumerate(zip(scenario.load, self.stage.load_asks, strict=True))
        ]

    def run(self) -> None:
        """Until nothing is left to happen. Raises PlanError where the policy cannot be served."""
        self.stage.publish(0.0)
        self._watch()
        for at_s, change in self.stage.script():
            self._push(at_s, self._change, change, None)
        for each in self._sources:
            self._await_arrival(each)
        self.agenda.run()

    def _change(self, change: Callable[[float], list[Attempt] | None], _: None, now: float) -> None:
        """The script goes on; attempts that it cut off are told."""
        for attempt in change(now) or ():
            self._lose(attempt, now)
        self._watch()

    def _watch(self) -> None:
        """Clusters whose outliers nobody judges yet."""
        for cluster in self.stage.ejecting():
            if cluster not in self._watched and cluster.outliers is not None:
                self._watched.add(cluster)
                self._push(cluster.outliers.due, self._judge, cluster, None)

    def _judge(self, cluster: Cluster, _: None, now: float) -> None:
        """Outliers are judged when it is time, while there is load."""
        outliers = cluster.outliers
        if outliers is None:
            return
        cluster.step(now)
        if outliers.due < self.scenario.duration_s:
            self._push(outliers.due, self._judge, cluster, None)

    def _on_breaker(self, sidecar: Sidecar, endpoint: Endpoint, text: str) -> None:
        server = self.stage.servers[endpoint.key]
        name = server.service.name if text.startswith("panic") else server.model.name
        self.changes.append(Change(self.agenda.now, sidecar.name, server.service.name, name, text))

    # -- calls

    def _await_arrival(self, load: Source) -> None:
        at_s = load.next()
        if at_s < OFF:
            self._push(at_s, self._arrive, load, None)

    def _arrive(self, load: Source, _: None, now: float) -> None:
        if self.requests >= self.requests_max:
            return
        self._await_arrival(load)
        ask, drawn = load.draw()
        callers = self.stage.callers(load.caller)
        if callers:
            self.requests += 1
            self._start(ask, callers[int(drawn * len(callers))], None, now)
        else:
            self.unsent += 1

    def _start(self, ask: Ask, sidecar: Sidecar, parent: Attempt | None, now: float) -> Call:
        call = Call(ask, sidecar, parent, now)
        call.edge.begin(self.agenda.bucket, call.first)
        plan = sidecar.routes[ask.number]
        if plan is None:
            self._finish(call, Outcome.NO_ROUTE.status, Outcome.NO_ROUTE.reason, now)
        elif sidecar.faults and ask.number in sidecar.faults:
            self._inject(call, plan, now)
        else:
            self._begin(call, plan, now)
        return call

    def _inject(self, call: Call, plan: RoutePlan, now: float) -> None:
        """As the filters fault-delay and fault-abort do."""
        fault = call.sidecar.faults[call.ask.number]
        delay_s = fault.delay_s if fault.delay_s and self._policy_draw() * 100.0 < fault.delay_percent else 0.0
        aborts = fault.abort_status is not None and self._policy_draw() * 100.0 < fault.abort_percent
        if aborts:
            self._push(now + delay_s, self._abort, call, fault.abort_status)
        elif delay_s:
            self._push(now + delay_s, self._begin_late, call, plan)
        else:
            self._begin(call, plan, now)

    def _abort(self, call: Call, status: int, now: float) -> None:
        if not call.over:
            self._finish(call, status, Outcome.FAULT_INJECTED.reason, now)

    def _begin_late(self, call: Call, plan: RoutePlan, now: float) -> None:
        if not call.over:
            self._begin(call, plan, now)

    def _begin(self, call: Call, plan: RoutePlan, now: float) -> None:
        respond = plan.respond or plan.redirect
        if respond is not None:
            self._finish(call, respond.status, Outcome.RESPONDED.reason, now)
            return
        ask, parent = call.ask, call.parent
        subset: Subset | Aimed | None = plan.subset
        if subset is None:
            subset = plan.destinations.pick(self._policy_draw).subset
        if plan.key_of is not None and isinstance(subset, Subset):
            sidecar = call.sidecar
            subset = Aimed(subset, plan.key_of(ask.headers, sidecar.service, sidecar.name))
        cap, inherited = OFF, 0
        if parent is not None and parent.call is not None and parent.server.service.propagates:
            cap, inherited = parent.ends, parent.number
        call.ex = ex = Exchange(
            plan, subset, ask.method, call.started, self._policy_draw, OFF, cap, inherited, ask.idempotent
        )
        do = ex.begin(now)
        if do is SEND:
            self.send(call, ex, now)
        else:
            self._drive(call, ex, do, now)

    def _drive(self, call: Call, ex: Exchange, do: Do, now: float) -> None:
        """Obey the exchange."""
        if do is SEND:
            self.send(call, ex, now)
        elif do is WAIT:
            call.serial += 1
            self._push(ex.due, self._due, call, call.serial)
        else:  # ANSWER
            outcome = ex.outcome
            status = outcome.status
            fallback = ex.plan.fallback
            if fallback is not None and fallback.respond is not None and outcome in NOTHING_SERVES:
                status = fallback.respond.status
            call.exhausted = call.exhausted or ex.exhausted
            self._finish(call, status, outcome.reason, now)

    def _finish(self, call: Call, status: int, reason: str, now: float) -> None:
        call.serial += 1
        call.over = True
        call.edge.end(self.agenda.bucket, call.started, now, status, reason)
        parent = call.parent
        if parent is not None:
            self._push(now, self._stepped, parent, (call, status))

    def _cancel(self, call: Call, now: float) -> None:
        """Its application no longer waits for it."""
        if call.over:
            return
        call.serial += 1
        call.over = True
        call.edge.cancel()
        self._hedges.cancelled(call, now)
        if call.ex is not None:
            call.ex.caller_gone(now)
        if call.attempt is not None:
            self.abandon(call.attempt, call, now)

    def _due(self, call: Call, serial: int, now: float) -> None:
        """The timer of a step that may be over."""
        if call.serial != serial:
            return
        ex = call.ex
        assert ex is not None
        if call.attempt is not None:
            self.abandon(call.attempt, call, now)
        if call.other is None or not self._hedges.failed(call, None, False, now):
            self._drive(call, ex, ex.deadline(now), now)

    # -- attempts

    def send(self, call: Call, ex: Exchange, now: float) -> None:
        call.serial += 1
        if ex.plan.hedge_s:
            self._hedges.arm(call, ex, now)
        endpoint = ex.endpoint
        assert endpoint is not None
        server = self.stage.servers[endpoint.key]
        retries = ex.attempt
        call.attempt = attempt = Attempt(call, server, ex.ends, ex.inherited + retries, call.first and not retries)
        edge = call.edge
        edge.attempts += 1
        bucket = self.agenda.bucket
        edge.bucket_attempts[bucket] += 1
        if retries:
            edge.bucket_retries[bucket] += 1
        server.attempts += 1
        server.bucket_attempts[bucket] += 1
        if server.down is not None:
            self._unreachable(attempt, call, ex, now)
            return
        if server.limits:
            limit = server.limits.get(call.ask.number)
            if limit is not None:
                verdict = limit[0].take(key_of(limit[1], call.ask, call.sidecar), now)
                if not verdict.allowed:
                    attempt.status, attempt.reason = Outcome.RATE_LIMITED.status, Outcome.RATE_LIMITED.reason
                    attempt.retry_after_s = max(1, math.ceil(verdict.retry_after_s - 1e-6))
                    self._refuse(attempt, now)
                    return
        if server.gate is not None:
            self._queue_up(attempt, server.gate, call, ex, now)
        else:
            self._enter(attempt, server, now)

    def _queue_up(self, attempt: Attempt, gate: Gate, call: Call, ex: Exchange, now: float) -> None:
        """The callee's sidecar lets so many through at a time."""
        rank = gate.class_of(call.sidecar.service, call.ask.headers)
        ticket = gate.arrive(rank, attempt.ends, now, partial(self._called_up, attempt))
        attempt.gate, attempt.ticket = gate, ticket
        if ticket.at is not WAITS:
            self._let_in(attempt, None, now)
            return
        self._push(ticket.until, self._waited, attempt, None)
        if ex.due < OFF:
            self._push(ex.due, self._due, call, call.serial)

    def _called_up(self, attempt: Attempt) -> None:
        self._push(self.agenda.now, self._let_in, attempt, None)

    def _waited(self, attempt: Attempt, _: None, now: float) -> None:
        assert attempt.gate is not None and attempt.ticket is not None
        attempt.gate.expire(attempt.ticket, now)

    def _let_in(self, attempt: Attempt, _: None, now: float) -> None:
        ticket = attempt.ticket
        assert ticket is not None
        if ticket.at is RUNS:
            self._enter(attempt, attempt.server, now)
        elif ticket.at is SHED and attempt.call is not None:
            attempt.status, attempt.reason = Outcome.OVERFLOW.status, Outcome.OVERFLOW.reason
            attempt.call.edge.shed += 1
            self._refuse(attempt, now)

    def _enter(self, attempt: Attempt, server: Server, now: float) -> None:
        """The application takes the request, if it has room."""
        call = attempt.call
        assert call is not None and call.ex is not None
        ex = call.ex
        if server.busy < server.concurrency:
            self._work(attempt, server, now)
        elif len(server.queue) < server.queue_max:
            server.queue.append(attempt)
            if ex.due < OFF:
                self._push(ex.due, self._due, call, call.serial)
        else:
            server.refusals += 1
            attempt.status = server.full_status
            self._give_back(attempt, now)
            self._refuse(attempt, now)

    def _refuse(self, attempt: Attempt, now: float) -> None:
        """Answered without the application's doing."""
        attempt.over = True
        call = attempt.call
        assert call is not None and call.ex is not None
        at_s = now + self._network_s
        if at_s < call.ex.due:
            self._push(at_s, self._reply, attempt, None)
        else:
            self._push(call.ex.due, self._due, call, call.serial)

    def _unreachable(self, attempt: Attempt, call: Call, ex: Exchange, now: float) -> None:
        attempt.over = True
        refused = attempt.server.down is Down.REFUSED
        at_s = now + (self._network_s if refused else ex.plan.timeouts.connect_s)
        if at_s < ex.due:
            self._push(at_s, self._no_connection, attempt, None)
        else:
            self._push(ex.due, self._due, call, call.serial)

    def _no_connection(self, attempt: Attempt, _: None, now: float) -> None:
        if attempt.call is not None:
            self._failed(attempt.call, Failure.CONNECT, False, now)

    def _failed(self, call: Call, failure: Failure, reused: bool, now: float) -> None:
        ex, attempt = call.ex, call.attempt
        assert ex is not None and attempt is not None
        call.attempt = attempt.call = None
        if call.other is None or not self._hedges.failed(call, failure, reused, now):
            self._drive(call, ex, ex.failed(failure, now, reused), now)

    def _work(self, attempt: Attempt, server: Server, now: float) -> None:
        """The application begins. The caller's timer is set only where it may be needed."""
        server.busy += 1
        attempt.working = True
        if server.running is not None:
            server.running[attempt] = None
        failing = server.failing
        if failing is not None and self._draw() < failing.rate:
            attempt.status = failing.status(self._draw)
            attempt.retry_after_s = failing.retry_after_s
            took_s = failing.sample() if failing.sample is not None else server.work_s(now)
        else:
            took_s = server.work_s(now)
        done = now + took_s
        call = attempt.call
        if attempt.status != HANG or call is None:  # nobody is left who would end a request that hangs
            self._push(done, self._worked, attempt, server)
            if call is None or (done + self._network_s < call.ex.due and not server.steps):  # type: ignore[union-attr]
                return
        if call is not None:
            due = call.ex.due  # type: ignore[union-attr]
            if due < OFF:
                self._push(due, self._due, call, call.serial)

    def _worked(self, attempt: Attempt, server: Server, now: float) -> None:
        """The application's own work is done: it calls others, or answers."""
        if attempt.over:
            return
        if server.steps and attempt.status == 200:
            self._step(attempt, server, now)
        else:
            self._done(attempt, server, now)

    def _step(self, attempt: Attempt, server: Server, now: float) -> None:
        steps = server.steps
        index = attempt.step
        while index < len(steps):
            ask = steps[index]
            index += 1
            if ask.step_share >= 1.0 or self._draw() < ask.step_share:
                attempt.step = index
                assert server.sidecar is not None
                attempt.child = None
                call = self._start(ask, server.sidecar, attempt, now)
                if not call.over:
                    attempt.child = call
                return
        self._done(attempt, server, now)

    def _stepped(self, attempt: Attempt, result: tuple[Call, int], now: float) -> None:
        """A call of the application has ended."""
        call, status = result
        attempt.child = None
        if attempt.over:
            return
        server = attempt.server
        if call.exhausted and server.service.propagates:
            attempt.exhausted = True
        if call.ask.status and not is_good(status):
            attempt.status = call.ask.status
            self._done(attempt, server, now)
        else:
            self._step(attempt, server, now)

    def _done(self, attempt: Attempt, server: Server, now: float) -> None:
        """The application has answered."""
        if attempt.ticket is not None and attempt.gate is not None:
            attempt.gate.answered(attempt.ticket, is_good(attempt.status), False, now)
        self._free(attempt, server, now)
        if attempt.call is not None:
            if self._network_s:
                self._push(now + self._network_s, self._reply, attempt, None)
            else:
                self._reply(attempt, None, now)

    def _free(self, attempt: Attempt, server: Server, now: float) -> None:
        attempt.over = True
        attempt.working = False
        server.busy -= 1
        self._give_back(attempt, now)
        if server.running is not None:
            del server.running[attempt]
        queue = server.queue
        while queue and server.busy < server.concurrency:
            self._work(queue.popleft(), server, now)

    def _give_back(self, attempt: Attempt, now: float) -> None:
        if attempt.ticket is not None and attempt.gate is not None:
            attempt.gate.leave(attempt.ticket, now)

    def _reply(self, attempt: Attempt, _: None, now: float) -> None:
        """The caller's sidecar has the answer, unless it no longer waits for it."""
        call = attempt.call
        if call is None:
            return
        ex = call.ex
        assert ex is not None
        status = attempt.status
        if status == RESET:
            endpoint = ex.endpoint
            assert endpoint is not None
            if not endpoint.mesh:
                self._failed(call, Failure.RESET, False, now)
                return
            status, attempt.reason = Outcome.UPSTREAM_RESET.status, Outcome.UPSTREAM_RESET.reason
        if call.other is not None:
            answering = self._hedges.answered(call, attempt, status, now)
            if answering is None:
                return
            call, ex = answering, answering.ex
            assert ex is not None
        call.attempt = attempt.call = None
        call.serial += 1
        if is_good(status):
            call.edge.good_attempts += 1
            attempt.server.good += 1
        asked_s = attempt.retry_after_s
        if asked_s is not None and status not in ex.plan.retry.statuses:
            asked_s = None
        exhausted = attempt.exhausted and status >= 500
        do = ex.response_head(status, now, attempt.reason, exhausted, asked_s)
        if do is RELAY:
            ex.response_end(now)
            call.exhausted = ex.exhausted or exhausted
            self._finish(call, status, attempt.reason or "ok", now)
        else:
            self._drive(call, ex, do, now)

    def watch(self, call: Call, due: float) -> None:
        """The call's next deadline is another one."""
        if due < OFF:
            self._push(due, self._due, call, call.serial)

    def abandon(self, attempt: Attempt, call: Call, now: float) -> None:
        """The caller's sidecar stops waiting. The application may not notice."""
        call.attempt = attempt.call = None
        server = attempt.server
        if attempt.over:
            return
        self._give_back(attempt, now)  # the application may go on, but its sidecar sees it leave
        if attempt.working:
            if server.stops or attempt.status == HANG:
                child = attempt.child
                self._free(attempt, server, now)
                if child is not None:
                    self._cancel(child, now)
        elif server.stops and attempt in server.queue:
            attempt.over = True
            server.queue.remove(attempt)

    def _lose(self, attempt: Attempt, now: float) -> None:
        """Its server went down under it."""
        attempt.over = True
        attempt.working = False
        child, call = attempt.child, attempt.call
        if child is not None:
            self._cancel(child, now)
        if call is None:
            return
        ex = call.ex
        assert ex is not None
        if attempt.server.down is Down.REFUSED:
            self._failed(call, Failure.RESET, True, now)
        elif ex.due < OFF:
            self._push(ex.due, self._due, call, call.serial)
