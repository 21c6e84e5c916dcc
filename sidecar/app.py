"""The sidecar, put together: the one module that knows every other.

Starts identity, policy, listeners and admin in this order, reloads what changes, drains at the end. Where policy and
identity come from, `sources` knows. Invariants: nothing is served before identity and first policy are in place; bad
policy changes nothing; after `run` returns no listener, connection or task is left.
"""

import gc
import json
import logging
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from certs.files import IdentityFiles
from sidecar.build_info import build
from sidecar.discovery.refusal import Refusal
from sidecar.model.snapshot import Snapshot
from sidecar.plugins.loader import Loader
from sidecar.policy.plan import PlanError
from sidecar.proxy.accept import BindError, Gate, raise_nofile
from sidecar.proxy.admin_door import AdminSources, bind_admin, serve_admin
from sidecar.proxy.drain import TOTAL_S, drain
from sidecar.proxy.heap import keep_free_memory
from sidecar.proxy.tls import Identity
from sidecar.proxy.world import World
from sidecar.telemetry import process
from sidecar.telemetry.access_log import AccessLog
from sidecar.telemetry.logs import Logs
from sidecar.telemetry.metrics import Registry
from sidecar.telemetry.systemd import notify
from sidecar.telemetry.writer import SinkError
from sidecar.wire.http2 import engine_class

from .assembly import Assembly, sticky_key_from
from .entrance import Entrance
from .sources import Controlled, Files, Source, StartError, start_identity

if TYPE_CHECKING:
    from certs.tokens import Token
    from sidecar.discovery.join import Member
    from sidecar.discovery.state_dir import StateDir

log = logging.getLogger(__name__)

Address = tuple[str, int]

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
NOTE_EVERY_S = 10.0
SERVING_GC = (20_000, 50, 100)


@dataclass(frozen=True, slots=True)
class Settings:
    """How one sidecar runs. Addresses are (host, port); port 0 picks a free one; None: not served. With `state_dir` it
    is a control plane's: `control_plane` are join addresses (HOST:PORT) beyond those that token and state name."""

    service: str
    policy: tuple[Path, ...] = ()
    identity: Path | None = None
    state_dir: Path | None = None
    control_plane: tuple[str, ...] = ()
    token: "Token | None" = field(default=None, repr=False)
    advertise: Address | None = None  # port 0: that of the inbound side
    labels: dict[str, str] = field(default_factory=dict)
    weight: int = 1
    zone: str = ""
    priority: int = 0
    apps: dict[str, Address] = field(default_factory=dict)  # port name, or "" for every port
    inbound: Address | None = ("0.0.0.0", 15006)  # noqa: S104 - it admits only authenticated peers
    outbound: Address | None = ("127.0.0.1", 15001)
    admin: str | None = "127.0.0.1:15000"
    strict: bool = False
    intercept: bool = False
    allow_filters: tuple[str, ...] = ()
    filter_path: tuple[str, ...] = ()
    http2_engine: str = "auto"
    access_log: str = "off"
    log_level: str = "info"
    log_format: str = "text"
    grace_s: float = 20.0
    ready_fd: int | None = None


