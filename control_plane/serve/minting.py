"""New tokens. Must not know who may have one made. Invariant: the secret leaves in the text that is returned, and is
nowhere else."""

import secrets
from collections.abc import Collection
from typing import Any

from certs.tokens import JOIN, OPERATOR, TokenError, make_token
from control_plane.state.access import ADMIN
from control_plane.state.records import TOKENS
from control_plane.state.tokens import join_token, mint, operator_token

from .http import ApiError
from .replica import Replica

Json = Any

TOKENS_MAX = 10_000
SECRET_BYTES = 32
FIRST_ADMIN = "admin"
FIRST_ADMIN_TTL_S = 365 * 86400.0


async def first_admin_token(replica: Replica) -> str:
    """For a control plane's first start. Raises ApiError, StoreError."""
    made = await make(
        replica,
        OPERATOR,
        by=f"control plane {replica.settings.name}",
        ttl_s=FIRST_ADMIN_TTL_S,
        operator=FIRST_ADMIN,
        role=ADMIN,
    )
    text: str = made["token"]
    return text


async def make(
    replica: Replica,
    kind: str,
    *,
    by: str,
    ttl_s: float,
    service: str = "",
    uses: int | None = None,
    operator: str = "",
    role: str = "",
    teams: Collection[str] = (),
) -> Json:
    """A new token, on record: its id, its text, its end. Raises ApiError, StoreError."""
    state = replica.state
    if len(state.table(TOKENS)) >= TOKENS_MAX:
        raise ApiError(
            409,
            "too_many",
            f"there are {TOKENS_MAX} tokens already",
            "revoke some: pillion token ls, pillion token revoke",
        )
    now, secret = replica.now(), secrets.token_urlsafe(SECRET_BYTES)
    id = secrets.token_hex(6)
    if kind == JOIN:
        record = join_token(secret, service, uses, by=by, now=now, ttl_s=ttl_s)
    else:
        record = operator_token(secret, operator, role, teams, by=by, now=now, ttl_s=ttl_s)
    meta = state.meta
    assert meta is not None
    try:
        text = make_token(
            kind, id, secret, replica.join_addresses(), replica.authority.bundle.roots[0].fingerprint, meta.trust_domain
        )
    except TokenError as error:  # an address that we cannot tell
        raise ApiError(
            503, "not_configured", f"this control plane cannot make tokens: {error}", "see --advertise"
        ) from None
    operations, compares = mint(id, record)
    await replica.commit(operations, compares)
    what = f"to join as {service}" if kind == JOIN else f"for {operator} ({role})"
    await replica.audit(by, "create token", f"token {id}", what)
    return {"id": id, "token": text, "expires": record.expires}
