"""The policy in force: documents to services, again and again, doing anew only what changed.

A document is decoded once for its content; a service is resolved again where its document, `defaults` or `enforced`
changed, or a service that it calls or falls back to. Must not know the store, nor who wrote what. Invariants: what did
not change is the same object in the next snapshot; whatever way the same documents were reached, the snapshots are
equal; a document that does not stand takes no other down: its last good service stays, and where none is known it has
none, for a policy that cannot be read must not become an open door.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from control_plane.state.records import Document
from sidecar.model.documents import DEFAULTS, ENFORCED, SERVICES, decode_file, decode_piece, documents_of
from sidecar.model.kinds import Block, Stated
from sidecar.model.problems import Positioned, Problem, Severity, Sink
from sidecar.model.resolve import (
    Levels,
    add_calls,
    build_levels,
    build_service,
    fallback_circles,
    fallbacks_of,
    mirrors_of,
    report_circle,
)
from sidecar.model.snapshot import Service, Snapshot
from sidecar.model.source import BUILT_IN, Source
from sidecar.model.yaml_tree import Map

from .cut import Fragment

_NOWHERE = Map(BUILT_IN, 1)
_NOTHING = Stated(Block({}, _NOWHERE), _NOWHERE, _NOWHERE)
"""The document of a service that has none."""

Content = tuple[str, int, str, bool]  # file, line, text, whole


class Errors(Sink):
    """Keeps errors only, and has no time for suggestions."""

    def warning(self, code: str, message: str, at: Positioned | Source, label: str = "", help: str = "") -> None:
        pass

    def suggest(self, word: str, known: Iterable[str]) -> str:
        return ""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A document, decoded. `stated` None: it does not stand, for the reasons in `problems`. `refs`: the services that
    it calls or falls back to."""

    content: Content
    stated: Stated | None
    problems: tuple[Problem, ...]
    refs: frozenset[str]
    fallbacks: frozenset[str]
    digest: bytes


def content_of(document: Document) -> Content:
    return document.file, document.line, document.text, document.whole


def part_of(name: str, document: Document) -> Part:
    """The document called `name`: `defaults`, `enforced` or `services/NAME`."""
    sink = Errors()
    content = file, line, text, whole = content_of(document)
    if whole:
        block = decode_file(text, file, sink)
        stated = documents_of(block).get(name) if block is not None else None
    else:
        stated = decode_piece(name, text, file, line, sink)
    if stated is None and not sink.failed:
        sink.error("P0109", f"the file does not state {name}", Source(file, line, 1))
    return _part(content, None if sink.failed else stated, sink.problems())


def part_of_fragment(file: str, fragment: Fragment) -> Part:
    return _part((file, fragment.line, fragment.text, fragment.whole), fragment.stated, ())


def _damaged(name: str, why: str) -> Part:
    problem = Problem("P0100", Severity.ERROR, f"what the store keeps of {name} cannot be read: {why}", Source(name))
    return _part((name, 0, why, False), None, (problem,))


def _part(content: Content, stated: Stated | None, problems: tuple[Problem, ...]) -> Part:
    fallbacks = frozenset(fallbacks_of(stated)) if stated is not None else frozenset()
    calls = stated.value.get("calls") if stated is not None else None
    others = fallbacks.union(calls or (), mirrors_of(stated) if stated is not None else ())
    digest = hashlib.sha256("\0".join(map(str, content)).encode(errors="replace")).digest()
    return Part(content, stated, problems, others, fallbacks, digest)


@dataclass(frozen=True, slots=True, eq=False)
class _Built:
    """One service as it came out. `base`: without calls; `service` None: there were errors."""

    part: Part | None  # None: of a service without a document
    base: Service
    service: Service | None
    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Compiled:
    """All that is known after one round. Never changed: a trial begins from it and leaves it as it is."""

    defaults: Part | None = None
    enforced: Part | None = None
    levels: Levels | None = None  # None: none that may be used is known
    good: tuple[Part | None, Part | None] = (None, None)  # the `defaults` and `enforced` that `levels` are made of
    level_problems: Mapping[str, tuple[Problem, ...]] = field(default_factory=dict)
    parts: Mapping[str, Part] = field(default_factory=dict)
    built: Mapping[str, _Built] = field(default_factory=dict)
    snapshot: Snapshot = field(default_factory=Snapshot)
    broken: Mapping[str, tuple[Problem, ...]] = field(default_factory=dict)

    def problems_of(self, name: str) -> tuple[Problem, ...]:
        """What is said of a document, warnings included where they were asked for."""
        if name in (DEFAULTS, ENFORCED):
            return self.level_problems.get(name, ())
        built = self.built.get(name.removeprefix(SERVICES))
        return (*self.broken.get(name, ()), *(built.problems if built is not None else ()))


