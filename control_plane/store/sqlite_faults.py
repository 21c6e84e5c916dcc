"""What SQLite and the system say when they cannot, in the words of a store: full, refused, or worth trying again.

Must know no statement. Invariant: what is a bug of ours stays the exception that it was.
"""

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from control_plane.store.base import StoreError, StoreFull, StoreRefused, StoreUnavailable


@contextmanager
def told(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.ProgrammingError) and "closed" not in str(error):
            raise  # a bug
        raise _from_sqlite(path, error) from error
    except OSError as error:
        raise _from_system(path, error) from error


def _from_sqlite(path: Path, error: sqlite3.Error) -> StoreError:
    name = getattr(error, "sqlite_errorname", "") or ""
    if name == "SQLITE_FULL":
        return StoreFull(f"{path}: the disk, or the store, is full; make room (reading goes on)")
    # What a quota or a limit on file sizes gives, and the shared-memory file on a full disk.
    if name in ("SQLITE_IOERR_WRITE", "SQLITE_IOERR_SHMSIZE", "SQLITE_IOERR_TRUNCATE"):
        return StoreFull(f"{path}: the disk takes no more (full, a quota, or failing: {name}); reading goes on")
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return StoreRefused(damaged(path, str(error)))
    if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM", "SQLITE_AUTH")):
        return StoreRefused(f"{path}: cannot be opened for writing ({error}); it and its directory must be writable")
    if isinstance(error, sqlite3.ProgrammingError):
        return StoreUnavailable(f"{path}: the store is closed")
    if name in ("SQLITE_ERROR", ""):  # no such table, and the like: somebody else's schema
        return StoreRefused(damaged(path, str(error)))
    return StoreUnavailable(f"{path}: {error} ({name})")


def _from_system(path: Path, error: OSError) -> StoreError:
    where = error.filename or path
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StoreFull(f"{where}: the disk is full ({error.strerror}); make room")
    if error.errno == errno.EEXIST:  # mkdir, of what is a file
        return StoreRefused(f"{where} is no directory; the embedded store needs one to be in")
    if error.errno == errno.ELOOP:
        return StoreRefused(f"{where} is a symbolic link; name the file itself")
    return StoreRefused(f"{where}: {error.strerror}; the embedded store needs a directory that it may write to")


def damaged(path: Path, problem: str) -> str:
    return (
        f"{path} is damaged, or no store of pillion ({problem}); move it away and restore a backup: "
        "pillion store restore --store embedded:PATH FILE"
    )
