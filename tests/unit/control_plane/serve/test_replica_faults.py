"""What goes wrong around a replica, on virtual time: leases that end, commits that fail, clocks that differ."""

from collections.abc import Sequence
from typing import Any

import pytest
import trio
from support import replicas
from support.memory_store import MemoryStore
from support.operators import EPOCH
from support.replicas import beat, connect
from trio.testing import MockClock

from control_plane.serve import housekeeping as module
from control_plane.serve.hub import Stream
from control_plane.serve.operator_views import policy_revision
from control_plane.serve.replica import Replica
from control_plane.state.records import (
    ALIVE,
    BANS,
    INSTANCES,
    LIVE,
    REPLICAS,
    SERVICES,
    SIDECARS,
    Alive,
    Ban,
    Change,
    Document,
    Instance,
    Sidecar,
    change_key,
    encode,
)
from control_plane.store.base import Compare, Delete, Operation, Put, StoreUnavailable


class SlyStore(MemoryStore):
    """`before` is called with the operations of each commit, and may change the store or raise."""

    async def before(self, operations: Sequence[Operation]) -> None: ...

    async def commit(self, operations: Sequence[Operation], compares: Sequence[Compare] = ()) -> int:
        await self.before(operations)
        return await super().commit(operations, compares)


class Kit(replicas.Kit):
    store: SlyStore


@pytest.fixture
def kit() -> Kit:
    return Kit(SlyStore())


def states(replica: Replica, service: str = "web") -> dict[str, str]:
    return {name: held.record.state for name, held in replica.instances.get(service, {}).items()}


# Judging


async def test_who_leaves_while_a_crowd_is_judged_does_not_end_the_replica(kit: Kit, autojump_clock: MockClock) -> None:
    async with kit.running() as replica:
        names = [f"s{number:03}" for number in range(100)]
        for number, name in enumerate(names, 1):
            await connect(replica, name, port=number)
        last = f"{INSTANCES}web/{names[-1]}"
        changed = Instance("10.0.0.9", 999)

        async def before(operations: Sequence[Operation]) -> None:
            if any(each.key.startswith(INSTANCES) for each in operations) and len(operations) > 1:
                kit.store.before = nothing  # type: ignore[method-assign]
                await kit.store.commit([Delete(f"{INSTANCES}web/{names[-2]}"), Put(last, encode(changed))])

        async def nothing(operations: Sequence[Operation]) -> None: ...

        kit.store.before = before  # type: ignore[method-assign]
        await trio.sleep(40.0)
        found = states(replica)
        assert len(found) == 99 and set(found.values()) == {"suspect"}
        held = replica.instances["web"][names[-1]].record
        assert (held.host, held.port) == ("10.0.0.9", 999), "what came in between is not undone"


async def test_a_crowd_with_large_records_is_judged_too(kit: Kit, autojump_clock: MockClock) -> None:
    async with kit.running() as replica:
        labels = {f"{number}" + "x" * 100: "y" * 128 for number in range(200)}
        for number in range(1, 65):
            await connect(replica, f"s{number:03}", port=number, labels=labels)
        await trio.sleep(30.0)
        assert set(states(replica).values()) == {"suspect"}


@pytest.mark.parametrize("skew_s", [-300.0, 300.0])
async def test_clocks_that_differ_shorten_and_lengthen_nothing(
    kit: Kit, autojump_clock: MockClock, skew_s: float
) -> None:
    async with kit.running() as one, kit.running("r2", skew_s) as two:
        for number, name in enumerate("abc", 1):
            await connect(one, name, port=number)
        await trio.sleep(20.0)
        assert set(states(two).values()) == {"suspect"}
        await trio.sleep(30.0)
        assert set(states(two).values()) == {"suspect"}
        await trio.sleep(25.0)
        assert states(one) == states(two) == {}


async def test_a_single_one_stays_gone_for_one_ttl_whoever_says_so(kit: Kit, autojump_clock: MockClock) -> None:
    async with kit.running() as one, kit.running("r2", 300.0) as two, trio.open_nursery() as nursery:
        for number, name in enumerate("abc", 1):
            await connect(one, name, port=number)
        nursery.start_soon(beat, one, "a", "b")
        await trio.sleep(18.0)
        assert states(one)["c"] == states(two)["c"] == "gone"
        await trio.sleep(8.0)
        assert states(one)["c"] == "gone"
        await trio.sleep(12.0)
        assert "c" not in states(one)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("after_s", [2.0, 40.0])
