"""Header fields as a filter sees them: a view of the list that the proxy forwards.

Reading is free; writing is checked, because what a filter writes goes out as it is. Must not know connections or
codecs. Invariants: names are lower case; no name, value or combination written through this view can end a field, frame
a message or choose where it goes.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from re import compile as pattern

Field = tuple[bytes, bytes]

_NAME = pattern(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")  # RFC 9110, 5.6.2: token, in lower case
_BAD_IN_VALUE = pattern(rb"[\x00-\x08\x0a-\x1f\x7f]")  # RFC 9110, 5.5: controls but HTAB
_NAME_BYTES_MAX = 256
_VALUE_BYTES_MAX = 16 * 1024

_FRAMING = frozenset(
    {
        *("connection", "content-length", "expect", "host", "http2-settings", "keep-alive", "proxy-connection"),
        *("proxy-authenticate", "proxy-authentication-info", "proxy-authorization"),
        *("te", "trailer", "transfer-encoding", "upgrade"),
    }
)
_OWN = frozenset({"forwarded", "traceparent", "x-real-ip", "x-request-deadline-ms"})
_OWN_PREFIXES = ("x-pillion-", "x-forwarded-")
_punctuation = pattern(r"[^a-z0-9]")


class HeaderError(ValueError):
    """A field that a filter may not write, with the reason."""


class Headers:
    """A case-insensitive list of fields in which a name may stand several times.

    Names and values are given as str (Latin-1) or bytes and come back as str. A name that frames a message, chooses its
    destination or speaks for the mesh (content-length, transfer-encoding, connection, host, x-pillion-*, x-forwarded-*,
    traceparent and their like) cannot be written: HeaderError. Such fields are mostly not in this list at all, because
    the proxy makes them anew; what they say stands in the request's attributes (`host`, `caller`, `trace_id`).
    `changed` tells the proxy that something was written.
    """

    __slots__ = ("_fields", "changed")

    def __init__(self, fields: list[Field]) -> None:
        self._fields = fields
        self.changed = False

    def get(self, name: str | bytes, default: str | None = None) -> str | None:
        """The first value. To judge a request ask `get_all`: a client may send a name twice."""
        wanted = _lower(name)
        for key, value in self._fields:
            if key == wanted:
                return value.decode("latin-1")
        return default

    def get_all(self, name: str | bytes) -> list[str]:
        """All values, in order; empty where there is none."""
        wanted = _lower(name)
        return [value.decode("latin-1") for key, value in self._fields if key == wanted]

    def set(self, name: str | bytes, value: str | bytes) -> None:
        """One field with this value in place of all that have the name."""
        field = (writable_name(name), checked_value(name, value))
        self._fields[:] = [other for other in self._fields if other[0] != field[0]]
        self._fields.append(field)
        self.changed = True

    def add(self, name: str | bytes, value: str | bytes) -> None:
        """One more field, beside those that have the name already."""
        self._fields.append((writable_name(name), checked_value(name, value)))
        self.changed = True

    def remove(self, name: str | bytes) -> bool:
        """Takes out every field of that name; whether there was one."""
        wanted = writable_name(name)
        kept = [field for field in self._fields if field[0] != wanted]
        if len(kept) == len(self._fields):
            return False
        self._fields[:] = kept
        self.changed = True
        return True

    def items(self) -> list[tuple[str, str]]:
        """Every field, in order."""
        return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in self._fields]

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str | bytes):
            return False
        wanted = _lower(name)
        return any(key == wanted for key, _ in self._fields)

    def __iter__(self) -> Iterator[str]:
        """The names, each once, in the order of their first appearance."""
        return iter(dict.fromkeys(name.decode("latin-1") for name, _ in self._fields))

    def __len__(self) -> int:
        return len(self._fields)

    def __repr__(self) -> str:
        return f"Headers({self.items()!r})"


def fields_of(pairs: Mapping[str, str] | Iterable[tuple[str | bytes, str | bytes]]) -> tuple[Field, ...]:
    """Checked fields from a mapping or from pairs, as `Reply` takes them."""
    try:
        listed = list(pairs.items()) if isinstance(pairs, Mapping) else [(name, value) for name, value in pairs]
    except (TypeError, ValueError) as error:
        raise HeaderError(f"headers must be a mapping or pairs of name and value: {error}") from None
    return tuple((writable_name(name), checked_value(name, value)) for name, value in listed)


@lru_cache(maxsize=1024)
def writable_name(name: str | bytes) -> bytes:
    """The name in lower case, if a filter may write it."""
    key = _lower(name)
    if not _NAME.fullmatch(key) or len(key) > _NAME_BYTES_MAX:
        raise HeaderError(f"{name!r} is not a header name: letters, digits and !#$%&'*+-.^_`|~, at most 256 of them")
    spelling = _punctuation.sub(
        "-", key.decode("ascii")
    )  # to CGI and WSGI all punctuation is the same (RFC 3875, 4.1.18)
    if spelling in _FRAMING:
        raise HeaderError(f"{name!r} frames or routes the message: the proxy writes it, a filter cannot")
    if spelling in _OWN or spelling.startswith(_OWN_PREFIXES):
        raise HeaderError(f"{name!r} speaks for the mesh: the proxy writes it, a filter cannot")
    return key


def checked_value(name: str | bytes, value: str | bytes) -> bytes:
    """The value as bytes, without white space around it, if it may stand in a field."""
    if isinstance(value, str):
        try:
            raw = value.encode("latin-1")
        except UnicodeEncodeError:
            raise HeaderError(
                f"the value for {name!r} is not Latin-1; encode it (for example as UTF-8 bytes)"
            ) from None
    elif isinstance(value, bytes):
        raw = value
    else:
        raise HeaderError(f"the value for {name!r} must be str or bytes, not {type(value).__name__}")
    if len(raw) > _VALUE_BYTES_MAX:
        raise HeaderError(f"the value for {name!r} has {len(raw)} bytes; at most {_VALUE_BYTES_MAX} are allowed")
    if _BAD_IN_VALUE.search(raw):
        raise HeaderError(f"the value for {name!r} holds a control character (a line break, perhaps)")
    return raw.strip(b" \t")


def _lower(name: str | bytes) -> bytes:
    if isinstance(name, str):
        try:
            return name.lower().encode("latin-1")
        except UnicodeEncodeError:
            raise HeaderError(f"{name!r} is not a header name: letters, digits and !#$%&'*+-.^_`|~") from None
    if isinstance(name, bytes):
        return name.lower()
    raise HeaderError(f"a header name must be str or bytes, not {type(name).__name__}")
