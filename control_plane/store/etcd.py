"""The store on etcd: several control planes share one, and any of them may be killed.

Must know nothing of what the keys mean; how a cluster is reached is etcd_cluster's, how a watch lives is etcd_watch's.
Invariants: those of `base`; all keys are under `prefix`, and nothing else of the database is read or written
(compaction aside, which is the whole database's).
"""

import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio

from control_plane.store.base import (
    Batch,
    Compacted,
    Compare,
    Conflict,
    Entry,
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
from control_plane.store.etcd_cluster import TIMEOUT_S, WATCHES_MAX, Cluster
from control_plane.store.etcd_faults import Fault, Rejected
from control_plane.store.etcd_package import rpc
from control_plane.store.etcd_watch import Watch, decoder, entry_of
from control_plane.store.open import EtcdOptions

PAGE_BYTES = 2 * 1024 * 1024  # what a page of a view aims at
PAGE_KEYS_FIRST, PAGE_KEYS_MAX = 100, 10_000  # the first is small: nothing is known of the values then
READS_MAX = 5  # of a view, each begun again because its revision was compacted meanwhile
LEASE_MAX = 2**63 - 1
LEASE_TTL_S_MAX = 9_000_000_000  # etcd's own


class EtcdStore(Store):
    def __init__(self, cluster: Cluster, options: EtcdOptions, nursery: trio.Nursery) -> None:
        self._cluster = cluster
        self._prefix = options.prefix.encode()
        self._user = options.user
        self._nursery = nursery
        self._watches: set[Watch] = set()

    @classmethod
    async def open(
        cls,
        hosts: Sequence[tuple[str, int]],
        options: EtcdOptions,
        nursery: trio.Nursery,
        *,
        timeout_s: float = TIMEOUT_S,
    ) -> "EtcdStore":
        """Connected, signed in and allowed to read, or a StoreError within about `timeout_s`. Watches live in the
        nursery while they are used."""
        cluster = Cluster(hosts, options, timeout_s)
        store = cls(cluster, options, nursery)
        try:
            await cluster.check()
            await store._revision()
        except BaseException:
            await cluster.aclose()
            raise
        return store

    @property
    def description(self) -> str:
        parts = [f"prefix {self._prefix.decode()}", "TLS" if self._cluster.secured else "without TLS"]
        if self._user:
            parts.append(f"user {self._user}")
        return f"etcd at {self._cluster.names} ({', '.join(parts)})"

    # -- reading

    async def get(self, key: str) -> Entry | None:
        check_key(key)
        answer = await self._range(rpc.RangeRequest(key=self._prefix + key.encode()))
        return self._entry(answer.kvs[0]) if answer.kvs else None

    async def read(self, prefix: str = "") -> View:
        for _ in range(READS_MAX):
            try:
                return await self._read(prefix)
            except Compacted:
                continue
        raise StoreUnavailable("etcd is compacted faster than it can be read: let it keep more revisions")

    async def _read(self, prefix: str) -> View:
        key, end = self._span(prefix)
        revision = 0
        limit = PAGE_KEYS_FIRST
        entries: dict[str, Entry] = {}
        while True:
            request = rpc.RangeRequest(key=key, range_end=end, limit=limit, revision=revision)
            try:
                answer = await self._range(request)
            except Rejected as exc:
                if exc.fault is Fault.COMPACTED:
                    raise Compacted(exc.details) from None
                if exc.fault is Fault.TOO_LARGE and limit > 1:
                    limit //= 2
                    continue
                raise StoreError(f"etcd: {exc.details}") from None
            revision = revision or answer.header.revision
            for kv in answer.kvs:
                entry = self._entry(kv)
                entries[entry.key] = entry
            if not answer.more:
                return View(revision, entries)
            key = answer.kvs[-1].key + b"\0"
            limit = max(1, min(PAGE_KEYS_MAX, limit * PAGE_BYTES // max(1, answer.ByteSize())))

    async def _revision(self) -> int:
        answer = await self._range(rpc.RangeRequest(key=self._span("")[0], limit=1, keys_only=True))
        return int(answer.header.revision)

    async def _range(self, request: Any) -> Any:
        return await self._cluster.call(lambda client: client.kvstub.Range, request)

    # -- changing

    async def commit(self, operations: Sequence[Operation], compares: Sequence[Compare] = ()) -> int:
        """StoreUnavailable: it may or may not have happened, and may happen later still; a compare of a key that it
        changes makes it safe to try again."""
        check_transaction(operations, compares)
        if not operations and not compares:
            return await self._revision()
        request = rpc.TxnRequest(
            compare=[self._compare(compare) for compare in compares],
            success=[self._operation(operation) for operation in operations],
            failure=[
                rpc.RequestOp(request_range=rpc.RangeRequest(key=self._prefix + compare.key.encode()))
                for compare in compares
            ],
        )
        try:
            answer = await self._cluster.call(lambda client: client.kvstub.Txn, request, change=bool(operations))
        except Rejected as exc:
            raise self._commit_error(exc, request) from None
        if not answer.succeeded:
            raise Conflict(self._found(answer, compares))
        return int(answer.header.revision)

    def _compare(self, compare: Compare) -> Any:
        return rpc.Compare(
            key=self._prefix + compare.key.encode(),
            target=rpc.Compare.MOD,
            result=rpc.Compare.EQUAL,
            mod_revision=compare.revision,
        )

    def _operation(self, operation: Operation) -> Any:
        key = self._prefix + operation.key.encode()
        if not isinstance(operation, Put):
            return rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=key))
        if not 0 <= operation.lease <= LEASE_MAX:
            raise ValueError(f"{operation.key}: {operation.lease} is no lease")
        return rpc.RequestOp(request_put=rpc.PutRequest(key=key, value=operation.value, lease=operation.lease))

    def _found(self, answer: Any, compares: Sequence[Compare]) -> dict[str, Entry | None]:
        found: dict[str, Entry | None] = {}
        for compare, response in zip(compares, answer.responses, strict=True):
            kvs = response.response_range.kvs
            entry = self._entry(kvs[0]) if kvs else None
            if (entry.revision if entry else 0) != compare.revision:
                found[compare.key] = entry
        return found

    def _commit_error(self, exc: Rejected, request: Any) -> Exception:
        if exc.fault is Fault.LEASE:
            return ValueError("a lease of this transaction is not alive")
        if exc.fault is Fault.TOO_LARGE:
            return ValueError(
                f"a transaction of {request.ByteSize()} bytes is more than this etcd takes (--max-request-bytes, "
                f"--max-txn-ops): {exc.details}"
            )
        return StoreRefused(f"etcd: {exc.details}")

    # -- watching

    @asynccontextmanager
    async def watch(self, prefix: str, after: int) -> AsyncIterator[AsyncIterator[Batch]]:
        start, end = self._span(prefix)
        watch = Watch(self._cluster, start, end, after, decoder(self._prefix))
        if self._cluster.closed:
            raise StoreUnavailable("the store is closed")
        if len(self._watches) >= WATCHES_MAX:
            raise StoreError(f"more than {WATCHES_MAX} watches at once")
        self._watches.add(watch)
        self._nursery.start_soon(watch.run)
        try:
            yield watch.inbox
        finally:
            self._watches.discard(watch)
            watch.scope.cancel()

    # -- leases

    async def grant(self, ttl_s: float) -> int:
        if not (math.isfinite(ttl_s) and 0 < ttl_s <= LEASE_TTL_S_MAX):
            raise ValueError(f"{ttl_s} s is no time to live for a lease")
        request = rpc.LeaseGrantRequest(TTL=math.ceil(ttl_s))
        # Safe to repeat: a lease that nobody knows of ends by itself.
        answer = await self._cluster.call(lambda client: client.leasestub.LeaseGrant, request)
        return int(answer.ID)

    async def keep_alive(self, leases: Sequence[int]) -> frozenset[int]:
        asked = list(dict.fromkeys(leases))
        if not asked:
            return frozenset()
        requests = [rpc.LeaseKeepAliveRequest(ID=lease) for lease in asked]
        answers = await self._cluster.call_streamed(lambda client: client.leasestub.LeaseKeepAlive, requests)
        return frozenset(answer.ID for answer in answers if answer.TTL <= 0)

    async def revoke(self, lease: int) -> None:
        try:
            await self._cluster.call(lambda client: client.leasestub.LeaseRevoke, rpc.LeaseRevokeRequest(ID=lease))
        except Rejected as exc:
            if exc.fault is not Fault.LEASE:
                raise StoreError(f"etcd: {exc.details}") from None

    # -- the rest

    async def compact(self, revision: int) -> None:
        """Of the whole database, also for others who use it."""
        try:
            await self._cluster.call(lambda client: client.kvstub.Compact, rpc.CompactionRequest(revision=revision))
        except Rejected as exc:
            if exc.fault is Fault.FUTURE:
                raise ValueError(f"revision {revision} is in the future") from None
            if exc.fault is not Fault.COMPACTED:
                raise StoreError(f"etcd: {exc.details}") from None

    async def aclose(self) -> None:
        for watch in list(self._watches):
            watch.inbox.end(StoreUnavailable("the store is closed"))
            watch.scope.cancel()
        await self._cluster.aclose()

    # -- keys

    def _span(self, prefix: str) -> tuple[bytes, bytes]:
        """The range of whole keys that begin with it (`range_end` of etcd: exclusive; zero: to the end)."""
        start = self._prefix + prefix.encode()
        stem = start.rstrip(b"\xff")
        end = stem[:-1] + bytes((stem[-1] + 1,)) if stem else b"\0"
        return start or b"\0", end

    def _entry(self, kv: Any) -> Entry:
        return entry_of(kv, len(self._prefix))
