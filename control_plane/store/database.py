"""The embedded store's file: entries, their history, and leases, in SQLite.

All of it is synchronous, for one thread at a time. Must know no trio, no clock and no watches. Invariants: a group of
transactions is one SQLite transaction, written to the disk (fsync) before `write` returns, yet each has its own
revision or its own refusal; revisions rise by one and never go back; the history from `compacted` on is whole.
A process that has it open for writing holds a lock on a file beside it; another is refused.
"""

import fcntl
import os
import sqlite3
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from control_plane.store.base import (
    Compacted,
    Compare,
    Conflict,
    Entry,
    Event,
    Operation,
    Put,
    StoreFull,
    StoreRefused,
    StoreUnavailable,
    View,
)
from control_plane.store.sqlite_faults import damaged, told

APPLICATION_ID = 0x70696C6C  # "pill": tells our files from those of other programs
SCHEMA = 1
SHIFT = 20  # a change's row is its revision and, in the low bits, its place in that revision
WAL_BYTES_MAX = 16 * 1024 * 1024  # kept on the disk once its content is in the main file
COMPACT_ROWS_MAX = 4096  # at most so many rows of history go with one commit
LEASES_MAX = 200_000

_TABLES = """
CREATE TABLE entries (key TEXT PRIMARY KEY, value BLOB NOT NULL CHECK (typeof(value) = 'blob'),
    revision INTEGER NOT NULL, lease INTEGER NOT NULL);
CREATE INDEX entries_by_lease ON entries (lease) WHERE lease <> 0;
CREATE TABLE history (id INTEGER PRIMARY KEY, key TEXT NOT NULL, value BLOB, lease INTEGER NOT NULL);
CREATE TABLE leases (id INTEGER PRIMARY KEY AUTOINCREMENT, ttl_s REAL NOT NULL);
CREATE TABLE state (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
INSERT INTO state VALUES ('revision', 1), ('compacted', 1);
"""


@dataclass(frozen=True, slots=True)
class Transaction:
    operations: Sequence[Operation]
    compares: Sequence[Compare]


@dataclass(frozen=True, slots=True)
class Grant:
    ttl_s: float


@dataclass(frozen=True, slots=True)
class Revoke:
    lease: int


@dataclass(frozen=True, slots=True)
class Compact:
    revision: int


Request = Transaction | Grant | Revoke | Compact


@dataclass(frozen=True, slots=True)
class Done:
    """What became of one request: `result` is a revision or, of a grant, the lease; `error`: it changed nothing."""

    result: int
    error: Exception | None = None
    events: tuple[Event, ...] = ()


@dataclass(frozen=True, slots=True)
class Bounds:
    """`bytes_max` is that of the whole file; the others are those of the history."""

    bytes_max: int = 2 * 1024**3
    history_rows_max: int = 50_000
    history_bytes_max: int = 128 * 1024 * 1024


