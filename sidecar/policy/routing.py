"""Which route serves a request: the first whose match fits, found without looking at the others.

Routes are indexed when the table is built: by exact path, by the literal leading segments of a glob, and the rest
(no path, a regular expression, a glob that begins with a wildcard) in order. A look-up asks the few buckets that a
path can be in and takes the earliest fit, so it costs the same with ten routes as with ten thousand.

A listener whose paths have two readings (paths.py) looks both up: where they lead to different routes, the policies of
both routes must admit the request.

Must not know what a route leads to: payloads are the caller's. Invariant: `find` gives what a linear scan would.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Generic, TypeVar

from sidecar.model.snapshot import Match, ValueMatch

from .globs import covers, literal_prefix, split_glob
from .matching import Headers, Predicate, compile_match, compile_value
from .regexes import compile_regex

T = TypeVar("T")

Entry = tuple[int, Predicate | None, T]
Buckets = Mapping[bytes, Sequence[Entry[T]]]
Find = Callable[[bytes, bytes, Headers, str | None], T | None]


class RouteTable(Generic[T]):
    """The routes of one service, compiled.

    `find(method, target, headers, caller)` takes the target with or without its query, and the caller's service name
    (None for a peer without one). It gives the payload of the first route that matches, or None.
    """

    __slots__ = ("find", "needs_path")

    def __init__(self, routes: Iterable[tuple[Match, T]]) -> None:
        exact: dict[bytes, list[Entry[T]]] = {}
        below: dict[bytes, list[Entry[T]]] = {}
        rest: list[Entry[T]] = []
        self.needs_path = False
        for order, (match, payload) in enumerate(routes):
            if match.path not in (None, "/**") or match.path_regex is not None:
                self.needs_path = True
            if _place(match, (order, payload), exact, below, rest):
                break  # nothing after an unconditional route can be reached
        self.find = _finder(exact, below, rest)


def _place(
    match: Match,
    item: tuple[int, T],
    exact: dict[bytes, list[Entry[T]]],
    below: dict[bytes, list[Entry[T]]],
    rest: list[Entry[T]],
) -> bool:
    """Files a route. The predicate asks only what its place does not say yet. True: it matches everything."""
    order, payload = item
    segments = split_glob(match.path) if match.path is not None else (b"**",)
    lead = literal_prefix(segments)
    beyond = segments[len(lead) :]
    predicate = compile_match(match if beyond not in ((), (b"**",)) else replace(match, path=None))
    key = b"".join(b"/" + segment for segment in lead)
    if not lead:
        rest.append((order, predicate, payload))
        return predicate is None
    (below if beyond else exact).setdefault(key, []).append((order, predicate, payload))
    return False


def _finder(exact: Buckets[T], below: Buckets[T], rest: Sequence[Entry[T]]) -> Find[T]:
    if not exact and not below:
        return _in_order(tuple(rest))
    exact_buckets = {key: tuple(bucket) for key, bucket in exact.items()}
    below_buckets = {key: tuple(bucket) for key, bucket in below.items()}
    others = tuple(rest)
    depths = {key.count(b"/") for key in below_buckets}
    used = tuple(depth in depths for depth in range(1, max(depths, default=0) + 1))

    def find(method: bytes, target: bytes, headers: Headers, caller: str | None) -> T | None:
        if b"?" in target:
            path, _, query = target.partition(b"?")
        else:
            path, query = target, b""
        best: Entry[T] | None = None
        bucket = exact_buckets.get(path)
        if bucket is not None:
            best = _first(bucket, None, method, path, query, headers, caller)
        at = 0
        for is_used in used:
            at = path.find(b"/", at + 1)
            if is_used:
                bucket = below_buckets.get(path if at < 0 else path[:at])
                if bucket is not None:
                    best = _first(bucket, best, method, path, query, headers, caller)
            if at < 0:
                break
        best = _first(others, best, method, path, query, headers, caller)
        return best[2] if best is not None else None

    return find


def _first(
    bucket: tuple[Entry[T], ...],
    best: Entry[T] | None,
    method: bytes,
    path: bytes,
    query: bytes,
    headers: Headers,
    caller: str | None,
) -> Entry[T] | None:
    """The first entry of a bucket that fits, unless a better one is known."""
    for entry in bucket:
        if best is not None and entry[0] > best[0]:
            return best
        predicate = entry[1]
        if predicate is None or predicate(method, path, query, headers, caller):
            return entry
    return best


def _in_order(entries: tuple[Entry[T], ...]) -> Find[T]:
    """For tables in which nothing is indexed by path."""
    if entries and entries[0][1] is None:
        only = entries[0][2]
        return lambda method, target, headers, caller: only

    def find(method: bytes, target: bytes, headers: Headers, caller: str | None) -> T | None:
        path, _, query = target.partition(b"?")
        for _order, predicate, payload in entries:
            if predicate is None or predicate(method, path, query, headers, caller):
                return payload
        return None

    return find


def unreachable(routes: Iterable[tuple[Match, object]]) -> list[tuple[int, int]]:
    """(route, the earlier route that takes all its requests), for the linter: only where that is certain.

    Routes that together cover a later one are not found. Earlier routes are filed under one thing that they ask for,
    so that a route is compared only with those that could cover it.
    """
    found: list[tuple[int, int]] = []
    filed: dict[object, list[tuple[int, Match]]] = {}
    for index, (match, _payload) in enumerate(routes):
        earlier = [item for key in _lookups(match) for item in filed.get(key, ())]
        shadowing = min((order for order, wide in earlier if match_covers(wide, match)), default=None)
        if shadowing is None:
            filed.setdefault(_key(match), []).append((index, match))
        else:  # whatever it covers, the one that covers it does too
            found.append((index, shadowing))
    return found


def match_covers(wide: Match, narrow: Match) -> bool:
    """Whether every request that `narrow` matches is surely matched by `wide`."""
    if wide.methods is not None and (narrow.methods is None or not narrow.methods <= wide.methods):
        return False
    if wide.callers is not None and (narrow.callers is None or not narrow.callers <= wide.callers):
        return False
    return (
        _path_covers(wide, narrow)
        and _values_cover(wide.headers, narrow.headers)
        and _values_cover(wide.query, narrow.query)
        and _values_cover(wide.cookies, narrow.cookies)
    )


def _path_covers(wide: Match, narrow: Match) -> bool:
    if wide.path is not None and wide.path != "/**" and (narrow.path is None or not covers(wide.path, narrow.path)):
        return False
    if wide.path_regex is None or wide.path_regex == narrow.path_regex:
        return True
    if narrow.path is None or "*" in narrow.path:
        return False
    return compile_regex(wide.path_regex)(b"/" + b"/".join(split_glob(narrow.path)))


Values = tuple[tuple[str, ValueMatch], ...]


def _values_cover(wide: Values, narrow: Values) -> bool:
    """Each demand of `wide` follows from one of `narrow`: of a repeated key it is met by the same value."""
    return all(any(name == other and _value_covers(a, b) for other, b in narrow) for name, a in wide)


def _value_covers(wide: ValueMatch, narrow: ValueMatch) -> bool:
    if wide == narrow or wide.kind == "present":
        return True
    if narrow.kind == "exact":
        return compile_value(wide)(narrow.value.encode("utf-8", "surrogateescape"))
    return wide.kind == "prefix" and narrow.kind == "prefix" and narrow.value.startswith(wide.value)


def _key(match: Match) -> object:
    """What an earlier route is filed under: every later route that it covers looks there."""
    value: object = None
    for kind, values in (("header", match.headers), ("query", match.query), ("cookie", match.cookies)):
        for name, asked in values:
            value = value or (kind, name, asked.value if asked.kind == "exact" else None)
    if match.path is None:
        return value, ()
    segments = split_glob(match.path)
    lead = literal_prefix(segments)
    return value, (lead if len(lead) < len(segments) else (*lead, "$"))


def _lookups(match: Match) -> Iterator[object]:
    values: list[object] = [None]
    for kind, asked in (("header", match.headers), ("query", match.query), ("cookie", match.cookies)):
        for name, one in asked:
            values.append((kind, name, None))
            if one.kind == "exact":
                values.append((kind, name, one.value))
    segments = split_glob(match.path) if match.path is not None else ()
    lead = literal_prefix(segments)
    paths: list[tuple[object, ...]] = [lead[:length] for length in range(len(lead) + 1)]
    paths.append((*segments, "$"))
    return ((value, path) for value in values for path in paths)
