"""Who becomes a sidecar, and stays one: joining by token, renewing, coming back after the certificate has ended; and
certificates for operators.

A leaf is bound to the service of the token that it began with; what a signing request says of names decides nothing.
Must not know HTTP beyond its errors. Invariants: no sidecar is given a certificate that the store does not know; a use
of a token is taken in the transaction that makes the sidecar, and asking again with the same key (the answer was lost)
takes no further one; who is banned gets nothing.
"""

import hashlib
import logging
from collections.abc import Collection
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import trio
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from certs.authority import CSR_BYTES_MAX, LEAF_TTL_MIN, IssueError, certificate_pem
from certs.files import CHAIN_BYTES_MAX, CHAIN_LENGTH_MAX
from certs.pem import CERTIFICATE, PemError, read_blocks
from certs.spiffe import SpiffeId
from certs.svid import SvidError, check_leaf, fingerprint, issued_by, parse_certificate, validity_of
from certs.tokens import JOIN, TokenError, parse_token
from certs.tokens import Token as TokenText
from control_plane.state.mirror import Held
from control_plane.state.records import BANS, ISSUERS, ROOTS, SIDECARS, TOKENS, Sidecar, Token, encode
from control_plane.state.tokens import TokenRefused, check_home, check_service, judge, keep, use
from control_plane.store.base import Compare, Conflict, Operation, Put

from .http import CONTROL_PLANE, ApiError, Peer
from .replica import Replica

log = logging.getLogger(__name__)

Json = dict[str, Any]

REQUEST_LABELS = ("CERTIFICATE REQUEST", "NEW CERTIFICATE REQUEST")
TRIES = 8  # against others who change the same record at the same time
RENEW_INTERVAL_S = 1.0  # more often would only make the store and the authority work
CAUGHT_UP_S = 5.0
HOST_NAME_LENGTH_MAX = 253

_JOIN_AGAIN = "join again with a token: pillion token create --service NAME"


@dataclass(frozen=True, slots=True)
class Issued:
    """A new leaf."""

    certificate: x509.Certificate
    chain_pem: str
    identity: SpiffeId
    fingerprint: str
    not_after: float


# Joining


async def join(replica: Replica, turn: trio.Lock, token_text: str, csr_pem: str, service: str, name: str) -> Json:
    """A new sidecar. Those who share a token of few uses take turns. Raises ApiError, StoreError."""
    token = read_token(replica, token_text)
    request = read_request(csr_pem)
    record: Token | None = replica.state.get(TOKENS, token.id)
    if record is None or record.uses is None:
        return await _join(replica, token, request, service, name)
    async with turn:
        return await _join(replica, token, request, service, name)


async def _join(
    replica: Replica, token: TokenText, request: x509.CertificateSigningRequest, service: str, name: str
) -> Json:
    sidecar = sidecar_id(token.id, service, request)
    for _ in range(TRIES):
        held: Held[Token] | None = replica.state.table(TOKENS).get(token.id)
        before: Held[Sidecar] | None = replica.state.table(SIDECARS).get(sidecar)
        again = before is not None and before.record.token == token.id
        try:
            record = judge(token, held.record if held is not None else None, JOIN, replica.now(), again=again)
            check_service(token.id, record, service)
        except TokenRefused as error:
            raise refused(error) from None
        assert held is not None
        _refuse_banned(replica, sidecar, service, "")
        if service == CONTROL_PLANE:  # whatever a record says: who has this identity is believed by every sidecar
            raise ApiError(403, "reserved", f"nobody joins as {CONTROL_PLANE}")
        issued = issue(replica, request, service_id(replica, service), replica.settings.leaf_ttl)
        operations, compares = use(token.id, held) if before is None else ([], keep(token.id, held))
        now = replica.now()
        kept = before.record.fingerprints[:1] if before is not None else ()
        joined = before.record.joined if before is not None else now
        written = Sidecar(
            service,
            (issued.fingerprint, *kept),
            issued.not_after,
            joined,
            now,
            token.id,
            name[:HOST_NAME_LENGTH_MAX],
        )
        operations.append(Put(SIDECARS + sidecar, encode(written)))
        compares.append(Compare(SIDECARS + sidecar, before.revision if before is not None else 0))
        if await _committed(replica, operations, compares):
            if before is None:
                await replica.audit(f"token {token.id}", "join", f"sidecar {sidecar}", _from(name))
            return _welcome(replica, sidecar, issued)
    raise _crowded()


