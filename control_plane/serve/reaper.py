"""Carries out what becomes of registrations whose lease has ended (`state.registry` says what).

Looks only at services of which something has changed, or is due. Must not know who is told. Invariants: nobody is
judged until one TTL after the store came back, or this process stood still (leases end meanwhile that nobody could
renew); of several replicas each does the same, and compare-and-set lets one win.
"""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import trio

from control_plane.state.mirror import Held
from control_plane.state.records import ALIVE, INSTANCES, Instance, encode
from control_plane.state.registry import TTL_S, judge, next_due_s
from control_plane.store.base import Compare, Conflict, Delete, Operation, Put, StoreError

from .parts import batches

if TYPE_CHECKING:
    from .replica import Replica

log = logging.getLogger(__name__)

PAUSE_S = 0.05
LOOK_S = 0.1
ASLEEP_S = 1.0  # at most, so that a process that stands still is late by nearly as long as it stood
STOOD_S = 3.0  # late by more: frozen, or starved


class Reaper:
    def __init__(self, replica: "Replica") -> None:
        self.replica = replica
        self._touched: set[str] = set()  # services to look at
        self._ageing: set[str] = set()  # services with registrations that are not up
        self._since: dict[str, float] = {}  # trio's clock: since when a registration is in its state, as far as we know
        self._wake = trio.Event()

    def changed(self, service: str, sidecar: str, before: Held[Instance] | None, after: Held[Instance] | None) -> None:
        """A registration came, changed or went."""
        name = f"{service}/{sidecar}"
        if after is None:
            self._since.pop(name, None)
        elif before is None or before.record.state != after.record.state:
            self._since[name] = trio.current_time()
        self.touch(service)

    def touch(self, service: str) -> None:
        """Something of this service is not what it was."""
        self._touched.add(service)
        self._wake.set()

    async def run(self) -> None:
        """For ever."""
        replica = self.replica
        while True:
            await self._nap(max(LOOK_S, min(self._due_s(), ASLEEP_S)), self._wake)
            self._wake = trio.Event()
            since_s = trio.current_time() - replica.store_since
            if replica.store_problem or since_s < TTL_S:
                await self._nap(max(LOOK_S, min(TTL_S - since_s, ASLEEP_S)))
                self._wake.set()
                continue
            services, self._touched = self._touched | self._ageing, set()
            try:
                for service in list(services):
                    await self._judge(service)
                    services.discard(service)
            except StoreError as error:
                self._wake.set()
                if not isinstance(error, Conflict):  # else another replica was quicker
                    replica.store_lost(error)
            finally:
                self._touched |= services
            await self._nap(PAUSE_S)

    async def _nap(self, nap_s: float, unless: trio.Event | None = None) -> None:
        """Sleep, and see whether the whole process stood still meanwhile."""
        began = trio.current_time()
        with trio.move_on_after(nap_s):
            await (unless if unless is not None else trio.Event()).wait()
        if trio.current_time() - began > nap_s + STOOD_S:
            self.replica.stood_still()

    def _due_s(self) -> float:
        held = self.replica.instances
        return min((next_due_s(held[each], self._ages_s(each)) for each in self._ageing & held.keys()), default=TTL_S)

    async def _judge(self, service: str) -> None:
        """Raises StoreError."""
        replica = self.replica
        instances = dict(replica.instances.get(service, {}))  # as they are judged: others may come meanwhile
        verdict = judge(instances, replica.state.table(ALIVE), replica.now(), self._ages_s(service))
        if verdict:
            _log_verdict(service, instances, verdict)
            revisions = {f"{INSTANCES}{service}/{name}": held.revision for name, held in instances.items()}
            operations: list[Operation] = []
            for name, record in verdict.items():
                key = f"{INSTANCES}{service}/{name}"
                operations.append(Delete(key) if record is None else Put(key, encode(record)))
            for part in batches(operations):
                await replica.commit(part, [Compare(each.key, revisions[each.key]) for each in part])
        if any(held.record.state != "up" for held in replica.instances.get(service, {}).values()):
            self._ageing.add(service)
        else:
            self._ageing.discard(service)

    def _ages_s(self, service: str) -> dict[str, float]:
        now = trio.current_time()
        return {name: now - self._since[f"{service}/{name}"] for name in self.replica.instances.get(service, {})}


def _log_verdict(service: str, instances: Mapping[str, Held[Instance]], verdict: Mapping[str, Instance | None]) -> None:
    for name, record in verdict.items():
        before = instances[name].record
        if record is not None and record.state != before.state:
            where = f"{before.host}:{before.port}"
            log.warning("instance %s of %s (%s): %s, was %s", name, service, where, record.state, before.state)
