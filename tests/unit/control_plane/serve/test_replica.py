"""The replica on virtual time, over a store in memory."""

import json
from datetime import timedelta
from typing import Any

import pytest
import trio
from support.memory_store import MemoryStore
from support.operators import AUTHORITY, EPOCH, make_authority
from support.replicas import Kit, beat, connect
from trio.testing import MockClock

from control_plane.serve.admission import AdmissionError, admit
from control_plane.serve.replica import Replica
from control_plane.state.records import (
    ALIVE,
    AUDIT,
    BANS,
    INSTANCES,
    LIVE,
    REPLICAS,
    SERVICES,
    SIDECARS,
    STATUS,
    TOKENS,
    Ban,
    Change,
    Document,
    Instance,
    Sidecar,
    Status,
    Token,
    change_key,
    encode,
)
from control_plane.store.base import Delete, Put


def document(name: str, text: str) -> Document:
    return Document("mesh.yaml", 3, f"  {name}: {text}\n", "ana", EPOCH, 1)


@pytest.fixture
def kit() -> Kit:
    return Kit(MemoryStore())


def told(replica: Replica, service: str) -> list[int]:
    held = replica.resources.held[f"endpoints/{service}"]
    return sorted(each["port"] for each in json.loads(held.line)["data"])


async def test_the_first_founds_the_mesh_and_a_further_one_enters_it(kit: Kit, autojump_clock: MockClock) -> None:
    async with kit.running() as one:
        assert one.state.meta is not None and one.state.meta.trust_domain == "mesh.local"
        assert set(one.state.table(REPLICAS)) == {"r1"}
        assert one.alone()
        async with kit.running("r2") as two:
            assert set(two.state.table(REPLICAS)) == {"r1", "r2"}
            assert one.replicas() == two.replicas() == ["127.0.0.1:11", "127.0.0.1:12"]
            assert one.join_addresses() == ["127.0.0.1:21", "127.0.0.1:22"]
            assert not one.alone()
        await trio.sleep(20)
        assert one.alone()


async def test_one_of_another_root_or_trust_domain_is_refused_and_changes_nothing(
    kit: Kit, autojump_clock: MockClock
) -> None:
    await admit(kit.store, AUTHORITY, "r1", EPOCH, "m1")
    before = kit.store.revision
    with pytest.raises(AdmissionError, match="no sidecar would accept what it issues"):
        await admit(kit.store, make_authority(), "r2", EPOCH, "m2")
    with pytest.raises(AdmissionError, match=r"holds the mesh mesh\.local.*is of other\.mesh"):
        await admit(kit.store, make_authority("other.mesh"), "r2", EPOCH, "m2")
    assert kit.store.revision == before
    async with kit.running("r1"):
        with pytest.raises(AdmissionError, match=r"named r1 runs already, at 127\.0\.0\.1:11"):
            await admit(kit.store, AUTHORITY, "r1", EPOCH, "m1", "127.0.0.1:19")
        await admit(kit.store, AUTHORITY, "r1", EPOCH, "m1", "127.0.0.1:11")
    await kit.store.commit([Put("meta", b"{}")])
    with pytest.raises(AdmissionError, match=r'the record "meta".*cannot be read'):
        await admit(kit.store, AUTHORITY, "r1", EPOCH, "m1")
    await kit.store.commit([Delete("meta")])
    with pytest.raises(AdmissionError, match="Restore a backup"):
        await admit(kit.store, AUTHORITY, "r1", EPOCH, "m1")


async def test_policy_becomes_resources_and_its_revision_is_told(kit: Kit, autojump_clock: MockClock) -> None:
    async with kit.running() as replica:
        stream = await connect(replica, "a", "web", 0)
        change = Change("ana", EPOCH, after={"services/reviews": document("reviews", "{}")})
        revision = await replica.commit([Put(change_key(1), encode(change))])
        await trio.sleep(0.6)
        assert replica.state.get(SERVICES, "reviews") == document("reviews", "{}")  # settled
        assert replica.policy_revision >= revision == replica.hub.policy
        assert "service/reviews" in replica.resources.held
        assert replica.catalogue.snapshot.services.keys() == {"reviews", "web"}
        assert stream.dirty


