"""What names, addresses, paths, headers and identities look like: checks on single texts.

Each check returns None, or (what is wrong, what to do). Pure; must not know where in a policy a text stands. A path
pattern that passes here compiles in sidecar.policy.
"""

import re
from difflib import get_close_matches
from ipaddress import ip_address

Wrong = tuple[str, str] | None

LABEL_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
TOKEN_PATTERN = r"^[!#$%&'*+.^_`|~0-9A-Za-z-]+$"  # noqa: S105
_NUMBER = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_QUAD = re.compile(rf"{_NUMBER}(?:\.{_NUMBER}){{3}}\Z")  # the usual case, twenty times as fast as ip_address()
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")
_ROUTE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?\Z")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z")  # RFC 9110, section 5.6.2
_VALUE = re.compile(r"[^\x00-\x08\x0a-\x1f\x7f]*\Z")
_TRUST_DOMAIN = re.compile(r"[a-z0-9._-]{1,255}\Z")
_SPIFFE_SEGMENT = re.compile(r"[A-Za-z0-9._-]+\Z")
_FILTER_CLASS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*\Z", re.ASCII)
_FILTER_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?\Z")
_GRPC_SERVICE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*\Z", re.ASCII)
_GRPC_METHOD = re.compile(r"[A-Za-z_]\w*\Z", re.ASCII)
_PATH = re.compile(r"/[\x21-\x7e]*\Z")
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_REFUSED_ESCAPE = re.compile(r"%([01][0-9A-Fa-f]|2[Ff]|5[Cc]|7[Ff])")

BALANCERS = ("least-request", "round-robin", "random", "peak-ewma", "ring-hash", "maglev")
KEYED_BALANCERS = frozenset({"ring-hash", "maglev"})

SEGMENTS_MAX = 64
PATH_BYTES_MAX = 1024
REGEX_INSTRUCTIONS_MAX = 1000

STANDARD_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "QUERY"})

# Fields that frame the message, belong to one connection, or carry what the sidecar alone may say.
_OWN_HEADERS = frozenset(
    {
        "connection", "content-length", "expect", "host", "keep-alive", "proxy-connection", "te", "trailer",
        "transfer-encoding", "upgrade", "x-forwarded-client-cert", "x-request-deadline-ms",
    }
)  # fmt: skip


# Fields that a rule, a match or an edit never sees: they are taken out of a request before it is judged.
_UNSEEN_HEADERS = _OWN_HEADERS | {
    "forwarded",
    "http2-settings",
    "proxy-authenticate",
    "proxy-authentication-info",
    "proxy-authorization",
    "traceparent",
    "x-real-ip",
}


def label(text: str) -> Wrong:
    """A service, version, port or team: one DNS label (RFC 1123)."""
    if _LABEL.match(text):
        return None
    help = "lower-case letters, digits and inner hyphens, at most 63 characters"
    if _LABEL.match(text.lower().replace("_", "-")):
        help = f'write "{text.lower().replace("_", "-")}"'
    return f'"{_short(text)}" is not a valid name', help


def service_name(text: str) -> Wrong:
    if text == "mesh":  # port.mesh would be the host of a port, and of a service as well
        return '"mesh" is reserved: it ends the host name of every service', "choose another name"
    return label(text)


def route_name(text: str) -> Wrong:
    if _ROUTE.match(text):
        return None
    help = "letters, digits, inner hyphens, dots and underscores; at most 63"
    return f'"{_short(text)}" is not a valid route name', help


def method(text: str) -> Wrong:
    if not _TOKEN.match(text):
        return f'"{_short(text)}" is not an HTTP method', "for example GET"
    if text != text.upper() and text.upper() in STANDARD_METHODS:
        return f'"{text}" is not an HTTP method: methods are in upper case', f"write {text.upper()}"
    return None


def retry_method(text: str) -> Wrong:
    return None if text == "any" else method(text)


def header_name(text: str) -> Wrong:
    if _TOKEN.match(text):
        return None
    help = "pseudo-headers have matches of their own, such as path and methods" if text.startswith(":") else ""
    return f'"{_short(text)}" is not a header name', help or "letters, digits and hyphens"


def cookie_name(text: str) -> Wrong:
    return None if _TOKEN.match(text) else (f'"{_short(text)}" is not a cookie\'s name', "letters, digits and hyphens")


def asked_header(text: str) -> Wrong:
    """A header that a rule, a match or a rate limit asks for."""
    wrong = header_name(text)
    if wrong is not None:
        return wrong
    if _unseen(text):
        return f'the header "{_short(text)}" cannot be asked for', (
            "it frames the message or is not believed, so it is taken out before rules are asked; "
            "for callers use `from`, for the destination a service of its own"
        )
    return None


def _unseen(text: str) -> bool:
    spelled = re.sub(r"[^a-z0-9]", "-", text.lower())
    return spelled in _UNSEEN_HEADERS or spelled.startswith(("x-pillion-", "x-forwarded-"))


