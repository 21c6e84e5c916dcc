"""The store: what every control plane keeps, behind one interface.

A map of text keys to bytes with one revision that every commit raises, compare-and-set transactions, watches of a
prefix that miss nothing, and leases. It is etcd's model (the embedded store gives the same), so that going from one to
the other is one flag. Must not know what the keys mean.
Invariants: what `commit` returned is durable; a `View` is of one revision; the batches of a watch are in order of their
revisions, never twice, never with a gap (`Compacted` where the past it asks for is gone), and never split a revision.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

KEY_LENGTH_MAX = 512
VALUE_BYTES_MAX = 1024 * 1024
OPERATIONS_MAX = 128  # in one transaction, compares included; etcd's own default
TRANSACTION_BYTES_MAX = 1_400_000  # keys and values together; etcd takes requests of 1.5 MiB


class StoreError(Exception):
    """The store did not do what was asked; the text says why and what to do."""


class StoreUnavailable(StoreError):
    """It cannot be reached, or did not answer in time: worth trying again. A commit may or may not have happened."""


class StoreRefused(StoreError):
    """It will not serve us (password, certificate, rights): trying again changes nothing."""


class StoreFull(StoreError):
    """No space is left (a disk, a quota): reads go on, commits fail until somebody makes room."""


class Compacted(StoreError):
    """The revision asked for is no longer kept: read everything again."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One key at one revision. `revision` is that of its last change; `lease` 0: it lives for ever."""

    key: str
    value: bytes
    revision: int
    lease: int = 0


class Conflict(StoreError):
    """A compare did not hold; nothing was changed. `found` has what is there instead, by key."""

    def __init__(self, found: Mapping[str, Entry | None]) -> None:
        super().__init__(f"changed meanwhile: {', '.join(sorted(found)) or 'another key'}")
        self.found = found


@dataclass(frozen=True, slots=True)
class View:
    """All entries under a prefix at one revision of the store."""

    revision: int
    entries: Mapping[str, Entry]


@dataclass(frozen=True, slots=True)
class Event:
    """`entry` None: the key was deleted, or its lease ended."""

    key: str
    entry: Entry | None


@dataclass(frozen=True, slots=True)
class Batch:
    """Everything that happened under the prefix, from the last batch up to and including `revision`."""

    revision: int
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class Compare:
    """Holds if the key's last change was at this revision; 0: if there is no such key."""

    key: str
    revision: int


@dataclass(frozen=True, slots=True)
class Put:
    key: str
    value: bytes
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Delete:
    key: str


Operation = Put | Delete


class Store(ABC):
    """Every method may raise StoreUnavailable, StoreRefused or StoreFull. Keys are relative: an implementation that
    shares a database with others puts its own prefix before them. Cancelling a call is safe; a cancelled commit may or
    may not have happened."""

    @abstractmethod
    async def get(self, key: str) -> Entry | None: ...

    @abstractmethod
    async def read(self, prefix: str = "") -> View:
        """All entries whose key begins with `prefix`, at one revision."""

    @abstractmethod
    async def commit(self, operations: Sequence[Operation], compares: Sequence[Compare] = ()) -> int:
        """Do all of it or nothing; the revision. Raises Conflict. ValueError: over a limit of this module, a key named
        twice, or a lease that is not alive. An empty transaction is the current revision."""

    @abstractmethod
    def watch(self, prefix: str, after: int) -> AbstractAsyncContextManager[AsyncIterator[Batch]]:
        """What happens after revision `after`, for ever. Lost connections are made again without a gap; raises
        Compacted (from the iteration) where that cannot be. A slow reader costs the store nothing: it is told
        Compacted once it is too far behind."""

    @abstractmethod
    async def grant(self, ttl_s: float) -> int:
        """A new lease. Its keys are deleted when nobody has kept it alive for `ttl_s` (rounded up to seconds)."""

    @abstractmethod
    async def keep_alive(self, leases: Sequence[int]) -> frozenset[int]:
        """Renew many leases at once; returns those that are gone."""

    @abstractmethod
    async def revoke(self, lease: int) -> None:
        """End a lease and delete its keys now. One that is gone already is no error."""

    @abstractmethod
    async def compact(self, revision: int) -> None:
        """Forget what was before this revision; the present is untouched."""

    @abstractmethod
    async def aclose(self) -> None: ...

    @property
    @abstractmethod
    def description(self) -> str:
        """For people: which kind, and where; without secrets."""


def check_transaction(operations: Sequence[Operation], compares: Sequence[Compare]) -> None:
    """Raises ValueError for what no implementation takes."""
    if len(operations) + len(compares) > OPERATIONS_MAX:
        raise ValueError(f"a transaction holds at most {OPERATIONS_MAX} operations and compares")
    keys = [operation.key for operation in operations]
    if len(set(keys)) != len(keys):
        raise ValueError("a transaction changes a key once")
    for key in (*keys, *(compare.key for compare in compares)):
        check_key(key)
    size = sum(map(len, keys))
    for operation in operations:
        if isinstance(operation, Put):
            size += len(operation.value)
            if len(operation.value) > VALUE_BYTES_MAX:
                raise ValueError(f"{operation.key}: a value holds at most {VALUE_BYTES_MAX} bytes")
    if size > TRANSACTION_BYTES_MAX:
        raise ValueError(f"a transaction holds at most {TRANSACTION_BYTES_MAX} bytes")


def check_key(key: str) -> None:
    if not key or len(key) > KEY_LENGTH_MAX or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"not a key: {key[:60]!r}")
