"""The API for sidecars: their stream, their answers, their heartbeats, their registrations, their certificates.

A plain ASGI application behind the mesh listener, which has proven who the peer is. Must not know TLS or policy.
Invariants: a sidecar can touch only what is its own, by its certificate alone; every body is bounded and read against a
declared shape; the store being away costs a sidecar nothing that it has.
"""

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from sys import intern
from typing import Any, TypeVar

import trio

from control_plane.state.records import INSTANCES, SIDECARS, Instance
from control_plane.store.base import StoreError
from sidecar.model.canonical import SnapshotError, record_from_json

from .http import ApiError, Peer, of_store, peer_of, read_json, send_error, send_json
from .hub import PROTOCOL, USES_MAX, Stream
from .joins import renew
from .replica import Replica
from .shares import Shares

log = logging.getLogger(__name__)

BODY_BYTES_MAX = 64 * 1024
HELLO_BYTES_MAX = 4 * 1024 * 1024
KNOWN_S = 5.0
LABELS_MAX, LABEL_LENGTH_MAX, PORTS_MAX = 32, 128, 32
WEIGHT_MAX = 1000
PRIORITY_MAX = 100
REASON_LENGTH_MAX = 500
EDGE_REQUESTS_MAX = 1e9
BREAKERS_MAX = 200
BREAKER_STATES = ("open", "half-open", "ejected")
EVIDENCE_LENGTH_MAX = 300
LOGGED_MAX = 20  # rejections of one push
BODY_S = 30.0
NAME_LENGTH_MAX = 253

Scope = Any
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Hello:
    """What a sidecar says when it opens its stream. `held`: resource -> version."""

    protocol: tuple[int, ...]
    version: str = ""
    service: str = ""
    held: Mapping[str, str] = field(default_factory=dict)
    uses: tuple[str, ...] = ()
    all: bool = False
    policy: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    nonce: str
    rejected: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """`edges`: callee, requests, failures since the last one; `breakers`: service, endpoint, state; `evidence`:
    service, endpoint, what happened to it last; `demand`: of global rate limits, as a part of them."""

    edges: tuple[tuple[str, float, float], ...] = ()
    breakers: tuple[tuple[str, str, str], ...] = ()
    evidence: tuple[tuple[str, str, str], ...] = ()
    healthy: bool = True
    reason: str = ""
    demand: float | None = None


@dataclass(frozen=True, slots=True)
class Registration:
    host: str
    port: int
    labels: Mapping[str, str] = field(default_factory=dict)
    ports: Mapping[str, int] = field(default_factory=dict)
    weight: int = 1
    zone: str = ""
    healthy: bool = True
    reason: str = ""
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Nothing:
    """An empty object."""


@dataclass(frozen=True, slots=True)
class Uses:
    services: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Renewal:
    csr: str


@dataclass(frozen=True, slots=True)
class Caller:
    """The sidecar that asks."""

    id: str
    service: str
    peer: Peer