class Catalogue:
    """The compiled policy of a control plane."""

    def __init__(self) -> None:
        self.compiled = Compiled()
        self._expected: dict[tuple[str, Content], Part] = {}
        self._trial: tuple[Compiled, Compiled] | None = None  # what it began from, and what came out

    @property
    def snapshot(self) -> Snapshot:
        """All services, with provenance."""
        return self.compiled.snapshot

    @property
    def broken(self) -> Mapping[str, tuple[Problem, ...]]:
        """The documents that do not stand, by name (`defaults`, `enforced`, `services/NAME`), and why."""
        return self.compiled.broken

    def update(
        self,
        defaults: Document | None,
        enforced: Document | None,
        services: Mapping[str, Document],
        implicit: Collection[str] = (),
        damaged: Mapping[str, str] | None = None,
    ) -> None:
        """`implicit`: services that are there without a document. `damaged`: documents that cannot be read from the
        store, and why: they are none, and yet not absent."""
        levels, parts = self.parts(defaults, enforced, services, damaged or {})
        trial = self._foreseen(levels, parts) if not implicit else None
        self.compiled = compile_policy(trial or self.compiled, *levels, parts, implicit)
        self._expected, self._trial = {}, None

    def parts(
        self,
        defaults: Document | None,
        enforced: Document | None,
        services: Mapping[str, Document],
        damaged: Mapping[str, str],
    ) -> tuple[tuple[Part | None, Part | None], dict[str, Part]]:
        """Documents decoded; those known from before are the same objects."""
        known = self.compiled
        parts = {n: self._part(SERVICES + n, services[n], known.parts.get(n)) for n in services}
        levels = [
            None if document is None else self._part(name, document, before)
            for name, document, before in ((DEFAULTS, defaults, known.defaults), (ENFORCED, enforced, known.enforced))
        ]
        for name, why in damaged.items():
            service = name.removeprefix(SERVICES)
            if name in (DEFAULTS, ENFORCED):
                index = int(name == ENFORCED)
                if levels[index] is None:
                    levels[index] = _kept(_damaged(name, why), (known.defaults, known.enforced)[index])
            elif service not in parts:
                parts[service] = _kept(_damaged(name, why), known.parts.get(service))
        return (levels[0], levels[1]), parts

    def _part(self, name: str, document: Document, before: Part | None) -> Part:
        content = content_of(document)
        if before is not None and before.content == content:
            return before
        return self._expected.get((name, content)) or part_of(name, document)

    def expect(self, parts: Mapping[str, Part], before: Compiled, after: Compiled) -> None:
        """Parts of documents (by name) that are about to come, so that they need not be decoded again; and what they
        make of `before`, so that it need not be resolved again."""
        self._expected = {(name, part.content): part for name, part in parts.items()}
        self._trial = before, after

    def _foreseen(self, levels: tuple[Part | None, Part | None], parts: Mapping[str, Part]) -> Compiled | None:
        """What was foreseen, where exactly that has come, to what stood then."""
        if self._trial is None or self._trial[0] is not self.compiled:
            return None
        trial = self._trial[1]
        same = trial.defaults is levels[0] and trial.enforced is levels[1] and trial.parts == parts
        return trial if same and trial.built.keys() == parts.keys() else None


def _kept(fresh: Part, before: Part | None) -> Part:
    return before if before is not None and before.content == fresh.content else fresh


def compile_policy(
    before: Compiled,
    defaults: Part | None,
    enforced: Part | None,
    parts: Mapping[str, Part],
    implicit: Collection[str],
    sinks: Callable[[], Sink] = Errors,
) -> Compiled:
    """The next round. `sinks` makes what problems are told to; of services that are not resolved again those of the
    round before hold."""
    stated = dict.fromkeys(implicit, _NOTHING)
    stated |= {name: part.stated or _NOTHING for name, part in parts.items()}
    levels, good, level_problems, broken = _levels(before, defaults, enforced, stated, sinks)
    if levels is None:  # nothing may be served by levels that cannot be read, nor without them
        return replace(before, defaults=defaults, enforced=enforced, level_problems=level_problems, broken=broken)
    same_levels = levels is before.levels
    dirty = _dirty(before, parts, stated.keys()) if same_levels else stated.keys()
    built = {name: before.built[name] for name in stated if name not in dirty}
    for name, each in _build(before, dirty, stated, parts, levels, built, sinks).items():
        old = before.built.get(name)
        same = old is not None and same_levels and old.part is each.part and old.service == each.service
        built[name] = replace(each, service=old.service) if same and old is not None else each
    circles = _circles(parts, stated)
    services = {}
    for name in sorted(stated):
        service, part = built[name].service, parts.get(name)
        if service is None or name in circles:
            why = (*(part.problems if part is not None else ()), *circles.get(name, ()), *built[name].problems)
            broken[SERVICES + name] = tuple(each for each in why if each.severity is Severity.ERROR)
            service = before.snapshot.services.get(name)
        if service is not None:
            services[name] = service
    snapshot = Snapshot(services, _revision(defaults, enforced, parts, stated.keys()))
    if _same(snapshot, before.snapshot):
        snapshot = before.snapshot
    return Compiled(defaults, enforced, levels, good, level_problems, dict(parts), built, snapshot, broken)


