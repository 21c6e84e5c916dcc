"""The demo's mesh: a directory, identities, policy files, an application and a sidecar for each instance.

Starts it all and reads the sidecars' admin interfaces and access logs. Must not know the story. Ports are never
guessed: the demo itself binds those of the applications and hands them over, sidecars pick their own (port 0) and tell
them, and only then are the addresses written into the policy. Invariant: whatever is started is in `children`, whatever
is written below `directory`.
"""

import json
import os
import socket
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import trio

from certs.authority import bundle_of, create_root, new_key
from certs.files import write_identity
from certs.spiffe import SpiffeId

from .client import CallError, Client
from .figures import Sample, add_sidecar
from .policy import PolicyDirectory
from .processes import Child, Children

TRUST_DOMAIN = "demo.mesh"
LEAF_TTL = timedelta(days=1)
READY_S = 30.0
POLL_S = 0.5
WINDOW_S = 5.0
ACCESS_LOG_BYTES_MAX = 16 * 1024 * 1024
FAILING = 0.3
FILTER_MODULE = "shop_filters"

_SIDECAR = (sys.executable, "-P", "-c", "import sys; from control_plane.cli import main; sys.exit(main())", "sidecar")
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
    addresses: dict[str, str] = field(default_factory=dict)  # of the sidecar: inbound, outbound, admin

    @property
    def name(self) -> str:
        return f"{self.service}-{self.version}" if self.version else self.service

    @property
    def has_application(self) -> bool:
        return self.service != "customers"

    @property
    def address_word(self) -> str:
        return f"ADDRESS_{self.name.replace('-', '_').upper()}"


class Mesh:
    """`directory` must exist and be empty."""

    def __init__(self, directory: Path, children: Children) -> None:
        self.directory, self.children = directory, children
        self.policy = PolicyDirectory(directory / "policy")
        self.filters = directory / "filters"
        self.instances = [
            Instance("customers"),
            Instance("web"),
            Instance("reviews", "v1"),
            Instance("reviews", "v2"),
            Instance("orders"),
            Instance("ratings"),
        ]
        self.samples: deque[Sample] = deque()
        self.problem = ""

    # -- starting

    async def start(self) -> None:
        """Everything up and the policy in force at every sidecar. Raises StartError."""
        for name in ("log", "filters", "identities"):
            (self.directory / name).mkdir()
        self._issue_identities()
        self.policy.begin()
        sockets = {each.name: _free_port() for each in self.instances if each.has_application}
        try:
            with trio.move_on_after(READY_S) as scope:
                await self._start_sidecars(sockets)
            if scope.cancelled_caught:
                raise StartError(f"the sidecars were not ready within {READY_S:g} s; see {self.directory / 'log'}")
            self._start_applications(sockets)
        finally:
            for sock in sockets.values():
                sock.close()
        addresses = {each.address_word: each.addresses["inbound"] for each in self.instances if each.has_application}
        await self.in_force(self.policy.complete(addresses), READY_S)

    def _issue_identities(self) -> None:
        now = datetime.now(UTC).replace(microsecond=0)
        root = create_root(TRUST_DOMAIN, now)
        issuing = root.issue_authority(now)
        for service in dict.fromkeys(each.service for each in self.instances):
            key = new_key()
            spiffe_id = SpiffeId.for_service(TRUST_DOMAIN, service)
            leaf = issuing.issue_to_key(key.public_key(), spiffe_id, LEAF_TTL, now)
            write_identity(self.directory / "identities" / service, [leaf, *issuing.chain], key, bundle_of(root))

    async def _start_sidecars(self, sockets: dict[str, socket.socket]) -> None:
        async with trio.open_nursery() as nursery:
            for each in self.instances:
                reading, telling = os.pipe2(os.O_CLOEXEC)
                try:
                    child = self.children.start(
                        f"sidecar of {each.name}",
                        self._sidecar_command(each, sockets.get(each.name), telling),
                        _environment(),
                        [telling],
                    )
                finally:
                    os.close(telling)
                nursery.start_soon(_await_ready, each, child, reading)

    def _sidecar_command(self, each: Instance, application: socket.socket | None, telling: int) -> list[str]:
        command = [*_SIDECAR, "--service", each.service, "--policy", str(self.policy.path)]
        command += ["--identity", str(self.directory / "identities" / each.service)]
        if application is None:
            command += ["--inbound", "off"]
        else:
            command += ["--inbound", "127.0.0.1:0", "--app", f"127.0.0.1:{application.getsockname()[1]}"]
        command += ["--outbound", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--grace", "0"]
        command += ["--allow-filters", FILTER_MODULE, "--filter-path", str(self.filters)]
        command += ["--access-log", str(self.access_log(each)), "--ready-fd", str(telling)]
        return command

    def _start_applications(self, sockets: dict[str, socket.socket]) -> None:
        for each in self.instances:
            if not each.has_application:
                continue
            descriptor = sockets[each.name].fileno()
            command = [sys.executable, "-I", "-S", str(_SERVICE), each.service, "--listen-fd", str(descriptor)]
            if each.version:
                command += ["--version", each.version, "--failing", str(FAILING if each.version == "v2" else 0)]
            environment = _environment() | {"PILLION_OUTBOUND": each.addresses["outbound"]}
            self.children.start(each.name, command, environment, [descriptor])

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
        sample = Sample(trio.current_time())
        for each in self.instances:
            client = Client(each.addresses["admin"])
            try:
                metrics = await client.get("/metrics")
                clusters = await client.get("/clusters")
            except CallError as error:
                self.problem = f"the admin interface of {each.name}'s sidecar does not answer: {error}"
                return None
            finally:
                with trio.CancelScope(shield=True):
                    await client.aclose()
            add_sidecar(sample, each.service, metrics.body.decode(), json.loads(clusters.body))
        return sample

    async def in_force(self, revision: str, within_s: float) -> None:
        """Wait until every sidecar serves this policy. Raises StartError."""
        with trio.move_on_after(within_s):
            while True:
                sample = await self.sample()
                if sample is not None and sample.revisions == {revision}:
                    return
                await trio.sleep(0.1)
        raise StartError(
            f"policy {revision} is not in force everywhere within {within_s:g} s; {self.problem or self._refusals()}"
        )

    def _refusals(self) -> str:
        for path in sorted((self.directory / "log").glob("sidecar-*.log")):
            for line in path.read_text(errors="replace").splitlines():
                if "refused" in line:
                    return f"{path.stem}: {line}"
        return f"see {self.directory / 'log'}"

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
    sock.bind(("127.0.0.1", 0))
    sock.listen(128)
    return sock


def _environment() -> dict[str, str]:
    """Ours, without what would configure a sidecar or lead a service's calls elsewhere."""
    unwanted = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PILLION_") and name.lower() not in unwanted
    }


async def _await_ready(each: Instance, child: Child, reading: int) -> None:
    told = b""
    try:
        while not told.endswith(b"\n"):
            await trio.lowlevel.wait_readable(reading)
            data = os.read(reading, 4096)
            if not data:  # it has ended
                await child.watch()
            told += data
    finally:
        os.close(reading)
    each.addresses = json.loads(told)
