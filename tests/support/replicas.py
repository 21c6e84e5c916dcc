"""Replicas on virtual time, over one store in memory, and sidecars that are connected to them.

kit = Kit(MemoryStore())
async with kit.running() as one, kit.running("r2") as two:
    stream = await connect(one, "a", "web")
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio

from control_plane.serve.admission import admit
from control_plane.serve.hub import Stream
from control_plane.serve.replica import Replica, ReplicaSettings
from control_plane.state.records import SIDECARS, Instance, Sidecar, encode
from control_plane.store.base import Put
from support.memory_store import MemoryStore
from support.operators import AUTHORITY, EPOCH


class Kit:
    def __init__(self, store: MemoryStore) -> None:
        self.store = store

    def replica(self, name: str = "r1", skew_s: float = 0.0) -> Replica:
        settings = ReplicaSettings(name, f"127.0.0.1:1{name[1:]}", f"127.0.0.1:2{name[1:]}")
        return Replica(self.store, AUTHORITY, settings, epoch=lambda: EPOCH + skew_s + trio.current_time())

    @asynccontextmanager
    async def running(self, name: str = "r1", skew_s: float = 0.0) -> AsyncIterator[Replica]:
        await admit(self.store, AUTHORITY, name, EPOCH, "m1")
        replica = self.replica(name, skew_s)
        await replica.start()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(replica.run)
            await trio.sleep(20.0)  # past the time in which nobody is judged
            yield replica
            nursery.cancel_scope.cancel()


async def connect(replica: Replica, sidecar: str, service: str = "web", port: int = 1, **more: Any) -> Stream:
    """A sidecar with a stream; registered at 10.0.0.1, unless the port is 0."""
    record = Sidecar(service, (f"f-{sidecar}",), EPOCH + 1e6, EPOCH, EPOCH)
    await replica.commit([Put(SIDECARS + sidecar, encode(record))])
    stream = Stream(sidecar, service, "1", False, set(), {}, EPOCH, trio.current_time())
    replica.hub.open(stream)
    await replica.lease(sidecar)
    if port:
        await replica.register(sidecar, service, Instance("10.0.0.1", port, **more))
    return stream


async def beat(replica: Replica, *sidecars: str) -> None:
    """Their heartbeats, for ever."""
    while True:
        for sidecar in sidecars:
            replica.heartbeat(sidecar)
        await trio.sleep(5.0)
