"""The control plane, put together: the one module that knows every other part of it.

Opens the store, founds or enters the mesh, stands pillion's own listeners in front of its two applications, and runs
until a signal ends it. Invariants: it is ready only once its state is read; what it makes at its first start (an
authority, an admin token) it never makes again unasked, and says where it is; its keys are files of mode 0600.
"""

import gc
import json
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import trio
from hypercorn.config import Config
from hypercorn.trio import serve as hypercorn_serve

from certs.authority import IssueError, create_root, new_key
from certs.files import (
    CaFiles,
    IdentityError,
    IdentityFiles,
    load_ca,
    load_identity,
    write_atomic,
    write_ca,
    write_identity,
)
from certs.spiffe import SpiffeId
from control_plane.serve import server
from control_plane.serve.admission import AdmissionError, admit
from control_plane.serve.folder import Folder, follow_folder
from control_plane.serve.front import Front
from control_plane.serve.http import CONTROL_PLANE, ApiError
from control_plane.serve.mesh_api import MeshApi
from control_plane.serve.minting import first_admin_token
from control_plane.serve.operator_api import operator_app
from control_plane.serve.replica import Replica, ReplicaSettings
from control_plane.state.records import TOKENS
from control_plane.store.base import Store, StoreError, StoreUnavailable
from control_plane.store.open import etcd_options, open_store
from sidecar.proxy.bind import BindError
from sidecar.telemetry.logs import Logs
from sidecar.telemetry.systemd import notify, watchdog_s

log = logging.getLogger(__name__)

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
OWN_TTL = timedelta(days=7)
DRAIN_S = 5.0
ADMIN_TOKEN = "admin-token"  # noqa: S105 - a file's name
STATE_NAME_MAX = 63

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Settings:
    """How one control plane runs. Addresses are (host, port); port 0 picks a free one."""

    store: str = "embedded"
    state_dir: Path = Path("pillion-control-plane")
    listen_mesh: Address = ("0.0.0.0", 15010)  # noqa: S104 - mutual TLS
    listen_join: Address = ("0.0.0.0", 15011)  # noqa: S104 - TLS and tokens
    advertise: str | None = None
    name: str | None = None
    ca: Path | None = None
    trust_domain: str = "mesh.local"
    leaf_ttl: timedelta = timedelta(hours=24)
    rejoin_grace: timedelta = timedelta(days=7)
    policy_dir: Path | None = None
    etcd_cacert: Path | None = None
    etcd_cert: Path | None = None
    etcd_key: Path | None = None
    etcd_user: str | None = None
    etcd_password_file: Path | None = None
    etcd_prefix: str = "/pillion/v1/"
    admin_token_file: Path | None = None
    log_level: str = "info"
    log_format: str = "text"
    ready_fd: int | None = None


class StartError(Exception):
    """The control plane cannot start; the text says why and what to do."""


Ready = Callable[[Mapping[str, Any]], None]


async def serve(settings: Settings, ready: Ready | None = None) -> int:
    """Run until a signal ends it; the exit code. `ready` is told the addresses. Raises StartError."""
    directory = _prepare(settings.state_dir)
    authority = _authority(settings, directory)
    name = _replica_name(settings)
    try:
        etcd = etcd_options(
            cacert=settings.etcd_cacert,
            cert=settings.etcd_cert,
            key=settings.etcd_key,
            user=settings.etcd_user or "",
            password_file=settings.etcd_password_file,
            prefix=settings.etcd_prefix,
        )
        async with trio.open_nursery() as nursery:
            store = await open_store(
                settings.store,
                nursery,
                state_dir=directory,
                etcd=etcd if settings.store.startswith("etcd:") else None,
            )
            try:
                await admit(store, authority, name, time.time(), secrets.token_hex(8), _mesh_address(settings))
                await ControlPlane(settings, directory, authority, name, store).run(ready)
            finally:
                with trio.CancelScope(shield=True), trio.move_on_after(5.0):
                    await store.aclose()
            nursery.cancel_scope.cancel()
    except* (StoreError, AdmissionError, BindError, ApiError) as group:
        error = _first(group)
        # A supervisor starts us again, and waiting in silence would look like serving.
        passing = "; start again when it answers" if isinstance(error, StoreUnavailable) else ""
        raise StartError(f"error: {error}{passing}") from None
    return EXIT_OK


