"""A cluster of three real etcd members, of which some are killed, frozen or cut off while a store works on it.

What must hold each time: what was acknowledged is there; the watch told each change once, in order and whole, and ends
at the same state as a view; commits go on as soon as there is a majority again.
"""

import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trio
from support.etcd_cluster import Etcd, Member, need_etcd
from support.store_suite import apply, collect, gone, put

from control_plane.store.base import Batch, Compacted, Entry, Event, Put, StoreUnavailable
from control_plane.store.etcd import EtcdStore
from control_plane.store.open import EtcdOptions

pytestmark = pytest.mark.long

prefixes = (f"test/{number}/" for number in itertools.count())


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    need_etcd()
    with Etcd(tmp_path_factory.mktemp("etcd"), members=3, links=True) as etcd:
        yield etcd


@pytest.fixture
def etcd(running: Etcd) -> Iterator[Etcd]:
    """With all its members, whatever the test before has done to them."""
    yield running
    running.join_again()
    for member in running.members:
        if member.process is None:
            member.start()
        member.thaw()
    running.wait()


@dataclass
class Work:
    """Somebody who writes all the time, two keys in each transaction, and somebody who watches."""

    store: EtcdStore
    acknowledged: dict[int, int] = field(default_factory=dict)  # revision -> number
    unsure: int = 0
    slowest_s: float = 0.0  # between two acknowledgements
    state: dict[str, Entry] = field(default_factory=dict)
    batches: list[Batch] = field(default_factory=list)
    stopping: bool = False

    async def write(self) -> None:
        last = trio.current_time()
        for number in itertools.count():
            if self.stopping:
                return
            try:
                value = str(number).encode()
                revision = await self.store.commit([Put(f"k/{number % 50}", value), Put("last", value)])
            except StoreUnavailable:
                self.unsure += 1
            else:
                self.acknowledged[revision] = number
                self.slowest_s = max(self.slowest_s, trio.current_time() - last)
                last = trio.current_time()
            await trio.sleep(0.005)

    async def watch(self, after: int) -> None:
        async with self.store.watch("", after) as batches:
            async for batch in batches:
                assert not self.batches or batch.revision > self.batches[-1].revision
                self.batches.append(batch)
                apply(self.state, batch.events)

    async def progress(self, count: int = 20, limit_s: float = 20) -> None:
        """Until so many more were acknowledged and told."""
        goal = len(self.acknowledged) + count
        with trio.fail_after(limit_s):
            while len(self.acknowledged) < goal:  # noqa: ASYNC110 - others set no event
                await trio.sleep(0.01)
            last = max(self.acknowledged)
            while not self.batches or self.batches[-1].revision < last:  # noqa: ASYNC110
                await trio.sleep(0.01)

    async def check(self) -> None:
        last = await put(self.store, "end")
        with trio.fail_after(20):
            while self.batches[-1].revision < last:  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert self.state == dict((await self.store.read()).entries)
        told: dict[int, list[Event]] = {}
        for batch in self.batches:
            for event in batch.events:
                assert event.entry is not None
                told.setdefault(event.entry.revision, []).append(event)
        for revision, number in self.acknowledged.items():
            assert {(event.key, event.entry and event.entry.value) for event in told[revision]} == {
                (f"k/{number % 50}", str(number).encode()),
                ("last", str(number).encode()),
            }
        # Each once, in order. One of which we were not told may have happened too, even later: a frozen member finds it
        # when it goes on.
        numbers = [int(e.entry.value) for events in told.values() for e in events if e.entry and e.key == "last"]
        assert len(numbers) == len(set(numbers)) <= len(self.acknowledged) + self.unsure
        known = set(self.acknowledged.values())
        assert [number for number in numbers if number in known] == sorted(known)


@asynccontextmanager
async def working(etcd: Etcd, first: Member | None = None, timeout_s: float = 5.0) -> AsyncIterator[Work]:
    """`first`: the member that the store uses as long as it can."""
    hosts = sorted(etcd.hosts, key=lambda host: first is not None and host != first.host)
    async with trio.open_nursery() as nursery:
        store = await EtcdStore.open(hosts, EtcdOptions(prefix=next(prefixes)), nursery, timeout_s=timeout_s)
        work = Work(store)
        async with trio.open_nursery() as tasks:
            tasks.start_soon(work.watch, await put(store, "begin"))
            work.state = dict((await store.read()).entries)
            tasks.start_soon(work.write)
            await work.progress()
            yield work
            work.stopping = True
            await work.check()
            tasks.cancel_scope.cancel()
        await store.aclose()


async def test_the_leader_is_killed_and_comes_back(etcd: Etcd) -> None:
    leader = etcd.leader()
    async with working(etcd, leader, timeout_s=2.5) as work:
        leader.kill()
        await work.progress()
        assert work.unsure <= 2
        assert work.slowest_s < 9
        leader.start()
        await work.progress()


