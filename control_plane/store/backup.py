"""A store in one file, and back: for backups, and for moving by hand.

JSON lines: a head (what this is, when, of which revision), one line an entry in the order of their keys, and a tail
with their number and the SHA-256 of every byte before it. Must not know what the keys mean, but for the one that says
that there is a mesh: a store that is being filled has none until it is whole. Invariants: all is of one revision; keys
that live by a lease are left out, and counted (they are the heartbeat of somebody who is running, and would stay for
ever); nothing is written to a store before the whole file has been checked. The file holds what the store holds (hashes
of tokens, the secret of sticky cookies, no private keys) and is readable by its owner only.
"""

import base64
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

import trio

from control_plane.state.records import META
from control_plane.store.base import (
    VALUE_BYTES_MAX,
    Delete,
    Entry,
    Operation,
    Put,
    Store,
    StoreError,
    StoreFull,
    View,
    check_key,
)

KIND = "pillion store backup"
FORMAT = 1
LINE_BYTES_MAX = 2 * VALUE_BYTES_MAX
OPERATIONS_TOGETHER_MAX = 64
BYTES_TOGETHER_MAX = VALUE_BYTES_MAX  # etcd takes requests of at most 1.5 MiB


class BackupError(StoreError):
    """The file is no backup, or a damaged one, or does not fit the store; says which."""


@dataclass(frozen=True, slots=True)
class Backup:
    """What a file holds. `leased`: keys that were left out."""

    created: float
    source: str
    revision: int
    leased: int
    entries: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class Restored:
    """`leased`: keys that were left out; `removed`: keys that stood in the target and were not in the source."""

    entries: int
    removed: int
    leased: int
    revision: int


# -- to a file


async def backup(store: Store, path: Path, created: float) -> Backup:
    """Write a new file; one that is there is replaced only once the new one is whole. Raises StoreError."""
    view = await store.read()
    held = Backup(created, store.description, view.revision, leased_of(view), unleased(view))
    await trio.to_thread.run_sync(_write, path, held)
    return held


def unleased(view: View) -> dict[str, bytes]:
    return {key: view.entries[key].value for key in sorted(view.entries) if not view.entries[key].lease}


def leased_of(view: View) -> int:
    return sum(1 for entry in view.entries.values() if entry.lease)


def _write(path: Path, held: Backup) -> None:
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with open(descriptor, "wb") as file:
                for line in _lines(held):
                    file.write(line)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        except BaseException:
            os.unlink(draft)
            raise
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise BackupError(f"{path}: cannot be written: {error.strerror}") from error


def _lines(held: Backup) -> Iterator[bytes]:
    digest = hashlib.sha256()
    head = {
        "kind": KIND,
        "format": FORMAT,
        "created": held.created,
        "source": held.source,
        "revision": held.revision,
        "leased": held.leased,
    }
    lines: Iterator[dict[str, Any]] = chain(
        (head,), ({"key": key, **_value_to_json(value)} for key, value in held.entries.items())
    )
    for data in lines:
        line = _line(data)
        digest.update(line)
        yield line
    yield _line({"end": len(held.entries), "sha256": digest.hexdigest()})


def _line(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def _value_to_json(value: bytes) -> dict[str, str]:
    """As text where it is text (all of pillion's records are), so that people can read the file."""
    try:
        return {"text": value.decode()}
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(value).decode()}


# -- from a file


def read_backup(path: Path) -> Backup:
    """All of it, checked. Raises BackupError with the line."""
    try:
        with path.open("rb") as file:
            return _parse(file, path)
    except OSError as error:
        raise BackupError(f"{path}: {error.strerror}") from None


def _parse(file: IO[bytes], path: Path) -> Backup:
    digest = hashlib.sha256()
    head: dict[str, Any] | None = None
    entries: dict[str, bytes] = {}
    number = 0
    while line := file.readline(LINE_BYTES_MAX * 4):
        number += 1
        where = f"{path}:{number}"
        data = _json(line, where)
        if head is None:
            head = _check_head(data, path)
        elif "end" in data:
            if data.get("end") != len(entries) or data.get("sha256") != digest.hexdigest():
                raise BackupError(f"{where}: the checksum does not fit: the file is damaged or was changed")
            if file.read(1):
                raise BackupError(f"{where}: something follows the end of the backup")
            return Backup(head["created"], head["source"], head["revision"], head["leased"], entries)
        else:
            key, value = _entry(data, where)
            if key in entries:
                raise BackupError(f"{where}: {key} stands here a second time")
            entries[key] = value
        digest.update(line)
    raise BackupError(f"{path}: " + ("ends too early: its tail is missing" if head else "is empty"))


