"""The embedded store: one control plane's own, in one file, with nothing to install.

    async with trio.open_nursery() as nursery:
        store = await EmbeddedStore.open(path, nursery)
        ...
        await store.aclose()

Its two tasks (writing, and ending leases) live in the nursery that `open` is given and end with `aclose`. `open` with
`read_only` gives a store that reads beside a running control plane (for backups and for looking), and nothing else.
Must not know what the keys mean, nor SQL (that is `database`, in a worker thread, one call at a time).
Invariants: a commit is on the disk before it is acknowledged, and seen by watches only then; transactions that wait at
the same moment share one write to the disk. Leases are counted by the clock given (monotonic); after a start each has
its whole time again, and so it has where this process itself stood still: nobody could have renewed.
"""

import math
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar, TypeVarTuple

import trio

from control_plane.store.base import (
    Batch,
    Compare,
    Entry,
    Event,
    Operation,
    Put,
    Store,
    StoreError,
    StoreRefused,
    StoreUnavailable,
    View,
    check_key,
    check_transaction,
)
from control_plane.store.database import (
    Bounds,
    Compact,
    Database,
    Done,
    Grant,
    Request,
    Revoke,
    Transaction,
    compacted,
    lease_gone,
)

GROUP_MAX = 256  # requests that share one write to the disk
WAITING_MAX = 1024  # requests that stand in line; further callers wait to get there
RECENT_REVISIONS_MAX = 4096  # what watches get from memory; one further behind reads the file
RECENT_BYTES_MAX = 16 * 1024 * 1024
BATCH_EVENTS_MAX = 4096
BATCH_BYTES_MAX = 4 * 1024 * 1024
TTL_MAX_S = 365 * 86400.0
STOOD_STILL_S = 1.0  # woken so much too late, we did not serve either
RETRY_S = 1.0

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class _Waiting:
    """A request in line, and later what became of it."""

    __slots__ = ("abandoned", "done", "finished", "request")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.finished = trio.Event()
        self.done: Done | None = None
        self.abandoned = False

    def finish(self, done: Done) -> None:
        self.done = done
        self.finished.set()


class _Lease:
    __slots__ = ("deadline", "ttl_s")

    def __init__(self, ttl_s: float, deadline: float) -> None:
        self.ttl_s = ttl_s
        self.deadline = deadline


class _Recent:
    """The last changes, in memory, for all watches together: a slow watch holds nothing."""

    def __init__(self) -> None:
        self._events: dict[int, tuple[Event, ...]] = {}  # by revision, without a gap
        self._size = 0

    def add(self, revision: int, events: tuple[Event, ...]) -> None:
        self._events[revision] = events
        self._size += _size_of(events)
        while len(self._events) > RECENT_REVISIONS_MAX or (self._size > RECENT_BYTES_MAX and len(self._events) > 1):
            self._size -= _size_of(self._events.pop(next(iter(self._events))))

    def changes(self, prefix: str, after: int, until: int) -> tuple[int, tuple[Event, ...]] | None:
        """As Database.changes; None where it is not all here."""
        if after + 1 not in self._events:
            return None
        found: list[Event] = []
        size = 0
        for revision in range(after + 1, until + 1):
            fitting = [event for event in self._events[revision] if event.key.startswith(prefix)]
            if found and fitting and (len(found) >= BATCH_EVENTS_MAX or size >= BATCH_BYTES_MAX):
                return revision - 1, tuple(found)
            found += fitting
            size += _size_of(fitting)
        return until, tuple(found)


def _size_of(events: Sequence[Event]) -> int:
    return sum(len(event.key) + (len(event.entry.value) if event.entry else 0) for event in events)


