"""One running control plane: the store's state in memory, what is made of it, and what it writes back.

Follows the store, brings policy and resources up to date (debounced; removals at once), tells the hub, keeps leases
alive, and judges registrations whose lease has ended. Must not know HTTP or TLS. Invariants: what it serves is of one
revision; with the store gone it serves on by what it knows, and judges nobody until one TTL after it is back; of
several replicas each does the same, and compare-and-set lets one of them win.
"""

import heapq
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import trio

from certs.bundle import BundleError, TrustBundle
from certs.files import CaFiles
from certs.spiffe import SpiffeId
from control_plane.state.mirror import Changed, Held, State
from control_plane.state.policy import Catalogue, policy_of
from control_plane.state.records import (
    ALIVE,
    AUDIT,
    BANS,
    CHANGES,
    COOKIES,
    DEFAULTS,
    ENFORCED,
    INSTANCES,
    LIVE,
    META,
    REPLICAS,
    ROOTS,
    SERVICES,
    SETTLED,
    SHARES,
    SIDECARS,
    TOKENS,
    Audit,
    Instance,
    encode,
)
from control_plane.state.registry import TTL_S, endpoints
from control_plane.state.resources import BANS as BANS_RESOURCE
from control_plane.state.resources import BUNDLE, ENDPOINTS, Resources
from control_plane.store.base import (
    Compacted,
    Compare,
    Conflict,
    Delete,
    Operation,
    Put,
    Store,
    StoreError,
)
from sidecar.model.snapshot import Service

from .admission import own_roots
from .cookies import CookieKeys
from .housekeeping import Housekeeping
from .hub import Hub
from .leases import Leases
from .limit_shares import LimitSharing
from .presence import Presence
from .reaper import Reaper

log = logging.getLogger(__name__)

QUIET_S, QUIET_MAX_S = 0.1, 0.5  # how long changes are gathered
KEEP_ALIVE_S = 2.0
RETRY_S = 1.0
TOLD_S = 10.0  # how long a change may take to come back from the store
AUDITS_MAX = 10_000


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """`mesh` and `join`: HOST:PORT of the two listeners, as others reach them."""

    name: str
    mesh: str
    join: str
    version: str = ""
    leaf_ttl: timedelta = timedelta(hours=24)
    rejoin_grace: timedelta = timedelta(days=7)
    folder: str = ""


@dataclass(slots=True)
class _Pending:
    """What has changed and is not yet told."""

    policy: bool = False  # which services there are, or what is said of them
    documents: bool = False  # the policy itself
    services: set[str] = field(default_factory=set)  # whose endpoints
    trust: bool = False
    since: float = 0.0
    last: float = 0.0
    urgent: bool = False

    def __bool__(self) -> bool:
        return self.policy or self.trust or bool(self.services)

    def add(self, other: "_Pending") -> None:
        self.policy |= other.policy
        self.documents |= other.documents
        self.services |= other.services
        self.trust |= other.trust


