"""What keeps the store small and tidy. Must not know what is told to whom. Invariant: every replica does it, and a
compare-and-set lets one win; nothing of it is needed for what is served.
"""

import logging
from typing import TYPE_CHECKING

import trio

from control_plane.state.policy import policy_of
from control_plane.state.policy import settle as next_step
from control_plane.state.records import SIDECARS, TOKENS
from control_plane.store.base import Compare, Conflict, Delete, StoreError

from .parts import BATCH

if TYPE_CHECKING:
    from .replica import Replica

log = logging.getLogger(__name__)

COMPACT_S = 300.0
AGAIN_S, RETRY_S = 0.2, 1.0


class Housekeeping:
    """`unsettled` is set where the policy has changed."""

    def __init__(self, replica: "Replica") -> None:
        self.replica = replica
        self.unsettled = trio.Event()

    async def settle(self) -> None:
        """A change is in force once it is recorded; its documents come under their own keys in further transactions."""
        replica = self.replica
        while True:
            await self.unsettled.wait()
            self.unsettled = trio.Event()
            try:
                while (step := next_step(policy_of(replica.state))) is not None:
                    await replica.commit(step.operations, step.compares)
            except Conflict:  # another replica does it, or a change has come in between
                self.unsettled.set()
                await trio.sleep(AGAIN_S)
            except StoreError as error:
                log.warning("the last change of the policy is in force, but not yet settled: %s", error)
                self.unsettled.set()
                await trio.sleep(RETRY_S)

    async def compact(self) -> None:
        """The store's past is of use for those who come back after a moment, not longer."""
        replica = self.replica
        while True:
            revision = replica.state.revision
            await trio.sleep(COMPACT_S)
            try:
                await replica.store.compact(revision)
                await self._tidy()
            except (StoreError, ValueError) as error:  # ValueError: the store went back before that revision
                log.debug("the store was not tidied: %s", error)

    async def _tidy(self) -> None:
        """Forget tokens that have expired for a day, and sidecars that can never come back without a new one."""
        replica = self.replica
        now, grace_s = replica.epoch(), replica.settings.rejoin_grace.total_seconds()
        gone: list[tuple[str, int]] = []
        for name, held in replica.state.table(TOKENS).items():
            if held.record.expires + 86400.0 < now:
                gone.append((TOKENS + name, held.revision))
        for name, held in replica.state.table(SIDECARS).items():
            if held.record.not_after + grace_s < now and name not in replica.hub.streams:
                gone.append((SIDECARS + name, held.revision))
        for start in range(0, len(gone), BATCH // 2):
            part = gone[start : start + BATCH // 2]
            await replica.store.commit([Delete(key) for key, _ in part], [Compare(key, each) for key, each in part])