async def test_who_stood_still_takes_nobody_for_gone(kit: Kit, autojump_clock: MockClock, after_s: float) -> None:
    """Also one that had only begun, and was not judging yet."""
    async with kit.running() as replica, trio.open_nursery() as nursery:
        for number, name in enumerate("ab", 1):
            await connect(replica, name, port=number)
        with trio.move_on_after(after_s):
            await beat(replica, "a", "b")
        autojump_clock.jump(25.0)
        for lease in list(kit.store.leases):
            kit.store._end(lease)
        for tenth in range(400):
            await trio.sleep(0.1)
            assert set(states(replica).values()) == {"up"}
            if tenth == 20:  # it takes them a while to be back
                nursery.start_soon(beat, replica, "a", "b")
        nursery.cancel_scope.cancel()


async def test_one_whose_record_was_deleted_is_judged_all_the_same(kit: Kit, autojump_clock: MockClock) -> None:
    async with kit.running() as replica:
        await connect(replica, "a")
        await replica.commit([Delete(SIDECARS + "a")])
        await trio.sleep(60.0)
        assert states(replica) == {}


# Leases


async def test_leases_that_end_while_they_are_used_do_not_end_the_replica(kit: Kit, autojump_clock: MockClock) -> None:
    """The process stood still, or the store was slow: a lease just granted is gone when it is used."""
    async with kit.running() as replica:
        await connect(replica, "a")

        async def before(operations: Sequence[Operation]) -> None:
            if any(isinstance(each, Put) and each.lease for each in operations):
                for lease in list(kit.store.leases):
                    kit.store._end(lease)

        kit.store.before = before  # type: ignore[method-assign]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(beat, replica, "a")
            for lease in list(kit.store.leases):
                kit.store._end(lease)
            await trio.sleep(10.0)
            del kit.store.before
            await trio.sleep(10.0)
            assert "a" in replica.state.table(ALIVE) and "r1" in replica.state.table(REPLICAS)
            nursery.cancel_scope.cancel()


async def test_a_heartbeat_brings_a_lost_sign_of_life_back(kit: Kit, autojump_clock: MockClock) -> None:
    """Two leases were granted at the same time, and the record went with the one that nobody keeps."""
    async with kit.running() as replica, trio.open_nursery() as nursery:
        await connect(replica, "a")
        nursery.start_soon(beat, replica, "a")
        stray = await kit.store.grant(3.0)
        await kit.store.commit([Put(ALIVE + "a", encode(Alive("r1", EPOCH)), stray)])
        for _ in range(40):
            await trio.sleep(1.0)
            assert states(replica) == {"a": "up"}
        nursery.cancel_scope.cancel()


async def test_who_leaves_does_not_come_back(kit: Kit, autojump_clock: MockClock) -> None:
    async with kit.running() as one, kit.running("r2") as two:
        await two.presence.leave()
        for _ in range(10):
            await trio.sleep(0.5)
            assert set(one.state.table(REPLICAS)) == {"r1"}


# What sidecars answered


async def answer(replica: Replica, stream: Stream, **rejected: str) -> None:
    await replica.hub.next_lines(stream, list)
    while stream.waiting is None:
        await replica.hub.next_lines(stream, list)
    replica.hub.answer(stream, stream.waiting.nonce, {n.replace("_", "/"): why for n, why in rejected.items()})


async def test_one_whose_lease_has_ended_does_not_silence_the_others(kit: Kit, autojump_clock: MockClock) -> None:
    async with kit.running() as one, kit.running("r2") as two:
        mute, good = await connect(one, "a", port=0), await connect(one, "b", port=0)
        await trio.sleep(1.0)
        kit.store._end(one.leases.get("a"))
        await answer(one, mute, service_web="x")
        await answer(one, good, service_web="x")
        await trio.sleep(0.5)
        assert two.state.get(LIVE, "b").rejected == {"service/web": "x"}


async def test_large_answers_go_in_several_transactions(kit: Kit, autojump_clock: MockClock) -> None:
    async with kit.running() as replica:
        streams = [await connect(replica, f"s{number:02}", port=0) for number in range(64)]
        for stream in streams:
            stream.rejected = {f"service/{number}": "no such filter " * 100 for number in range(30)}
            replica.hub.reported.add(stream.id)
        await trio.sleep(1.0)
        assert len(replica.state.table(LIVE)) == 64


# The store


