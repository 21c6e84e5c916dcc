"""What a route's match asks of a request, compiled to one predicate.

A predicate is told the method, the path (without its query), the query, the header fields (names in lower case) and
the caller (the service name of an authenticated peer of the own trust domain, else None). Parts that a match does not
mention cost nothing, and the cheap ones are asked first. Of a repeated header or query key any value may match.
Must not know what a match leads to. Invariant: a predicate never raises, whatever bytes a request holds.
"""

from collections.abc import Callable, Sequence
from urllib.parse import unquote_to_bytes

from sidecar.model.snapshot import Match, ValueMatch

from .globs import compile_glob_bytes
from .regexes import compile_regex

Headers = Sequence[tuple[bytes, bytes]]
Predicate = Callable[[bytes, bytes, bytes, Headers, str | None], bool]
ValueTest = Callable[[bytes], bool]


def compile_match(match: Match) -> Predicate | None:
    """The predicate of a match; None where it matches everything. Raises ValueError on a bad pattern."""
    parts: list[Predicate] = []
    if match.methods is not None:
        parts.append(_method(match.methods))
    if match.callers is not None:
        parts.append(_caller(match.callers))
    if match.path is not None and match.path != "/**":
        parts.append(_path(compile_glob_bytes(match.path)))
    if match.path_regex is not None:
        parts.append(_path(compile_regex(match.path_regex)))
    parts.extend(_header(name, value) for name, value in match.headers)
    parts.extend(_query(name, value) for name, value in match.query)
    parts.extend(_cookie(name, value) for name, value in match.cookies)
    return _all(tuple(parts))


def compile_value(match: ValueMatch) -> ValueTest:
    """A test of one value of a header or of the query."""
    if match.kind == "present":
        return _any_value
    if match.kind == "regex":
        return compile_regex(match.value)
    wanted = match.value.encode("utf-8", "surrogateescape")
    if match.kind == "exact":
        return lambda value: value == wanted
    if match.kind == "prefix":
        return lambda value: value.startswith(wanted)
    raise ValueError(f'unknown kind of match "{match.kind}": exact, prefix, regex or present')


def query_values(query: bytes, name: bytes) -> list[bytes]:
    """All values of a key of the query, decoded (`+` is a space, as in forms). A key without `=` has an empty value."""
    values = []
    for field in query.split(b"&"):
        key, _, value = field.partition(b"=")
        if key == name or _decoded(key) == name:
            values.append(_decoded(value))
    return values


def _decoded(text: bytes) -> bytes:
    if b"+" in text:
        text = text.replace(b"+", b" ")
    return unquote_to_bytes(text) if b"%" in text else text


def _any_value(value: bytes) -> bool:
    return True


def _method(methods: frozenset[str]) -> Predicate:
    wanted = frozenset(method.encode() for method in methods)
    if len(wanted) == 1:
        (only,) = wanted
        return lambda method, path, query, headers, caller: method == only
    return lambda method, path, query, headers, caller: method in wanted


def _caller(callers: frozenset[str]) -> Predicate:
    return lambda method, path, query, headers, caller: caller in callers


def _path(test: ValueTest) -> Predicate:
    return lambda method, path, query, headers, caller: test(path)


def _header(name: str, value: ValueMatch) -> Predicate:
    wanted = name.encode("latin-1")
    if value.kind == "exact":
        pair = (wanted, value.value.encode("utf-8", "surrogateescape"))
        return lambda method, path, query, headers, caller: pair in headers
    test = compile_value(value)

    def predicate(method: bytes, path: bytes, query: bytes, headers: Headers, caller: str | None) -> bool:
        for key, held in headers:  # noqa: SIM110 (a generator would cost more than the comparisons)
            if key == wanted and test(held):
                return True
        return False

    return predicate


def _query(name: str, value: ValueMatch) -> Predicate:
    wanted = name.encode("utf-8", "surrogateescape")
    test = compile_value(value)

    def predicate(method: bytes, path: bytes, query: bytes, headers: Headers, caller: str | None) -> bool:
        return bool(query) and any(map(test, query_values(query, wanted)))

    return predicate


def cookie_values(headers: Headers, name: bytes) -> list[bytes]:
    """All values of a cookie (RFC 6265, section 5.4), without the quotes that one may stand in."""
    values = []
    for key, held in headers:
        if key == b"cookie" and name in held:
            for pair in held.split(b";"):
                found, equals, value = pair.strip(b" \t").partition(b"=")
                if found == name and equals:
                    quoted = len(value) > 1 and value[:1] == value[-1:] == b'"'
                    values.append(value[1:-1] if quoted else value)
    return values


def _cookie(name: str, value: ValueMatch) -> Predicate:
    wanted = name.encode("latin-1")
    test = compile_value(value)
    return lambda method, path, query, headers, caller: any(map(test, cookie_values(headers, wanted)))


def _all(parts: tuple[Predicate, ...]) -> Predicate | None:
    if len(parts) <= 1:
        return parts[0] if parts else None
    if len(parts) == 2:
        first, second = parts
        return lambda method, path, query, headers, caller: (
            first(method, path, query, headers, caller) and second(method, path, query, headers, caller)
        )

    def predicate(method: bytes, path: bytes, query: bytes, headers: Headers, caller: str | None) -> bool:
        for part in parts:  # noqa: SIM110 (a generator would cost more than the comparisons)
            if not part(method, path, query, headers, caller):
                return False
        return True

    return predicate
