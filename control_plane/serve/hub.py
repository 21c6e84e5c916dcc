"""The streams to the sidecars that are connected here: what each holds, what it is sent next, what it answered.

One push is under way on a stream at a time, and the next is made of what is true when the last is answered: so a slow
reader is sent the sum of what it missed, and costs nothing meanwhile. Must not know HTTP or the store. Invariants: a
stream is sent a resource only in the order in which it can be used; nothing is kept for a stream but names and
versions; a sidecar has one stream.
"""

import json
import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import trio

from control_plane.state.cookies import SINCE_MINOR as COOKIES_SINCE
from control_plane.state.resources import COOKIES, ENDPOINTS, SHARE, Resource, Resources

PROTOCOL = (1, 2)
HEARTBEAT_S = 5.0
DEAD_S = 15.0
ANSWER_S = 60.0  # a sidecar may be opening filters
LINE_BYTES_MAX = 512 * 1024  # beyond it a push goes on in a further line
USES_MAX = 1000
STREAMS_MAX = 20_000
REJECTED_MAX = 100
REASON_MAX = 2000
RATES_S = 30.0


Told = tuple[float, Mapping[str, tuple[float, float]]]
"""Requests and failures by callee, in so many seconds."""


@dataclass(slots=True)
class Push:
    """One that waits for its answer."""

    nonce: str
    revision: int
    policy: int
    names: frozenset[str]
    sent_at: float


@dataclass(slots=True, eq=False)
class Stream:
    """One connected sidecar."""

    id: str
    service: str
    version: str
    everything: bool
    uses: set[str]
    held: dict[str, str]  # resource -> version, as sent or told in its hello
    since: float  # epoch
    heard: float  # of trio's clock: its last heartbeat or answer
    policy: int = 0  # the newest policy it has answered for
    rejected: dict[str, str] = field(default_factory=dict)
    waiting: Push | None = None
    dirty: bool = True
    goodbye: str = ""  # why it ends
    greeted: bool = False
    ended: bool = False
    beat: float = 0.0  # when the next heartbeat is due
    edges: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # callee -> requests, failures a second
    recent: deque[Told] = field(default_factory=deque)  # what `edges` is made of, the newest last
    edges_at: float = 0.0
    breakers: tuple[tuple[str, str, str], ...] = ()
    evidence: tuple[tuple[str, str, str], ...] = ()
    wake: trio.Event = field(default_factory=trio.Event)
    fingerprint: str = ""  # of the certificate that opened it
    demand: float | None = None  # of global rate limits; None: it has told none
    minor: int = 0  # version of the protocol that it speaks

    def rouse(self) -> None:
        self.wake.set()

    def observe(self, elapsed_s: float, counts: Mapping[str, tuple[float, float]]) -> None:
        """Take what was counted since the last time; rates are those of the last half minute."""
        self.recent.append((elapsed_s, counts))
        total_s = sum(seconds for seconds, _ in self.recent)
        while len(self.recent) > 1 and total_s - self.recent[0][0] >= RATES_S:
            total_s -= self.recent.popleft()[0]
        edges: dict[str, tuple[float, float]] = {}
        for _, told in self.recent:
            for callee, (requests, failures) in told.items():
                before = edges.get(callee, (0.0, 0.0))
                edges[callee] = (before[0] + requests / total_s, before[1] + failures / total_s)
        self.edges = edges

    def end(self, reason: str) -> None:
        self.goodbye = self.goodbye or reason
        self.rouse()


