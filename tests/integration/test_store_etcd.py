"""The etcd store against one real etcd: the suite of every store, and what is etcd's own."""

import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from support.etcd_cluster import Etcd, need_etcd
from support.store_suite import CHECKS, Check, collect, events_after, name_of, put

from control_plane.store.base import VALUE_BYTES_MAX, Batch, Compacted, Delete, Put
from control_plane.store.etcd import EtcdStore
from control_plane.store.open import EtcdOptions

numbers = itertools.count()


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    need_etcd()
    with Etcd(tmp_path_factory.mktemp("etcd")) as running:
        yield running


@asynccontextmanager
async def opened(etcd: Etcd, prefix: str = "") -> AsyncIterator[EtcdStore]:
    async with trio.open_nursery() as nursery:
        options = EtcdOptions(prefix=prefix or f"test/{next(numbers)}/")
        store = await EtcdStore.open(etcd.hosts, options, nursery)
        yield store
        await store.aclose()


@pytest.mark.parametrize("check", CHECKS, ids=name_of)
async def test_suite(check: Check, etcd: Etcd) -> None:
    async with opened(etcd) as store:
        await check(store)


async def test_a_view_of_many_pages_is_of_one_revision(etcd: Etcd) -> None:
    """More than gRPC's 4 MB, while somebody changes all of it all the time."""
    async with opened(etcd) as store:
        for first in range(0, 1000, 100):
            await store.commit([Put(f"k/{n:04}", bytes(8192)) for n in range(first, first + 100)])
        stop = trio.Event()

        async def writer() -> None:
            number = 0
            while not stop.is_set():
                number += 1
                await store.commit([Put(f"k/{n:04}", b"%d" % number + bytes(8192)) for n in (0, 500, 999)])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer)
            for _ in range(5):
                view = await store.read("k/")
                assert len(view.entries) == 1000
                values = {view.entries[f"k/{n:04}"].value for n in (0, 500, 999)}
                assert len(values) == 1
                assert max(entry.revision for entry in view.entries.values()) <= view.revision
            stop.set()


async def test_a_slow_reader_is_paused_and_misses_nothing(etcd: Etcd) -> None:
    async with opened(etcd) as store:
        at = await put(store, "a")
        async with store.watch("", at) as batches:
            for number in range(1500):  # more than an inbox holds
                last = await put(store, "a", b"%d" % number)
            (watch,) = store._watches
            assert watch.inbox.full and watch.position < last
            found = await collect(batches, last)
        values = [int(event.entry.value) for batch in found for event in batch.events if event.entry]
        assert values == list(range(1500))


async def test_a_slow_reader_is_told_where_the_past_is_gone(etcd: Etcd) -> None:
    async with opened(etcd) as store:
        at = await put(store, "a")
        async with store.watch("", at) as batches:
            for number in range(1500):
                last = await put(store, "a", b"%d" % number)
            await store.compact(last)
            with pytest.raises(Compacted):
                await collect(batches, last)
            with pytest.raises(Compacted):  # and again
                await anext(batches)


async def test_prefixes_keep_apart(etcd: Etcd) -> None:
    async with opened(etcd, "apart/a/") as one, opened(etcd, "apart/b/") as two:
        at = await put(one, "k", b"one")
        async with one.watch("", at) as batches:
            await put(two, "k", b"two")
            etcd.ctl("put", "apart/a", "beside")
            etcd.ctl("put", "apart/a0", "beside")
            last = await put(one, "l")
            assert [event.key for batch in await collect(batches, last) for event in batch.events] == ["l"]
        assert set((await one.read()).entries) == {"k", "l"}
        assert (await one.read("k")).entries["k"].value == b"one"
        await one.commit([Delete("k")])
        assert set((await two.read()).entries) == {"k"}


async def test_a_foreign_key_is_shown_and_breaks_nothing(etcd: Etcd) -> None:
    async with opened(etcd, "foreign/") as store:
        at = await put(store, "a")
        etcd.ctl("put", "--", b"foreign/\xff\xfe odd".decode("utf-8", "surrogateescape"), "x")
        last = await put(store, "b")
        assert set((await store.read()).entries) == {"a", "b", "\\xff\\xfe odd"}
        assert len(await events_after(store, at, last)) == 2


async def test_a_transaction_larger_than_etcd_takes(etcd: Etcd) -> None:
    async with opened(etcd) as store:
        with pytest.raises(ValueError, match=r"1400000 bytes|max-request-bytes"):
            await store.commit([Put("a", bytes(VALUE_BYTES_MAX)), Put("b", bytes(VALUE_BYTES_MAX))])
        with pytest.raises(ValueError, match=r"1400000 bytes|max-request-bytes"):
            await store.commit([Put(f"{n}", bytes(VALUE_BYTES_MAX)) for n in range(5)])
        assert not (await store.read()).entries