async def test_a_commit_that_failed_once_leaves_no_problem_behind(kit: Kit, autojump_clock: MockClock) -> None:
    async with kit.running() as replica:
        stream = await connect(replica, "a", port=0)
        await trio.sleep(1.0)

        async def before(operations: Sequence[Operation]) -> None:
            raise StoreUnavailable("no answer in time")

        kit.store.before = before  # type: ignore[method-assign]
        stream.rejected = {"service/web": "x"}
        replica.hub.reported.add("a")
        await trio.sleep(0.3)
        assert replica.store_problem
        replica.hub.reported.clear()
        del kit.store.before
        await trio.sleep(5.0)
        assert replica.store_problem == ""


async def test_a_store_that_went_back_does_not_end_the_replica(kit: Kit, autojump_clock: MockClock) -> None:
    async with kit.running() as replica:
        for number in range(50):
            document = Document("m", 1, f"  s{number}: {{}}\n", "a", 1, 1)
            await kit.store.commit([Put(f"{SERVICES}s{number}", encode(document))])
        await trio.sleep(module.COMPACT_S)
        kit.store.revision -= 40
        kit.store.past.clear()
        await trio.sleep(module.COMPACT_S)
        await replica.audit("ana", "look", "it")


async def test_what_could_not_be_worked_out_is_not_forgotten(
    kit: Kit, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with kit.running() as replica:
        await connect(replica, "a", port=0)
        await trio.sleep(1.0)
        right = replica._update_catalogue

        def wrong(documents_changed: bool) -> Any:
            raise RuntimeError("a bug")

        monkeypatch.setattr(replica, "_update_catalogue", wrong)
        change = Change("ana", EPOCH, after={"services/reviews": Document("m", 1, "  reviews: {}\n", "ana", EPOCH, 1)})
        await replica.commit([Put(change_key(1), encode(change))])
        await trio.sleep(1.0)
        assert "reviews" not in replica.catalogue.snapshot.services
        monkeypatch.setattr(replica, "_update_catalogue", right)
        await replica.register("a", "web", Instance("10.0.0.1", 7))
        await trio.sleep(1.0)
        assert "reviews" in replica.catalogue.snapshot.services


async def test_the_newest_policy_is_the_same_for_sidecars_and_for_operators(
    kit: Kit, autojump_clock: MockClock
) -> None:
    """A restored store has documents whose change is no longer kept."""
    async with kit.running() as replica:
        await replica.commit([Put(change_key(9), encode(Change("ana", EPOCH)))])
        await replica.commit([Put(SERVICES + "a", encode(Document("m", 1, "  a: {}\n", "ana", EPOCH, 1)))])
        await trio.sleep(1.0)
        assert replica.policy_revision == policy_revision(replica.state)


# Bans


async def test_a_banned_certificate_ends_the_stream_that_it_opened(kit: Kit, autojump_clock: MockClock) -> None:
    async with kit.running() as replica:
        stream = await connect(replica, "a", port=0)
        stream.fingerprint = "f-a"
        await replica.commit([Put(BANS + "1", encode(Ban("certificate", "f-a", "ana", EPOCH)))])
        await trio.sleep(0.1)
        assert stream.goodbye


async def test_a_leaf_that_a_banned_sidecar_got_at_the_last_moment_is_banned_too(
    kit: Kit, autojump_clock: MockClock
) -> None:
    async with kit.running() as replica:
        await connect(replica, "a", port=0)
        await replica.commit([Put(BANS + "1", encode(Ban("sidecar", "a", "ana", EPOCH)))])
        await trio.sleep(1.0)
        renewed = Sidecar("web", ("f-new", "f-a"), EPOCH + 1e6, EPOCH, EPOCH)
        await replica.commit([Put(SIDECARS + "a", encode(renewed))])
        await trio.sleep(1.0)
        assert b"f-new" in replica.resources.held["bans"].line


# Registrations


async def test_health_that_is_told_late_brings_no_withdrawn_instance_back(kit: Kit, autojump_clock: MockClock) -> None:
    async with kit.running() as replica:
        await connect(replica, "a")
        await trio.sleep(1.0)

        async def before(operations: Sequence[Operation]) -> None:
            if any(isinstance(each, Put) and each.key.startswith(INSTANCES) for each in operations):
                del kit.store.before
                await kit.store.commit([Delete(f"{INSTANCES}web/a")])

        kit.store.before = before  # type: ignore[method-assign]
        await replica.health("a", "web", False, "it does not answer")
        await trio.sleep(1.0)
        assert states(replica) == {}
