"""The hub on virtual time: no sockets, no store."""

import json
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from control_plane.serve.hub import ANSWER_S, DEAD_S, LINE_BYTES_MAX, Hub, Stream, push_lines, rates
from control_plane.state.resources import Resources, resource
from sidecar.model.load import load_texts
from sidecar.model.snapshot import EndpointSpec

MESH = """\
version: 1
services:
  web: {calls: {reviews: {}}}
  reviews: {}
  other: {}
"""


def mesh(text: str = MESH) -> Resources:
    loaded = load_texts({"mesh.yaml": text})
    assert loaded.snapshot is not None
    resources = Resources()
    resources.put("bundle", {"pem": "x"})
    resources.put_services(loaded.snapshot.services)
    for name in loaded.snapshot.services:
        resources.put_endpoints(name, ())
    return resources


class Peer:
    """One stream, read as a sidecar would."""

    def __init__(self, hub: Hub, service: str = "web", **told: Any) -> None:
        self.hub = hub
        facts: dict[str, Any] = {"everything": False, "uses": set(), "held": {}, "version": "1"} | told
        self.stream = Stream(f"id-{service}", service, since=0.0, heard=trio.current_time(), **facts)
        hub.open(self.stream)
        self.lines: list[bytes] = []

    async def more(self) -> bool:
        self.lines += await self.hub.next_lines(self.stream, lambda: ["127.0.0.1:1"])
        return bool(self.lines)

    async def line(self) -> dict[str, Any]:
        if not self.lines:
            assert await self.more(), "the stream has ended"
        data: dict[str, Any] = json.loads(self.lines.pop(0))
        return data

    async def push(self) -> dict[str, Any]:
        while True:
            line = await self.line()
            if line["type"] == "push":
                return line

    def answer(self, push: dict[str, Any], **rejected: str) -> None:
        named = {name.replace("_", "/"): reason for name, reason in rejected.items()}
        assert self.hub.answer(self.stream, push["nonce"], named)


@pytest.fixture
def hub() -> Hub:
    hub = Hub("r1", mesh())
    hub.tell((), 7, 5)
    return hub


def named(push: dict[str, Any]) -> list[str]:
    return [each["name"] for each in push["resources"]]


async def test_first_a_hello_then_everything_then_only_heartbeats(hub: Hub, autojump_clock: MockClock) -> None:
    peer = Peer(hub)
    hello = await peer.line()
    assert (hello["type"], hello["sidecar"], hello["replicas"]) == ("hello", "id-web", ["127.0.0.1:1"])
    push = await peer.push()
    assert named(push) == [
        "bundle", "names", "endpoints/reviews", "endpoints/web", "service/reviews", "service/web",
    ]  # fmt: skip
    assert (push["revision"], push["policy"], push["more"]) == (7, 5, False)
    assert peer.stream.policy == 0
    peer.answer(push)
    assert peer.stream.policy == 5
    began = trio.current_time()
    assert await peer.line() == {"type": "heartbeat"}
    assert trio.current_time() - began == 5.0


async def test_who_comes_back_is_sent_only_what_differs(hub: Hub, autojump_clock: MockClock) -> None:
    first = Peer(hub)
    push = await first.push()
    versions = {each["name"]: each["version"] for each in push["resources"]}
    hub.resources.put_endpoints("reviews", [EndpointSpec("10.0.0.1", 1)])
    second = Peer(hub, held={**versions, "service/gone": "x"})
    push = await second.push()
    assert named(push) == ["endpoints/reviews"]
    assert push["removed"] == ["service/gone"]
    assert first.stream.goodbye


async def test_an_endpoint_goes_only_to_those_who_use_it(hub: Hub, autojump_clock: MockClock) -> None:
    web, other = Peer(hub), Peer(hub, "other")
    for peer in (web, other):
        peer.answer(await peer.push())
    hub.resources.put_endpoints("reviews", [EndpointSpec("10.0.0.1", 1)])
    hub.tell({"endpoints/reviews"}, 8, 5)
    assert named(await web.push()) == ["endpoints/reviews"]
    assert not other.stream.dirty
    other.stream.uses.add("reviews")
    hub.tell((), 9, 9)
    assert not other.stream.dirty and other.stream.policy == 9
    hub.tell({"service/reviews"}, 10, 10)
    push = await other.push()
    assert named(push) == ["endpoints/reviews", "service/reviews"]


async def test_one_push_at_a_time_and_the_next_is_the_sum(hub: Hub, autojump_clock: MockClock) -> None:
    web = Peer(hub)
    first = await web.push()
    for number in range(1, 10):
        hub.resources.put_endpoints("reviews", [EndpointSpec("10.0.0.1", number)])
        hub.tell({"endpoints/reviews"}, 7 + number, 5)
    web.stream.heard = trio.current_time() + 60
    assert (await web.line())["type"] == "heartbeat"
    web.answer(first)
    push = await web.push()
    assert named(push) == ["endpoints/reviews"]
    assert push["resources"][0]["data"][0]["port"] == 9
    assert push["nonce"].endswith("-2")