class App:
    """One running sidecar."""

    def __init__(self, settings: Settings, logs: Logs, world: World, assembly: Assembly) -> None:
        self.settings, self.logs, self.world, self.assembly = settings, logs, world, assembly
        self.entrance = Entrance(
            world,
            settings.service,
            intercept=settings.intercept,
            gate=Gate(turn=world.dialler.turn, under_way=world.reactor.errand),
        )
        self.source: Source | None = None
        self.ready = self.ending = False
        self.addresses: dict[str, str] = {}
        self.revision = ""
        self.snapshot = Snapshot()

    # -- policy and identity

    async def serve_by(self, snapshot: Snapshot) -> Refusal | None:
        """Serve by this policy from now on; where it cannot be, nothing changes."""
        try:
            listeners = self.entrance.prepare(snapshot)
        except BindError as error:
            return Refusal(f"error: {error}", own=True)
        try:
            await self.assembly.apply(snapshot)
        except PlanError as error:
            listeners.close()
            lines = (f"error: {f'{source}: ' if source.file else ''}{text}" for source, text in error.problems)
            return Refusal("\n".join(lines))
        except Exception:  # a bug, ours or a filter's: the policy in force serves on
            listeners.close()
            log.exception("the new policy could not be applied")
            return Refusal("error: an unexpected error, logged above")
        self.entrance.adopt(listeners)
        self.snapshot = snapshot
        self.revision = snapshot.revision
        return None

    async def intercept(self) -> None:
        """Put the ruleset right, now that somebody listens where it leads. Raises StartError."""
        from sidecar.intercept.nft import InterceptError
        from sidecar.intercept.ruleset import INBOUND_PORT, OUTBOUND_PORT, InterceptConfig
        from sidecar.intercept.startup import prepare

        inbound, outbound = self.entrance.inbound, self.entrance.outbound
        own = self.snapshot.services.get(self.settings.service)
        config = InterceptConfig(
            outbound_port=outbound[0].getsockname()[1] if outbound else OUTBOUND_PORT,
            inbound_port=inbound[0].getsockname()[1] if inbound else INBOUND_PORT,
            app_ports=tuple(port.number for port in own.ports) if own is not None and inbound else (),
            strict=self.settings.strict,
        )
        try:
            prepared = await trio.to_thread.run_sync(prepare, config)
        except (InterceptError, ValueError) as error:
            raise StartError(f"error: {error}") from error
        self.world.strict = self.world.strict or prepared.strict
        log.info("%s", prepared)

    def identity_changed(self, identity: IdentityFiles) -> None:
        old = self.world.identity.current
        if identity.trust_domain != old.trust_domain or str(identity.spiffe_id) != old.spiffe_id:
            log.error("the new identity is %s, not %s: refused", identity.spiffe_id, old.spiffe_id)
            return
        self.world.identity.replace(identity)
        lost = old.identity.bundle.diff(identity.bundle).lost
        log.info("identity renewed: %s until %s", identity.spiffe_id, identity.not_after.isoformat())
        if lost:
            log.warning("%d roots left the bundle: connections that may rely on them end within 5 s", len(lost))
            self.world.reactor.call(self.world.distrust)

    async def reload(self) -> None:
        """Everything again, whether or not it seems to have changed (SIGHUP)."""
        self.logs.reopen()
        self.world.access.reopen()
        if self.source is not None:
            await self.source.reload()

    # -- what admin shows

    def sources(self) -> AdminSources:
        return AdminSources(
            metrics=lambda openmetrics: self.world.registry.render(openmetrics=openmetrics),
            livez=lambda: (),
            readyz=self.missing,
            config=self.config,
            clusters=self.clusters,
            events=self.assembly.events.rows,
            overload=self.overload,
            set_log_level=self.logs.set_level,
        )

    def missing(self) -> list[str]:
        if self.ending or self.world.draining:
            return ["draining"]
        missing = self.source.missing() if self.source is not None else []
        return missing if self.ready else missing or ["not every listener is open yet"]

    def config(self) -> object:
        settings = asdict(replace(self.settings, token=None))
        identity = self.world.identity.current.identity
        return {
            "service": self.settings.service,
            "addresses": self.addresses,
            "identity": {
                "spiffe_id": str(identity.spiffe_id),
                "not_after": identity.not_after.isoformat(),
                "fingerprint": identity.fingerprint,
            },
            "policy": {
                "revision": self.revision,
                "source": self.source.shown() if self.source is not None else {},
                "services": self.world.plans.service_names(),
            },
            "settings": json.loads(json.dumps(settings, default=str)),
            "http2_engine": engine_class(self.settings.http2_engine).name,
            "filters": self.assembly.names(),
            "global_limits": self.assembly.limits.shown(),
        }

    def overload(self) -> Iterator[dict[str, object]]:
        for service, gate in self.world.state.gates.items():
            yield {"service": service, **gate.shown(self.world.clock())}

    def clusters(self) -> Iterator[dict[str, object]]:
        now = self.world.clock()
        for (side, service, port), cluster in list(self.world.state.clusters.items()):
            for endpoint in list(cluster.endpoints.values()):
                if endpoint.placeholder:
                    continue  # a service without ports of its own has no application to show
                yield {
                    "side": side,
                    "service": service,
                    "port": port,
                    "endpoint": endpoint.key,
                    "version": endpoint.version,
                    "tls": endpoint.tls.value,
                    "healthy": endpoint.stated_healthy,
                    "breaker": endpoint.breaker.state(now),
                    "ejected_s": _left(cluster.outliers.until(endpoint), now) if cluster.outliers is not None else None,
                    "weight": round(endpoint.weight, 3),
                    "zone": endpoint.zone,
                    "priority": endpoint.priority,
                    "balancer": dict(cluster.balancer.describe(endpoint, now)) if cluster.balancer is not None else {},
                    "active": endpoint.active,
                    "idle": len(endpoint.idle),
                    "successes": endpoint.successes,
                    "failures": endpoint.failures,
                    "service_panic": cluster.panic,
                    "service_active": cluster.active,
                    "service_connections": cluster.connections,
                    "service_waiting": len(cluster.waiters),
                    "service_attempts": cluster.attempts,
                    "service_retries": cluster.retries,
                    "retry_budget": round(cluster.budget.balance(now), 1),
                    "events": list(endpoint.events),
                }


