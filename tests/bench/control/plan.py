"""Who serves what, who calls whom, and the policy that says so: the mesh that a run simulates.

Pure and without chance: the same sizes always give the same mesh. Invariants: every sidecar serves one service; every
service has a sidecar that registers (where there are as many sidecars as services, or more) and enough static addresses
that all services together have the endpoints asked for; every sidecar sees `USED` services besides its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

USED = 10  # services that a sidecar calls
CALLED = 5  # of these, named under `calls`; the others it asks for when it connects
PORT = 15006


@dataclass(frozen=True, slots=True)
class Sizes:
    sidecars: int
    services: int
    endpoints: int

    def __post_init__(self) -> None:
        if not (0 < self.services <= self.sidecars):
            raise ValueError("there must be at least one service, and a sidecar for each of them")
        if self.endpoints < self.sidecars:
            raise ValueError("every sidecar is an endpoint, so there must be at least as many endpoints as sidecars")


class Plan:
    """A mesh of these sizes."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes

    @property
    def static(self) -> int:
        """Addresses that the policy names, in all; the other endpoints are the sidecars."""
        return self.sizes.endpoints - self.sizes.sidecars

    def name(self, service: int) -> str:
        return f"s{service:05d}"

    def service_of(self, sidecar: int) -> int:
        return sidecar % self.sizes.services

    def used_by(self, sidecar: int) -> tuple[int, ...]:
        """The services that a sidecar calls: spread evenly, so that each has some USED callers a sidecar.

        Two are not even: every tenth sidecar calls service 1, and all call service 2 (a service that everybody needs,
        such as a log collector): what a flap of theirs costs is compared with that of an ordinary one.
        """
        own, count = self.service_of(sidecar), self.sizes.services
        found: dict[int, None] = {}
        if count > 3:
            if sidecar % 10 == 0:
                found[1] = None
            found[2] = None
        step = 0
        while len(found) < min(USED, count - 1) and step < 10 * USED + count:
            step += 1
            candidate = (own + step * step + 3 * step) % count
            if candidate not in (own, 1, 2) or (count <= 3 and candidate != own):
                found[candidate] = None
        found.pop(own, None)
        return tuple(found)

    def called_by(self, service: int) -> tuple[int, ...]:
        """What stands under `calls` of a service."""
        return self.used_by(service)[:CALLED]

    def asked_by(self, sidecar: int) -> tuple[int, ...]:
        """What a sidecar asks for beyond the calls of its service."""
        declared = set(self.called_by(self.service_of(sidecar)))
        return tuple(each for each in self.used_by(sidecar) if each not in declared)

    @cached_property
    def users(self) -> dict[int, tuple[int, ...]]:
        """The sidecars that are sent a service because they call it."""
        found: dict[int, list[int]] = {service: [] for service in range(self.sizes.services)}
        for sidecar in range(self.sizes.sidecars):
            for service in {*self.called_by(self.service_of(sidecar)), *self.asked_by(sidecar)}:
                found[service].append(sidecar)
        return {service: tuple(sidecars) for service, sidecars in found.items()}

    def providers(self, service: int) -> tuple[int, ...]:
        return tuple(range(service, self.sizes.sidecars, self.sizes.services))

    def ordinary(self) -> Iterator[int]:
        """Services with as many callers as most have."""
        for service in range(self.sizes.services):
            if service not in (1, 2) and self.users[service]:
                yield service

    # -- policy

    def addresses(self, service: int) -> list[str]:
        count, rest = divmod(self.static, self.sizes.services)
        count += service < rest
        return [f"10.{service >> 8 & 255}.{service & 255}.{index + 1}:{PORT}" for index in range(min(count, 250))]

    def service_text(self, service: int, timeout_ms: int = 5000) -> str:
        """One service as it stands in a policy file."""
        calls = ", ".join(f"{self.name(each)}: {{}}" for each in self.called_by(service))
        addresses = ", ".join(f'"{each}"' for each in self.addresses(service))
        return (
            f"  {self.name(service)}:\n"
            f"    ports: {{http: {{port: 8000}}}}\n"
            + (f"    address: [{addresses}]\n" if addresses else "")
            + f"    timeout: {{total: {timeout_ms}ms, try: 1s}}\n"
            + "    circuit_breaker: {consecutive_failures: 5}\n"
            + (f"    calls: {{{calls}}}\n" if calls else "")
        )

    def file(self, services: range | list[int], timeout_ms: int = 5000) -> str:
        return "version: 1\nservices:\n" + "".join(self.service_text(each, timeout_ms) for each in services)

    def files(self, services_a_file: int = 100) -> dict[str, str]:
        """The whole policy, as a folder would hold it."""
        found = {"defaults.yaml": self.defaults()}
        for begin in range(0, self.sizes.services, services_a_file):
            end = min(begin + services_a_file, self.sizes.services)
            found[f"services-{begin:05d}.yaml"] = self.file(range(begin, end))
        return found

    def defaults(self, idle_s: int = 60) -> str:
        return f"version: 1\ndefaults:\n  timeout: {{idle: {idle_s}s}}\n"

    # -- what a sidecar says

    def address_of(self, sidecar: int) -> str:
        """Where a simulated sidecar comes from: an address of its own on loopback, as on a network, so that what
        the control plane allows one address is not shared by all of them."""
        return f"127.1.{sidecar >> 8 & 255}.{sidecar & 255}"
