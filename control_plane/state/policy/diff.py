"""Policy before and after, for people. Must not know the store."""

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Difference:
    """One document; None: there is no such document. The files are where the texts stand."""

    document: str
    before: str | None
    after: str | None
    file_before: str = ""
    file_after: str = ""


def unified_diff(differences: Iterable[Difference]) -> str:
    """As `diff -u` shows it, document by document."""
    return "".join(line for each in differences for line in _lines(each))


def _lines(each: Difference) -> Iterator[str]:
    old = "" if each.before is None else each.before
    new = "" if each.after is None else each.after
    before = "/dev/null" if each.before is None else _label(each.document, each.file_before)
    after = "/dev/null" if each.after is None else _label(each.document, each.file_after)
    if old == new:
        yield f"--- {before}\n+++ {after}\n"
        return
    for line in difflib.unified_diff(old.splitlines(), new.splitlines(), before, after, lineterm=""):
        yield f"{line}\n"


def _label(document: str, file: str) -> str:
    return f"{document} ({file})" if file else document
