"""The mesh API on virtual time, spoken to as an ASGI server would; mostly by sidecars that mean no good."""

import json
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import pytest
import trio
from support.memory_store import MemoryStore
from trio.testing import MockClock

from certs.authority import bundle_of, create_root
from certs.files import CaFiles
from control_plane.serve.admission import admit
from control_plane.serve.hub import ANSWER_S
from control_plane.serve.mesh_api import BODY_S, BREAKERS_MAX, LOGGED_MAX, MeshApi
from control_plane.serve.replica import Replica, ReplicaSettings
from control_plane.serve.shares import AT_ONCE_MAX, CHANGES
from control_plane.state.records import OBSERVED, SIDECARS, Sidecar, encode
from control_plane.store.base import Compare, Operation, Put

EPOCH = 1_767_225_600.0
NOW = datetime.fromtimestamp(EPOCH, UTC)
PLACE = {"host": "10.0.0.1", "port": 15006}


def _authority() -> CaFiles:
    root = create_root("mesh.local", NOW)
    return CaFiles("mesh.local", root.certificate, root.issue_authority(NOW), bundle_of(root))


AUTHORITY = _authority()


class SlowStore(MemoryStore):
    delay_s = 0.0

    async def commit(self, operations: Sequence[Operation], compares: Sequence[Compare] = ()) -> int:
        await trio.sleep(self.delay_s)
        return await super().commit(operations, compares)

    async def grant(self, ttl_s: float) -> int:
        await trio.sleep(self.delay_s)
        return await super().grant(ttl_s)


class Call:
    """One request under way."""

    def __init__(self, kit: "Kit", path: str, sidecar: str, service: str, method: str = "POST") -> None:
        own, uri = (f"spiffe://mesh.local/service/{name}" for name in ("pillion-control-plane", service))
        told = f"By={own};Hash={fingerprint(sidecar)};URI={uri}"
        headers = [(b"x-forwarded-client-cert", told.encode())]
        self.scope = {"type": "http", "method": method, "path": path, "headers": headers, "query_string": b""}
        self.kit = kit
        self.to_app, self.receive_channel = trio.open_memory_channel[dict[str, Any]](100)
        self.status = 0
        self.body = b""
        self.stuck: trio.Event | None = None  # where set: what comes down is not taken before
        self.ended = trio.Event()

    async def run(self) -> "Call":
        try:
            await self.kit.api(self.scope, self.receive_channel.receive, self.send)
        finally:
            self.ended.set()
        return self

    async def send(self, message: dict[str, Any]) -> None:
        await trio.lowlevel.checkpoint()
        if message["type"] == "http.response.start":
            self.status = message["status"]
            return
        if self.stuck is not None:
            await self.stuck.wait()
        self.body += message["body"]

    def tell(self, body: object, more: bool = False) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.to_app.send_nowait({"type": "http.request", "body": data, "more_body": more})

    def hang_up(self) -> None:
        self.to_app.send_nowait({"type": "http.disconnect"})

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.body.splitlines()]

    @property
    def error(self) -> str:
        code: str = json.loads(self.body)["error"]["code"]
        return code


class Kit:
    def __init__(self, replica: Replica, nursery: trio.Nursery, store: SlowStore) -> None:
        self.replica, self.nursery, self.store = replica, nursery, store
        self.api = MeshApi(replica)

    async def join(self, sidecar: str, service: str) -> None:
        record = Sidecar(service, (fingerprint(sidecar),), EPOCH + 1e6, EPOCH, EPOCH)
        await self.replica.commit([Put(SIDECARS + sidecar, encode(record))])

    async def post(self, path: str, body: object, sidecar: str = "a", service: str = "web") -> Call:
        call = Call(self, path, sidecar, service)
        call.tell(body)
        return await call.run()

    async def stream(self, sidecar: str = "a", service: str = "web", **hello: Any) -> Call:
        call = Call(self, "/v1/stream", sidecar, service)
        call.tell({"protocol": [1, 0], "service": service, **hello})
        self.nursery.start_soon(call.run)
        await trio.sleep(0.01)
        return call

    async def answered(self, stream: Call, sidecar: str = "a", service: str = "web", **rejected: str) -> Call:
        """Answer the last push that came by a stream."""
        await trio.sleep(0.01)
        nonce = [line["nonce"] for line in stream.lines if line["type"] == "push"][-1]
        return await self.post("/v1/ack", {"nonce": nonce, "rejected": rejected}, sidecar, service)


