"""Policy over the operator API: what is applied, what is to be, how it came to be, and what sidecars say of it.

Handlers of the operator API. A plan is made in a worker thread, since a large policy takes its time, and one at a time.
Must not judge a policy: control_plane.state.policy does. Invariants: what is planned is committed whole or not at all;
whoever applies has the right to each document that changes; a change is on record with who made it.
"""

import logging
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import trio

from control_plane.state.access import OPERATOR, Who, lacks_role, may_apply
from control_plane.state.mirror import Held
from control_plane.state.policy import (
    NotAllowed,
    Plan,
    PolicyConflict,
    PolicyInvalid,
    plan_apply,
    plan_rollback,
    policy_of,
)
from control_plane.state.records import REPLICAS, SIDECARS, Change, Document
from control_plane.store.base import Conflict
from sidecar.model.canonical import snapshot_to_json
from sidecar.model.problems import problem_to_json

from .calling import WAITING_MAX, Call
from .http import ApiError
from .joins import caught_up
from .operator_views import connected, place, policy_revision

log = logging.getLogger(__name__)

Json = Any

TRIES = 4
IN_FORCE_S = 2.0


# What stands


async def policy(call: Call) -> Json:
    held = policy_of(call.replica.state)
    return {
        "revision": call.replica.state.revision,
        "documents": [_document(name, each.record) for name, each in sorted(held.documents.items())],
    }


def _document(name: str, document: Document) -> Json:
    return {"name": name, "text": document.text, "whole": document.whole, **place(document)}


async def snapshot(call: Call) -> Json:
    found = call.replica.catalogue.snapshot
    return await call.shared.aside(partial(snapshot_to_json, found))


async def changes(call: Call) -> Json:
    held = policy_of(call.replica.state).changes
    return {
        "changes": [
            {**_change(number, each.record), "documents": sorted(each.record.after)} for number, each in held.items()
        ]
    }


def _change(number: int, record: Change) -> Json:
    return {
        "change": number,
        "author": record.author,
        "at": record.at,
        "message": record.message,
        "source": record.source,
    }


async def change(call: Call) -> Json:
    number = call.path["number"]
    found: Held[Change] | None = policy_of(call.replica.state).changes.get(number)
    if found is None:
        raise ApiError(
            404, "not_found", f"there is no change {number}, or it is no longer kept", "pillion policy history"
        )
    record = found.record
    return {**_change(number, record), "before": _documents(record.before), "after": _documents(record.after)}


def _documents(documents: Mapping[str, Document | None]) -> Json:
    return {name: None if each is None else _document(name, each) for name, each in documents.items()}


# Changing it


async def apply(call: Call) -> Json:
    body = call.body
    if not body["dry_run"]:
        _refuse(lacks_role(call.who, OPERATOR, "applying policy"))
    plan = partial(
        plan_apply,
        files=body["files"],
        author=call.who.name,
        at=call.replica.now(),
        may=_may(call.who, body["dry_run"]),
        base=body["base"],
        prune=body["prune"],
        message=body["message"],
        catalogue=call.replica.catalogue,
    )
    return await _carry_out(call, plan, "apply policy")


async def rollback(call: Call) -> Json:
    body = call.body
    plan = partial(
        plan_rollback,
        to=body["to"],
        author=call.who.name,
        at=call.replica.now(),
        may=_may(call.who, body["dry_run"]),
        message=body["message"],
        catalogue=call.replica.catalogue,
    )
    try:
        return await _carry_out(call, plan, f"rollback to change {body['to']}")
    except LookupError as error:
        raise ApiError(404, "not_found", str(error.args[0]), "pillion policy history shows what is kept") from None


def _refuse(refusal: str | None) -> None:
    if refusal is not None:
        raise ApiError(403, "not_allowed", refusal)


def _may(who: Who, dry_run: bool) -> Callable[[str, Collection[str] | None, Collection[str] | None], str | None]:
    """Whoever may not change anything may still see what would change."""
    if dry_run and lacks_role(who, OPERATOR, "") is not None:
        return lambda document, before, after: None
    return partial(may_apply, who)


async def _carry_out(call: Call, plan: "partial[Plan]", action: str) -> Json:
    replica, body = call.replica, call.body
    async with call.shared.policy_turn:
        for _ in range(TRIES):
            current = policy_of(replica.state)
            planned = await _plan(call, partial(plan, current))
            _refuse_watched(call, planned)
            revision = current.revision if body["dry_run"] else policy_revision(replica.state)
            if body["dry_run"] or not planned.operations:
                return _applied(planned, None, revision, body["dry_run"])
            try:
                revision = await replica.commit(planned.operations, planned.compares)
            except Conflict as conflict:  # somebody else was quicker: whether that is a conflict, a new plan says
                await caught_up(replica, conflict)
                continue
            await replica.audit(call.who.name, action, f"change {planned.change}", _message(planned, body["message"]))
            await _in_force(call, revision)
            return _applied(planned, planned.change, revision, False)
    raise ApiError(503, "busy", "the policy changes all the time", "try again", None, 1)


