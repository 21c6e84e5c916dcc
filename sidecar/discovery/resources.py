"""What a control plane sends, held by name and version, and the Snapshot that it makes. Pure.

A push replaces and removes resources. Each service's policy is accepted or refused by itself; endpoints, bans and
names always apply, over the policy last accepted. Must not know streams, files or plans. Invariants: what cannot be
read is refused by name with the reason, and what was held in its place stays; the versions told are those in force.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sidecar.model.canonical import SnapshotError, record_from_json
from sidecar.model.snapshot import EndpointSpec, Service, Snapshot

from .refusal import Refusal

Json = Any

BUNDLE, BANS, NAMES, SHARE, COOKIES = "bundle", "bans", "names", "share", "cookies"
ENDPOINTS, SERVICE = "endpoints/", "service/"

RESOURCES_MAX = 50_000
COOKIE_KEYS_MAX = 8
EPOCH_S_MAX = 1e12
REASON_MAX = 1000
ATTEMPTS_MAX = 48
"""Tries to find out which services of one push are to blame: enough for four bad ones among a thousand."""


class ProtocolError(Exception):
    """What came is not of the protocol; says what is wrong."""


@dataclass(frozen=True, slots=True)
class Resource:
    name: str
    version: str
    data: Json


@dataclass(slots=True)
class Push:
    """Everything that is sent under one nonce."""

    nonce: str
    revision: int
    policy: int
    resources: list[Resource] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Bundle:
    trust_domain: str
    pem: bytes


@dataclass(frozen=True, slots=True)
class CookieKeys:
    """By `key` sticky cookies are made; those of `former` are honoured until a time (seconds since the epoch)."""

    key: bytes = field(repr=False)
    former: tuple[tuple[bytes, float], ...] = field(default=(), repr=False)


class PushReader:
    """Puts pushes together that come in several lines."""

    def __init__(self) -> None:
        self._open: Push | None = None

    def line(self, data: Mapping[str, Json]) -> Push | None:
        """One line of type push; the push where it is complete. Raises ProtocolError."""
        try:
            nonce, revision, policy, more = data["nonce"], data["revision"], data["policy"], data.get("more", False)
            resources, removed = data.get("resources", []), data.get("removed", [])
            if not (isinstance(nonce, str) and type(revision) is int and type(policy) is int):
                raise ProtocolError("a push with a nonce or a revision of the wrong kind")
            fresh = [Resource(each["name"], each["version"], each["data"]) for each in resources]
        except (KeyError, TypeError) as error:
            raise ProtocolError(f"a push that lacks something or holds the wrong kind of value: {error}") from None
        strings = [text for each in fresh for text in (each.name, each.version)]
        if not all(isinstance(text, str) for text in (*strings, *removed)):
            raise ProtocolError("a push with a name or a version of the wrong kind")
        push = self._open
        if push is None:
            push = Push(nonce, revision, policy)
        elif push.nonce != nonce:
            raise ProtocolError(f"push {push.nonce[:40]!r} is not complete, and {nonce[:40]!r} begins")
        push.resources += fresh
        push.removed += removed
        if len(push.resources) + len(push.removed) > RESOURCES_MAX:
            raise ProtocolError(f"a push of more than {RESOURCES_MAX} resources")
        self._open = push if more is True else None
        return None if more is True else push


@dataclass(slots=True)
class Taken:
    """What of a push could be read. `services`: policies to be judged; the rest is held already. `changed`: names of
    everything that is not what it was."""

    rejected: dict[str, str] = field(default_factory=dict)
    services: dict[str, tuple[Resource, Service]] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)


class Holdings:
    """The resources of one sidecar."""

    def __init__(self, own: str) -> None:
        self.own = own
        self.resources: dict[str, Resource] = {}
        self.policy = 0
        self.revision = 0
        self.bundle: Bundle | None = None
        self.bans: frozenset[str] = frozenset()
        self.names: frozenset[str] | None = None
        self.share: float | None = None  # of the global rate limits of our service; None: nobody has told
        self.cookies: CookieKeys | None = None  # None: nobody has told
        self.endpoints: dict[str, tuple[EndpointSpec, ...]] = {}
        self.services: dict[str, Service] = {}
        self._joined: dict[str, tuple[Service, tuple[EndpointSpec, ...], Service]] = {}

    def versions(self) -> dict[str, str]:
        """What is told in the hello."""
        return {name: each.version for name, each in self.resources.items()}

    @property
    def has_own(self) -> bool:
        return self.own in self.services

    def take(self, resources: Iterable[Resource], removed: Iterable[str] = ()) -> Taken:
        """Read a push. Services are not held before `accept` says so; all else is, at once."""
        taken = Taken()
        for name in removed:
            # A control plane that does not know the keys (it is older, or cannot read them) takes nothing back:
            # cookies that clients hold would not be honoured any more.
            if name != COOKIES and self._drop(name):
                taken.changed.add(name)
        for each in resources:
            try:
                self._read(each, taken)
            except (SnapshotError, ProtocolError) as error:
                taken.rejected[each.name] = str(error)[:REASON_MAX]
            except RecursionError:
                taken.rejected[each.name] = "nested too deeply"
        return taken

    def accept(self, resource: Resource, service: Service) -> None:
        self.services[service.name] = service
        self.resources[resource.name] = resource

    def restore(self, resource: Resource | None, name: str) -> None:
        """Hold again what was held before under this name."""
        if resource is None:
            self._drop(name)
        else:
            self._read(resource, Taken())

    def take_back(self, taken: Taken, before: Mapping[str, Resource | None]) -> list[str]:
        """Not even what was held can be served with what was taken at once: hold `before` again, and give the names.
        What always applies stays, bans above all."""
        changed = sorted(taken.changed - taken.services.keys())
        names = [name for name in changed if name.startswith((ENDPOINTS, SERVICE))]
        for name in names:
            self.restore(before.get(name), name)
        return names

    def _drop(self, name: str) -> bool:
        held = self.resources.pop(name, None)
        kind, _, service = name.partition("/")
        if kind == "endpoints":
            self.endpoints.pop(service, None)
        elif kind == "service":
            self.services.pop(service, None)
            self._joined.pop(service, None)
        elif name == BANS:
            self.bans = frozenset()
        elif name == SHARE:
            self.share = None
        return held is not None

    def _read(self, each: Resource, taken: Taken) -> None:
        name, data = each.name, each.data
        if name == BUNDLE:
            self.bundle = _bundle(data)
        elif name == BANS:
            self.bans = _bans(data)
        elif name == NAMES:
            self.names = frozenset(_texts(data, "names"))
        elif name == SHARE:
            self.share = _share(data)
        elif name == COOKIES:
            self.cookies = _cookies(data)
        elif name.startswith(ENDPOINTS):
            if not isinstance(data, list):
                raise ProtocolError("endpoints are a list")
            specs = tuple(record_from_json(EndpointSpec, one) for one in data)
            self.endpoints[name.removeprefix(ENDPOINTS)] = specs
        elif name.startswith(SERVICE):
            service = record_from_json(Service, data)
            if service.name != name.removeprefix(SERVICE):
                raise ProtocolError(f"it is the policy of {service.name[:80]!r}")
            taken.services[name] = (each, service)
            taken.changed.add(name)
            return
        else:
            raise ProtocolError("this version of pillion does not know such a resource")
        self.resources[name] = each
        taken.changed.add(name)

    def snapshot(self, candidates: Mapping[str, Service]) -> Snapshot:
        """The policy with these services in place of those held. What the own service calls and nobody has sent (it is
        gone, or was refused) is left out: a request for it is answered `no_route`."""
        services = {**self.services, **candidates}
        own = services.get(self.own)
        if own is not None and any(name not in services for name in own.calls):
            kept = {name: call for name, call in own.calls.items() if name in services}
            services[self.own] = replace(own, calls=kept)
        joined = {name: self._with_endpoints(name, services[name]) for name in sorted(services)}
        return Snapshot(joined, f"r{self.policy}")

    def _with_endpoints(self, name: str, service: Service) -> Service:
        endpoints = self.endpoints.get(name, ())
        held = self._joined.get(name)
        if held is not None and held[0] is service and held[1] is endpoints:
            return held[2]
        made = replace(service, endpoints=endpoints)
        self._joined[name] = (service, endpoints, made)
        return made


def _bundle(data: Json) -> Bundle:
    if not isinstance(data, dict) or not all(isinstance(data.get(key), str) for key in ("trust_domain", "pem")):
        raise ProtocolError("a bundle has a trust domain and PEM")
    return Bundle(data["trust_domain"], data["pem"].encode())


def _bans(data: Json) -> frozenset[str]:
    if not isinstance(data, dict):
        raise ProtocolError("bans are a map")
    return frozenset((*_texts(data.get("identities", []), "identities"), *_texts(data.get("certificates", []), "…")))


def _share(data: Json) -> float:
    share = data.get("share") if isinstance(data, dict) else None
    if not isinstance(share, int | float) or isinstance(share, bool) or not 0.0 < share <= 1.0:
        raise ProtocolError("a share is a number above 0, 1 at most")
    return float(share)


def _cookies(data: Json) -> CookieKeys:
    """What is wrong is told without the value: it is secret."""
    keys = data.get("keys") if isinstance(data, dict) else None
    if not isinstance(keys, list) or not 1 <= len(keys) <= COOKIE_KEYS_MAX:
        raise ProtocolError(f"keys of cookies are a list of 1 to {COOKIE_KEYS_MAX}")
    read: list[tuple[bytes, float]] = []
    for each in keys:
        text, until = (each.get("key"), each.get("until", 0.0)) if isinstance(each, dict) else (None, 0.0)
        if not isinstance(text, str) or len(text) != 64 or not set(text) <= set("0123456789abcdef"):
            raise ProtocolError("a key of cookies is 64 digits of lower-case hex")
        if not isinstance(until, int | float) or isinstance(until, bool) or not 0.0 <= until <= EPOCH_S_MAX:
            raise ProtocolError("`until` of a key of cookies is a number of seconds since the epoch")
        read.append((bytes.fromhex(text), float(until)))
    return CookieKeys(read[0][0], tuple(read[1:]))


def _texts(data: Json, what: str) -> list[str]:
    if not isinstance(data, list) or not all(isinstance(each, str) for each in data):
        raise ProtocolError(f"{what} must be a list of strings")
    return data


Attempt = Callable[[frozenset[str]], Awaitable[Refusal | None]]
"""Serve by what is held and these candidates (and no others) from now on; where that is refused, nothing changes."""


BASE = ""
"""In the answer of `settle`: not even what was held before, with the endpoints as they are now, can be served."""


async def settle(candidates: Sequence[str], own: str, held: bool, attempt: Attempt) -> dict[str, str]:
    """Find the largest part of a push that can be served, by halves; what is refused, with the reason.

    `candidates` are names of resources; `own` is that of the own service's policy, and `held` says whether there is one
    in force (without it nothing can be served). After the last attempt all that is not refused is in force.
    """
    refusal = await attempt(frozenset(candidates))
    if refusal is None:
        return {}
    if refusal.own and own in candidates:
        refused = {own: refusal.text}
        rest = [name for name in candidates if name != own]
        return refused if not held else refused | await settle(rest, own, held, attempt)
    good: frozenset[str] = frozenset()
    if not held and own in candidates:
        alone = await attempt(frozenset({own}))
        if alone is not None:
            return {own: alone.text}
        good = frozenset({own})
    return await _halve([name for name in candidates if name not in good], good, refusal, attempt)


async def _halve(group: list[str], good: frozenset[str], known: Refusal, attempt: Attempt) -> dict[str, str]:
    """`known` is the answer for the whole group; each part of it is asked for anew."""
    refused: dict[str, str] = {}
    served, left = bool(good), ATTEMPTS_MAX
    groups = _halves(group)
    if not groups and group:
        refused[group[0]] = known.text
    while groups:
        part = groups.pop()
        if not left:
            refused.update(dict.fromkeys(part, "not judged: too much else of the same push was refused"))
            continue
        left -= 1
        refusal = await attempt(good | frozenset(part))
        if refusal is None:
            good |= frozenset(part)
            served = True
        elif len(part) == 1:
            refused[part[0]] = refusal.text
        else:
            groups += _halves(part)
    if not served:
        base = await attempt(frozenset())
        if base is not None:
            refused[BASE] = base.text
    return refused


def _halves(group: list[str]) -> list[list[str]]:
    """Two halves, the first of them last (it is taken first); none where the group cannot be divided."""
    half = len(group) // 2
    return [group[half:], group[:half]] if half else []