def fingerprint(sidecar: str) -> str:
    return sidecar.encode().hex().rjust(64, "0")


@pytest.fixture
async def kit(autojump_clock: MockClock) -> AsyncIterator[Kit]:
    async with running() as kit:
        yield kit


@asynccontextmanager
async def running() -> AsyncIterator[Kit]:
    store = SlowStore()
    await admit(store, AUTHORITY, "r1", EPOCH, "m1")
    settings = ReplicaSettings("r1", "127.0.0.1:1", "127.0.0.1:2")
    replica = Replica(store, AUTHORITY, settings, epoch=lambda: EPOCH + trio.current_time())
    await replica.start()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(replica.run)
        kit = Kit(replica, nursery, store)
        for sidecar, service in (("a", "web"), ("b", "reviews")):
            await kit.join(sidecar, service)
        await trio.sleep(20.0)
        yield kit
        nursery.cancel_scope.cancel()


# The stream


async def test_a_hello_then_a_push_then_an_answer(kit: Kit, autojump_clock: MockClock) -> None:
    stream = await kit.stream()
    assert [line["type"] for line in stream.lines] == ["hello", "push"]
    assert (await kit.answered(stream)).status == 200
    assert kit.replica.hub.streams["a"].waiting is None
    stream.hang_up()
    await stream.ended.wait()
    assert not kit.replica.hub.streams


async def test_keys_of_cookies_are_those_of_the_certificates_service(kit: Kit, autojump_clock: MockClock) -> None:
    def keys(stream: Call) -> list[Any]:
        pushed = [each for line in stream.lines if line["type"] == "push" for each in line["resources"]]
        return [each["data"]["keys"] for each in pushed if each["name"] == "cookies"]

    await kit.join("c", "web")
    first, second = await kit.stream(protocol=[1, 2]), await kit.stream("c", protocol=[1, 2])
    other = await kit.stream("b", "reviews", protocol=[1, 2])
    assert keys(first) == keys(second) != keys(other) and len(keys(first)) == len(keys(other)) == 1
    assert not keys(await kit.stream(protocol=[1, 1])), "it would refuse what it does not know"
    impostor = Call(kit, "/v1/stream", "b", "reviews")
    impostor.tell({"protocol": [1, 2], "service": "web"})
    assert (await impostor.run()).status == 403 and not keys(other)[1:]

    (before,) = keys(first)
    await kit.answered(second, "c")
    await kit.replica.cookies.rotate(60.0)
    await trio.sleep(0.1)
    assert len(keys(second)) == 2 and keys(second)[1][1]["key"] == before[0]["key"] != keys(second)[1][0]["key"]


async def test_what_streams_hold_in_common_is_held_once(kit: Kit, autojump_clock: MockClock) -> None:
    resources = kit.replica.resources.held
    await kit.stream(held={name: resources[name].version for name in ("names", "bans")})
    await kit.stream("b", "reviews")
    for sidecar in "ab":
        held = kit.replica.hub.streams[sidecar].held
        names = {each.name: each for each in resources.values()}
        assert all(name is names[name].name and held[name] is names[name].version for name in held if "/" not in name)
    await kit.post("/v1/heartbeat", {"edges": [["reviews", 5, 0]]})
    (name,) = kit.replica.hub.streams["a"].edges
    assert name is kit.replica.catalogue.snapshot.services["reviews"].name


async def test_a_store_that_is_away_or_slow_does_not_hold_a_stream_up(kit: Kit, autojump_clock: MockClock) -> None:
    kit.store.delay_s = 30.0
    stream = await kit.stream()
    assert [line["type"] for line in stream.lines] == ["hello", "push"]
    kit.store.away = True
    other = await kit.stream("b", "reviews")
    assert [line["type"] for line in other.lines] == ["hello", "push"]
    await trio.sleep(1.0)
    assert set(kit.replica.hub.streams) == {"a", "b"}


