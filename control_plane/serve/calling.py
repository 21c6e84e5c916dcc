"""What a handler of the operator API is given: the request, decoded, and whoever asks."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import trio

from control_plane.state.access import Who

from .replica import Replica
from .throttle import Throttle

WAITING_MAX = 500  # requests that wait for something to happen


class Watched(Protocol):
    """A folder of policy files that is followed. `problem`: why its content is not in force, or ""."""

    problem: str

    def file_of(self, document: str) -> str | None:
        """The file that names this document (`defaults`, `enforced`, `services/NAME`); None: none does."""


Aside = Callable[[Callable[[], Any]], Awaitable[Any]]
"""Runs what takes long, so that the others go on."""


@dataclass(slots=True)
class Shared:
    """What the requests of one application share."""

    replica: Replica
    throttle: Throttle = field(default_factory=Throttle)
    join_turn: trio.Lock = field(default_factory=trio.Lock)
    policy_turn: trio.Lock = field(default_factory=trio.Lock)
    watched: Watched | None = None
    aside: Aside = trio.to_thread.run_sync
    waiting: int = 0


@dataclass(frozen=True, slots=True)
class Call:
    """`who` is anybody's where the operation is open to all."""

    shared: Shared
    who: Who
    expires: float
    body: Any
    query: dict[str, Any]
    path: dict[str, Any]

    @property
    def replica(self) -> Replica:
        return self.shared.replica
