"""What an `apply` or a rollback does: judged as a whole, then one transaction or none.

Must not know who asks (whoever calls says what they may) nor when (`at`). Invariants: nothing is planned that would
leave a policy with an error it did not have; documents that stay as they are are not touched; of two plans made from
the same state one commit fails, since both make the key of the next change.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from control_plane.state.records import SETTLED, Change, Document, Settled, change_key, encode
from control_plane.store.base import VALUE_BYTES_MAX, Compare, Delete, Operation, Put
from sidecar.model.documents import SERVICES, add_documents, decode_file, documents_of
from sidecar.model.problems import Problem, Severity, Sink
from sidecar.model.resolve import Documents
from sidecar.model.snapshot import Snapshot
from sidecar.model.source import Source
from sidecar.model.yaml_tree import normalise

from .catalogue import Catalogue, Compiled, Part, compile_policy, part_of, part_of_fragment
from .cut import Fragment, cut_block
from .diff import Difference
from .history import Policy, before_change, document_key, forget, state_after
from .judge import Wanted, judge, texts_of, try_out
from .refusals import Clash, NotAllowed, PolicyConflict, PolicyInvalid

DIRECT_MAX = 48  # documents that are written under their own keys together with the change
DIRECT_BYTES_MAX = 1024 * 1024
DOCUMENT_CHARS_MAX = 256 * 1024
FILE_NAME_MAX = 255

Owners = Collection[str]
May = Callable[[str, Owners | None, Owners | None], str | None]
"""Why a document may not be replaced: its name, the owners it states before and after (None: no such document)."""


@dataclass(frozen=True, slots=True)
class Plan:
    """`change`: the number it will have; where nothing changes there are no operations, and it is that of the last
    change. `problems`: warnings; `texts`: the texts that they stand in."""

    change: int
    operations: tuple[Operation, ...]
    compares: tuple[Compare, ...]
    diff: tuple[Difference, ...]
    problems: tuple[Problem, ...]
    texts: Mapping[str, str]
    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class _By:
    author: str
    at: float
    message: str
    source: str
    may: May


def plan_apply(
    policy: Policy,
    files: Mapping[str, str],
    *,
    author: str,
    at: float,
    may: May = lambda document, before, after: None,
    base: int | None = None,
    prune: bool = False,
    prune_author: str | None = None,
    message: str = "",
    source: str = "apply",
    catalogue: Catalogue | None = None,
) -> Plan:
    """The documents of `files` (texts by name) put in place of those of the same names. `base`: the revision of the
    store that the caller has read; what changed after it is a conflict. `prune`: services that the files do not name
    go; `prune_author`: so does whatever only this author has brought. Raises PolicyInvalid, NotAllowed,
    PolicyConflict."""
    number = policy.latest + 1
    found, texts = _read(files)
    after: dict[str, Document | None] = {}
    for name, (file, piece) in found.items():
        held = policy.documents.get(name)
        document = Document(file, piece.line, piece.text, author, at, number, piece.whole)
        if held is None or not _unchanged(held.record, document):
            after[name] = document
    for name, held in policy.documents.items():
        ours = prune_author is not None and held.record.author == prune_author
        if name not in found and (ours or (prune and name.startswith(SERVICES))):
            after[name] = None
    parts = {name: part_of_fragment(file, piece) for name, (file, piece) in found.items()}
    by = _By(author, at, message, source, may)
    return _plan(policy, Wanted(after, parts, texts), base, by, catalogue or Catalogue())


def plan_rollback(
    policy: Policy,
    to: int,
    *,
    author: str,
    at: float,
    may: May = lambda document, before, after: None,
    base: int | None = None,
    message: str = "",
    catalogue: Catalogue | None = None,
) -> Plan:
    """All documents as they were after change `to` (0: before the first one). Raises LookupError where that is not
    known, and what `plan_apply` raises."""
    number = policy.latest + 1
    after: dict[str, Document | None] = {}
    for name, document in state_after(policy, to).items():
        held = policy.documents.get(name)
        if document is None and held is not None:
            after[name] = None
        elif document is not None and (held is None or not _unchanged(held.record, document)):
            after[name] = replace(document, author=author, applied=at, change=number)
    parts = {name: part_of(name, document) for name, document in after.items() if document is not None}
    texts = texts_of(document for document in after.values() if document is not None)
    by = _By(author, at, message or f"rollback to change {to}", "rollback", may)
    return _plan(policy, Wanted(after, parts, texts), base, by, catalogue or Catalogue())


def _unchanged(one: Document, other: Document) -> bool:
    return (one.file, one.text, one.whole) == (other.file, other.text, other.whole)


def _read(files: Mapping[str, str]) -> tuple[dict[str, tuple[str, Fragment]], dict[str, str]]:
    """The documents of all files, and the texts that positions refer to. Raises PolicyInvalid."""
    sink = Sink()
    documents = Documents()
    texts: dict[str, str] = {}
    found: dict[str, tuple[str, Fragment]] = {}
    if not files:
        sink.error("P0100", "no policy file is given", Source(""))
    for file in sorted(files):
        if not file or len(file) > FILE_NAME_MAX or not file.isprintable():
            sink.error("P0100", f"not a name for a file: {file[:60]!r}", Source(""))
            continue
        texts[file] = normalise(files[file])
        block = decode_file(texts[file], file, sink)
        if block is None:
            continue
        add_documents(documents_of(block), documents, sink)
        if not sink.failed:
            found |= {name: (file, piece) for name, piece in cut_block(texts[file], file, block, sink).items()}
    for _, piece in found.values():
        if len(piece.text) > DOCUMENT_CHARS_MAX:
            sink.error("P0114", f"a document holds more than {DOCUMENT_CHARS_MAX // 1024} KB", piece.stated.key)
    if sink.failed:
        raise PolicyInvalid(sink.problems(), texts)
    return found, texts


def _plan(policy: Policy, wanted: Wanted, base: int | None, by: _By, catalogue: Catalogue) -> Plan:
    known = catalogue.compiled
    levels, parts = catalogue.parts(policy.defaults, policy.enforced, policy.services, policy.damaged)
    now = compile_policy(known, *levels, parts, ())
    _check_rights(policy, now, wanted, by.may)
    if base is not None:
        _check_base(policy, wanted, base)
    trial = try_out(now, wanted)
    warnings, texts = judge(policy, now, trial, wanted)
    diff = tuple(_difference(name, policy, document) for name, document in sorted(wanted.after.items()))
    if not wanted.after:
        return Plan(policy.latest, (), (), (), warnings, texts, trial.snapshot)
    coming = {name: wanted.parts[name] for name, document in wanted.after.items() if document is not None}
    catalogue.expect(coming, known, trial)
    operations, compares = _transaction(policy, wanted, by)
    return Plan(policy.latest + 1, operations, compares, diff, warnings, texts, trial.snapshot)


def _difference(name: str, policy: Policy, after: Document | None) -> Difference:
    held = policy.documents.get(name)
    before = held.record if held is not None else None
    return Difference(
        name,
        before.text if before is not None else None,
        after.text if after is not None else None,
        before.file if before is not None else "",
        after.file if after is not None else "",
    )


# -- may they, and did somebody else


def _check_rights(policy: Policy, now: Compiled, wanted: Wanted, may: May) -> None:
    refusals = {}
    for name, document in sorted(wanted.after.items()):
        before = _owners(_part_now(now, name)) if name in policy.documents or name in policy.damaged else None
        after = _owners(wanted.parts.get(name)) if document is not None else None
        refusal = may(name, before, after)
        if refusal is not None:
            refusals[name] = refusal
    if refusals:
        raise NotAllowed(refusals)


def _part_now(compiled: Compiled, name: str) -> Part | None:
    if name.startswith(SERVICES):
        return compiled.parts.get(name.removeprefix(SERVICES))
    return compiled.defaults if name == "defaults" else compiled.enforced


def _owners(part: Part | None) -> Owners:
    """Of what cannot be read nobody is known to be the owner."""
    if part is None or part.stated is None or "owners" not in part.stated.value.fields:
        return ()
    owners: Owners = part.stated.value.get("owners") or ()
    return owners


def _check_base(policy: Policy, wanted: Wanted, base: int) -> None:
    since = before_change(policy, base)
    clashes = []
    for name, document in sorted(wanted.after.items()):
        held = policy.documents.get(name)
        yours = document.text if document is not None else None
        theirs = held.record.text if held is not None else None
        if name in since:
            number, was = since[name]
            author = policy.changes[number].record.author
            clashes.append(Clash(name, was.text if was is not None else None, theirs, yours, author, number))
        elif held is not None and held.revision > base:
            record = held.record
            clashes.append(Clash(name, None, theirs, yours, record.author, record.change, base_known=False))
    if clashes:
        raise PolicyConflict(clashes)


# -- what is written


def _transaction(policy: Policy, wanted: Wanted, by: _By) -> tuple[tuple[Operation, ...], tuple[Compare, ...]]:
    number = policy.latest + 1
    before = {name: held.record if (held := policy.documents.get(name)) else None for name in wanted.after}
    change = encode(Change(by.author, by.at, by.message, before, dict(wanted.after), by.source))
    if len(change) > VALUE_BYTES_MAX:
        text = f"a change of {len(change)} bytes does not fit into one transaction"
        problem = Problem("P0114", Severity.ERROR, text, Source(""), help="apply it in several parts")
        raise PolicyInvalid((problem,), wanted.texts)
    operations: list[Operation] = [Put(change_key(number), change), *forget(policy)]
    compares = [Compare(change_key(number), 0)]
    own: list[Operation] = []
    if len(wanted.after) <= DIRECT_MAX:
        for name, document in sorted(wanted.after.items()):
            key = document_key(name)
            if document is not None:
                own.append(Put(key, encode(document)))
            elif name in policy.own or name in policy.damaged:
                own.append(Delete(key))
    if own and len(change) + sum(len(each.value) for each in own if isinstance(each, Put)) <= DIRECT_BYTES_MAX:
        operations += own
        for name in sorted(wanted.after):
            if name not in policy.damaged:
                revision = policy.own[name].revision if name in policy.own else 0
                compares.append(Compare(document_key(name), revision))
        if not any(each > policy.settled for each in policy.changes):
            operations.append(Put(SETTLED, encode(Settled(number))))
    return tuple(operations), tuple(compares)