async def test_an_answer_to_an_earlier_stream_is_none_to_this_one(kit: Kit, autojump_clock: MockClock) -> None:
    first = await kit.stream()
    second = await kit.stream()
    assert first.lines[-1]["type"] == "goodbye"
    assert (await kit.answered(first)).error == "no_such_push"
    assert kit.replica.hub.streams["a"].waiting is not None
    assert (await kit.answered(second)).status == 200


async def test_streams_that_are_not_read_are_few(kit: Kit, autojump_clock: MockClock) -> None:
    never = trio.Event()
    calls = []
    for _ in range(2 * AT_ONCE_MAX["streams"]):
        call = Call(kit, "/v1/stream", "a", "web")
        call.stuck = never
        call.tell({"protocol": [1, 0], "service": "web"})
        kit.nursery.start_soon(call.run)
        calls.append(call)
        await trio.sleep(0.01)
    assert [call.status for call in calls] == [200] * AT_ONCE_MAX["streams"] + [429] * AT_ONCE_MAX["streams"]
    assert (await kit.stream("b", "reviews")).lines[0]["type"] == "hello"
    never.set()
    await trio.sleep(1.0)
    assert (await kit.stream()).lines[0]["type"] == "hello"


async def test_large_bodies_that_do_not_come_to_an_end_are_few_and_end(kit: Kit, autojump_clock: MockClock) -> None:
    calls = [Call(kit, "/v1/ack", "a", "web") for _ in range(2 * AT_ONCE_MAX["large bodies"])]
    for call in calls:
        call.tell(b" " * 1000, more=True)
        kit.nursery.start_soon(call.run)
    await trio.sleep(1.0)
    assert sorted(call.status for call in calls) == [0] * 3 + [429] * 3
    assert (await kit.stream("b", "reviews")).lines[0]["type"] == "hello"
    await trio.sleep(BODY_S)
    assert sorted(call.status for call in calls) == [408] * 3 + [429] * 3


async def test_uses_have_names_of_bounded_length(kit: Kit, autojump_clock: MockClock) -> None:
    stream = await kit.stream(uses=["x" * 300])
    assert (stream.status, stream.error) == (400, "invalid")