def _levels(
    before: Compiled, defaults: Part | None, enforced: Part | None, services: Collection[str], sinks: Callable[[], Sink]
) -> tuple[
    Levels | None, tuple[Part | None, Part | None], Mapping[str, tuple[Problem, ...]], dict[str, tuple[Problem, ...]]
]:
    """Where one does not stand, the last good one holds."""
    if before.defaults is defaults and before.enforced is enforced and before.levels is not None:
        broken = {n: before.broken[n] for n in (DEFAULTS, ENFORCED) if n in before.broken}
        return before.levels, before.good, before.level_problems, broken
    said: dict[str, tuple[Problem, ...]] = {}
    broken = {}
    good: list[Part | None] = []
    for index, (name, part) in enumerate(((DEFAULTS, defaults), (ENFORCED, enforced))):
        problems = part.problems if part is not None else ()
        if part is not None and part.stated is not None:
            sink = sinks()
            build_levels(part.stated if not index else None, part.stated if index else None, services, sink)
            problems = sink.problems()
        said[name] = problems
        errors = tuple(each for each in problems if each.severity is Severity.ERROR)
        if errors:
            broken[name] = errors
            if before.levels is None:
                return None, before.good, said, broken
            part = before.good[index]
        good.append(part)
    if before.levels is not None and before.good == (good[0], good[1]):
        return before.levels, before.good, said, broken
    first, last = ((part.stated if part is not None else None) for part in good)
    return build_levels(first, last, services, Errors()), (good[0], good[1]), said, broken


def _dirty(before: Compiled, parts: Mapping[str, Part], names: Collection[str]) -> set[str]:
    moved = {name for name, part in parts.items() if before.parts.get(name) is not part}
    moved |= before.parts.keys() - parts.keys()
    moved |= before.built.keys() ^ names
    dirty = moved & set(names)
    if moved:
        dirty.update(name for name, part in parts.items() if part.refs and not part.refs.isdisjoint(moved))
    return dirty


def _build(
    before: Compiled,
    dirty: Collection[str],
    stated: Mapping[str, Stated],
    parts: Mapping[str, Part],
    levels: Levels,
    clean: Mapping[str, _Built],
    sinks: Callable[[], Sink],
) -> dict[str, _Built]:
    told = {name: sinks() for name in dirty}
    bases = {name: each.base for name, each in clean.items()}
    for name in sorted(dirty):
        part, old = parts.get(name), before.built.get(name)
        if part is not None and part.stated is None and old is not None:
            bases[name] = old.base  # for those who call it
        else:
            bases[name] = build_service(name, stated[name], stated, levels, told[name])
    ceilings: dict[str, Mapping[str, float]] = {}
    found = {}
    for name in sorted(dirty):
        part = parts.get(name)
        service: Service | None = add_calls(bases[name], stated[name], bases, stated, ceilings, told[name])
        if told[name].failed or (part is not None and part.stated is None):
            service = None
        found[name] = _Built(part, bases[name], service, told[name].problems())
    return found


def _circles(parts: Mapping[str, Part], stated: Mapping[str, Stated]) -> dict[str, tuple[Problem, ...]]:
    """The services that fall back to each other in a circle, each told of it at its own place."""
    edges = {name: part.fallbacks for name, part in parts.items() if part.fallbacks}
    found: dict[str, tuple[Problem, ...]] = {}
    for circle in fallback_circles(edges):
        for index, name in enumerate(circle, 1):
            sink = Errors()
            report_circle([*circle[index:], *circle[:index]], stated, sink)
            found[name] = (*found.get(name, ()), *sink.problems())
    return found


def _revision(defaults: Part | None, enforced: Part | None, parts: Mapping[str, Part], names: Collection[str]) -> str:
    digest = hashlib.sha256()
    for part in (defaults, enforced, *(parts.get(name) for name in sorted(names))):
        digest.update(part.digest if part is not None else b"-")
    digest.update("\0".join(sorted(names)).encode())
    return f"sha256:{digest.hexdigest()[:16]}"


def _same(one: Snapshot, other: Snapshot) -> bool:
    if one.revision != other.revision or one.services.keys() != other.services.keys():
        return False
    return all(one.services[name] is service for name, service in other.services.items())
