"""The leases of the sidecars that are connected to one replica: given, kept alive, given again.

A sidecar's registration and what it answers live by its lease, and its lease by its heartbeats. Many come at once (a
control plane that starts again, another that ends), so leases are given together and recorded together, and no stream
waits for its own. Must not know what lives by them. Invariants: what `ready` returned for is recorded; a lease that the
store has lost is given again at the next heartbeat.
"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence

import trio

from control_plane.state.mirror import State
from control_plane.state.records import ALIVE, Alive, encode
from control_plane.state.registry import TTL_S
from control_plane.store.base import OPERATIONS_MAX, Put, Store, StoreError, StoreUnavailable

log = logging.getLogger(__name__)

GATHER_S = 0.02
AT_ONCE = OPERATIONS_MAX // 2
GRANTS_AT_ONCE = 16
RETRY_S = 1.0
READY_S = 10.0


class Leases:
    """`lost(error)` hears of a store that does not answer, `given(sidecars)` of those that have a lease now."""

    def __init__(
        self,
        store: Store,
        state: State,
        replica: str,
        epoch: Callable[[], float],
        given: Callable[[Collection[str]], object],
        lost: Callable[[StoreError], object],
    ) -> None:
        self.store, self.state, self.replica, self.epoch = store, state, replica, epoch
        self.held: dict[str, int] = {}
        self._given, self._lost = given, lost
        self._heard: set[str] = set()
        self._asked: dict[str, trio.Event] = {}
        self._wake = trio.Event()

    def get(self, sidecar: str) -> int:
        """0: it has none."""
        return self.held.get(sidecar, 0)

    def ask(self, sidecar: str) -> trio.Event:
        """See that a sidecar has a lease; the event tells when."""
        event = self._asked.setdefault(sidecar, trio.Event())
        self._wake.set()
        return event

    async def ready(self, sidecar: str) -> None:
        """Wait until a sidecar has a lease. Raises StoreUnavailable."""
        if sidecar in self.held and self.state.get(ALIVE, sidecar) is not None:
            return
        event = self.ask(sidecar)
        with trio.move_on_after(READY_S):
            await event.wait()
            return
        raise StoreUnavailable(f"the store gave no lease within {READY_S:g} s")

    def heard(self, sidecar: str) -> None:
        """It has sent a heartbeat: its lease is kept alive with the next round."""
        self._heard.add(sidecar)

    # -- giving

    async def give(self) -> None:
        """Give leases to those who ask, for ever."""
        while True:
            await self._wake.wait()
            await trio.sleep(GATHER_S)
            self._wake = trio.Event()
            names = list(self._asked)
            for start in range(0, len(names), AT_ONCE):
                part = names[start : start + AT_ONCE]
                try:
                    await self._give(part)
                except StoreError as error:
                    self._lost(error)
                    await trio.sleep(RETRY_S)
                    self._wake.set()
                    break
                for each in part:
                    self._asked.pop(each).set()

    async def _give(self, sidecars: Sequence[str]) -> None:
        """Raises StoreError."""
        alive = self.state.table(ALIVE)
        known = {each: alive[each].lease if each in alive else self.get(each) for each in sidecars}
        gone = await self.store.keep_alive([lease for lease in known.values() if lease])
        fresh = [each for each, lease in known.items() if not lease or lease in gone]
        self.held.update({each: lease for each, lease in known.items() if each not in fresh})
        await self._grant(fresh)
        await self._record(sidecars)
        self._given(sidecars)

    async def _grant(self, sidecars: Collection[str]) -> None:
        """A new lease for each. Raises StoreError."""
        waiting = list(sidecars)
        problems: list[StoreError] = []

        async def work() -> None:
            while waiting and not problems:
                each = waiting.pop()
                try:
                    self.held[each] = await self.store.grant(TTL_S)
                except StoreError as error:
                    problems.append(error)

        async with trio.open_nursery() as nursery:
            for _ in range(min(GRANTS_AT_ONCE, len(waiting))):
                nursery.start_soon(work)
        if problems:
            raise problems[0]

    async def _record(self, sidecars: Collection[str]) -> None:
        """Raises StoreError, also where a lease has ended meanwhile: the process stood still, or the store was slow."""
        alive = encode(Alive(self.replica, self.epoch()))
        operations = [Put(ALIVE + each, alive, self.held[each]) for each in sidecars if each in self.held]
        for start in range(0, len(operations), AT_ONCE):
            try:
                await self.store.commit(operations[start : start + AT_ONCE])
            except ValueError as error:
                raise StoreUnavailable(str(error)) from None

    # -- keeping

    async def keep(self, connected: Collection[str]) -> None:
        """One round: renew the leases of those who were heard. Raises StoreError, and keeps in mind who was heard."""
        heard, self._heard = self._heard, set()
        try:
            await self._renew({each: self.held[each] for each in heard if each in self.held})
        except StoreError:
            self._heard |= heard
            raise
        finally:
            for each in self.held.keys() - connected - heard:
                if self.state.get(ALIVE, each) is None:
                    del self.held[each]
        for each in connected:
            if each not in self.held:
                self.ask(each)

    async def _renew(self, leases: Mapping[str, int]) -> None:
        if not leases:
            return
        gone = await self.store.keep_alive(sorted(leases.values()))
        await self._grant([each for each, lease in leases.items() if lease in gone])
        alive = self.state.table(ALIVE)
        # Also where the record went with another lease: two were granted at once, or at another replica.
        lost = [each for each in leases if each not in alive or alive[each].lease != self.held[each]]
        if lost:
            await self._record(lost)
            self._given(lost)