async def test_many_leases_in_one_stream(etcd: Etcd) -> None:
    async with opened(etcd) as store:
        leases: list[int] = []

        async def grant() -> None:
            leases.append(await store.grant(30))

        async with trio.open_nursery() as nursery:
            for _ in range(500):
                nursery.start_soon(grant)
        await store.revoke(leases[7])
        with trio.fail_after(5):
            assert await store.keep_alive([*leases, *leases]) == {leases[7]}


async def test_watches_leave_nothing_behind(etcd: Etcd) -> None:
    async with opened(etcd) as store:
        at = await put(store, "a")
        for _ in range(8):
            async with store.watch("", at - 1) as batches:
                await anext(batches)
        with trio.fail_after(5):
            while store._cluster.watch_limiter.borrowed_tokens:  # noqa: ASYNC110 - the threads end by themselves
                await trio.sleep(0.01)
        assert not store._watches


async def test_what_the_body_raises_comes_out_as_it_is(etcd: Etcd) -> None:
    async with opened(etcd) as store:
        with pytest.raises(KeyError):
            async with store.watch("", await put(store, "a")):
                raise KeyError


async def test_a_silent_watch_is_given_up(etcd: Etcd, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream stays open, and the member answers progress requests, but events do not come."""
    monkeypatch.setattr("control_plane.store.etcd_watch.REREAD_S", 0.5)
    monkeypatch.setattr("control_plane.store.etcd_watch.TICK_S", 0.2)
    monkeypatch.setattr("control_plane.store.etcd_watch.BEHIND_S", 0.5)
    async with opened(etcd) as store:
        at = await put(store, "a")
        async with store.watch("", at) as batches:
            (watch,) = store._watches
            with trio.move_on_after(0.3):
                await anext(batches)
            # Let it watch another range than it believes: the next stream is in order again.
            right = watch.start, watch.end
            watch.start, watch.end = b"elsewhere", b"elsewherf"
            assert watch.stream is not None and watch.stream.call is not None
            watch.stream.call.cancel()
            watch.stream.over = True
            first = watch.stream
            with trio.fail_after(5):
                while watch.stream is first or not watch.stream.opened:  # noqa: ASYNC110
                    await trio.sleep(0.01)
            watch.start, watch.end = right
            last = await put(store, "b")
            with trio.fail_after(10):
                assert [event.key for batch in await collect(batches, last) for event in batch.events] == ["b"]


async def test_cancelled_calls_end_at_once(etcd: Etcd) -> None:
    async with opened(etcd) as store:
        for call in (store.read, lambda: store.grant(5), lambda: store.keep_alive([1, 2]), lambda: put(store, "a")):
            begun = trio.current_time()
            with trio.move_on_after(0.0001):
                await call()
            assert trio.current_time() - begun < 0.5
        assert await put(store, "b")


async def test_description(etcd: Etcd) -> None:
    async with opened(etcd, "said/") as store:
        port = etcd.hosts[0][1]
        assert store.description == f"etcd at 127.0.0.1:{port} (prefix said/, without TLS)"


async def test_a_restart_of_the_only_member(etcd: Etcd) -> None:
    """The connection is made again; the watch goes on without a gap."""
    async with opened(etcd) as store:
        at = await put(store, "a")
        seen: list[Batch] = []

        async def reader() -> None:
            async with store.watch("", at) as batches:
                async for batch in batches:
                    seen.append(batch)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader)
            await put(store, "b")
            etcd.members[0].kill()
            etcd.members[0].start()
            etcd.wait()
            etcd.ctl("put", store._prefix.decode() + "c", "by another")
            last = await put(store, "d")
            with trio.fail_after(10):
                while not seen or seen[-1].revision < last:  # noqa: ASYNC110
                    await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        assert [event.key for batch in seen for event in batch.events] == ["b", "c", "d"]


async def test_a_store_that_went_back_is_told(tmp_path: Path) -> None:
    """A backup restored under a running control plane: what it knows is not true any more."""
    need_etcd()
    with Etcd(tmp_path) as etcd:
        async with opened(etcd) as store:
            for _ in range(20):
                at = await put(store, "a")
            async with store.watch("", at) as batches:
                at = await put(store, "a")
                await anext(batches)
                member = etcd.members[0]
                member.kill()
                (tmp_path / member.name).rename(tmp_path / "before")
                member.start()
                etcd.wait()
                with trio.fail_after(15), pytest.raises(Compacted):
                    await anext(batches)