def edited_header(text: str) -> Wrong:
    """A header that a route may set, add or remove."""
    wrong = header_name(text)
    if wrong is not None:
        return wrong
    if text.lower() == "host":
        return 'the header "host" cannot be edited', "use rewrite: {host: ...}"
    if _unseen(text):
        return f'the header "{_short(text)}" cannot be edited', "the sidecar alone writes it"
    return None


def header_value(text: str) -> Wrong:
    if not _VALUE.match(text):
        return "a header value cannot hold control characters or line breaks", "remove them"
    if text != text.strip(" \t"):
        return "a header value cannot begin or end with white space", "remove it"
    return None


def plain_text(text: str) -> Wrong:
    if "\0" in text:
        return "the text holds a NUL character", "remove it"
    return None


def message(text: str) -> Wrong:
    if not _VALUE.match(text):
        return "the text cannot hold control characters or line breaks", "keep it to one line"
    return None


def path_glob(text: str) -> Wrong:
    """An exact path, or a pattern in which `*` stands within one segment and `**` for any number of segments."""
    wrong = _path(text)
    if wrong is not None:
        return wrong
    for segment in text[1:].split("/"):
        if "**" in segment and segment != "**":
            return f'"**" must stand alone between slashes, not as in "{_short(segment)}"', "use * within a segment"
    return None


def exact_path(text: str) -> Wrong:
    """A path that replaces another: nothing in it is a pattern."""
    wrong = _path(text)
    if wrong is None and not _PATH.match(text):
        return f'"{_short(text)}" is not a path', "a path holds no spaces and no characters beyond ASCII"
    return wrong


def _path(text: str) -> Wrong:
    if not text.startswith("/"):
        return f'"{_short(text)}" is not a path', f'begin it with a slash: "/{_short(text)}"'
    if "?" in text or "#" in text:
        return f'"{_short(text)}" is more than a path', "leave the query out; match.query matches it"
    wrong = next((char for char in text if char in "\\{}[]" or ord(char) < 0x20 or ord(char) == 0x7F), None)
    if wrong is not None:
        return f"a path cannot hold the character {wrong!r}", "there are no braces or classes in path patterns"
    if _BAD_ESCAPE.search(text):
        return f'"{_short(text)}" holds a percent sign that begins no escape', "write %25 for the sign itself"
    if _REFUSED_ESCAPE.search(text):
        return f'"{_short(text)}" can never match', "encoded slashes, backslashes and controls are refused"
    segments = text[1:].split("/")
    if any(segment in (".", "..") for segment in map(_dots, segments)):
        return f'"{_short(text)}" can never match: dot segments are resolved first', "write the resolved path"
    if "" in segments[:-1]:
        return f'"{_short(text)}" holds an empty segment', "write one slash: paths are judged with // merged, too"
    # Outside of ASCII a byte is three characters when encoded, and so are some within.
    length = sum(1 if 0x20 < code < 0x7F and code not in b'"<>^`|' else 3 for code in text.encode())
    if len(segments) > SEGMENTS_MAX or length > PATH_BYTES_MAX:
        return f"a path of more than {SEGMENTS_MAX} segments or {PATH_BYTES_MAX} bytes", "shorten it"
    return None


def grpc_service(text: str) -> Wrong:
    """A service as a .proto file names it: the package, a dot, the service."""
    if _GRPC_SERVICE.match(text):
        return None
    if "/" in text and _GRPC_SERVICE.match(text.strip("/").partition("/")[0]):
        return f'"{_short(text)}" is not the name of a gRPC service', "the method has a key of its own, and no slash"
    return f'"{_short(text)}" is not the name of a gRPC service', "package and service as in shop.v1.Cart; no patterns"


def grpc_method(text: str) -> Wrong:
    if _GRPC_METHOD.match(text):
        return None
    return f'"{_short(text)}" is not the name of a gRPC method', "for example AddItem, without the service; no patterns"


def _dots(segment: str) -> str:
    return segment.replace("%2e", ".").replace("%2E", ".")


def regex(text: str) -> Wrong:
    """RE2 syntax: no backreferences, no look-around, linear time; of a bounded size when compiled."""
    if not text.isascii():
        return "a regular expression must be ASCII", "write other characters as bytes, \\xNN"
    import re2  # only where a policy holds one

    options = re2.Options()
    options.encoding = re2.Options.Encoding.LATIN1
    options.dot_nl = True
    options.never_capture = True
    options.log_errors = False
    options.max_mem = 1 << 20
    try:
        compiled = re2.compile(text.encode("ascii"), options)
    except re2.error as error:
        detail = error.args[0] if error.args else b"malformed"
        shown = detail.decode("latin-1") if isinstance(detail, bytes) else str(detail)
        return f"not a valid regular expression: {_short(shown)}", "RE2 syntax: no backreferences, no look-around"
    if compiled.programsize > REGEX_INSTRUCTIONS_MAX:
        return "a regular expression that compiles to too much", "use smaller repetition counts"
    return None


