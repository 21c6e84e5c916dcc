"""When leases of the embedded store end, in virtual time."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from control_plane.store.base import Delete, Put, StoreFull
from control_plane.store.database import Database
from control_plane.store.embedded import EmbeddedStore


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[EmbeddedStore]:
    async with trio.open_nursery() as nursery:
        store = await EmbeddedStore.open(path, nursery)
        try:
            yield store
        finally:
            await store.aclose()


async def passes(clock: MockClock, seconds: float, store: EmbeddedStore) -> None:
    """In steps, each with what it sets off: a long jump would be a process that stood still."""
    while seconds > 0:
        clock.jump(min(0.5, seconds))
        seconds -= 0.5
        for _ in range(2):
            await wait_all_tasks_blocked()
            await store.get("any")  # after what the worker thread does now


async def keys(store: EmbeddedStore) -> set[str]:
    await wait_all_tasks_blocked()
    await store.commit([])  # after what stands in line
    return set((await store.read()).entries)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


async def test_a_lease_lives_for_its_ttl(path: Path, mock_clock: MockClock) -> None:
    async with opened(path) as store:
        lease, long = await store.grant(15), await store.grant(16)
        await store.commit([Put("a", b"", lease), Put("b", b"", long)])
        await passes(mock_clock, 14.9, store)
        assert await keys(store) == {"a", "b"}
        await passes(mock_clock, 0.2, store)
        assert await keys(store) == {"b"}
        await passes(mock_clock, 1.0, store)
        assert await keys(store) == set()
        assert await store.keep_alive([lease, long]) == {lease, long}


async def test_a_ttl_is_rounded_up(path: Path, mock_clock: MockClock) -> None:
    async with opened(path) as store:
        await store.commit([Put("a", b"", await store.grant(0.1))])
        await passes(mock_clock, 0.9, store)
        assert await keys(store) == {"a"}
        await passes(mock_clock, 0.2, store)
        assert await keys(store) == set()


async def test_keeping_alive_begins_the_ttl_again(path: Path, mock_clock: MockClock) -> None:
    async with opened(path) as store:
        kept, left = await store.grant(15), await store.grant(15)
        await store.commit([Put("kept", b"", kept), Put("left", b"", left)])
        await passes(mock_clock, 10, store)
        assert await store.keep_alive([kept]) == frozenset()
        await passes(mock_clock, 5.1, store)
        assert await keys(store) == {"kept"}
        await passes(mock_clock, 9.8, store)
        assert await keys(store) == {"kept"}
        await passes(mock_clock, 0.2, store)
        assert await keys(store) == set()


async def test_one_that_ends_sooner_than_all_others(path: Path, mock_clock: MockClock) -> None:
    async with opened(path) as store:
        await store.commit([Put("long", b"", await store.grant(1000))])
        await passes(mock_clock, 1, store)
        await store.commit([Put("short", b"", await store.grant(2))])
        await passes(mock_clock, 2.1, store)
        assert await keys(store) == {"long"}


async def test_after_a_restart_each_has_its_whole_time_again(path: Path, mock_clock: MockClock) -> None:
    async with opened(path) as store:
        await store.commit([Put("a", b"", await store.grant(15))])
        await passes(mock_clock, 14, store)
    mock_clock.jump(3600)
    async with opened(path) as store:
        await passes(mock_clock, 14.9, store)
        assert await keys(store) == {"a"}
        await passes(mock_clock, 0.2, store)
        assert await keys(store) == set()


async def test_after_standing_still_too(path: Path, mock_clock: MockClock) -> None:
    """A process that was stopped could not have taken a heartbeat."""
    async with opened(path) as store:
        await store.commit([Put("a", b"", await store.grant(15)), Put("b", b"", await store.grant(20))])
        await passes(mock_clock, 10, store)
        mock_clock.jump(600)
        await wait_all_tasks_blocked()
        await passes(mock_clock, 14.8, store)
        assert await keys(store) == {"a", "b"}
        await passes(mock_clock, 0.4, store)
        assert await keys(store) == {"b"}
        await passes(mock_clock, 5, store)
        assert await keys(store) == set()


async def test_a_lease_that_cannot_be_deleted_is_tried_again(
    path: Path, mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Database.write
    full = True

    def failing(self: Database, requests: list[object]) -> object:
        if full and requests:
            raise StoreFull("no room")
        return write(self, requests)  # type: ignore[arg-type]

    async with opened(path) as store:
        lease, revoked = await store.grant(5), await store.grant(500)
        await store.commit([Put("a", b"", lease), Put("b", b"", revoked), Put("c", b"")])
        monkeypatch.setattr(Database, "write", failing)
        with pytest.raises(StoreFull):
            await store.commit([Delete("c")])
        with pytest.raises(StoreFull):
            await store.revoke(revoked)
        await passes(mock_clock, 8, store)
        assert set((await store.read()).entries) == {"a", "b", "c"}
        assert await store.keep_alive([lease, revoked]) == {lease, revoked}  # they have ended all the same
        with pytest.raises(ValueError, match="not alive"):
            await store.commit([Put("a", b"", lease)])
        full = False
        await passes(mock_clock, 1.5, store)
        assert await keys(store) == {"c"}