class EmbeddedStore(Store):
    def __init__(self, path: Path, database: Database, clock: Callable[[], float], read_only: bool) -> None:
        """Use `open`."""
        self._path = path
        self._database = database
        self._clock = clock
        self._read_only = read_only
        self._thread = trio.CapacityLimiter(1)
        self._closed = False
        self._line_in, self._line_out = trio.open_memory_channel[_Waiting](WAITING_MAX)
        self._writer_ended = trio.Event()
        self._tasks = trio.CancelScope()
        self._watchers = trio.lowlevel.ParkingLot()
        self._recent = _Recent()
        self._published = 0  # watches are told up to here
        self._compacted = 0
        self._leases: dict[int, _Lease] = {}
        self._ending: set[int] = set()  # leases that have ended, but not yet on the disk
        self._due = math.inf  # when the first of them ends, as far as `_end_leases` knows
        self._sooner = trio.Event()  # something is due before that

    @classmethod
    async def open(
        cls,
        path: Path,
        nursery: trio.Nursery,
        *,
        clock: Callable[[], float] = trio.current_time,
        bounds: Bounds | None = None,
        read_only: bool = False,
    ) -> Self:
        """Raises StoreUnavailable (somebody else has it), StoreRefused (damaged, foreign, of a newer version, not
        ours to write) and StoreFull."""

        def start() -> tuple[Database, dict[int, float]]:
            database = Database(path, bounds or Bounds(), read_only=read_only)
            try:
                return database, {} if read_only else database.leases()
            except BaseException:
                database.close()
                raise

        database, leases = await trio.to_thread.run_sync(start)
        store = cls(path, database, clock, read_only)
        if not read_only:
            store._published, store._compacted = database.revision, database.compacted
            now = clock()
            store._leases = {lease: _Lease(ttl_s, now + ttl_s) for lease, ttl_s in leases.items()}
            nursery.start_soon(store._run, name=f"store {path}")
        return store

    @property
    def description(self) -> str:
        return f"embedded:{self._path}"

    async def _run(self) -> None:
        with self._tasks:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._end_leases)
                await self._write_what_waits()

    # -- reading

    async def get(self, key: str) -> Entry | None:
        check_key(key)
        return await self._in_thread(self._database.get, key)

    async def read(self, prefix: str = "") -> View:
        if prefix:
            check_key(prefix)
        return await self._in_thread(self._database.read, prefix)

    async def _in_thread(self, work: Callable[[*Ts], T], *args: *Ts) -> T:
        self._check_open()
        return await trio.to_thread.run_sync(work, *args, limiter=self._thread)

    # -- writing

    async def commit(self, operations: Sequence[Operation], compares: Sequence[Compare] = ()) -> int:
        check_transaction(operations, compares)
        for operation in operations:
            if isinstance(operation, Put) and operation.lease and operation.lease not in self._leases:
                raise lease_gone(operation.lease)
        return (await self._submit(Transaction(tuple(operations), tuple(compares)))).result

    async def compact(self, revision: int) -> None:
        await self._submit(Compact(revision))

    async def _submit(self, request: Request) -> Done:
        self._check_open()
        if self._read_only:
            raise StoreRefused(f"{self._path} is open for reading only")
        waiting = _Waiting(request)
        try:
            await self._line_in.send(waiting)
            await waiting.finished.wait()
        except (trio.ClosedResourceError, trio.BrokenResourceError):
            raise self._is_closed() from None
        except trio.Cancelled:
            waiting.abandoned = True
            raise
        done = waiting.done
        assert done
        if done.error:
            raise done.error
        return done

    async def _write_what_waits(self) -> None:
        group: list[_Waiting] = []
        try:
            async for first in self._line_out:
                group = [first, *self._others(GROUP_MAX - 1)]
                await self._write(group)
        finally:  # closed, or cancelled
            self._writer_ended.set()
            for waiting in (*group, *self._others(WAITING_MAX)):
                if not waiting.done:
                    waiting.finish(Done(0, self._is_closed()))
            self._line_out.close()
            self._watchers.unpark_all()

    def _others(self, count: int) -> list[_Waiting]:
        """Those that stand in line now."""
        found: list[_Waiting] = []
        try:
            while len(found) < count:
                found.append(self._line_out.receive_nowait())
        except (trio.WouldBlock, trio.EndOfChannel):
            pass
        return found

    async def _write(self, group: Sequence[_Waiting]) -> None:
        group = [waiting for waiting in group if not waiting.abandoned]
        if not group:
            return
        requests = [waiting.request for waiting in group]
        try:
            results = await trio.to_thread.run_sync(self._database.write, requests, limiter=self._thread)
        except StoreError as error:
            for waiting in group:
                waiting.finish(Done(0, type(error)(str(error))))  # each its own, for its own traceback
            return
        now = self._clock()
        for waiting, done in zip(group, results, strict=True):
            if isinstance(waiting.request, Grant) and not done.error:
                lease = _Lease(waiting.request.ttl_s, now + waiting.request.ttl_s)
                self._leases[done.result] = lease
                if lease.deadline < self._due:
                    self._sooner.set()
            if done.events:
                self._recent.add(done.result, done.events)
            waiting.finish(done)
        self._published, self._compacted = self._database.revision, self._database.compacted
        self._watchers.unpark_all()

    # -- watches

    def watch(self, prefix: str, after: int) -> AbstractAsyncContextManager[AsyncIterator[Batch]]:
        if self._read_only:
            raise StoreRefused(f"{self._path} is open for reading only")
        if prefix:
            check_key(prefix)
        return _Watch(self, prefix, after)

    async def _next_batch(self, prefix: str, after: int) -> Batch:
        """The next one with an event, or one that only says how far we are: its revision is more than `after`."""
        self._check_open()
        while after >= self._published:
            await self._watchers.park()
            self._check_open()
        if after + 1 < self._compacted:
            raise compacted(after, self._compacted)
        until = self._published
        found = self._recent.changes(prefix, after, until)
        if found is None:
            found = await self._in_thread(
                self._database.changes, prefix, after, until, BATCH_EVENTS_MAX, BATCH_BYTES_MAX
            )
        return Batch(*found)

    # -- leases

    async def grant(self, ttl_s: float) -> int:
        if not 0 < ttl_s <= TTL_MAX_S:
            raise ValueError(f"not a time to live: {ttl_s!r} s")
        return (await self._submit(Grant(float(math.ceil(ttl_s))))).result

    async def keep_alive(self, leases: Sequence[int]) -> frozenset[int]:
        await trio.lowlevel.checkpoint()
        self._check_open()
        now = self._clock()
        gone = set()
        for number in leases:
            lease = self._leases.get(number)
            if lease is None:
                gone.add(number)
            else:
                lease.deadline = now + lease.ttl_s
        return frozenset(gone)

    async def revoke(self, lease: int) -> None:
        await trio.lowlevel.checkpoint()
        self._check_open()
        if self._leases.pop(lease, None):
            self._ending.add(lease)
        if lease in self._ending:
            self._sooner.set()  # should this call fail or be cancelled, it is tried again
            await self._submit(Revoke(lease))
            self._ending.discard(lease)

    async def _end_leases(self) -> None:
        retry_at = math.inf
        while True:
            now = self._clock()
            retry_at = min(retry_at, now + RETRY_S) if self._ending else math.inf
            first = min((lease.deadline for lease in self._leases.values()), default=math.inf)
            self._due = due = min(first, retry_at)
            self._sooner = trio.Event()
            with trio.move_on_after(max(0.0, due - now)):
                await self._sooner.wait()
            now = self._clock()
            if now > due + STOOD_STILL_S:
                for lease in self._leases.values():
                    lease.deadline = now + lease.ttl_s
            ended = [number for number, lease in self._leases.items() if lease.deadline <= now]
            for number in ended:
                del self._leases[number]
            self._ending.update(ended)
            if ended or now >= retry_at:
                retry_at = math.inf
                await self._end(sorted(self._ending))

    async def _end(self, leases: Sequence[int]) -> None:
        """Delete them with their keys, together; those that cannot be deleted now (a full disk) are tried again."""

        async def end(lease: int) -> None:
            try:
                await self._submit(Revoke(lease))
            except StoreError:
                return
            self._ending.discard(lease)

        async with trio.open_nursery() as nursery:
            for lease in leases:
                nursery.start_soon(end, lease)

    # -- the end

    async def aclose(self) -> None:
        """What stands in line is still written."""
        first, self._closed = not self._closed, True
        with trio.CancelScope(shield=True):
            if first:
                self._line_in.close()
                if not self._read_only:
                    await self._writer_ended.wait()
                    self._tasks.cancel()
                await trio.to_thread.run_sync(self._database.close, limiter=self._thread)
            else:
                await trio.lowlevel.checkpoint()

    def _check_open(self) -> None:
        if self._closed or self._writer_ended.is_set():
            raise self._is_closed()

    def _is_closed(self) -> StoreUnavailable:
        return StoreUnavailable(f"{self._path}: the store is closed")


class _Watch(AbstractAsyncContextManager[AsyncIterator[Batch]], AsyncIterator[Batch]):
    """A place in the history. It holds no events of its own."""

    def __init__(self, store: EmbeddedStore, prefix: str, after: int) -> None:
        self._store = store
        self._prefix = prefix
        self._after = after
        self._left = False

    async def __aenter__(self) -> AsyncIterator[Batch]:
        await trio.lowlevel.checkpoint()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._left = True

    async def __anext__(self) -> Batch:
        await trio.lowlevel.checkpoint()
        while not self._left:
            batch = await self._store._next_batch(self._prefix, self._after)
            self._after = batch.revision  # no checkpoint from here on: a cancelled call has taken nothing
            if batch.events:
                return batch
        raise StopAsyncIteration
