"""The demo's mesh: a control plane, and an application with a sidecar for each instance, which join by tokens.

Starts it all, also later instances, and reads the sidecars' admin interfaces and access logs. Must not know the story.
Ports are never guessed: the demo itself binds those of the applications and hands them over, sidecars pick their own
(port 0) and register them. Invariant: whatever is started is in `children`, whatever is written below `directory`.
"""

import json
import os
import socket
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from .client import CallError, Client
from .control import PYTHON, Control, Show, environment, shown
from .figures import Endpoints, Sample, add_sidecar
from .policy import PolicyDirectory
from .processes import Child, Children

READY_S = 60.0
POLL_S = 0.5
WINDOW_S = 5.0
ACCESS_LOG_BYTES_MAX = 16 * 1024 * 1024
FAILING = 0.3
FILTER_MODULE = "shop_filters"
LOOPBACK = "127.0.0.1"

_SERVICE = Path(__file__).with_name("service.py")

WAYS = (
    ("customers", "web"),
    ("web", "reviews"),
    ("web", "orders"),
    ("reviews", "ratings"),
    ("orders", "ratings"),
)
"""Who calls whom."""

VERSIONS = {"reviews": ("v1", "v2")}


class StartError(Exception):
    """The mesh does not come up; the text says why."""


@dataclass
class Instance:
    """One application (none for `customers`: the demo itself plays them) with its sidecar."""

    service: str
    version: str = ""
    number: int = 1  # among those of the same version
    addresses: dict[str, str] = field(default_factory=dict)  # of the sidecar: inbound, outbound, admin
    processes: list[Child] = field(default_factory=list)
    endpoints: Endpoints = field(default_factory=Endpoints)
    counted: Sample = field(default_factory=Sample)  # when it was last asked

    @property
    def name(self) -> str:
        return "-".join([self.service, *filter(None, [self.version]), *([str(self.number)] if self.number > 1 else [])])

    @property
    def has_application(self) -> bool:
        return self.service != "customers"

    @property
    def address(self) -> str:
        """By which callers reach it."""
        return self.addresses.get("inbound", "")


