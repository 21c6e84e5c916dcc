"""What a sidecar keeps on disk between two lives: who it is, its key and certificate, the last policy it accepted.

    identity/       cert.pem, key.pem, bundle.pem, as certs.files writes them
    sidecar.json    its id, service, trust domain, and where the control plane is
    snapshot.json   the resources last accepted, with their versions
    lock            held while a sidecar uses the directory

Must not know the control plane's protocol. Invariants: the directory is 0700 and its files 0600; one sidecar at a time;
a file, and the identity as a set, is replaced whole or not at all, whenever the process is killed; what is damaged is
never served from, and is told apart from what is not there.
"""

import fcntl
import json
import os
import shutil
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from certs.bundle import BUNDLE_BYTES_MAX
from certs.files import (
    BUNDLE,
    CERT,
    CHAIN_BYTES_MAX,
    KEY,
    IdentityError,
    IdentityFiles,
    parse_identity,
    read_chain,
    read_limited,
    write_atomic,
)
from certs.svid import validity_of

FORMAT = 1
MEMBERSHIP_BYTES_MAX = 256 * 1024
SNAPSHOT_BYTES_MAX = 512 * 1024 * 1024
ADDRESSES_MAX = 64

MEMBERSHIP, SNAPSHOT, LOCK, IDENTITY = "sidecar.json", "snapshot.json", "lock", "identity"
_NEXT, _OLD = "identity.next", "identity.old"

Json = Any


class StateError(Exception):
    """The directory cannot be used; says why and what to do."""


class Damaged(StateError):
    """Something in it cannot be read; joining anew puts that right."""


@dataclass(frozen=True, slots=True)
class Membership:
    """Who this sidecar is to the control plane. `mesh` and `join`: HOST:PORT of its two listeners. `issued`: what this
    host's clock said when the present certificate was issued."""

    sidecar: str
    service: str
    trust_domain: str
    mesh: tuple[str, ...]
    join: tuple[str, ...]
    issued: float


@dataclass(frozen=True, slots=True)
class Saved:
    """The last accepted resources: name -> (version, data). `at`: when they were written, seconds since the epoch."""

    at: float
    policy: int = 0
    resources: Mapping[str, tuple[str, Json]] = field(default_factory=dict)


def default_directory(service: str, environment: Mapping[str, str]) -> Path:
    """Where the state of a service's sidecar is kept unless somebody says otherwise."""
    given = environment.get("STATE_DIRECTORY", "").partition(":")[0]  # systemd, StateDirectory=
    if given:
        return Path(given)
    home = environment.get("XDG_STATE_HOME", "")
    if home.startswith("/"):
        return Path(home) / "pillion" / "sidecar" / service
    return Path(environment.get("HOME") or "/var/lib") / ".local" / "state" / "pillion" / "sidecar" / service