async def serve(
    settings: Settings, logs: Logs, access: AccessLog, identity: IdentityFiles | None, state: "StateDir | None" = None
) -> int:
    """Run until a signal ends it; the exit code. One of `identity` (from files) and `state` is given."""
    raise_nofile()
    registry = Registry(trio.current_time)
    process.register(registry)
    mark = _mark(settings)
    member = await _member(settings, state, mark) if state is not None else None
    if member is not None:
        identity = member.identity
    assert identity is not None

    def note(kind: str, text: str) -> None:
        times = logs.once_per(kind, NOTE_EVERY_S)
        if times:
            log.warning("%s%s", text, f" ({times} times since it was last said)" if times > 1 else "")

    async with trio.open_nursery() as nursery:
        holder = Identity(identity)
        world = World(
            nursery,
            registry,
            holder,
            access,
            note,
            strict=settings.strict,
            mark=mark,
            http2_engine=settings.http2_engine,
        )
        holder.sni = world.serves_sni
        holder.replace(identity)
        loader = Loader(settings.allow_filters, settings.filter_path)
        assembly = Assembly(
            world, loader, settings.service, settings.apps, sticky_key_from(identity.key_pem), settings.zone
        )
        app = App(settings, logs, world, assembly)
        app.source = Controlled(app, member, _installed()) if member is not None else Files(app)
        _observe(app, access)
        nursery.start_soon(world.reactor.run)
        nursery.start_soon(world.sweep)
        nursery.start_soon(world.watch.run, world)
        try:
            await _start(app, app.source, nursery)
            await _until_ended(app, nursery)
        finally:
            with trio.CancelScope(shield=True):
                await app.source.aclose()
                await assembly.aclose()
        nursery.cancel_scope.cancel()
    return EXIT_OK


async def _member(settings: Settings, state: "StateDir", mark: int | None) -> "Member":
    """Our membership of a mesh, waited for as long as it takes. Raises StartError."""
    from sidecar.discovery.join import JoinError, Wanted, become_member
    from sidecar.discovery.state_dir import StateError

    try:
        return await become_member(state, Wanted(settings.service, settings.token, settings.control_plane, mark))
    except (JoinError, StateError) as error:
        raise StartError(f"error: {error}") from error


async def _start(app: App, source: Source, nursery: trio.Nursery) -> None:
    """Admin, policy, listeners; then tell whoever waits that traffic may come."""
    settings = app.settings
    admin = ""
    try:
        if settings.admin is not None:  # first: whoever waits with us for a policy can ask why
            sock = bind_admin(settings.admin)
            app.entrance.sockets.append(sock)
            admin = settings.admin if settings.admin.startswith("unix:") else _shown(sock)
            nursery.start_soon(serve_admin, app.sources(), sock)
        await source.start(nursery)
        app.entrance.open(settings.inbound, settings.outbound)
    except (BindError, OSError, ValueError) as error:
        raise StartError(f"error: {error}") from error
    if admin:
        app.addresses["admin"] = admin
    app.entrance.serve(nursery)
    app.addresses.update(app.entrance.addresses())
    if settings.intercept:
        await app.intercept()
    gc.freeze()  # without looking for garbage first: there is less of it than what finding it would cost
    gc.set_threshold(*SERVING_GC)
    keep_free_memory()
    app.ready = True
    source.begun(nursery)
    words = ", ".join(f"{name} {where}" for name, where in app.addresses.items())
    log.info("ready: service %s, policy %s, %s, %s", settings.service, app.revision, words, build())
    notify(f"READY=1\nSTATUS=serving {settings.service}")
    if settings.ready_fd is not None:
        os.write(settings.ready_fd, json.dumps(app.addresses).encode() + b"\n")
        os.close(settings.ready_fd)


