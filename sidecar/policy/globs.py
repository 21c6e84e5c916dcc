"""Path globs: `*` within one segment, `**` for any number of segments.

A glob is compiled once and tested many times against the path of a request (normalised, without its query). Its text
is brought to the same normal form as paths are (percent-encoding, paths.py), so a pattern that could never match is an
error here and not a rule that silently does nothing.

- `*` stands for any characters of one segment and never matches an empty segment.
- `**` is a segment of its own and stands for any number of segments, none and empty ones included: `/reviews/**`
  matches `/reviews`, `/reviews/` and everything below.

Invariants: no backtracking over characters; a test costs at most (segments of the path x GLOB_SEGMENTS_MAX) comparisons
of one segment, whatever the pattern. Must not know requests, rules or routes.
"""

from collections.abc import Callable

from .paths import BadPath, canonical_escapes

GLOB_BYTES_MAX = 1024
GLOB_SEGMENTS_MAX = 64

Test = Callable[[bytes], bool]

_ANY_DEPTH = b"**"

# Printable characters that clients must percent-encode in a path, so that a pattern may be written plainly.
_ENCODED = {code: f"%{code:02X}" for code in b' "<>^`|'}
_REFUSED = {
    "?": 'the query is not part of the path; use "query", or %3F for the character itself',
    "#": "a path has no fragment; write %23 for the character itself",
    "\\": "requests with a backslash in their path are refused where paths are judged",
    "{": "there are no braces in globs; write * for one segment",
    "}": "there are no braces in globs; write * for one segment",
    "[": "there are no character classes in globs; use path_regex",
    "]": "there are no character classes in globs; use path_regex",
}


def compile_glob(pattern: str) -> Callable[[bytes | str], bool]:
    """A test for the pattern that takes bytes or text. Raises ValueError where the pattern is malformed."""
    test = compile_glob_bytes(pattern)

    def either(path: bytes | str) -> bool:
        return test(path.encode("utf-8", "surrogateescape") if isinstance(path, str) else path)

    return either


def compile_glob_bytes(pattern: str) -> Test:
    """The same for bytes alone: what the data path uses."""
    segments = split_glob(pattern)
    if b"*" not in b"".join(segments):
        return _exactly(b"/" + b"/".join(segments))
    if segments[-1] == _ANY_DEPTH and b"*" not in b"".join(segments[:-1]):
        return _at_or_below(b"".join(b"/" + segment for segment in segments[:-1]))
    if _ANY_DEPTH not in segments:
        return _fixed_depth(segments)
    return _any_depth(segments)


def literal_prefix(segments: tuple[bytes, ...]) -> tuple[bytes, ...]:
    """The leading segments without a wildcard."""
    count = 0
    while count < len(segments) and b"*" not in segments[count]:
        count += 1
    return segments[:count]


def split_glob(pattern: str) -> tuple[bytes, ...]:
    """The segments of a glob in normal form, without the empty one before the leading slash."""
    if not pattern.startswith("/"):
        raise ValueError(f'glob "{pattern[:80]}" must begin with "/"')
    for character, advice in _REFUSED.items():
        if character in pattern:
            raise ValueError(f'glob "{pattern[:80]}" contains "{character}": {advice}')
    try:
        text = canonical_escapes(_encode(pattern))
    except BadPath as error:
        raise ValueError(f'glob "{pattern[:80]}" can never match: {error.reason}') from None
    segments = tuple(text.split(b"/")[1:])
    if len(text) > GLOB_BYTES_MAX or len(segments) > GLOB_SEGMENTS_MAX:
        raise ValueError(
            f'glob "{pattern[:80]}…" is too long: at most {GLOB_BYTES_MAX} bytes and {GLOB_SEGMENTS_MAX} segments'
        )
    for segment in segments:
        if b"**" in segment and segment != _ANY_DEPTH:
            raise ValueError(f'glob "{pattern}": "**" must be a segment of its own, as in /reviews/**')
        if segment in (b".", b".."):
            raise ValueError(f'glob "{pattern}" can never match: "." and ".." are resolved before paths are judged')
    if b"" in segments[:-1]:
        raise ValueError(
            f'glob "{pattern}" has an empty segment: paths are also judged with "//" merged; write one "/"'
        )
    return segments


