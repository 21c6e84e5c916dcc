"""Where a sidecar's policy and identity come from: files, or a control plane. One of them, for a whole life.

Both bring a first policy into force, keep it up to date, and say what is missing. Must not know listeners or signals.
Invariants: a bad policy changes nothing; the log says which source is in force.
"""

import errno
import logging
from typing import TYPE_CHECKING, Any, Protocol

import trio

from certs.files import IdentityError, IdentityFiles
from sidecar.discovery.files import IdentityDirectory, PolicyFiles
from sidecar.model.load import Loaded
from sidecar.model.problems import render
from sidecar.model.snapshot import Health, Service
from sidecar.model.snapshot import Protocol as Speaks
from sidecar.policy.plan import ports
from sidecar.proxy.connect import DialError

if TYPE_CHECKING:
    from sidecar.discovery.health import Verdict
    from sidecar.discovery.join import Member
    from sidecar.discovery.registration import Instance
    from sidecar.discovery.resources import CookieKeys

    from .app import App

log = logging.getLogger(__name__)

DIAL_S = 2.0
Address = tuple[str, int]


class StartError(Exception):
    """The sidecar cannot start; the text says why and what to do."""


class Source(Protocol):
    """What the composition root asks of either."""

    async def start(self, nursery: trio.Nursery) -> None:
        """Return once a first policy is in force. Raises StartError."""

    def begun(self, nursery: trio.Nursery) -> None:
        """Every listener is open: follow changes from now on."""

    async def reload(self) -> None: ...
    async def leave(self) -> None:
        """The sidecar is about to end: callers should go elsewhere."""

    async def aclose(self) -> None: ...
    def missing(self) -> list[str]: ...
    def shown(self) -> dict[str, Any]: ...


class Files:
    """Policy and identity from files alone."""

    def __init__(self, app: "App") -> None:
        settings = app.settings
        assert settings.identity is not None
        self.app = app
        self.policy = PolicyFiles(settings.policy)
        self.identity = IdentityDirectory(settings.identity)
        self._offering = trio.Lock()

    async def start(self, nursery: trio.Nursery | None = None) -> None:
        problem = await self._apply(self.policy.load())
        if problem is not None:
            raise StartError(problem)
        log.info("policy and identity come from files: %s", ", ".join(map(str, self.app.settings.policy)))

    def begun(self, nursery: trio.Nursery) -> None:
        nursery.start_soon(self.policy.watch, self.offered)
        nursery.start_soon(self.identity.watch, self.app.identity_changed, self._identity_problem)

    async def offered(self) -> None:
        """The policy on disk may have changed: taken as a whole, or refused with the reason; one at a time."""
        app = self.app
        async with self._offering:
            loaded = await trio.to_thread.run_sync(self.policy.load)
            problem = await self._apply(loaded)
        if problem is None:
            app.world.meters.reloads_ok.inc()
            log.info("policy %s is in force", app.revision)
        else:
            app.world.meters.reloads_failed.inc()
            log.error("the new policy is refused, the old one (%s) serves on:", app.revision or "none")
            for line in problem.splitlines():  # a record each: within one, line breaks are escaped
                log.error("  %s", line)

    async def _apply(self, loaded: Loaded) -> str | None:
        if loaded.problems:
            text = render(loaded.problems, loaded.texts)
            if loaded.snapshot is None:
                return text
            for line in text.splitlines():
                log.warning("  %s", line)
        assert loaded.snapshot is not None
        refusal = await self.app.serve_by(loaded.snapshot)
        own = loaded.snapshot.services.get(self.app.settings.service)
        limits = [route.rate_limit for route in own.routes] if own is not None else []
        if refusal is None and any(each is not None and each.scope == "global" for each in limits):
            log.warning(
                "rate_limit.scope: global needs a control plane, and the policy comes from files: this instance "
                "counts for itself, against the whole limit"
            )
        return None if refusal is None else refusal.text

    def _identity_problem(self, error: IdentityError) -> None:
        log.error("the identity on disk cannot be used, the old one serves on: %s", error)

    async def reload(self) -> None:
        await self.offered()
        try:
            self.app.identity_changed(await trio.to_thread.run_sync(self.identity.load))
        except IdentityError as error:
            self._identity_problem(error)

    async def leave(self) -> None:
        pass

    async def aclose(self) -> None:
        pass

    def missing(self) -> list[str]:
        return []

    def shown(self) -> dict[str, Any]:
        return {"kind": "files", "files": [str(path) for path in self.app.settings.policy]}


