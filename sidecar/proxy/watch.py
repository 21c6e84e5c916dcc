"""The clock of what no request drives: outliers are judged, and come back, when it is time.

One Trio task for the whole sidecar; without outliers it sleeps until there is another policy. Must not know what is
judged. Invariant: whatever a cluster does, the task sleeps at least REST_S between two rounds.
"""

import math
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from .world import World

REST_S = 0.01


class Watch:
    """Owned by the World, which says when the plans have changed."""

    def __init__(self) -> None:
        self._changed = trio.Event()

    def rouse(self) -> None:
        """There are other clusters, or they have other terms."""
        self._changed.set()
        self._changed = trio.Event()

    async def run(self, world: "World") -> None:
        while True:
            due = min([each.outliers.due for each in world.state if each.outliers is not None], default=math.inf)
            changed = self._changed
            with trio.move_on_after(max(REST_S, due - world.clock())):
                await changed.wait()
            now = world.clock()
            for cluster in world.state:
                if cluster.outliers is not None:
                    world.reactor.call(cluster.step, now)
