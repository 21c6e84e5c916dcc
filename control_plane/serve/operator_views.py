"""What operators look at: services, endpoints, sidecars, edges, certificates, the audit log, replicas.

Handlers of the operator API; each answer is of one revision of the state. Must not change anything.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cryptography import x509

from certs.pem import PemError, read_blocks
from certs.spiffe import SpiffeId
from certs.svid import SvidError, parse_certificate, validity_of
from control_plane.state.mirror import State
from control_plane.state.policy.history import policy_of
from control_plane.state.records import (
    AUDIT,
    BANS,
    INSTANCES,
    ISSUERS,
    LIVE,
    OBSERVED,
    REPLICAS,
    ROOTS,
    SHARES,
    SIDECARS,
    STATUS,
    Document,
    Instance,
    Live,
    Sidecar,
    Status,
)
from sidecar.model.snapshot import Origin, Route, Service
from sidecar.model.source import Source
from sidecar.model.summary import concurrency_text, destination_text, match_text, tries_text
from sidecar.policy.endpoint import endpoint_key

from .calling import Call
from .http import ApiError
from .replica import Replica

Json = Any


@dataclass(frozen=True, slots=True)
class Connected:
    """A sidecar that is connected somewhere, and what it says of the policy."""

    replica: str
    policy: int
    rejected: Mapping[str, str]
    version: str


def connected(replica: Replica) -> dict[str, Connected]:
    """Those at other replicas by what these have written; our own as we see them."""
    found: dict[str, Connected] = {}
    running = replica.state.table(REPLICAS)
    for name, held in replica.state.table(LIVE).items():
        live: Live = held.record
        if live.replica != replica.settings.name and live.replica in running:
            status: Status | None = replica.state.get(STATUS, live.replica)
            policy = status.policy if status is not None and name not in status.behind else 0
            found[name] = Connected(live.replica, policy, live.rejected, live.version)
    for name, stream in replica.hub.streams.items():
        found[name] = Connected(replica.settings.name, stream.policy, dict(stream.rejected), stream.version)
    return found


def policy_revision(state: State) -> int:
    """The revision at which the policy last changed: the same at every replica."""
    policy = policy_of(state)
    revisions = [each.revision for each in policy.documents.values()]
    revisions += [each.revision for each in policy.changes.values()]
    return max(revisions, default=0)


# Services


async def services(call: Call) -> Json:
    replica = call.replica
    documents = policy_of(replica.state).services
    callers = _callers(replica)
    return {
        "revision": replica.state.revision,
        "services": [
            _overview(replica, service, documents.get(name), len(callers.get(name, ())))
            for name, service in sorted(replica.catalogue.snapshot.services.items())
        ],
    }


def _overview(replica: Replica, service: Service, document: Document | None, callers: int) -> Json:
    instances = [held.record for held in replica.instances.get(service.name, {}).values()]
    health = [each.healthy for each in service.endpoints]
    health += [each.healthy for each in instances if each.state != "gone"]
    return {
        "name": service.name,
        "ports": _ports(service),
        "endpoints": len(health),
        "healthy": sum(health),
        "versions": list(service.versions),
        "mtls": service.mtls.value,
        "owners": list(service.owners),
        "policy": f"{document.file}:{document.line}" if document is not None else None,
        "callers": callers,
    }


def _ports(service: Service) -> Json:
    return [{"name": port.name, "number": port.number, "protocol": port.protocol.value} for port in service.ports]


def _edges(state: State) -> dict[tuple[str, str], tuple[float, float]]:
    """Requests and failures a second, by caller and callee, over all replicas."""
    found: dict[tuple[str, str], tuple[float, float]] = {}
    for held in state.table(OBSERVED).values():
        for caller, callee, requests, failures in held.record.edges:
            before = found.get((caller, callee), (0.0, 0.0))
            found[caller, callee] = (before[0] + requests, before[1] + failures)
    return found


def _callers(replica: Replica) -> dict[str, set[str]]:
    """By callee: who says so under `calls`, and who was seen to."""
    found: dict[str, set[str]] = {}
    for service in replica.catalogue.snapshot.services.values():
        for callee in service.calls:
            found.setdefault(callee, set()).add(service.name)
    for caller, callee in _edges(replica.state):
        found.setdefault(callee, set()).add(caller)
    return found


async def service(call: Call) -> Json:
    replica, name = call.replica, call.path["name"]
    found = known_service(replica, name)
    document = policy_of(replica.state).services.get(name)
    problems = replica.catalogue.broken.get(f"services/{name}")
    edges = _edges(replica.state)
    callees = {callee for caller, callee in edges if caller == name} | found.calls.keys()
    rows = list(_endpoints_of(replica, found, *_told(replica.state)))
    return {
        "name": name,
        "revision": replica.state.revision,
        "ports": _ports(found),
        "mtls": found.mtls.value,
        "concurrency": concurrency_text(found),
        "owners": list(found.owners),
        "versions": [
            {
                "name": version,
                "labels": dict(labels),
                "endpoints": sum(labels.items() <= each["labels"].items() for each in rows),
            }
            for version, labels in found.versions.items()
        ],
        "endpoints": rows,
        "limit_shares": _limit_shares(replica, name),
        "routes": [_route(each) for each in found.routes],
        "policy": [_setting(key, origin) for key, origin in found.provenance.items()],
        "document": place(document) if document is not None else None,
        "problem": str(problems[0].message) if problems else None,
        "callers": [_neighbour(each, edges, (each, name)) for each in sorted(_callers(replica).get(name, ()))],
        "callees": [_neighbour(each, edges, (name, each)) for each in sorted(callees)],
    }


def _limit_shares(replica: Replica, service: str) -> Json:
    """How its instances divide its global rate limits."""
    record = replica.state.get(SHARES, service)
    if record is None:
        return []
    instances = replica.instances.get(service, {})
    found = []
    for id, share in sorted(record.shares.items()):
        held = instances.get(id)
        address = endpoint_key(held.record.host, held.record.port) if held is not None else None
        found.append({"sidecar": id, "address": address, "share": share, "demand": record.demands.get(id)})
    return found


def known_service(replica: Replica, name: str) -> Service:
    """Raises ApiError."""
    found = replica.catalogue.snapshot.services.get(name)
    if found is None:
        raise ApiError(404, "unknown_service", f'there is no service "{name}"', "pillion get services shows them")
    return found


def _neighbour(name: str, edges: Mapping[tuple[str, str], tuple[float, float]], edge: tuple[str, str]) -> Json:
    requests, failures = edges.get(edge, (0.0, 0.0))
    return {"service": name, "requests_per_s": requests, "failures_per_s": failures}


def _route(route: Route) -> Json:
    return {
        "name": route.name,
        "match": match_text(route.match),
        "to": destination_text(route),
        "tries": tries_text(route),
        "source": str(route.source),
    }


def _setting(key: str, origin: Origin) -> Json:
    return {"key": key, **_origin(origin), "overrode": [_origin(each) for each in origin.overrode]}


def _origin(origin: Origin) -> Json:
    return {"value": origin.value, "level": origin.level.value, "source": _place(origin.source)}


def _place(source: Source) -> str:
    return str(source) if source.file else ""


def place(document: Document) -> Json:
    return {
        "file": document.file,
        "line": document.line,
        "author": document.author,
        "applied": document.applied,
        "change": document.change,
    }


# Endpoints


async def endpoints(call: Call) -> Json:
    replica, name = call.replica, call.query["service"]
    wanted = replica.catalogue.snapshot.services
    if name is not None:
        wanted = {name: known_service(replica, name)}
    told = _told(replica.state)
    return {
        "revision": replica.state.revision,
        "endpoints": [row for _, each in sorted(wanted.items()) for row in _endpoints_of(replica, each, *told)],
    }


Told = Mapping[tuple[str, str], list[tuple[str, str]]]


def _told(state: State) -> tuple[Told, Told]:
    """What callers say of an endpoint, by service and address: the states of breakers and outliers, and the evidence;
    of several sidecars of one caller, each state once."""
    breakers: dict[tuple[str, str], list[tuple[str, str]]] = {}
    evidence: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for held in state.table(OBSERVED).values():
        for found, entries in ((breakers, held.record.breakers), (evidence, held.record.evidence)):
            for caller, callee, address, what in entries:
                told = found.setdefault((callee, address), [])
                if (caller, what) not in told:
                    told.append((caller, what))
    return breakers, evidence


def _endpoints_of(replica: Replica, service: Service, breakers: Told, evidence: Told) -> Iterator[Json]:
    def row(host: str, port: int, labels: Mapping[str, str], weight: int, **rest: Json) -> Json:
        address = endpoint_key(host, port)
        states, texts = (told.get((service.name, address), ()) for told in (breakers, evidence))
        return {
            "service": service.name,
            "address": address,
            "version": _version(service, labels),
            "labels": dict(labels),
            "weight": weight,
            "breakers": [{"caller": caller, "state": condition} for caller, condition in sorted(states)],
            "evidence": [{"caller": caller, "text": text} for caller, text in sorted(texts)],
            **rest,
        }

    for spec in service.endpoints:
        yield row(
            spec.host,
            spec.port,
            spec.labels,
            spec.weight,
            sidecar=None,
            state="static",
            healthy=spec.healthy,
            reason="",
            certificate_not_after=None,
        )
    for id, held in sorted(replica.instances.get(service.name, {}).items()):
        instance: Instance = held.record
        if instance.state == "gone":
            continue
        record: Sidecar | None = replica.state.get(SIDECARS, id)
        yield row(
            instance.host,
            instance.port,
            instance.labels,
            instance.weight,
            sidecar=id,
            state="suspect" if instance.state == "suspect" else "up",
            healthy=instance.healthy,
            reason=instance.reason,
            certificate_not_after=record.not_after if record is not None else None,
        )


def _version(service: Service, labels: Mapping[str, str]) -> str | None:
    return next((name for name, needed in service.versions.items() if needed.items() <= labels.items()), None)


# Sidecars and what they see


async def sidecars(call: Call) -> Json:
    replica = call.replica
    state = replica.state
    here, newest = connected(replica), policy_revision(state)
    rows = []
    for id, held in sorted(state.table(SIDECARS).items(), key=lambda item: (item[1].record.service, item[0])):
        record: Sidecar = held.record
        told = here.get(id)
        instance: Instance | None = state.get(INSTANCES, f"{record.service}/{id}")
        rows.append(
            {
                "id": id,
                "service": record.service,
                "name": record.name,
                "address": endpoint_key(instance.host, instance.port) if instance is not None else None,
                "replica": told.replica if told is not None else None,
                "connected": told is not None,
                "policy": told.policy if told is not None else 0,
                "current": told is not None and told.policy >= newest and not told.rejected,
                "rejected": dict(told.rejected) if told is not None else {},
                "version": told.version if told is not None else "",
                "joined": record.joined,
                "not_after": record.not_after,
                "healthy": instance.healthy if instance is not None else None,
            }
        )
    return {"revision": state.revision, "sidecars": rows}


async def edges(call: Call) -> Json:
    name = call.query["service"]
    return {
        "edges": [
            {"caller": caller, "callee": callee, "requests_per_s": requests, "failures_per_s": failures}
            for (caller, callee), (requests, failures) in sorted(_edges(call.replica.state).items())
            if name is None or name in (caller, callee)
        ]
    }


# Certificates


async def certs(call: Call) -> Json:
    replica = call.replica
    state, meta = replica.state, replica.state.meta
    assert meta is not None
    bans = {(held.record.kind, held.record.value) for held in state.table(BANS).values()}
    rows = []
    for id, held in sorted(state.table(SIDECARS).items(), key=lambda item: (item[1].record.service, item[0])):
        record: Sidecar = held.record
        identity = str(SpiffeId.for_service(meta.trust_domain, record.service))
        newest = record.fingerprints[0] if record.fingerprints else ""
        names = {("identity", identity), ("sidecar", id), *(("certificate", each) for each in record.fingerprints)}
        rows.append(
            {
                "sidecar": id,
                "service": record.service,
                "name": record.name,
                "spiffe_id": identity,
                "fingerprint": newest,
                "not_after": record.not_after,
                "joined": record.joined,
                "renewed": record.renewed,
                "banned": not bans.isdisjoint(names),
            }
        )
    authorities = [
        _authority("root", name, held.record.pem, "", held.record.added) for name, held in state.table(ROOTS).items()
    ]
    authorities += [
        _authority("issuing", name, held.record.pem, held.record.replica, held.record.added)
        for name, held in state.table(ISSUERS).items()
    ]
    return {"certs": rows, "authorities": sorted(authorities, key=lambda each: (each["kind"], each["added"]))}


def _authority(kind: str, fingerprint: str, pem: str, replica: str, added: float) -> Json:
    certificate = first_certificate(pem)
    not_after = validity_of(certificate).not_after.timestamp() if certificate is not None else None
    return {"kind": kind, "fingerprint": fingerprint, "replica": replica, "added": added, "not_after": not_after}


def first_certificate(pem: str) -> x509.Certificate | None:
    """None: there is none that can be read."""
    try:
        blocks = read_blocks(pem.encode(), 256 * 1024, 8)
        return parse_certificate(blocks[0].der) if blocks else None
    except (PemError, SvidError):
        return None


# Who did what, and who runs


async def audit(call: Call) -> Json:
    table = call.replica.state.table(AUDIT)
    newest = sorted(table)[-call.query["limit"] :]
    fields = ("at", "who", "action", "subject", "outcome", "message")
    return {"audit": [{each: getattr(table[name].record, each) for each in fields} for name in newest]}


async def replicas(call: Call) -> Json:
    fields = ("mesh", "join", "issuer", "version", "started", "folder")
    return {
        "replicas": [
            {
                "name": name,
                **{each: getattr(held.record, each) for each in fields},
                "this": name == call.replica.settings.name,
            }
            for name, held in sorted(call.replica.state.table(REPLICAS).items())
        ]
    }
