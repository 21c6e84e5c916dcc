"""A store in one file: what is written, what is refused, and what a crash in the middle leaves."""

# ruff: noqa: ASYNC240 (nothing else runs while these tests touch files)

import json
import random
import stat
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from control_plane.store.backup import BackupError, backup, batches, read_backup, restore
from control_plane.store.base import (
    Compare,
    Delete,
    Operation,
    Put,
    StoreError,
    StoreFull,
    StoreUnavailable,
    check_transaction,
)
from control_plane.store.embedded import EmbeddedStore
from control_plane.store.migrate import migrate


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[EmbeddedStore]:
    async with trio.open_nursery() as nursery:
        store = await EmbeddedStore.open(path, nursery)
        try:
            yield store
        finally:
            await store.aclose()


async def fill(store: EmbeddedStore, count: int = 200) -> dict[str, bytes]:
    entries = {f"k/{number}": f'{{"number": {number}, "text": "schön"}}'.encode() for number in range(count)}
    entries |= {"meta": b"{}", "binary": bytes(range(256)), "empty": b"", "large": random.Random(1).randbytes(900_000)}
    for together in batches([Put(key, value) for key, value in entries.items()]):
        await store.commit(together)
    lease = await store.grant(60)
    await store.commit([Put("alive/1", b"", lease), Put("alive/2", b"", lease)])
    return entries


async def values(store: EmbeddedStore) -> dict[str, bytes]:
    return {key: entry.value for key, entry in (await store.read()).entries.items()}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    async def write() -> None:
        async with opened(tmp_path / "source.db") as store:
            await fill(store, 3)
            await backup(store, tmp_path / "backup", created=1000.0)

    trio.run(write)
    return tmp_path / "backup"


async def test_there_and_back(tmp_path: Path) -> None:
    path = tmp_path / "backup"
    async with opened(tmp_path / "source.db") as store:
        entries = await fill(store)
        path.write_text("an older one")
        written = await backup(store, path, created=1000.0)
        revision = (await store.read()).revision
    assert written.leased == 2 and written.revision == revision
    assert written.entries == entries
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert {each.name for each in tmp_path.iterdir()} == {"backup", "source.db", "source.db.lock"}
    held = read_backup(path)
    assert held == written
    async with opened(tmp_path / "target.db") as store:
        done = await restore(store, held)
        assert (done.entries, done.removed, done.leased) == (len(entries), 0, 2)
        assert await values(store) == entries
        again = await restore(store, held)  # what is equal is no obstacle
        assert again.entries == len(entries)


def test_people_can_read_it(file: Path) -> None:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines[0]["kind"] == "pillion store backup" and lines[0]["created"] == 1000.0
    assert {"key": "k/1", "text": '{"number": 1, "text": "schön"}'} in lines
    assert [line["key"] for line in lines[1:-1]] == sorted(line["key"] for line in lines[1:-1])


def test_any_change_is_noticed(file: Path) -> None:
    data = file.read_bytes()
    chance = random.Random(2)
    for _ in range(60):
        at = chance.randrange(len(data))
        file.write_bytes(data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :])
        with pytest.raises(BackupError):
            read_backup(file)
    for _ in range(20):
        file.write_bytes(data[: chance.randrange(len(data))])
        with pytest.raises(BackupError):
            read_backup(file)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"services: {}\n", "no backup of a store"),
        (b"[1, 2]\n", "no backup of a store"),
        (b'{"kind": "something else"}\n', "no backup of a store"),
        (b'{"kind": "pillion store backup", "format": 2}\n', "newer pillion"),
        (b'{"kind": "pillion store backup", "format": 1}\n', ":1: the head is damaged"),
        (b"[" * 100_000 + b"\n", "no backup of a store"),
    ],
)
def test_files_that_are_no_backup(tmp_path: Path, content: bytes, says: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)
    with pytest.raises(BackupError, match=says):
        read_backup(file)


def test_damage_is_told_with_its_line(file: Path) -> None:
    lines = file.read_bytes().splitlines(keepends=True)
    for replaced, says in (
        (lines[1] + lines[1], ":3: .* a second time"),
        (b'{"key": "with space", "text": ""}\n', ":2: damaged"),
        (b'{"key": "a"}\n', ":2: damaged"),
        (b'{"key": "a", "base64": "%"}\n', ":2: damaged"),
        (b'{"key": "a", "text": "\\ud800"}\n', ":2: damaged"),
        (b"nonsense\n", ":2: damaged"),
        (b"", ":.: the checksum"),
    ):
        file.write_bytes(lines[0] + replaced + b"".join(lines[2:]))
        with pytest.raises(BackupError, match=says):
            read_backup(file)
    file.write_bytes(b"".join(lines) + b"more")
    with pytest.raises(BackupError, match="follows the end"):
        read_backup(file)
    with pytest.raises(BackupError, match="No such file"):
        read_backup(file.with_name("none"))


