"""Global rate limits: who divides them among the instances, when, and how the sidecars hear of their shares.

One replica divides for all: the first by name of those that run. The others put into the store what their sidecars are
asked; it divides, in rounds, and puts the shares there, from where every replica serves them. Two that divide at once
(one has just come back) are told apart by compare-and-set, and both work from the record that stands. Must not know how
shares are worked out. Invariants: what is served is one record of the store, so all shares of a service sum to 1 at
most; without a store the last shares stand.
"""

import logging
import math
from typing import TYPE_CHECKING

import trio

from control_plane.state.records import DEMANDS, REPLICAS, SHARES, LimitDemands, LimitShares, encode
from control_plane.state.resources import SHARE, Resource, resource
from control_plane.state.shares_of_limits import divide
from control_plane.store.base import Compare, Conflict, Delete, Operation, Put, StoreError

from .hub import Stream

if TYPE_CHECKING:
    from .replica import Replica

log = logging.getLogger(__name__)

ROUND_S = 2.0
DEMAND_MAX = 1e6
TELL_FROM = 0.05  # the divider is told of a demand that has changed by more than this part


class LimitSharing:
    """`stale`: the shares in the store are not what is served."""

    def __init__(self, replica: "Replica") -> None:
        self.replica = replica
        self.stale = False
        self._served: dict[str, tuple[float, Resource]] = {}

    # -- hearing, serving

    def heard(self, stream: Stream, demand: float | None) -> None:
        """A sidecar's demand, as far as it can be true; below 0: it has not been counted yet."""
        first = stream.demand is None
        stream.demand = min(max(-1.0, demand), DEMAND_MAX) if demand is not None and demand == demand else None
        if first and stream.demand is not None and stream.id in self.replica.hub.shares:
            stream.dirty = True  # until now it could not be told its share
            stream.rouse()

    def serve(self) -> None:
        """Tell the sidecars that are connected here what the store has."""
        self.stale = False
        served: dict[str, tuple[float, Resource]] = {}
        for held in self.replica.state.table(SHARES).values():
            for sidecar, share in held.record.shares.items():
                before = self._served.get(sidecar)
                same = before is not None and before[0] == share
                served[sidecar] = before if before and same else (share, resource(SHARE, {"share": share}))
        self._served = served
        self.replica.hub.put_shares({sidecar: made for sidecar, (_, made) in served.items()})

    # -- dividing

    async def run(self) -> None:
        """For ever."""
        while True:
            await trio.sleep(ROUND_S)
            if not self.replica.store_problem:
                try:
                    await self._round()
                except StoreError as error:
                    self.replica.store_lost(error)

    def divides(self) -> bool:
        """Whether this replica does it for all."""
        name = self.replica.settings.name
        return name == min(self.replica.state.table(REPLICAS), default=name)

    def services(self) -> set[str]:
        """Those with a global limit."""
        services = self.replica.catalogue.snapshot.services.values()
        return {
            each.name
            for each in services
            if any(route.rate_limit is not None and route.rate_limit.scope == "global" for route in each.routes)
        }

    async def _round(self) -> None:
        """Raises StoreError."""
        replica = self.replica
        told = {each.id: each.demand for each in replica.hub.streams.values() if each.demand is not None}
        ours = {id: demand for id, demand in told.items() if demand >= 0.0}
        if not self.divides():
            await self._tell(ours)
            return
        if not told and not replica.state.table(SHARES) and not replica.state.table(DEMANDS):
            return
        demands = {
            id: each for held in replica.state.table(DEMANDS).values() for id, each in held.record.demands.items()
        }
        demands.update(ours)
        wanted = self.services()
        for service in sorted(wanted | replica.state.table(SHARES).keys()):
            await self._divide(service, service in wanted, demands)

    async def _divide(self, service: str, wanted: bool, demands: dict[str, float]) -> None:
        """`wanted`: it has a global limit (still). Raises StoreError."""
        replica = self.replica
        held = replica.state.table(SHARES).get(service)
        before: LimitShares = held.record if held is not None else LimitShares()
        instances = replica.instances.get(service, {}) if wanted else {}
        here = {id for id, each in instances.items() if each.record.state != "gone"}
        shares = divide(before.shares, demands, here)
        if shares == before.shares and (held is None) == (not shares):
            return
        key = SHARES + service
        operation: Operation = Delete(key)
        if shares:
            told = {id: round(demands[id], 4) for id in sorted(here) if id in demands}
            operation = Put(key, encode(LimitShares(shares, told)))
        elif held is None:
            return
        try:
            await replica.commit([operation], [Compare(key, held.revision if held is not None else 0)])
        except Conflict:
            log.debug("the shares of %s changed while they were divided", service)

    async def _tell(self, ours: dict[str, float]) -> None:
        """What our sidecars are asked, for the replica that divides. Raises StoreError."""
        replica = self.replica
        name, lease = replica.settings.name, replica.presence.lease
        held = replica.state.get(DEMANDS, name)
        before = held.demands if held is not None else {}
        if not lease or (
            ours.keys() == before.keys()
            and all(math.isclose(each, before[id], rel_tol=TELL_FROM, abs_tol=1e-3) for id, each in ours.items())
        ):
            return
        told = LimitDemands({id: round(each, 4) for id, each in sorted(ours.items())})
        try:
            await replica.store.commit([Put(DEMANDS + name, encode(told), lease)])
        except ValueError as error:  # our lease has ended; there is a new one soon
            log.debug("demands could not be told: %s", error)
