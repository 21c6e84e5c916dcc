"""A store in memory, for tests on virtual time. It passes the suite that the real ones pass."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import trio

from control_plane.store.base import (
    Batch,
    Compacted,
    Compare,
    Conflict,
    Delete,
    Entry,
    Event,
    Operation,
    Put,
    Store,
    StoreError,
    StoreUnavailable,
    View,
    check_key,
    check_transaction,
)


class MemoryStore(Store):
    def __init__(self) -> None:
        self.revision = 1
        self.entries: dict[str, Entry] = {}
        self.past: list[tuple[int, tuple[Event, ...]]] = []
        self.compacted = 0
        self.leases: dict[int, tuple[float, float]] = {}  # ttl, ends
        self.away = False
        self.closed = False
        self.commits = 0
        self._leases = 0
        self._moved = trio.Event()

    @property
    def description(self) -> str:
        return "a store in memory"

    async def _turn(self) -> None:
        await trio.lowlevel.checkpoint()
        if self.closed:
            raise StoreError("the store is closed")
        if self.away:
            raise StoreUnavailable("the store is away")
        self._expire()

    def _expire(self) -> None:
        now = trio.current_time()
        for lease in [lease for lease, (_, ends) in self.leases.items() if ends <= now]:
            self._end(lease)

    def _end(self, lease: int) -> None:
        del self.leases[lease]
        keys = [key for key, entry in self.entries.items() if entry.lease == lease]
        if keys:
            self._write([Delete(key) for key in keys])

    def _write(self, operations: Sequence[Operation]) -> int:
        events = []
        revision = self.revision + 1
        for operation in operations:
            if isinstance(operation, Put):
                entry = Entry(operation.key, operation.value, revision, operation.lease)
                self.entries[operation.key] = entry
                events.append(Event(operation.key, entry))
            elif self.entries.pop(operation.key, None) is not None:
                events.append(Event(operation.key, None))
        if events:
            self.revision = revision
            self.past.append((revision, tuple(events)))
            self._moved.set()
            self._moved = trio.Event()
        return self.revision

    async def get(self, key: str) -> Entry | None:
        check_key(key)
        await self._turn()
        return self.entries.get(key)

    async def read(self, prefix: str = "") -> View:
        await self._turn()
        return View(self.revision, {key: self.entries[key] for key in sorted(self.entries) if key.startswith(prefix)})

    async def commit(self, operations: Sequence[Operation], compares: Sequence[Compare] = ()) -> int:
        check_transaction(operations, compares)
        await self._turn()
        self.commits += 1
        found = {}
        for compare in compares:
            entry = self.entries.get(compare.key)
            if (entry.revision if entry is not None else 0) != compare.revision:
                found[compare.key] = entry
        if found:
            raise Conflict(found)
        for operation in operations:
            if isinstance(operation, Put) and operation.lease and operation.lease not in self.leases:
                raise ValueError(f"{operation.key}: no such lease")
        return self._write(operations)

    @asynccontextmanager
    async def watch(self, prefix: str, after: int) -> AsyncIterator[AsyncIterator[Batch]]:
        await self._turn()
        yield _Watch(self, prefix, after)

    async def grant(self, ttl_s: float) -> int:
        await self._turn()
        if not 0 < ttl_s < float("inf"):
            raise ValueError("a lease lives for some seconds")
        self._leases += 1
        ttl_s = float(-(-ttl_s // 1))
        self.leases[self._leases] = (ttl_s, trio.current_time() + ttl_s)
        return self._leases

    async def keep_alive(self, leases: Sequence[int]) -> frozenset[int]:
        await self._turn()
        now = trio.current_time()
        for lease in leases:
            if lease in self.leases:
                self.leases[lease] = (self.leases[lease][0], now + self.leases[lease][0])
        return frozenset(lease for lease in leases if lease not in self.leases)

    async def revoke(self, lease: int) -> None:
        await self._turn()
        if lease in self.leases:
            self._end(lease)

    async def compact(self, revision: int) -> None:
        await self._turn()
        if revision > self.revision:
            raise ValueError(f"revision {revision} is of the future")
        self.compacted = max(self.compacted, revision)
        self.past = [each for each in self.past if each[0] > self.compacted]

    async def aclose(self) -> None:
        self.closed = True
        self._moved.set()


class _Watch:
    def __init__(self, store: MemoryStore, prefix: str, after: int) -> None:
        self.store, self.prefix, self.after = store, prefix, after

    def __aiter__(self) -> "_Watch":
        return self

    async def __anext__(self) -> Batch:
        store = self.store
        while True:
            await store._turn()
            if self.after < store.compacted:
                raise Compacted(f"revision {self.after} is no longer kept")
            for revision, events in store.past:
                ours = tuple(event for event in events if event.key.startswith(self.prefix))
                if revision > self.after and ours:
                    self.after = revision
                    return Batch(revision, ours)
            self.after = max(self.after, store.revision)
            ends = min((ends for _, ends in store.leases.values()), default=float("inf"))
            with trio.move_on_at(ends):
                await store._moved.wait()
