"""The records that a control plane keeps, and the keys under which they stand.

Each record is a frozen dataclass, written as JSON with a format number. Must not know the store beyond keys and bytes.
Invariants: what `encode` writes `decode` reads; what somebody else wrote there (foreign, damaged, of a newer version)
gives RecordError with the reason, and never anything else.
Times are seconds since the epoch (UTC), as the writing replica's clock has them.
"""

import base64
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from sidecar.model.canonical import SnapshotError, record_from_json, value_to_json

FORMAT = 1
PLAIN_BYTES_MAX = 64 * 1024
BYTES_MAX = 32 * 1024 * 1024  # of one record, decompressed
_DEFLATED = "deflated"
COOKIE_SECRETS_MAX = 4
_HEX = frozenset("0123456789abcdef")


class RecordError(ValueError):
    """What is kept there is no record of ours; says why."""


@dataclass(frozen=True, slots=True)
class Meta:
    """One for the mesh. `mesh` is a random id: two stores with the same one hold the same mesh."""

    mesh: str
    trust_domain: str
    created: float


@dataclass(frozen=True, slots=True)
class Root:
    """A root certificate of the trust domain (PEM), under its SHA-256 fingerprint."""

    pem: str
    added: float


@dataclass(frozen=True, slots=True)
class Issuer:
    """An issuing authority of a replica: its certificate chain (PEM), never its key."""

    pem: str
    replica: str
    added: float


@dataclass(frozen=True, slots=True)
class Ban:
    """Nobody with this identity is served any more. `kind`: `identity` (a SPIFFE ID) or `certificate` (the SHA-256
    fingerprint of a leaf) or `sidecar` (a sidecar's id: whatever certificate it has)."""

    kind: str
    value: str
    by: str
    at: float
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Token:
    """`secret_sha256`: hex; the secret itself is nowhere. `kind`: `join` (for `service`) or `operator` (with `role`
    and `teams`, for the operator `operator`). `uses` None: any number."""

    kind: str
    secret_sha256: str
    created: float
    by: str
    expires: float
    service: str = ""
    uses: int | None = None
    operator: str = ""
    role: str = ""  # viewer | operator | admin
    teams: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sidecar:
    """One sidecar that has joined. `fingerprints`: SHA-256 of its leaves, the newest first (two at most: the one
    before is good until the new one is in use). `not_after`: of the newest."""

    service: str
    fingerprints: tuple[str, ...]
    not_after: float
    joined: float
    renewed: float
    token: str = ""
    name: str = ""  # the host's own name, for people


@dataclass(frozen=True, slots=True)
class Alive:
    """Lives by the lease of its sidecar; gone when that has not sent a heartbeat for one TTL."""

    replica: str
    since: float


@dataclass(frozen=True, slots=True)
class Instance:
    """One registration: an application with a sidecar before it. `state`: `up`, `gone` (its lease ended at `changed`;
    told to nobody, kept for one TTL in case many went at once) or `suspect` (kept although its lease ended: too many
    went at once; until about `until`). `host` and `port`: where its sidecar takes mutual TLS."""

    host: str
    port: int
    labels: Mapping[str, str] = field(default_factory=dict)
    ports: Mapping[str, int] = field(default_factory=dict)  # the application's own, by name
    weight: int = 1
    zone: str = ""
    healthy: bool = True
    reason: str = ""  # why it is not healthy
    state: str = "up"
    changed: float = 0.0
    until: float = 0.0
    priority: int = 0  # 0 serves first


@dataclass(frozen=True, slots=True)
class Live:
    """A sidecar that is connected, and to which replica; lives by its lease. `rejected`: resources that it refused, and
    why."""

    replica: str
    rejected: Mapping[str, str] = field(default_factory=dict)
    version: str = ""


@dataclass(frozen=True, slots=True)
class Status:
    """How far the sidecars of one replica are: all have answered for the policy of this revision of the store, but for
    those `behind`. Lives by the replica's lease."""

    policy: int
    behind: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Document:
    """One applied piece of policy: a service, or `defaults`, or `enforced`. `text` is that piece as it stood in `file`,
    beginning at `line`; with `whole` it is the whole file (of a style that cannot be cut)."""

    file: str
    line: int
    text: str
    author: str
    applied: float
    change: int  # the number of the change that brought it
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Change:
    """One `apply` or `rollback`: what stood before and after, by document (None: nothing). It is what makes a change
    happen: documents that do not fit into its transaction are written under their own keys later."""

    author: str
    at: float
    message: str = ""
    before: Mapping[str, Document | None] = field(default_factory=dict)
    after: Mapping[str, Document | None] = field(default_factory=dict)
    source: str = "apply"  # apply | rollback | folder


@dataclass(frozen=True, slots=True)
class Settled:
    """Up to and including this change the documents under their own keys are as the changes say; what later ones say
    goes before what stands there."""

    change: int


@dataclass(frozen=True, slots=True)
class ReplicaRecord:
    """A running control plane; lives by a lease. `mesh` and `join`: the addresses of its two listeners."""

    mesh: str
    join: str
    issuer: str  # fingerprint
    version: str
    started: float
    folder: str = ""  # the watched policy folder, where there is one