def _encode(pattern: str) -> bytes:
    for code in pattern.encode("utf-8", "surrogateescape"):
        if code < 0x20 or code == 0x7F:
            raise ValueError(f"glob {pattern[:80]!r} contains a control character")
    raw = pattern.translate(_ENCODED).encode("utf-8", "surrogateescape")
    if raw.isascii():
        return raw
    return b"".join(b"%%%02X" % code if code > 0x7F else bytes((code,)) for code in raw)


def _exactly(literal: bytes) -> Test:
    def test(path: bytes) -> bool:
        return path == literal

    return test


def _at_or_below(prefix: bytes) -> Test:
    if not prefix:
        return _everything
    below = prefix + b"/"

    def test(path: bytes) -> bool:
        return path.startswith(below) or path == prefix

    return test


def _everything(path: bytes) -> bool:
    return True


def _fixed_depth(segments: tuple[bytes, ...]) -> Test:
    """Wildcards within segments only: as many segments as the pattern has."""
    lead = b"".join(b"/" + segment for segment in literal_prefix(segments)) + b"/"
    slashes = len(segments)
    wild = tuple((at + 1, _segment(segment)) for at, segment in enumerate(segments) if b"*" in segment)
    tame = tuple((at + 1, segment) for at, segment in enumerate(segments) if b"*" not in segment)

    def test(path: bytes) -> bool:
        if not path.startswith(lead) or path.count(b"/") != slashes:
            return False
        parts = path.split(b"/")
        for at, literal in tame:
            if parts[at] != literal:
                return False
        for at, matches in wild:  # noqa: SIM110 (a generator would cost more than the comparisons)
            if not matches(parts[at]):
                return False
        return True

    return test


def _any_depth(segments: tuple[bytes, ...]) -> Test:
    """`**` anywhere: the runs of segments between them are found left to right, each at its first possible place.

    The first place is always good enough, because what follows a run is `**`, which accepts whatever is left over.
    """
    runs: list[tuple[Test, ...]] = [()]
    for segment in segments:
        if segment == _ANY_DEPTH:
            runs.append(())
        else:
            runs[-1] = (*runs[-1], _segment(segment))
    head, *middle, tail = runs
    fewest = sum(len(run) for run in runs)
    between = tuple(run for run in middle if run)

    def test(path: bytes) -> bool:
        if path[:1] != b"/":
            return False
        parts = path[1:].split(b"/")
        end = len(parts) - len(tail)
        if len(parts) < fewest or not _run_at(head, parts, 0) or not _run_at(tail, parts, end):
            return False
        at = len(head)
        for run in between:
            last = end - len(run)
            while at <= last and not _run_at(run, parts, at):
                at += 1
            if at > last:
                return False
            at += len(run)
        return True

    return test


def _run_at(run: tuple[Test, ...], parts: list[bytes], at: int) -> bool:
    for matches in run:
        if not matches(parts[at]):
            return False
        at += 1
    return True


def _segment(pattern: bytes) -> Test:
    """A test of one segment. The pieces between stars are found left to right, so the work is linear in the stars."""
    if b"*" not in pattern:
        return _exactly(pattern)
    if pattern == b"*":
        return bool
    head, *middle, tail = pattern.split(b"*")
    fewest = len(pattern) - pattern.count(b"*")

    def test(segment: bytes) -> bool:
        if len(segment) < fewest or not segment.startswith(head) or not segment.endswith(tail):
            return False
        at, end = len(head), len(segment) - len(tail)
        for piece in middle:
            at = segment.find(piece, at, end)
            if at < 0:
                return False
            at += len(piece)
        return True

    return test


def covers(wide: str, narrow: str) -> bool:
    """Whether every path that `narrow` matches is surely matched by `wide` too. False where that is not certain."""
    outer, inner = split_glob(wide), split_glob(narrow)
    if outer == inner:
        return True
    lead = literal_prefix(outer)
    if outer == (*lead, _ANY_DEPTH):
        return inner[: len(lead)] == lead
    if b"*" not in b"".join(inner):
        return compile_glob_bytes(wide)(b"/" + b"/".join(inner))
    if _ANY_DEPTH in outer or _ANY_DEPTH in inner or len(outer) != len(inner):
        return False
    return all(
        a == b or (a == b"*" and b != b"") or (b"*" not in b and _segment(a)(b))
        for a, b in zip(outer, inner, strict=True)
    )
