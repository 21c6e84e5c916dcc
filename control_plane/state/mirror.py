"""All records of the store at one revision, in memory.

Built from a View, kept up to date by Batches; both say which records changed. Must not know what the records are for.
Invariants: it is of exactly one revision; a key that holds no record of ours is in `problems` with the reason, and
stands for nothing (or for what `stand_ins` has for it); what a View and a sequence of Batches give for one revision is
the same.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from control_plane.store.base import Batch, Entry, View

from .records import KINDS, META, Meta, RecordError, decode, kind_of

R = TypeVar("R")

PROBLEMS_MAX = 1000


@dataclass(frozen=True, slots=True)
class Held(Generic[R]):
    """A record and the revision of its last change, for a compare-and-set."""

    record: R
    revision: int
    lease: int = 0


Changed = list[tuple[str, str]]
"""(kind, name) of each record that came, changed or went."""

_NOTHING: Mapping[str, Held[Any]] = {}


class State:
    """What a control plane knows. `stand_ins`: records that it knows for certain from elsewhere, by key; they count
    where the store has something there that cannot be read."""

    def __init__(self, stand_ins: Mapping[str, Any] | None = None) -> None:
        self.stand_ins: dict[str, Any] = dict(stand_ins or {})
        self.revision = 0
        self.problems: dict[str, str] = {}
        self._tables: dict[str, dict[str, Held[Any]]] = {kind: {} for kind in KINDS}
        self._revisions: dict[str, int] = {}  # of every key, also of those that stand for nothing

    def table(self, kind: str) -> Mapping[str, Held[Any]]:
        """The records of one kind by name (for a kind that is one key: under "")."""
        return self._tables[kind]

    def get(self, kind: str, name: str = "") -> Any:
        """One record, or None."""
        held = self._tables[kind].get(name)
        return None if held is None else held.record

    @property
    def meta(self) -> Meta | None:
        meta: Meta | None = self.get(META)
        return meta

    def __iter__(self) -> Iterator[tuple[str, str, Held[Any]]]:
        for kind, table in self._tables.items():
            for name, held in table.items():
                yield kind, name, held

    def load(self, view: View) -> Changed:
        """Everything anew: what changed against what was known."""
        changed: Changed = []
        for key in [key for key in self._revisions if key not in view.entries]:
            self._set(key, None, changed)
        for key, entry in view.entries.items():
            if self._revisions.get(key) != entry.revision:
                self._set(key, entry, changed)
        self.revision = view.revision
        return changed

    def apply(self, batch: Batch) -> Changed:
        assert batch.revision >= self.revision, "batches come in order"
        changed: Changed = []
        for event in batch.events:
            self._set(event.key, event.entry, changed)
        self.revision = batch.revision
        return changed

    def _set(self, key: str, entry: Entry | None, changed: Changed) -> None:
        if entry is None:
            self._revisions.pop(key, None)
        else:
            self._revisions[key] = entry.revision
        damaged = self.problems.pop(key, None) is not None
        kind = kind_of(key)
        if kind is None:
            if entry is not None:
                self._problem(key, "not a key of pillion")
            return
        name = key[len(kind) :]
        table = self._tables[kind]
        if entry is None:
            if table.pop(name, None) is not None or damaged:
                changed.append((kind, name))
            return
        try:
            record = decode(KINDS[kind], entry.value)
        except RecordError as error:
            self._problem(key, str(error))
            record = self.stand_ins.get(key)
            if record is None:
                table.pop(name, None)
                changed.append((kind, name))
                return
        before = table.get(name)
        table[name] = Held(record, entry.revision, entry.lease)
        if before is None or before.record != record or before.lease != entry.lease:
            changed.append((kind, name))

    def _problem(self, key: str, text: str) -> None:
        if len(self.problems) < PROBLEMS_MAX:
            self.problems[key] = text
