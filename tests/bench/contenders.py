"""pillion and Envoy, started on a stage as paths: something to call, and processes to account for.

Every path is ready when its function returns: a request has been answered with 200. A new proxy is compared by adding a
function here or in `plain_hops.py` and naming it in `context.py`. Must not know what is measured.
"""

import json
import os
import select
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from certs.authority import bundle_of, create_root, new_key
from certs.files import write_identity
from certs.spiffe import SpiffeId

from . import envoy, policy
from .backends import TENANT_PATH, Target, ready
from .exchange import Client
from .policy import CALLEE, CALLER, Service
from .stage import HOST, START_LIMIT_S, BenchError, Process, Stage, free_port, until
from .table import OURS

FILTERS = Path(__file__).parent / "filters"


@dataclass(frozen=True, slots=True)
class Identities:
    """A certificate authority made for this run, and directories of what it has issued."""

    directory: Path

    @classmethod
    def make(cls, directory: Path) -> "Identities":
        now = datetime.now(UTC)
        root = create_root(policy.TRUST_DOMAIN, now)
        issuing = root.issue_authority(now)
        bundle = bundle_of(root)
        for name in (CALLER, CALLEE):
            key = new_key()
            spiffe_id = SpiffeId.for_service(policy.TRUST_DOMAIN, name)
            leaf = issuing.issue_to_key(key.public_key(), spiffe_id, timedelta(hours=12), now)
            write_identity(directory / name, [leaf, *issuing.chain], key, bundle)
        return cls(directory)

    @property
    def caller(self) -> Path:
        return self.directory / CALLER

    @property
    def callee(self) -> Path:
        return self.directory / CALLEE


# -- one plain hop


def envoy_plain(stage: Stage, identities: Identities, service: Service) -> Target:
    return envoy_out(stage, [service], identities, "Envoy")


def pillion_plain(stage: Stage, identities: Identities, service: Service, own: str = OURS) -> Target:
    return pillion_out(stage, [service], identities, own)


def plain_service(app_port: int, paths: Sequence[str] = ()) -> Service:
    return Service(CALLEE, ((HOST, app_port),), mesh=False, paths=tuple(paths))


# -- one plain hop with a filter in Python on every request


def pillion_filtering(stage: Stage, app_port: int, identities: Identities, own: str = OURS) -> Target:
    service = Service(CALLEE, ((HOST, app_port),), mesh=False, filters=True)
    return _filters(pillion_out(stage, [service], identities, own))


def envoy_filtering(stage: Stage, app_port: int, identities: Identities) -> Target:
    """Envoy, and a grpc.aio server that it asks."""
    port = free_port()
    server = stage.start("ext_proc", [sys.executable, "-m", "tests.bench.ext_proc", str(port)])
    until(lambda: _accepts(port), server, "its port")
    features = envoy.Features(ext_proc_port=port)
    found = envoy_out(stage, [plain_service(app_port)], identities, "Envoy with ext_proc", features)
    return _filters(replace(found, proxies=(*found.proxies, server)))


def _filters(target: Target) -> Target:
    """The filter is in force: the application sees what it sets."""
    with Client(target.port) as client:
        seen = client.get(target.host, TENANT_PATH)
    if seen != (200, len("standard")):
        raise BenchError(f"{target.name}: the filter has not set its header field: {seen}")
    return target


# -- two hops


def pillion_pair(stage: Stage, app_port: int, identities: Identities, grpc: bool = False, own: str = OURS) -> Target:
    """Application → pillion → mutual TLS → pillion → application. `own`: which build of it, by its contender's name."""
    mesh_port = free_port()
    services = [Service(CALLEE, ((HOST, mesh_port),), grpc=grpc)]
    inbound, _ = _pillion(
        stage,
        f"{own} in",
        services,
        [
            *("--service", CALLEE, "--identity", str(identities.callee), "--app", f"{HOST}:{app_port}"),
            *("--inbound", f"{HOST}:{mesh_port}", "--outbound", "off"),
        ],
        own,
    )
    outbound = pillion_out(stage, services, identities, own)
    _refuses(outbound)
    return replace(outbound, proxies=(*outbound.proxies, inbound), mesh_port=mesh_port)


