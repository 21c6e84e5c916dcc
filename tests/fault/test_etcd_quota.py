"""A full etcd: commits say so, all else goes on, and it recovers as the message says."""

from pathlib import Path

import pytest
import trio
from support.etcd_cluster import Etcd, need_etcd
from support.store_suite import collect, put, revision_of

from control_plane.store.base import Delete, Put, StoreFull
from control_plane.store.etcd import EtcdStore
from control_plane.store.open import EtcdOptions


async def test_full_and_recovered(tmp_path: Path) -> None:
    need_etcd()
    with Etcd(tmp_path, arguments=["--quota-backend-bytes", str(8 * 1024 * 1024)]) as etcd:
        async with trio.open_nursery() as nursery:
            store = await EtcdStore.open(etcd.hosts, EtcdOptions(), nursery)
            lease = await store.grant(60)
            at = await put(store, "first", b"1", lease)
            acknowledged = {"first": at}
            async with store.watch("", at) as batches:

                async def fill() -> None:
                    for number in range(100):
                        acknowledged[f"big/{number}"] = await put(store, f"big/{number}", bytes(500_000))

                with pytest.raises(StoreFull, match=r"etcdctl defrag.*etcdctl alarm disarm"):
                    await fill()
                assert 5 < len(acknowledged) < 50
                # reads, leases and watches go on; nothing that was acknowledged is lost
                view = await store.read()
                assert {key: entry.revision for key, entry in view.entries.items()} == acknowledged
                assert await store.keep_alive([lease]) == frozenset()
                with pytest.raises(StoreFull):
                    await put(store, "small")
                for key in acknowledged:  # deleting is allowed, or nobody could make room
                    if key != "first":
                        await store.commit([Delete(key)])
                await store.compact(await revision_of(store))
                etcd.ctl("defrag")
                etcd.ctl("alarm", "disarm")
                last = await put(store, "small")
                events = [event for batch in await collect(batches, last) for event in batch.events]
                assert [event.key for event in events if event.entry] == [*list(acknowledged)[1:], "small"]
            assert set((await store.read()).entries) == {"first", "small"}
            assert await store.commit([Put("first", b"2")])
            await store.aclose()