async def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    async with opened(tmp_path / "source.db") as store:
        with pytest.raises(BackupError, match="cannot be written: No such file or directory"):
            await backup(store, tmp_path / "none" / "backup", created=0.0)
        with pytest.raises(BackupError, match="cannot be written: Is a directory"):
            await backup(store, tmp_path, created=0.0)


async def test_a_store_with_something_else_is_not_replaced_unasked(tmp_path: Path, file: Path) -> None:
    held = read_backup(file)
    async with opened(tmp_path / "target.db") as store:
        await store.commit([Put("theirs", b"1"), Put("k/1", b"other"), Put("k/2", held.entries["k/2"])])
        before = await store.read()
        with pytest.raises(BackupError, match=r"2 of its keys .*k/1, theirs.*--force"):
            await restore(store, held)
        assert await store.read() == before
        done = await restore(store, held, force=True)
        assert done.removed == 1
        assert await values(store) == held.entries


async def test_a_target_that_is_in_use_is_not_empty(tmp_path: Path, file: Path) -> None:
    async with opened(tmp_path / "target.db") as store:
        await store.commit([Put("alive/1", b"", await store.grant(60))])
        with pytest.raises(BackupError, match="alive/1"):
            await restore(store, read_backup(file))


class Dying(EmbeddedStore):
    """Takes a number of commits, then no more."""

    left = 0
    error: StoreError = StoreUnavailable("gone")

    async def commit(self, operations: Sequence[Operation], compares: Sequence[Compare] = ()) -> int:
        if not self.left:
            raise self.error
        self.left -= 1
        return await super().commit(operations, compares)


async def test_run_again_after_any_crash(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery, opened(tmp_path / "source.db") as source:
        entries = await fill(source, 300)
        crashes = 0
        for force in (False, True):
            store = await Dying.open(tmp_path / f"target-{force}.db", nursery)
            if force:
                store.left = 1
                await store.commit([Put("meta", b"of another mesh"), *(Put(f"old/{n}", b"") for n in range(100))])
            while True:
                store.left = 1 + crashes % 2
                try:
                    done = await migrate(source, store, force=force)
                    break
                except StoreUnavailable:
                    crashes += 1
                    # half a mesh is never taken for a whole one
                    assert "meta" not in await values(store)
            assert done.entries == len(entries) and done.leased == 2
            assert await values(store) == entries
            await store.aclose()
        assert crashes >= 6


async def test_a_full_target_says_to_run_again(tmp_path: Path, file: Path) -> None:
    async with trio.open_nursery() as nursery:
        store = await Dying.open(tmp_path / "target.db", nursery)
        store.error = StoreFull("no room")
        with pytest.raises(StoreFull, match=r"no room; .* run this again"):
            await restore(store, read_backup(file))
        await store.aclose()


async def test_a_source_that_is_empty_or_changes(tmp_path: Path) -> None:
    async with opened(tmp_path / "source.db") as source, trio.open_nursery() as nursery:
        target = await Dying.open(tmp_path / "target.db", nursery)
        with pytest.raises(BackupError, match="is empty"):
            await migrate(source, target)
        await source.commit([Put("a", b"1")])
        commit = target.commit

        async def meanwhile(operations: Sequence[Operation], compares: Sequence[Compare] = ()) -> int:
            await source.commit([Put("a", b"2")])
            target.left = 1
            return await commit(operations, compares)

        target.commit = meanwhile  # type: ignore[method-assign]
        with pytest.raises(BackupError, match="changed while it was read"):
            await migrate(source, target)
        await target.aclose()


def test_transactions_are_of_a_size_that_every_store_takes() -> None:
    operations: list[Operation] = [Put(f"k/{number}", bytes(number * 100)) for number in range(500)]
    operations += [Put("large/1", bytes(1024 * 1024)), Put("large/2", bytes(1024 * 1024))]
    operations += [Delete(f"old/{number}") for number in range(500)]
    found = list(batches(operations))
    assert [operation for together in found for operation in together] == operations
    for together in found:
        check_transaction(together, ())
        size = sum(len(each.value) for each in together if isinstance(each, Put))
        assert size <= 1024 * 1024