class Replica:
    """`authority` is this replica's own. `clock` is trio's; `epoch` the time of day."""

    def __init__(
        self,
        store: Store,
        authority: CaFiles,
        settings: ReplicaSettings,
        epoch: Callable[[], float] = time.time,
    ) -> None:
        self.store, self.authority, self.settings, self.epoch = store, authority, settings, epoch
        self.state = State(own_roots(authority))
        self.catalogue = Catalogue()
        self.resources = Resources()
        self.hub = Hub(settings.name, self.resources)
        self.instances: dict[str, dict[str, Held[Instance]]] = {}
        self.reaper = Reaper(self)
        self.by_fingerprint: dict[str, str] = {}  # of leaves, to sidecars
        self._fingerprints: dict[str, tuple[str, ...]] = {}
        self.store_problem = ""
        self.store_since = -TTL_S  # trio's clock, when the store last came back
        self.leases = Leases(store, self.state, settings.name, epoch, self.hub.report, self.store_lost)
        self.flushes = 0
        self.policy_revision = 0
        self.presence = Presence(self)
        self.housekeeping = Housekeeping(self)
        self.limit_shares = LimitSharing(self)
        self.cookies = CookieKeys(self)
        self.hub.cookies = self.cookies.of
        self._pending = _Pending()
        self._wake = trio.Event()
        self._urgent = trio.Event()
        self._moved = trio.Event()
        self._committed: list[tuple[int, int, trio.Event]] = []  # a heap of those who wait for their own change
        self._numbers = itertools.count()
        self._flushed = trio.Event()
        self.policy = policy_of(self.state)

    def now(self) -> float:
        return self.epoch()

    def today(self) -> datetime:
        return datetime.fromtimestamp(int(self.epoch()), UTC)

    # -- running

    async def start(self) -> None:
        """Read everything once. Raises StoreError."""
        view = await self.store.read()
        self._react(self.state.load(view))
        if self.state.meta is not None:
            self.state.stand_ins[META] = self.state.meta  # it never changes
        self.store_since = trio.current_time()
        self._flush()

    async def run(self) -> None:
        """Everything that goes on; ends when cancelled."""
        async with trio.open_nursery() as nursery:
            for task in (
                self._follow,
                self._flush_loop,
                self.reaper.run,
                self._lease_loop,
                self.leases.give,
                self.presence.publish,
                self.presence.observe,
                self.housekeeping.compact,
                self.housekeeping.settle,
                self.limit_shares.run,
                self.cookies.run,
            ):
                nursery.start_soon(self._keep_going, task)

    async def _keep_going(self, task: Callable[[], Awaitable[None]]) -> None:
        """An error of ours in one of these must not end the others, nor the streams."""
        while True:
            try:
                await task()
            except Exception:
                log.exception("an unexpected error; this goes on in %g s", RETRY_S)
            await trio.sleep(RETRY_S)

    async def _follow(self) -> None:
        """The store's changes, for ever."""
        while True:
            try:
                async with self.store.watch("", self.state.revision) as batches:
                    self._store_back()
                    async for batch in batches:
                        self._store_back()
                        self._moved_on(self.state.apply(batch))
            except Compacted:
                log.info("the store has forgotten what we missed: reading everything again")
                await self._read_again()
            except StoreError as error:
                self.store_lost(error)
                await trio.sleep(RETRY_S)
                await self._read_again()

    async def _read_again(self) -> None:
        try:
            view = await self.store.read()
        except StoreError as error:
            self.store_lost(error)
            await trio.sleep(RETRY_S)
            return
        self._store_back()
        if view.revision < self.state.revision:
            log.error(
                "the store is at revision %d, behind the %d that we know: was it restored from a backup? "
                "Everything is taken from it as it is now",
                view.revision,
                self.state.revision,
            )
        self._moved_on(self.state.load(view))

    def store_lost(self, error: StoreError) -> None:
        if not self.store_problem:
            log.error("the store does not answer, what is known is served on: %s", error)
        self.store_problem = str(error) or type(error).__name__

    def _store_back(self) -> None:
        if self.store_problem:
            log.info("the store answers again")
            self.store_problem = ""
            self.store_since = trio.current_time()

    def stood_still(self) -> None:
        """This process was frozen, or starved: what ended meanwhile may only have missed us."""
        log.warning("this process stood still for some seconds: no lease counts as ended for %g s", TTL_S)
        self.store_since = trio.current_time()

    def _moved_on(self, changed: Changed) -> None:
        self._react(changed)
        while self._committed and self._committed[0][0] <= self.state.revision:
            heapq.heappop(self._committed)[2].set()
        self._moved.set()
        self._moved = trio.Event()

    async def changed(self, since: int) -> int:
        """Wait until the state is of a later revision than `since`; that revision."""
        while self.state.revision <= since:
            await self._moved.wait()
        return self.state.revision

    # -- writing

    async def commit(self, operations: Sequence[Operation], compares: Sequence[Compare] = ()) -> int:
        """Durable when it returns, and in our own state unless the store is very late to tell of it. Raises
        StoreError."""
        revision = await self.store.commit(operations, compares)
        if self.state.revision < revision:
            event = trio.Event()
            entry = (revision, next(self._numbers), event)
            heapq.heappush(self._committed, entry)
            with trio.move_on_after(TOLD_S) as scope:
                await event.wait()
            if scope.cancelled_caught:
                log.warning("revision %d is durable, but the store has not told of it for %g s", revision, TOLD_S)
        return revision

    async def audit(self, who: str, action: str, subject: str, message: str = "", outcome: str = "done") -> None:
        """Put a change on record. What cannot be recorded is in the log at least."""
        log.info("audit: %s: %s %s %s%s", who, action, subject, outcome, f" ({message})" if message else "")
        now = self.epoch()
        operations: list[Operation] = [
            Put(f"{AUDIT}{now:017.6f}-{self.settings.name}", encode(Audit(now, who, action, subject, outcome, message)))
        ]
        table = self.state.table(AUDIT)
        if len(table) >= AUDITS_MAX:
            operations += [Delete(AUDIT + name) for name in sorted(table)[: len(table) - AUDITS_MAX + 1][:10]]
        try:
            await self.store.commit(operations)
        except StoreError as error:
            log.error("the audit record could not be kept: %s", error)

    # -- what follows from a change

    def _react(self, changed: Changed) -> None:
        pending = self._pending
        urgent = False
        for kind, name in changed:
            if kind == INSTANCES:
                urgent |= self._index(name)
            elif kind in (SERVICES, DEFAULTS, ENFORCED, CHANGES, SETTLED):
                pending.policy = pending.documents = True
            elif kind == SIDECARS:
                self._index_sidecar(name)
                pending.policy |= self._is_new_service(kind, name)
                if self._is_banned_by_name(name):  # it may have been given a leaf just before it was banned
                    pending.trust = urgent = True
            elif kind == TOKENS:
                pending.policy |= self._is_new_service(kind, name)
            elif kind in (ROOTS, BANS):
                pending.trust = urgent = True
            elif kind == ALIVE:
                record = self.state.get(SIDECARS, name)
                for service in self.instances if record is None else [record.service]:  # it may have been deleted
                    self.reaper.touch(service)
            elif kind == SHARES:
                self.limit_shares.stale = True
            elif kind == COOKIES:
                self.cookies.changed()
            elif kind == LIVE and name in self.hub.streams and self.state.get(LIVE, name) is None:
                self.hub.reported.add(name)  # it went with another lease, or somebody has damaged it
        if self.limit_shares.stale:
            self.limit_shares.serve()
        if pending:
            now = trio.current_time()
            pending.last = now
            pending.since = pending.since or now
            self._wake.set()
            if urgent:
                pending.urgent = True
                self._urgent.set()

    def _index(self, name: str) -> bool:
        """A registration came, changed or went; whether callers must know at once."""
        service, _, sidecar = name.partition("/")
        held = self.state.table(INSTANCES).get(name)
        ours = self.instances.setdefault(service, {})
        before = ours.get(sidecar)
        if held is None:
            ours.pop(sidecar, None)
        else:
            ours[sidecar] = held
        self.reaper.changed(service, sidecar, before, held)
        if not ours:
            del self.instances[service]
        if service not in self.catalogue.snapshot.services or not ours:
            self._pending.policy = True
        self._pending.services.add(service)
        return before is not None and (held is None or held.record.state == "gone" or not held.record.healthy)

    def _index_sidecar(self, name: str) -> None:
        record = self.state.get(SIDECARS, name)
        for each in self._fingerprints.pop(name, ()):
            self.by_fingerprint.pop(each, None)
        if record is not None:
            self._fingerprints[name] = record.fingerprints
            self.by_fingerprint.update(dict.fromkeys(record.fingerprints, name))

    def _is_new_service(self, kind: str, name: str) -> bool:
        """A service exists as soon as somebody may join as it, whether or not a policy names it."""
        record = self.state.get(kind, name)
        return record is not None and bool(record.service) and record.service not in self.catalogue.snapshot.services

    async def _flush_loop(self) -> None:
        while True:
            await self._wake.wait()
            pending = self._pending
            while not pending.urgent:
                due = min(pending.since + QUIET_MAX_S, pending.last + QUIET_S)
                if trio.current_time() >= due:
                    break
                with trio.move_on_at(due):
                    await self._urgent.wait()
            try:
                self._flush()
            except Exception:
                log.exception("what changed could not be worked out; sidecars keep what they have")
                self._pending.add(pending)  # tried again with whatever changes next
            await trio.lowlevel.checkpoint()

    def _flush(self) -> None:
        """Bring policy and resources up to date, and tell the hub."""
        pending, self._pending = self._pending, _Pending()
        self._wake, self._urgent = trio.Event(), trio.Event()
        resources, changed = self.resources, set()
        if pending.policy:
            before = self.catalogue.snapshot.services
            services = self._update_catalogue(pending.documents or not self.flushes)
            if self._policy_is_known():
                changed |= resources.put_services(services)
                pending.services |= {name for name in services if _readdressed(before.get(name), services[name])}
        services = self.catalogue.snapshot.services
        for name in pending.services:
            service = services.get(name)
            if service is not None:
                specs = endpoints(service.endpoints, self.instances.get(name, {}))
                if resources.put_endpoints(name, specs):
                    changed.add(ENDPOINTS + name)
        if pending.trust:
            changed |= self._update_trust()
        self.flushes += 1
        self.hub.tell(changed, self.state.revision, self.policy_revision)
        self._flushed.set()
        self._flushed = trio.Event()

    def _policy_is_known(self) -> bool:
        """Without what holds for every service nothing can be said of any: then nobody is told anything."""
        known = self.catalogue.compiled.levels is not None
        if self.hub.withheld is known:
            if not known:
                log.error("`defaults` or `enforced` cannot be read (see pillion check): sidecars keep what they have")
            self.hub.withheld = not known
        return known

    def _update_catalogue(self, documents_changed: bool) -> Mapping[str, Any]:
        state = self.state
        if documents_changed:
            self.policy = policy_of(state)
            revisions = [held.revision for held in self.policy.changes.values()]
            revisions += [held.revision for held in self.policy.documents.values()]
            self.policy_revision = max(revisions, default=0)
            self.housekeeping.unsettled.set()
        policy = self.policy
        implicit = set(self.instances)
        implicit.update(held.record.service for held in state.table(SIDECARS).values())
        implicit.update(held.record.service for held in state.table(TOKENS).values() if held.record.kind == "join")
        implicit -= policy.services.keys()
        implicit.discard("")
        self.catalogue.update(policy.defaults, policy.enforced, policy.services, implicit, policy.damaged)
        return self.catalogue.snapshot.services

    def _update_trust(self) -> set[str]:
        changed = set()
        roots = sorted((name, held.record.pem) for name, held in self.state.table(ROOTS).items())
        meta = self.state.meta
        if meta is not None and roots:
            pem = "".join(text if text.endswith("\n") else text + "\n" for _, text in roots)
            try:
                TrustBundle.parse(meta.trust_domain, pem.encode())
            except BundleError as error:
                log.error("the roots in the store make no bundle, the old one stays: %s", error)
            else:
                if self.resources.put(BUNDLE, {"trust_domain": meta.trust_domain, "pem": pem}):
                    changed.add(BUNDLE)
        if self.resources.put(BANS_RESOURCE, self.banned()):
            changed.add(BANS_RESOURCE)
        for stream in self.hub.streams.values():
            if self.is_banned(stream.id, stream.service, stream.fingerprint):
                stream.end("this sidecar is banned")
        return changed

    # -- identities

    def banned(self) -> dict[str, list[str]]:
        """What sidecars must refuse: SPIFFE IDs, and fingerprints of leaves."""
        identities, certificates = set(), set()
        for held in self.state.table(BANS).values():
            ban = held.record
            if ban.kind == "identity":
                identities.add(ban.value)
            elif ban.kind == "certificate":
                certificates.add(ban.value)
            elif ban.kind == "sidecar":
                record = self.state.get(SIDECARS, ban.value)
                certificates.update(record.fingerprints if record is not None else ())
        return {"identities": sorted(identities), "certificates": sorted(certificates)}

    def is_banned(self, sidecar: str, service: str, fingerprint: str) -> bool:
        if not self.state.table(BANS):
            return False
        meta = self.state.meta
        identity = str(SpiffeId.for_service(meta.trust_domain, service)) if meta is not None and service else ""
        for held in self.state.table(BANS).values():
            ban = held.record
            if ban.value and ban.value in {"identity": (identity,), "sidecar": (sidecar,)}.get(
                ban.kind, (fingerprint,)
            ):
                return True
        return False

    def _is_banned_by_name(self, sidecar: str) -> bool:
        bans = (held.record for held in self.state.table(BANS).values())
        return any(ban.kind == "sidecar" and ban.value == sidecar for ban in bans)

    def replicas(self) -> list[str]:
        """The mesh addresses of all replicas that run."""
        return sorted({self.settings.mesh, *(held.record.mesh for held in self.state.table(REPLICAS).values())})

    def join_addresses(self) -> list[str]:
        """The join addresses of all replicas that run; our own first."""
        others = {held.record.join for held in self.state.table(REPLICAS).values()} - {self.settings.join}
        return [self.settings.join, *sorted(others)]

    # -- sidecars that are connected here

    async def lease(self, sidecar: str) -> None:
        """See that a sidecar has one: its registration and what it answers live by it. Raises StoreUnavailable."""
        await self.leases.ready(sidecar)

    def heartbeat(self, sidecar: str) -> None:
        self.leases.heard(sidecar)

    async def _lease_loop(self) -> None:
        """Leases of the sidecars that were heard, and our own."""
        while True:
            try:
                await self.leases.keep(self.hub.streams.keys())
                await self.presence.renew()
                self._store_back()
            except StoreError as error:
                self.store_lost(error)
            await trio.sleep(KEEP_ALIVE_S)

    # -- registrations

    async def register(self, sidecar: str, service: str, instance: Instance) -> None:
        """Raises StoreError."""
        await self.lease(sidecar)
        key = f"{INSTANCES}{service}/{sidecar}"
        held = self.state.table(INSTANCES).get(f"{service}/{sidecar}")
        if held is not None and replace(held.record, changed=0.0) == replace(instance, changed=0.0):
            return
        await self.commit([Put(key, encode(replace(instance, changed=self.epoch())))])

    async def health(self, sidecar: str, service: str, healthy: bool, reason: str) -> None:
        """How the application of a registration is. Raises StoreError; a registration that has changed or gone
        meanwhile stays as it is: the next heartbeat tells again."""
        held = self.state.table(INSTANCES).get(f"{service}/{sidecar}")
        if held is None or (held.record.healthy, held.record.reason) == (healthy, reason):
            return
        key = f"{INSTANCES}{service}/{sidecar}"
        told = replace(held.record, healthy=healthy, reason=reason, changed=self.epoch())
        try:
            await self.commit([Put(key, encode(told))], [Compare(key, held.revision)])
        except Conflict:
            log.debug("the registration of %s changed while its health was told", sidecar)

    async def withdraw(self, sidecar: str, service: str) -> None:
        """Raises StoreError."""
        if self.state.get(INSTANCES, f"{service}/{sidecar}") is not None:
            await self.commit([Delete(f"{INSTANCES}{service}/{sidecar}")])

    async def told(self, service: str) -> None:
        """Wait until what is known of a service's endpoints has gone to the hub."""
        while service in self._pending.services:
            await self._flushed.wait()

    def alone(self) -> bool:
        """Whether no other replica runs, whose sidecars' answers we would not hear of."""
        return len(self.state.table(REPLICAS)) <= 1


def _readdressed(before: Service | None, service: Service) -> bool:
    """Whether the addresses that a policy names are not what they were."""
    return before is not service and (before is None or before.endpoints != service.endpoints)
