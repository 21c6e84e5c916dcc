"""Why a change of the policy is not made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sidecar.model.problems import Problem, Severity


class PolicyError(Exception):
    """Nothing was changed."""


class PolicyInvalid(PolicyError):
    """`problems` may stand in the files given or in what is stored; `texts` has the text of each of their places."""

    def __init__(self, problems: Sequence[Problem], texts: Mapping[str, str]) -> None:
        first = next((each for each in problems if each.severity is Severity.ERROR), None)
        super().__init__(f"{first.source}: {first.message}" if first is not None else "the policy is not valid")
        self.problems, self.texts = tuple(problems), texts


@dataclass(frozen=True, slots=True)
class Clash:
    """A document that somebody else changed meanwhile. `base`: what the caller read, where that is still known;
    None: no such document. `change`: the last one that touched it, by `author`."""

    document: str
    base: str | None
    theirs: str | None
    yours: str | None
    author: str
    change: int
    base_known: bool = True


class PolicyConflict(PolicyError):
    def __init__(self, clashes: Sequence[Clash]) -> None:
        super().__init__("; ".join(f"{each.document} was changed by {each.author} meanwhile" for each in clashes))
        self.clashes = tuple(clashes)


class NotAllowed(PolicyError):
    """`refusals`: why, by document."""

    def __init__(self, refusals: Mapping[str, str]) -> None:
        super().__init__("; ".join(refusals.values()))
        self.refusals = dict(refusals)