async def _in_force(call: Call, revision: int) -> None:
    """Who applies and then looks should see it; a replica that is slow to work it out holds nobody up for long."""
    with trio.move_on_after(IN_FORCE_S):
        while call.replica.policy_revision < revision:  # noqa: ASYNC110
            await trio.sleep(0.02)


async def _plan(call: Call, plan: "partial[Plan]") -> Plan:
    """Raises ApiError, LookupError."""
    try:
        planned: Plan = await call.shared.aside(plan)
        return planned
    except PolicyInvalid as error:
        raise ApiError(
            422,
            "policy_invalid",
            f"the policy is not valid, nothing was changed: {error}",
            "pillion policy check shows what a file says by itself",
            {"problems": [problem_to_json(each) for each in error.problems], "texts": dict(error.texts)},
        ) from None
    except NotAllowed as error:
        raise ApiError(403, "not_allowed", str(error), "", {"documents": error.refusals}) from None
    except PolicyConflict as error:
        documents = [
            {
                "document": each.document,
                "base": each.base,
                "yours": each.yours,
                "theirs": each.theirs,
                "author": each.author,
                "change": each.change,
            }
            for each in error.clashes
        ]
        raise ApiError(
            409,
            "conflict",
            f"{error}, nothing was changed",
            "bring the two together, and apply the result",
            {"documents": documents},
        ) from None


def _refuse_watched(call: Call, planned: Plan) -> None:
    """What a folder brings is changed there, whichever replica follows it."""
    replica, watched = call.replica, call.shared.watched
    documents = policy_of(replica.state).documents
    followed = {f"folder:{held.record.folder}" for held in replica.state.table(REPLICAS).values() if held.record.folder}
    files: dict[str, str] = {}
    for each in planned.diff:
        file = watched.file_of(each.document) if watched is not None else None
        held = documents.get(each.document)
        if file is None and held is not None and held.record.author in followed:
            file = f"{held.record.author.removeprefix('folder:')}/{held.record.file}"
        if file is not None:
            files[each.document] = file
    if files:
        first = next(iter(files))
        raise ApiError(
            409,
            "watched_folder",
            f"{first} is taken from the file {files[first]}, which a control plane follows",
            "change it there",
            {"documents": files},
        )


def _applied(planned: Plan, number: int | None, revision: int, dry_run: bool) -> Json:
    return {
        "change": number,
        "revision": revision,
        "diff": [{"document": each.document, "before": each.before, "after": each.after} for each in planned.diff],
        "problems": [problem_to_json(each) for each in planned.problems],
        "dry_run": dry_run,
    }


def _message(planned: Plan, message: str) -> str:
    names = ", ".join(each.document for each in planned.diff[:10])
    more = f" and {len(planned.diff) - 10} more" if len(planned.diff) > 10 else ""
    return f"{message}: {names}{more}" if message else names + more


# What sidecars say of it


async def status(call: Call) -> Json:
    """Answers at once where all have answered, or where too many wait already."""
    shared = call.shared
    revision = call.query["revision"]
    if revision is None:
        revision = policy_revision(call.replica.state)
    if shared.waiting >= WAITING_MAX:
        return _status(call, revision)
    shared.waiting += 1
    try:
        with trio.move_on_after(call.query["wait_s"]):
            while (answer := _status(call, revision))["waiting"]:
                await _something_happens(call)
            return answer
        return _status(call, revision)
    finally:
        shared.waiting -= 1


async def _something_happens(call: Call) -> None:
    """An answer of a sidecar that is connected here, or a change in the store."""
    replica = call.replica
    async with trio.open_nursery() as nursery:

        async def first(wait: Callable[[], Any]) -> None:
            await wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(first, partial(replica.changed, replica.state.revision))
        nursery.start_soon(first, replica.hub.answered)


def _status(call: Call, revision: int) -> Json:
    replica = call.replica
    table = replica.state.table(SIDECARS)
    accepted, rejected, waiting = 0, [], []
    here = connected(replica)
    for id, told in sorted(here.items()):
        held = table.get(id)
        who = {"sidecar": id, "service": held.record.service if held is not None else ""}
        if told.policy < revision:
            waiting.append(who)
        elif told.rejected:
            rejected.append({**who, "resources": dict(told.rejected)})
        else:
            accepted += 1
    return {
        "revision": revision,
        "connected": len(here),
        "accepted": accepted,
        "rejected": rejected,
        "waiting": waiting,
    }
