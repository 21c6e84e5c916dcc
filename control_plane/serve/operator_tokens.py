"""Tokens, bans, the keys of cookies, and what is given for a token: certificates of sidecars and operators.

Handlers of the operator API. Invariants: a secret leaves in the answer that makes it, and never again, nor in a log;
every change is on record.
"""

import hashlib
from typing import Any

from certs.spiffe import SpiffeError, SpiffeId
from certs.tokens import JOIN
from control_plane.state.access import ADMIN, Owners, Who, lacks_role, may_join_as, may_revoke
from control_plane.state.mirror import Held
from control_plane.state.records import BANS, SIDECARS, TOKENS, Ban, Token, encode
from control_plane.store.base import Compare, Conflict, Delete, Put

from .calling import Call
from .http import CONTROL_PLANE, ApiError
from .joins import join, login, rejoin
from .minting import make
from .replica import Replica

Json = Any

BANS_MAX = 10_000
FINGERPRINT_DIGITS = 64


async def join_mesh(call: Call) -> Json:
    body = call.body
    return await join(call.replica, call.shared.join_turn, body["token"], body["csr"], body["service"], body["name"])


async def rejoin_mesh(call: Call) -> Json:
    return await rejoin(call.replica, call.body["certificate"], call.body["csr"])


async def log_in(call: Call) -> Json:
    answer = login(call.replica, call.body["csr"], call.who.name, call.who.token, call.expires)
    await call.replica.audit(call.who.name, "login", f"certificate {answer['spiffe_id']}")
    return answer


async def whoami(call: Call) -> Json:
    who = call.who
    return {
        "name": who.name,
        "role": who.role,
        "teams": list(who.teams),
        "token": who.token,
        "expires": call.expires,
    }


# Tokens


async def tokens(call: Call) -> Json:
    now = call.replica.now()
    table = call.replica.state.table(TOKENS)
    return {"tokens": [_token(name, held.record, now) for name, held in sorted(table.items(), key=_by_age)]}


def _by_age(item: tuple[str, Held[Token]]) -> tuple[float, str]:
    return item[1].record.created, item[0]


def _token(name: str, record: Token, now: float) -> Json:
    return {
        "id": name,
        "kind": record.kind,
        "service": record.service,
        "uses": record.uses,
        "operator": record.operator,
        "role": record.role,
        "teams": list(record.teams),
        "by": record.by,
        "created": record.created,
        "expires": record.expires,
        "expired": now >= record.expires,
    }


async def create_token(call: Call) -> Json:
    body, who, replica = call.body, call.who, call.replica
    if body["kind"] == JOIN:
        if body["service"] == CONTROL_PLANE:
            raise ApiError(400, "reserved", f"{CONTROL_PLANE} is the control plane itself; nobody else may be it")
        refusal = may_join_as(who, body["service"], owners_of(replica, body["service"]))
    else:
        refusal = lacks_role(who, ADMIN, "making an operator's token")
    if refusal is not None:
        raise ApiError(403, "not_allowed", refusal)
    return await make(
        replica,
        body["kind"],
        by=who.name,
        ttl_s=body["ttl_s"],
        service=body.get("service", ""),
        uses=body.get("uses"),
        operator=body.get("operator", ""),
        role=body.get("role", ""),
        teams=body.get("teams", ()),
    )


async def delete_token(call: Call) -> Json:
    replica, id, who = call.replica, call.path["id"], call.who
    held: Held[Token] | None = replica.state.table(TOKENS).get(id)
    if held is None:
        raise ApiError(404, "not_found", f"there is no token {id}", "pillion token ls shows them")
    record = held.record
    refusal = may_revoke(who, record.kind, record.service, lambda name: owners_of(replica, name), own=id == who.token)
    if refusal is not None:
        raise ApiError(403, "not_allowed", refusal)
    # A use that is taken meanwhile must not save it.
    await replica.commit([Delete(TOKENS + id)])
    what = f"to join as {record.service}" if record.kind == JOIN else f"for {record.operator} ({record.role})"
    await replica.audit(who.name, "revoke token", f"token {id}", what)
    return {}


def owners_of(replica: Replica, service: str) -> Owners:
    found = replica.catalogue.snapshot.services.get(service)
    return found.owners if found is not None else ()


# Bans


async def bans(call: Call) -> Json:
    table = call.replica.state.table(BANS)
    return {
        "bans": [
            {
                "id": name,
                "kind": held.record.kind,
                "value": held.record.value,
                "by": held.record.by,
                "at": held.record.at,
                "reason": held.record.reason,
            }
            for name, held in sorted(table.items(), key=lambda item: (item[1].record.at, item[0]))
        ]
    }


async def ban(call: Call) -> Json:
    replica, who, kind, value = call.replica, call.who, call.body["kind"], call.body["value"]
    _check_ban(replica, who, kind, value)
    id = hashlib.sha256(f"{kind}:{value}".encode()).hexdigest()[:16]
    table = replica.state.table(BANS)
    if id in table:
        return {"id": id}
    if len(table) >= BANS_MAX:
        raise ApiError(409, "too_many", f"{BANS_MAX} are banned already", "lift bans that are of no more use")
    try:
        await replica.commit(
            [Put(BANS + id, encode(Ban(kind, value, who.name, replica.now(), call.body["reason"])))],
            [Compare(BANS + id, 0)],
        )
    except Conflict:  # somebody else has banned the same just now
        return {"id": id}
    await replica.audit(who.name, "ban", f"{kind} {value}", call.body["reason"])
    return {"id": id}


def _check_ban(replica: Replica, who: Who, kind: str, value: str) -> None:
    meta = replica.state.meta
    assert meta is not None
    if kind == "identity":
        try:
            identity = SpiffeId.parse(value)
        except SpiffeError as error:
            raise ApiError(400, "invalid", f"value: {error}") from None
        if identity.trust_domain != meta.trust_domain:
            raise ApiError(
                400,
                "invalid",
                f"{identity} is not of this mesh, {meta.trust_domain}: nobody here would accept it anyway",
            )
        if identity.service == CONTROL_PLANE:
            raise ApiError(409, "own_identity", "a mesh without its control plane could not lift the ban again")
    elif kind == "certificate":
        if len(value) != FINGERPRINT_DIGITS or not set(value) <= set("0123456789abcdef"):
            raise ApiError(400, "invalid", "value: a certificate is named by its SHA-256, 64 digits of lower-case hex")
    elif replica.state.get(SIDECARS, value) is None:
        raise ApiError(404, "not_found", f"there is no sidecar {value[:80]!a}", "pillion get sidecars shows them")


async def unban(call: Call) -> Json:
    replica, id = call.replica, call.path["id"]
    held: Held[Ban] | None = replica.state.table(BANS).get(id)
    if held is None:
        raise ApiError(404, "not_found", f"there is no ban {id}", "pillion cert bans shows them")
    await replica.commit([Delete(BANS + id)])
    await replica.audit(call.who.name, "unban", f"{held.record.kind} {held.record.value}")
    return {}


# Cookies


async def rotate_cookies(call: Call) -> Json:
    replica, keep_s = call.replica, float(call.body["keep_s"])
    made = await replica.cookies.rotate(keep_s)
    until = made.changed + keep_s
    await replica.audit(call.who.name, "rotate cookies", "cookies", f"former ones are honoured for {keep_s:g} s")
    return {"honoured_until": until}
