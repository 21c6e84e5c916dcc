"""The embedded store, on real files: the suite of all stores, and what is its own."""

# ruff: noqa: ASYNC221, ASYNC240 (nothing else runs while these tests touch files)

import json
import os
import random
import resource
import sqlite3
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from support.store_suite import CHECKS, Check, collect, events_after, name_of, put, revision_of

from control_plane.store.base import (
    Compacted,
    Compare,
    Delete,
    Entry,
    Put,
    StoreError,
    StoreFull,
    StoreRefused,
    StoreUnavailable,
)
from control_plane.store.database import Bounds, Database
from control_plane.store.embedded import RECENT_REVISIONS_MAX, EmbeddedStore

LIMIT_S = 60.0


@asynccontextmanager
async def opened(path: Path, bounds: Bounds | None = None, read_only: bool = False) -> AsyncIterator[EmbeddedStore]:
    with trio.fail_after(LIMIT_S):
        async with trio.open_nursery() as nursery:
            store = await EmbeddedStore.open(path, nursery, bounds=bounds, read_only=read_only)
            try:
                yield store
            finally:
                await store.aclose()


async def cannot_open(path: Path, kind: type[StoreError]) -> str:
    async with trio.open_nursery() as nursery:
        with pytest.raises(kind) as caught:
            await EmbeddedStore.open(path, nursery)
    return str(caught.value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "store.db"


@pytest.mark.parametrize("check", CHECKS, ids=name_of)
async def test_suite(check: Check, path: Path) -> None:
    async with opened(path) as store:
        await check(store)


# -- from one start to the next


async def test_all_is_there_after_a_restart(path: Path) -> None:
    async with opened(path) as store:
        start = await put(store, "a", b"1")
        lease = await store.grant(30)
        await store.commit([Put("b", b"2", lease), Put("c", b"3")])
        last = await store.commit([Delete("c")])
        before = await store.read()
    async with opened(path) as store:
        assert await store.read() == before
        assert before.revision == last == await revision_of(store)
        assert [event.key for event in await events_after(store, start, last)] == ["b", "c", "c"]
        assert await store.keep_alive([lease]) == frozenset()
        after = await store.commit([Put("a", b"4")], [Compare("a", start)])
        assert after > last
        assert await store.grant(30) > lease
        await store.revoke(lease)
        assert set((await store.read()).entries) == {"a"}
    async with opened(path) as store:
        assert await store.keep_alive([lease]) == {lease}
        assert await revision_of(store) == after + 1


async def test_only_its_owner_can_read_it(path: Path) -> None:
    async with opened(path) as store:
        await put(store, "a")
        modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in path.parent.iterdir()}
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert modes == {"store.db": 0o600, "store.db-wal": 0o600, "store.db-shm": 0o600, "store.db.lock": 0o600}
    path.chmod(0o644)
    async with opened(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


# -- who else wants it


async def test_a_second_one_is_refused(path: Path) -> None:
    async with opened(path) as store:
        await put(store, "a")
        message = await cannot_open(path, StoreUnavailable)
        assert f"in use by process {os.getpid()}" in message and str(path) in message
        code = (
            "import sys, trio, pathlib\n"
            "from control_plane.store.embedded import EmbeddedStore\n"
            "async def main():\n"
            "    async with trio.open_nursery() as nursery:\n"
            "        await EmbeddedStore.open(pathlib.Path(sys.argv[1]), nursery)\n"
            "trio.run(main)\n"
        )
        other = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=30)
        assert other.returncode and f"in use by process {os.getpid()}" in other.stderr
        await put(store, "b")
    async with opened(path) as store:
        assert set((await store.read()).entries) == {"a", "b"}


async def test_it_can_be_read_beside_its_owner(path: Path) -> None:
    async with opened(path) as store:
        at = await put(store, "a", b"1")
        async with opened(path, read_only=True) as reader:
            assert await reader.read() == await store.read()
            later = await put(store, "a", b"2")
            assert await reader.get("a") == Entry("a", b"2", later)
            assert later > at
            for refused in (reader.commit([Put("a", b"3")]), reader.grant(5), reader.compact(1)):
                with pytest.raises(StoreRefused, match="reading only"):
                    await refused
            with pytest.raises(StoreRefused, match="reading only"):
                reader.watch("", 0)
        await put(store, "a", b"3")
    async with opened(path, read_only=True) as reader:  # nobody has it open
        assert (await reader.read()).entries["a"].value == b"3"


async def test_reading_only_makes_nothing(path: Path) -> None:
    async with trio.open_nursery() as nursery:
        with pytest.raises(StoreRefused, match="no such store"):
            await EmbeddedStore.open(path, nursery, read_only=True)
    assert not path.parent.exists()


# -- files that are no store, or no more


