"""`GET /v1/check`: what is wrong with a mesh, each with its cause and its remedy.

What is right is told too, by one line for each kind. Must not change anything but to see whether the store takes a
change. Invariant: the number of lines is bounded, however much is wrong.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import trio

from certs.svid import validity_of
from control_plane.state.policy import policy_of
from control_plane.state.records import (
    ALIVE,
    AUDIT,
    INSTANCES,
    ISSUERS,
    REPLICAS,
    ROOTS,
    SIDECARS,
    TOKENS,
    Instance,
    Sidecar,
    encode,
)
from control_plane.store.base import Put, StoreError, StoreFull
from sidecar.model.snapshot import Service

from .calling import Call, Watched
from .operator_views import connected, first_certificate, policy_revision
from .replica import Replica

Json = Any

DETAILS_MAX = 20  # of one kind
PROBE_S = 3.0
DAY_S = 86400.0
ROOT_WARN_S, ISSUER_WARN_S, ADMIN_WARN_S = 180 * DAY_S, 30 * DAY_S, 14 * DAY_S
SKEW_S = 10.0


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong. `name`: with what."""

    name: str
    cause: str
    remedy: str


@dataclass(frozen=True, slots=True)
class _Kind:
    """One kind of check; `title`: what is right where nothing was found."""

    category: str
    title: str
    find: Callable[[Replica], Iterable[Finding]]


FOLDER = _Kind("policy", "the watched folder is in force", lambda replica: ())


async def check(call: Call) -> Json:
    replica = call.replica
    found = [_store(await _probe(replica), replica)]
    for kind in KINDS:
        found.append(_lines(kind, kind.find(replica)))
        await trio.lowlevel.checkpoint()
    watched = call.shared.watched
    if watched is not None:
        found.append(_lines(FOLDER, _folder(watched)))
    rows = [row for rows in found for row in rows]
    return {"ok": all(row["ok"] for row in rows), "checks": rows}


def _lines(kind: _Kind, findings: Iterable[Finding]) -> list[Json]:
    wrong = list(findings)
    if not wrong:
        return [{"category": kind.category, "name": kind.title, "ok": True, "cause": "", "remedy": ""}]
    rows = [_row(kind.category, each) for each in wrong[:DETAILS_MAX]]
    if len(wrong) > DETAILS_MAX:
        rest = len(wrong) - DETAILS_MAX
        rows.append(_row(kind.category, Finding(f"{rest} more of the same", wrong[-1].cause, wrong[-1].remedy)))
    return rows


def _row(category: str, finding: Finding) -> Json:
    return {
        "category": category,
        "name": finding.name,
        "ok": False,
        "cause": finding.cause,
        "remedy": finding.remedy,
    }


# The store


async def _probe(replica: Replica) -> StoreError | None:
    """Write our own record as it is."""
    held = replica.state.table(REPLICAS).get(replica.settings.name)
    operations = [Put(REPLICAS + replica.settings.name, encode(held.record), held.lease)] if held is not None else []
    with trio.move_on_after(PROBE_S):
        try:
            await replica.store.commit(operations)
        except StoreError as error:
            return error
        except ValueError:  # our lease has ended: it is granted again in a moment
            return None
        return None
    return StoreError(f"no answer within {PROBE_S:g} s")


def _store(error: StoreError | None, replica: Replica) -> list[Json]:
    where = replica.store.description
    kind = _Kind("store", f"{where} answers and takes changes", lambda _: ())
    problem = str(error) if error is not None else replica.store_problem
    if not problem and error is None:
        return _lines(kind, ())
    if isinstance(error, StoreFull):
        return _lines(
            kind,
            [Finding(f"{where} is full", problem, "make room: what is kept is served, but nothing can be changed")],
        )
    remedy = "see that it runs and can be reached from here; what is known is served on meanwhile"
    return _lines(kind, [Finding(f"{where} takes no changes", problem or "it does not answer", remedy)])


def _damaged(replica: Replica) -> Iterator[Finding]:
    for key, why in sorted(replica.state.problems.items()):
        yield Finding(
            f"record {key}",
            f"it cannot be used and is left out: {why}",
            "restore it from a backup (pillion store restore), or delete this key; of a newer version: upgrade",
        )


# The authority


def _authority(replica: Replica) -> Iterator[Finding]:
    now = replica.now()
    issuing = validity_of(replica.authority.issuing.certificate)
    if issuing.not_before.timestamp() > now:
        yield Finding(
            "issuing certificate",
            f"it is not valid before {issuing.not_before:%Y-%m-%d %H:%M} UTC",
            "is this host's clock right?",
        )
    for held in replica.state.table(ISSUERS).values():
        yield from _expiry(
            f"issuing certificate of replica {held.record.replica}",
            held.record.pem,
            now,
            ISSUER_WARN_S,
            "pillion ca renew there, and start it again",
            held.record.replica in replica.state.table(REPLICAS),
        )
    for name, held in replica.state.table(ROOTS).items():
        yield from _expiry(
            f"root certificate {name[:16]}", held.record.pem, now, ROOT_WARN_S, "make a new root in good time", True
        )