def sidecar_id(token: str, service: str, request: x509.CertificateSigningRequest) -> str:
    """One for each token and key: who asks again because the answer was lost is the same sidecar."""
    key = request.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return f"{service}-{hashlib.sha256(token.encode() + b'|' + key).hexdigest()[:16]}"


def read_token(replica: Replica, text: str) -> TokenText:
    """A token of this mesh; whether it is good, its record says. Raises ApiError."""
    try:
        token = parse_token(text)
        meta = replica.state.meta
        assert meta is not None, "who serves has been admitted to a mesh"
        check_home(token, meta.trust_domain, replica.state.table(ROOTS).keys())
    except TokenError as error:
        raise ApiError(401, "token_damaged", str(error), "copy it again, or make a new one") from None
    except TokenRefused as error:
        raise refused(error) from None
    return token


def refused(error: TokenRefused) -> ApiError:
    status = 403 if error.code in ("token_wrong_service", "token_wrong_kind") else 401
    return ApiError(status, error.code, str(error), error.help)


# Renewing


async def renew(replica: Replica, sidecar: str, peer: Peer, csr_pem: str) -> Json:
    """A new leaf for a sidecar that has shown a good one. Raises ApiError, StoreError."""
    request = read_request(csr_pem)
    issued = await _replace(replica, sidecar, peer.fingerprint, request, rejoin=False)
    return {"certificate": issued.chain_pem, "bundle": bundle_pem(replica), "not_after": issued.not_after}


async def rejoin(replica: Replica, certificate_text: str, csr_pem: str) -> Json:
    """A new leaf for a sidecar whose old one has ended, and that has its key. Raises ApiError, StoreError."""
    leaf = _read_leaf(certificate_text)
    request = read_request(csr_pem)
    shown = fingerprint(leaf.public_bytes(Encoding.DER))
    sidecar = replica.by_fingerprint.get(shown)
    if sidecar is None:
        raise ApiError(401, "unknown_sidecar", "no sidecar of this mesh has this certificate (any more)", _JOIN_AGAIN)
    _check_origin(replica, leaf)
    if request.public_key() != leaf.public_key():
        raise ApiError(
            403,
            "wrong_key",
            "the signing request is not of the certificate's own key, so it proves nothing",
            _JOIN_AGAIN,
        )
    _check_grace(replica, leaf)
    issued = await _replace(replica, sidecar, shown, request, rejoin=True)
    await replica.audit(f"sidecar {sidecar}", "rejoin", f"sidecar {sidecar}")
    return _welcome(replica, sidecar, issued)


async def _replace(
    replica: Replica, sidecar: str, shown: str, request: x509.CertificateSigningRequest, rejoin: bool
) -> Issued:
    """Issue a leaf for a sidecar, which keeps the one that it has shown until it has used the new one."""
    for _ in range(TRIES):
        held: Held[Sidecar] | None = replica.state.table(SIDECARS).get(sidecar)
        if held is None or shown not in held.record.fingerprints:
            raise ApiError(401, "unknown_sidecar", "no sidecar has joined with this certificate", _JOIN_AGAIN)
        record, now = held.record, replica.now()
        _refuse_banned(replica, sidecar, record.service, shown)
        if record.renewed != record.joined and 0 <= now - record.renewed < RENEW_INTERVAL_S:
            raise ApiError(
                429, "too_often", f"this certificate was renewed less than {RENEW_INTERVAL_S:g} s ago", "", None, 1
            )
        issued = issue(replica, request, service_id(replica, record.service), replica.settings.leaf_ttl)
        fresh = replace(record, fingerprints=(issued.fingerprint, shown), not_after=issued.not_after, renewed=now)
        if await _committed(
            replica, [Put(SIDECARS + sidecar, encode(fresh))], [Compare(SIDECARS + sidecar, held.revision)]
        ):
            return issued
    raise _crowded()