async def filled(path: Path) -> bytes:
    async with opened(path) as store:
        for number in range(60):
            await put(store, f"key/{number}", random.Random(number).randbytes(2000))
    return path.read_bytes()


@pytest.mark.parametrize("damage", ["text", "head", "cut", "middle", "emptied-tables"])
async def test_a_damaged_file_is_refused(path: Path, damage: str) -> None:
    data = bytearray(await filled(path))
    match damage:
        case "text":
            path.write_bytes(b"services:\n  web: {}\n" * 400)
        case "head":
            data[0:16] = bytes(16)
            path.write_bytes(data)
        case "cut":
            path.write_bytes(data[: len(data) // 2 // 4096 * 4096])
        case "middle":
            for page in range(2, len(data) // 4096):
                data[page * 4096 : page * 4096 + 16] = b"\xff" * 16
            path.write_bytes(data)
        case "emptied-tables":
            with sqlite3.connect(path) as connection:
                connection.execute("DROP TABLE entries")
            connection.close()
    message = await cannot_open(path, StoreRefused)
    assert str(path) in message and "restore" in message and "damaged" in message


async def test_another_programs_database_is_refused_and_left_alone(path: Path) -> None:
    path.parent.mkdir()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE theirs (a)")
    connection.close()
    before = path.read_bytes()
    assert "no store of pillion" in await cannot_open(path, StoreRefused)
    assert path.read_bytes() == before


async def test_a_newer_format_is_refused(path: Path) -> None:
    await filled(path)
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 9")
    connection.close()
    message = await cannot_open(path, StoreRefused)
    assert "format 9" in message and "newer pillion" in message


async def test_an_empty_file_is_a_new_store(path: Path) -> None:
    path.parent.mkdir()
    path.touch()
    async with opened(path) as store:
        assert await put(store, "a")


async def test_places_that_cannot_hold_a_store(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "is no directory" in await cannot_open(tmp_path / "file" / "store.db", StoreRefused)
    assert "Is a directory" in await cannot_open(tmp_path, StoreRefused)


_UNPRIVILEGED = """
import os, sys, trio, pathlib
from control_plane.store.embedded import EmbeddedStore
from control_plane.store.base import StoreError
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
async def main():
    async with trio.open_nursery() as nursery:
        try:
            await EmbeddedStore.open(pathlib.Path(sys.argv[1]), nursery)
        except StoreError as error:
            print(type(error).__name__, error)
trio.run(main)
"""


async def test_a_directory_that_is_not_ours_to_write(path: Path) -> None:
    await filled(path)
    for each in (path.parent.parent, *path.parent.parent.parents):
        if each.stat().st_uid == os.getuid() and each.name and not each.stat().st_mode & 0o001:
            each.chmod(0o755)  # pytest's own directories
    for mode in (0o700, 0o755):
        path.parent.chmod(mode)
        if os.getuid():
            path.parent.chmod(0o500)
        ran = subprocess.run(
            [sys.executable, "-c", _UNPRIVILEGED, path], capture_output=True, text=True, timeout=30, check=True
        )
        path.parent.chmod(0o700)
        assert ran.stdout.startswith("StoreRefused") and "Permission denied" in ran.stdout


# -- no room


async def test_a_full_store_reads_on_and_takes_what_frees_it(path: Path) -> None:
    small = Bounds(bytes_max=1024 * 1024, history_bytes_max=64 * 1024)
    async with opened(path, small) as store:
        lease = await store.grant(3600)
        written: dict[str, int] = {}
        with pytest.raises(StoreFull, match="full"):  # noqa: PT012
            for number in range(100):
                written[f"k/{number}"] = await store.commit([Put(f"k/{number}", bytes(40_000))])
        at = await revision_of(store)
        assert at == max(written.values())
        assert {entry.key: entry.revision for entry in (await store.read()).entries.values()} == written
        assert await store.keep_alive([lease]) == frozenset()
        with pytest.raises(StoreFull):
            await store.commit([Put("k/0", bytes(100)), Put("big", bytes(500_000))])
        assert len((await store.read()).entries) == len(written)
        for number in range(5):
            await store.commit([Delete(f"k/{number}")])
        after = await put(store, "small", bytes(20_000))
        assert after == at + 6
    async with opened(path) as store:
        assert await revision_of(store) == after
        assert set((await store.read()).entries) == set(list(written)[5:]) | {"small"}


async def test_a_disk_that_takes_no_more(path: Path) -> None:
    """The limit on a file's size stands for the disk's; in a process of its own, for it holds for all its files."""
    ran = await trio.run_process(
        [sys.executable, __file__, str(path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_stdout=True,
        capture_stderr=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr.decode()
    told = json.loads(ran.stdout)
    assert told["error"] == "StoreFull" and "disk" in told["message"]
    assert told["read_on"] == told["acknowledged"] > 3
    assert told["again"] > told["revision"]
    async with opened(path) as store:
        assert len((await store.read()).entries) == told["acknowledged"]  # less the lease's, and again
        assert await revision_of(store) == told["again"]


async def _fill_the_disk(path: Path) -> None:
    async with opened(path) as store:
        lease = await store.grant(2)
        await put(store, "leased", b"", lease)
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, limit[1]))
        count, revision, error = 1, 0, StoreError("none")
        for size in (20_000, 1):  # until there is no room for the least
            try:
                for number in range(1000):
                    revision = await put(store, f"k/{size}/{number}", bytes(size))
                    count += 1
            except StoreError as caught:
                error = caught
        read_on = len((await store.read()).entries)
        with trio.move_on_after(2.5):  # the lease ends meanwhile, and cannot be deleted yet
            while True:
                await trio.sleep(0.3)
                assert len((await store.read()).entries) == read_on
        assert await store.keep_alive([lease]) == {lease}
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        with trio.fail_after(10):
            while await store.get("leased") is not None:  # noqa: ASYNC110
                await trio.sleep(0.1)
        await put(store, "again")
        again = await put(store, "again")
        told = {
            "error": type(error).__name__,
            "message": str(error),
            "acknowledged": count,
            "read_on": read_on,
            "revision": revision,
            "again": again,
        }
        print(json.dumps(told))


# -- history and watches


async def test_a_slow_watch_reads_the_file(path: Path) -> None:
    count = RECENT_REVISIONS_MAX + 500
    async with opened(path) as store:
        start = await revision_of(store)
        async with store.watch("k/", start) as batches:
            async with trio.open_nursery() as nursery:
                for number in range(count):
                    nursery.start_soon(put, store, f"k/{number}")
            last = await put(store, "k/last")
            found = await collect(batches, last)
        assert {event.key for batch in found for event in batch.events} == {
            *(f"k/{number}" for number in range(count)),
            "k/last",
        }
        assert sum(len(batch.events) for batch in found) == count + 1
        assert len(found) > 1  # not all at once


async def test_history_is_bounded(path: Path) -> None:
    async with opened(path, Bounds(history_rows_max=100)) as store:
        start = await revision_of(store)
        async with store.watch("", start) as slow, store.watch("", start) as fast:
            for number in range(150):
                await put(store, f"k/{number % 3}", str(number).encode())
                if number % 20 == 0:
                    await anext(fast)
            last = await store.commit([Put("k/0", b"a"), Put("k/1", b"b")])
            with pytest.raises(Compacted):
                await anext(slow)
            assert (await collect(fast, last))[-1].revision == last
        kept = 0
        for after in range(start, last):
            try:
                await events_after(store, after, last)
                kept += 1
            except Compacted:
                assert not kept  # what is kept is whole
        assert 80 <= kept <= 100
        assert len((await store.read()).entries) == 3


async def test_history_is_bounded_in_bytes(path: Path) -> None:
    async with opened(path, Bounds(history_bytes_max=200_000)) as store:
        start = await revision_of(store)
        for _ in range(30):
            last = await put(store, "k", bytes(20_000))
        with pytest.raises(Compacted):
            await events_after(store, start, last)
        assert await events_after(store, last - 3, last)


async def test_waiting_transactions_share_a_write(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[int] = []
    write = Database.write

    def counted(self: Database, requests: list[object]) -> object:
        groups.append(len(requests))
        return write(self, requests)  # type: ignore[arg-type]

    monkeypatch.setattr(Database, "write", counted)
    async with opened(path) as store, trio.open_nursery() as nursery:
        for number in range(300):
            nursery.start_soon(put, store, f"k/{number}")
    assert sum(groups) == 300
    assert len(groups) < 30


async def test_a_cancelled_nursery_leaves_nobody_waiting(path: Path) -> None:
    async with trio.open_nursery() as nursery:
        store = await EmbeddedStore.open(path, nursery)
        await put(store, "a")
        nursery.cancel_scope.cancel()
    with trio.fail_after(5):
        with pytest.raises(StoreUnavailable, match="closed"):
            await put(store, "b")
        await store.aclose()
    async with opened(path) as again:
        assert set((await again.read()).entries) == {"a"}


async def test_closing_writes_what_waits(path: Path) -> None:
    done: list[int] = []

    async def write(store: EmbeddedStore, number: int) -> None:
        try:
            done.append(await put(store, f"k/{number}"))
        except StoreUnavailable:
            pass

    async with opened(path) as store, trio.open_nursery() as nursery:
        for number in range(50):
            nursery.start_soon(write, store, number)
        await trio.testing.wait_all_tasks_blocked()
        await store.aclose()
    async with opened(path) as store:
        assert sorted(entry.revision for entry in (await store.read()).entries.values()) == sorted(done)


if __name__ == "__main__":
    trio.run(_fill_the_disk, Path(sys.argv[1]))