async def test_a_change_of_what_holds_for_all_makes_no_endpoints_anew(
    kit: Kit, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with kit.running() as replica:
        put: list[str] = []
        really = replica.resources.put_endpoints
        monkeypatch.setattr(
            replica.resources, "put_endpoints", lambda name, specs: put.append(name) or really(name, specs)
        )

        async def apply(number: int, **documents: str) -> None:
            texts = {
                name.replace("_", "/"): f"  {name.partition('_')[2]}: {text}\n" for name, text in documents.items()
            }
            after = {name: Document("mesh.yaml", 3, text, "ana", EPOCH, number) for name, text in texts.items()}
            if "defaults" in after:
                after["defaults"] = Document("mesh.yaml", 1, documents["defaults"], "ana", EPOCH, number)
            put.clear()
            await replica.commit([Put(change_key(number), encode(Change("ana", EPOCH, after=after)))])
            await trio.sleep(0.6)

        await apply(1, services_reviews='{address: ["10.0.0.1:1"]}', services_web="{}")
        assert told(replica, "reviews") == [1] and sorted(put) == ["reviews", "web"]
        version = replica.resources.held["service/reviews"].version
        await apply(2, defaults="defaults:\n  timeout: {idle: 61s}\n")
        assert replica.resources.held["service/reviews"].version != version and not put
        await apply(3, services_reviews='{address: ["10.0.0.1:2"]}')
        assert told(replica, "reviews") == [2] and put == ["reviews"]


async def test_changes_are_gathered_but_removals_go_at_once(kit: Kit, autojump_clock: MockClock) -> None:
    async with kit.running() as replica:
        await connect(replica, "a", "web", 1)
        await trio.sleep(1.0)
        assert told(replica, "web") == [1]
        flushes = replica.flushes
        for port in range(2, 9):
            await replica.register("a", "web", Instance("10.0.0.1", port))
            await trio.sleep(0.08)
        assert replica.flushes - flushes <= 2
        await trio.sleep(0.2)
        assert told(replica, "web") == [8]
        await replica.withdraw("a", "web")
        await trio.sleep(0.001)
        assert told(replica, "web") == []


async def test_who_sends_no_heartbeat_is_gone_after_one_ttl(kit: Kit, autojump_clock: MockClock) -> None:
    async with kit.running() as replica:
        for number, name in enumerate("abc", 1):
            await connect(replica, name, "web", number)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(beat, replica, "a", "b")
            await trio.sleep(14.0)
            assert told(replica, "web") == [1, 2, 3]
            await trio.sleep(4.0)
            assert told(replica, "web") == [1, 2]
            assert replica.instances["web"]["c"].record.state == "gone"
            await trio.sleep(16.0)
            assert set(replica.instances["web"]) == {"a", "b"}
            assert "c" not in replica.state.table(LIVE)
            nursery.cancel_scope.cancel()


async def test_a_crowd_that_falls_silent_is_suspect_and_comes_back(kit: Kit, autojump_clock: MockClock) -> None:
    async with kit.running() as replica:
        for number, name in enumerate("abc", 1):
            await connect(replica, name, "web", number)
        await trio.sleep(20.0)
        assert {held.record.state for held in replica.instances["web"].values()} == {"suspect"}
        assert told(replica, "web") == [1, 2, 3]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(beat, replica, "a")
            await trio.sleep(4.0)
            assert replica.instances["web"]["a"].record.state == "up"
            await trio.sleep(50.0)
            assert told(replica, "web") == [1]
            nursery.cancel_scope.cancel()


async def test_nobody_is_judged_until_one_ttl_after_the_store_is_back(kit: Kit, autojump_clock: MockClock) -> None:
    async with kit.running() as replica:
        await connect(replica, "a", "web", 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(beat, replica, "a")
            await trio.sleep(2.0)
            kit.store.away = True
            await trio.sleep(60.0)
            assert replica.store_problem == "the store is away"
            assert told(replica, "web") == [1]
            kit.store.away = False
            await trio.sleep(4.0)
            assert replica.store_problem == ""
            assert told(replica, "web") == [1]
            await trio.sleep(60.0)
            assert replica.instances["web"]["a"].record.state == "up"
            nursery.cancel_scope.cancel()


async def test_what_was_forgotten_meanwhile_is_read_again(kit: Kit, autojump_clock: MockClock) -> None:
    async with kit.running() as replica:
        kit.store.away = True
        await trio.sleep(1.0)
        kit.store.away = False
        revision = await kit.store.commit([Put(SERVICES + "reviews", encode(document("reviews", "{}")))])
        await kit.store.compact(revision)
        await trio.sleep(5.0)
        assert "reviews" in replica.catalogue.snapshot.services
        assert replica.state.revision >= revision


async def test_what_a_sidecar_answered_is_in_the_store_for_the_other_replicas(
    kit: Kit, autojump_clock: MockClock
) -> None:
    async with kit.running() as one, kit.running("r2") as two:
        stream = await connect(one, "a", "web", 0)
        await trio.sleep(1.0)
        await one.hub.next_lines(stream, list)
        await one.hub.next_lines(stream, list)
        assert stream.waiting is not None
        one.hub.answer(stream, stream.waiting.nonce, {"service/web": "no such filter"})
        await trio.sleep(1.0)
        live = two.state.get(LIVE, "a")
        assert (live.replica, live.rejected) == ("r1", {"service/web": "no such filter"})
        assert two.state.get(STATUS, "r1") == Status(one.hub.policy)
        stream.policy = -1
        await trio.sleep(2.0)
        assert two.state.get(STATUS, "r1") == Status(one.hub.policy, ("a",))


async def test_a_ban_ends_the_stream_and_reaches_everybody(kit: Kit, autojump_clock: MockClock) -> None:
    async with kit.running() as replica:
        stream = await connect(replica, "a", "web", 0)
        other = await connect(replica, "b", "web", 0)
        await replica.commit([Put(BANS + "1", encode(Ban("sidecar", "a", "ana", EPOCH)))])
        await trio.sleep(0.01)
        assert stream.goodbye and not other.goodbye
        assert replica.banned() == {"identities": [], "certificates": ["f-a"]}
        assert replica.is_banned("a", "web", "") and not replica.is_banned("b", "web", "f-b")
        await replica.commit(
            [Put(BANS + "2", encode(Ban("identity", "spiffe://mesh.local/service/web", "ana", EPOCH)))]
        )
        assert replica.is_banned("b", "web", "")


async def test_a_service_exists_as_soon_as_somebody_may_join_as_it(kit: Kit, autojump_clock: MockClock) -> None:
    async with kit.running() as replica:
        token = Token("join", "x", EPOCH, "ana", EPOCH + 60, "ratings", 1)
        await replica.commit([Put(TOKENS + "t", encode(token))])
        await trio.sleep(0.6)
        assert "ratings" in replica.catalogue.snapshot.services


async def test_records_that_are_not_ours_harm_nothing(kit: Kit, autojump_clock: MockClock) -> None:
    async with kit.running() as replica:
        await replica.commit([Put("foreign/key", b"\xff"), Put("instances/web/a", b"{}"), Put(SERVICES + "web", b"[]")])
        await trio.sleep(0.6)
        assert replica.state.problems.keys() == {"foreign/key", "instances/web/a", "policy/services/web"}
        assert replica.state.get(INSTANCES, "web/a") is None


async def test_audits_are_bounded(kit: Kit, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    import control_plane.serve.replica as module

    monkeypatch.setattr(module, "AUDITS_MAX", 5)
    async with kit.running() as replica:
        for number in range(9):
            await replica.audit("ana", "apply", f"change {number}")
            await trio.sleep(0.5)
        table: Any = replica.state.table(AUDIT)
        assert len(table) == 5
        assert sorted(held.record.subject for held in table.values()) == [f"change {number}" for number in range(4, 9)]


async def test_expired_tokens_and_sidecars_are_forgotten(kit: Kit, autojump_clock: MockClock) -> None:
    async with kit.running() as replica:
        await replica.commit(
            [
                Put(TOKENS + "old", encode(Token("join", "x", EPOCH, "ana", EPOCH - 90_000, "web"))),
                Put(TOKENS + "new", encode(Token("join", "x", EPOCH, "ana", EPOCH + 60, "web"))),
                Put(SIDECARS + "old", encode(Sidecar("web", ("f",), EPOCH - timedelta(days=8).total_seconds(), 0, 0))),
            ]
        )
        await trio.sleep(700)
        assert set(replica.state.table(TOKENS)) == {"new"}
        assert set(replica.state.table(SIDECARS)) == set()
        assert replica.state.table(ALIVE) == {}


async def test_without_what_holds_for_all_nobody_is_told_anything(kit: Kit, autojump_clock: MockClock) -> None:
    await admit(kit.store, AUTHORITY, "r1", EPOCH, "m1")
    await kit.store.commit([Put("policy/defaults", b"{"), Put(SERVICES + "web", encode(document("web", "{}")))])
    async with kit.running() as replica:
        stream = await connect(replica, "a", "web", 0)
        stream.held["service/web"] = "x"
        await trio.sleep(1.0)
        await replica.hub.next_lines(stream, list)
        assert next(iter(await replica.hub.next_lines(stream, list))) == b'{"type":"heartbeat"}\n'
        good = Document("mesh.yaml", 2, "defaults: {}\n", "ana", EPOCH, 1)
        await replica.commit([Put(change_key(1), encode(Change("ana", EPOCH, after={"defaults": good})))])
        await trio.sleep(1.0)
        stream.heard = trio.current_time()
        assert b'"service/web"' in next(iter(await replica.hub.next_lines(stream, list)))