async def test_a_follower_that_is_in_use_is_killed(etcd: Etcd) -> None:
    leader = etcd.leader()
    follower = next(member for member in etcd.members if member is not leader)
    async with working(etcd, follower) as work:
        follower.kill()
        await work.progress()
        assert work.unsure <= 1
        assert work.slowest_s < 2


@pytest.mark.long
async def test_a_member_that_is_in_use_is_frozen(etcd: Etcd) -> None:
    leader = etcd.leader()
    follower = next(member for member in etcd.members if member is not leader)
    async with working(etcd, follower, timeout_s=2.0) as work:
        follower.freeze()
        await work.progress()
        assert work.unsure <= 1
        assert work.slowest_s < 5
        follower.thaw()
        await work.progress()


@pytest.mark.long
async def test_a_member_that_is_in_use_is_cut_off(etcd: Etcd) -> None:
    """It answers, but has no majority; it was the leader even."""
    leader = etcd.leader()
    async with working(etcd, leader) as work:
        etcd.cut_off(leader)
        await work.progress()
        assert work.slowest_s < 9
        at = work.batches[-1].revision
        etcd.join_again()
        await work.progress()
        assert work.batches[-1].revision > at


@pytest.mark.long
async def test_the_majority_is_lost_and_found(etcd: Etcd) -> None:
    async with working(etcd, etcd.members[0], timeout_s=1.5) as work:
        for member in etcd.members[1:]:
            member.kill()
        with pytest.raises(StoreUnavailable):
            await work.store.commit([])
        with pytest.raises(StoreUnavailable) as caught:
            await work.store.read()
        assert all(f"{host}:{port}" in str(caught.value) for host, port in etcd.hosts)
        assert "connection refused" in str(caught.value)
        with pytest.raises(StoreUnavailable):
            await work.store.keep_alive([await work.store.grant(10)])
        for member in etcd.members[1:]:
            member.start()
        await work.progress()


@pytest.mark.long
async def test_leases_over_a_lost_leader(etcd: Etcd) -> None:
    """A lease that is kept stays, one that is left ends; and what it held is told."""
    async with trio.open_nursery() as nursery:
        store = await EtcdStore.open(etcd.hosts, EtcdOptions(prefix=next(prefixes)), nursery)
        kept, left = await store.grant(4), await store.grant(4)
        at = await store.commit([Put("kept", b"", kept), Put("left", b"", left)])
        etcd.leader().kill()
        alive = True

        async def keep() -> None:
            while alive:
                assert await store.keep_alive([kept]) == frozenset()
                await trio.sleep(0.5)

        async with trio.open_nursery() as tasks:
            tasks.start_soon(keep)
            await gone(store, "left", 15)
            assert await store.get("kept") is not None
            alive = False
        async with store.watch("", at) as batches:
            assert await anext(batches) == Batch((await store.read()).revision, (Event("left", None),))
        assert await store.keep_alive([kept, left]) == {left}
        await store.aclose()


async def test_compaction_while_no_member_is_reached(etcd: Etcd) -> None:
    """What happened meanwhile is gone: the watch says so, instead of leaving it out."""
    async with trio.open_nursery() as nursery:
        member, *others = etcd.members
        store = await EtcdStore.open([member.host], EtcdOptions(prefix=next(prefixes)), nursery)
        prefix = store.description.partition("prefix ")[2].partition(",")[0]
        async with store.watch("", await put(store, "a")) as batches:
            at = await put(store, "b")
            await collect(batches, at)
            member.kill()
            etcd.wait(*others)  # for a leader
            for _ in range(3):
                etcd.ctl("put", f"{prefix}c", "missed", member=others[0])
            revision = etcd.ctl("put", f"{prefix}d", "last", "-w", "json", member=others[0]).stdout
            etcd.ctl("compact", str(int(revision.partition(b'"revision":')[2].partition(b",")[0])), member=others[0])
            member.start()
            with pytest.raises(Compacted), trio.fail_after(20):
                await anext(batches)
        assert set((await store.read()).entries) == {"a", "b", "c", "d"}
        await store.aclose()


@pytest.mark.long
async def test_members_come_and_go(etcd: Etcd) -> None:
    """One after the other, in each way, again and again."""
    async with working(etcd, timeout_s=3.0) as work:
        for _ in range(3):
            for member in etcd.members:
                member.kill()
                await work.progress(30)
                member.start()
                etcd.wait(member)
                member.freeze()
                await work.progress(30)
                member.thaw()
                etcd.cut_off(member)
                await work.progress(30)
                etcd.join_again()
                etcd.wait(member)
        assert len(work.acknowledged) > 800