def start_identity(directory: Any, service: str) -> IdentityFiles:
    """The identity to begin with, from files. Raises StartError."""
    try:
        identity = IdentityDirectory(directory).load()
    except IdentityError as error:
        raise StartError(f"error: identity: {error}") from error
    if identity.spiffe_id.service != service:
        raise StartError(
            f"error: identity: {directory} is of {identity.spiffe_id}, but this sidecar is of service {service}; "
            f"issue one with: pillion ca issue --service {service}"
        )
    return identity


class Controlled:
    """Policy and identity from a control plane, with a directory that remembers both."""

    def __init__(self, app: "App", member: "Member", version: str) -> None:
        from sidecar.discovery.control_plane import ControlPlane
        from sidecar.discovery.health import Checker
        from sidecar.discovery.registration import Registration
        from sidecar.discovery.reports import Edges

        self.app, self.member = app, member
        member.on_identity = app.identity_changed
        self.control: ControlPlane = ControlPlane(member, self, everything=app.settings.intercept, version=version)
        self.edges = Edges()
        self.registration = Registration(self.control, self._report)
        self.checker = Checker(self._health, self._connect, app.settings.service, self._judged)
        self.ending = False

    # -- what the stream gives us

    async def serve_by(self, snapshot: Any) -> Any:
        refusal = await self.app.serve_by(snapshot)
        own = self._own
        if refusal is None and own is not None:
            self.app.assembly.limits.guess(len(own.endpoints) + (not self.registration.registered))
        return refusal

    def share(self, share: float | None) -> None:
        limits = self.app.assembly.limits
        if share is not None:  # one that is taken back holds until there is another
            limits.tell(share)

    def stick(self, keys: "CookieKeys") -> None:
        self.app.assembly.stick(keys.key, keys.former)

    def ban(self, bans: frozenset[str]) -> None:
        self.app.world.ban(bans)

    def name(self, names: frozenset[str] | None) -> None:
        self.app.world.names = None if names is None else frozenset(each.encode() for each in names)

    # -- a life

    async def start(self, nursery: trio.Nursery) -> None:
        control = self.control
        self.app.world.want = control.want
        held = await control.from_disk()
        for task in (control.run, control.keep_saved, self.member.keep_renewed, self.registration.run):
            nursery.start_soon(task)
        if not held:
            log.info("policy comes from the control plane at %s; the first is waited for", self._where())
            await control.in_force.wait()
        log.info("policy and identity come from the control plane at %s", self._where())

    def _where(self) -> str:
        return self.control.address or ", ".join(self.member.mesh.addresses)

    def begun(self, nursery: trio.Nursery) -> None:
        if self.app.settings.inbound is None:
            log.info("this sidecar takes nothing from the mesh (--inbound off), so it does not register")
        else:
            nursery.start_soon(self._register)

    async def _register(self) -> None:
        """Register as soon as the application answers; then watch over it."""
        from sidecar.discovery.health import TCP_ALONE, check
        from sidecar.discovery.registration import until_answering

        await until_answering(lambda: check(lambda: self._connect(TCP_ALONE), TCP_ALONE, ""), log.warning)
        await self.checker.once()
        self.registration.healthy, self.registration.reason = self.checker.verdict.healthy, self.checker.verdict.reason
        if not self.ending:
            self.registration.begin(self._instance)
        await self.checker.run()

    async def reload(self) -> None:
        """Nothing to read: what is new comes by itself."""

    async def leave(self) -> None:
        self.ending = True
        await self.registration.withdraw()

    async def aclose(self) -> None:
        await self.control.save()
        await self.member.aclose()
        self.member.state.close()

    def missing(self) -> list[str]:
        if self.control.in_force.is_set():
            return []
        return [f"no policy yet from the control plane: {self.control.problem}"]

    def shown(self) -> dict[str, Any]:
        control, member = self.control, self.member
        return {
            "kind": "control plane",
            "connected": control.address,
            "replica": control.replica,
            "problem": control.problem or member.refused,
            "addresses": member.mesh.addresses,
            "sidecar": member.membership.sidecar,
            "registered": self.registration.registered,
            "healthy": self.registration.healthy,
            "reason": self.registration.reason,
            "rejected": control.rejected,
            "uses": list(control.uses),
            "state_dir": str(member.state.path),
        }

    # -- our application

    @property
    def _own(self) -> Service | None:
        return self.app.snapshot.services.get(self.app.settings.service)

    def _health(self) -> Health | None:
        own = self._own
        return None if own is None else own.health

    def _application(self, health: Health) -> Address | None:
        """Where our application listens for such checks; None: nobody has told."""
        own = self._own
        apps = self.app.settings.apps
        all_ports = ports(own) if own is not None else ()
        if health.http is not None:
            wanted = [port for port in all_ports if port.protocol is Speaks.HTTP]
        elif health.grpc is not None:
            http = [port for port in all_ports if port.protocol.is_http]
            wanted = [port for port in http if port.protocol is Speaks.GRPC] or http
        else:
            wanted = list(all_ports)
        for port in wanted:
            found = apps.get(port.name) or apps.get("")
            if found is not None:
                return found
            if port.number:
                return "127.0.0.1", port.number
        return next(iter(apps.values()), None)

    async def _connect(self, health: Health) -> trio.abc.Stream:
        """A connection to our application, made as those of the data path are. Raises OSError."""
        address = self._application(health)
        if address is None:
            raise OSError(errno.EDESTADDRREQ, "nobody has told where it listens: give --app, or ports in its policy")
        try:
            dialled = await self.app.world.dialler.dial(address, timeout_s=max(DIAL_S, health.timeout_s))
        except DialError as error:
            raise OSError(errno.ECONNREFUSED, str(error)) from None
        return trio.SocketStream(trio.socket.from_stdlib_socket(dialled.sock))

    def _judged(self, verdict: "Verdict") -> None:
        if verdict.healthy:
            log.info("the application is healthy")
        else:
            log.warning("the application is not healthy: %s", verdict.reason)
        self.registration.health(verdict.healthy, verdict.reason)

    # -- what we tell

    def _instance(self) -> "Instance":
        from sidecar.discovery.registration import Instance

        settings = self.app.settings
        bound = self.app.entrance.inbound[0].getsockname()
        host, port = settings.advertise or ("", 0)
        if not host and bound[0] not in ("0.0.0.0", "::"):  # noqa: S104 - compared, not bound
            host = bound[0]
        return Instance(
            host, port or bound[1], self._ports(), settings.labels, settings.weight, settings.zone, settings.priority
        )

    def _ports(self) -> dict[str, int]:
        own, apps = self._own, self.app.settings.apps
        found = {}
        for port in ports(own) if own is not None else ():
            number = (apps.get(port.name) or apps.get("") or ("", port.number))[1]
            if number:
                found[port.name] = number
        return found

    def _report(self) -> dict[str, Any]:
        from sidecar.discovery.reports import breakers, evidence

        world = self.app.world
        clusters = world.state.clusters
        told: dict[str, Any] = {"edges": self.edges.take(clusters), "breakers": breakers(clusters, world.clock())}
        if told["breakers"]:
            told["evidence"] = evidence(clusters)
        demand = self.app.assembly.limits.take_demand(world.clock())
        return told if demand is None else {**told, "demand": round(demand, 4)}
