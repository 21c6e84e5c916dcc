"""Pushes and what they make: pure, from data to snapshots."""

from typing import Any

import pytest

from sidecar.discovery.refusal import Refusal
from sidecar.discovery.resources import (
    BASE,
    Holdings,
    ProtocolError,
    PushReader,
    Resource,
    settle,
)


def service(name: str, **more: Any) -> Resource:
    return Resource(f"service/{name}", f"{name}-1", {"name": name, **more})


def endpoints(name: str, *ports: int) -> Resource:
    return Resource(f"endpoints/{name}", f"e{ports}", [{"host": "10.0.0.1", "port": port} for port in ports])


def holding(*resources: Resource) -> Holdings:
    holdings = Holdings("web")
    taken = holdings.take(resources)
    assert not taken.rejected
    for resource, read in taken.services.values():
        holdings.accept(resource, read)
    return holdings


def push(nonce: str, *resources: Resource, removed: tuple[str, ...] = (), more: bool = False) -> dict[str, Any]:
    data = [{"name": each.name, "version": each.version, "data": each.data} for each in resources]
    line = {"type": "push", "nonce": nonce, "revision": 5, "policy": 3}
    return {**line, "resources": data, "removed": list(removed), "more": more}


# -- reading


def test_a_push_in_one_line() -> None:
    done = PushReader().line(push("n", service("web"), removed=("service/old",)))
    assert done is not None
    assert (done.nonce, done.revision, done.policy) == ("n", 5, 3)
    assert [each.name for each in done.resources] == ["service/web"] and done.removed == ["service/old"]


def test_a_push_in_several_lines_is_whole_with_the_last() -> None:
    reader = PushReader()
    assert reader.line(push("n", endpoints("a", 1), more=True)) is None
    assert reader.line(push("n", endpoints("b", 1), more=True)) is None
    done = reader.line(push("n", service("a")))
    assert done is not None and [each.name for each in done.resources] == ["endpoints/a", "endpoints/b", "service/a"]
    following = reader.line(push("m", service("b")))
    assert following is not None and len(following.resources) == 1


def test_a_push_that_begins_within_another() -> None:
    reader = PushReader()
    reader.line(push("n", endpoints("a", 1), more=True))
    with pytest.raises(ProtocolError, match="not complete"):
        reader.line(push("m", endpoints("b", 1)))


