"""Services that a request asks for and this sidecar does not hold yet.

A sidecar that runs from a control plane holds what its service calls. A request for another service of the mesh is
parked: its reading is paused, the service is asked for once, however many requests want it, and the request goes on by
the plans then in force. Must not know who sends services. Reached only where a host is in no plan, so a warm request
pays nothing.
Invariants: a parked request is let go within WAIT_S, and parked at most once for a name; who left meanwhile is not
answered; what is parked is bounded.
"""

from functools import partial
from typing import TYPE_CHECKING

import trio

from sidecar.policy.outcome import Outcome

if TYPE_CHECKING:
    from .serving import Serving
    from .world import World

WAIT_S = 5.0
PARKED_MAX = 1024
MESH = b".mesh"


def service_named_by(host: bytes) -> bytes:
    """The service that a host would name: NAME, NAME.mesh, PORT.NAME or PORT.NAME.mesh; b"" for other hosts."""
    labels = host.removesuffix(MESH).split(b".")
    return labels[-1] if len(labels) <= 2 and all(labels) else b""


class _Wait:
    """The requests that wait for one service."""

    def __init__(self) -> None:
        self.parked: list[Serving] = []
        self.came = trio.Event()


class OnDemand:
    """The requests of one sidecar that wait for services."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.waits: dict[bytes, _Wait] = {}
        self.count = 0

    def park(self, serving: "Serving", host: bytes) -> bool:
        """Whether the request now waits for its service, or has been answered; False: nobody could bring that one."""
        world = self.world
        names = world.names
        if names is None or world.want is None:
            return False
        name = service_named_by(host)
        if name not in names or name.decode() in world.plans.snapshot.services:
            return False
        if self.count >= PARKED_MAX:
            serving.refuse(Outcome.OVERFLOW, "too many requests wait for services to be sent by the control plane")
            return True
        wait = self.waits.get(name)
        if wait is None:
            wait = self.waits[name] = _Wait()
            world.errand(self._fetch, name, wait)
        wait.parked.append(serving)
        self.count += 1
        serving.park()
        return True

    def swapped(self) -> None:
        """New plans are in force: whoever waits for a service that they hold goes on."""
        services = self.world.plans.snapshot.services
        for name in [name for name in self.waits if name.decode() in services]:
            self.world.reactor.call(self._release, name, self.waits[name], "")

    async def _fetch(self, name: bytes, wait: _Wait) -> None:
        world = self.world
        problem = f"it was not sent within {WAIT_S:g} s"
        try:
            with trio.move_on_after(WAIT_S):
                assert world.want is not None
                await world.want(name.decode())
                await wait.came.wait()  # asked for is not yet sent
        except Exception as exc:  # whatever goes wrong with the control plane is not these requests' end
            problem = str(exc) or type(exc).__name__
        world.reactor.call(self._release, name, wait, problem)

    def _release(self, name: bytes, wait: _Wait, problem: str) -> None:
        if self.waits.get(name) is not wait:
            return
        del self.waits[name]
        wait.came.set()
        world = self.world
        text = name.decode()
        missing = text not in world.plans.snapshot.services and world.names is not None and name in world.names
        if missing:
            world.note(f"want {text}", f'{Outcome.NO_HEALTHY_ENDPOINT.reason}: service "{text}": {problem}')
        self.count -= len(wait.parked)
        answer = f'service "{text}" could not be fetched from the control plane' if missing else ""
        for serving in wait.parked:  # later, and each by itself: what goes wrong with one is not the others' end
            world.reactor.soon.append(partial(serving.unpark, answer))