async def test_no_more_rejections_are_logged_than_are_of_use(
    kit: Kit, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    stream = await kit.stream()
    with caplog.at_level(logging.WARNING):
        await kit.answered(stream, **{f"service/{number}": "no\nsuch" for number in range(5000)})
    assert sum("rejects" in record.message for record in caplog.records) == LOGGED_MAX + 1


async def test_who_never_answers_is_dropped(kit: Kit, autojump_clock: MockClock) -> None:
    stream = await kit.stream()
    with trio.move_on_after(ANSWER_S + 10.0):
        while not stream.ended.is_set():
            await kit.post("/v1/heartbeat", {})
            await trio.sleep(2.0)
    assert stream.ended.is_set()


@pytest.mark.parametrize("kind", ["websocket", "strange"])
async def test_what_is_not_http_is_not_answered(kit: Kit, autojump_clock: MockClock, kind: str) -> None:
    call = Call(kit, "/v1/stream", "a", "web")
    call.scope["type"] = kind
    await call.run()
    assert (call.status, call.body) == (0, b"")


# What a sidecar says of itself


async def test_traffic_is_believed_as_far_as_it_can_be_true(kit: Kit, autojump_clock: MockClock) -> None:
    await kit.stream()
    told = [
        ["reviews", 50, 5], ["nowhere", 1, 1], ["\x1b[31m", 1, 1], ["web", -5, 0], ["web", 5, 6], ["web", 5, -1],
    ]  # fmt: skip
    breakers = [
        ["reviews", "10.0.0.1:1", "open"], ["reviews", "10.0.0.1:1\n", "open"], ["reviews", "x" * 400, "open"],
        ["nowhere", "10.0.0.1:1", "open"], ["reviews", "10.0.0.1:2", "\x1b[31m"],
        ["reviews", "10.0.0.1:3", "half-open"],
    ]  # fmt: skip
    evidence = [["reviews", "10.0.0.1:1", "because"], ["nowhere", "10.0.0.1:1", "x"], ["reviews", "1:1", "\x1b[31m"],
                ["reviews", "10.0.0.1:1", "x" * 301], ["reviews", "1:1\n", "x"]]  # fmt: skip
    beat = {"edges": told, "breakers": breakers, "evidence": evidence}
    assert (await kit.post("/v1/heartbeat", beat)).error == "not_registered"
    stream = kit.replica.hub.streams["a"]
    assert stream.edges == {"reviews": (10.0, 1.0)}
    assert stream.breakers == (("reviews", "10.0.0.1:1", "open"), ("reviews", "10.0.0.1:3", "half-open"))
    assert stream.evidence == (("reviews", "10.0.0.1:1", "because"),)
    assert (await kit.post("/v1/heartbeat", b'{"edges": [["reviews", 1e999, 1]]}')).error == "invalid"
    await kit.post("/v1/heartbeat", {"edges": [["reviews", 1e300, 1]]})
    assert stream.edges["reviews"][0] <= 10.0
    await kit.post("/v1/heartbeat", {"breakers": [["reviews", f"10.0.0.1:{n}", "open"] for n in range(1000)]})
    assert len(stream.breakers) == BREAKERS_MAX
    await trio.sleep(11.0)
    assert kit.replica.state.get(OBSERVED, "r1") is not None


@pytest.mark.parametrize(
    "strange",
    [
        {"host": "fe80::1%\n\x1b[31m"}, {"host": "fe80::1%eth0"}, {"host": "0.0.0.0"}, {"host": "a..b"}, {"host": ""},
        {"labels": {"a": "\x1b[31m"}}, {"labels": {"a\nb": "c"}}, {"zone": "a\nb"}, {"priority": -1},
        {"priority": 101}, {"ports": {"x" * 64: 1}},
        {"ports": {"a\nb": 1}}, {"port": 0}, {"weight": 0}, {"labels": {"a": "x" * 129}},
    ],
)  # fmt: skip
async def test_a_registration_is_plain(kit: Kit, autojump_clock: MockClock, strange: dict[str, Any]) -> None:
    assert (await kit.post("/v1/register", {**PLACE, **strange})).error == "invalid"
    assert (await kit.post("/v1/register", PLACE)).status == 200


async def test_who_registers_all_the_time_is_held_back(kit: Kit, autojump_clock: MockClock) -> None:
    answers = [await kit.post("/v1/register", {**PLACE, "port": port}) for port in range(1, 31)]
    assert [call.status for call in answers] == [200] * int(CHANGES) + [429] * (30 - int(CHANGES))
    assert (await kit.post("/v1/register", PLACE, "b", "reviews")).status == 200
    await trio.sleep(2.0)
    assert (await kit.post("/v1/register", PLACE)).status == 200


async def test_health_that_flaps_writes_little(kit: Kit, autojump_clock: MockClock) -> None:
    await kit.stream()
    await kit.post("/v1/register", PLACE)
    commits = kit.store.commits
    for number in range(100):
        assert (await kit.post("/v1/heartbeat", {"healthy": bool(number % 2), "reason": "x"})).status == 200
    assert kit.store.commits - commits <= CHANGES
    await trio.sleep(2.0)
    await kit.post("/v1/heartbeat", {"healthy": False, "reason": "x"})
    assert not kit.replica.instances["web"]["a"].record.healthy


async def test_a_withdrawal_with_a_slow_store_is_answered(kit: Kit, autojump_clock: MockClock) -> None:
    stream = await kit.stream("b", "reviews", uses=["web"])
    await kit.post("/v1/register", PLACE)
    await trio.sleep(1.0)
    await kit.answered(stream, "b", "reviews")
    kit.store.delay_s = 8.0
    call = await kit.post("/v1/withdraw", {})
    assert (call.status, json.loads(call.body)) == (200, {"acknowledged": False})


async def test_a_sidecar_is_nobody_but_itself(kit: Kit, autojump_clock: MockClock) -> None:
    assert (await kit.post("/v1/register", PLACE, "a", "reviews")).error == "unknown_sidecar"
    assert (await kit.post("/v1/register", PLACE, "zzz", "web")).error == "unknown_sidecar"
    call = Call(kit, "/v1/stream", "a", "web")
    call.tell({"protocol": [1, 0], "service": "reviews"})
    assert (await call.run()).error == "not_yours"