async def _until_ended(app: App, nursery: trio.Nursery) -> None:
    """Serve signals: reload on HUP, drain on TERM and INT, end at once on the second."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        ending = False
        async for number in signals:
            if number == signal.SIGHUP:
                nursery.start_soon(app.reload)
            elif ending:
                log.warning("%s again: ending at once", signal.Signals(number).name)
                return
            else:
                ending = True
                log.info("%s: draining", signal.Signals(number).name)
                nursery.start_soon(_drain, app, nursery)


async def _drain(app: App, nursery: trio.Nursery) -> None:
    app.ending = True
    notify("STOPPING=1")
    with trio.move_on_after(TOTAL_S):
        if app.source is not None:
            await app.source.leave()
        await drain(app.world, app.entrance, app.settings.grace_s)
    app.entrance.close()
    log.info("drained")
    nursery.cancel_scope.cancel()


def _left(until: float | None, now: float) -> float | None:
    """How much longer something lasts, in seconds."""
    return None if until is None else round(max(0.0, until - now), 1)


def _observe(app: App, access: AccessLog) -> None:
    """Wire what the data path counts to the metrics."""
    world, meters = app.world, app.world.meters
    meters.build_info(_installed, platform.python_version(), lambda: app.revision)
    limits = app.assembly.limits
    meters.global_limits(lambda: limits.share, lambda: max(0.0, limits.demand))
    meters.certificate_expiry(lambda: world.identity.current.identity.not_after.timestamp())
    meters.log_drops("access", lambda: access.dropped)
    meters.log_drops("own", lambda: app.logs.dropped)
    world.observe()

    def crashed(exc: Exception) -> None:
        meters.crashes.inc("connection")
        log.error("a connection was ended by an unexpected error", exc_info=exc)

    world.reactor.on_crash = crashed
    world.reactor.on_slow = lambda text: world.note("slow", f"the reactor was held up: {text}")


def _installed() -> str:
    from importlib.metadata import PackageNotFoundError, version  # late: it loads all of `email`

    try:
        return version("pillion")
    except PackageNotFoundError:
        return "unknown"


def _mark(settings: Settings) -> int | None:
    if not settings.intercept:
        return None
    from sidecar.intercept.mark import can_mark
    from sidecar.intercept.ruleset import MARK

    return MARK if can_mark(MARK) else None


def _shown(sock: Any) -> str:
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def run(settings: Settings) -> int:
    """The whole life of a sidecar process; the exit code. Errors of start-up go to stderr."""
    logs = Logs(clock=time.monotonic, level=settings.log_level, style=settings.log_format)
    access: AccessLog | None = None
    state: StateDir | None = None
    try:
        _check_engine(settings.http2_engine)
        if settings.state_dir is not None:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # it may be long before there is anything to reload
            state = _open_state(settings.state_dir)
        identity = start_identity(settings.identity, settings.service) if settings.identity is not None else None
        try:
            access = AccessLog.of(settings.access_log, time.time)
        except SinkError as error:
            raise StartError(f"error: access log: {error}") from error
        return trio.run(serve, settings, logs, access, identity, state)
    except BaseException as exc:
        return _ended_by(exc, logs)
    finally:
        if access is not None:
            access.close()
        if state is not None:
            state.close()
        logs.close()


def _check_engine(name: str) -> None:
    """Raises StartError."""
    try:
        engine_class(name)
    except ImportError as error:
        raise StartError(f"error: --http2-engine {name}: {error}; leave it out, or choose h2") from error


def _open_state(path: Path) -> "StateDir":
    from sidecar.discovery.state_dir import StateDir, StateError

    try:
        return StateDir.open(path)
    except StateError as error:
        raise StartError(f"error: {error}") from error


def _ended_by(exc: BaseException, logs: Logs) -> int:
    """The exit code for an exception; one that is expected is said plainly, any other is a bug and goes up."""
    while isinstance(exc, BaseExceptionGroup) and len(exc.exceptions) == 1:
        exc = exc.exceptions[0]
    if isinstance(exc, StartError):
        logs.close()
        print(exc, file=sys.stderr)  # noqa: T201
        return EXIT_USAGE
    if isinstance(exc, KeyboardInterrupt):
        return 128 + signal.SIGINT
    raise exc