class Hub:
    """All streams of one replica."""

    def __init__(self, name: str, resources: Resources) -> None:
        self.name, self.resources = name, resources
        self.streams: dict[str, Stream] = {}
        self.revision = 0  # of the store, as the resources have it
        self.policy = 0  # the newest revision at which the policy changed
        self.reported: set[str] = set()  # sidecars whose record in the store is out of date
        self.shares: dict[str, Resource] = {}  # of global rate limits, by sidecar
        self.cookies: Callable[[str], Resource | None] = lambda service: None  # keys of sticky cookies
        self.withheld = False  # the policy is not known: no push is made
        self._answered = trio.Event()
        self._pushes = 0

    # -- streams

    def open(self, stream: Stream) -> None:
        """Raises OverflowError."""
        old = self.streams.get(stream.id)
        if old is not None:
            old.end("the sidecar has opened another stream")
        elif len(self.streams) >= STREAMS_MAX:
            raise OverflowError(f"this replica serves at most {STREAMS_MAX} sidecars")
        self.streams[stream.id] = stream

    def close(self, stream: Stream) -> None:
        if self.streams.get(stream.id) is stream:
            del self.streams[stream.id]
        self._note_answer()

    def report(self, sidecars: Iterable[str]) -> None:
        """What the store says of these is out of date."""
        self.reported.update(sidecars)

    def end_all(self, reason: str) -> None:
        for stream in self.streams.values():
            stream.end(reason)

    async def next_lines(self, stream: Stream, replicas: Callable[[], Collection[str]]) -> Iterable[bytes]:
        """Wait for what goes down a stream next; an empty list: it has ended. The lines of a push are made as they are
        read: a mesh may be large, and many may read slowly."""
        if not stream.greeted:
            stream.greeted = True
            stream.heard = trio.current_time()
            stream.beat = stream.heard + HEARTBEAT_S
            return [self._hello(stream, replicas())]
        while not stream.goodbye:
            now = trio.current_time()
            if now - stream.heard > DEAD_S or (stream.waiting and now - stream.waiting.sent_at > ANSWER_S):
                return []
            lines: Iterable[bytes] | None = None
            if stream.dirty and stream.waiting is None and not self.withheld:
                lines = self._next(stream, now)
            elif now >= stream.beat:
                lines = [b'{"type":"heartbeat"}\n']
            if lines is not None:
                stream.beat = now + HEARTBEAT_S
                return lines
            stream.wake = trio.Event()
            with trio.move_on_at(stream.beat):
                await stream.wake.wait()
        if stream.ended:
            return []
        stream.ended = True
        return [_line({"type": "goodbye", "reason": stream.goodbye})]

    def _hello(self, stream: Stream, replicas: Collection[str]) -> bytes:
        return _line(
            {
                "type": "hello",
                "protocol": PROTOCOL,
                "replica": self.name,
                "sidecar": stream.id,
                "heartbeat_s": HEARTBEAT_S,
                "dead_s": DEAD_S,
                "replicas": sorted(replicas),
            }
        )

    # -- pushing

    def tell(self, changed: Collection[str], revision: int, policy: int) -> None:
        """The resources under these keys are not what they were."""
        self.revision, self.policy = revision, policy
        services = {key.partition("/")[2] for key in changed if "/" in key}
        common = any("/" not in key for key in changed)
        for stream in self.streams.values():
            if common or (services and (stream.everything or self._holds(stream, services))):
                stream.dirty = True
                stream.rouse()
            elif not stream.dirty and stream.waiting is None:
                stream.policy = policy  # what is new says nothing that it is told
        self._note_answer()

    @staticmethod
    def _holds(stream: Stream, services: set[str]) -> bool:
        if len(services) <= 8:
            return any(ENDPOINTS + name in stream.held or name in stream.uses for name in services)
        return any(name.partition("/")[2] in services for name in stream.held) or not services.isdisjoint(stream.uses)

    def _next(self, stream: Stream, now: float) -> Iterator[bytes] | None:
        """The lines of the next push; None where the sidecar holds everything that it should."""
        stream.dirty = False
        wanted = {each.name: each for each in self.resources.of(stream.service, stream.uses, stream.everything)}
        share = self.shares.get(stream.id)
        if share is not None and (stream.demand is not None or SHARE in stream.held):
            wanted[SHARE] = share  # only who tells a demand knows what a share is
        if stream.minor >= COOKIES_SINCE and (keys := self.cookies(stream.service)) is not None:
            wanted[COOKIES] = keys
        fresh = [each for each in wanted.values() if stream.held.get(each.name) != each.version]
        removed = sorted(name for name in stream.held if name not in wanted)
        if not fresh and not removed:
            self._settled(stream, self.policy)
            return None
        self._pushes += 1
        nonce = f"{self.name}-{self._pushes}"  # an answer meant for a stream before this one must not fit
        for each in fresh:
            stream.held[each.name] = each.version
        for name in removed:
            del stream.held[name]
            if stream.rejected.pop(name, None) is not None:
                self.reported.add(stream.id)
        stream.waiting = Push(nonce, self.revision, self.policy, frozenset(each.name for each in fresh), now)
        return push_lines(nonce, self.revision, self.policy, fresh, removed)

    def put_shares(self, shares: Mapping[str, Resource]) -> None:
        """The shares of rate limits, by sidecar, are these from now on."""
        before, self.shares = self.shares, dict(shares)
        for id, stream in self.streams.items():
            if before.get(id) is not self.shares.get(id):
                stream.dirty = True
                stream.rouse()

    def tell_cookies(self) -> None:
        """The keys of sticky cookies are not what they were."""
        for stream in self.streams.values():
            if stream.minor >= COOKIES_SINCE:
                stream.dirty = True
                stream.rouse()

    def answer(self, stream: Stream, nonce: str, rejected: Mapping[str, str]) -> bool:
        """Take an ACK or NACK; False: it answers nothing that is under way."""
        waiting = stream.waiting
        if waiting is None or waiting.nonce != nonce:
            return False
        stream.waiting = None
        before = dict(stream.rejected)
        for name in waiting.names:
            stream.rejected.pop(name, None)
        for name in sorted(waiting.names & rejected.keys())[:REJECTED_MAX]:
            stream.rejected[name] = rejected[name][:REASON_MAX]
        if stream.rejected != before:
            self.reported.add(stream.id)
        self._settled(stream, waiting.policy)
        if stream.dirty:
            stream.rouse()
        return True

    def _settled(self, stream: Stream, policy: int) -> None:
        stream.policy = max(stream.policy, policy)
        self._note_answer()

    def _note_answer(self) -> None:
        self._answered.set()
        self._answered = trio.Event()

    def behind(self) -> list[str]:
        """The sidecars that have not answered for the policy as it is now."""
        return [stream.id for stream in self.streams.values() if stream.policy < self.policy]

    async def answered(self) -> None:
        """Wait for the next answer of any sidecar."""
        await self._answered.wait()

    async def until_known(self, service: str, within_s: float, but: str = "") -> bool:
        """Wait until every sidecar (`but` one) that holds these endpoints has answered for them as they are now."""
        name = ENDPOINTS + service
        left = [each for each in self.streams.values() if each.id != but]
        with trio.move_on_after(within_s):
            while left := [each for each in left if self._behind(each, name) and self.streams.get(each.id) is each]:
                await self._answered.wait()
            return True
        return False

    def _behind(self, stream: Stream, name: str) -> bool:
        if name not in stream.held:
            return False
        current = self.resources.held.get(name)
        if current is None or stream.held[name] != current.version:
            return True
        return stream.waiting is not None and name in stream.waiting.names


