"""Who is it that asks the operator API? By a token, or by a certificate that stands for one.

Must not know what is asked. Invariants: rights are those of a token that stands now, in the store, also where a
certificate is shown: revoking the token ends both; a failure tells nothing to somebody who has not the secret, and is
counted.
"""

from dataclasses import dataclass

from certs.tokens import OPERATOR
from control_plane.state.access import Who
from control_plane.state.records import BANS, TOKENS, Token
from control_plane.state.tokens import TokenRefused, judge

from .http import ApiError, Peer, Scope, header, peer_of
from .joins import read_token, refused
from .replica import Replica

AUTHORIZATION_LENGTH_MAX = 8192

_LOGIN = "pillion login --token-file FILE; an admin makes the token: pillion token create --operator NAME --role ROLE"


@dataclass(frozen=True, slots=True)
class Proven:
    """Somebody who has proven who they are; `expires`: until when what proves it is good."""

    who: Who
    expires: float


def authenticate(replica: Replica, scope: Scope) -> Proven:
    """Raises ApiError (401, or 403 where it is clear who asks)."""
    given = header(scope, b"authorization")
    peer = peer_of(scope)
    if len(given) > 1:
        raise ApiError(401, "unauthenticated", "more than one Authorization field", _LOGIN)
    if given:
        return _by_token(replica, given[0])
    if peer is not None:
        return _by_certificate(replica, peer)
    raise ApiError(401, "unauthenticated", "this needs an operator's token or certificate", _LOGIN)


def _by_token(replica: Replica, value: bytes) -> Proven:
    scheme, _, text = value[:AUTHORIZATION_LENGTH_MAX].decode("latin-1").partition(" ")
    if scheme.lower() != "bearer" or not text.strip():
        raise ApiError(401, "unauthenticated", "the Authorization field is not of the form: Bearer TOKEN", _LOGIN)
    token = read_token(replica, text)
    try:
        record = judge(token, replica.state.get(TOKENS, token.id), OPERATOR, replica.now())
    except TokenRefused as error:
        raise refused(error) from None
    return Proven(_who(token.id, record), record.expires)


def _by_certificate(replica: Replica, peer: Peer) -> Proven:
    operator = peer.operator
    if operator is None:
        raise ApiError(403, "not_an_operator", f"{peer.identity} is no operator's certificate", _LOGIN)
    for held in replica.state.table(BANS).values():
        ban = held.record
        if ban.value == {"identity": str(peer.identity), "certificate": peer.fingerprint}.get(ban.kind):
            raise ApiError(403, "banned", f"{peer.identity} is banned", "an admin lifts it: pillion cert unban")
    name, id = operator
    record: Token | None = replica.state.get(TOKENS, id)
    if record is None or record.kind != OPERATOR or record.operator != name:
        raise ApiError(401, "token_unknown", f"the token {id} that this certificate stands for was revoked", _LOGIN)
    if replica.now() >= record.expires:
        raise ApiError(401, "token_expired", f"the token {id} that this certificate stands for has expired", _LOGIN)
    return Proven(_who(id, record), record.expires)


def _who(id: str, record: Token) -> Who:
    return Who(record.operator, record.role, record.teams, id)
