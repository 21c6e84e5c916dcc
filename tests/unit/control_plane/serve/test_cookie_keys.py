"""The keys of sticky cookies over replicas, restarts, damage and rotation, on virtual time."""

import json
import logging
from typing import Any

import pytest
import trio
from support.memory_store import MemoryStore
from support.operators import EPOCH, running_api
from support.replicas import Kit, connect
from trio.testing import MockClock, wait_all_tasks_blocked

from control_plane.serve.replica import Replica
from control_plane.state.cookies import KEEP_S, service_key
from control_plane.state.records import COOKIES, CookieSecret, CookieSecrets, decode, encode
from control_plane.store.base import Conflict, Delete, Put


@pytest.fixture
def kit() -> Kit:
    return Kit(MemoryStore())


def told(replica: Replica, service: str = "web") -> list[str]:
    resource = replica.cookies.of(service)
    return [] if resource is None else [each["key"] for each in json.loads(resource.line)["data"]["keys"]]


def kept(kit: Kit) -> CookieSecrets:
    return decode(CookieSecrets, kit.store.entries[COOKIES].value)


async def test_all_replicas_tell_the_same_and_so_do_later_ones(kit: Kit, autojump_clock: MockClock) -> None:
    async with kit.running() as one, kit.running("r2") as two:
        first = told(one)
        assert len(first) == 1 and len(first[0]) == 64
        assert told(two) == first and told(two, "reviews") == told(one, "reviews") != first
        assert not kit.store.entries[COOKIES].lease, "backups take it along"
        secret = kept(kit).secrets[0].secret
    async with kit.running("r3") as three:
        assert told(three) == first
        assert three.cookies.of("web") is three.cookies.of("web"), "made once"
        assert secret.encode() not in b"".join(each.line for each in three.resources.held.values())


async def test_of_two_that_make_one_at_once_one_wins(kit: Kit, autojump_clock: MockClock) -> None:
    async with kit.running() as one, kit.running("r2") as two:
        await kit.store.commit([Delete(COOKIES)])
        await trio.sleep(0.5)
        for each in (one, two):
            each.state.stand_ins.pop(COOKIES)
        await trio.sleep(6.0)
        assert len(told(one)) == 1 and told(one) == told(two)


async def test_one_that_somebody_deleted_is_put_back(kit: Kit, autojump_clock: MockClock) -> None:
    async with kit.running() as one:
        before = told(one)
        await kit.store.commit([Delete(COOKIES)])
        await trio.sleep(6.0)
        assert COOKIES in kit.store.entries and told(one) == before


async def test_without_the_store_it_waits(kit: Kit, autojump_clock: MockClock) -> None:
    async with kit.running() as one:
        kit.store.away = True
        await trio.sleep(10.0)
        assert len(told(one)) == 1
    late = kit.replica("r2")
    kit.store.away = False
    await kit.store.commit([Delete(COOKIES)])
    await late.start()
    kit.store.away = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(late.run)
        await trio.sleep(20.0)
        assert told(late) == []
        kit.store.away = False
        await trio.sleep(20.0)
        assert len(told(late)) == 1
        nursery.cancel_scope.cancel()


async def test_a_damaged_record_is_named_and_never_replaced_unasked(
    kit: Kit, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = b'{"format":1,"secrets":[{"secret":"geheim"}],"changed":1.0}'
    async with kit.running() as one:
        before = told(one)
        await kit.store.commit([Put(COOKIES, damaged)])
        await trio.sleep(10.0)
        assert told(one) == before, "what it knew serves on"
        assert COOKIES in one.state.problems
    with caplog.at_level(logging.ERROR):
        async with kit.running("r2") as two:
            assert told(two) == [] and COOKIES in two.state.problems
            assert kit.store.entries[COOKIES].value == damaged
            stream = await connect(two, "a", port=0)
            stream.minor = 2
            await trio.sleep(1.0)
            lines = b"".join([*await two.hub.next_lines(stream, list), *await two.hub.next_lines(stream, list)])
            assert b'"service/web"' in lines and b'"cookies"' not in lines
            await two.cookies.rotate(60.0)
            assert len(told(two)) == 1 and COOKIES not in two.state.problems
            assert stream.dirty
    assert 'the record "cookies" cannot be used' in caplog.text and "geheim" not in caplog.text


async def test_a_rotation_is_told_by_every_replica(kit: Kit, autojump_clock: MockClock) -> None:
    async with kit.running() as one, kit.running("r2") as two:
        (before,) = told(one)
        await one.cookies.rotate(60.0)
        await two.cookies.rotate(60.0)
        await trio.sleep(0.1)
        assert told(one) == told(two) and told(one)[2] == before and len(set(told(one))) == 3


async def test_of_two_rotations_at_once_one_is_refused(
    kit: Kit, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with kit.running() as one:
        really = kit.store.read

        async def read(prefix: str = "") -> Any:
            view = await really(prefix)
            if prefix == COOKIES:
                fresh = CookieSecrets((CookieSecret("a" * 64),), EPOCH)
                await kit.store.commit([Put(COOKIES, encode(fresh))])
            return view

        monkeypatch.setattr(kit.store, "read", read)
        with pytest.raises(Conflict):
            await one.cookies.rotate(60.0)
        await trio.sleep(0.1)
        assert told(one) == [service_key(CookieSecret("a" * 64), "web").hex()]


async def test_only_an_admin_rotates_and_it_is_on_record() -> None:
    async with running_api(MemoryStore()) as api:
        assert api.replica.state.get(COOKIES) is None or told(api.replica)
        for role in ("viewer", "operator"):
            token = await api.operator("ana", role, "team-a")
            assert (await api.call("POST", "/v1/cookies/rotate", {}, token=token))[0] == 403
        assert (await api.call("POST", "/v1/cookies/rotate", {}))[0] == 401
        assert (await api.call("POST", "/v1/cookies/rotate", {"keep_s": -1}, token=api.admin))[0] == 400
        status, answer = await api.call("POST", "/v1/cookies/rotate", {}, token=api.admin)
        assert status == 200 and abs(answer["honoured_until"] - api.clock() - KEEP_S) < 5
        await wait_all_tasks_blocked()
        _, audit = await api.call("GET", "/v1/audit", token=api.admin)
        (row,) = [each for each in audit["audit"] if each["action"] == "rotate cookies"]
        assert (row["who"], row["message"]) == ("admin", "former ones are honoured for 86400 s")
        record = api.replica.state.get(COOKIES)
        assert isinstance(record, CookieSecrets)
        assert not any(each.secret in json.dumps([answer, audit]) for each in record.secrets)
