"""The stream from the control plane: connects to one replica, takes what it pushes, answers, and moves on when it ends.

What is accepted is put on disk, so that the next start can serve before anybody answers. Must not know the data path
beyond `Served`. Invariants: bad resources never replace good ones; a control plane that is away costs nothing of what
is served; every answer names what was refused, and why.
"""

import logging
import random
import time
from collections.abc import Collection
from itertools import islice
from typing import Protocol

import trio

from sidecar.model.snapshot import Snapshot

from .http import Client, Json, Refused, Unreachable
from .join import Member
from .refusal import Refusal
from .resources import (
    BANS,
    BASE,
    BUNDLE,
    COOKIES,
    NAMES,
    SERVICE,
    SHARE,
    CookieKeys,
    Holdings,
    ProtocolError,
    Push,
    PushReader,
    Resource,
    Taken,
    settle,
)
from .state_dir import Saved, StateError

log = logging.getLogger(__name__)

PROTOCOL = (1, 2)
HEARTBEAT_S = 5.0
DEAD_S = 15.0
RETRY_MIN_S, RETRY_MAX_S = 0.1, 5.0
UNWANTED_S = 30.0  # between two tries of a sidecar that is banned, or that nobody knows
SETTLED_S = 5.0  # a stream that has lived so long starts the back-off anew
SAY_EVERY_S, SAY_GONE_EVERY_S = 10.0, 60.0
SAVE_EVERY_S = 2.0
USES_MAX = 1000
REJECTED_SHOWN = 20


class Served(Protocol):
    """The data path, as this module sees it."""

    async def serve_by(self, snapshot: Snapshot) -> Refusal | None:
        """Serve by this from now on; where that is refused, nothing changes."""

    def ban(self, bans: frozenset[str]) -> None: ...
    def name(self, names: frozenset[str] | None) -> None: ...
    def share(self, share: float | None) -> None: ...
    def stick(self, keys: CookieKeys) -> None: ...


class _Goodbye(Exception):
    """The replica is about to end; another one will do."""