class StateDir:
    """One directory, locked. Close it when the sidecar ends."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._lock = path, descriptor

    @classmethod
    def open(cls, path: Path) -> "StateDir":
        """Make the directory where it is missing, and lock it. Raises StateError."""
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = path.stat()
            if not stat.S_ISDIR(status.st_mode):
                raise StateError(f"{path} is not a directory")
            if status.st_uid != os.geteuid():
                raise StateError(
                    f"the state directory {path} belongs to user id {status.st_uid}, but this process runs as user id "
                    f"{os.geteuid()}; run: chown -R {os.geteuid()} {path}, or name another with --state-dir"
                )
            if stat.S_IMODE(status.st_mode) & 0o077:
                path.chmod(0o700)  # a volume or systemd made it: nothing of ours was in it for others to read
            descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise StateError(f"the state directory {path} cannot be used: {_why(error)}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip()
            os.close(descriptor)
            raise StateError(
                f"the state directory {path} is in use by another sidecar{f' (process {owner})' if owner else ''}; "
                "two would take each other's identity for their own. Name another directory with --state-dir"
            ) from None
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        except OSError:
            pass  # the number is for people only
        state = cls(path, descriptor)
        try:
            state._finish_replacement()
        except OSError as error:
            state.close()
            raise StateError(f"the state directory {path} cannot be used: {_why(error)}") from None
        return state

    def close(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    # -- who we are

    def membership(self) -> Membership | None:
        """None: this directory has not joined any mesh. Raises StateError (Damaged)."""
        path = self.path / MEMBERSHIP
        content = self._read(path, MEMBERSHIP_BYTES_MAX)
        if content is None:
            return None
        try:
            data = json.loads(content)
            if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
                raise ValueError("it is of another version of pillion")
            names = [data[key] for key in ("sidecar", "service", "trust_domain")]
            mesh, join = (tuple(data[key][:ADDRESSES_MAX]) for key in ("mesh", "join"))
            if not all(isinstance(each, str) for each in (*names, *mesh, *join)):
                raise ValueError("a value in it is of the wrong kind")
            return Membership(names[0], names[1], names[2], mesh, join, float(data["issued"]))
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise Damaged(f"{path} is damaged ({_shown(error)})") from None

    def write_membership(self, membership: Membership) -> None:
        self._write(MEMBERSHIP, json.dumps({"format": FORMAT, **asdict(membership)}).encode())

    # -- the identity

    @property
    def identity_directory(self) -> Path:
        return self.path / IDENTITY

    def identity(self) -> IdentityFiles | None:
        """The identity, checked as a set but not against the clock: whether it is still good is for the caller to
        judge, who knows how this host's clock and the control plane's differ. None where there is none."""
        directory = self.identity_directory
        if not directory.is_dir():
            return None
        try:
            chain = read_chain(directory / CERT)
            at = min(validity_of(each).not_after for each in chain) - timedelta(seconds=1)
            return parse_identity(
                read_limited(directory / CERT, CHAIN_BYTES_MAX),
                read_limited(directory / KEY, CHAIN_BYTES_MAX, secret=True),
                read_limited(directory / BUNDLE, BUNDLE_BYTES_MAX),
                at,
                directory,
            )
        except IdentityError as error:
            raise (Damaged if not _is_about_modes(error) else StateError)(str(error)) from None

    def write_identity(self, identity: IdentityFiles) -> None:
        """Replace all three files as one: a directory beside, then two renames, which the next start can finish."""
        following = self.path / _NEXT
        try:
            shutil.rmtree(following, ignore_errors=True)
            following.mkdir(mode=0o700)
            for name, content in ((BUNDLE, identity.bundle_pem), (KEY, identity.key_pem), (CERT, identity.cert_pem)):
                write_atomic(following / name, content, 0o600)
            self._swap()
        except OSError as error:
            raise StateError(f"{self.identity_directory} cannot be written: {_why(error)}") from None

    def _swap(self) -> None:
        current, following, old = (self.path / name for name in (IDENTITY, _NEXT, _OLD))
        shutil.rmtree(old, ignore_errors=True)
        if current.exists():
            current.rename(old)
        following.rename(current)
        _sync(self.path)
        shutil.rmtree(old, ignore_errors=True)

    def _finish_replacement(self) -> None:
        """After a life that ended in the middle of `write_identity`."""
        current, following, old = (self.path / name for name in (IDENTITY, _NEXT, _OLD))
        if not current.exists():
            if following.exists():  # complete: the old one is moved away only after that
                following.rename(current)
            elif old.exists():
                old.rename(current)
        for leftover in (following, old):
            shutil.rmtree(leftover, ignore_errors=True)
        for leftover in self.path.glob(".*.json.????????????????"):
            leftover.unlink(missing_ok=True)

    def set_aside(self) -> Path:
        """Put everything of a former membership out of the way, for people to look at."""
        aside = self.path / f"former-{datetime.now(UTC):%Y%m%dT%H%M%S}"
        try:
            aside.mkdir(mode=0o700, exist_ok=True)
            for name in (MEMBERSHIP, SNAPSHOT, IDENTITY):
                if (self.path / name).exists():
                    (self.path / name).rename(aside / name)
        except OSError as error:
            raise StateError(f"{self.path} cannot be written: {_why(error)}") from None
        return aside

    # -- what we serve by

    def snapshot(self) -> tuple[Saved | None, str]:
        """What was last accepted, and what was wrong with it ("": nothing). What is damaged is set aside."""
        path = self.path / SNAPSHOT
        try:
            content = self._read(path, SNAPSHOT_BYTES_MAX)
        except StateError as error:
            return None, str(error)
        if content is None:
            return None, ""
        try:
            data = json.loads(content)
            if not isinstance(data, dict) or data.get("format") != FORMAT:
                raise ValueError("it is of another version of pillion")
            resources = {}
            for name, each in data["resources"].items():
                version, value = each
                if not isinstance(name, str) or not isinstance(version, str):
                    raise ValueError("a value in it is of the wrong kind")
                resources[name] = (version, value)
            return Saved(float(data["at"]), int(data["policy"]), resources), ""
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            aside = path.with_name(f"{SNAPSHOT}.damaged")
            try:
                path.rename(aside)
            except OSError:
                pass
            return (
                None,
                f"{path} is damaged ({_shown(error)}); it is now {aside.name}, and everything is asked for again",
            )

    def write_snapshot(self, saved: Saved) -> None:
        data = {"format": FORMAT, "at": saved.at, "policy": saved.policy, "resources": dict(saved.resources)}
        self._write(SNAPSHOT, json.dumps(data, separators=(",", ":")).encode())

    # -- files

    def _read(self, path: Path, bytes_max: int) -> bytes | None:
        if not path.exists() and not path.is_symlink():
            return None
        try:
            return read_limited(path, bytes_max, secret=True)
        except IdentityError as error:
            raise StateError(str(error)) from None

    def _write(self, name: str, content: bytes) -> None:
        try:
            write_atomic(self.path / name, content, 0o600)
        except OSError as error:
            raise StateError(f"{self.path / name} cannot be written: {_why(error)}") from None


def _is_about_modes(error: IdentityError) -> bool:
    return "run: ch" in str(error)


def _why(error: OSError) -> str:
    return error.strerror or str(error)


def _shown(error: BaseException) -> str:
    text = f"needs {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
    return text[:200]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