def _read_leaf(text: str) -> x509.Certificate:
    try:
        blocks = read_blocks(text.encode(), CHAIN_BYTES_MAX, CHAIN_LENGTH_MAX)
        if not blocks or blocks[0].label != CERTIFICATE:
            raise SvidError("a certificate is needed (PEM)")
        return parse_certificate(blocks[0].der)
    except (PemError, SvidError) as error:
        raise ApiError(400, "invalid", f"certificate: {error}") from None


def _check_origin(replica: Replica, leaf: x509.Certificate) -> None:
    """An issuing authority of the mesh has signed it, under a root that is still trusted. Raises ApiError."""
    meta = replica.state.meta
    assert meta is not None
    try:
        check_leaf(leaf.public_bytes(Encoding.DER), meta.trust_domain)
    except SvidError as error:
        raise ApiError(401, "unknown_sidecar", f"certificate: {error}", _JOIN_AGAIN) from None
    roots = _certificates(held.record.pem for held in replica.state.table(ROOTS).values())
    issuers = [chain for held in replica.state.table(ISSUERS).values() if (chain := _certificates([held.record.pem]))]
    own = [*replica.authority.issuing.chain]
    for chain in [own, *issuers]:
        if chain and issued_by(leaf, chain[0]) and any(issued_by(chain[-1], root) for root in roots):
            return
    raise ApiError(401, "unknown_sidecar", "the certificate is of no authority that this mesh trusts", _JOIN_AGAIN)


def _certificates(texts: Any) -> list[x509.Certificate]:
    found: list[x509.Certificate] = []
    for text in texts:
        try:
            found += [parse_certificate(block.der) for block in read_blocks(text.encode(), CHAIN_BYTES_MAX, 8)]
        except (PemError, SvidError):
            continue  # a damaged record: `check` names it
    return found


def _check_grace(replica: Replica, leaf: x509.Certificate) -> None:
    grace = replica.settings.rejoin_grace
    ended = validity_of(leaf).not_after
    now = datetime.fromtimestamp(replica.now(), UTC)
    if now <= ended:
        return
    if grace <= timedelta(0):
        raise ApiError(
            403,
            "grace_over",
            "the certificate has ended, and this control plane lets no ended certificate be renewed",
            _JOIN_AGAIN,
        )
    if now - ended > grace:
        raise ApiError(
            403,
            "grace_over",
            f"the certificate ended on {ended:%Y-%m-%d %H:%M} UTC; it could be renewed for {_span(grace)}",
            _JOIN_AGAIN,
        )


# Operators


def login(replica: Replica, csr_pem: str, operator: str, token: str, expires: float) -> Json:
    """A certificate that stands for an operator token, for as long as that does. Raises ApiError."""
    request = read_request(csr_pem)
    meta = replica.state.meta
    assert meta is not None
    identity = SpiffeId(meta.trust_domain, f"/operator/{operator}/{token}")
    left = timedelta(seconds=expires - replica.now())
    if left < LEAF_TTL_MIN:
        raise ApiError(401, "token_expired", "the token expires within seconds", "an admin makes a new one")
    issued = issue(replica, request, identity, min(replica.settings.leaf_ttl, left))
    return {
        "spiffe_id": str(identity),
        "certificate": issued.chain_pem,
        "bundle": bundle_pem(replica),
        "trust_domain": meta.trust_domain,
        "not_after": issued.not_after,
    }


# What they share


def read_request(text: str) -> x509.CertificateSigningRequest:
    """A signing request that is well formed; `issue` checks the proof in it. Raises ApiError."""
    try:
        blocks = read_blocks(text.encode(), 2 * CSR_BYTES_MAX, 1)
    except PemError as error:
        raise ApiError(400, "invalid_csr", f"signing request: {error}") from None
    if not blocks or blocks[0].label not in REQUEST_LABELS:
        raise ApiError(400, "invalid_csr", "a certificate signing request is needed (PEM)")
    try:
        request = x509.load_der_x509_csr(blocks[0].der)
        request.public_key()
        request.extensions  # noqa: B018 - decoded here, so that what is malformed is refused once
    except Exception as error:  # a parser of hostile input: whatever it says, the answer is no
        raise ApiError(400, "invalid_csr", f"the signing request cannot be parsed: {str(error)[:200]!a}") from None
    return request