class ControlPlane:
    """The control plane as one sidecar has it."""

    def __init__(self, member: Member, served: Served, *, everything: bool, version: str) -> None:
        self.member, self.served = member, served
        self.everything, self.version = everything, version
        self.holdings = Holdings(member.membership.service)
        self.uses: dict[str, None] = {}
        self.in_force = trio.Event()  # something is served by
        self.address = ""  # of the replica that we are connected to, "" without
        self.replica = ""
        self.minor = 0  # version of the protocol that it speaks
        self.heartbeat_s = HEARTBEAT_S
        self.problem = "not asked yet"  # why we are not connected
        self.gone_since = trio.current_time()
        self.rejected: dict[str, str] = {}
        self._connected = trio.Event()
        self._asked = trio.Event()  # every replica, once
        self._unsaved = trio.Event()
        self._applying = trio.Lock()

    # -- for others

    async def until_connected(self) -> None:
        while not self.address:
            await self._connected.wait()

    async def post(self, path: str, body: Json, timeout_s: float = 10.0) -> Json:
        """To the replica that has our stream. Raises Unreachable, Refused."""
        if not self.address:
            raise Unreachable(f"not connected to the control plane: {self.problem}")
        return await self.member.client.call("POST", self.address, path, body, timeout_s=timeout_s)

    async def want(self, service: str) -> None:
        """Ask for a service that is not held; it comes by the stream. The caller limits the time. Raises Unreachable,
        Refused."""
        if service not in self.uses and len(self.uses) >= USES_MAX:
            raise Unreachable(f"this sidecar uses {USES_MAX} services already")
        self.uses[service] = None
        await self._asked.wait()  # the first requests after a start come before anybody can have answered
        try:
            await self.post("/v1/uses", {"services": [service]})
        except Refused:
            self.uses.pop(service, None)
            raise

    # -- the state on disk

    async def from_disk(self) -> bool:
        """Serve by what was last accepted; whether there was any."""
        saved, problem = await trio.to_thread.run_sync(self.member.state.snapshot)
        if problem:
            log.warning("%s", problem)
        if saved is None:
            return False
        # The bundle in force is that of the identity; it is small, and asked for again.
        resources = [Resource(name, *each) for name, each in saved.resources.items() if name != BUNDLE]
        self.holdings.policy = saved.policy
        rejected = await self._apply(resources, ())
        self._use_what_is_held()
        for name, reason in rejected.items():
            log.error("of the state on disk, %s cannot be used: %s", name, reason)
        if self.in_force.is_set():
            at = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(saved.at))
            log.info("serving by the policy of %s, from %s", at, self.member.state.path)
        return self.in_force.is_set()

    def _use_what_is_held(self) -> None:
        """What was asked for before a restart stays in use: else the control plane would take it back."""
        services = self.holdings.services
        own = services.get(self.holdings.own)
        if own is not None and not self.everything:
            wanted = (name for name in services if name != own.name and name not in own.calls)
            self.uses = dict.fromkeys(islice(wanted, USES_MAX))

    async def keep_saved(self) -> None:
        """Put on disk what was accepted, a moment later, for ever."""
        while True:
            await self._unsaved.wait()
            await self.save()
            await trio.sleep(SAVE_EVERY_S)

    async def save(self) -> None:
        if not self._unsaved.is_set():
            return
        self._unsaved = trio.Event()
        resources = {name: (each.version, each.data) for name, each in self.holdings.resources.items()}
        saved = Saved(time.time(), self.holdings.policy, resources)
        try:
            await trio.to_thread.run_sync(self.member.state.write_snapshot, saved)
        except StateError as error:
            log.error("%s; after a restart this sidecar would serve by an older policy", error)

    # -- the stream

    async def run(self) -> None:
        """Stay connected, for ever."""
        delay_s, said_at = RETRY_MIN_S, trio.current_time() - SAY_EVERY_S
        while True:
            wait_s = delay_s * random.uniform(0.5, 1.0)
            for address in self.member.mesh.order():
                begun, was_connected = trio.current_time(), False
                try:
                    await self._stream(address)
                    self.problem = f"{address} has ended the stream"
                except _Goodbye as goodbye:
                    self.problem = f"{address} says goodbye: {goodbye}"
                except (Unreachable, ProtocolError) as error:
                    self.problem = str(error)
                except Refused as error:
                    self.problem = f"{address}: {error}"
                    if not error.passing:
                        if await self.member.shut_out(error):
                            break
                        wait_s = max(wait_s, UNWANTED_S * random.uniform(0.5, 1.0))
                was_connected = bool(self.address)
                self._disconnected(address)
                now = trio.current_time()
                if was_connected:
                    self.gone_since = now
                    log.warning("the control plane is not connected any more (traffic goes on): %s", self.problem)
                    said_at = now
                    if now - begun >= SETTLED_S:
                        delay_s = wait_s = RETRY_MIN_S
            self._asked.set()
            now = trio.current_time()
            every_s = SAY_GONE_EVERY_S if self.in_force.is_set() else SAY_EVERY_S
            if now - said_at >= every_s:
                said_at = now
                self._say_gone(now)
            with trio.move_on_after(wait_s):
                await self.member.renewed.wait()  # it may have been our certificate
            delay_s = min(2 * delay_s, RETRY_MAX_S)

    def _say_gone(self, now: float) -> None:
        gone_s = now - self.gone_since
        if self.in_force.is_set():
            text = "the control plane has not been connected for %.0f s, the last policy serves on: %s"
        else:
            text = "waiting for the control plane and a first policy (for %.0f s now), nothing is served: %s"
        log.warning(text, gone_s, self.problem)

    def _disconnected(self, address: str) -> None:
        self.address = self.replica = ""
        replicas = self.member.mesh
        if replicas.good == address:
            replicas.good = ""
        if address in replicas.addresses:  # another one first
            replicas.addresses.remove(address)
            replicas.addresses.append(address)

    async def _stream(self, address: str) -> None:
        """One connection, to its end. Raises Unreachable, Refused, ProtocolError, _Goodbye."""
        client = self.member.mesh_client()
        hello = {
            "protocol": PROTOCOL,
            "version": self.version,
            "service": self.member.membership.service,
            "held": self.holdings.versions(),
            "uses": list(self.uses),
            "all": self.everything,
            "policy": self.holdings.policy,
        }
        try:
            async with client.lines(address, "/v1/stream", hello, DEAD_S) as lines:
                reader = PushReader()
                async for line in lines:
                    await self._line(address, client, reader, line)
        finally:
            await client.aclose()

    async def _line(self, address: str, client: Client, reader: PushReader, line: Json) -> None:
        kind = line.get("type") if isinstance(line, dict) else None
        if kind == "hello":
            await self._hello(address, line)
        elif kind == "goodbye":
            raise _Goodbye(str(line.get("reason", ""))[:200])
        elif kind == "push":
            push = reader.line(line)
            if push is not None:
                await self._take(address, push)
        elif not isinstance(kind, str):
            raise ProtocolError(f"{address} sent a line without a type")
        # heartbeats, and what a newer control plane may say beside, need no answer

    async def _hello(self, address: str, line: Json) -> None:
        if self.address:
            raise ProtocolError(f"{address} said hello twice")
        told = line.get("heartbeat_s")
        self.heartbeat_s = min(60.0, max(0.1, float(told))) if isinstance(told, int | float) else HEARTBEAT_S
        self.replica = str(line.get("replica", ""))[:100]
        protocol = line.get("protocol")
        spoken = protocol[1] if isinstance(protocol, list) and len(protocol) > 1 else 0
        self.minor = spoken if isinstance(spoken, int) else 0
        replicas = line.get("replicas")
        if isinstance(replicas, list) and all(isinstance(each, str) for each in replicas):
            # Where we got through stays known: the others may be told by names that mean nothing here.
            known = list(dict.fromkeys((*replicas[:63], address)))
            if self.member.mesh.update(known):
                self.member.remember_replicas(known)
        self.member.mesh.good = address
        self.member.refused = self.problem = ""
        self.address = address
        self._connected.set()
        self._connected = trio.Event()
        self._asked.set()
        log.info("connected to the control plane %s at %s", self.replica, address)
        await self.member.save()

    # -- pushes

    async def _take(self, address: str, push: Push) -> None:
        """Apply one push and answer it."""
        self.holdings.policy, self.holdings.revision = push.policy, push.revision
        rejected = await self._apply(push.resources, push.removed)
        for name in (*push.removed, *(each.name for each in push.resources)):
            self.rejected.pop(name, None)
        self.rejected.update(rejected)
        for name in sorted(rejected)[:REJECTED_SHOWN]:
            log.error("%s of revision %d is refused, what was held serves on: %s", name, push.revision, rejected[name])
        self._unsaved.set()
        try:
            await self.member.client.call("POST", address, "/v1/ack", {"nonce": push.nonce, "rejected": rejected})
        except Refused as error:  # it has given up on this stream
            raise Unreachable(f"{address} does not take our answer: {error}") from None
        if not self.in_force.is_set() and SERVICE + self.holdings.own in rejected:
            await trio.sleep(SAY_EVERY_S)
            raise Unreachable(f"our own policy is refused ({rejected[SERVICE + self.holdings.own]}); asking again")

    async def _apply(self, resources: Collection[Resource], removed: Collection[str]) -> dict[str, str]:
        """Take these resources; what is refused, with the reason."""
        async with self._applying:
            holdings = self.holdings
            before = {each.name: holdings.resources.get(each.name) for each in resources}
            taken = holdings.take(resources, removed)
            rejected = taken.rejected
            if BUNDLE in taken.changed and holdings.bundle is not None:
                problem = await self.member.trust(holdings.bundle.trust_domain, holdings.bundle.pem)
                if problem is not None:
                    rejected[BUNDLE] = problem
                    holdings.restore(before.get(BUNDLE), BUNDLE)
            if BANS in taken.changed:
                self.served.ban(holdings.bans)
            if NAMES in taken.changed:
                self.served.name(holdings.names)
            if SHARE in taken.changed:
                self.served.share(holdings.share)
            if COOKIES in taken.changed and holdings.cookies is not None:
                self.served.stick(holdings.cookies)  # in force with the plans, which are made anew
            if taken.changed - {BUNDLE, BANS, NAMES, SHARE}:
                rejected |= await self._settle(taken, before)
            return rejected

    async def _settle(self, taken: Taken, before: dict[str, Resource | None]) -> dict[str, str]:
        holdings = self.holdings
        own = SERVICE + holdings.own
        candidates = list(taken.services)

        async def attempt(names: frozenset[str]) -> Refusal | None:
            services = (taken.services[name][1] for name in names)
            return await self.served.serve_by(holdings.snapshot({each.name: each for each in services}))

        refused: dict[str, str] = {}
        if holdings.has_own or own in candidates:
            refused = await settle(candidates, own, holdings.has_own, attempt)
            base = refused.pop(BASE, None)
            if base is not None:
                refused |= dict.fromkeys(holdings.take_back(taken, before), base)
        for name, (resource, service) in taken.services.items():
            if name not in refused:
                holdings.accept(resource, service)
        if holdings.has_own:
            if taken.services.keys() - refused.keys():
                log.info("policy r%d is in force", holdings.policy)
            self.in_force.set()
        return refused
