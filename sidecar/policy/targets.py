"""Other targets than the one that was asked for: rewritten paths, the Location of a redirect, and the fields of what a
route answers by itself.

A path that ends with `/**` takes over what `**` stands for in the route's own `match.path`. Pure; must not know
connections. Invariants: a path begins with exactly one slash where the policy's part of it ends before the request's
part begins, so that no request makes `//elsewhere` of it; the query stays unless the policy states another.
"""

import re
from dataclasses import dataclass

from sidecar.model.snapshot import HeaderEdit, Match, Redirect, Rewrite

Field = tuple[bytes, bytes]

_PARTS = re.compile(r"(?:(https?://)([^/?#]*))?([^?#]*)(.*)\Z", re.DOTALL)
TREE = "/**"
PLAIN_TEXT = (b"content-type", b"text/plain; charset=utf-8")


@dataclass(frozen=True, slots=True)
class Replaced:
    """A path in the place of another. `depth`: after how many segments of that one the part begins that is kept; None:
    nothing is."""

    path: bytes
    depth: int | None

    def of(self, path: bytes) -> bytes:
        """In the place of this path, which has no query."""
        if self.depth is None:
            return self.path
        at = 0
        for _ in range(self.depth):
            at = path.find(b"/", at + 1)
            if at < 0:
                return self.path or b"/"
        if self.path:
            return self.path + path[at:]
        # A browser reads "//" and "/\" at the beginning of a Location as the beginning of a host.
        return b"/" + path[at:].lstrip(b"/\\")


@dataclass(frozen=True, slots=True)
class Rewriting:
    """What a route's `rewrite` does; None: that stays as it is."""

    path: Replaced | None
    host: bytes | None

    def target(self, target: bytes) -> bytes:
        """A path with its query, rewritten."""
        if self.path is None:
            return target
        path, mark, query = target.partition(b"?")
        return self.path.of(path) + mark + query


@dataclass(frozen=True, slots=True)
class Redirecting:
    """What a route's `redirect` answers. `origin`: scheme and host; b"" for those of the request, a scheme alone for
    its host. `path` None: that of the request. `tail`: a query or fragment that the policy states."""

    status: int
    origin: bytes
    path: Replaced | None
    tail: bytes
    fields: tuple[Field, ...]

    def location(self, target: bytes, host: bytes) -> bytes:
        origin = self.origin + host if self.origin.endswith(b"//") else self.origin
        if not target.startswith(b"/"):
            target = b"/"  # OPTIONS *
        path, mark, query = target.partition(b"?")
        if self.path is not None:
            path = self.path.of(path)
        return origin + path + (self.tail or mark + query)


def rewriting(rewrite: Rewrite | None, match: Match) -> Rewriting | None:
    if rewrite is None:
        return None
    path = _replaced(rewrite.path, match) if rewrite.path is not None else None
    return Rewriting(path, rewrite.host.encode() if rewrite.host is not None else None)


def redirecting(redirect: Redirect | None, match: Match, edit: HeaderEdit) -> Redirecting | None:
    if redirect is None:
        return None
    scheme, authority, path, tail = split(redirect.to)
    replaced = _replaced(path, match) if path else None
    fields = tuple(edited((), edit))
    return Redirecting(redirect.status, (scheme + authority).encode(), replaced, tail.encode(), fields)


def split(to: str) -> tuple[str, str, str, str]:
    """Where a redirect leads: (scheme with its slashes, host, path, query or fragment)."""
    found = _PARTS.match(to)
    assert found is not None
    return found[1] or "", found[2] or "", found[3], found[4]


def respond_fields(body: str, edit: HeaderEdit) -> tuple[Field, ...]:
    """The fields of a fixed response."""
    return tuple(edited((PLAIN_TEXT,) if body else (), edit))


def edited(fields: tuple[Field, ...], edit: HeaderEdit) -> list[Field]:
    """In the order remove, set, add, as of an answer that comes from elsewhere."""
    gone = {name.encode() for name in (*edit.remove, *(name for name, _ in edit.set))}
    kept = [field for field in fields if field[0] not in gone]
    return kept + [(name.encode(), value.encode("latin-1")) for name, value in (*edit.set, *edit.add)]


def _replaced(path: str, match: Match) -> Replaced:
    if not path.endswith(TREE):
        return Replaced(path.encode(), None)
    depth = (match.path or TREE).removesuffix(TREE).count("/")
    return Replaced(path.removesuffix(TREE).encode(), depth)