def _expiry(name: str, pem: str, now: float, warn_s: float, remedy: str, in_use: bool) -> Iterator[Finding]:
    certificate = first_certificate(pem)
    if certificate is None:
        yield Finding(name, "its record holds no certificate", "restore the record from a backup")
        return
    left = validity_of(certificate).not_after.timestamp() - now
    if in_use and left < warn_s:
        cause = f"it expires in {_span(left)}" if left > 0 else f"it expired {_span(-left)} ago"
        yield Finding(name, cause, remedy)


def _admins(replica: Replica) -> Iterator[Finding]:
    now = replica.now()
    ends = [
        held.record.expires
        for held in replica.state.table(TOKENS).values()
        if held.record.kind == "operator" and held.record.role == "admin" and held.record.expires > now
    ]
    if not ends:
        yield Finding(
            "admin tokens",
            "no admin token is good any more",
            "start the control plane with --admin-token-file FILE to make one",
        )
    elif max(ends) - now < ADMIN_WARN_S:
        yield Finding(
            "admin tokens",
            f"the last one expires in {_span(max(ends) - now)}",
            "pillion token create --operator NAME --role admin",
        )


# Replicas and clocks


def _replicas(replica: Replica) -> Iterator[Finding]:
    state = replica.state
    running, roots, issuers = state.table(REPLICAS), state.table(ROOTS), state.table(ISSUERS)
    if replica.settings.name not in running:
        yield Finding(
            f"replica {replica.settings.name}",
            "its own record is not in the store (just started, or the store has not answered for a while)",
            "look again in some seconds; if it stays so, the log says why",
        )
    ours = {root.fingerprint for root in replica.authority.bundle.roots}
    if not ours & roots.keys():
        yield Finding(
            f"replica {replica.settings.name}",
            "its authority is of a root that the mesh does not trust: what it issues is refused",
            "start it with an authority of the mesh's root (--ca)",
        )
    for name, held in sorted(running.items()):
        record = held.record
        if record.issuer not in issuers:
            yield Finding(
                f"replica {name}",
                "its issuing certificate is not among those of the mesh",
                "start it again, with an authority of the mesh's root (--ca)",
            )
        if record.version != replica.settings.version and record.version and replica.settings.version:
            yield Finding(
                f"replica {name}",
                f"it runs version {record.version}, this one {replica.settings.version}",
                "upgrade so that all run the same; one minor version apart is supported",
            )


def _clocks(replica: Replica) -> Iterator[Finding]:
    """What was written later must not say an earlier time: by how much it does, the clocks differ at least. And nothing
    is from the future."""
    told = _times(replica)
    now = replica.now()
    worst: dict[tuple[str, str], float] = {}
    newest, whose = float("-inf"), ""
    for _, at, name in sorted(told):
        if name != whose and newest - at > SKEW_S:
            worst[whose, name] = max(worst.get((whose, name), 0.0), newest - at)
        if at > newest:
            newest, whose = at, name
        if at - now > SKEW_S and name != replica.settings.name:
            worst[name, replica.settings.name] = max(worst.get((name, replica.settings.name), 0.0), at - now)
    for (ahead, behind), skew in sorted(worst.items()):
        yield Finding(
            f"clocks of {ahead} and {behind}",
            f"that of {ahead} is at least {_span(skew)} ahead",
            "keep the time of all hosts with NTP (timedatectl status); certificates are refused beyond 2 minutes",
        )


def _times(replica: Replica) -> list[tuple[int, float, str]]:
    """(revision, time, replica) of what replicas have written and is never written anew with the same time."""
    state = replica.state
    told = [(held.revision, held.record.since, held.record.replica) for held in state.table(ALIVE).values()]
    told += [
        (held.revision, held.record.at, name.partition("-")[2])
        for name, held in list(state.table(AUDIT).items())[-500:]
    ]
    return [each for each in told if each[2] in state.table(REPLICAS)]


# Sidecars


def _sidecar_policy(replica: Replica) -> Iterator[Finding]:
    newest = policy_revision(replica.state)
    table = replica.state.table(SIDECARS)
    for id, told in sorted(connected(replica).items()):
        held = table.get(id)
        name = f"sidecar {id}" + (f" of {held.record.service}" if held is not None else "")
        for resource, reason in sorted(told.rejected.items()):
            yield Finding(
                name,
                f"it rejected {resource}: {reason}",
                "correct the policy, or what the sidecar allows (--allow-filters); it goes on with what it had",
            )
        if told.policy < newest:
            yield Finding(
                name,
                f"it has not answered for the policy of revision {newest} (its last: {told.policy})",
                "look at its log, and at its connection to the control plane",
            )


