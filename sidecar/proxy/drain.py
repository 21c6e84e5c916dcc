"""How a sidecar ends: nothing is cut that can still finish, and all of it is over within 25 s.

Inbound goes on accepting until its callers have gone elsewhere (or 5 s), then what is in flight finishes; outbound
serves until the application has gone, or `grace_s`. Must not know signals or processes.
"""

from typing import TYPE_CHECKING, Protocol

import trio

from .connect import DialError

if TYPE_CHECKING:
    from .world import World

ACCEPT_S = 5.0
QUIET_S = 0.5  # without any inbound connection: nobody is left who must be told
TOTAL_S = 25.0
POLL_S = 0.05


class Doors(Protocol):
    """What opens and closes the listeners."""

    @property
    def serves_application(self) -> bool: ...
    def close_inbound(self) -> None: ...
    def close(self) -> None: ...


async def drain(world: "World", doors: Doors, grace_s: float) -> None:
    """Returns when everything has finished, or time is up."""
    world.draining = True
    began = trio.current_time()
    with trio.move_on_at(began + TOTAL_S):
        await _until_callers_know(world, began)
        doors.close_inbound()
        await _until_gone(world, "in")
        with trio.move_on_at(began + grace_s):
            await _until_tunnels_end(world)
        if doors.serves_application:
            with trio.move_on_at(began + grace_s):
                await _until_application_gone(world)
        await _until_gone(world, "out")
    doors.close()


async def _until_callers_know(world: "World", began: float) -> None:
    quiet_since = began
    while True:
        now = trio.current_time()
        world.reactor.call(_tell, world, "in")
        if _count(world, "in"):
            quiet_since = now
        if now - quiet_since >= QUIET_S or now - began >= ACCEPT_S:
            return
        await trio.sleep(POLL_S)


def _tell(world: "World", side: str) -> None:
    for down in list(world.downstreams):
        if down.entry.side == side:
            down.drain()


def _count(world: "World", side: str) -> int:
    """Connections that are waited for; one that carries nothing but tunnels ends with them."""
    return sum(down.entry.side == side and not down.only_tunnels for down in world.downstreams)


async def _until_gone(world: "World", side: str) -> None:
    """Also the connections on which nothing is under way: a request may have been sent a moment ago."""
    while _count(world, side):
        world.reactor.call(_tell, world, side)
        await trio.sleep(POLL_S)  # rare, short and bounded: not worth an event on the data path


async def _until_tunnels_end(world: "World") -> None:
    while world.tunnels:  # noqa: ASYNC110
        await trio.sleep(POLL_S)


async def _until_application_gone(world: "World") -> None:
    """The application has gone when nothing listens at its port any more."""
    endpoints = [
        endpoint
        for (side, _, _), cluster in world.state.clusters.items()
        if side == "in"
        for endpoint in cluster.endpoints.values()
    ]
    while endpoints:
        gone = 0
        for endpoint in endpoints:
            try:
                dialled = await world.dial(endpoint, "", 1.0)
            except DialError:
                gone += 1
            else:
                dialled.sock.close()
        if gone == len(endpoints):
            return
        await trio.sleep(0.25)
