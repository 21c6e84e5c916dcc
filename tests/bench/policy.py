"""What the proxies are configured to do: the figures, once, and pillion's policy file made of them.

Pure. `envoy.py` says the same things in Envoy's words.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

TRUST_DOMAIN = "bench.local"
PORT_NAME = "api"
CALLER, CALLEE = "web", "reviews"

TOTAL_S, TRY_S, IDLE_S = 10.0, 3.0, 60.0
RETRIES, BUDGET_PERCENT, BUDGET_MIN = 2, 20, 1
LIMIT = 1024  # connections, pending requests, requests in flight
FAILURES, OPEN_S, OPEN_MAX_S = 7, 1.0, 60.0
METHODS = ("GET", "POST", "PUT")
FILTER = "bench_tag:Tag"
BETA_PATH, BETA_HEADER, BETA_TRY_S = "/beta", "x-beta", 1.0

SERVICES_PER_FILE = 250


@dataclass(frozen=True, slots=True)
class Service:
    """A service with its endpoints; `mesh` says whether a sidecar with mutual TLS stands before them."""

    name: str
    endpoints: tuple[tuple[str, int], ...]
    mesh: bool = True
    grpc: bool = False
    paths: tuple[str, ...] = ()  # each with a route of its own; those that end in /** take what is below as well
    filters: bool = False


def many_paths(routes: int) -> tuple[str, ...]:
    """Paths of a large interface: every other one exact, every other one with all that is below.

    As many as make so many routes, together with the two that every service has.
    """
    return tuple(
        f"/api/v1/area-{number % 100:02}/item-{number:05}" + ("/**" if number % 2 else "")
        for number in range(routes - 2)
    )


def spiffe_id(service: str) -> str:
    return f"spiffe://{TRUST_DOMAIN}/service/{service}"


def seconds(value: float) -> str:
    return f"{value:g}s"


def pillion(services: Sequence[Service], caller: str = CALLER) -> list[str]:
    """The texts of the files of a policy folder."""
    head = {
        "version": 1,
        "defaults": {
            "timeout": {"total": seconds(TOTAL_S), "try": seconds(TRY_S), "idle": seconds(IDLE_S)},
            "retry": {
                "max_retries": RETRIES,
                "when": ["connect-error", "reset", 503, *(["unavailable"] if any(s.grpc for s in services) else [])],
                "budget": {"percent": f"{BUDGET_PERCENT}%", "min_per_second": BUDGET_MIN},
            },
            "limits": {"connections": LIMIT, "pending": LIMIT, "requests": LIMIT},
            "circuit_breaker": {
                "consecutive_failures": FAILURES,
                "open_for": seconds(OPEN_S),
                "max_open": seconds(OPEN_MAX_S),
            },
        },
        "services": {caller: {}},
    }
    files = [head]
    for first in range(0, len(services), SERVICES_PER_FILE):
        some = services[first : first + SERVICES_PER_FILE]
        files.append({"version": 1, "services": {service.name: _service(service, caller) for service in some}})
    return [yaml.safe_dump(file, sort_keys=False) for file in files]


def _service(service: Service, caller: str) -> dict[str, Any]:
    said: dict[str, Any] = {
        "ports": {PORT_NAME: {"port": 8080, "protocol": "grpc" if service.grpc else "http"}},
        "address": [f"{host}:{port}" for host, port in service.endpoints],
        "routes": [
            {
                "name": "beta",
                "match": {"path": f"{BETA_PATH}/**", "headers": {BETA_HEADER: "1"}},
                "timeout": {"try": seconds(BETA_TRY_S)},
            },
            *({"name": f"path-{number}", "match": {"path": path}} for number, path in enumerate(service.paths)),
            {"name": "main"},
        ],
    }
    if service.filters:
        said["filters"] = [{"use": FILTER, "side": "out"}]
    if service.mesh:
        said["authz"] = {"default": "deny", "allow": [{"from": [caller], "methods": list(METHODS)}]}
    else:
        said["tls"] = "plain"
    return said


def many_services(reachable: Service, services: int, endpoints: int) -> list[Service]:
    """A mesh of this size; all but the first are addresses at which nobody need be, for nobody is called there."""
    return [
        reachable,
        *(
            Service(
                f"service-{number:04}",
                tuple((f"127.{1 + number // 250}.{number % 250}.{1 + each}", 8080) for each in range(endpoints)),
            )
            for number in range(1, services)
        ),
    ]
