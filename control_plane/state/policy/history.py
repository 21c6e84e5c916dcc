"""The policy that stands in the store: documents under their own keys, and the changes that go before them.

A transaction holds few operations, a change of many documents does not fit: so a Change record is what makes a change
happen, in one transaction, and its documents reach their own keys with it if they are few, or afterwards, a few at a
time (`settle`). Must not know what a document says. Invariant: `policy_of` gives the same before, while and after a
change is settled; changes are made one after the other, each knowing all before it, since each makes the key of the
next number.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from control_plane.state.mirror import Held, State
from control_plane.state.records import (
    CHANGES,
    DEFAULTS,
    ENFORCED,
    SERVICES,
    SETTLED,
    Change,
    Document,
    Settled,
    change_key,
    encode,
)
from control_plane.store.base import Compare, Delete, Operation, Put

HISTORY_MAX = 200  # changes that are kept
HISTORY_BYTES_MAX = 32 * 1024 * 1024
FORGOTTEN_AT_ONCE = 4
SETTLED_AT_ONCE, SETTLED_BYTES_MAX = 50, 512 * 1024
_FOLDER = "policy/"


@dataclass(frozen=True, slots=True)
class Step:
    """One transaction."""

    operations: tuple[Operation, ...]
    compares: tuple[Compare, ...]


@dataclass(frozen=True, slots=True)
class Policy:
    """All documents by name (`defaults`, `enforced`, `services/NAME`) at one revision of the store; `revision` of a
    document is that of the change that brought it. `own`: what stands under the documents' own keys; `damaged`:
    documents whose key holds no record of ours, and why."""

    revision: int
    documents: Mapping[str, Held[Document]]
    changes: Mapping[int, Held[Change]]
    own: Mapping[str, Held[Document]]
    damaged: Mapping[str, str]
    settled: int
    latest: int  # the number of the last change, kept or not

    @property
    def defaults(self) -> Document | None:
        return self._record("defaults")

    @property
    def enforced(self) -> Document | None:
        return self._record("enforced")

    @property
    def services(self) -> Mapping[str, Document]:
        """By the service's name."""
        prefix = SERVICES.removeprefix(_FOLDER)
        return {n.removeprefix(prefix): h.record for n, h in self.documents.items() if n.startswith(prefix)}

    def _record(self, name: str) -> Document | None:
        held = self.documents.get(name)
        return None if held is None else held.record


def document_key(name: str) -> str:
    return _FOLDER + name


def policy_of(state: State) -> Policy:
    own: dict[str, Held[Document]] = {}
    for kind in (DEFAULTS, ENFORCED, SERVICES):
        for name, held in state.table(kind).items():
            own[(kind + name).removeprefix(_FOLDER)] = held
    changes = {int(name): held for name, held in sorted(state.table(CHANGES).items()) if name.isdigit()}
    mark: Settled | None = state.get(SETTLED)
    settled = mark.change if mark is not None else 0
    damaged = {}
    latest = max(settled, *changes, *(held.record.change for held in own.values()), 0)
    for key, why in state.problems.items():
        if key in (DEFAULTS, ENFORCED) or key.startswith(SERVICES):
            damaged[key.removeprefix(_FOLDER)] = why
        elif key.startswith(CHANGES) and key.removeprefix(CHANGES).isdigit():
            latest = max(latest, int(key.removeprefix(CHANGES)))
    documents: dict[str, Held[Document]] = {}
    for name, held in own.items():
        by = changes.get(held.record.change)
        documents[name] = Held(held.record, by.revision) if by is not None else held
    for number, change in changes.items():
        if number <= settled:
            continue
        for name, document in change.record.after.items():
            if document is None:
                documents.pop(name, None)
            else:
                documents[name] = Held(document, change.revision)
    for name in damaged.keys() - documents.keys():
        newest = max((n for n, change in changes.items() if name in change.record.after), default=0)
        document = changes[newest].record.after[name] if newest else None
        if document is not None:  # what is lost under its own key is still known from the change
            documents[name] = Held(document, changes[newest].revision)
    return Policy(state.revision, documents, changes, own, damaged, settled, latest)


def settle(policy: Policy) -> Step | None:
    """The next transaction that brings documents under their own keys; None where nothing is left to do."""
    if not policy.changes or policy.settled >= max(policy.changes):
        return None
    touched = {n for number, held in policy.changes.items() if number > policy.settled for n in held.record.after}
    wanted = {name: policy.documents.get(name) for name in sorted(touched)}
    behind = [name for name, held in wanted.items() if _record(held) != _record(policy.own.get(name))]
    operations: list[Operation] = []
    size = 0
    for name in behind[:SETTLED_AT_ONCE]:
        held = wanted[name]
        value = b"" if held is None else encode(held.record)
        size += len(value)
        if operations and size > SETTLED_BYTES_MAX:
            break
        operations.append(Delete(document_key(name)) if held is None else Put(document_key(name), value))
    done = behind[: len(operations)]
    if len(done) == len(behind):
        operations.append(Put(document_key("settled"), encode(Settled(max(policy.changes)))))
    compares = [
        Compare(document_key(name), policy.own[name].revision if name in policy.own else 0)
        for name in done
        if name not in policy.damaged
    ]
    return Step(tuple(operations), (Compare(change_key(policy.latest + 1), 0), *compares))


def _record(held: Held[Document] | None) -> Document | None:
    return None if held is None else held.record


def forget(policy: Policy) -> list[Operation]:
    """Changes that are too old to be kept with one more; a few at a time."""
    old: list[Operation] = []
    kept, held_bytes = 1, 0
    for number, held in sorted(policy.changes.items(), reverse=True):
        kept += 1
        held_bytes += sum(
            len(document.text)
            for documents in (held.record.before, held.record.after)
            for document in documents.values()
            if document is not None
        )
        if (kept > HISTORY_MAX or held_bytes > HISTORY_BYTES_MAX) and number <= policy.settled:
            old.append(Delete(change_key(number)))
    return old[-FORGOTTEN_AT_ONCE:]


def before_change(policy: Policy, revision: int) -> dict[str, tuple[int, Document | None]]:
    """What every document that changed after this revision of the store was at it, and the last change that touched
    it since."""
    return _undone(policy, [n for n, held in policy.changes.items() if held.revision > revision])


def state_after(policy: Policy, number: int) -> dict[str, Document | None]:
    """What the documents that changed since were after a change. Raises LookupError where that is not known."""
    later = [each for each in policy.changes if each > number]
    if number < 0 or number > policy.latest:
        raise LookupError(f"there is no change {number}; the last one is {policy.latest}")
    if sorted(later) != list(range(number + 1, policy.latest + 1)):
        oldest = min(policy.changes, default=policy.latest)
        raise LookupError(f"what was after change {number} is no longer known; the oldest change kept is {oldest}")
    return {name: document for name, (_, document) in _undone(policy, later).items()}


def _undone(policy: Policy, numbers: list[int]) -> dict[str, tuple[int, Document | None]]:
    found: dict[str, tuple[int, Document | None]] = {}
    for number in sorted(numbers):
        for name, document in policy.changes[number].record.before.items():
            found[name] = (number, found[name][1] if name in found else document)
    return found