class ControlPlane:
    """One that runs."""

    def __init__(
        self,
        settings: Settings,
        directory: Path,
        authority: CaFiles,
        name: str,
        store: Store,
    ) -> None:
        self.settings, self.directory, self.authority = settings, directory, authority
        self.name, self.store = name, store
        self.sockets, self._sockets_fd = _socket_directory(directory / "run")
        self.identity = self._issue_own()
        self.front = Front(
            self.identity,
            mesh=settings.listen_mesh,
            join=settings.listen_join,
            mesh_app=self.sockets / "mesh",
            join_app=self.sockets / "join",
        )
        self.ending = trio.Event()

    async def run(self, ready: Ready | None) -> None:
        try:
            self.front.listen()
            addresses = self.front.addresses
            self.replica = Replica(self.store, self.authority, self._replica_settings(addresses))
            await self.replica.start()
            async with trio.open_nursery() as nursery:
                folder = self._folder()
                nursery.start_soon(self.replica.run)
                await self._serve_apps(nursery, folder)
                await nursery.start(self.front.serve)
                nursery.start_soon(self._renew_own)
                if folder is not None:
                    nursery.start_soon(folder.run)
                await self._first_token()
                gc.collect()
                gc.freeze()
                gc.set_threshold(20_000, 10, 10)
                self._say_ready(addresses, ready)
                nursery.start_soon(_watchdog)
                await self._until_ended()
                await self._end()
                nursery.cancel_scope.cancel()
        finally:
            self.front.close()
            for path in self.sockets.iterdir():
                path.unlink(missing_ok=True)
            os.close(self._sockets_fd)

    def _replica_settings(self, addresses: Mapping[str, str]) -> ReplicaSettings:
        settings = self.settings
        host = settings.advertise or _own_address(settings.listen_mesh[0])
        return ReplicaSettings(
            name=self.name,
            mesh=_joined(host, addresses["mesh"]),
            join=_joined(host, addresses["join"]),
            version=_version(),
            leaf_ttl=settings.leaf_ttl,
            rejoin_grace=settings.rejoin_grace,
            folder=str(settings.policy_dir) if settings.policy_dir is not None else "",
        )

    # -- the two applications

    async def _serve_apps(self, nursery: trio.Nursery, folder: Folder | None) -> None:
        nursery.start_soon(server.serve_app, MeshApi(self.replica), server.listen(self.sockets / "mesh"))
        path = self.sockets / "join"
        nursery.start_soon(partial(_serve_app, operator_app(self.replica, folder), path, self.ending))
        with trio.fail_after(10.0):
            while not path.exists():  # noqa: ASYNC110 - once, at start
                await trio.sleep(0.01)

    def _folder(self) -> Folder | None:
        path = self.settings.policy_dir
        return None if path is None else follow_folder(self.replica, path)

    # -- our own identity

    def _issue_own(self) -> IdentityFiles:
        """A leaf like any sidecar's, from our own authority."""
        spiffe_id = SpiffeId.for_service(self.authority.trust_domain, CONTROL_PLANE)
        now = _today()
        key = new_key()
        try:
            leaf = self.authority.issuing.issue_to_key(key.public_key(), spiffe_id, OWN_TTL, now)
            directory = self.directory / "identity"
            write_identity(directory, [leaf, *self.authority.issuing.chain], key, self.authority.bundle)
            return load_identity(directory)
        except (IssueError, IdentityError) as error:
            raise StartError(f"error: our own certificate: {error}") from error
        except OSError as error:
            raise StartError(f"error: {error.filename or self.directory}: {error.strerror}") from error

    async def _renew_own(self) -> None:
        while True:
            left_s = (self.identity.not_after - _today()).total_seconds()
            await trio.sleep(max(60.0, left_s / 2))
            try:
                self.identity = self._issue_own()
            except StartError as error:
                log.error("our own certificate was not renewed: %s", error)
            else:
                self.front.replace(self.identity)

    # -- beginning and end

    async def _first_token(self) -> None:
        """Somebody must be able to say who may join: an admin token, where there is no operator yet."""
        path = self.settings.admin_token_file
        if path is None:
            if any(held.record.kind == "operator" for held in self.replica.state.table(TOKENS).values()):
                return
            path = self.directory / ADMIN_TOKEN
        text = await first_admin_token(self.replica)
        try:
            write_atomic(path, text.encode() + b"\n", 0o600)
        except OSError as error:
            raise StartError(f"error: {path}: {error.strerror}") from error
        log.info("an admin token is in %s; to use it here: pillion login --token-file %s", path, path)

    def _say_ready(self, addresses: Mapping[str, str], ready: Ready | None) -> None:
        settings = self.replica.settings
        log.info(
            "ready: control plane %s of %s, sidecars at %s, joins and operators at %s, %s",
            self.name,
            self.authority.trust_domain,
            settings.mesh,
            settings.join,
            self.store.description,
        )
        notify(f"READY=1\nSTATUS=serving {self.authority.trust_domain}")
        told = {
            **addresses,
            "advertised_mesh": settings.mesh,
            "advertised_join": settings.join,
            "trust_domain": self.authority.trust_domain,
            "fingerprint": self.authority.bundle.roots[0].fingerprint,
        }
        if ready is not None:
            ready(told)
        if self.settings.ready_fd is not None:
            os.write(self.settings.ready_fd, json.dumps(told).encode() + b"\n")
            os.close(self.settings.ready_fd)

    async def _until_ended(self) -> None:
        """SIGTERM or SIGINT: end in order; a second one: at once."""
        async with _signals() as signals:
            async for number in signals:
                log.info("%s: ending", signal.Signals(number).name)
                return

    async def _end(self) -> None:
        notify("STOPPING=1")
        self.replica.hub.end_all("this control plane is ending")
        async with trio.open_nursery() as nursery:

            async def at_once() -> None:
                async with _signals() as signals:
                    async for number in signals:
                        log.warning("%s again: ending at once", signal.Signals(number).name)
                        nursery.cancel_scope.cancel()

            nursery.start_soon(at_once)
            await self.replica.presence.leave()
            await self.front.drain(DRAIN_S)
            self.ending.set()
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def _signals() -> AsyncIterator[AsyncIterator[int]]:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        yield signals