async def test_a_rejection_is_kept_until_the_resource_changes(hub: Hub, autojump_clock: MockClock) -> None:
    web = Peer(hub)
    web.answer(await web.push(), service_reviews="no such filter", service_unknown="x")
    assert web.stream.rejected == {"service/reviews": "no such filter"}
    assert web.stream.policy == 5
    hub.resources.put_services({**hub.resources.services, **services_with_retries()})
    hub.tell({"service/reviews"}, 8, 8)
    web.answer(await web.push())
    assert web.stream.rejected == {}
    assert web.stream.policy == 8


def services_with_retries() -> dict[str, Any]:
    loaded = load_texts({"a": MESH.replace("reviews: {}\n  other", "reviews: {retry: {max_retries: 0}}\n  other")})
    assert loaded.snapshot is not None
    return {"reviews": loaded.snapshot.services["reviews"]}


async def test_a_policy_that_changes_nothing_for_a_sidecar_is_answered_for_it(
    hub: Hub, autojump_clock: MockClock
) -> None:
    web = Peer(hub)
    web.answer(await web.push())
    hub.tell((), 20, 20)
    assert (await web.line())["type"] == "heartbeat"
    assert web.stream.policy == 20


async def test_an_answer_to_nothing_is_none(hub: Hub, autojump_clock: MockClock) -> None:
    web = Peer(hub)
    push = await web.push()
    assert not hub.answer(web.stream, "other", {})
    web.answer(push)
    assert not hub.answer(web.stream, push["nonce"], {})


@pytest.mark.parametrize(("heartbeats", "limit_s"), [(False, DEAD_S), (True, ANSWER_S)])
async def test_who_is_silent_or_never_answers_is_dropped(
    hub: Hub, autojump_clock: MockClock, heartbeats: bool, limit_s: float
) -> None:
    web = Peer(hub)
    began = trio.current_time()
    while await web.more():
        web.lines.clear()
        if heartbeats:
            web.stream.heard = trio.current_time()
    assert limit_s < trio.current_time() - began <= limit_s + 5.0


async def test_withdrawal_is_known_once_all_who_use_it_have_answered(hub: Hub, autojump_clock: MockClock) -> None:
    web, other = Peer(hub), Peer(hub, "other")
    for peer in (web, other):
        peer.answer(await peer.push())
    hub.resources.put_endpoints("reviews", [EndpointSpec("10.0.0.1", 1)])
    hub.tell({"endpoints/reviews"}, 8, 5)
    began = trio.current_time()
    assert not await hub.until_known("reviews", 5.0)
    assert trio.current_time() - began == 5.0
    push = await web.push()
    async with trio.open_nursery() as nursery:
        known: list[bool] = []

        async def wait() -> None:
            known.append(await hub.until_known("reviews", 5.0))

        nursery.start_soon(wait)
        await trio.sleep(1.0)
        web.answer(push)
    assert known == [True]
    assert await hub.until_known("other", 0.0)


async def test_a_goodbye_ends_the_stream(hub: Hub, autojump_clock: MockClock) -> None:
    web = Peer(hub)
    await web.push()
    hub.end_all("the control plane is ending")
    assert await web.line() == {"type": "goodbye", "reason": "the control plane is ending"}
    assert not await web.more()
    hub.close(web.stream)
    assert hub.streams == {}


def test_a_big_push_goes_in_lines_of_bounded_length() -> None:
    many = [resource(f"service/s{number}", "x" * 1000) for number in range(2000)]
    lines = [json.loads(line) for line in push_lines("n", 1, 1, many, ["endpoints/a"])]
    assert [line["more"] for line in lines] == [True] * (len(lines) - 1) + [False]
    assert lines[-1]["removed"] == ["endpoints/a"] and all(not line["removed"] for line in lines[:-1])
    assert [each["name"] for line in lines for each in line["resources"]] == [each.name for each in many]
    assert max(map(len, push_lines("n", 1, 1, many, []))) < LINE_BYTES_MAX + 2000


async def test_rates_add_up_by_caller(hub: Hub, autojump_clock: MockClock) -> None:
    one, two = Peer(hub).stream, Peer(hub, "other").stream
    one.edges = {"reviews": (10.0, 1.0), "idle": (0.0, 0.0)}
    two.edges = {"reviews": (5.0, 0.0)}
    assert rates([one, two, one]) == {("web", "reviews"): (20.0, 2.0), ("other", "reviews"): (5.0, 0.0)}