class MeshApi:
    """The ASGI application."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.shares = Shares()
        self.verbs: Mapping[str, Callable[[Caller, Receive], Awaitable[object]]] = {
            "/v1/ack": self._ack,
            "/v1/heartbeat": self._heartbeat,
            "/v1/register": self._register,
            "/v1/withdraw": self._withdraw,
            "/v1/uses": self._uses,
            "/v1/renew": self._renew,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        if scope["type"] != "http":
            return
        try:
            await self._answer(scope, receive, send)
        except ApiError as error:
            await send_error(send, error)
        except StoreError as error:
            await send_error(send, of_store(error))
        except ConnectionError:
            pass

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ApiError, StoreError; ConnectionError: the caller has gone."""
        caller = self._caller(scope)
        path = scope["path"]
        if scope["method"] != "POST":
            raise ApiError(405, "method_not_allowed", f"{path[:100]} takes POST only")
        if path == "/v1/stream":
            with self.shares.taken(caller.id, "streams"):
                await self._stream(caller, receive, send)
            return
        verb = self.verbs.get(path)
        if verb is None:
            raise ApiError(404, "not_found", f"there is no {path[:100]}")
        with self.shares.taken(caller.id, "requests"):
            answer = await verb(caller, receive)
        await send_json(send, 200, answer)

    def _caller(self, scope: Scope) -> Caller:
        peer = peer_of(scope)
        if peer is None:
            raise ApiError(401, "no_certificate", "the peer has shown no certificate")
        replica = self.replica
        sidecar = replica.by_fingerprint.get(peer.fingerprint)
        record = replica.state.get(SIDECARS, sidecar) if sidecar is not None else None
        if sidecar is None or record is None or peer.service != record.service:
            raise ApiError(
                401,
                "unknown_sidecar",
                "no sidecar has joined with this certificate",
                "join with a token: pillion token create --service NAME",
            )
        if replica.is_banned(sidecar, record.service, peer.fingerprint):
            raise ApiError(403, "banned", f"this sidecar of {record.service} is banned", "an operator can lift it")
        return Caller(sidecar, record.service, peer)

    # -- the stream

    async def _stream(self, caller: Caller, receive: Receive, send: Send) -> None:
        with self.shares.taken(caller.id, "large bodies"):
            hello = await _read(receive, Hello, HELLO_BYTES_MAX)
        if not hello.protocol or hello.protocol[0] != PROTOCOL[0]:
            told = ".".join(map(str, hello.protocol)) or "none"
            raise ApiError(
                400,
                "protocol",
                f"this control plane speaks protocol {PROTOCOL[0]}.{PROTOCOL[1]}, the sidecar {told}",
                "run versions of pillion that are at most one minor version apart",
            )
        if hello.service != caller.service:
            raise ApiError(
                403, "not_yours", f'the certificate is of service "{caller.service}", not of "{hello.service[:100]}"'
            )
        if len(hello.uses) > USES_MAX:
            raise ApiError(400, "too_many", f"a sidecar uses at most {USES_MAX} services")
        if any(len(name) > NAME_LENGTH_MAX for name in hello.uses):
            raise ApiError(400, "invalid", f"the name of a service has at most {NAME_LENGTH_MAX} characters")
        replica, now = self.replica, trio.current_time()
        stream = Stream(
            caller.id,
            caller.service,
            hello.version[:60],
            hello.all,
            set(hello.uses),
            {intern(name): intern(resource) for name, resource in hello.held.items()},  # of all streams the same
            since=replica.now(),
            heard=now,
            fingerprint=caller.peer.fingerprint,
            minor=hello.protocol[1] if len(hello.protocol) > 1 else 0,
        )
        try:
            replica.hub.open(stream)
        except OverflowError as error:
            raise ApiError(503, "full", str(error), "start a further replica") from None
        replica.leases.ask(caller.id)  # a store that is away does not hold up what is known
        try:
            await send(
                {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/x-ndjson")]}
            )
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_until_gone, receive, nursery.cancel_scope)
                while lines := await replica.hub.next_lines(stream, replica.replicas):
                    for line in lines:
                        await send({"type": "http.response.body", "body": line, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                nursery.cancel_scope.cancel()
        finally:
            replica.hub.close(stream)

    def _own_stream(self, caller: Caller) -> Stream:
        stream = self.replica.hub.streams.get(caller.id)
        if stream is None:
            raise ApiError(409, "no_stream", "this sidecar has no stream here", "open one: POST /v1/stream")
        return stream

    # -- verbs

    async def _ack(self, caller: Caller, receive: Receive) -> object:
        with self.shares.taken(caller.id, "large bodies"):
            answer = await _read(receive, Answer, HELLO_BYTES_MAX)
        stream = self._own_stream(caller)
        stream.heard = trio.current_time()
        if not self.replica.hub.answer(stream, answer.nonce, answer.rejected):
            raise ApiError(409, "no_such_push", "this answers no push that is under way")
        for name in sorted(answer.rejected)[:LOGGED_MAX]:
            log.warning(
                "sidecar %s of %s rejects %.200s: %.500s", caller.id, caller.service, name, answer.rejected[name]
            )
        if len(answer.rejected) > LOGGED_MAX:
            log.warning("sidecar %s rejects %d more", caller.id, len(answer.rejected) - LOGGED_MAX)
        return {}

    async def _heartbeat(self, caller: Caller, receive: Receive) -> object:
        beat = await _read(receive, Heartbeat, BODY_BYTES_MAX)
        replica, now = self.replica, trio.current_time()
        replica.heartbeat(caller.id)
        stream = replica.hub.streams.get(caller.id)
        if stream is not None:
            stream.heard = now
            elapsed_s = max(1.0, now - stream.edges_at) if stream.edges_at else 5.0
            stream.edges_at = now
            self._observe(stream, beat, elapsed_s)
            self.replica.limit_shares.heard(stream, beat.demand)
        name = f"{caller.service}/{caller.id}"
        instance: Instance | None = replica.state.get(INSTANCES, name)
        if instance is None:
            raise ApiError(410, "not_registered", "this sidecar is not registered", "register: POST /v1/register")
        reason = "" if beat.healthy else beat.reason[:REASON_LENGTH_MAX]
        if (instance.healthy, instance.reason) != (beat.healthy, reason) and self.shares.change(caller.id):
            await replica.health(caller.id, caller.service, beat.healthy, reason)
        return {}

    def _observe(self, stream: Stream, beat: Heartbeat, elapsed_s: float) -> None:
        """Take what a sidecar says of its traffic, as far as it can be true: others will be shown it."""
        known = self.replica.catalogue.snapshot.services
        counts = {
            known[name].name: (sent, failed)  # that text all streams have
            for name, sent, failed in beat.edges
            if name in known and 0.0 <= failed <= sent <= EDGE_REQUESTS_MAX
        }
        stream.observe(elapsed_s, counts)
        stream.breakers = tuple(
            (name, address, state)
            for name, address, state in beat.breakers[:BREAKERS_MAX]
            if name in known and state in BREAKER_STATES and _is_text(address, NAME_LENGTH_MAX + 10)
        )
        stream.evidence = tuple(
            (name, address, text)
            for name, address, text in beat.evidence[:BREAKERS_MAX]
            if name in known and _is_text(address, NAME_LENGTH_MAX + 10) and _is_text(text, EVIDENCE_LENGTH_MAX)
        )

    async def _register(self, caller: Caller, receive: Receive) -> object:
        told = await _read(receive, Registration, BODY_BYTES_MAX)
        _check_registration(told)
        instance = Instance(
            told.host,
            told.port,
            dict(told.labels),
            dict(told.ports),
            told.weight,
            told.zone,
            told.healthy,
            "" if told.healthy else told.reason[:REASON_LENGTH_MAX],
            priority=told.priority,
        )
        if not self.shares.change(caller.id):
            raise ApiError(429, "too_often", "this sidecar changes its registration all the time")
        await self.replica.register(caller.id, caller.service, instance)
        self.replica.heartbeat(caller.id)
        return {}

    async def _withdraw(self, caller: Caller, receive: Receive) -> object:
        await _read(receive, Nothing, BODY_BYTES_MAX)
        replica = self.replica
        began = trio.current_time()
        await replica.withdraw(caller.id, caller.service)
        # What is known here is told with the next flush; what other replicas' sidecars know, nobody tells us.
        with trio.move_on_after(1.0):
            await replica.told(caller.service)
        known = await replica.hub.until_known(
            caller.service, max(0.0, KNOWN_S - (trio.current_time() - began)), but=caller.id
        )
        if known and not replica.alone():
            await trio.sleep_until(began + KNOWN_S)
            known = False
        return {"acknowledged": known}

    async def _uses(self, caller: Caller, receive: Receive) -> object:
        told = await _read(receive, Uses, BODY_BYTES_MAX)
        stream = self._own_stream(caller)
        unknown = [name for name in told.services if name not in self.replica.catalogue.snapshot.services]
        if unknown:
            raise ApiError(404, "unknown_service", f"there is no service {', '.join(sorted(unknown))[:500]}")
        if len(stream.uses.union(told.services)) > USES_MAX:
            raise ApiError(400, "too_many", f"a sidecar uses at most {USES_MAX} services")
        if not stream.uses.issuperset(told.services):
            stream.uses.update(told.services)
            stream.dirty = True
            stream.rouse()
        return {}

    async def _renew(self, caller: Caller, receive: Receive) -> object:
        told = await _read(receive, Renewal, BODY_BYTES_MAX)
        return await renew(self.replica, caller.id, caller.peer, told.csr)


async def _read(receive: Receive, kind: type[T], bytes_max: int) -> T:
    data: object = None
    with trio.move_on_after(BODY_S) as reading:
        data = await read_json(receive, bytes_max)
    if reading.cancelled_caught:
        raise ApiError(408, "too_slow", f"the body did not arrive within {BODY_S:g} s")
    try:
        return record_from_json(kind, data)
    except (SnapshotError, RecursionError) as error:
        raise ApiError(400, "invalid", str(error) or "nested too deeply") from None


def _check_registration(told: Registration) -> None:
    problem = ""
    if not _is_host(told.host):
        problem = f"{told.host[:60]!r} is neither an address nor a host name"
    elif not 0 < told.port < 65536 or not all(0 < port < 65536 for port in told.ports.values()):
        problem = "a port is a number from 1 to 65535"
    elif not 0 < told.weight <= WEIGHT_MAX:
        problem = f"a weight is a number from 1 to {WEIGHT_MAX}"
    elif not 0 <= told.priority <= PRIORITY_MAX:
        problem = f"a priority is a number from 0 to {PRIORITY_MAX}"
    elif len(told.labels) > LABELS_MAX or len(told.ports) > PORTS_MAX:
        problem = f"at most {LABELS_MAX} labels and {PORTS_MAX} ports"
    elif not all(_is_text(text, LABEL_LENGTH_MAX) for pair in told.labels.items() for text in pair):
        problem = f"a label's name and value have at most {LABEL_LENGTH_MAX} characters, all of them printable"
    elif not all(_is_text(text, 63) for text in (told.zone, *told.ports)):
        problem = "a zone and the name of a port have at most 63 characters, all of them printable"
    if problem:
        raise ApiError(400, "invalid", f"registration: {problem}")


def _is_host(text: str) -> bool:
    try:
        address = ip_address(text)
    except ValueError:
        return (
            0 < len(text) <= NAME_LENGTH_MAX
            and text.isascii()
            and all(part and part.replace("-", "").replace("_", "").isalnum() for part in text.split("."))
        )
    # The zone of a link-local address (after "%") means nothing to others, and could be any text.
    return not address.is_unspecified and not address.is_multicast and "%" not in text


def _is_text(text: str, length_max: int) -> bool:
    return len(text) <= length_max and text.isprintable()


async def _until_gone(receive: Receive, scope: trio.CancelScope) -> None:
    """The sidecar has hung up, or our own listener has."""
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        if message["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        else:
            await send({"type": "lifespan.shutdown.complete"})
            return
