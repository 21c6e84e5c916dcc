"""Whether a policy holds together once a change is made, told with the places that matter.

Must not know the store's keys, nor who asks. Invariant: what did not stand before, and what the change does not name,
is no reason to refuse it; what it would break is.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from control_plane.state.records import Document
from sidecar.model.documents import SERVICES
from sidecar.model.lint import lint
from sidecar.model.problems import PROBLEMS_MAX, Problem, Severity, Sink
from sidecar.model.source import Source

from .catalogue import Compiled, Content, Part, compile_policy, content_of
from .history import Policy
from .refusals import PolicyInvalid


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to stand: `after` by document (None: nothing), only what changes; `parts`: of every document that is
    named, decoded; `texts` by file."""

    after: Mapping[str, Document | None]
    parts: Mapping[str, Part]
    texts: Mapping[str, str]


def try_out(now: Compiled, wanted: Wanted) -> Compiled:
    budget = Sink()

    class Shared(Sink):
        """Suggestions cost time: all services together have as many as one file."""

        def suggest(self, word: str, known: Iterable[str]) -> str:
            return budget.suggest(word, known)

    parts = dict(now.parts)
    levels = {"defaults": now.defaults, "enforced": now.enforced}
    for name in {*wanted.after, *wanted.parts}:
        part = wanted.parts.get(name)
        if not name.startswith(SERVICES):
            levels[name] = part
        elif part is not None:
            parts[name.removeprefix(SERVICES)] = part
        else:
            parts.pop(name.removeprefix(SERVICES), None)
    return compile_policy(now, levels["defaults"], levels["enforced"], parts, (), Shared)


def judge(
    policy: Policy, now: Compiled, trial: Compiled, wanted: Wanted
) -> tuple[tuple[Problem, ...], Mapping[str, str]]:
    """The warnings of what is named, and the texts that they stand in. Raises PolicyInvalid."""
    places = _Places(policy, wanted, trial.parts)
    problems: dict[tuple[str, Source, str], Problem] = {}
    for name in (*sorted(trial.broken), *sorted(wanted.parts.keys() - trial.broken.keys())):
        named = name in wanted.parts
        if len(problems) >= PROBLEMS_MAX:
            break
        if not named and trial.levels is not None and _same_errors(trial.broken[name], now.broken.get(name, ())):
            continue  # it did not stand before either
        for problem in trial.problems_of(name):
            if named or problem.severity is Severity.ERROR:
                told = places.tell(problem, name, named)
                problems.setdefault((told.code, told.source, told.message), told)
    failed = any(each.severity is Severity.ERROR for each in problems.values())
    if not failed:
        sink = Sink()
        lint(trial.snapshot, sink, {name.removeprefix(SERVICES) for name in wanted.parts})
        for problem in sink.problems():
            problems.setdefault((problem.code, problem.source, problem.message), problem)
    shown = sorted(problems.values(), key=lambda each: (each.severity is not Severity.ERROR, each.source, each.code))
    shown = sorted(shown[:PROBLEMS_MAX], key=lambda each: (each.source, each.code))
    if failed:
        raise PolicyInvalid(shown, places.texts())
    return tuple(shown), places.texts()


def _same_errors(one: Iterable[Problem], other: Iterable[Problem]) -> bool:
    return {(each.code, each.source) for each in one} == {(each.code, each.source) for each in other}


class _Places:
    """Where problems stand: in the files given, or in documents stored by earlier changes, whose files may have other
    lines by now; these are named `mesh.yaml (change 7)`."""

    def __init__(self, policy: Policy, wanted: Wanted, parts: Mapping[str, Part]) -> None:
        self._policy, self._wanted, self._parts = policy, wanted, parts
        self._stored: dict[str, Document] = {}

    def tell(self, problem: Problem, document: str, named: bool) -> Problem:
        if not named:
            causes = self._causes(document, problem)
            if causes:
                problem = replace(problem, label="; ".join(each for each in (problem.label, causes) if each))
        part = self._wanted.parts.get(document)
        if part is not None and _covers(part.content, problem.source):
            return problem
        for name in (document, "defaults", "enforced"):
            held = self._policy.documents.get(name)
            if name in self._wanted.parts or held is None or not _covers(content_of(held.record), problem.source):
                continue
            label = f"{held.record.file} (change {held.record.change})"
            self._stored[name] = replace(held.record, file=label)
            return replace(problem, source=replace(problem.source, file=label))
        return problem

    def _causes(self, broken: str, problem: Problem) -> str:
        """What of this change breaks a document that it does not name: what that refers to, or else what holds for
        all."""
        part = self._parts.get(broken.removeprefix(SERVICES))
        words = {*re.findall(r"[\w-]+", problem.message), *(part.refs if part is not None else ())}
        names = sorted(name for name in self._wanted.after if name.removeprefix(SERVICES) in words)
        found = []
        for name in names or sorted({"defaults", "enforced"} & self._wanted.after.keys()):
            document = self._wanted.after[name]
            held = self._policy.documents.get(name)
            if document is not None:
                found.append(f"{name} is changed ({provenance_of(document).partition(',')[0]})")
            elif held is not None:
                found.append(f"{name} is removed (it is at {provenance_of(held.record)})")
        return "; ".join(found[:4])

    def texts(self) -> Mapping[str, str]:
        return {**self._wanted.texts, **texts_of(self._stored.values())}


def _covers(content: Content, source: Source) -> bool:
    file, line, text, whole = content
    start = 1 if whole else line
    return source.file == file and start <= source.line <= start + text.count("\n")


def texts_of(documents: Iterable[Document]) -> dict[str, str]:
    """Texts by file with each document's lines where they stood."""
    lines: dict[str, dict[int, str]] = {}
    for each in documents:
        numbered = enumerate(each.text.split("\n"), 1 if each.whole else each.line)
        lines.setdefault(each.file, {}).update(numbered)
    return {
        file: "\n".join(found.get(number, "") for number in range(1, max(found) + 1)) for file, found in lines.items()
    }


def provenance_of(document: Document) -> str:
    """Where a document comes from, for people: `mesh.yaml:12, change 7 by ana`."""
    line = document.line
    if not document.whole:
        for each in document.text.split("\n"):
            if each.strip() and not each.lstrip().startswith("#"):
                break
            line += 1
    return f"{document.file}:{line}, change {document.change} by {document.author}"
