"""One life of a sidecar's data path, at random from a seed, over a network in memory.

`live(seed)` runs one over HTTP/1.1; `support.lives_http2` has those over HTTP/2. What must hold is checked while it
runs and when all is quiet; whoever finds a seed that fails replays it exactly.
Must not depend on anything but its seed: no time, no set order, no other source of chance.
"""

import math
import random
from collections import deque
from dataclasses import replace
from email.utils import formatdate
from typing import Any

import pytest
import trio
import trio.testing

from sidecar.api import AsyncFilter, Filter, Reply
from sidecar.api import Request as ApiRequest
from sidecar.api import Response as ApiResponse
from sidecar.model.snapshot import (
    Balancing,
    Budget,
    CircuitBreaker,
    Destination,
    EndpointSpec,
    Fallback,
    Limits,
    Match,
    Outliers,
    Port,
    Retry,
    Route,
    Service,
    Snapshot,
    Sticky,
    Timeouts,
    Tls,
)
from sidecar.policy import outliers
from sidecar.policy.balancing import Aimed
from sidecar.policy.exchange import SEND, WAIT, Do, Exchange
from sidecar.proxy import downstream, http2_down_stream
from sidecar.proxy import hedge as hedge_module
from sidecar.proxy.filtering import Chain, Link
from sidecar.proxy.http2_up import Http2Upstream
from sidecar.proxy.serving import Serving
from sidecar.proxy.upstream import Upstream
from sidecar.testing import make_context
from sidecar.wire.http1 import Message, Requests, Responses

from .memory_net import DialError, Net, Peer, memory_world

METHODS = [b"GET", b"GET", b"GET", b"HEAD", b"PUT", b"POST", b"DELETE"]
SIZES = [0, 0, 1, 500, 5_000, 65_536, 70_000, 300_000]
ZONE = "here"
ALPHABET = bytes(range(97, 123)) * 20_000


