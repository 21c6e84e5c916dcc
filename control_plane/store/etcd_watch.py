"""A watch on etcd that goes on over lost connections, silent members and slow readers.

One stream at a time: its thread feeds a bounded inbox. Must not know what is stored. Invariants: `position` is the last
revision that is in the inbox or with the reader, whole; each stream begins there, so nothing is missed, and what is not
after it is dropped, so nothing comes twice; a stream that the reader does not keep up with is ended and taken up again
once there is room, so it costs the store nothing.
"""

import queue
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import trio

from control_plane.store.base import Batch, Compacted, Entry, Event, StoreError, StoreRefused, StoreUnavailable
from control_plane.store.etcd_cluster import Cluster, Member, metadata
from control_plane.store.etcd_faults import Rejected
from control_plane.store.etcd_package import grpc, progress_request, rpc

INBOX_BATCHES_MAX = 512
INBOX_BYTES_MAX = 16 * 1024 * 1024
TICK_S = 1.5  # how often a stream is asked for a sign of life
SILENT_S = 5.0  # without any: it is given up
REREAD_S = 10.0  # how often the store is asked whether the watch missed something
BEHIND_S = 4.0  # what the store has may be missing for so long
PAUSE_S, PAUSE_MAX_S = 0.05, 1.0
REVISION_MAX = 2**63 - 1


class Inbox(AsyncIterator[Batch]):
    """What the reader has not taken yet, then the error that ended the watch."""

    def __init__(self) -> None:
        self._batches: deque[tuple[Batch, int]] = deque()
        self._bytes = 0
        self._error: StoreError | None = None
        self._changed = trio.Event()

    @property
    def full(self) -> bool:
        return len(self._batches) >= INBOX_BATCHES_MAX or self._bytes >= INBOX_BYTES_MAX

    def put(self, batch: Batch, size: int) -> None:
        self._batches.append((batch, size))
        self._bytes += size
        self._tell()

    def end(self, error: StoreError) -> None:
        if self._error is None:
            self._error = error
            self._tell()

    async def room(self) -> None:
        """Until half of it is free."""
        while len(self._batches) * 2 > INBOX_BATCHES_MAX or self._bytes * 2 > INBOX_BYTES_MAX:
            await self._changed.wait()

    async def __anext__(self) -> Batch:
        await trio.lowlevel.checkpoint()
        while not self._batches:
            if self._error is not None:
                raise self._error
            await self._changed.wait()
        batch, size = self._batches.popleft()  # no checkpoint after this: a cancelled reader loses nothing
        self._bytes -= size
        self._tell()
        return batch

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


class Watch:
    """`start` and `end`: the range of keys, whole; `to_key`: from a whole key to the caller's."""

    def __init__(self, cluster: Cluster, start: bytes, end: bytes, after: int, decode: Callable[[Any], Event]) -> None:
        self.inbox = Inbox()
        self.scope = trio.CancelScope()
        self.position = after
        self.cluster = cluster
        self.start, self.end = start, end
        self.decode = decode
        self.highest = 0  # the newest revision of the store that we have seen
        self.stream: _Stream | None = None

    async def run(self) -> None:
        with self.scope:
            try:
                await self._run()
            except StoreError as exc:
                self.inbox.end(exc)
            finally:
                self.inbox.end(StoreUnavailable("the watch has ended"))

    async def _run(self) -> None:
        pause = PAUSE_S
        refusals = 0
        while True:
            await self.inbox.room()
            stream = self.stream = _Stream(self)
            try:
                await stream.run()
            except StoreUnavailable:
                if self.cluster.closed:
                    raise
            if stream.refused:  # once can be a token that is not good any more
                refusals += 1
                if refusals > 1:
                    raise StoreRefused(f"etcd does not let us watch: {stream.refused}")
            elif stream.opened:
                refusals = 0
            if stream.told:
                pause = PAUSE_S
            if not self.inbox.full:
                await trio.sleep(pause)
                pause = min(2 * pause, PAUSE_MAX_S)

    async def newest(self, min_revision: int = 0) -> tuple[Any, Member]:
        """A linearizable answer: the store's revision, and one key, if there is one changed since `min_revision`.
        Raises Compacted where the store has forgotten what it said before: a backup was restored, or it is another."""
        known = self.highest  # before we ask: what we hear while the answer is under way may be newer than it
        request = rpc.RangeRequest(key=self.start, limit=1, keys_only=True)
        if min_revision:
            request.range_end = self.end
            request.min_mod_revision = min_revision
        try:
            answer, member = await self.cluster.call_where(lambda client: client.kvstub.Range, request)
        except Rejected as exc:
            raise StoreUnavailable(f"etcd: {exc.details}") from None
        if answer.header.revision < known:
            raise Compacted(f"the store went back to revision {answer.header.revision}; it was at {known}")
        self.highest = max(self.highest, answer.header.revision)
        return answer, member