def issue(replica: Replica, request: x509.CertificateSigningRequest, identity: SpiffeId, ttl: timedelta) -> Issued:
    """About a millisecond of work, so it is done right here. Raises ApiError."""
    for asked in _asked_identities(request):
        if asked != str(identity):
            raise ApiError(
                403,
                "wrong_identity",
                f"the signing request asks for {asked[:200]!a}, but what is issued here is {identity}",
                "leave names out of the request: they come from the token",
            )
    authority = replica.authority.issuing
    try:
        leaf = authority.issue(request.public_bytes(Encoding.DER), identity, ttl, replica.today())
    except IssueError as error:
        text = str(error)
        if text.startswith("the authority"):
            log.error("no certificate can be issued: %s", text)
            raise ApiError(
                503, "authority_unusable", f"this control plane cannot issue certificates: {text}", "pillion check"
            ) from None
        raise ApiError(400, "invalid_csr", text) from None
    return Issued(
        leaf,
        certificate_pem([leaf, *authority.chain]).decode(),
        identity,
        fingerprint(leaf.public_bytes(Encoding.DER)),
        validity_of(leaf).not_after.timestamp(),
    )


def _asked_identities(request: x509.CertificateSigningRequest) -> Collection[str]:
    try:
        names = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    return names.get_values_for_type(x509.UniformResourceIdentifier)


def service_id(replica: Replica, service: str) -> SpiffeId:
    meta = replica.state.meta
    assert meta is not None
    return SpiffeId.for_service(meta.trust_domain, service)


def bundle_pem(replica: Replica) -> str:
    """The roots of the mesh, as the store has them; ours are among them."""
    texts = [held.record.pem for _, held in sorted(replica.state.table(ROOTS).items())]
    return "".join(text if text.endswith("\n") else text + "\n" for text in texts)


def _refuse_banned(replica: Replica, sidecar: str, service: str, shown: str) -> None:
    if replica.is_banned(sidecar, service, shown) or _is_named(replica, sidecar):
        raise ApiError(403, "banned", f"{sidecar} is banned", "an admin lifts it: pillion cert unban")


def _is_named(replica: Replica, sidecar: str) -> bool:
    """A ban of one of its certificates holds for the sidecar's asking with another."""
    record: Sidecar | None = replica.state.get(SIDECARS, sidecar)
    if record is None:
        return False
    banned = {held.record.value for held in replica.state.table(BANS).values() if held.record.kind == "certificate"}
    return not banned.isdisjoint(record.fingerprints)


async def _committed(replica: Replica, operations: list[Operation], compares: list[Compare]) -> bool:
    """False: somebody else was quicker, and our state knows by now."""
    try:
        await replica.commit(operations, compares)
    except Conflict as conflict:
        await caught_up(replica, conflict)
        return False
    return True


async def caught_up(replica: Replica, conflict: Conflict) -> None:
    """Wait until our own state holds what a commit has run into."""
    newest = max((entry.revision for entry in conflict.found.values() if entry is not None), default=0)
    with trio.move_on_after(CAUGHT_UP_S):
        if newest > replica.state.revision:
            await replica.changed(newest - 1)
        else:
            await trio.sleep(0.02)  # a key that is gone: it tells no revision


def _crowded() -> ApiError:
    return ApiError(503, "busy", "too many changed the same at the same time", "try again", None, 1)


def _welcome(replica: Replica, sidecar: str, issued: Issued) -> Json:
    return {
        "sidecar": sidecar,
        "spiffe_id": str(issued.identity),
        "certificate": issued.chain_pem,
        "bundle": bundle_pem(replica),
        "trust_domain": issued.identity.trust_domain,
        "not_after": issued.not_after,
        "mesh": replica.replicas(),
        "join": replica.join_addresses(),
    }


def _from(name: str) -> str:
    return f"from {name[:HOST_NAME_LENGTH_MAX]}" if name else ""


def _span(length: timedelta) -> str:
    seconds = int(length.total_seconds())
    for unit, word in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds // unit} {word}"
    return f"{seconds} seconds"