class Accounts:
    """The books of one service's retries, kept apart from the sidecar's own: what a budget may at most have allowed."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.requests: deque[float] = deque()
        self.retries: deque[float] = deque()

    def request(self, now: float) -> None:
        self.requests.append(now)

    def retry(self, now: float) -> None:
        """The sidecar forgets a retry after nine to ten seconds, and a request likewise."""
        self.retries.append(now)
        while self.retries[0] <= now - 9.0:
            self.retries.popleft()
        while self.requests and self.requests[0] < now - 10.0:
            self.requests.popleft()
        allowed = 10.0 * self.budget.min_per_second + len(self.requests) * self.budget.percent / 100.0
        assert len(self.retries) <= allowed + 1e-9, f"{len(self.retries)} retries, {allowed} are paid for"


class Once:
    """Who has seen which request: one that is not safe to repeat, and no policy allows to, is seen by one application.

    Where an application sees a request, it may act on it; `unseen` takes that back where it said that it did not.
    """

    def __init__(self) -> None:
        self.asked = self.found = 0
        self.anything_goes = False  # a policy of this life repeats any method
        self.unsafe: set[bytes] = set()
        self.seen: dict[bytes, int] = {}

    def ask(self, unsafe: bool) -> tuple[bytes, bytes]:
        """A field for the next request."""
        self.asked += 1
        name = b"%d" % self.asked
        if unsafe:
            self.unsafe.add(name)
        return b"x-id", name

    def see(self, m: Message) -> bytes:
        found = dict([*m.headers, *m.forwarded])
        name = found.get(b"x-id", b"") if b"x-pillion-mirror" not in found else b"a copy"
        self.seen[name] = count = self.seen.get(name, 0) + 1
        if name in self.unsafe and not self.anything_goes:
            self.found += 1
            assert count == 1, "an unsafe request reached an application twice"
        return name

    def unseen(self, name: bytes) -> None:
        self.seen[name] -= 1


class Watched(Serving):
    """A Serving under observation."""

    life: "Life"

    def start(self, now: float) -> None:
        self.sends = self.endings = 0
        self.led: Exchange | None = None  # `ex` is let go of where a filter answers
        self.life.servings.append(self)
        self.accounts: list[Accounts] = []
        super().start(now)

    def drive(self, do: Do) -> None:
        self.led = ex = self.ex
        if ex is not None:
            now = self.world.reactor.now  # what the sidecar goes by, even if the machine has slept since
            for cluster in (ex.plan.cluster, ex.cluster):  # its own, and that of a fallback
                accounts = self.life.accounts_of(cluster)
                if accounts not in self.accounts:
                    self.accounts.append(accounts)
                    accounts.request(now)
            if do is WAIT:
                accounts.retry(now)
            elif do is SEND:
                self.check_send(ex, now)
        super().drive(do)

    def check_send(self, ex: Exchange, now: float) -> None:
        self.sends += 1
        assert ex.attempt <= ex.plan.retry.max_retries
        assert ex.resends <= self.life.resends_max, "sent for nothing too often"
        elsewhere = ex.cluster is not ex.plan.cluster  # after an overflow, say
        assert self.sends <= 1 + ex.attempt + ex.resends + elsewhere, "sent more often than policy allows"
        endpoint = ex.endpoint
        assert endpoint is not None and endpoint.active > 0
        if ex.fresh:  # the same attempt once more: nothing was picked
            assert ex.safe or self.life.resends_max > 1, "an unsafe request was sent twice"
            return
        breaker = endpoint.breaker
        assert breaker.state(now) != "open", "an open breaker was picked"
        assert not breaker.tripped or now >= breaker._open_until, "a breaker was probed before its time"
        cluster = ex.cluster
        assert cluster.ejected == sum(each.ejected for each in cluster.endpoints.values())
        self.life.ejections = max(self.life.ejections, cluster.ejections)
        if not endpoint.healthy:
            self.check_panic(ex, endpoint)

    def check_panic(self, ex: Exchange, endpoint: Any) -> None:
        """Of the priority, and of all of them together, by the exact numbers of the documentation, and by the policy
        that the request was matched with."""
        subset = ex.subset.subset if isinstance(ex.subset, Aimed) else ex.subset
        levels = subset._whole()
        of_level = [[each.healthy for each in level.endpoints] for level in levels]
        (own,) = [well for well, level in zip(of_level, levels, strict=True) if endpoint in level.endpoints]
        assert 100.0 * sum(own) < levels[0].panic_threshold * len(own), "bad health or ejected, and no panic"
        carried = sum(min(100.0, 140.0 * sum(well) / len(well)) for well in of_level)
        assert len(levels) == 1 or carried < 100.0, "bad health or ejected, and others can carry the load"

    def _over(self, status: int, reason: str) -> None:
        self.endings += 1
        super()._over(status, reason)


class WatchedRival(hedge_module.Rival):
    """A hedge under observation."""

    life: "Life"

    def drive(self, do: Do) -> None:
        ex, original, now = self.ex_, self.of.serving, self.world.reactor.now
        assert do is SEND and not original.over and original.plan is not None and original.plan.hedge_s
        first, other, breaker = original.endpoint, ex.endpoint, ex.endpoint.breaker if ex.endpoint is not None else None
        assert other is not None and other is not first and breaker is not None, "a hedge where the request has been"
        assert breaker.state(now) != "open", "an open breaker was picked for a hedge"
        named = ex.plan.retry.methods is not None
        assert original.m.method in (ex.plan.retry_methods if named else (b"GET", b"HEAD")), "not to be sent twice"
        assert original.m.done and original.led is not None and original.led.attempt + 2 == ex.inherited + 1
        self.life.hedges.append(self)
        self.life.accounts_of(ex.cluster).retry(now)
        super().drive(do)


class Dawdler(AsyncFilter):
    """Waits, answers and fails at random, on the way there and back."""

    timeout_s = 0.4

    def __init__(self, rnd: random.Random) -> None:
        super().__init__(None)
        self.rnd = rnd

    async def on_request(self, request: ApiRequest) -> Reply | None:
        return await self.dawdle()

    async def on_response(self, request: ApiRequest, response: ApiResponse) -> Reply | None:
        return await self.dawdle()

    async def dawdle(self) -> Reply | None:
        what = self.rnd.random()
        if what < 0.5:
            await trio.sleep(self.rnd.uniform(0.0, 0.5))
        elif what < 0.55:
            return Reply(418, "{tea")
        elif what < 0.6:
            raise ValueError("a bug")
        return None


class Reader(Filter):
    """Reads bodies, and sometimes fails."""

    def __init__(self, rnd: random.Random) -> None:
        super().__init__(None)
        self.rnd = rnd

    def on_request_data(self, request: ApiRequest, data: bytes, end: bool) -> bytes:
        if self.rnd.random() < 0.01:
            raise ValueError("a bug")
        return data

    on_response_data = on_request_data


class Life:
    """One run."""

    def __init__(self, seed: int) -> None:
        self.rnd = rnd = random.Random(seed)
        self.places = random.Random(seed + 1_000_000)  # of endpoints, and how they are chosen by them
        self.servings: list[Watched] = []
        self.hedges: list[WatchedRival] = []
        self.slow = random.Random(seed + 2_000_000)  # of routes that hedge
        self.hedge_after_s = [math.inf, 0.001, 0.02, 0.15]
        self.most = 0  # the highest limit on connections that was ever in force
        self.answers = self.ejections = 0
        self.resends_max = 1
        self.inbound_share = 0.35  # of callers from the mesh to the own application, which all the servers are, too
        self.multiplex_from = math.inf  # all peers are of HTTP/1.1
        self.step_s = 0.0  # of the clock on the wall
        self.budgets = {
            name: Budget(rnd.choice([0.0, 20.0, 100.0]), rnd.choice([0.0, 1.0])) for name in ("shop", "spare")
        }
        self.books: dict[int, tuple[Any, Accounts]] = {}
        self.own_budget = Budget(0.0, 0.0)  # nothing is retried on the way in
        self.cookies: list[bytes] = [b"nonsense"]
        self.once = Once()
        self.net: Net

    def accounts_of(self, cluster: Any) -> Accounts:
        """By service; one that has left and come back has new ones."""
        found = self.books.get(id(cluster))
        if found is None:
            found = self.books[id(cluster)] = cluster, Accounts(self.budgets.get(cluster.name, self.own_budget))
        return found[1]

    # -- policies

    def policy(self) -> Snapshot:
        rnd, places = self.rnd, self.places
        connections = rnd.choice([1, 2, 3, 1024])
        self.most = max(self.most, connections)
        timeouts = Timeouts(
            total_s=rnd.choice([0.3, 1.0, 4.0]),
            try_s=rnd.choice([0.2, 0.5, float("inf")]),
            idle_s=rnd.choice([0.3, 2.0]),
            body_s=rnd.choice([1.0, float("inf"), float("inf")]),
            connect_s=0.25,
        )
        retry = Retry(
            max_retries=rnd.randrange(4),
            failures=frozenset(rnd.sample(["connect-error", "reset", "timeout"], rnd.randrange(4))),
            statuses=frozenset(rnd.sample([500, 503, 429], rnd.randrange(3))),
            methods=rnd.choice([None, None, frozenset({"any"})]),
            base_s=rnd.choice([0.0, 0.02, 0.2]),
        )
        self.once.anything_goes |= retry.methods is not None
        sticky = rnd.choice([None, None, None, Sticky("stay", 60.0, "version"), Sticky("stay", 60.0, "endpoint")])
        fallback = rnd.choice([None, None, Fallback(service="spare"), Fallback(version="v1")])
        destinations = rnd.choice([(Destination(None),), (Destination("v1", 60), Destination("v2", 40))])
        routes = (
            Route("again", Match(path="/again"), destinations, timeouts, retry, fallback=fallback, sticky=sticky),
            Route("default", Match(), destinations, timeouts, replace(retry, max_retries=0), fallback=fallback),
        )
        routes = tuple(replace(each, hedge_after_s=self.slow.choice(self.hedge_after_s)) for each in routes)
        common = {"shop": routes, "spare": (Route("default", Match(), (Destination(None),), timeouts, retry),)}
        services = {}
        for name in ("shop", "spare"):
            hosts = rnd.sample(range(1, 6), rnd.choice([0, 1, 2, 3, 4, 4, 5]))
            own = [replace(each, retry=replace(each.retry, budget=self.budgets[name])) for each in common[name]]
            ill = rnd.choice([0.0, 0.0, 0.2, 0.6])
            zones, priorities = places.choice([[""], [ZONE, "there"]]), places.choice([[0], [0], [0, 0, 1, 2]])
            balance = rnd.choice(["round-robin", "least-request", "random", "peak-ewma"])
            services[name] = Service(
                name,
                self.ports(name),
                tuple(
                    EndpointSpec(
                        f"10.{len(name)}.0.{n}",
                        1,
                        {"version": str(n % 2 + 1)},
                        tls=rnd.choice([Tls.MESH] * 3 + [Tls.PLAIN]),
                        healthy=rnd.random() >= ill,
                        zone=places.choice(zones),
                        priority=places.choice(priorities),
                    )
                    for n in hosts
                ),
                {"v1": {"version": "1"}, "v2": {"version": "2"}},
                tuple(own),
                limits=Limits(connections, rnd.choice([0, 2, 1024]), rnd.choice([2, 6, 1024])),
                circuit_breaker=CircuitBreaker(
                    rnd.choice([1, 3, 7]), rnd.choice([0.1, 1.0]), 2.0, places.choice([None, None, 50.0, 90.0])
                ),
                balance=places.choice([balance, balance, balance, "ring-hash"]),
                balancing=Balancing(
                    by="cookie:stay",
                    slow_start_s=places.choice([0.0, 0.0, 1.0]),
                    panic_threshold=places.choice([50.0, 50.0, 0.0, 80.0]),
                ),
                outliers=rnd.choice([None, Outliers(0.5, 0.3, 0.5, 2.0, 50.0), Outliers(0.1, 0.3, 0.2, 0.4, 100.0)]),
            )
        own = Route("default", timeouts=timeouts, retry=retry)
        return Snapshot({"web": Service("web", routes=(own,)), **services})

    def ports(self, name: str) -> tuple[Port, ...]:
        return ()

    async def clocks(self) -> None:
        """The wall's clock is set, and the machine sleeps: timers of seconds are due at once."""
        for _ in range(self.rnd.randrange(3)):
            await trio.sleep(self.rnd.uniform(0.0, 2.0))
            self.step_s += self.rnd.choice([-1e6, -3600.0, -1.0, 1.0, 59.0, 3600.0, 1e9])
            if self.rnd.random() < 0.5:
                clock: Any = trio.lowlevel.current_clock()
                clock.jump(self.rnd.choice([0.1, 1.0, 10.0]))

    async def policies(self) -> None:
        for _ in range(self.rnd.randrange(4)):
            await trio.sleep(self.rnd.uniform(0.0, 2.0))
            self.net.apply(self.policy())

    def chain(self, net: Net) -> Chain:
        context = make_context(clock=trio.current_time)
        links = [Link(kind(self.rnd), kind.__name__, self.rnd.random() < 0.5, context) for kind in (Dawdler, Reader)]
        return Chain(links, net.world.meters.service("out", "shop"), net.world.note)

    # -- the far side

    def dial(self, endpoint: Any) -> Any:
        for cluster in self.net.world.state:
            assert cluster.connections <= self.most or cluster.side == "in"
        rnd = self.rnd
        what = rnd.random()
        if what < 0.12:
            return DialError("refused")
        if what < 0.2:
            return rnd.uniform(0.0, 0.5)  # perhaps longer than `connect` allows
        if what < 0.3:
            return {"window": rnd.randrange(200_000)}
        return None

    async def servers(self, nursery: trio.Nursery) -> None:
        while True:
            peer = await self.net.accepted()
            nursery.start_soon(self.server, peer)

    async def server(self, peer: Peer) -> None:
        rnd = self.rnd
        codec = Requests()
        seen = None
        while True:
            if rnd.random() < 0.02:
                await trio.sleep(rnd.uniform(0.0, 0.3))
                peer.close() if rnd.random() < 0.5 else peer.reset()
                return
            data = await peer.some()
            if peer.window < 1_000_000 and rnd.random() < 0.8:
                peer.accept(rnd.randrange(100_000))
            if not data:
                return
            codec.receive(data)  # what a sidecar sends is well-formed
            while codec.messages:
                m = codec.messages[0]
                if seen is None:
                    seen = self.once.see(m)
                if not m.done and rnd.random() < 0.85:
                    peer.accept(50_000)
                    break
                codec.messages.popleft()
                if m.done:
                    body = m.take()
                    assert body == ALPHABET[: len(body)], "a body was damaged"
                    if m.length is not None:
                        assert len(body) == m.length
                if not await self.respond(peer, m.method, m.done, seen):
                    return
                seen = None

    async def respond(self, peer: Peer, method: bytes, whole: bool, seen: bytes) -> bool:
        """False: the connection is over."""
        rnd = self.rnd
        what = rnd.random()
        if what < 0.05:
            peer.reset()
            return False
        if what < 0.1:
            peer.close()  # the response is lost
            return False
        if what < 0.14:
            await trio.sleep(100.0)  # stalls
            return False
        if what < 0.16:
            peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n")
            return False
        if what < 0.4:
            await trio.sleep(rnd.uniform(0.0, 0.6))
        if rnd.random() < 0.1:
            peer.send(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        status = rnd.choice([200] * 8 + [503, 503, 500, 429, 404])
        date = formatdate(self.epoch() + rnd.choice([-5.0, 1.0, 1e6]), usegmt=True).encode()
        special = [b"x-pillion-reason: draining\r\n", b"retry-after: 1\r\n", b"x-pillion-retried: exhausted\r\n"]
        special += [b"retry-after: %b\r\n" % date, b"x-pillion-reason: overflow\r\n"]
        extra = rnd.choice([b""] * 8 + special)
        if b"x-pillion-reason" in extra:
            self.once.unseen(seen)
        body = ALPHABET[: rnd.choice(SIZES)]
        head = b"HTTP/1.1 %d X\r\n%b" % (status, extra)
        if method == b"HEAD":
            peer.send(head + b"content-length: %d\r\n\r\n" % len(body))
            return whole
        form = rnd.random()
        if form < 0.6:
            pieces = [head + b"content-length: %d\r\n\r\n" % len(body), body]
        elif form < 0.9:
            half = len(body) // 2
            chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:half], body[half:]) if part)
            pieces = [head + b"transfer-encoding: chunked\r\n\r\n", chunks, b"0\r\n\r\n"]
        else:
            pieces = [head + b"\r\n", body]
        data = b"".join(pieces)
        while data:
            cut = rnd.randrange(1, len(data) + 1) if rnd.random() < 0.5 else len(data)
            peer.send(data[:cut])
            data = data[cut:]
            if data and rnd.random() < 0.3:
                await trio.sleep(rnd.uniform(0.0, 0.3))
            if data and rnd.random() < 0.05:
                peer.reset()
                return False
        if form >= 0.9:
            peer.close()
            return False
        if rnd.random() < 0.05:
            peer.send(b"?")  # nobody asked
        return whole

    # -- the near side

    async def caller(self) -> None:
        rnd = self.rnd
        window = rnd.choice([1e9, 1e9, 20_000])
        inbound = self.places.random() < self.inbound_share
        peer = self.net.mesh_caller("front", window=window) if inbound else self.net.caller(window=window)
        codec = Responses()
        for _ in range(rnd.randrange(1, 6)):
            await trio.sleep(rnd.uniform(0.0, 0.5))
            method = rnd.choice(METHODS)
            body = ALPHABET[: rnd.choice(SIZES)] if method in (b"PUT", b"POST") else b""
            path = rnd.choice([b"/", b"/again"])
            host = rnd.choice([b"shop", b"shop", b"spare"])
            head = b"%b %b HTTP/1.1\r\nhost: %b\r\ncontent-length: %d\r\n%b: %b\r\n%b%b\r\n" % (
                method,
                path,
                b"web" if inbound else host,
                len(body),
                *self.once.ask(method == b"POST"),
                b"cookie: stay=%b\r\n" % rnd.choice(self.cookies) if rnd.random() < 0.3 else b"",
                self.ties(inbound),
            )
            codec.expect(method)
            with trio.CancelScope() as scope:
                if rnd.random() < 0.1:
                    scope.deadline = trio.current_time() + rnd.uniform(0.0, 0.5)  # loses patience
                if not await self.exchange(peer, codec, head + body):
                    break
            if scope.cancelled_caught:
                break
        peer.reset() if rnd.random() < 0.3 else peer.close()

    def ties(self, inbound: bool) -> bytes:
        """What ties requests across the application: few traces, so that several are in flight with one."""
        places, fields = self.places, b""
        if places.random() < 0.8:
            fields += b"traceparent: 00-%032x-00f067aa0ba902b7-01\r\n" % places.randrange(1, 3)
        if inbound or places.random() < 0.2:  # the caller's sidecar always tells one, and the callee's has no other
            fields += b"x-request-deadline-ms: %d\r\n" % places.choice([0, 1, 200, 3000, 3000])
        if inbound and places.random() < 0.3:
            fields += b"x-pillion-attempt: %d\r\n" % places.randrange(3)
        return fields

    async def exchange(self, peer: Peer, codec: Responses, data: bytes) -> bool:
        rnd = self.rnd
        while data:
            cut = rnd.randrange(1, len(data) + 1) if rnd.random() < 0.3 and data[:1] != b"H" else len(data)
            peer.send(data[:cut])  # HEAD in pieces might get a 408 before anybody knows that it is HEAD
            data = data[cut:]
            if data and rnd.random() < 0.5:
                await trio.sleep(rnd.uniform(0.0, 0.2))
            if data and rnd.random() < 0.03:
                return False
        while True:
            got = await peer.some()
            if peer.window < 1e8:
                peer.accept(100_000)
            if got:
                codec.receive(got)
            elif codec.m is None or not codec.m.done:
                if codec.eof():
                    raise AssertionError("an end that stands for a whole response") from None
                return False  # cut: visibly so
            m = codec.m
            if m is not None and m.done:
                body = m.take()
                if m.reason is None:
                    assert body == ALPHABET[: len(body)] or body.startswith(b"{"), "a response was damaged"
                self.answers += 1
                self.keep([value for name, value in m.headers if name == b"set-cookie"])
                return m.keep_alive and peer.ended is None

    def keep(self, cookies: list[bytes]) -> None:
        self.cookies += [each.partition(b";")[0].partition(b"=")[2] for each in cookies]

    # -- the run

    def epoch(self) -> float:
        return max(0.0, 1_000_000.0 + trio.current_time() + self.step_s)  # the kernel takes no year before 1970

    async def run(self, seed: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            watched = type("Watched", (Watched,), {"life": self})
            patch.setattr(downstream, "Serving", watched)
            patch.setattr(http2_down_stream, "Serving", watched)
            patch.setattr(hedge_module, "Rival", type("WatchedRival", (WatchedRival,), {"life": self}))
            patch.setattr(outliers, "OUTLIER_REQUESTS_MIN", 1)  # a life is short
            patch.setattr(outliers, "OUTLIER_ENDPOINTS_MIN", 2)
            chains = {("out", "shop"): self.chain} if seed % 3 == 0 else {}
            async with memory_world(self.policy(), seed=seed, chains=chains, zone=ZONE) as net:
                self.net = net
                net.world.epoch = self.epoch
                net.world.pool.multiplex_from = self.multiplex_from
                net.on_dial = self.dial
                async with trio.open_nursery() as far:
                    far.start_soon(self.servers, far)
                    far.start_soon(net.world.watch.run, net.world)
                    with trio.fail_after(120.0):
                        async with trio.open_nursery() as near:
                            near.start_soon(self.policies)
                            near.start_soon(self.clocks)
                            for _ in range(self.rnd.randrange(1, 9)):
                                near.start_soon(self.caller)
                    await trio.sleep(20.0)  # half-closed callers, connections under way, stalls
                    self.check_quiet()
                    far.cancel_scope.cancel()

    def check_quiet(self) -> None:
        net = self.net
        assert net.leftovers() == []
        assert net.timers() == 0
        tasks = [task.name for task in net.world.nursery.child_tasks]
        assert len(tasks) == 1 and tasks[0].endswith("Reactor.run"), f"tasks are left: {tasks}"
        assert not net.world.downstreams
        assert all(chain.active == 0 for chain in net.world.plans.chains)
        assert all(serving.over and serving.endings == 1 for serving in self.servings)
        assert len(net.log) == len(self.servings)
        exchanges = [serving.led for serving in self.servings if serving.led is not None]
        assert all(ex.finished and ex.endpoint is None for ex in exchanges)
        clusters = {id(c): c for ex in exchanges for c in (ex.cluster, ex.plan.cluster)}.values()
        assert all(hedge.over and hedge.up is None and hedge.ex_.finished for hedge in self.hedges)
        assert len({hedge.of for hedge in self.hedges}) == len(self.hedges), "more than one hedge for a request"
        assert sum(ex.attempt for ex in exchanges) == sum(cluster.retries for cluster in clusters)  # each was paid for
        assert sum(ex.resends for ex in exchanges) == sum(cluster.resends for cluster in clusters)
        for cluster in clusters:  # also those that left
            assert cluster.active == 0 and not cluster.waiters
            ups = [channel.owner for channel in net.channels if isinstance(channel.owner, Upstream | Http2Upstream)]
            ours = [up for up in ups if up.cluster is cluster]
            assert cluster.connections == len(ours)
            lone = sum(isinstance(up, Upstream) for up in ours)
            assert lone <= sum(len(endpoint.idle) for endpoint in cluster.endpoints.values())
            assert not any(up.codec.streams for up in ours if isinstance(up, Http2Upstream)), "a stream has leaked"


def live(seed: int, kind: type[Life] = Life) -> Life:
    life = kind(seed)
    scheduler: Any = trio._core._run  # its order of tasks is random on purpose; here it must be the seed's
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scheduler, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
            patch.setattr(scheduler, "_r", random.Random(seed))
            trio.run(life.run, seed, clock=trio.testing.MockClock(autojump_threshold=0.0))
    except BaseException:
        print(f"\n{kind.__name__}: replay with SEED={seed}")
        raise
    return life
