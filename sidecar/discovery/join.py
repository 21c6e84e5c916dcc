"""How a sidecar becomes a member of a mesh, and stays one: token, certificate, renewal.

The private key is made here and never leaves. A leaf's age is counted from its issuance by this host's own clocks (the
monotonic one, and the wall clock, which alone goes on while a laptop sleeps), so that clocks that differ by minutes
renew in time. Must not know what else the control plane sends. Invariants:
nothing secret is sent before the other end has proven to be the control plane; a failed renewal changes nothing; every
renewal has a new key.
"""

import logging
import random
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TypeVar

import trio
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from certs.authority import CLOCK_SKEW, PrivateKey, key_pem, new_key
from certs.bundle import BundleError, TrustBundle
from certs.client import (
    JOIN_SNI,
    MESH_SNI,
    control_plane_id,
    new_csr,
    pinned_context,
    root_by_fingerprint,
    unverified_context,
)
from certs.files import IdentityError, IdentityFiles, parse_identity
from certs.tokens import JOIN, Token

from .http import Client, Json, Refused, Unreachable
from .state_dir import Damaged, Membership, StateDir, StateError

log = logging.getLogger(__name__)

SAY_EVERY_S = 10.0
RETRY_MIN_S, RETRY_MAX_S = 0.5, 5.0
RENEW_RETRY_MAX_S = 150.0
EXPIRED_RETRY_MAX_S = 5.0  # without a certificate nothing goes
NOTABLE_SKEW_S = 60.0
JOIN_AGAIN_S = 30.0
LOOK_EVERY_S = 30.0  # at the clocks: who sleeps for longer would not notice that the host has slept
T = TypeVar("T")


class JoinError(Exception):
    """This sidecar cannot become, or remain, a member; says why and what to do. Trying again changes nothing."""


@dataclass(frozen=True, slots=True)
class Term:
    """The life of a leaf, on trio's clock."""

    begun: float
    ttl_s: float

    @property
    def ends(self) -> float:
        return self.begun + self.ttl_s

    def renewal_s(self, chance: float) -> float:
        """At what age to renew: half life, give or take 10% of it. `chance` is from 0 to 1."""
        return self.ttl_s * 0.5 * (0.9 + 0.2 * chance)


def issued_at(identity: IdentityFiles) -> float:
    """When it was issued, as the control plane's clock had it (it dates certificates back, for peers whose clocks are
    behind)."""
    return (identity.not_before + CLOCK_SKEW).timestamp()


def term_of(identity: IdentityFiles, issued_here: float, now_here: float, now: float) -> Term:
    """`issued_here`, `now_here`: this host's wall clock at issuance and now; `now`: trio's clock."""
    ttl_s = max(1.0, identity.not_after.timestamp() - issued_at(identity))
    age_s = max(0.0, now_here - issued_here)
    return Term(now - age_s, ttl_s)


def skew_note(identity: IdentityFiles, now_here: float) -> str | None:
    """What to say of this host's clock right after issuance."""
    ahead_s = now_here - issued_at(identity)
    if abs(ahead_s) < NOTABLE_SKEW_S:
        return None
    direction = "ahead of" if ahead_s > 0 else "behind"
    text = f"this host's clock is {abs(ahead_s):.0f} s {direction} that of the control plane"
    if now_here > identity.not_after.timestamp():
        return f"{text}: by it the certificate that was issued just now has expired. Put the clock right (NTP)"
    if now_here < identity.not_before.timestamp():
        return f"{text}: by it the certificate that was issued just now is not valid yet. Put the clock right (NTP)"
    return f"{text}; put it right (NTP)"


class Replicas:
    """The addresses of one listener of all replicas: the last good one first, the others in an order of our own."""

    def __init__(self, addresses: Sequence[str], shuffle: Callable[[list[str]], None] = random.shuffle) -> None:
        self._shuffle = shuffle
        self.addresses: list[str] = []
        self.good = ""
        self.update(addresses)

    def update(self, addresses: Sequence[str]) -> bool:
        """Whether anything has changed."""
        if not addresses or set(addresses) == set(self.addresses):
            return False
        self.addresses = list(dict.fromkeys(addresses))
        self._shuffle(self.addresses)
        return True

    def order(self) -> list[str]:
        if self.good in self.addresses:
            return [self.good, *(each for each in self.addresses if each != self.good)]
        return list(self.addresses)