class Database:
    """`write` and the others may raise StoreFull, StoreRefused (damaged) and StoreUnavailable."""

    def __init__(self, path: Path, bounds: Bounds, *, read_only: bool = False) -> None:
        self.path = path
        self._bounds = bounds
        self._lock = -1
        with told(path):
            if read_only:
                if not path.exists():
                    raise StoreRefused(f"{path}: there is no such store")
            else:
                self._prepare_files()
            try:
                self._connection = self._connect(read_only)
            except BaseException:
                self._unlock()
                raise

    def _prepare_files(self) -> None:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(_beside(self.path, ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(self._lock, 20, 0).decode("ascii", "replace").strip()
            os.close(self._lock)
            by = f"process {holder}" if holder.isdigit() else "another process"
            raise StoreUnavailable(
                f"{self.path} is in use by {by}; an embedded store serves one control plane: stop that one, or use "
                "etcd for several"
            ) from None
        try:
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, str(os.getpid()).encode(), 0)
        except OSError:
            pass  # a full disk: the lock holds without the number
        # SQLite gives its other files the rights of this one.
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if stat.S_IMODE(os.fstat(descriptor).st_mode) & 0o077:
                os.fchmod(descriptor, 0o600)
        finally:
            os.close(descriptor)  # before SQLite opens it: closing it later would drop SQLite's own locks

    def _connect(self, read_only: bool) -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode=rw", uri=True, isolation_level=None, check_same_thread=False
        )
        try:
            connection.execute("PRAGMA busy_timeout = 5000")
            self._check_kind(connection, empty_is_fine=not read_only)
            if read_only:
                connection.execute("PRAGMA query_only = ON")
                return connection
            if connection.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
                raise StoreRefused(f"{self.path}: this file system cannot hold an embedded store (no WAL)")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute(f"PRAGMA journal_size_limit = {WAL_BYTES_MAX}")
            page_bytes = connection.execute("PRAGMA page_size").fetchone()[0]
            connection.execute(f"PRAGMA max_page_count = {max(1, self._bounds.bytes_max // page_bytes)}")
            if not connection.execute("PRAGMA user_version").fetchone()[0]:
                marks = f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA};"
                connection.executescript(f"BEGIN IMMEDIATE; {_TABLES} {marks} COMMIT;")
                _sync_directory(self.path.parent)
            problem = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if problem != "ok":
                raise StoreRefused(damaged(self.path, problem))
            self._load(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _check_kind(self, connection: sqlite3.Connection, empty_is_fine: bool) -> None:
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        schema = connection.execute("PRAGMA user_version").fetchone()[0]
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if empty_is_fine and not tables and not application and not schema:
            return
        if application != APPLICATION_ID:
            raise StoreRefused(f"{self.path} is no store of pillion (another program's database?); name another file")
        if schema != SCHEMA:
            raise StoreRefused(
                f"{self.path} has format {schema}, written by {'a newer' if schema > SCHEMA else 'another'} pillion "
                f"(this one reads format {SCHEMA}); run that version, or restore a backup into a new file"
            )
        if not tables >= {"entries", "history", "leases", "state"}:
            raise StoreRefused(damaged(self.path, "a table is missing"))

    def _load(self, connection: sqlite3.Connection) -> None:
        state = dict(connection.execute("SELECT name, value FROM state"))
        newest = connection.execute("SELECT max(revision) FROM entries").fetchone()[0] or 0
        if not {"revision", "compacted"} <= state.keys() or newest > state["revision"]:
            raise StoreRefused(damaged(self.path, "its revision is not known"))
        self.revision: int = state["revision"]
        self.compacted: int = state["compacted"]  # the oldest revision of which all changes are kept
        self._history_rows, self._history_bytes = connection.execute(
            "SELECT count(*), coalesce(sum(length(key) + coalesce(length(value), 0)), 0) FROM history"
        ).fetchone()

    def leases(self) -> dict[int, float]:
        with told(self.path):
            return dict(self._connection.execute("SELECT id, ttl_s FROM leases"))

    # -- reading

    def get(self, key: str) -> Entry | None:
        with told(self.path):
            return self._get(key)

    def _get(self, key: str) -> Entry | None:
        row = self._connection.execute("SELECT value, revision, lease FROM entries WHERE key = ?", (key,)).fetchone()
        return Entry(key, *row) if row else None

    def read(self, prefix: str) -> View:
        with told(self.path), self._snapshot():
            revision = self._connection.execute("SELECT value FROM state WHERE name = 'revision'").fetchone()[0]
            rows = self._connection.execute(
                f"SELECT key, value, revision, lease FROM entries WHERE {_under(prefix)} ORDER BY key",  # noqa: S608
                _range(prefix),
            )
            return View(revision, {row[0]: Entry(*row) for row in rows})

    def changes(
        self, prefix: str, after: int, until: int, events_max: int, bytes_max: int
    ) -> tuple[int, tuple[Event, ...]]:
        """What happened after `after`, whole revisions, and the revision that this reaches: `until`, or less where
        that is too much at once. Raises Compacted."""
        if after + 1 < self.compacted:
            raise compacted(after, self.compacted)
        found: list[Event] = []
        size = 0
        last = after
        with told(self.path):
            rows = self._connection.execute(
                f"SELECT id, key, value, lease FROM history WHERE id >= ? AND id < ? AND {_under(prefix)} "  # noqa: S608
                "ORDER BY id",
                ((after + 1) << SHIFT, (until + 1) << SHIFT, *_range(prefix)),
            )
            for row, key, value, lease in rows:
                revision = row >> SHIFT
                if revision != last and (len(found) >= events_max or size >= bytes_max):
                    rows.close()
                    return last, tuple(found)
                last = revision
                found.append(Event(key, None if value is None else Entry(key, value, revision, lease)))
                size += len(key) + len(value or b"")
        return until, tuple(found)

    @contextmanager
    def _snapshot(self) -> Iterator[None]:
        self._connection.execute("BEGIN")
        try:
            yield
        finally:
            self._connection.rollback()

    # -- writing

    def write(self, requests: Sequence[Request]) -> list[Done]:
        """Do all of them, in their order, and make them durable. What it raises, it raises for all: nothing was done
        (or, StoreUnavailable, perhaps)."""
        try:
            return self._write(requests)
        except StoreFull:
            # What the log holds may go into the main file, where there is room that was freed; then the log begins
            # again from its start instead of growing.
            with told(self.path):
                self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
            return self._write(requests)

    def _write(self, requests: Sequence[Request]) -> list[Done]:
        kept = (self.revision, self.compacted, self._history_rows, self._history_bytes)
        with told(self.path):
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                done = [self._do(request) for request in requests]
                if (self.revision, self.compacted) != kept[:2]:
                    self._bound_history()
                    self._connection.executemany(
                        "UPDATE state SET value = ? WHERE name = ?",
                        ((self.revision, "revision"), (self.compacted, "compacted")),
                    )
                self._connection.execute("COMMIT")
            except BaseException:
                self.revision, self.compacted, self._history_rows, self._history_bytes = kept
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
        return done

    def _do(self, request: Request) -> Done:
        match request:
            case Transaction():
                return self._transact(request)
            case Grant(ttl_s):
                if self._connection.execute("SELECT count(*) FROM leases").fetchone()[0] >= LEASES_MAX:
                    return Done(0, StoreFull(f"there are {LEASES_MAX} leases, the most that an embedded store keeps"))
                lease = self._connection.execute("INSERT INTO leases (ttl_s) VALUES (?)", (ttl_s,)).lastrowid
                assert lease
                return Done(lease)
            case Revoke(lease):
                keys = self._connection.execute("SELECT key FROM entries WHERE lease = ? ORDER BY key", (lease,))
                events = tuple(Event(key, None) for (key,) in keys.fetchall())
                self._connection.execute("DELETE FROM leases WHERE id = ?", (lease,))
                return self._record(events)
            case Compact(revision):
                if revision > self.revision:
                    return Done(self.revision, ValueError(f"revision {revision} is yet to come (now: {self.revision})"))
                self._forget(revision)
                return Done(self.revision)

    def _transact(self, transaction: Transaction) -> Done:
        found: dict[str, Entry | None] = {}
        for compare in transaction.compares:
            entry = self._get(compare.key)
            if (entry.revision if entry else 0) != compare.revision:
                found[compare.key] = entry
        if found:
            return Done(self.revision, Conflict(found))
        revision = self.revision + 1
        events = []
        for operation in transaction.operations:
            if isinstance(operation, Put):
                if operation.lease and not self._is_alive(operation.lease):
                    return Done(self.revision, lease_gone(operation.lease))
                entry = Entry(operation.key, bytes(operation.value), revision, operation.lease)
                events.append(Event(operation.key, entry))
            elif self._get(operation.key) is not None:
                events.append(Event(operation.key, None))
        return self._record(tuple(events))

    def _is_alive(self, lease: int) -> bool:
        return self._connection.execute("SELECT 1 FROM leases WHERE id = ?", (lease,)).fetchone() is not None

    def _record(self, events: tuple[Event, ...]) -> Done:
        if not events:
            return Done(self.revision)
        assert len(events) < 1 << SHIFT
        self.revision += 1
        for place, event in enumerate(events):
            entry = event.entry
            if entry is None:
                self._connection.execute("DELETE FROM entries WHERE key = ?", (event.key,))
            else:
                self._connection.execute(
                    "INSERT INTO entries (key, value, revision, lease) VALUES (?1, ?2, ?3, ?4) "
                    "ON CONFLICT (key) DO UPDATE SET value = ?2, revision = ?3, lease = ?4",
                    (entry.key, entry.value, entry.revision, entry.lease),
                )
            value, lease = (None, 0) if entry is None else (entry.value, entry.lease)
            self._connection.execute(
                "INSERT INTO history (id, key, value, lease) VALUES (?, ?, ?, ?)",
                (self.revision << SHIFT | place, event.key, value, lease),
            )
            self._history_rows += 1
            self._history_bytes += len(event.key) + len(value or b"")
        return Done(self.revision, None, events)

    # -- forgetting

    def _bound_history(self) -> None:
        """Drop the oldest revisions when the history has outgrown its bounds; down to seven eighths of them, so that
        this is seldom, and a bounded number of rows at a time, so that no commit waits long."""
        bounds = self._bounds
        if self._history_rows <= bounds.history_rows_max and self._history_bytes <= bounds.history_bytes_max:
            return
        rows_left, bytes_left = self._history_rows, self._history_bytes
        cut = self.compacted
        for row, size in self._connection.execute(
            "SELECT id, length(key) + coalesce(length(value), 0) FROM history ORDER BY id LIMIT ?", (COMPACT_ROWS_MAX,)
        ):
            if rows_left <= bounds.history_rows_max * 7 // 8 and bytes_left <= bounds.history_bytes_max * 7 // 8:
                break
            rows_left -= 1
            bytes_left -= size
            cut = (row >> SHIFT) + 1
        self._forget(min(cut, self.revision))

    def _forget(self, revision: int) -> None:
        if revision <= self.compacted:
            return
        rows, size = self._connection.execute(
            "SELECT count(*), coalesce(sum(length(key) + coalesce(length(value), 0)), 0) FROM history WHERE id < ?",
            (revision << SHIFT,),
        ).fetchone()
        self._connection.execute("DELETE FROM history WHERE id < ?", (revision << SHIFT,))
        self._history_rows -= rows
        self._history_bytes -= size
        self.compacted = revision

    # -- the end

    def close(self) -> None:
        try:
            with told(self.path):
                self._connection.close()
        finally:
            self._unlock()

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def compacted(after: int, oldest: int) -> Compacted:
    return Compacted(f"the changes after revision {after} are no longer kept (the oldest kept are of {oldest})")


def lease_gone(lease: int) -> ValueError:
    return ValueError(f"lease {lease} is not alive")


def _under(prefix: str) -> str:
    return "key >= ? AND key < ?" if prefix else "TRUE"


def _range(prefix: str) -> tuple[str, ...]:
    """The keys that begin with a prefix, as a half-open range: keys are ASCII, and compare by their bytes."""
    return (prefix, prefix[:-1] + chr(ord(prefix[-1]) + 1)) if prefix else ()


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