def _leaves(replica: Replica) -> Iterator[Finding]:
    now, here = replica.now(), connected(replica)
    ttl_s = replica.settings.leaf_ttl.total_seconds()
    for id, held in sorted(replica.state.table(SIDECARS).items()):
        record: Sidecar = held.record
        left = record.not_after - now
        name = f"certificate of {id}"
        registered = f"{record.service}/{id}" in replica.state.table(INSTANCES)
        if left <= 0 and (id in here or registered):
            yield Finding(
                name,
                f"it expired {_span(-left)} ago, and the sidecar is still there",
                "start the sidecar again: it renews within the grace, else it needs a new token; is its clock right?",
            )
        elif left < ttl_s / 4 and id in here:
            yield Finding(
                name,
                f"it expires in {_span(left)} and was not renewed at half its life",
                "look at the sidecar's log: its renewals fail; is its clock right?",
            )


# Services


def _services(replica: Replica) -> Iterator[Finding]:
    for name, service in replica.catalogue.snapshot.services.items():
        instances = [held.record for held in replica.instances.get(name, {}).values() if held.record.state != "gone"]
        health = [(each.healthy, each.reason) for each in instances]
        health += [(each.healthy, "") for each in service.endpoints]
        if health and not any(healthy for healthy, _ in health):
            reasons = sorted({reason for _, reason in health if reason})
            told = f": {'; '.join(reasons[:3])}" if reasons else ""
            yield Finding(
                f"service {name}",
                f"none of its {len(health)} endpoint{'s' if len(health) > 1 else ''} is healthy{told}",
                "look at the application behind each: pillion describe service " + name,
            )


def _suspects(replica: Replica) -> Iterator[Finding]:
    for key, held in sorted(replica.state.table(INSTANCES).items()):
        instance: Instance = held.record
        if instance.state == "suspect":
            yield Finding(
                f"endpoint {key}",
                "it went silent together with most of its service, so it is kept for now",
                "see whether the network between these hosts and the control plane is broken, or the hosts are down",
            )


def _calls(replica: Replica) -> Iterator[Finding]:
    services = replica.catalogue.snapshot.services
    for name, service in services.items():
        for callee in service.calls:
            target = services.get(callee)
            if (
                target is not None
                and not target.endpoints
                and not replica.instances.get(callee)
                and not _serves(target)
            ):
                yield Finding(
                    f"service {name}",
                    f"it calls {callee}, of which no instance is there",
                    f"start one: pillion token create --service {callee}, then pillion sidecar --service {callee} …",
                )


def _serves(service: Service) -> bool:
    """Whether what no other route takes is answered although nobody is there."""
    last = service.routes[-1]
    return bool(last.respond or last.redirect or last.fallback)


# Policy


def _documents(replica: Replica) -> Iterator[Finding]:
    for name, problems in sorted(replica.catalogue.broken.items()):
        first = problems[0] if problems else None
        told = f"{first.source}: {first.message}" if first is not None else "it cannot be read"
        yield Finding(
            f"document {name}",
            f"it does not stand, the last good one serves on: {told}",
            "apply a corrected one: pillion policy apply -f FILE, or pillion policy rollback",
        )


def _folder(watched: Watched) -> Iterator[Finding]:
    if watched.problem:
        yield Finding(
            "policy folder",
            f"its content is not in force, what was stays: {watched.problem.splitlines()[0]}",
            "the log of this control plane has all of it; correct the files, and they are taken",
        )


def _without_sidecar(replica: Replica) -> Iterator[Finding]:
    joined = {held.record.service for held in replica.state.table(SIDECARS).values()}
    for name, document in sorted(policy_of(replica.state).services.items()):
        service = replica.catalogue.snapshot.services.get(name)
        if service is not None and name not in joined and not service.endpoints and not _serves(service):
            yield Finding(
                f"service {name}",
                f"it has a policy ({document.file}:{document.line}), but no sidecar has ever joined as it",
                f"pillion token create --service {name}; or remove the policy, if the name is wrong",
            )


def _span(seconds: float) -> str:
    for unit, name in ((DAY_S, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * unit:
            return f"{int(seconds // unit)} {name}"
    return f"{max(0, int(seconds))} seconds"


KINDS: tuple[_Kind, ...] = (
    _Kind("store", "every record can be read", _damaged),
    _Kind("authority", "the authority's certificates are valid for long enough", _authority),
    _Kind("authority", "an admin token is good", _admins),
    _Kind("replicas", "all replicas are of one root and one version", _replicas),
    _Kind("clock", "the clocks of the replicas agree", _clocks),
    _Kind("sidecars", "every connected sidecar has accepted the policy", _sidecar_policy),
    _Kind("sidecars", "certificates are renewed in time", _leaves),
    _Kind("policy", "every document stands", _documents),
    _Kind("policy", "every service with a policy has had a sidecar", _without_sidecar),
    _Kind("services", "every service with endpoints has a healthy one", _services),
    _Kind("services", "no endpoint is suspect", _suspects),
    _Kind("services", "every service that is called has instances", _calls),
)
