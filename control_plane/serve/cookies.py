"""The keys of sticky cookies, as one replica has them: made once for the mesh, told to each service, changed on demand.

The secret stands in the store, so that all replicas tell the same. Must not know how a key follows from it.
Invariants: of replicas that make one at once, one wins (compare-and-set); a secret that is there is never replaced
but by `rotate`; where its record cannot be read nothing is told, and sidecars keep what they have; no secret and no
key is logged.
"""

import logging
import secrets
from typing import TYPE_CHECKING

import trio

from control_plane.state.cookies import keys_of, rotated
from control_plane.state.records import COOKIES, CookieSecrets, RecordError, decode, encode
from control_plane.state.resources import Resource
from control_plane.store.base import Compare, Conflict, Put, StoreError

if TYPE_CHECKING:
    from .replica import Replica

log = logging.getLogger(__name__)

LOOK_S = 5.0
SECRET_BYTES = 32


class CookieKeys:
    """One for a replica."""

    def __init__(self, replica: "Replica") -> None:
        self.replica = replica
        self._told: dict[str, Resource] = {}  # by service

    def changed(self) -> None:
        """The record is not what it was. Those who are connected are told."""
        state = self.replica.state
        self._told.clear()
        record: CookieSecrets | None = state.get(COOKIES)
        if record is not None:
            state.stand_ins[COOKIES] = record  # where somebody damages it, we still know
        elif COOKIES in state.problems:
            log.error(
                'the record "%s" cannot be used: %s. Sidecars that have a key of sticky cookies keep it, others use '
                "one of their own; pillion cert rotate-cookies makes the record anew",
                COOKIES,
                state.problems[COOKIES],
            )
        self.replica.hub.tell_cookies()

    def of(self, service: str) -> Resource | None:
        """What the sidecars of a service are told; None: nothing is known."""
        told = self._told.get(service)
        if told is None:
            record: CookieSecrets | None = self.replica.state.get(COOKIES)
            if record is None:
                return None
            told = self._told[service] = keys_of(record, service)
        return told

    async def run(self) -> None:
        """See that there is a secret, for ever."""
        while True:
            state = self.replica.state
            if state.get(COOKIES) is None and COOKIES not in state.problems and not self.replica.store_problem:
                await self._make()
            await trio.sleep(LOOK_S)

    async def _make(self) -> None:
        known: CookieSecrets | None = self.replica.state.stand_ins.get(COOKIES)  # somebody has deleted it
        fresh = known or rotated(None, secrets.token_hex(SECRET_BYTES), self.replica.now(), 0.0)
        try:
            await self.replica.commit([Put(COOKIES, encode(fresh))], [Compare(COOKIES, 0)])
        except Conflict:
            log.debug("another replica has made the secret of sticky cookies")
        except StoreError as error:
            self.replica.store_lost(error)

    async def rotate(self, keep_s: float) -> CookieSecrets:
        """Another secret, also in place of a record that cannot be read. Raises StoreError (Conflict)."""
        replica = self.replica
        entry = (await replica.store.read(COOKIES)).entries.get(COOKIES)
        before: CookieSecrets | None = replica.state.get(COOKIES)
        try:
            before = decode(CookieSecrets, entry.value) if entry is not None else before
        except RecordError:
            log.info('the record "%s", which cannot be read, is replaced', COOKIES)
        fresh = rotated(before, secrets.token_hex(SECRET_BYTES), replica.now(), keep_s)
        await replica.commit([Put(COOKIES, encode(fresh))], [Compare(COOKIES, entry.revision if entry else 0)])
        return fresh