def spiffe_id(text: str) -> Wrong:
    """Exactly canonical, or refused (SPIFFE-ID, section 2; never normalised)."""
    domain, _, path = text.removeprefix("spiffe://").partition("/")
    segments = path.split("/")
    if (
        text.startswith("spiffe://")
        and len(text) <= 2048
        and _TRUST_DOMAIN.match(domain)
        and all(_SPIFFE_SEGMENT.match(each) and each not in (".", "..") for each in segments)
    ):
        return None
    return f'"{_short(text)}" is not a SPIFFE ID', "for example spiffe://mesh.example/service/web"


def caller(text: str) -> Wrong:
    """A service of the own trust domain, or a SPIFFE ID."""
    if text.startswith("spiffe:"):
        return spiffe_id(text)
    if text in ("*", "any", "all"):
        return f'"{text}" is not a caller', "to mean every caller, leave `from` out"
    return label(text)


def filter_use(text: str) -> Wrong:
    if _FILTER_NAME.match(text) or _FILTER_CLASS.match(text):
        return None
    return f'"{_short(text)}" names no filter', "an entry point's name, or module:Class such as my.filters:AddTenant"


def balancer(text: str) -> Wrong:
    """A built-in balancer, an entry point's name, or module:Class. A name that is almost a built-in's is an error."""
    if text in BALANCERS or _FILTER_CLASS.match(text):
        return None
    near = get_close_matches(text.lower().replace("_", "-"), BALANCERS, 1, 0.8)
    if near or not _FILTER_NAME.match(text):
        help = f'did you mean "{near[0]}"?' if near else f"one of {', '.join(BALANCERS)}, or a balancer of your own"
        return f'"{_short(text)}" is not a balancer', help
    return None


def zone(text: str) -> Wrong:
    if text and text.isprintable():
        return None
    return "a zone is a name of printable characters", "for example zone: eu-1a"


def hash_key(text: str) -> Wrong:
    if text in ("caller", "address"):
        return None
    if text.startswith("header:"):
        return asked_header(text.removeprefix("header:"))
    if text.startswith("cookie:"):
        return header_name(text.removeprefix("cookie:"))
    return f'"{_short(text)}" is not a key', "one of header:NAME, cookie:NAME, caller, address"


def rate_key(text: str) -> Wrong:
    if text in ("caller", "address", "none"):
        return None
    if text.startswith("header:"):
        return asked_header(text.removeprefix("header:"))
    return f'"{_short(text)}" is not a key', "one of caller, address, header:NAME, none"


def upgrade_token(text: str) -> Wrong:
    if not _TOKEN.match(text):
        return f'"{_short(text)}" is not an upgrade', "for example websocket"
    if text.lower() in ("h2c", "tls"):
        return f"upgrades to {text.lower()} never pass", "remove it"
    return None


def redirect_target(text: str) -> Wrong:
    if not re.match(r"[\x21-\x7e]+\Z", text):
        return "a redirect's target holds neither spaces nor characters beyond ASCII", "percent-encode them"
    absolute = re.match(r"https?://([^/?#]*)(/|\Z)?", text)
    if absolute is None and re.match(r"/(?![/\\])", text):
        return None
    if absolute is not None and absolute[2] is not None and (not absolute[1] or authority(absolute[1]) is None):
        return None
    return f'"{_short(text)}" is not a redirect\'s target', (
        "for example /new, https://shop.example, https://shop.example/new, or https:// for the same host"
    )


def host(text: str) -> Wrong:
    """An IP address (IPv6 in brackets) or a host name."""
    if _QUAD.match(text):
        return None
    brackets = text.startswith("[") and text.endswith("]")
    try:
        if (ip_address(text[1:-1] if brackets else text).version == 6) == brackets and "%" not in text:
            return None
    except ValueError:
        pass
    labels = text.removesuffix(".").split(".")
    numeric = labels[-1].isdigit()
    if len(text) <= 253 and not numeric and all(_LABEL.match(each.lower()) for each in labels):
        return None
    return f'"{_short(text)}" is not a host name or IP address', ""


def authority(text: str) -> Wrong:
    """What a rewritten Host says: a host with an optional port."""
    return host(text) if host(text) is None else address(text)


def address(text: str) -> Wrong:
    """`10.0.3.7:8443`, `db.example:5432` or `[fd00::1]:8443`."""
    name, colon, port = text.rpartition(":")
    example = "host:port, such as 10.0.3.7:8443 or [fd00::1]:8443"
    if not colon or not name or not port.isascii() or not port.isdigit():
        return f'"{_short(text)}" is not an address', example
    if len(port) > 5 or not 0 < int(port) <= 65535:
        return f'"{_short(text)}" has no valid port', "a port is from 1 to 65535"
    if ":" in name and not (name.startswith("[") and name.endswith("]")):
        return f'"{_short(text)}" is not an address', f"an IPv6 address stands in brackets: [{_short(name)}]:{port}"
    return None if host(name) is None else (f'"{_short(text)}" is not an address', example)


def split_address(text: str) -> tuple[str, int]:
    """A valid address as (host, port); an IPv6 host without brackets, a name in lower case without its last dot."""
    name, _, port = text.rpartition(":")
    if _QUAD.match(name):
        return name, int(port)
    bare = name.strip("[]")
    try:
        return str(ip_address(bare)), int(port)
    except ValueError:
        return name.lower().removesuffix("."), int(port)


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
