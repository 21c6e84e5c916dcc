"""What a replica says of itself and of the sidecars connected to it, for the other replicas and for people.

Its own record, how far its sidecars have answered for the policy, who is connected, and what they observe; all of it
lives by leases, so that it goes when the replica does. Must not know how the policy is made or told. Invariant: one
record that cannot be written (its lease has ended) holds up no other.
"""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import trio
from cryptography.hazmat.primitives.serialization import Encoding

from certs.svid import fingerprint
from control_plane.state.records import (
    LIVE,
    OBSERVED,
    REPLICAS,
    STATUS,
    Live,
    Observed,
    ReplicaRecord,
    Status,
    encode,
)
from control_plane.store.base import Put, StoreError, StoreUnavailable

from .hub import rates
from .parts import batches

if TYPE_CHECKING:
    from .replica import Replica

log = logging.getLogger(__name__)

TTL_S = 15.0
PUBLISH_S = 0.2
OBSERVE_S = 10.0
BEHIND_S = 1.0  # who has not answered by then is named
BEHIND_MAX = 1000
EDGES_MAX = 5_000
EVIDENCE_MAX = 200  # texts that are kept for people


class Presence:
    """`lease`: our own; 0 where we have none."""

    def __init__(self, replica: "Replica") -> None:
        self.replica = replica
        self.lease = 0
        self._turn = trio.Lock()
        self._leaving = False

    async def renew(self) -> None:
        """See that our own record stands, under a lease that lives. Raises StoreError."""
        replica = self.replica
        async with self._turn:
            damaged = REPLICAS + replica.settings.name in replica.state.problems
            if self.lease and not damaged and not await replica.store.keep_alive([self.lease]):
                return
            if not self._leaving:
                await self._enter()

    async def _enter(self) -> None:
        replica = self.replica
        self.lease = await replica.store.grant(TTL_S)
        settings = replica.settings
        issuer = fingerprint(replica.authority.issuing.certificate.public_bytes(Encoding.DER))
        record = ReplicaRecord(settings.mesh, settings.join, issuer, settings.version, replica.epoch(), settings.folder)
        try:
            await replica.store.commit([Put(REPLICAS + settings.name, encode(record), self.lease)])
        except ValueError as error:  # it has ended already
            raise StoreUnavailable(str(error)) from None

    async def leave(self) -> None:
        """We end: others should not wait for our lease."""
        self._leaving = True
        with trio.move_on_after(2.0):
            async with self._turn:
                try:
                    if self.lease:
                        await self.replica.store.revoke(self.lease)
                except StoreError as error:
                    log.warning("our own lease could not be ended: %s", error)

    async def publish(self) -> None:
        """What sidecars answered, for the other replicas; for ever."""
        replica = self.replica
        behind_since = trio.current_time()
        while True:
            await trio.sleep(PUBLISH_S)
            reported, replica.hub.reported = replica.hub.reported, set()
            operations: list[Put] = []
            for each in reported:
                stream, lease = replica.hub.streams.get(each), replica.leases.get(each)
                if stream is None or not lease:
                    continue
                record = Live(replica.settings.name, dict(stream.rejected), stream.version)
                if replica.state.get(LIVE, each) != record:
                    operations.append(Put(LIVE + each, encode(record), lease))
            behind = replica.hub.behind()
            if not behind:
                behind_since = trio.current_time()
            if self.lease and (not behind or trio.current_time() - behind_since > BEHIND_S):
                status = Status(replica.hub.policy, tuple(sorted(behind)[:BEHIND_MAX]))
                if replica.state.get(STATUS, replica.settings.name) != status:
                    operations.append(Put(STATUS + replica.settings.name, encode(status), self.lease))
            try:
                for part in batches(operations):
                    await self._publish(part)
            except StoreError as error:
                replica.store_lost(error)
                replica.hub.reported |= reported

    async def _publish(self, operations: Sequence[Put]) -> None:
        """Raises StoreError."""
        try:
            await self.replica.store.commit(operations)
        except ValueError:  # a lease has ended; who gets a new one is reported again, and holds up nobody until then
            for each in operations if len(operations) > 1 else ():
                await self._publish([each])

    async def observe(self) -> None:
        """What sidecars report, for people; for ever."""
        replica = self.replica
        while True:
            await trio.sleep(OBSERVE_S)
            streams = list(replica.hub.streams.values())
            busiest = sorted(rates(streams).items(), key=lambda item: -item[1][0])[:EDGES_MAX]
            edges = tuple((*edge, round(value[0], 2), round(value[1], 2)) for edge, value in sorted(busiest))
            breakers = sorted({(each.service, *breaker) for each in streams for breaker in each.breakers})
            evidence = sorted({(each.service, *text) for each in streams for text in each.evidence})
            record = Observed(edges, tuple(breakers[:EDGES_MAX]), tuple(evidence[:EVIDENCE_MAX]))
            held = replica.state.get(OBSERVED, replica.settings.name)
            if record == (held if held is not None else Observed()) or not self.lease:
                continue
            try:
                await replica.store.commit([Put(OBSERVED + replica.settings.name, encode(record), self.lease)])
            except (StoreError, ValueError) as error:
                log.debug("what sidecars observe could not be kept: %s", error)