class Mesh:
    """`directory` must exist and be empty."""

    def __init__(self, directory: Path, children: Children) -> None:
        self.directory, self.children = directory, children
        self.control = Control(directory, children)
        self.policy = PolicyDirectory(directory / "policy")
        self.filters = directory / "filters"
        self.instances = [
            Instance("customers"),
            Instance("web"),
            Instance("reviews", "v1"),
            Instance("reviews", "v1", 2),
            Instance("reviews", "v2"),
            Instance("orders"),
            Instance("ratings"),
        ]
        self.gone: list[Instance] = []
        self.samples: deque[Sample] = deque()
        self.problem = ""
        self._nursery: trio.Nursery | None = None
        self._sampling = trio.Lock()  # an older answer must not come after a newer one

    # -- starting

    async def start(self, show: Show) -> None:
        """Everything up, and every caller told of those that it calls. Raises StartError, CommandError, ChildEnded."""
        for name in ("log", "filters", "sidecars"):
            (self.directory / name).mkdir()
        self.policy.begin()
        with trio.move_on_after(READY_S) as scope:
            await self.control.start(show)
            apply = ("policy", "apply", "-f", "policy", "-m", "the shop")
            show(shown(*apply))
            await self.control.ask(*apply)
            async with trio.open_nursery() as nursery:
                for service in dict.fromkeys(each.service for each in self.instances):
                    nursery.start_soon(self._start_service, service, show)
            await self._all_known()
        if scope.cancelled_caught:
            raise StartError(
                f"the mesh was not ready within {READY_S:g} s; {self.problem or 'see ' + str(self.directory / 'log')}"
            )

    async def _start_service(self, service: str, show: Show) -> None:
        instances = [each for each in self.instances if each.service == service]
        token = await self.token(service, show, len(instances))
        async with trio.open_nursery() as nursery:
            for each in instances:
                nursery.start_soon(self._start_instance, each, token, show)

    async def token(self, service: str, show: Show, uses: int = 1) -> str:
        """With which so many sidecars may join. Raises CommandError."""
        args = ["token", "create", "--service", service, *(["--uses", str(uses)] if uses > 1 else [])]
        show(shown(*args))
        return (await self.control.ask(*args)).out.strip()

    async def _start_instance(self, each: Instance, token: str, show: Show) -> None:
        """The sidecar, and once it is ready its application. Raises ChildEnded."""
        listening = _free_port() if each.has_application else None
        try:
            await self._start_sidecar(each, token, listening, show)
            if listening is not None:
                self._start_application(each, listening)
        finally:
            if listening is not None:
                listening.close()
        if self._nursery is not None:
            self._watch(each)

    async def _start_sidecar(self, each: Instance, token: str, listening: socket.socket | None, show: Show) -> None:
        options = ["sidecar", "--service", each.service]
        if each.version:
            options += ["--label", f"version={each.version.removeprefix('v')}"]
        if listening is not None:
            options += ["--app", f"{LOOPBACK}:{listening.getsockname()[1]}"]
        show(f"PILLION_TOKEN=… {shown(*options)} …")
        options += ["--inbound", f"{LOOPBACK}:0" if listening is not None else "off"]
        options += ["--outbound", f"{LOOPBACK}:0", "--admin", f"{LOOPBACK}:0", "--grace", "0"]
        options += ["--state-dir", str(self.directory / "sidecars" / each.name)]
        options += ["--allow-filters", FILTER_MODULE, "--filter-path", str(self.filters)]
        options += ["--access-log", str(self.access_log(each))]
        reading, telling = os.pipe2(os.O_CLOEXEC)
        try:
            child = self.children.start(
                f"sidecar of {each.name}",
                [*PYTHON, *options, "--ready-fd", str(telling)],
                environment() | {"PILLION_TOKEN": token},
                [telling],
            )
        finally:
            os.close(telling)
        each.processes.append(child)
        each.addresses = json.loads(await child.tells(reading))

    def _start_application(self, each: Instance, listening: socket.socket) -> None:
        descriptor = listening.fileno()
        command = [sys.executable, "-I", "-S", str(_SERVICE), each.service, "--listen-fd", str(descriptor)]
        if each.version:
            command += ["--version", each.version, "--failing", str(FAILING if each.version == "v2" else 0)]
        variables = environment() | {"PILLION_OUTBOUND": each.addresses["outbound"]}
        each.processes.append(self.children.start(each.name, command, variables, [descriptor]))

    async def _all_known(self) -> None:
        """Wait until every caller has the endpoints of those that it calls."""
        for caller in self.instances:
            wanted = {each.address for _, callee in self._ways_of(caller) for each in self.of(callee)}
            callees = ", ".join(callee for _, callee in self._ways_of(caller))
            self.problem = f"{caller.name} has not been told of {callees}"
            while not wanted <= {row["endpoint"] for row in await self.clusters(caller)}:  # noqa: ASYNC110
                await trio.sleep(0.05)
        self.problem = ""

    def _ways_of(self, caller: Instance) -> list[tuple[str, str]]:
        return [way for way in WAYS if way[0] == caller.service]

    # -- while it runs

    def watch_children(self, nursery: trio.Nursery) -> None:
        """From now on an end of any of them ends the nursery (ChildEnded), but for those that are killed on purpose."""
        self._nursery = nursery
        watched = {id(process) for each in self.instances for process in each.processes}
        for child in self.children.children:
            if id(child) not in watched:
                nursery.start_soon(child.watch)
        for each in self.instances:
            self._watch(each)

    def _watch(self, each: Instance) -> None:
        assert self._nursery is not None
        for child in each.processes:
            self._nursery.start_soon(child.watch)

    def of(self, service: str, version: str = "") -> list[Instance]:
        return [each for each in self.instances if each.service == service and version in ("", each.version)]

    def kill(self, each: Instance) -> None:
        """kill -9 of a sidecar and its application."""
        self.instances.remove(each)
        self.gone.append(each)
        for child in each.processes:
            child.kill()

    async def add(self, service: str, version: str, show: Show) -> Instance:
        """One more instance, which joins by a new token. Raises CommandError, ChildEnded, StartError."""
        numbers = [each.number for each in (*self.instances, *self.gone) if each.service == service]
        each = Instance(service, version, max(numbers) + 1)
        with trio.move_on_after(READY_S):
            token = await self.token(service, show)
            await self._start_instance(each, token, show)
            self.instances.append(each)
            return each
        raise StartError(f"{each.name} was not ready within {READY_S:g} s; see {self.directory / 'log'}")

    # -- reading

    def access_log(self, each: Instance) -> Path:
        return self.directory / "log" / f"access-{each.name}.jsonl"

    async def watch(self) -> None:
        """Read all sidecars twice a second, for ever; keep the last few seconds."""
        while True:
            sample = await self.sample()
            if sample is not None:
                self.samples.append(sample)
                while len(self.samples) > 2 and sample.at_s - self.samples[1].at_s >= WINDOW_S:
                    self.samples.popleft()
            self._limit_access_logs()
            await trio.sleep(POLL_S)

    async def sample(self) -> Sample | None:
        """What all sidecars count now; None where one does not answer."""
        async with self._sampling:
            sample = Sample(trio.current_time())
            for each in list(self.instances):
                try:
                    metrics, clusters = await self._admin(each, "/metrics", "/clusters")
                except CallError as error:
                    if each in self.gone:  # it was killed meanwhile
                        continue
                    self.problem = f"the admin interface of {each.name}'s sidecar does not answer: {error}"
                    return None
                each.counted = Sample(sample.at_s)
                add_sidecar(each.counted, each.service, metrics.decode(), each.endpoints.take(json.loads(clusters)))
            for each in (*self.instances, *self.gone):
                sample.add(each.counted, breakers=each not in self.gone)
            return sample

    async def clusters(self, each: Instance) -> list[dict[str, Any]]:
        """The endpoints that an instance's sidecar knows, outwards; [] where it does not answer."""
        try:
            (content,) = await self._admin(each, "/clusters")
        except CallError:
            return []
        return [row for row in json.loads(content) if row["side"] == "out"]

    async def is_registered(self, each: Instance) -> bool:
        """By its own account."""
        try:
            (content,) = await self._admin(each, "/config")
        except CallError:
            return False
        return json.loads(content)["policy"]["source"].get("registered") is True

    async def _admin(self, each: Instance, *paths: str) -> list[bytes]:
        """Raises CallError."""
        client = Client(each.addresses["admin"])
        try:
            return [(await client.get(path)).body for path in paths]
        finally:
            with trio.CancelScope(shield=True):
                await client.aclose()

    def log_size(self, each: Instance) -> int:
        try:
            return self.access_log(each).stat().st_size
        except OSError:
            return 0

    def records(self, each: Instance, since: int = 0) -> Iterator[dict[str, Any]]:
        """What an instance's access log says, from a position on."""
        try:
            file = self.access_log(each).open("rb")
        except OSError:
            return
        with file:
            file.seek(since)
            for line in file:
                if line.endswith(b"\n"):
                    yield json.loads(line)

    def _limit_access_logs(self) -> None:
        for each in self.instances:
            if self.log_size(each) > ACCESS_LOG_BYTES_MAX:
                os.truncate(self.access_log(each), 0)  # written in append mode, so the sidecar goes on at the start


def _free_port() -> socket.socket:
    sock = socket.socket()
    sock.bind((LOOPBACK, 0))
    sock.listen(128)
    return sock