def push_lines(
    nonce: str, revision: int, policy: int, resources: Collection[Resource], removed: Collection[str]
) -> Iterator[bytes]:
    """One push, in lines of bounded length."""
    head = b'{"type":"push","nonce":%b,"revision":%d,"policy":%d,"resources":[' % (
        json.dumps(nonce).encode(),
        revision,
        policy,
    )
    part: list[bytes] = []
    size = 0
    for each in resources:
        if part and size + len(each.line) > LINE_BYTES_MAX:
            yield head + b",".join(part) + b'],"removed":[],"more":true}\n'
            part, size = [], 0
        part.append(each.line)
        size += len(each.line)
    yield head + b",".join(part) + b'],"removed":%b,"more":false}\n' % json.dumps(list(removed)).encode()


def _line(data: Mapping[str, object]) -> bytes:
    return json.dumps(data, separators=(",", ":")).encode() + b"\n"


def rates(streams: Collection[Stream]) -> dict[tuple[str, str], tuple[float, float]]:
    """Requests and failures a second by caller and callee, over all sidecars."""
    found: dict[tuple[str, str], tuple[float, float]] = {}
    for stream in streams:
        for callee, (requests, failures) in stream.edges.items():
            total = found.get((stream.service, callee), (0.0, 0.0))
            found[stream.service, callee] = (total[0] + requests, total[1] + failures)
    return {edge: value for edge, value in found.items() if not math.isclose(value[0], 0.0, abs_tol=1e-9)}