@pytest.mark.parametrize(
    "line",
    [
        {},
        {"nonce": 1, "revision": 1, "policy": 1},
        {"nonce": "n", "revision": "1", "policy": 1},
        {"nonce": "n", "revision": 1, "policy": True},
        {"nonce": "n", "revision": 1, "policy": 1, "resources": [{"name": "x"}]},
        {"nonce": "n", "revision": 1, "policy": 1, "resources": ["x"]},
        {"nonce": "n", "revision": 1, "policy": 1, "resources": 7},
        {"nonce": "n", "revision": 1, "policy": 1, "resources": [{"name": 1, "version": "1", "data": 0}]},
        {"nonce": "n", "revision": 1, "policy": 1, "removed": [1]},
    ],
)
def test_nonsense_is_a_protocol_error(line: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        PushReader().line(line)


# -- holding


def test_a_snapshot_joins_services_and_endpoints() -> None:
    holdings = holding(service("web"), endpoints("reviews", 1, 2), service("reviews"))
    made = holdings.snapshot({})
    assert sorted(made.services) == ["reviews", "web"]
    assert [each.port for each in made.services["reviews"].endpoints] == [1, 2]
    assert holdings.versions() == {
        "service/web": "web-1",
        "service/reviews": "reviews-1",
        "endpoints/reviews": "e(1, 2)",
    }


def test_endpoints_apply_at_once_and_leave_other_services_the_same_objects() -> None:
    holdings = holding(service("web"), service("reviews"), endpoints("reviews", 1))
    before = holdings.snapshot({})
    taken = holdings.take([endpoints("reviews", 2)])
    assert taken.changed == {"endpoints/reviews"} and not taken.services
    after = holdings.snapshot({})
    assert after.services["web"] is before.services["web"]
    assert [each.port for each in after.services["reviews"].endpoints] == [2]


def test_what_is_called_and_not_held_is_left_out() -> None:
    calls = {"reviews": {"service": "reviews"}, "gone": {"service": "gone"}}
    holdings = holding(service("web", calls=calls), service("reviews"))
    assert list(holdings.snapshot({}).services["web"].calls) == ["reviews"]
    taken = holdings.take([], ["service/reviews"])
    assert taken.changed == {"service/reviews"}
    assert not holdings.snapshot({}).services["web"].calls
    assert list(holdings.services["web"].calls) == ["reviews", "gone"]


def test_a_service_is_a_candidate_until_it_is_accepted() -> None:
    holdings = holding(service("web"))
    taken = holdings.take([service("reviews")])
    assert "service/reviews" not in holdings.versions() and "reviews" not in holdings.snapshot({}).services
    resource, read = taken.services["service/reviews"]
    assert "reviews" in holdings.snapshot({"reviews": read}).services
    holdings.accept(resource, read)
    assert "service/reviews" in holdings.versions()


@pytest.mark.parametrize(
    ("resource", "reason"),
    [
        (service("reviews", nonsense=1), "nonsense"),
        (Resource("service/reviews", "1", {"name": "other"}), "policy of 'other'"),
        (Resource("service/reviews", "1", []), "must be a map"),
        (Resource("endpoints/reviews", "1", {}), "a list"),
        (Resource("endpoints/reviews", "1", [{"host": "x"}]), "port"),
        (Resource("bans", "1", []), "a map"),
        (Resource("share", "1", {"share": 0}), "above 0"),
        (Resource("share", "1", {"share": True}), "above 0"),
        (Resource("share", "1", 0.5), "above 0"),
        (Resource("bans", "1", {"identities": [1]}), "list of strings"),
        (Resource("names", "1", {}), "list of strings"),
        (Resource("bundle", "1", {"pem": ""}), "trust domain"),
        (Resource("weather", "1", {}), "does not know"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name_and_the_old_stays(resource: Resource, reason: str) -> None:
    holdings = holding(service("web"), service("reviews"), endpoints("reviews", 1))
    before = holdings.versions(), holdings.snapshot({})
    taken = holdings.take([resource])
    assert taken.rejected.keys() == {resource.name} and reason in taken.rejected[resource.name]
    assert (holdings.versions(), holdings.snapshot({})) == before


def test_a_share_stands_until_it_is_taken_back() -> None:
    holdings = holding(service("web"))
    assert holdings.share is None
    assert holdings.take([Resource("share", "1", {"share": 0.25})]).changed == {"share"}
    assert holdings.share == 0.25 and holdings.versions()["share"] == "1"
    holdings.take([], ["share"])
    assert holdings.share is None


def test_bans_and_names() -> None:
    holdings = Holdings("web")
    holdings.take([Resource("bans", "1", {"identities": ["spiffe://m/service/a"], "certificates": ["ff"]})])
    holdings.take([Resource("names", "1", ["a", "b"])])
    assert holdings.bans == {"spiffe://m/service/a", "ff"} and holdings.names == {"a", "b"}
    holdings.take([], ["bans"])
    assert holdings.bans == frozenset()


def test_what_always_applies_is_never_taken_back() -> None:
    """A ban that came with endpoints that nothing can be served with holds, and is kept."""
    holdings = holding(service("web"), endpoints("shop", 1))
    ban = Resource("bans", "b2", {"identities": ["spiffe://mesh.local/service/mallory"]})
    names = Resource("names", "n2", ["shop", "web"])
    fresh = endpoints("shop", 2)
    before = {each.name: holdings.resources.get(each.name) for each in (ban, names, fresh)}
    taken = holdings.take([ban, names, fresh])
    assert holdings.take_back(taken, before) == ["endpoints/shop"]
    assert holdings.bans == {"spiffe://mesh.local/service/mallory"} and holdings.names == {"shop", "web"}
    assert [each.port for each in holdings.endpoints["shop"]] == [1]
    assert holdings.versions() == {"service/web": "web-1", "endpoints/shop": "e(1,)", "bans": "b2", "names": "n2"}


def test_restore_brings_back_what_was_there() -> None:
    holdings = holding(service("web"), endpoints("reviews", 1))
    before = holdings.resources["endpoints/reviews"]
    holdings.take([endpoints("reviews", 2), endpoints("shop", 3)])
    holdings.restore(before, "endpoints/reviews")
    holdings.restore(None, "endpoints/shop")
    assert holdings.versions() == {"service/web": "web-1", "endpoints/reviews": "e(1,)"}


# -- finding who is to blame


class Judge:
    """Refuses what holds a bad one; counts what it is asked."""

    def __init__(self, *bad: str, needs: str = "", busy: str = "") -> None:
        self.bad, self.needs, self.busy = set(bad), needs, busy
        self.asked: list[frozenset[str]] = []
        self.in_force: frozenset[str] | None = None

    async def __call__(self, names: frozenset[str]) -> Refusal | None:
        self.asked.append(names)
        if self.needs and self.needs not in names:
            return Refusal("own is missing")
        if self.busy and self.busy in names:
            return Refusal("port in use", own=True)
        if wrong := sorted(self.bad & names):
            return Refusal(f"bad: {', '.join(wrong)}")
        self.in_force = names
        return None


NAMES = [f"service/{number}" for number in range(20)]


async def test_a_good_push_is_asked_for_once() -> None:
    judge = Judge()
    assert await settle(NAMES, "service/0", True, judge) == {}
    assert judge.asked == [frozenset(NAMES)]


@pytest.mark.parametrize("bad", [("service/3",), ("service/0", "service/19"), ("service/4", "service/5", "service/11")])
async def test_the_bad_ones_are_named_and_the_good_ones_in_force(bad: tuple[str, ...]) -> None:
    judge = Judge(*bad)
    refused = await settle(NAMES, "service/own", True, judge)
    assert refused == {name: f"bad: {name}" for name in bad}
    assert judge.in_force == frozenset(NAMES) - set(bad)


async def test_one_bad_one_alone() -> None:
    judge = Judge("service/1")
    assert await settle(["service/1"], "service/own", True, judge) == {"service/1": "bad: service/1"}
    assert judge.in_force == frozenset()  # the endpoints that came with it apply


async def test_the_own_policy_first_where_none_is_held() -> None:
    judge = Judge("service/3", needs="service/0")
    assert await settle(NAMES, "service/0", False, judge) == {"service/3": "bad: service/3"}
    assert judge.in_force == frozenset(NAMES) - {"service/3"}


async def test_a_bad_own_policy_where_none_is_held_leaves_nothing_in_force() -> None:
    judge = Judge("service/0", needs="service/0")
    assert await settle(NAMES, "service/0", False, judge) == {"service/0": "bad: service/0"}
    assert judge.in_force is None


async def test_a_local_port_in_use_is_the_own_policys_fault() -> None:
    judge = Judge("service/7", busy="service/0")
    refused = await settle(NAMES, "service/0", True, judge)
    assert refused == {"service/0": "port in use", "service/7": "bad: service/7"}
    assert judge.in_force == frozenset(NAMES) - {"service/0", "service/7"}


async def test_the_work_is_bounded() -> None:
    names = [f"service/{number}" for number in range(1000)]
    judge = Judge(*names)
    refused = await settle(names, "service/own", True, judge)
    assert refused.keys() == set(names)
    assert len(judge.asked) <= 52
    assert any("not judged" in reason for reason in refused.values())


async def test_endpoints_that_cannot_be_served_are_told_apart() -> None:
    async def never(names: frozenset[str]) -> Refusal | None:
        return Refusal("no")

    assert (await settle([], "service/own", True, never))[BASE] == "no"


# -- keys of cookies


def cookies(*keys: Any) -> Resource:
    return Resource("cookies", "c", {"keys": list(keys)})


def test_keys_of_cookies_are_held_and_not_taken_back() -> None:
    holdings = holding(cookies({"key": "ab" * 32}, {"key": "cd" * 32, "until": 1500}))
    held = holdings.cookies
    assert held is not None and held.key == b"\xab" * 32 and held.former == ((b"\xcd" * 32, 1500.0),)
    assert holdings.versions() == {"cookies": "c"} and "ab" * 8 not in repr(held) and "\\xab" not in repr(held)
    assert not holdings.take([], ["cookies"]).changed and holdings.cookies is held
    assert holdings.take([cookies({"key": "ef" * 32, "more": 1})]).changed == {"cookies"}
    assert holdings.cookies is not None and holdings.cookies.key == b"\xef" * 32 and holdings.cookies.former == ()


@pytest.mark.parametrize(
    "data",
    [
        None, [], {}, {"keys": []}, {"keys": "geheim"}, {"keys": ["geheim"]}, {"keys": [{"key": "geheim"}]},
        {"keys": [{"key": "G" * 64}]}, {"keys": [{"key": "AB" * 32}]}, {"keys": [{"key": "ab " * 22}]},
        {"keys": [{"key": "ab" * 32}] * 9}, {"keys": [{"key": "ab" * 32, "until": "geheim"}]},
        {"keys": [{"key": "ab" * 32, "until": float("nan")}]}, {"keys": [{"key": "ab" * 32, "until": 10**400}]},
        {"keys": [{"key": "ab" * 32, "until": True}]}, {"keys": [{"until": 1.0}]},
    ],
)  # fmt: skip
def test_keys_of_cookies_that_cannot_be_read_change_nothing(data: Any) -> None:
    holdings = holding(cookies({"key": "cd" * 32}))
    taken = holdings.take([Resource("cookies", "d", data)])
    assert taken.rejected.keys() == {"cookies"} and not taken.changed
    assert "geheim" not in taken.rejected["cookies"] and "ab" * 8 not in taken.rejected["cookies"]
    assert holdings.cookies is not None and holdings.cookies.key == b"\xcd" * 32
    assert holdings.versions() == {"cookies": "c"}
