"""The operator API, declared: every operation with what it takes, what it gives and who may ask.

The declarations decode the requests and make the OpenAPI document, so the one cannot say anything else than the other
does. Pure; must not know how an operation is carried out. Invariant: what is asked by GET changes nothing.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from certs.spiffe import check_service_name
from control_plane.state.access import ADMIN, OPERATOR, VIEWER
from control_plane.state.cookies import KEEP_S, KEEP_S_MAX
from control_plane.state.tokens import ROLES, TTL_S_MAX, TTL_S_MIN, USES_MAX

from .answers import (
    APPLIED,
    AUDIT_ANSWER,
    CERTS_ANSWER,
    CHANGE,
    CHECK_ANSWER,
    DOCUMENT,
    EDGE,
    EMPTY,
    ENDPOINT,
    REPLICAS_ANSWER,
    REVISION,
    SERVICE_ANSWER,
    SERVICES_ANSWER,
    SIDECARS_ANSWER,
    STATUS_ANSWER,
    TEXT,
    TEXTS,
    TIME,
    TOKENS_ANSWER,
    WELCOME,
)
from .shapes import Anything, Choice, Flag, Listing, Maybe, Number, Record, Shape, Table, Text, Whole

BODY_BYTES_MAX = 64 * 1024
POLICY_BYTES_MAX = 8 * 1024 * 1024
FILES_MAX = 5000
WAIT_S_MAX = 60.0
AUDITS_MAX = 10_000
CSR_LENGTH_MAX = 32 * 1024
ANYBODY = "anybody"

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"
_SERVICE = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"

# What comes in

NAME = Text(63, 1, _NAME, about="letters, digits, '.', '-' and '_', beginning with a letter or a digit")
SERVICE = Text(
    63, 1, _SERVICE, check=check_service_name, about="a-z, 0-9 and '-', beginning and ending with a letter or a digit"
)
CSR = Text(CSR_LENGTH_MAX, 1, about="a certificate signing request (PEM)")
MESSAGE = Text(1000, about="why, for the history")
FILE = Text(255, 1, r"[^\x00-\x1f\x7f]+", about="a file name without control characters")
TTL = Number(TTL_S_MIN, TTL_S_MAX, about="seconds")


@dataclass(frozen=True, slots=True)
class Operation:
    """`access`: the least role, or `anybody`; further rights depend on what is touched. `query`: parameters with what
    holds where they are left out. `codes`: errors beyond those that any operation may answer."""

    name: str
    method: str
    path: str
    summary: str
    access: str
    answer: Shape
    body: Shape | None = None
    bytes_max: int = BODY_BYTES_MAX
    query: Mapping[str, tuple[Shape, Any]] = field(default_factory=dict)
    codes: tuple[int, ...] = ()

    @property
    def parameters(self) -> dict[str, Shape]:
        return {name: PARAMETERS[name] for name in re.findall(r"{(\w+)}", self.path)}


PARAMETERS: Mapping[str, Shape] = {
    "id": Text(128, 1, r"[A-Za-z0-9_-]+", about="an id, as a list shows it"),
    "name": SERVICE,
    "number": Whole(0, 2**31 - 1),
}

_CHANGING = (409,)

OPERATIONS: tuple[Operation, ...] = (
    Operation("health", "GET", "/healthz", "Whether this control plane serves.", ANYBODY, Record({"ok": Flag()})),
    Operation("openapi", "GET", "/v1/openapi.json", "This document.", ANYBODY, Anything()),
    Operation(
        "ca",
        "GET",
        "/v1/ca",
        "The roots of the mesh. Public; prove them by the fingerprint in a token before you trust them.",
        ANYBODY,
        Record({"trust_domain": TEXT, "bundle": TEXT}),
    ),
    Operation(
        "join",
        "POST",
        "/v1/join",
        "Become a sidecar: a certificate for the service of the token.",
        ANYBODY,
        WELCOME,
        Record({"token": Text(4096, 1), "csr": CSR, "service": SERVICE}, {"name": (Text(253), "")}),
        codes=(401, 403),
    ),
    Operation(
        "rejoin",
        "POST",
        "/v1/rejoin",
        "Renew a certificate that has ended, with a request signed by its own key.",
        ANYBODY,
        WELCOME,
        Record({"certificate": Text(CSR_LENGTH_MAX, 1, about="PEM"), "csr": CSR}),
        codes=(401, 403),
    ),
    Operation(
        "login",
        "POST",
        "/v1/login",
        "A certificate that stands for the operator token, for as long as that stands.",
        VIEWER,
        Record({"spiffe_id": TEXT, "certificate": TEXT, "bundle": TEXT, "trust_domain": TEXT, "not_after": TIME}),
        Record({"csr": CSR}),
    ),
    Operation(
        "whoami",
        "GET",
        "/v1/whoami",
        "Who asks, and what they may do.",
        VIEWER,
        Record({"name": TEXT, "role": TEXT, "teams": TEXTS, "token": TEXT, "expires": TIME}),
    ),
    Operation(
        "tokens",
        "GET",
        "/v1/tokens",
        "The tokens, without their secrets.",
        VIEWER,
        TOKENS_ANSWER,
    ),
    Operation(
        "create_token",
        "POST",
        "/v1/tokens",
        "Make a token. Its text is given this once.",
        OPERATOR,
        Record({"id": TEXT, "token": TEXT, "expires": TIME}),
        Choice(
            "kind",
            {
                "join": Record({"service": SERVICE, "ttl_s": TTL}, {"uses": (Maybe(Whole(1, USES_MAX)), 1)}),
                "operator": Record(
                    {"operator": NAME, "role": Text(choices=ROLES), "ttl_s": TTL}, {"teams": (Listing(NAME, 64), [])}
                ),
            },
        ),
        codes=_CHANGING,
    ),
    Operation("delete_token", "DELETE", "/v1/tokens/{id}", "Revoke a token.", VIEWER, EMPTY, codes=(404, *_CHANGING)),
    Operation(
        "services",
        "GET",
        "/v1/services",
        "Services, and how many of their endpoints are healthy.",
        VIEWER,
        SERVICES_ANSWER,
    ),
    Operation(
        "service",
        "GET",
        "/v1/services/{name}",
        "Everything about one service.",
        VIEWER,
        SERVICE_ANSWER,
        codes=(404,),
    ),
    Operation(
        "endpoints",
        "GET",
        "/v1/endpoints",
        "Endpoints, of all services or of one.",
        VIEWER,
        Record({"revision": REVISION, "endpoints": Listing(ENDPOINT)}),
        query={"service": (SERVICE, None)},
        codes=(404,),
    ),
    Operation(
        "sidecars",
        "GET",
        "/v1/sidecars",
        "Sidecars that have joined: whether they are connected, and what they hold.",
        VIEWER,
        SIDECARS_ANSWER,
    ),
    Operation(
        "edges",
        "GET",
        "/v1/edges",
        "Who calls whom, as the callers' sidecars have counted it.",
        VIEWER,
        Record({"edges": Listing(EDGE)}),
        query={"service": (SERVICE, None)},
    ),
    Operation(
        "certs",
        "GET",
        "/v1/certs",
        "The newest certificate of each sidecar, and those of the authorities.",
        VIEWER,
        CERTS_ANSWER,
    ),
    Operation(
        "bans",
        "GET",
        "/v1/bans",
        "Who is banned.",
        VIEWER,
        Record(
            {"bans": Listing(Record({"id": TEXT, "kind": TEXT, "value": TEXT, "by": TEXT, "at": TIME, "reason": TEXT}))}
        ),
    ),
    Operation(
        "ban",
        "POST",
        "/v1/bans",
        "Shut somebody out of the mesh: an identity, a certificate, or a sidecar whatever certificate it has.",
        ADMIN,
        Record({"id": TEXT}),
        Record(
            {"kind": Text(choices=("identity", "certificate", "sidecar")), "value": Text(2048, 1)},
            {"reason": (Text(500), "")},
        ),
        codes=(404, *_CHANGING),
    ),
    Operation("unban", "DELETE", "/v1/bans/{id}", "Lift a ban.", ADMIN, EMPTY, codes=(404, *_CHANGING)),
    Operation(
        "rotate_cookies",
        "POST",
        "/v1/cookies/rotate",
        "Make sticky cookies with other keys from now on. Those made before are honoured for `keep_s` more.",
        ADMIN,
        Record({"honoured_until": TIME}),
        Record({}, {"keep_s": (Number(0.0, KEEP_S_MAX, about="seconds"), KEEP_S)}),
        codes=_CHANGING,
    ),
    Operation(
        "audit",
        "GET",
        "/v1/audit",
        "Who changed what, the newest last.",
        VIEWER,
        AUDIT_ANSWER,
        query={"limit": (Whole(1, AUDITS_MAX), 100)},
    ),
    Operation(
        "replicas",
        "GET",
        "/v1/replicas",
        "Control planes that run.",
        VIEWER,
        REPLICAS_ANSWER,
    ),
    Operation(
        "policy",
        "GET",
        "/v1/policy",
        "The documents that are applied.",
        VIEWER,
        Record({"revision": REVISION, "documents": Listing(DOCUMENT)}),
    ),
    Operation(
        "snapshot",
        "GET",
        "/v1/policy/snapshot",
        "The effective policy of every service, with provenance, as `pillion policy show -o json` has it.",
        VIEWER,
        Anything("a canonical snapshot"),
    ),
    Operation(
        "apply",
        "POST",
        "/v1/policy/apply",
        "Make policy files the mesh's policy: all of it, or nothing. A dry run needs a viewer only.",
        VIEWER,
        APPLIED,
        Record(
            {"files": Table(FILE, Text(POLICY_BYTES_MAX), FILES_MAX)},
            {
                "base": (Maybe(REVISION), None),
                "prune": (Flag("remove what the files do not name"), False),
                "dry_run": (Flag(), False),
                "message": (MESSAGE, ""),
            },
        ),
        bytes_max=POLICY_BYTES_MAX,
        codes=(409, 422),
    ),
    Operation(
        "rollback",
        "POST",
        "/v1/policy/rollback",
        "Go back to the policy as it was after a change (0: before the first).",
        OPERATOR,
        APPLIED,
        Record({"to": Whole(0, 2**31 - 1)}, {"message": (MESSAGE, ""), "dry_run": (Flag(), False)}),
        codes=(404, 409, 422),
    ),
    Operation(
        "changes",
        "GET",
        "/v1/policy/changes",
        "The changes that were applied, the newest last.",
        VIEWER,
        Record({"changes": Listing(Record({**CHANGE, "documents": TEXTS}))}),
    ),
    Operation(
        "change",
        "GET",
        "/v1/policy/changes/{number}",
        "One change: what stood before and after it, by document.",
        VIEWER,
        Record({**CHANGE, "before": Table(TEXT, Maybe(DOCUMENT)), "after": Table(TEXT, Maybe(DOCUMENT))}),
        codes=(404,),
    ),
    Operation(
        "status",
        "GET",
        "/v1/policy/status",
        "What the connected sidecars say of the policy at a revision; answers when all have, or after `wait_s`.",
        VIEWER,
        STATUS_ANSWER,
        query={"revision": (REVISION, None), "wait_s": (Number(0.0, WAIT_S_MAX), 0.0)},
    ),
    Operation(
        "check",
        "GET",
        "/v1/check",
        "What is wrong, with cause and remedy.",
        VIEWER,
        CHECK_ANSWER,
    ),
)