def pillion_out(stage: Stage, services: Sequence[Service], identities: Identities, own: str = OURS) -> Target:
    """The caller's sidecar alone."""
    options = ["--service", CALLER, "--identity", str(identities.caller), "--inbound", "off", "--outbound", f"{HOST}:0"]
    if any(service.filters for service in services):
        options += ["--filter-path", str(FILTERS), "--allow-filters", policy.FILTER.partition(":")[0]]
    process, addresses = _pillion(stage, f"{own} out", services, options, own)
    return ready(Target(own, _port(addresses["outbound"]), CALLEE, (process,), grpc=services[0].grpc))


def _pillion(
    stage: Stage, name: str, services: Sequence[Service], options: Sequence[str], own: str
) -> tuple[Process, dict[str, str]]:
    command = pillion_command(stage, services, own)
    read_end, write_end = os.pipe()
    try:
        process = stage.start(
            name,
            [*command, *options, "--admin", f"{HOST}:0", "--ready-fd", str(write_end)],
            pass_fds=[write_end],
        )
    finally:
        os.close(write_end)
    try:
        return process, json.loads(_read_line(read_end, process))
    finally:
        os.close(read_end)


def pillion_command(stage: Stage, services: Sequence[Service], own: str = OURS) -> list[str]:
    """The beginning of the command line, with the policy written."""
    folder = stage.folder("policy")
    for number, text in enumerate(policy.pillion(services)):
        (folder / f"{number}.yaml").write_text(text)
    return [stage.tools[own], "sidecar", "--policy", str(folder)]


def _read_line(descriptor: int, process: Process) -> bytes:
    line = b""
    deadline = time.monotonic() + START_LIMIT_S
    while not line.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([descriptor], [], [], left)[0]:
            raise BenchError(f"{process.name} was not ready after {START_LIMIT_S:g} s; it said:\n{process.said()}")
        data = os.read(descriptor, 65536)
        if not data:
            process.popen.wait(START_LIMIT_S)
            process.check()
        line += data
    return line


def envoy_pair(
    stage: Stage, app_port: int, identities: Identities, http2: bool, bodies: bool = False, grpc: bool = False
) -> Target:
    """The same with Envoy. `bodies`: without deadlines, which in Envoy would end a long body."""
    mesh_port = free_port()
    name = "Envoy HTTP/2" if http2 else "Envoy HTTP/1.1"
    inbound = _envoy(
        stage,
        f"{name} in",
        envoy.inbound(mesh_port, app_port, identities.callee, CALLEE, [CALLER], http2, grpc),
        mesh_port,
    )
    services = [Service(CALLEE, ((HOST, mesh_port),), grpc=grpc)]
    outbound = envoy_out(stage, services, identities, name, envoy.Features(http2=http2, deadlines=not bodies))
    _refuses(outbound)
    return replace(outbound, proxies=(*outbound.proxies, inbound), mesh_port=mesh_port)


def envoy_out(
    stage: Stage,
    services: Sequence[Service],
    identities: Identities,
    name: str = "Envoy",
    features: envoy.Features | None = None,
) -> Target:
    port = free_port()
    config = envoy.outbound(port, services, identities.caller, CALLER, features)
    process = _envoy(stage, f"{name} out", config, port)
    return ready(Target(name, port, CALLEE, (process,), grpc=services[0].grpc))


def _envoy(stage: Stage, name: str, config: envoy.Json, port: int) -> Process:
    process = stage.start(name, envoy_command(stage, config))
    until(lambda: _accepts(port), process, "its listener")
    return process


def envoy_command(stage: Stage, config: envoy.Json) -> list[str]:
    file = stage.folder("envoy") / "config.json"
    file.write_text(json.dumps(config))
    options = ["--concurrency", "1", "--disable-hot-restart", "--log-level", "error"]
    return [stage.tools["envoy"], "-c", str(file), *options]


# -- shared


def _refuses(target: Target) -> None:
    """Authorization is in force: what no rule allows is refused."""
    with Client(target.port) as client:
        client.send_head("DELETE", "/", target.host)
        status, _, _ = client.read_head()
    if status != 403:
        raise BenchError(f"{target.name} answered {status} to a method that its rules do not allow")


def _accepts(port: int) -> bool:
    try:
        Client(port).close()
    except OSError:
        return False
    return True


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])