def _json(line: bytes, where: str) -> dict[str, Any]:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict) or not line.endswith(b"\n"):
        if where.endswith(":1"):
            raise BackupError(f"{where}: this is no backup of a store")
        raise BackupError(f"{where}: damaged, or cut off")
    return data


def _check_head(data: dict[str, Any], path: Path) -> dict[str, Any]:
    if data.get("kind") != KIND:
        raise BackupError(f"{path}: this is no backup of a store")
    number = data.get("format")
    if type(number) is int and number > FORMAT:
        raise BackupError(f"{path} has format {number}, written by a newer pillion (this one reads up to {FORMAT})")
    wanted: dict[str, type | tuple[type, ...]] = {
        "format": int,
        "created": (int, float),
        "source": str,
        "revision": int,
        "leased": int,
    }
    if number != FORMAT or not all(isinstance(data.get(name), types) for name, types in wanted.items()):
        raise BackupError(f"{path}:1: the head is damaged")
    return data


def _entry(data: dict[str, Any], where: str) -> tuple[str, bytes]:
    key, text, coded = data.get("key"), data.get("text"), data.get("base64")
    try:
        if not isinstance(key, str):
            raise ValueError("no key")
        check_key(key)
        if isinstance(text, str):
            value = text.encode()
        elif isinstance(coded, str):
            value = base64.b64decode(coded, validate=True)
        else:
            raise ValueError("no value")
        if len(value) > VALUE_BYTES_MAX:
            raise ValueError("the value is too large")
    except ValueError as error:
        raise BackupError(f"{where}: damaged ({error})") from None
    return key, value


# -- into a store


async def restore(store: Store, held: Backup, *, force: bool = False) -> Restored:
    """Make the store hold what the backup does. See `fill`."""
    return await fill(store, held.entries, held.leased, force=force)


async def fill(store: Store, entries: Mapping[str, bytes], leased: int, *, force: bool = False) -> Restored:
    """Make `store` hold exactly these entries, and read it again to see that it does. Refuses one that holds anything
    else, unless `force`: then that is removed (what lives by a lease goes too). Entries that are there already with the
    same value are no obstacle, so after a crash the same call goes on. Raises StoreError."""
    present = (await store.read()).entries
    foreign = sorted(key for key, entry in present.items() if entry.lease or entries.get(key) != entry.value)
    if foreign and not force:
        raise BackupError(
            f"{store.description} is not empty: {len(foreign)} of its keys are not in the source or have another value "
            f"there ({', '.join(foreign[:3])}{', …' if len(foreign) > 3 else ''}); with --force it is replaced"
        )
    removed = [key for key in foreign if key not in entries]
    operations: list[Operation] = [Delete(key) for key in removed if key != META]
    operations += [
        Put(key, value) for key, value in entries.items() if key != META and not _same(present.get(key), value)
    ]
    try:
        if META in present and (operations or META in foreign):
            await store.commit([Delete(META)])
        for together in batches(operations):
            await store.commit(together)
        if META in entries:
            await store.commit([Put(META, entries[META])])
    except StoreFull as error:
        raise StoreFull(f"{error}; it holds a part now: make room and run this again") from error
    view = await store.read()
    if {key: entry.value for key, entry in view.entries.items()} != dict(entries):
        raise BackupError(
            f"{store.description} does not hold what was written: somebody else writes to it; stop that control plane "
            "and run this again with --force"
        )
    return Restored(len(entries), len(removed), leased, view.revision)


def _same(entry: Entry | None, value: bytes) -> bool:
    return entry is not None and not entry.lease and entry.value == value


def batches(operations: Sequence[Operation]) -> Iterator[list[Operation]]:
    """Transactions that every store takes: few operations, few bytes."""
    together: list[Operation] = []
    size = 0
    for operation in operations:
        cost = len(operation.key) + (len(operation.value) if isinstance(operation, Put) else 0)
        if together and (len(together) >= OPERATIONS_TOGETHER_MAX or size + cost > BYTES_TOGETHER_MAX):
            yield together
            together, size = [], 0
        together.append(operation)
        size += cost
    if together:
        yield together