async def _serve_app(app: Any, path: Path, ending: trio.Event) -> None:
    """The operators' application on its Unix socket, where only our own listener reaches it."""
    config = Config()
    config.bind = [f"unix:{path}"]
    config.umask = 0o177
    config.accesslog = None
    config.errorlog = logging.getLogger("hypercorn")
    config.keep_alive_timeout = 75.0  # longer than our listener keeps a connection that nobody uses
    config.keep_alive_max_requests = 2**31
    config.graceful_timeout = 1.0
    config.h11_max_incomplete_size = 128 * 1024
    config.backlog = 4096
    config.include_server_header = False  # the date is there: clients compare their clocks with it
    await hypercorn_serve(app, config, shutdown_trigger=ending.wait, mode="asgi")


async def _watchdog() -> None:
    every_s = watchdog_s()
    while every_s is not None:
        notify("WATCHDOG=1")
        await trio.sleep(every_s / 2)


# -- what the first start makes


def _prepare(path: Path) -> Path:
    """The state directory, ours alone. Raises StartError."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.stat().st_mode & 0o077:
            path.chmod(0o700)
    except OSError as error:
        raise StartError(f"error: state directory {path}: {error.strerror}") from error
    return path.absolute()


def _socket_directory(path: Path) -> tuple[Path, int]:
    """An empty directory for Unix sockets, by a short name: theirs have 107 bytes at most, its own may be long. The
    name holds for as long as the descriptor is open, in this process. Raises StartError."""
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        for left in path.iterdir():  # by one that was killed: the store's lock says that it is gone
            left.unlink()
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise StartError(f"error: {path}: {error.strerror}") from error
    return Path(f"/proc/self/fd/{descriptor}"), descriptor


def _authority(settings: Settings, directory: Path) -> CaFiles:
    """The one that is named, or our own; made where there is none. Raises StartError."""
    path = settings.ca if settings.ca is not None else directory / "ca"
    try:
        if settings.ca is None and not path.exists():
            now = _today()
            root = create_root(settings.trust_domain, now)
            write_ca(path, root, root.issue_authority(now))
            log.info(
                "a certificate authority for %s was made in %s; %s is its root key: keep a copy in a safe place",
                settings.trust_domain,
                path,
                path / "root.key",
            )
        return load_ca(path)
    except IdentityError as error:
        raise StartError(f"error: authority: {error}") from error
    except OSError as error:
        raise StartError(f"error: authority: {error.filename or path}: {error.strerror}") from error


def _replica_name(settings: Settings) -> str:
    name = settings.name or f"{socket.gethostname()}-{settings.listen_mesh[1] or secrets.token_hex(2)}"
    name = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-._") else "-" for letter in name)
    return name[:STATE_NAME_MAX]


def _mesh_address(settings: Settings) -> str:
    """Where sidecars will find us; "" where that is not known before we listen."""
    host, port = settings.listen_mesh
    return _joined(settings.advertise or _own_address(host), f"{host}:{port}") if port else ""


def _own_address(listening: str) -> str:
    """By which address others reach us, where we listen everywhere: that of the way out."""
    if listening not in ("0.0.0.0", "::"):  # noqa: S104
        return listening
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))  # nothing is sent: the kernel only chooses the source address (RFC 5737)
            return str(sock.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def _joined(host: str, address: str) -> str:
    port = address.rpartition(":")[2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _today() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def _version() -> str:
    try:
        return version("pillion")
    except PackageNotFoundError:
        return "unknown"


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def run(settings: Settings, ready: Ready | None = None) -> int:
    """The whole life of a control plane; the exit code. Errors of start-up go to stderr."""
    logs = Logs(clock=time.monotonic, level=settings.log_level, style=settings.log_format)
    try:
        return trio.run(serve, settings, ready)
    except BaseException as exc:
        error: BaseException = exc
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        if isinstance(error, StartError):
            logs.close()
            print(error, file=sys.stderr)  # noqa: T201
            return EXIT_USAGE
        if isinstance(error, KeyboardInterrupt):
            return 128 + signal.SIGINT
        raise
    finally:
        logs.close()
