"""The path of a request: brought to one normal form, which is both judged and forwarded.

`judge` is for listeners whose policy has path rules (path_handling: strict), `opaque` for all others. In this order:
percent-encoded unreserved characters are decoded once and hex digits upper-cased (RFC 3986, 6.2.2), characters that a
path may not hold (RFC 3986, 3.3) are percent-encoded, then `.` and `..` segments are resolved (RFC 3986, 5.2.4). A bad
escape, or climbing above the root, is a bad request. What servers are known to read differently (%2F, %5C, backslash,
controls) is a bad request too; `//` and `;` are forwarded as they are, but judged in two readings, so that neither
reading can be used to go round a rule.

Must not know rules or routes. Invariants: what is judged is what is forwarded; judging the forwarded target again
gives the same result; the query is never changed.
"""

import re
from collections.abc import Callable

from .outcome import Outcome


class BadPath(Exception):
    """The target is malformed or ambiguous. The reason is for the log, not for the peer."""

    outcome = Outcome.BAD_REQUEST

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Readings:
    """How a target is forwarded, and the readings of its path that are judged (both without the query).

    For ordinary paths `as_is` and `merged` are one object: `ambiguous` is an identity test.
    """

    __slots__ = ("as_is", "forward", "merged", "query")

    def __init__(self, forward: bytes, as_is: bytes, merged: bytes, query: bytes) -> None:
        self.forward = forward  # the target to send, with its query
        self.as_is = as_is
        self.merged = merged  # parameters cut, slashes merged, dots resolved again
        self.query = query  # without the "?"; empty where there is none

    @property
    def ambiguous(self) -> bool:
        """Whether servers may read this path in two ways."""
        return self.merged is not self.as_is

    def __repr__(self) -> str:
        return f"Readings(forward={self.forward!r}, as_is={self.as_is!r}, merged={self.merged!r})"


Reader = Callable[[bytes], Readings]

_UNRESERVED = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~"

# Segments that begin with a letter, digit or the like and hold nothing that needs a closer look.
_CLEAN = re.compile(rb"/(?:[\w~!$&'()*+,=:@-][\w.~!$&'()*+,=:@-]*+/)*+(?:[\w~!$&'()*+,=:@-][\w.~!$&'()*+,=:@-]*+)?+")
_REFUSED = re.compile(rb"[\x00-\x20\x7f\\#]")
_UNUSUAL = re.compile(rb"[^\w.~!$&'()*+,;=:@%/-]")
_PARAMETERS = re.compile(rb";[^/]*+")
_SLASHES = re.compile(rb"//++")

_clean = _CLEAN.fullmatch
_refused = _REFUSED.search
_unusual = _UNUSUAL.search


def _escape_tables() -> tuple[dict[bytes, bytes], dict[bytes, bytes]]:
    """(escape -> what replaces it, escape -> why it is refused), for every spelling of the two digits."""
    good: dict[bytes, bytes] = {}
    bad: dict[bytes, bytes] = {}
    digits = b"0123456789ABCDEFabcdef"
    for high in digits:
        for low in digits:
            spelling = bytes((high, low))
            code = int(spelling, 16)
            if code < 0x20 or code == 0x7F:
                bad[spelling] = b"an encoded control character"
            elif code in b"/\\":
                bad[spelling] = b"an encoded slash or backslash"
            else:
                good[spelling] = bytes((code,)) if code in _UNRESERVED else b"%" + spelling.upper()
    return good, bad


_REPLACED, _AMBIGUOUS = _escape_tables()


def judge(target: bytes) -> Readings:
    """The readings of a target in origin form. Raises BadPath."""
    if b"?" in target:
        path, _, query = target.partition(b"?")
        if _clean(path):
            return Readings(target, path, path, query)
        as_is = _normal(path)
        forward = as_is + b"?" + query
    else:
        if _clean(target):
            return Readings(target, target, target, b"")
        as_is = forward = _normal(target)
        query = b""
    merged = _merged(as_is)
    return Readings(forward, as_is, as_is if merged == as_is else merged, query)


def opaque(target: bytes) -> Readings:
    """The target exactly as it came; the path is judged as it came too."""
    path, _, query = target.partition(b"?")
    return Readings(target, path, path, query)


def canonical_escapes(path: bytes) -> bytes:
    """Percent-encoded unreserved characters decoded once, hex digits in upper case. Raises BadPath."""
    if b"%" not in path:
        return path
    first, *rest = path.split(b"%")
    parts = [first]
    for part in rest:
        escape = part[:2]
        replaced = _REPLACED.get(escape)
        if replaced is None:
            reason = _AMBIGUOUS.get(escape, b"a malformed percent-encoding").decode()
            raise BadPath(f"the path contains {reason}")
        parts.append(replaced)
        parts.append(part[2:])
    return b"".join(parts)


def _normal(path: bytes) -> bytes:
    if path[:1] != b"/":
        raise BadPath("the target is not an absolute path")
    if (found := _refused(path)) is not None:
        raise BadPath(f"the path contains the character {found[0]!r}")
    if _unusual(path) is not None:
        path = _UNUSUAL.sub(_encoded, path)
    return _resolved(canonical_escapes(path))


def _encoded(found: re.Match[bytes]) -> bytes:
    return b"%%%02X" % found[0][0]


def _resolved(path: bytes) -> bytes:
    """Dot segments removed (RFC 3986, 5.2.4), except that climbing above the root is an error."""
    if b"/." not in path:
        return path
    kept: list[bytes] = []
    segment = b""
    for segment in path.split(b"/")[1:]:
        if segment == b"..":
            if not kept:
                raise BadPath("the path climbs above the root")
            kept.pop()
        elif segment != b".":
            kept.append(segment)
    if segment in (b".", b".."):
        kept.append(b"")
    return b"/" + b"/".join(kept)


def _merged(path: bytes) -> bytes:
    if b";" in path:
        path = _PARAMETERS.sub(b"", path)
    if b"//" in path:
        path = _SLASHES.sub(b"/", path)
    return _resolved(path)
