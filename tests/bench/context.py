"""What every section of rows is given: the stage, the backends, the pace, and the ways to start each contender.

Must not know what is measured. A contender whose program is missing is left out, and said so.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from . import backends, contenders, plain_hops
from .backends import Backend, Target
from .contenders import Identities
from .load import MISHAPS
from .stage import (
    CADDY,
    COMPILED,
    ENVOY,
    EXT_PROC,
    GRPCIO,
    H2LOAD,
    HAPROXY,
    MITMPROXY,
    NGINX,
    PILLION,
    Stage,
    Tool,
    missing,
)
from .table import OURS, OURS_COMPILED, Group, Row

ENVOYS = ("Envoy HTTP/1.1", "Envoy HTTP/2")
EXT_PROC_NAME = "Envoy with ext_proc"
MESH = (OURS, OURS_COMPILED, *ENVOYS)
HOP = (OURS, OURS_COMPILED, "HAProxy", "nginx", "Caddy", "Envoy", "mitmproxy")
MB, KB = 1e6, 1e3

NEEDS: dict[str, tuple[Tool, ...]] = {
    OURS: (PILLION,),
    OURS_COMPILED: (COMPILED,),
    **dict.fromkeys((*ENVOYS, "Envoy"), (ENVOY,)),
    EXT_PROC_NAME: (ENVOY, EXT_PROC, GRPCIO),
    "HAProxy": (HAPROXY,),
    "nginx": (NGINX,),
    "Caddy": (CADDY,),
    "mitmproxy": (MITMPROXY,),
}

Starts = dict[str, Callable[[], Target]]


@dataclass(frozen=True, slots=True)
class Pace:
    """How long and how often."""

    rounds: int
    warm_s: float
    window_s: float
    rate_s: float
    bulk_bytes: int
    few: int  # rounds of what needs fresh processes

    def with_rounds(self, rounds: int) -> "Pace":
        return Pace(rounds, self.warm_s, self.window_s, self.rate_s, self.bulk_bytes, rounds)


QUICK = Pace(rounds=2, warm_s=0.3, window_s=1.0, rate_s=1.5, bulk_bytes=1 << 28, few=1)
FULL = Pace(rounds=5, warm_s=0.8, window_s=2.5, rate_s=4.0, bulk_bytes=1 << 30, few=3)


@dataclass(slots=True)
class Context:
    """What every section is given."""

    stage: Stage
    backend: Backend
    identities: Identities
    pace: Pace
    only: tuple[str, ...] = ()
    trouble: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # what was not measured, and what would install it
    _grpc_backend: Backend | None = None

    def wants(self, key: str) -> bool:
        """Whether a row, or anything under a section, is asked for."""
        return not self.only or any(
            key == asked or key.startswith(f"{asked}.") or asked.startswith(f"{key}.") for asked in self.only
        )

    def say(self, text: str) -> None:
        print(f"  {text}", file=sys.stderr, flush=True)

    def failed(self, rows: Sequence[Row], contender: str, error: Exception) -> None:
        self.trouble.append(f"{rows[0].key if rows else ''}: {contender}: {error}")
        self.say(f"{contender} failed: {str(error)[:2000]}")
        for row in rows:
            row.add(contender, None, 1)

    @property
    def grpc_backend(self) -> Backend:
        """Started when it is needed first."""
        if self._grpc_backend is None:
            self._grpc_backend = backends.grpc_backend(self.stage)
        return self._grpc_backend

    def has(self, what: str, *tools: Tool) -> bool:
        """Whether these tools are there. If not, `what` is skipped, and the report says so."""
        lacking = [tool for tool in missing(self.stage.tools) if tool in tools]
        if lacking and what not in self.skipped:
            self.skipped[what] = "; ".join(tool.install for tool in lacking)
            self.say(f"{what} is skipped: {', '.join(tool.name for tool in lacking)} missing: {self.skipped[what]}")
        return not lacking

    def can_call(self) -> bool:
        """Whether gRPC can be measured."""
        return self.has("gRPC", H2LOAD, GRPCIO)

    def present(self, known: Starts) -> Starts:
        """Those whose programs are there."""
        return {name: start for name, start in known.items() if self.has(name, *NEEDS[name])}

    def pairs(self, app_port: int, *, bodies: bool = False, grpc: bool = False, compiled: bool = True) -> Starts:
        """Two hops with mutual TLS."""
        stage, ids = self.stage, self.identities
        known: Starts = {
            own: partial(contenders.pillion_pair, stage, app_port, ids, grpc=grpc, own=own)
            for own in ((OURS, OURS_COMPILED) if compiled else (OURS,))
        }
        for name, http2 in zip(ENVOYS, (False, True), strict=True):
            known[name] = partial(contenders.envoy_pair, stage, app_port, ids, http2=http2, bodies=bodies, grpc=grpc)
        return self.present(known)

    def hops(self, names: Sequence[str], app_port: int, paths: Sequence[str] = ()) -> Starts:
        """One plain hop. `paths`: each with a route of its own, in pillion and Envoy."""
        stage, ids = self.stage, self.identities
        service = contenders.plain_service(app_port, paths)
        known: Starts = {
            OURS: partial(contenders.pillion_plain, stage, ids, service),
            OURS_COMPILED: partial(contenders.pillion_plain, stage, ids, service, OURS_COMPILED),
            "HAProxy": partial(plain_hops.haproxy_plain, stage, app_port),
            "nginx": partial(plain_hops.nginx_plain, stage, app_port),
            "Caddy": partial(plain_hops.caddy_plain, stage, app_port),
            "Envoy": partial(contenders.envoy_plain, stage, ids, service),
            "mitmproxy": partial(plain_hops.mitmproxy_plain, stage, app_port),
        }
        return self.present({name: known[name] for name in names})

    def filtering(self, app_port: int) -> Starts:
        """One plain hop with a filter in Python on every request."""
        stage, ids = self.stage, self.identities
        return self.present(
            {
                OURS: partial(contenders.pillion_filtering, stage, app_port, ids),
                OURS_COMPILED: partial(contenders.pillion_filtering, stage, app_port, ids, OURS_COMPILED),
                EXT_PROC_NAME: partial(contenders.envoy_filtering, stage, app_port, ids),
            }
        )

    @contextmanager
    def fresh(self, start: Callable[[], Target]) -> Iterator[Target]:
        """A target that ends with the block."""
        known = len(self.stage.processes)
        try:
            yield start()
        finally:
            self.stage.end(self.stage.processes[known:])

    @contextmanager
    def together(self, starts: Starts, rows: Sequence[Row]) -> Iterator[dict[str, Target]]:
        """All of these, up at once. One that does not start has failed in these rows, and the others go on."""
        known = len(self.stage.processes)
        targets: dict[str, Target] = {}
        try:
            for name, start in starts.items():
                before = len(self.stage.processes)
                try:
                    targets[name] = start()
                except MISHAPS as error:
                    self.stage.end(self.stage.processes[before:])
                    self.failed(rows, name, error)
            yield targets
        finally:
            self.stage.end(self.stage.processes[known:])


Section = Callable[[Context], list[Group]]


def in_turn(names: Sequence[str], number: int) -> list[str]:
    """The names, beginning with another one each time."""
    at = number % max(1, len(names))
    return [*names[at:], *names[:at]]


def unfinished(name: str, number: int, *rows: Row) -> list[Row]:
    """The rows that have no value of this round yet."""
    return [row for row in rows if len(row.series.get(name, ())) <= number]
