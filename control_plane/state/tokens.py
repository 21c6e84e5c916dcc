"""Is a token good, and what is written when one is made or used?

Pure: the secret and the time are arguments. Must not know HTTP or who may make a token (access.py). Invariants: the
store never holds a secret, only its digest; digests are compared in constant time, and nothing is told of a token to
somebody who has not its secret; a use is taken by compare-and-set, so that a token is never used more often than it
says, whichever replicas are asked.
"""

import hashlib
import hmac
from collections.abc import Collection
from dataclasses import replace

from certs.tokens import JOIN, OPERATOR
from certs.tokens import Token as TokenText
from control_plane.store.base import Compare, Operation, Put

from .mirror import Held
from .records import TOKENS, Token, encode

TTL_S_MIN, TTL_S_MAX = 1.0, 10 * 366 * 86400.0
USES_MAX = 1_000_000
ROLES = ("viewer", "operator", "admin")

_NEW = {
    JOIN: "make a new one: pillion token create --service NAME",
    OPERATOR: "an admin makes a new one: pillion token create --operator NAME --role ROLE",
}


class TokenRefused(Exception):
    """Not with this token; says why and what to do. `code` is for programs. `proven`: its holder had the secret."""

    def __init__(self, code: str, message: str, help: str, proven: bool = False) -> None:
        super().__init__(message)
        self.code, self.message, self.help, self.proven = code, message, help, proven


def digest(secret: str) -> str:
    """A secret holds 256 random bits, so that a plain hash of it gives nothing away."""
    return hashlib.sha256(secret.encode()).hexdigest()


def check_home(token: TokenText, trust_domain: str, roots: Collection[str]) -> None:
    """It was made by this mesh. Raises TokenRefused."""
    if token.trust_domain != trust_domain:
        raise TokenRefused(
            "token_foreign",
            f"the token is of the mesh {token.trust_domain}; this is {trust_domain}",
            "use a token of this mesh, or ask the control plane that made it",
        )
    if token.fingerprint not in roots:
        raise TokenRefused(
            "token_foreign",
            f"the token knows the mesh {trust_domain} by the root {token.fingerprint[:16]}…, which it does not have",
            _NEW[token.kind],
        )


def judge(token: TokenText, record: Token | None, kind: str, now: float, *, again: bool = False) -> Token:
    """The record of a token that is good for this kind of use. `again`: what it is used for has been granted to the
    same holder before, so that it may be used up by now. Raises TokenRefused."""
    expected = record.secret_sha256 if record is not None else digest("")
    proven = hmac.compare_digest(digest(token.secret).encode(), expected.encode())
    if record is None:
        raise TokenRefused(
            "token_unknown",
            f"there is no token {token.id[:40]}: it was revoked, or expired long ago",
            _NEW[token.kind],
        )
    if not proven or record.kind != token.kind:
        raise TokenRefused("token_forged", f"this is not the secret of the token {token.id[:40]}", _NEW[token.kind])
    if record.kind != kind:
        raise TokenRefused(
            "token_wrong_kind",
            f"the token {token.id} lets {'a sidecar join' if record.kind == JOIN else 'an operator ask'}; not for this",
            _NEW[kind],
            proven=True,
        )
    if now >= record.expires:
        raise TokenRefused(
            "token_expired", f"the token {token.id} expired {_span(now - record.expires)} ago", _NEW[kind], proven=True
        )
    if record.uses is not None and record.uses <= 0 and not again:
        raise TokenRefused("token_used_up", f"the token {token.id} has been used up", _NEW[kind], proven=True)
    return record


def check_service(id: str, record: Token, service: str) -> None:
    """It is for this service. Raises TokenRefused."""
    if record.service != service:
        raise TokenRefused(
            "token_wrong_service",
            f'the token {id} is for the service "{record.service}", not for "{service}"',
            f"pillion token create --service {service}, or join as {record.service}",
            proven=True,
        )


def use(id: str, held: Held[Token]) -> tuple[list[Operation], list[Compare]]:
    """One use of it, to be committed together with what it is used for. It holds too that it was not revoked."""
    record = held.record
    compares = [Compare(TOKENS + id, held.revision)]
    if record.uses is None:
        return [], compares
    assert record.uses > 0
    return [Put(TOKENS + id, encode(replace(record, uses=record.uses - 1)))], compares


def keep(id: str, held: Held[Token]) -> list[Compare]:
    """It is neither changed nor revoked meanwhile."""
    return [Compare(TOKENS + id, held.revision)]


def join_token(secret: str, service: str, uses: int | None, *, by: str, now: float, ttl_s: float) -> Token:
    return Token(JOIN, digest(secret), now, by, now + ttl_s, service=service, uses=uses)


def operator_token(
    secret: str, operator: str, role: str, teams: Collection[str], *, by: str, now: float, ttl_s: float
) -> Token:
    return Token(
        OPERATOR, digest(secret), now, by, now + ttl_s, operator=operator, role=role, teams=tuple(sorted(set(teams)))
    )


def mint(id: str, record: Token) -> tuple[list[Operation], list[Compare]]:
    return [Put(TOKENS + id, encode(record))], [Compare(TOKENS + id, 0)]


def _span(seconds: float) -> str:
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{int(seconds // unit)} {name}"
    return f"{int(seconds)} seconds"