async def each_in_turn(replicas: Replicas, ask: Callable[[str], Awaitable[T]]) -> T:
    """Ask one address after the other until one answers usably. Raises what the last one did."""
    failure: Exception = Unreachable("no address of the control plane is known")
    for address in replicas.order():
        try:
            answer = await ask(address)
        except Unreachable as error:
            failure = error
        except Refused as error:
            if not error.passing:
                raise
            failure = error
        else:
            replicas.good = address
            return answer
    raise failure


class Member:
    """A member of the mesh: who it is, and the client with which it talks to the control plane."""

    def __init__(
        self,
        state: StateDir,
        membership: Membership,
        identity: IdentityFiles,
        *,
        token: Token | None = None,
        mark: int | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.state, self.membership, self.identity = state, membership, identity
        self.token, self.mark = token, mark
        self.term = term_of(identity, membership.issued, time.time(), trio.current_time())
        self.mesh = Replicas(membership.mesh)
        self.join = Replicas(membership.join)
        self.client = self.mesh_client()
        self.on_identity: Callable[[IdentityFiles], None] = lambda identity: None
        self.renewed = trio.Event()  # the next time that there is another identity
        self._former: list[Client] = []
        self._lock = trio.Lock()
        self.refused = ""  # why the control plane does not want us; "" while it does

    def mesh_client(self) -> Client:
        """A client of the mesh listener, by the present certificate; whoever asks for it closes it."""
        expected = control_plane_id(self.identity.trust_domain)
        return Client(pinned_context(self.identity.bundle, expected, self.identity), MESH_SNI, mark=self.mark)

    async def aclose(self) -> None:
        for client in (self.client, *self._former):
            await client.aclose()

    async def ask(self, path: str, body: Json) -> Json:
        """A POST to any replica's mesh listener. Raises Unreachable, Refused."""
        return await each_in_turn(self.mesh, lambda address: self.client.call("POST", address, path, body))

    def remember_replicas(self, addresses: Sequence[str]) -> None:
        """Where a restart will look for the control plane."""
        self.membership = replace(self.membership, mesh=tuple(addresses))

    # -- replacing the identity

    async def trust(self, trust_domain: str, pem: bytes) -> str | None:
        """Take a bundle that was sent; why not, or None."""
        async with self._lock:
            identity = self.identity
            if trust_domain != identity.trust_domain:
                return f"it is of the trust domain {trust_domain[:80]!r}, we are of {identity.trust_domain}"
            try:
                bundle = TrustBundle.parse(trust_domain, pem)
                if bundle.roots == identity.bundle.roots:
                    return None
                fresh = _checked(identity.cert_pem, identity.key_pem, bundle.pem, self.state)
            except (BundleError, IdentityError) as error:
                return str(error)
            await self._replace(fresh, self.membership.issued, self.term)
        return None

    async def _replace(self, identity: IdentityFiles, issued_here: float, term: Term, **changes: object) -> None:
        """In force at once; on disk as soon as that can be."""
        self.identity, self.term = identity, term
        self._former.append(self.client)
        self.client = self.mesh_client()
        while len(self._former) > 1:  # not the last one: requests may be under way on it
            await self._former.pop(0).aclose()
        self.membership = replace(self.membership, issued=issued_here, **changes)  # type: ignore[arg-type]
        self.on_identity(identity)
        self.renewed.set()
        self.renewed = trio.Event()
        await self.save(identity)

    async def save(self, identity: IdentityFiles | None = None) -> None:
        membership = self.membership

        def write() -> None:
            if identity is not None:
                self.state.write_identity(identity)
            self.state.write_membership(membership)

        try:
            await trio.to_thread.run_sync(write)
        except StateError as error:
            log.error("%s; after a restart this sidecar would need an older certificate, or a token", error)

    # -- renewal

    @property
    def age_s(self) -> float:
        return max(trio.current_time() - self.term.begun, time.time() - self.membership.issued)

    async def keep_renewed(self) -> None:
        """Renew at half life, for ever. Traffic is not touched: new connections use the new certificate."""
        while True:
            due_s = self.term.renewal_s(random.random())
            while self.age_s < due_s:  # noqa: ASYNC110 - time is what is waited for
                await trio.sleep(min(LOOK_EVERY_S, max(0.01, due_s - self.age_s)))
            await self._renew_surely()

    async def _renew_surely(self) -> None:
        delay_s, said_at, term = 1.0, -SAY_EVERY_S, self.term
        while self.term is term:
            try:
                await self._renew_somehow()
                self.refused = ""
                return
            except (Unreachable, Refused, JoinError) as error:
                now, left_s = trio.current_time(), term.ttl_s - self.age_s
                if now - said_at >= SAY_EVERY_S:
                    said_at = now
                    until = f"it is good for another {left_s:.0f} s" if left_s > 0 else "it HAS EXPIRED"
                    log.error("the certificate could not be renewed (%s): %s", until, error)
                if isinstance(error, Refused) and not error.passing and await self.shut_out(error):
                    return
            most_s = max(0.2, left_s / 4) if left_s > 0 else EXPIRED_RETRY_MAX_S  # several times before the end
            await trio.sleep(min(delay_s, most_s) * random.uniform(0.5, 1.0))
            delay_s = min(2 * delay_s, RENEW_RETRY_MAX_S)

    async def _renew_somehow(self) -> None:
        """By our certificate; where that may be the reason that it does not work, by its key."""
        try:
            await self.renew()
        except Unreachable:
            if self.age_s < self.term.ttl_s:
                raise
            await self._after_expiry()

    async def shut_out(self, error: Refused) -> bool:
        """The control plane does not know us any more (its store is another), or has banned us. Whether a token that we
        were given has made us a member again."""
        self.refused = str(error)
        if error.status != 401 or self.token is None:
            return False
        log.warning("%s; joining anew with the token", error)
        async with self._lock:
            wanted = Wanted(self.membership.service, self.token, tuple(self.join.addresses), self.mark)
            try:
                with trio.fail_after(JOIN_AGAIN_S):
                    membership, identity = await _join(self.state, wanted)
            except (JoinError, StateError, trio.TooSlowError) as failure:
                log.error("joining anew has failed: %s", str(failure) or f"no answer within {JOIN_AGAIN_S:g} s")
                self.token = None if isinstance(failure, JoinError) else self.token
                return False
            if identity.spiffe_id != self.identity.spiffe_id:
                return False
            term = term_of(identity, membership.issued, membership.issued, trio.current_time())
            self.mesh.update(membership.mesh)
            self.join.update(membership.join)
            self.refused, self.membership = "", membership
            await self._replace(identity, membership.issued, term)
        return True

    async def renew(self) -> None:
        """Raises Unreachable, Refused, JoinError."""
        async with self._lock:
            key = new_key()
            answer = await self.ask("/v1/renew", {"csr": new_csr(key).decode()})
            await self._take(answer, key)

    async def _after_expiry(self) -> None:
        """Our certificate has expired: prove with its key who we are; else a token, where we have one."""
        async with self._lock:
            key = load_pem_private_key(self.identity.key_pem, None)
            client = _join_client(self.identity.bundle, self.identity.trust_domain, self.mark)
            body = {"certificate": self.identity.cert_pem.decode(), "csr": new_csr(key).decode()}  # type: ignore[arg-type]
            try:
                answer = await each_in_turn(
                    self.join, lambda address: client.call("POST", address, "/v1/rejoin", body, repeat=False)
                )
            except Refused as error:
                if error.passing:
                    raise
                raise JoinError(f"{error}. {_new_token(self.membership.service)}") from None
            finally:
                await client.aclose()
            await self._take(answer, key)  # type: ignore[arg-type]

    async def _take(self, answer: Json, key: PrivateKey) -> None:
        identity = _identity_of(answer, key, self.state)
        if identity.spiffe_id != self.identity.spiffe_id:
            raise JoinError(f"the control plane issued {identity.spiffe_id} to us, who are {self.identity.spiffe_id}")
        now_here = time.time()
        note = skew_note(identity, now_here)
        if note is not None:
            log.warning("%s", note)
        changes = _addresses(answer)
        if mesh := changes.get("mesh"):
            self.mesh.update(mesh)
        if join := changes.get("join"):
            self.join.update(join)
        await self._replace(identity, now_here, term_of(identity, now_here, now_here, trio.current_time()), **changes)


# -- becoming a member


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the command line says of membership. `addresses`: HOST:PORT of join listeners, before the token's own."""

    service: str
    token: Token | None = None
    addresses: tuple[str, ...] = ()
    mark: int | None = None


async def become_member(state: StateDir, wanted: Wanted) -> Member:
    """From the state directory where it knows who we are, else by the token. Waits for the control plane as long as it
    takes. Raises JoinError, StateError."""
    held = _held(state, wanted)
    if held is None:
        membership, identity = await _join(state, wanted)
        return Member(state, membership, identity, token=wanted.token, mark=wanted.mark)
    membership, identity = held
    if wanted.addresses:
        membership = replace(membership, join=tuple(dict.fromkeys((*wanted.addresses, *membership.join))))
    member = Member(state, membership, identity, token=wanted.token, mark=wanted.mark)
    log.info(
        "this is sidecar %s of %s, by %s; its certificate is good for another %.0f s",
        membership.sidecar,
        membership.service,
        state.path,
        max(0.0, member.term.ends - trio.current_time()),
    )
    if trio.current_time() >= member.term.ends:
        log.warning("the certificate in %s expired %s", state.path, _ago(trio.current_time() - member.term.ends))
        try:
            await _until(f"a new certificate for {membership.service}", member._after_expiry)
        except JoinError as error:
            await member.aclose()
            if wanted.token is None:
                raise
            log.warning("%s; joining anew with the token", error)
            return await _anew(state, wanted)
    return member


async def _anew(state: StateDir, wanted: Wanted) -> Member:
    state.set_aside()
    membership, identity = await _join(state, wanted)
    return Member(state, membership, identity, token=wanted.token, mark=wanted.mark)


def _held(state: StateDir, wanted: Wanted) -> tuple[Membership, IdentityFiles] | None:
    """What the directory knows, where that is what is wanted; a token for another mesh puts it aside."""
    token = wanted.token
    try:
        membership, identity = state.membership(), state.identity()
    except Damaged as error:
        if token is None:
            raise StateError(
                f"{error}. It cannot be served from; remove {state.path} and join again. {_new_token(wanted.service)}"
            ) from None
        log.warning("%s; it is put aside (%s), and the token is used", error, state.set_aside())
        return None
    if membership is None or identity is None:
        return None
    for found in (membership.service, identity.spiffe_id.service):
        if found != wanted.service:
            raise StateError(
                f"the state directory {state.path} is of a sidecar of {found}, but this one is of {wanted.service}; "
                "name another directory with --state-dir"
            )
    if token is not None and root_by_fingerprint(identity.bundle, token.fingerprint) is None:
        aside = state.set_aside()
        log.warning("the token is for another mesh than the state in %s, which is put aside in %s", state.path, aside)
        return None
    return membership, identity


async def _join(state: StateDir, wanted: Wanted) -> tuple[Membership, IdentityFiles]:
    token = wanted.token
    if token is None:
        raise JoinError(
            f"there is no identity in {state.path}, and no token to get one with. {_new_token(wanted.service)}"
        )
    if token.kind != JOIN:
        raise JoinError(f"this is an operator's token; a sidecar joins with another. {_new_token(wanted.service)}")
    replicas = Replicas(tuple(dict.fromkeys((*wanted.addresses, *token.addresses))), shuffle=lambda _: None)
    key = new_key()

    async def attempt() -> tuple[Membership, IdentityFiles]:
        return await each_in_turn(replicas, lambda address: _join_at(address, state, wanted, token, key))

    log.info("joining the mesh %s as %s at %s", token.trust_domain, wanted.service, ", ".join(replicas.addresses))
    membership, identity = await _until(f"the control plane, to join as {wanted.service}", attempt)
    note = skew_note(identity, membership.issued)
    if note is not None:
        log.warning("%s", note)
    try:
        await trio.to_thread.run_sync(state.write_identity, identity)
        await trio.to_thread.run_sync(state.write_membership, membership)
    except StateError as error:
        raise StateError(f"{error}; the token has been used, but nothing could be kept of it") from None
    log.info(
        "joined as sidecar %s: %s until %s", membership.sidecar, identity.spiffe_id, identity.not_after.isoformat()
    )
    return membership, identity


async def _join_at(
    address: str, state: StateDir, wanted: Wanted, token: Token, key: PrivateKey
) -> tuple[Membership, IdentityFiles]:
    bundle = await first_trust(address, token.trust_domain, token.fingerprint, wanted.mark)
    client = _join_client(bundle, token.trust_domain, wanted.mark)
    body = {
        "token": token.text,
        "csr": new_csr(key).decode(),
        "service": wanted.service,
        "name": socket.gethostname()[:200],
    }
    try:
        answer = await client.call("POST", address, "/v1/join", body, repeat=False)
    except Refused as error:
        if error.passing:
            raise
        raise JoinError(f"the control plane at {address} refuses the token: {error}") from None
    finally:
        await client.aclose()
    identity = _identity_of(answer, key, state)
    if identity.spiffe_id.service != wanted.service or identity.trust_domain != token.trust_domain:
        raise JoinError(f"the control plane at {address} issued {identity.spiffe_id} to {wanted.service}")
    if root_by_fingerprint(identity.bundle, token.fingerprint) is None:
        raise JoinError(f"the control plane at {address} gave a bundle without the root that the token names")
    found = _addresses(answer)
    if not isinstance(answer.get("sidecar"), str) or not found.get("mesh"):
        raise JoinError(
            f"the control plane at {address} answered without an id or its addresses; is it of this version?"
        )
    join = tuple(dict.fromkeys((*found.get("join", ()), address)))
    return Membership(
        answer["sidecar"], wanted.service, identity.trust_domain, found["mesh"], join, time.time()
    ), identity


async def first_trust(address: str, trust_domain: str, fingerprint: str, mark: int | None = None) -> TrustBundle:
    """The root of this fingerprint (a token names it), asked of whoever answers: nothing secret is sent, and only that
    root is believed. Raises Unreachable."""
    client = Client(unverified_context(), JOIN_SNI, mark=mark)
    try:
        answer = await client.call("GET", address, "/v1/ca")
    except Refused as error:
        raise Unreachable(f"{address}: {error}; is it a control plane?") from None
    finally:
        await client.aclose()
    pem = answer.get("bundle") if isinstance(answer, dict) else None
    try:
        if not isinstance(pem, str):
            raise BundleError("no bundle")
        bundle = root_by_fingerprint(TrustBundle.parse(trust_domain, pem.encode()), fingerprint)
    except BundleError as error:
        raise Unreachable(f"{address} gave no usable bundle: {error}") from None
    if bundle is None:
        raise Unreachable(
            f"{address} is not the control plane that was meant (its root is another): nothing was sent to it. "
            "Is the address right? Was the control plane set up anew?"
        )
    return bundle


def _join_client(bundle: TrustBundle, trust_domain: str, mark: int | None) -> Client:
    return Client(pinned_context(bundle, control_plane_id(trust_domain)), JOIN_SNI, mark=mark)


async def _until(what: str, attempt: Callable[[], Awaitable[T]]) -> T:
    """Try for as long as it takes, and say every 10 s what is waited for."""
    said_at, delay_s, begun = -SAY_EVERY_S, RETRY_MIN_S, trio.current_time()
    while True:
        wait_s = delay_s * random.uniform(0.5, 1.0)
        try:
            return await attempt()
        except (Unreachable, Refused) as error:
            if isinstance(error, Refused) and not error.passing:
                raise JoinError(str(error)) from None
            if isinstance(error, Refused) and error.retry_after_s:
                wait_s = error.retry_after_s
            now = trio.current_time()
            if now - said_at >= SAY_EVERY_S:
                said_at = now
                log.warning("waiting for %s (for %.0f s now): %s", what, now - begun, error)
        await trio.sleep(wait_s)
        delay_s = min(2 * delay_s, RETRY_MAX_S)


def _identity_of(answer: Json, key: PrivateKey, state: StateDir) -> IdentityFiles:
    certificate, bundle = (answer.get(each) if isinstance(answer, dict) else None for each in ("certificate", "bundle"))
    if not isinstance(certificate, str) or not isinstance(bundle, str):
        raise JoinError("the control plane answered without a certificate and a bundle; is it of this version?")
    try:
        return _checked(certificate.encode(), key_pem(key), bundle.encode(), state)
    except IdentityError as error:
        raise JoinError(f"the control plane issued something that cannot be used: {error}") from None


def _checked(cert_pem: bytes, key: bytes, bundle_pem: bytes, state: StateDir) -> IdentityFiles:
    """Checked as a set, by the certificate's own time: clocks may differ, and the issuer's was right for it."""
    directory = state.identity_directory
    try:
        ends = x509.load_pem_x509_certificate(cert_pem).not_valid_after_utc
    except ValueError:
        ends = datetime.now(UTC)
    return parse_identity(cert_pem, key, bundle_pem, ends - timedelta(seconds=1), directory)


def _addresses(answer: Json) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for key in ("mesh", "join"):
        value = answer.get(key)
        if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
            found[key] = tuple(value[:64])
    return found


def _new_token(service: str) -> str:
    return f"Make a token with: pillion token create --service {service}  and give it with --token-file"


def _ago(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