class _Stream:
    """One gRPC stream of a watch, to one member."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.member: Member | None = None
        self.call: Any = None
        self.requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.heard_at = 0.0
        self.opened = False
        self.told = False  # events came
        self.refused = ""
        self.over = False
        self.error: StoreError | None = None
        self.token: str | None = None

    async def run(self) -> None:
        """Until it is lost, or the inbox is full. Raises StoreError where the watch is at its end."""
        watch = self.watch
        _, self.member = await watch.newest()
        member = self.member
        self.token = await watch.cluster.token(member)
        create = rpc.WatchCreateRequest(
            key=watch.start,
            range_end=watch.end,
            # From the last one that we have: compaction at the very revision that we want first may have dropped what
            # was deleted in it, and etcd would not tell.
            start_revision=min(max(watch.position, 1), REVISION_MAX),
            progress_notify=True,
        )
        self.requests.put(rpc.WatchRequest(create_request=create))
        self.heard_at = trio.current_time()
        await watch.cluster.connect(member)
        stub = rpc.WatchStub(member.client.channel)
        try:
            try:
                self.call = stub.Watch(iter(self.requests.get, None), metadata=metadata(self.token))
            except ValueError:
                raise StoreUnavailable("the store is closed") from None
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._guard)
                limiter = watch.cluster.watch_limiter
                await trio.to_thread.run_sync(self._pump, limiter=limiter, abandon_on_cancel=True)
                nursery.cancel_scope.cancel()
        finally:
            self._end()
            self.requests.put(None)  # the thread of gRPC that sends requests
        if self.error is not None:
            raise self.error

    def _end(self) -> None:
        self.over = True
        if self.call is not None:
            self.call.cancel()

    def _lost(self) -> None:
        assert self.member is not None
        self.watch.cluster.blame(self.member)
        self._end()

    def _pump(self) -> None:
        """In a worker thread. The call ends it: by the server, or because it was cancelled."""
        try:
            for response in self.call:
                batch, size = self._batch(response)
                if not trio.from_thread.run_sync(self._deliver, response, batch, size):
                    return
        except grpc.RpcError as exc:
            trio.from_thread.run_sync(self._ended, exc)

    def _batch(self, response: Any) -> tuple[Batch | None, int]:
        """What is new in it, whole revisions: etcd splits one only for those that ask for fragments."""
        position = self.watch.position
        events = [event for event in response.events if event.kv.mod_revision > position]
        if not events:
            return None, 0
        size = sum(len(event.kv.key) + len(event.kv.value) for event in events)
        return Batch(events[-1].kv.mod_revision, tuple(self.watch.decode(event) for event in events)), size

    def _deliver(self, response: Any, batch: Batch | None, size: int) -> bool:
        """False: no more of this stream."""
        if self.over:
            return False
        watch = self.watch
        self.heard_at = trio.current_time()
        if response.canceled:
            self._cancelled_by_server(response)
            return False
        if response.created:
            self.opened = True
        watch.highest = max(watch.highest, response.header.revision)
        if batch is not None:
            self.told = True
            watch.position = batch.revision
            watch.inbox.put(batch, size)
            return not watch.inbox.full
        if response.watch_id >= 0 and not response.created and not response.events:
            # etcd's own report every ten minutes: all up to there has been told. Answers to our requests (id -1) do
            # not promise that before 3.4.25 and 3.5.8, so they are signs of life only.
            watch.position = max(watch.position, response.header.revision)
        return True

    def _cancelled_by_server(self, response: Any) -> None:
        reason = response.cancel_reason
        if response.compact_revision:
            at = response.compact_revision
            self.error = Compacted(f"the store keeps nothing before revision {at}; {self.watch.position} was asked for")
        elif "permission denied" in reason or "auth token" in reason or "auth store" in reason:
            self.refused = reason
            self.watch.cluster.forget(self.token)
        self._lost()

    def _ended(self, exc: Any) -> None:
        if self.over:
            return
        assert self.member is not None
        failure = self.watch.cluster.failure(self.member, exc)
        if isinstance(failure, Rejected) and "larger than max" in failure.details.lower():
            self.error = Compacted("more happened than fits into one message; read everything again")
        elif isinstance(failure, Rejected):
            self.refused = failure.details
            self.watch.cluster.forget(self.token)
        elif isinstance(failure, StoreRefused):
            self.error = failure
        self._lost()

    async def _guard(self) -> None:
        """A stream can stay open and tell nothing: the member is frozen, was cut off, or has lost the watch."""
        reread_at = trio.current_time() + REREAD_S
        while True:
            await trio.sleep(TICK_S)
            if trio.current_time() - self.heard_at > SILENT_S:
                self._lost()
                return
            self.requests.put(progress_request())
            if trio.current_time() >= reread_at:
                try:
                    await self._reread()
                except StoreUnavailable:
                    pass  # so does the stream fail, or it goes on
                except StoreError as exc:
                    self.error = exc
                    self._end()
                    return
                reread_at = trio.current_time() + REREAD_S

    async def _reread(self) -> None:
        watch = self.watch
        answer, _ = await watch.newest()
        position = watch.position
        if answer.header.revision <= position:
            return
        answer, _ = await watch.newest(position + 1)
        missing = max((kv.mod_revision for kv in answer.kvs), default=0)
        deadline = trio.current_time() + BEHIND_S
        while watch.position < missing:
            if trio.current_time() > deadline:
                self._lost()
                return
            await trio.sleep(0.2)


def decoder(prefix: bytes) -> Callable[[Any], Event]:
    """From an event of etcd to ours; its key without the prefix."""

    def decode(event: Any) -> Event:
        entry = entry_of(event.kv, len(prefix))
        return Event(entry.key, None if event.type == event.DELETE else entry)

    return decode


def entry_of(kv: Any, prefix_length: int) -> Entry:
    # Keys are ASCII; one that somebody else put there is shown so that people can read it.
    key = kv.key[prefix_length:].decode("utf-8", "backslashreplace")
    return Entry(key, kv.value, kv.mod_revision, kv.lease)