@dataclass(frozen=True, slots=True)
class Observed:
    """What the sidecars of one replica report, for people; lives by the replica's lease. `edges`: caller, callee,
    requests and failures a second; `breakers`: those that are not closed, and outliers: caller, callee, endpoint,
    state; `evidence`: caller, callee, endpoint, what happened to it last."""

    edges: tuple[tuple[str, str, float, float], ...] = ()
    breakers: tuple[tuple[str, str, str, str], ...] = ()
    evidence: tuple[tuple[str, str, str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class LimitShares:
    """How the instances of a service divide its global rate limits; by the replica that divides. `shares`: by sidecar,
    parts of 1; `demands`: what each was asked when it was divided, where it was known."""

    shares: Mapping[str, float] = field(default_factory=dict)
    demands: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LimitDemands:
    """What the sidecars of one replica are asked of global rate limits, for the replica that divides; lives by the
    replica's lease. By sidecar, as a part of the whole limit."""

    demands: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CookieSecret:
    """`secret`: 32 random bytes, in hex. `until`: it is honoured no longer; 0: it is in use."""

    secret: str = field(repr=False)
    until: float = 0.0

    def __post_init__(self) -> None:
        if len(self.secret) != 64 or not _HEX.issuperset(self.secret):
            raise SnapshotError("a secret in it is not 64 digits of lower-case hex")


@dataclass(frozen=True, slots=True)
class CookieSecrets:
    """One for the mesh: that from which the keys of sticky cookies follow; the one in use first, then those that are
    still honoured."""

    secrets: tuple[CookieSecret, ...]
    changed: float

    def __post_init__(self) -> None:
        if not 1 <= len(self.secrets) <= COOKIE_SECRETS_MAX:
            raise SnapshotError(f"it must hold 1 to {COOKIE_SECRETS_MAX} secrets")


@dataclass(frozen=True, slots=True)
class Audit:
    """One change that somebody made."""

    at: float
    who: str
    action: str
    subject: str
    outcome: str = "done"
    message: str = ""


META, COOKIES = "meta", "cookies"
DEFAULTS, ENFORCED, SETTLED = "policy/defaults", "policy/enforced", "policy/settled"
ROOTS, ISSUERS, BANS = "ca/roots/", "ca/issuers/", "ca/bans/"
TOKENS, SIDECARS, ALIVE, LIVE = "tokens/", "sidecars/", "alive/", "live/"
INSTANCES = "instances/"  # then service/sidecar
SERVICES, CHANGES = "policy/services/", "policy/changes/"  # changes: ten digits, so that they sort
REPLICAS, STATUS, OBSERVED, AUDIT = "replicas/", "status/", "observed/", "audit/"
SHARES, DEMANDS = "shares/", "demands/"  # of rate limits: by service, by replica

KINDS: Mapping[str, type[Any]] = {
    META: Meta,
    COOKIES: CookieSecrets,
    ROOTS: Root,
    ISSUERS: Issuer,
    BANS: Ban,
    TOKENS: Token,
    SIDECARS: Sidecar,
    ALIVE: Alive,
    LIVE: Live,
    INSTANCES: Instance,
    DEFAULTS: Document,
    ENFORCED: Document,
    SERVICES: Document,
    CHANGES: Change,
    SETTLED: Settled,
    REPLICAS: ReplicaRecord,
    STATUS: Status,
    OBSERVED: Observed,
    AUDIT: Audit,
    SHARES: LimitShares,
    DEMANDS: LimitDemands,
}
"""The record that stands under each key; one that ends in a slash is a prefix."""

R = TypeVar("R")


def kind_of(key: str) -> str | None:
    """The kind whose records stand under this key; None for a key that is not ours."""
    if key in KINDS:
        return key if not key.endswith("/") else None
    for prefix in KINDS:
        if prefix.endswith("/") and key.startswith(prefix) and len(key) > len(prefix):
            name = key[len(prefix) :]
            parts = name.split("/")
            return prefix if all(parts) and len(parts) == (2 if prefix == INSTANCES else 1) else None
    return None


def change_key(number: int) -> str:
    return f"{CHANGES}{number:010d}"


def encode(record: object) -> bytes:
    """A large one is compressed: a change of a thousand services must fit into one value."""
    data = {"format": FORMAT, **value_to_json(record)}
    value = _json(data)
    if len(value) <= PLAIN_BYTES_MAX:
        return value
    packed = base64.b64encode(zlib.compress(value, 6)).decode()
    return _json({"format": FORMAT, _DEFLATED: packed})


def _json(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode()


def _inflate(packed: object) -> Any:
    try:
        stream = zlib.decompressobj()
        value = stream.decompress(base64.b64decode(str(packed), validate=True), BYTES_MAX)
        if not stream.eof:
            raise ValueError
        return json.loads(value)
    except (ValueError, RecursionError, zlib.error):
        raise RecordError("compressed badly") from None


def decode(kind: type[R], value: bytes) -> R:
    """Raises RecordError."""
    try:
        data = json.loads(value)
    except (ValueError, RecursionError):
        raise RecordError("not JSON") from None
    if not isinstance(data, dict):
        raise RecordError("not a JSON object")
    number = data.pop("format", None)
    if type(number) is int and number > FORMAT:
        raise RecordError(f"format {number}, written by a newer pillion (this one reads up to {FORMAT})")
    if type(number) is not int or number != FORMAT:
        raise RecordError("no record of pillion (it has no format)")
    if data.keys() == {_DEFLATED}:
        data = _inflate(data[_DEFLATED])
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise RecordError("no record of pillion (it has no format)")
    try:
        return record_from_json(kind, data)
    except SnapshotError as error:
        raise RecordError(str(error)) from None
    except RecursionError:
        raise RecordError("nested too deeply") from None


assert all(each.name not in ("format", _DEFLATED) for kind in KINDS.values() for each in fields(kind))
