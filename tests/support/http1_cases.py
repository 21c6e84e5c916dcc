"""Raw HTTP/1.1 messages with the exact verdict: refused with a status, or one message with exactly this content.

The cases come from the RFCs, from advisories (named where a case has one) and from what request-smuggling scanners and
differential test beds send. Every case is also cut at each byte boundary and compared with other parsers elsewhere.
"""

from dataclasses import dataclass, field
from typing import Any

from sidecar.wire.http1 import Message

HOST = b"Host: a\r\n"


@dataclass(frozen=True)
class Case:
    name: str
    raw: bytes
    status: int = 0  # of the refusal; 0: accepted
    want: dict[str, Any] = field(default_factory=dict)  # what differs from DEFAULTS
    method: bytes = b"GET"  # responses: of the request
    eof: bool | None = None  # responses: what the end of the connection means


REQUEST_DEFAULTS: dict[str, Any] = {
    "method": b"GET",
    "form": "origin",
    "path": b"/",
    "host": b"a",
    "host_key": b"a",
    "headers": [],
    "trailers": [],
    "forwarded": [],
    "body": b"",
    "head": True,
    "done": True,
    "length": None,
    "chunked": False,
    "keep_alive": True,
    "http10": False,
    "upgrade": None,
    "expect_continue": False,
    "traceparent": None,
    "attempt": 0,
    "deadline_ms": None,
    "exhausted": False,
    "reason": None,
}
RESPONSE_DEFAULTS: dict[str, Any] = {
    key: value
    for key, value in REQUEST_DEFAULTS.items()
    if key not in ("method", "form", "path", "host", "host_key", "expect_continue")
} | {"status": 200, "until_close": False}


def describe(m: Message, like: dict[str, Any]) -> dict[str, Any]:
    """Everything a case speaks about, of one message."""
    seen = {key: getattr(m, key) for key in like}
    seen["body"] = b"".join(m.body)
    if "form" in seen:
        seen["form"] = m.form.value
    return seen


def get(fields: bytes = b"", line: bytes = b"GET / HTTP/1.1", host: bytes = HOST) -> bytes:
    return line + b"\r\n" + host + fields + b"\r\n"


def post(fields: bytes, body: bytes = b"", line: bytes = b"POST / HTTP/1.1") -> bytes:
    return line + b"\r\n" + HOST + fields + b"\r\n" + body


def chunked(body: bytes, fields: bytes = b"") -> bytes:
    return post(fields + b"Transfer-Encoding: chunked\r\n", body)


CHUNKED = {"method": b"POST", "chunked": True}
ZERO = b"0\r\n\r\n"
TRACE = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def refuse(name: str, raw: bytes, status: int = 400) -> Case:
    return Case(name, raw, status)


def accept(name: str, raw: bytes, **want: Any) -> Case:
    return Case(name, raw, 0, want)


def header(value: bytes) -> dict[str, Any]:
    return {"headers": [(b"x", value)]}


REQUEST_LINES = [
    accept("plain", get()),
    accept("query", get(line=b"GET /a/b?c=d&e HTTP/1.1"), path=b"/a/b?c=d&e"),
    accept("one empty line first", b"\r\n" + get()),
    refuse("two empty lines first", b"\r\n\r\n" + get()),
    refuse("bare LF first", b"\n" + get()),
    refuse("bare CR first", b"\r" + get()),
    refuse("space first", b" " + get()),
    refuse("empty line then space", b"\r\n " + get()),
    refuse("two spaces after method", get(line=b"GET  / HTTP/1.1")),
    refuse("two spaces after target", get(line=b"GET /  HTTP/1.1")),
    refuse("tab after method", get(line=b"GET\t/ HTTP/1.1")),
    refuse("tab after target", get(line=b"GET /\tHTTP/1.1")),
    refuse("space in target", get(line=b"GET /a b HTTP/1.1")),
    refuse("trailing space", get(line=b"GET / HTTP/1.1 ")),
    refuse("no target", get(line=b"GET HTTP/1.1")),
    refuse("no version", get(line=b"GET /")),
    refuse("0.9 form", b"GET /\r\n\r\n"),
    refuse("version 0.9", get(line=b"GET / HTTP/0.9"), 505),
    refuse("version 1.2", get(line=b"GET / HTTP/1.2"), 505),
    refuse("version 2.0", get(line=b"GET / HTTP/2.0"), 505),
    refuse("version 3.0", get(line=b"GET / HTTP/3.0"), 505),
    refuse("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    refuse("version 1.10", get(line=b"GET / HTTP/1.10")),
    refuse("version 01.1", get(line=b"GET / HTTP/01.1")),
    refuse("version 1", get(line=b"GET / HTTP/1")),
    refuse("version 1,1", get(line=b"GET / HTTP/1,1")),
    refuse("version lower case", get(line=b"GET / http/1.1")),
    refuse("version with sign", get(line=b"GET / HTTP/+1.1")),
    refuse("version with NUL", get(line=b"GET / HTTP/1.\x001")),
    refuse("other protocol", get(line=b"GET / RTSP/1.0")),
    refuse("ICY", get(line=b"GET / ICY/1.1")),
    refuse("method lower case", get(line=b"get / HTTP/1.1"), 501),
    refuse("method mixed case", get(line=b"Get / HTTP/1.1"), 501),
    refuse("method too long", get(line=b"A" * 33 + b" / HTTP/1.1"), 501),
    accept("method of 32", get(line=b"A" * 32 + b" / HTTP/1.1"), method=b"A" * 32),
    accept("method with hyphen", get(line=b"M-SEARCH / HTTP/1.1"), method=b"M-SEARCH"),
    accept("unknown method", get(line=b"FROBNICATE / HTTP/1.1"), method=b"FROBNICATE"),
    refuse("method with colon", get(line=b"GET: / HTTP/1.1")),
    refuse("method quoted", get(line=b'"GET" / HTTP/1.1')),
    refuse("method with slash", get(line=b"GE/T / HTTP/1.1")),
    refuse("method with NUL", get(line=b"G\x00ET / HTTP/1.1")),
    refuse("method not ASCII", get(line=b"G\xc3\x89T / HTTP/1.1")),
    refuse("target with NUL", get(line=b"GET /\x00 HTTP/1.1")),
    refuse("target with DEL", get(line=b"GET /\x7f HTTP/1.1")),
    refuse("target with vertical tab", get(line=b"GET /\x0b HTTP/1.1")),
    refuse("target not ASCII", get(line=b"GET /\xc3\xa9 HTTP/1.1")),
    refuse("fragment", get(line=b"GET /a#b HTTP/1.1")),
    refuse("bare CR in line", get(line=b"GET /\rHTTP/1.1")),
    refuse("bare LF ends line", b"GET / HTTP/1.1\nHost: a\r\n\r\n"),
    refuse("bare CR ends line", b"GET / HTTP/1.1\rHost: a\r\n\r\n"),
    refuse("CR CR LF ends line", b"GET / HTTP/1.1\r\r\nHost: a\r\n\r\n"),
    refuse("all bare LF", b"GET / HTTP/1.1\nHost: a\n\n"),
    refuse("second line in request line (CVE-2019-9740)", b"GET /\r\nX: y HTTP/1.1\r\nHost: a\r\n\r\n"),
    accept("line of 8192", get(line=b"GET /" + b"a" * 8178 + b" HTTP/1.1"), path=b"/" + b"a" * 8178),
    refuse("line of 8193", get(line=b"GET /" + b"a" * 8179 + b" HTTP/1.1"), 414),
    refuse("line without end", b"GET /" + b"a" * 9000, 414),
    refuse("line without end, NUL early", b"GET /\x00" + b"a" * 9000),
    refuse("line without end, NUL late", b"GET /" + b"a" * 8300 + b"\x00", 414),
    refuse("TLS ClientHello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    refuse("SSH banner", b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n\r\n"),
]

TARGETS = [
    accept("double slash", get(line=b"GET //a HTTP/1.1"), path=b"//a"),
    accept("dots are left alone", get(line=b"GET /a/../b HTTP/1.1"), path=b"/a/../b"),
    accept("encoded slash is left alone", get(line=b"GET /a%2Fb HTTP/1.1"), path=b"/a%2Fb"),
    accept("backslash is left alone", get(line=b"GET /a\\b HTTP/1.1"), path=b"/a\\b"),
    accept("absolute", get(line=b"GET http://b/x HTTP/1.1"), form="absolute", path=b"/x", host=b"b", host_key=b"b"),
    accept("absolute upper case", get(line=b"GET HTTP://B HTTP/1.1"), form="absolute", host=b"B", host_key=b"b"),
    accept("absolute https", get(line=b"GET https://b/ HTTP/1.1"), form="absolute", host=b"b", host_key=b"b"),
    accept("absolute port", get(line=b"GET http://b:81/ HTTP/1.1"), form="absolute", host=b"b:81", host_key=b"b"),
    accept(
        "absolute query", get(line=b"GET http://b?q HTTP/1.1"), form="absolute", path=b"/?q", host=b"b", host_key=b"b"
    ),
    accept(
        "absolute OPTIONS without path",
        get(line=b"OPTIONS http://b HTTP/1.1"),
        method=b"OPTIONS",
        form="absolute",
        path=b"*",
        host=b"b",
        host_key=b"b",
    ),
    accept(
        "absolute HTTP/1.0 without Host",
        get(line=b"GET http://b/ HTTP/1.0", host=b""),
        form="absolute",
        host=b"b",
        host_key=b"b",
        http10=True,
        keep_alive=False,
    ),
    refuse("absolute without Host", get(line=b"GET http://b/ HTTP/1.1", host=b"")),
    refuse("absolute with bad Host", get(line=b"GET http://b/ HTTP/1.1", host=b"Host: a@b\r\n")),
    refuse("absolute userinfo", get(line=b"GET http://u@b/ HTTP/1.1")),
    refuse("absolute userinfo with password", get(line=b"GET http://u:p@b/ HTTP/1.1")),
    refuse("absolute empty host", get(line=b"GET http:///x HTTP/1.1")),
    refuse("absolute only port", get(line=b"GET http://:80/ HTTP/1.1")),
    refuse("absolute one slash", get(line=b"GET http:/b/ HTTP/1.1")),
    refuse("absolute no slashes", get(line=b"GET http:b HTTP/1.1")),
    refuse("absolute backslash in host", get(line=b"GET http://b\\c/ HTTP/1.1")),
    refuse("absolute fragment", get(line=b"GET http://b/#x HTTP/1.1")),
    refuse("scheme ftp", get(line=b"GET ftp://b/ HTTP/1.1")),
    refuse("scheme file", get(line=b"GET file:///etc/passwd HTTP/1.1")),
    refuse("scheme ws", get(line=b"GET ws://b/ HTTP/1.1")),
    refuse("relative path", get(line=b"GET a/b HTTP/1.1")),
    refuse("dot path", get(line=b"GET ./a HTTP/1.1")),
    refuse("query only", get(line=b"GET ?a HTTP/1.1")),
    refuse("at sign (smuggler 'collab-at')", get(line=b"GET @b/ HTTP/1.1")),
    refuse("authority with GET", get(line=b"GET b:80 HTTP/1.1")),
    refuse("GET *", get(line=b"GET * HTTP/1.1")),
    refuse("POST *", get(line=b"POST * HTTP/1.1")),
    accept("OPTIONS *", get(line=b"OPTIONS * HTTP/1.1"), method=b"OPTIONS", form="asterisk", path=b"*"),
    refuse("OPTIONS **", get(line=b"OPTIONS ** HTTP/1.1")),
    accept(
        "CONNECT",
        get(line=b"CONNECT b:443 HTTP/1.1"),
        method=b"CONNECT",
        form="authority",
        path=b"",
        host=b"b:443",
        host_key=b"b",
    ),
    accept(
        "CONNECT IPv6",
        get(line=b"CONNECT [::1]:443 HTTP/1.1"),
        method=b"CONNECT",
        form="authority",
        path=b"",
        host=b"[::1]:443",
        host_key=b"[::1]",
    ),
    refuse("CONNECT without port", get(line=b"CONNECT b HTTP/1.1")),
    refuse("CONNECT IPv6 without port", get(line=b"CONNECT [::1] HTTP/1.1")),
    refuse("CONNECT with path", get(line=b"CONNECT /x HTTP/1.1")),
    refuse("CONNECT absolute", get(line=b"CONNECT http://b:80/ HTTP/1.1")),
    refuse("CONNECT with content-length", get(b"Content-Length: 3\r\n", line=b"CONNECT b:443 HTTP/1.1") + b"abc"),
    refuse("CONNECT chunked", get(b"Transfer-Encoding: chunked\r\n", line=b"CONNECT b:443 HTTP/1.1") + ZERO),
    refuse("TRACE with content", get(b"Content-Length: 3\r\n", line=b"TRACE / HTTP/1.1") + b"abc"),
    accept("TRACE", get(line=b"TRACE / HTTP/1.1"), method=b"TRACE"),
]


def host(name: str, value: bytes, key: bytes | None) -> Case:
    name = "host: " + name
    raw = get(host=b"Host: " + value + b"\r\n")
    return refuse(name, raw) if key is None else accept(name, raw, host=value, host_key=key)


HOSTS = [
    refuse("no host", get(host=b"")),
    accept(
        "no host in HTTP/1.0",
        get(line=b"GET / HTTP/1.0", host=b""),
        host=None,
        host_key=b"",
        http10=True,
        keep_alive=False,
    ),
    refuse("two hosts", get(b"Host: b\r\n")),
    refuse("two equal hosts", get(b"Host: a\r\n")),
    refuse("two hosts in HTTP/1.0", get(b"Host: b\r\n", line=b"GET / HTTP/1.0")),
    refuse("second host empty", get(b"Host:\r\n")),
    refuse("first host empty", get(host=b"Host:\r\nHost: a\r\n")),
    refuse("hosts in two cases", get(b"hOsT: a\r\n")),
    host("empty host", b"", None),
    host("list of hosts", b"a, b", None),
    host("case and port", b"Reviews.Mesh:8080", b"reviews.mesh"),
    host("trailing dot (CVE-2021-39155)", b"reviews.mesh.", b"reviews.mesh"),
    host("trailing dot and port", b"reviews.mesh.:80", b"reviews.mesh"),
    host("two trailing dots", b"reviews.mesh..", None),
    host("only a dot", b".", None),
    host("empty label", b"a..b", None),
    host("leading dot", b".a", None),
    host("userinfo", b"u@a", None),
    host("path", b"a/b", None),
    host("query", b"a?b", None),
    host("fragment", b"a#b", None),
    host("backslash", b"a\\b", None),
    host("space inside", b"a b", None),
    host("tab inside", b"a\tb", None),
    host("percent-encoded", b"%61", None),
    host("not ASCII", b"\xc3\xa9", None),
    host("scheme", b"http://a", None),
    host("empty port", b"a:", None),
    host("port zero", b"a:0", None),
    host("port too large", b"a:65536", None),
    host("largest port", b"a:65535", b"a"),
    host("port with sign", b"a:+80", None),
    host("port with leading zero", b"a:080", None),
    host("port with letters", b"a:80x", None),
    host("two ports", b"a:80:81", None),
    host("port only", b":80", None),
    host("IPv4", b"127.0.0.1:9801", b"127.0.0.1"),
    host("IPv6", b"[::1]", b"[::1]"),
    host("IPv6 and port", b"[FE80::A]:80", b"[fe80::a]"),
    host("IPv6 without brackets", b"::1", None),
    host("IPv6 unclosed", b"[::1", None),
    host("IPv6 malformed", b"[1:2]", None),
    host("IPv6 zone", b"[fe80::1%25eth0]", None),
    host("IPv6 and dot", b"[::1].", None),
    host("IPv6 and label", b"[::1]a", None),
    host("underscore", b"a_b", b"a_b"),
    host("too long", b"a" * 300, None),
    refuse("folded host", get(host=b"Host:\r\n a\r\n")),
    accept("host surrounded by white space", get(host=b"Host: \t a \t \r\n")),
    accept("host without space", get(host=b"Host:a\r\n")),
]

FIELDS = [
    accept("value", get(b"X: y\r\n"), **header(b"y")),
    accept("name in lower case", get(b"X-Y-Z: y\r\n"), headers=[(b"x-y-z", b"y")]),
    accept("order and repeats", get(b"B: 1\r\nA: 2\r\nB: 3\r\n"), headers=[(b"b", b"1"), (b"a", b"2"), (b"b", b"3")]),
    accept("empty value", get(b"X:\r\n"), **header(b"")),
    accept("blank value", get(b"X: \t \r\n"), **header(b"")),
    accept("outer white space", get(b"X: \t y z \t\r\n"), **header(b"y z")),
    accept("inner tab", get(b"X: y\tz\r\n"), **header(b"y\tz")),
    accept("obs-text", get(b"X: \xe9\xff\r\n"), **header(b"\xe9\xff")),
    accept("colons in value", get(b"X: a:b: c\r\n"), **header(b"a:b: c")),
    accept("no space after colon", get(b"X:y\r\n"), **header(b"y")),
    accept("all token characters", get(b"!#$%&'*+-.^_`|~9: y\r\n"), headers=[(b"!#$%&'*+-.^_`|~9", b"y")]),
    refuse("empty name (CVE-2023-25725)", get(b": y\r\n")),
    refuse("only a colon", get(b":\r\n")),
    refuse("no colon", get(b"X\r\n")),
    refuse("no colon, spaces", get(b"X y\r\n")),
    refuse("space before colon", get(b"X : y\r\n")),
    refuse("tab before colon", get(b"X\t: y\r\n")),
    refuse("space in name", get(b"X Y: z\r\n")),
    refuse("name with quote", get(b'X": y\r\n')),
    refuse("name with parenthesis", get(b"X(: y\r\n")),
    refuse("name with slash", get(b"X/: y\r\n")),
    refuse("name with brackets", get(b"[X]: y\r\n")),
    refuse("name with NUL", get(b"X\x00: y\r\n")),
    refuse("name with DEL", get(b"X\x7f: y\r\n")),
    refuse("name not ASCII", get(b"X\xe9: y\r\n")),
    refuse("name with vertical tab", get(b"\x0bX: y\r\n")),
    refuse("name not breaking space", get(b"\xa0X: y\r\n")),
    refuse("byte order mark", get(b"\xef\xbb\xbfX: y\r\n")),
    refuse("value with NUL (CVE-2019-9900)", get(b"X: y\x00z\r\n")),
    refuse("value with bell", get(b"X: y\x07\r\n")),
    refuse("value with escape", get(b"X: \x1b[2J\r\n")),
    refuse("value with DEL", get(b"X: y\x7f\r\n")),
    refuse("value with vertical tab", get(b"X: \x0by\r\n")),
    refuse("value with form feed", get(b"X: y\x0c\r\n")),
    refuse("bare CR in value", get(b"X: y\rZ: z\r\n")),
    refuse("bare LF in value", get(b"X: y\nZ: z\r\n")),
    refuse("CR CR LF", get(b"X: y\r\r\n")),
    refuse("LF CR", get(b"X: y\n\r\n")),
    refuse("bare LF ends the head", b"GET / HTTP/1.1\r\nHost: a\r\n\n"),
    refuse("bare CR ends the head", b"GET / HTTP/1.1\r\nHost: a\r\n\rX: y\r\n\r\n"),
    refuse("obs-fold with space", get(b"X: y\r\n z\r\n")),
    refuse("obs-fold with tab", get(b"X: y\r\n\tz\r\n")),
    refuse("obs-fold at once", get(host=b" Host: a\r\n")),
    refuse("obs-fold blank", get(b"X: y\r\n \r\n")),
    accept("100 fields", get(b"X: y\r\n" * 99), headers=[(b"x", b"y")] * 99),
    refuse("101 fields", get(b"X: y\r\n" * 100), 431),
    refuse("1000 fields", get(b"X: y\r\n" * 999), 431),
    accept("head of 65536", get(b"X: " + b"y" * (65536 - 32) + b"\r\n"), **header(b"y" * (65536 - 32))),
    refuse("head of 65537", get(b"X: " + b"y" * (65536 - 31) + b"\r\n"), 431),
    refuse("head without end", get(b"X: " + b"y" * 70000)[:-2], 431),
    refuse("fields without end", b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 12000, 431),
]

LENGTHS = [
    accept("length", post(b"Content-Length: 3\r\n", b"abc"), method=b"POST", length=3, body=b"abc"),
    accept("length zero", post(b"Content-Length: 0\r\n"), method=b"POST", length=0),
    accept("length of a GET", get(b"Content-Length: 3\r\n") + b"abc", length=3, body=b"abc"),
    accept("POST without length", post(b""), method=b"POST"),
    accept(
        "length with leading zeros", post(b"Content-Length: 003\r\n", b"abc"), method=b"POST", length=3, body=b"abc"
    ),
    accept(
        "length incomplete", post(b"Content-Length: 5\r\n", b"abc"), method=b"POST", length=5, body=b"abc", done=False
    ),
    accept(
        "length of 18 digits",
        post(b"Content-Length: " + b"9" * 18 + b"\r\n"),
        method=b"POST",
        length=10**18 - 1,
        done=False,
    ),
    refuse("length of 19 digits", post(b"Content-Length: 1" + b"0" * 18 + b"\r\n")),
    refuse("length 2^64 + 3", post(b"Content-Length: 18446744073709551619\r\n", b"abc")),
    refuse("length of 1000 digits (CVE-2023-38697)", post(b"Content-Length: " + b"0" * 999 + b"3\r\n", b"abc")),
    refuse("length with plus", post(b"Content-Length: +3\r\n", b"abc")),
    refuse("length with minus", post(b"Content-Length: -3\r\n", b"abc")),
    refuse("length minus zero", post(b"Content-Length: -0\r\n")),
    refuse("length hexadecimal", post(b"Content-Length: 0x3\r\n", b"abc")),
    refuse("length octal", post(b"Content-Length: 0o3\r\n", b"abc")),
    refuse("length hexadecimal digits", post(b"Content-Length: a\r\n", b"0123456789")),
    refuse("length with underscore", post(b"Content-Length: 1_0\r\n", b"0123456789")),
    refuse("length decimal", post(b"Content-Length: 3.0\r\n", b"abc")),
    refuse("length exponent", post(b"Content-Length: 3e0\r\n", b"abc")),
    refuse("length empty", post(b"Content-Length:\r\n")),
    refuse("length quoted", post(b'Content-Length: "3"\r\n', b"abc")),
    refuse("length with space inside", post(b"Content-Length: 1 0\r\n", b"0123456789")),
    refuse("length with semicolon", post(b"Content-Length: 3;\r\n", b"abc")),
    refuse("length with trailing comma", post(b"Content-Length: 3,\r\n", b"abc")),
    refuse("length list of equals", post(b"Content-Length: 3, 3\r\n", b"abc")),
    refuse("length list", post(b"Content-Length: 3, 4\r\n", b"abc")),
    refuse("length repeated", post(b"Content-Length: 3\r\nContent-Length: 4\r\n", b"abc")),
    refuse("length repeated equal", post(b"Content-Length: 3\r\nContent-Length: 3\r\n", b"abc")),
    refuse("length repeated, empty", post(b"Content-Length: 3\r\nContent-Length:\r\n", b"abc")),
    refuse("length repeated, other case", post(b"Content-Length: 3\r\ncontent-length: 0\r\n", b"abc")),
    refuse("length full-width digit", post(b"Content-Length: \xef\xbc\x93\r\n", b"abc")),
    refuse("length with NUL", post(b"Content-Length: 3\x00\r\n", b"abc")),
    refuse("length before colon space", post(b"Content-Length : 3\r\n", b"abc")),
    refuse("length folded", post(b"Content-Length:\r\n 3\r\n", b"abc")),
    refuse("length with underscore name", post(b"Content_Length: 3\r\n", b"abc")),
    accept("length white space", post(b"Content-Length: \t3 \r\n", b"abc"), method=b"POST", length=3, body=b"abc"),
    accept(
        "body that looks like a request",
        post(b"Content-Length: 23\r\n", get()[:23]),
        method=b"POST",
        length=23,
        body=get()[:23],
    ),
]

CODINGS = [
    accept("chunked", chunked(b"3\r\nabc\r\n" + ZERO), **CHUNKED, body=b"abc"),
    accept("chunked in capitals", post(b"TRANSFER-ENCODING: CHUNKED\r\n", ZERO), **CHUNKED),
    accept("chunked with outer space", post(b"Transfer-Encoding: \tchunked\t \r\n", ZERO), **CHUNKED),
    refuse("CL.TE", post(b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n", ZERO + b"G")),
    refuse(
        "TE.CL", post(b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n", b"5c\r\nGPOST / HTTP/1.1\r\n\r\n" + ZERO)
    ),
    refuse("CL.0 with TE", post(b"Content-Length: 0\r\nTransfer-Encoding: chunked\r\n", ZERO)),
    refuse("TE identity and CL", post(b"Transfer-Encoding: identity\r\nContent-Length: 3\r\n", b"abc")),
    refuse("TE.TE x", post(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n", ZERO)),
    refuse("TE.TE identity first", post(b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n", ZERO)),
    refuse("TE repeated", post(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", ZERO)),
    refuse("TE repeated, other case", post(b"Transfer-Encoding: chunked\r\ntransfer-encoding: cow\r\n", ZERO)),
    refuse("TE repeated, empty", post(b"Transfer-Encoding:\r\nTransfer-Encoding: chunked\r\n", ZERO)),
    refuse("TE in HTTP/1.0 (CVE-2021-33193)", post(b"Transfer-Encoding: chunked\r\n", ZERO, line=b"POST / HTTP/1.0")),
    refuse("TE with underscore name", post(b"Transfer_Encoding: chunked\r\n", ZERO)),
    refuse("TE with dotted name", post(b"Transfer.Encoding: chunked\r\n", ZERO)),
    refuse("TE space before name", post(b" Transfer-Encoding: chunked\r\n", ZERO)),
    refuse("TE space before colon", post(b"Transfer-Encoding : chunked\r\n", ZERO)),
    refuse("TE tab before colon", post(b"Transfer-Encoding\t: chunked\r\n", ZERO)),
    refuse("TE fold before colon", post(b"Transfer-Encoding\r\n : chunked\r\n", ZERO)),
    refuse("TE folded value", post(b"Transfer-Encoding:\r\n chunked\r\n", ZERO)),
    refuse("TE folded second", post(b"Transfer-Encoding: chunked\r\n , identity\r\n", ZERO)),
    refuse("TE vertical tab", post(b"Transfer-Encoding: \x0bchunked\r\n", ZERO)),
    refuse("TE form feed", post(b"Transfer-Encoding: chunked\x0c\r\n", ZERO)),
    refuse("TE bare CR", post(b"Transfer-Encoding: chunked\r\r\n", ZERO)),
    refuse("TE bare LF before", post(b"Foo: bar\nTransfer-Encoding: chunked\r\n", ZERO)),
    refuse("TE bare CR before", post(b"Foo: bar\rTransfer-Encoding: chunked\r\n", ZERO)),
    refuse("TE NUL", post(b"Transfer-Encoding: chunked\x00\r\n", ZERO)),
    refuse("TE high bit", post(b"Transfer-Encoding: \xffchunked\r\n", ZERO)),
    refuse("TE not breaking space", post(b"Transfer-Encoding:\xa0chunked\r\n", ZERO)),
    refuse("TE quoted", post(b'Transfer-Encoding: "chunked"\r\n', ZERO)),
    refuse("TE single-quoted", post(b"Transfer-Encoding: 'chunked'\r\n", ZERO)),
    refuse("TE gzip, chunked", post(b"Transfer-Encoding: gzip, chunked\r\n", ZERO)),
    refuse("TE chunked, identity", post(b"Transfer-Encoding: chunked, identity\r\n", ZERO)),
    refuse("TE chunked, chunked", post(b"Transfer-Encoding: chunked, chunked\r\n", ZERO)),
    refuse("TE leading comma", post(b"Transfer-Encoding: , chunked\r\n", ZERO)),
    refuse("TE trailing comma", post(b"Transfer-Encoding: chunked,\r\n", ZERO)),
    refuse("TE parameter", post(b"Transfer-Encoding: chunked;q=1\r\n", ZERO)),
    refuse("TE space inside", post(b"Transfer-Encoding: chun ked\r\n", ZERO)),
    refuse("TE xchunked", post(b"Transfer-Encoding: xchunked\r\n", ZERO)),
    refuse("TE chunkedx", post(b"Transfer-Encoding: chunkedx\r\n", ZERO)),
    refuse("TE chunk", post(b"Transfer-Encoding: chunk\r\n", ZERO)),
    refuse("TE chunked x", post(b"Transfer-Encoding: chunked x\r\n", ZERO)),
    refuse("TE empty", post(b"Transfer-Encoding:\r\n", ZERO)),
    refuse("TE identity", post(b"Transfer-Encoding: identity\r\n")),
    refuse("TE without colon", post(b"Transfer-Encoding chunked\r\n", ZERO)),
    refuse("TE cut name", post(b"Transfer-Encoding\x00: chunked\r\n", ZERO)),
]


def chunk_body(name: str, body: bytes, want: bytes | None, **more: Any) -> Case:
    name = "chunks: " + name
    raw = chunked(body)
    return refuse(name, raw) if want is None else accept(name, raw, **(CHUNKED | {"body": want} | more))


LONG_NAME = b"x" * 4095
CHUNKS = [
    chunk_body("two chunks", b"3\r\nabc\r\n2\r\nde\r\n" + ZERO, b"abcde"),
    chunk_body("upper-case size", b"A\r\n0123456789\r\n" + ZERO, b"0123456789"),
    chunk_body("lower-case size", b"a\r\n0123456789\r\n" + ZERO, b"0123456789"),
    chunk_body("leading zeros", b"0003\r\nabc\r\n000\r\n\r\n", b"abc"),
    chunk_body("15 digits", b"000000000000003\r\nabc\r\n" + ZERO, b"abc"),
    chunk_body("16 digits", b"0000000000000003\r\nabc\r\n" + ZERO, None),
    chunk_body("overflow of 64 bits", b"10000000000000003\r\nabc\r\n" + ZERO, None),
    chunk_body("thousand zeros", b"0" * 1000 + b"3\r\nabc\r\n" + ZERO, None),
    chunk_body("incomplete", b"3\r\nab", b"ab", done=False),
    chunk_body("incomplete size", b"3", b"", done=False),
    chunk_body("no end", b"3\r\nabc\r\n", b"abc", done=False),
    chunk_body("no last line", b"3\r\nabc\r\n0\r\n", b"abc", done=False),
    chunk_body("plus", b"+3\r\nabc\r\n" + ZERO, None),
    chunk_body("minus", b"-3\r\nabc\r\n" + ZERO, None),
    chunk_body("0x", b"0x3\r\nabc\r\n" + ZERO, None),
    chunk_body("0X", b"0X3\r\nabc\r\n" + ZERO, None),
    chunk_body("underscore", b"1_0\r\n0123456789abcdef\r\n" + ZERO, None),
    chunk_body("not a number", b"g\r\nabc\r\n" + ZERO, None),
    chunk_body("empty size", b"\r\nabc\r\n" + ZERO, None),
    chunk_body("space before size", b" 3\r\nabc\r\n" + ZERO, None),
    chunk_body("tab before size", b"\t3\r\nabc\r\n" + ZERO, None),
    chunk_body("space after size", b"3 \r\nabc\r\n" + ZERO, None),
    chunk_body("tab after size", b"3\t\r\nabc\r\n" + ZERO, None),
    chunk_body("space inside size", b"1 0\r\n0123456789abcdef\r\n" + ZERO, None),
    chunk_body("NUL after size", b"3\x00\r\nabc\r\n" + ZERO, None),
    chunk_body("comma", b"3,3\r\nabc\r\n" + ZERO, None),
    chunk_body("decimal point", b"3.0\r\nabc\r\n" + ZERO, None),
    chunk_body("bare LF after size (CVE-2025-22871)", b"3\nabc\r\n" + ZERO, None),
    chunk_body("bare CR after size", b"3\rabc\r\n" + ZERO, None),
    chunk_body("CR CR LF after size", b"3\r\r\nabc\r\n" + ZERO, None),
    chunk_body("bare LF after data (CVE-2025-43859)", b"3\r\nabc\n" + ZERO, None),
    chunk_body("bare CR after data", b"3\r\nabc\r0\r\n\r\n", None),
    chunk_body("two bytes for CRLF (CVE-2025-43859)", b"3\r\nabcXX0\r\n\r\n", None),
    chunk_body("nothing after data", b"3\r\nabc0\r\n\r\n", None),
    chunk_body("data longer than size", b"3\r\nabcd\r\n" + ZERO, None),
    chunk_body("data shorter than size", b"5\r\nabc\r\n" + ZERO, None),
    chunk_body("two CRLF after data", b"3\r\nabc\r\n\r\n0\r\n\r\n", None),
    chunk_body("bare LF after zero", b"0\n\r\n", None),
    chunk_body("bare LF at the end", b"0\r\n\n", None),
    chunk_body("bare CR at the end", b"0\r\n\rX", None),
    chunk_body("extension", b"3;a\r\nabc\r\n" + ZERO, b"abc"),
    chunk_body("extension with value", b"3;a=b;c=d\r\nabc\r\n0;e\r\n\r\n", b"abc"),
    chunk_body("extension quoted", b'3;a="b c;\\" d"\r\nabc\r\n' + ZERO, b"abc"),
    chunk_body("extension quoted with line end", b'3;a="\r\nabc\r\n' + ZERO, None),
    chunk_body("extension empty", b"3;\r\nabc\r\n" + ZERO, None),
    chunk_body("extension with space", b"3; a\r\nabc\r\n" + ZERO, None),
    chunk_body("space before extension", b"3 ;a\r\nabc\r\n" + ZERO, None),
    chunk_body("extension with bare LF", b"3;a\nb\r\nabc\r\n" + ZERO, None),
    chunk_body("extension with bare CR", b"3;a\rb\r\nabc\r\n" + ZERO, None),
    chunk_body("extension ends in bare LF", b"3;\nxx\r\n4c\r\n" + ZERO, None),
    chunk_body("extension with NUL", b"3;a\x00\r\nabc\r\n" + ZERO, None),
    chunk_body("extension without end", b"3;" + b"a" * 5000, None),
    chunk_body("extension of 4096", b"3;" + LONG_NAME + b"\r\nabc\r\n" + ZERO, b"abc"),
    chunk_body("extension of 4097", b"3;" + LONG_NAME + b"x\r\nabc\r\n" + ZERO, None),
    chunk_body("extensions of 4 KB together (CVE-2023-39326)", (b"1;" + b"x" * 1000 + b"\r\na\r\n") * 5 + ZERO, None),
    chunk_body("trailer", b"3\r\nabc\r\n0\r\nX-Sum: 1\r\n\r\n", b"abc", trailers=[(b"x-sum", b"1")]),
    chunk_body("trailer incomplete", b"0\r\nX-Sum: 1\r\n", b"", done=False),
    chunk_body(
        "trailers that route or authenticate",
        b"0\r\nHost: evil\r\nAuthorization: x\r\nCookie: x\r\nConnection: close\r\nX-Pillion-Attempt: 1\r\n"
        b"x_pillion_attempt: 2\r\nX-Forwarded-For: 1.2.3.4\r\nX-Forwarded-Client-Cert: x\r\nTraceparent: "
        + TRACE
        + b"\r\n"
        b"Content-Type: x\r\nSet-Cookie: x\r\nset_cookie: x\r\nExpect: 100-continue\r\nUpgrade: websocket\r\nTE: x\r\n"
        b"Trailer: x\r\nForwarded: x\r\nX-Real-IP: x\r\nOk: yes\r\n\r\n",
        b"",
        trailers=[(b"ok", b"yes")],
    ),
    chunk_body("trailer content-length", b"0\r\nContent-Length: 3\r\n\r\n", None),
    chunk_body("trailer transfer-encoding", b"0\r\nTransfer-Encoding: chunked\r\n\r\n", None),
    chunk_body("trailer content_length", b"0\r\nContent_Length: 3\r\n\r\n", None),
    chunk_body("trailer with space before colon", b"0\r\nX : y\r\n\r\n", None),
    chunk_body("trailer folded", b"0\r\nX: y\r\n z\r\n\r\n", None),
    chunk_body("trailer without colon", b"0\r\nX\r\n\r\n", None),
    chunk_body("trailer with bare LF", b"0\r\nX: y\nZ: z\r\n\r\n", None),
    chunk_body("trailer with NUL", b"0\r\nX: \x00\r\n\r\n", None),
    refuse("trailers too large", chunked(b"0\r\nX: " + b"y" * 9000 + b"\r\n\r\n"), 431),
    refuse("trailers without end", chunked(b"0\r\n" + b"X: y\r\n" * 2000), 431),
    refuse("too many trailers", chunked(b"0\r\n" + b"X: y\r\n" * 101 + b"\r\n"), 431),
]

SPECIALS = [
    accept("hop-by-hop", get(b"Keep-Alive: 5\r\nProxy-Connection: x\r\nTE: trailers\r\nProxy-Authorization: x\r\n")),
    accept("keep-alive", get(b"Connection: keep-alive\r\n")),
    accept("close", get(b"Connection: close\r\n"), keep_alive=False),
    accept("close in a list", get(b"Connection: Keep-Alive , ,CLOSE\r\n"), keep_alive=False),
    accept("close in a second field", get(b"Connection: keep-alive\r\nConnection: close\r\n"), keep_alive=False),
    accept("HTTP/1.0", get(line=b"GET / HTTP/1.0"), http10=True, keep_alive=False),
    accept("HTTP/1.0 keep-alive", get(b"Connection: Keep-Alive\r\n", line=b"GET / HTTP/1.0"), http10=True),
    accept("nominated", get(b"X: y\r\nConnection: x, close\r\nZ: z\r\n"), headers=[(b"z", b"z")], keep_alive=False),
    accept("nominated forwarding", get(b"X-Forwarded-For: y\r\nConnection: X-Forwarded-For\r\n")),
    accept(
        "nominated framing",
        post(b"Connection: content-length, host\r\nContent-Length: 3\r\n", b"abc"),
        method=b"POST",
        length=3,
        body=b"abc",
    ),
    accept(
        "nominated coding", post(b"Connection: transfer-encoding\r\nTransfer-Encoding: chunked\r\n", ZERO), **CHUNKED
    ),
    accept("nominated identity", get(b"X-Pillion-Attempt: 1\r\nConnection: x-pillion-attempt\r\n")),
    accept("nominated trace", get(b"traceparent: " + TRACE + b"\r\nConnection: traceparent\r\n")),
    accept("upgrade", get(b"Upgrade: WebSocket\r\nConnection: Upgrade\r\n"), upgrade=b"websocket"),
    accept("upgrade not nominated (CVE-2024-23326)", get(b"Upgrade: websocket\r\n")),
    accept("upgrade without field", get(b"Connection: upgrade\r\n")),
    accept(
        "upgrade in HTTP/1.0",
        get(b"Upgrade: websocket\r\nConnection: upgrade\r\n", line=b"GET / HTTP/1.0"),
        http10=True,
        keep_alive=False,
    ),
    accept("h2c", get(b"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\nConnection: Upgrade, HTTP2-Settings\r\n")),
    accept("h2c and websocket", get(b"Upgrade: H2C, websocket\r\nConnection: upgrade\r\n"), upgrade=b"websocket"),
    accept(
        "upgrade with body",
        post(b"Upgrade: x/1\r\nConnection: upgrade\r\nContent-Length: 3\r\n", b"abc"),
        method=b"POST",
        upgrade=b"x/1",
        length=3,
        body=b"abc",
    ),
    accept(
        "expect",
        post(b"Expect: 100-continue\r\nContent-Length: 3\r\n", b"abc"),
        method=b"POST",
        length=3,
        body=b"abc",
        expect_continue=True,
    ),
    accept("expect in capitals", chunked(ZERO, b"EXPECT: 100-CONTINUE\r\n"), **CHUNKED, expect_continue=True),
    accept("expect without content", get(b"Expect: 100-continue\r\n")),
    accept(
        "expect in HTTP/1.0",
        post(b"Expect: 100-continue\r\nContent-Length: 1\r\n", b"a", line=b"POST / HTTP/1.0"),
        method=b"POST",
        http10=True,
        keep_alive=False,
        length=1,
        body=b"a",
    ),
    refuse("expect something else", get(b"Expect: 200-ok\r\n"), 417),
    refuse("expect a list", get(b"Expect: 100-continue, x\r\n"), 417),
    refuse("expect empty", get(b"Expect:\r\n"), 417),
    refuse("expect twice", get(b"Expect: 100-continue\r\nExpect: 100-continue\r\n"), 417),
    accept(
        "trace",
        get(b"Traceparent: " + TRACE + b"\r\nTracestate: a=b\r\n"),
        traceparent=TRACE,
        headers=[(b"tracestate", b"a=b")],
    ),
    accept("trace in capitals", get(b"traceparent: " + TRACE.upper() + b"\r\nTracestate: a=b\r\n")),
    accept("trace twice", get((b"traceparent: " + TRACE + b"\r\n") * 2)),
    accept("trace version ff", get(b"traceparent: ff" + TRACE[2:] + b"\r\n")),
    accept("trace id zero", get(b"traceparent: 00-" + b"0" * 32 + TRACE[35:] + b"\r\n")),
    accept("parent id zero", get(b"traceparent: " + TRACE[:36] + b"0" * 16 + b"-01\r\n")),
    accept("trace too long", get(b"traceparent: " + TRACE + b"-00\r\n")),
    accept(
        "between sidecars",
        get(
            b"X-Pillion-Attempt: 2\r\nX-Request-Deadline-Ms: 1500\r\n"
            b"X-Pillion-Retried: exhausted\r\nX-Pillion-Reason: timeout_try\r\n"
        ),
        attempt=2,
        deadline_ms=1500,
        exhausted=True,
    ),
    accept("deadline zero", get(b"X-Request-Deadline-Ms: 0\r\n"), deadline_ms=0),
    accept("nonsense", get(b"X-Pillion-Attempt: -1\r\nX-Request-Deadline-Ms: 1e3\r\nX-Pillion-Retried: yes\r\n")),
    accept("attempt too long", get(b"X-Pillion-Attempt: 1000\r\n")),
    accept("attempt repeated", get(b"X-Pillion-Attempt: 1\r\nX-Pillion-Attempt: 1\r\n")),
    accept("unknown x-pillion", get(b"X-Pillion-Identity: me\r\nx_pillion_identity: me\r\nX.Pillion.Identity: me\r\n")),
    accept(
        "other spellings",
        get(b"x_pillion_attempt: 2\r\nX-Pillion_Attempt: 2\r\nx_request_deadline_ms: 5\r\nTrace_Parent: x\r\n"),
        headers=[(b"trace_parent", b"x")],
    ),
    accept(
        "forwarding",
        get(b"X-Forwarded-For: 1.2.3.4\r\nForwarded: for=x\r\nX-Real-Ip: y\r\nX-Forwarded-Proto: https\r\n"),
        forwarded=[
            (b"x-forwarded-for", b"1.2.3.4"),
            (b"forwarded", b"for=x"),
            (b"x-real-ip", b"y"),
            (b"x-forwarded-proto", b"https"),
        ],
    ),
    accept(
        "forwarding, other spellings", get(b"X_Forwarded_For: 1.2.3.4\r\nx-forwarded_proto: https\r\nX_Real_IP: y\r\n")
    ),
    accept("client cert", get(b"X-Forwarded-Client-Cert: By=x\r\nx_forwarded_client_cert: By=x\r\n")),
    accept("host with underscore is another name", get(b"Host_: b\r\n"), headers=[(b"host_", b"b")]),
]

REQUESTS = REQUEST_LINES + TARGETS + HOSTS + FIELDS + LENGTHS + CODINGS + CHUNKS + SPECIALS


def response(fields: bytes = b"", body: bytes = b"", line: bytes = b"HTTP/1.1 200 OK") -> bytes:
    return line + b"\r\n" + fields + b"\r\n" + body


def bad(name: str, raw: bytes, method: bytes = b"GET") -> Case:
    return Case(name, raw, 502, method=method)


def good(name: str, raw: bytes, method: bytes = b"GET", eof: bool | None = None, **want: Any) -> Case:
    return Case(name, raw, 0, want, method, eof)


CL3 = b"Content-Length: 3\r\n"
TE = b"Transfer-Encoding: chunked\r\n"
UNTIL_CLOSE = {"until_close": True, "keep_alive": False, "done": False}

RESPONSES = [
    good("length", response(CL3, b"abc"), length=3, body=b"abc", eof=True),
    good("length incomplete", response(CL3, b"ab"), length=3, body=b"ab", done=False, eof=False),
    good("length zero", response(b"Content-Length: 0\r\n"), length=0, eof=True),
    good("chunked", response(TE, b"3\r\nabc\r\n" + ZERO), chunked=True, body=b"abc", eof=True),
    good("chunked incomplete", response(TE, b"3\r\nabc\r\n"), chunked=True, body=b"abc", done=False, eof=False),
    good(
        "chunked trailer", response(TE, b"0\r\nGrpc-Status: 0\r\n\r\n"), chunked=True, trailers=[(b"grpc-status", b"0")]
    ),
    good("until close", response(b"", b"abc"), **UNTIL_CLOSE, body=b"abc", eof=True),
    good("until close, empty", response(), **UNTIL_CLOSE, eof=True),
    good("no reason", response(CL3, b"abc", line=b"HTTP/1.1 200 "), length=3, body=b"abc"),
    good("no space after status", response(CL3, b"abc", line=b"HTTP/1.1 200"), length=3, body=b"abc"),
    good("reason with obs-text", response(CL3, b"abc", line=b"HTTP/1.1 200 \xe9 \t x"), length=3, body=b"abc"),
    good(
        "HTTP/1.0", response(CL3, b"abc", line=b"HTTP/1.0 200 OK"), length=3, body=b"abc", http10=True, keep_alive=False
    ),
    good(
        "HTTP/1.0 keep-alive",
        response(CL3 + b"Connection: keep-alive\r\n", b"abc", line=b"HTTP/1.0 200 OK"),
        length=3,
        body=b"abc",
        http10=True,
    ),
    good("close", response(CL3 + b"Connection: close\r\n", b"abc"), length=3, body=b"abc", keep_alive=False),
    good("HEAD with length", response(CL3), b"HEAD", length=3, eof=True),
    good("HEAD with chunked", response(TE), b"HEAD", chunked=True),
    good("HEAD with nothing", response(), b"HEAD"),
    good("204", response(line=b"HTTP/1.1 204 No Content"), status=204),
    good("204 with length zero", response(b"Content-Length: 0\r\n", line=b"HTTP/1.1 204 No Content"), status=204),
    good("304 with length", response(CL3, line=b"HTTP/1.1 304 Not Modified"), status=304, length=3),
    good("304", response(line=b"HTTP/1.1 304 Not Modified"), status=304),
    good("100 then 200", b"HTTP/1.1 100 Continue\r\n\r\n" + response(CL3, b"abc"), length=3, body=b"abc"),
    good("103 then 200", b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + response(CL3, b"abc"), length=3, body=b"abc"),
    good("500", response(b"Content-Length: 0\r\n", line=b"HTTP/1.1 500 Oops"), status=500, length=0),
    good("599", response(b"Content-Length: 0\r\n", line=b"HTTP/1.1 599 Oops"), status=599, length=0),
    good(
        "hop-by-hop",
        response(CL3 + b"Keep-Alive: timeout=5\r\nServer: x\r\nConnection: x-a\r\nX-A: b\r\n", b"abc"),
        length=3,
        body=b"abc",
        headers=[(b"server", b"x")],
    ),
    good(
        "sidecar's own",
        response(CL3 + b"X-Pillion-Reason: timeout_try\r\nX-Pillion-Retried: exhausted\r\n", b"abc"),
        length=3,
        body=b"abc",
        reason=b"timeout_try",
        exhausted=True,
    ),
    good(
        "reason nonsense",
        response(CL3 + b"X-Pillion-Reason: <script>\r\nX_Pillion_Reason: ok\r\n", b"abc"),
        length=3,
        body=b"abc",
    ),
    good("CONNECT", response(CL3, b""), b"CONNECT"),
    good(
        "CONNECT refused", response(CL3, b"abc", line=b"HTTP/1.1 403 No"), b"CONNECT", status=403, length=3, body=b"abc"
    ),
    bad("beyond length", response(CL3, b"abcd")),
    bad("beyond chunked", response(TE, ZERO + b"x")),
    bad("beyond HEAD", response(CL3, b"abc"), b"HEAD"),
    bad("beyond 204", response(b"", b"abc", line=b"HTTP/1.1 204 No Content")),
    bad("beyond 304", response(CL3, b"abc", line=b"HTTP/1.1 304 Not Modified")),
    bad("second response", response(CL3, b"abc") + response(CL3, b"abc")),
    bad("CL and TE", response(CL3 + TE, ZERO)),
    bad("TE and CL", response(TE + CL3, ZERO)),
    bad("CL repeated", response(CL3 + CL3, b"abc")),
    bad("CL list", response(b"Content-Length: 3, 3\r\n", b"abc")),
    bad("CL signed", response(b"Content-Length: +3\r\n", b"abc")),
    bad("CL hexadecimal", response(b"Content-Length: 0x3\r\n", b"abc")),
    bad("CL empty", response(b"Content-Length:\r\n", b"abc")),
    bad("CL overlong", response(b"Content-Length: " + b"0" * 30 + b"3\r\n", b"abc")),
    bad("CL with underscore", response(b"Content_Length: 3\r\n", b"abc")),
    bad("TE gzip, chunked", response(b"Transfer-Encoding: gzip, chunked\r\n", ZERO)),
    bad("TE identity", response(b"Transfer-Encoding: identity\r\n", b"abc")),
    bad("TE repeated", response(TE + TE, ZERO)),
    bad("TE in HTTP/1.0", response(TE, ZERO, line=b"HTTP/1.0 200 OK")),
    bad("TE in 204", response(TE, ZERO, line=b"HTTP/1.1 204 No Content")),
    bad("CL in 204", response(CL3, b"", line=b"HTTP/1.1 204 No Content")),
    bad("CL in 100", response(CL3, b"", line=b"HTTP/1.1 100 Continue")),
    bad("TE in 103", response(TE, b"", line=b"HTTP/1.1 103 Early Hints")),
    bad(
        "101 not asked for",
        response(b"Upgrade: websocket\r\nConnection: upgrade\r\n", line=b"HTTP/1.1 101 Switching Protocols"),
    ),
    bad("too many 100", b"HTTP/1.1 100 Continue\r\n\r\n" * 17 + response(CL3, b"abc")),
    bad("HTTP/0.9", b"<html>hello</html>\r\n\r\n"),
    bad("HTTP/2.0", response(CL3, b"abc", line=b"HTTP/2.0 200 OK")),
    bad("HTTP/1.2", response(CL3, b"abc", line=b"HTTP/1.2 200 OK")),
    bad("lower case", response(CL3, b"abc", line=b"http/1.1 200 OK")),
    bad("ICY", response(CL3, b"abc", line=b"ICY 200 OK")),
    bad("status of two digits", response(CL3, b"abc", line=b"HTTP/1.1 20 OK")),
    bad("status of four digits", response(CL3, b"abc", line=b"HTTP/1.1 2000 OK")),
    bad("status 099", response(CL3, b"abc", line=b"HTTP/1.1 099 OK")),
    bad("status 600", response(CL3, b"abc", line=b"HTTP/1.1 600 OK")),
    bad("status signed", response(CL3, b"abc", line=b"HTTP/1.1 +20 OK")),
    bad("two spaces", response(CL3, b"abc", line=b"HTTP/1.1  200 OK")),
    bad("no status", response(CL3, b"abc", line=b"HTTP/1.1 OK")),
    bad("leading empty line", b"\r\n" + response(CL3, b"abc")),
    bad("leading space", b" " + response(CL3, b"abc")),
    bad("reason with NUL", response(CL3, b"abc", line=b"HTTP/1.1 200 O\x00K")),
    bad("reason with bare CR", response(CL3, b"abc", line=b"HTTP/1.1 200 O\rK")),
    bad("bare LF", b"HTTP/1.1 200 OK\nContent-Length: 3\n\nabc"),
    bad("status line too long", response(CL3, b"abc", line=b"HTTP/1.1 200 " + b"x" * 8192)),
    bad("status line without end", b"HTTP/1.1 200 " + b"x" * 9000),
    bad("obs-fold", response(b"X: y\r\n z\r\n" + CL3, b"abc")),
    bad("empty name", response(b": y\r\n" + CL3, b"abc")),
    bad("name with space", response(b"X y: z\r\n" + CL3, b"abc")),
    bad("space before colon", response(b"Content-Length : 3\r\n", b"abc")),
    bad("no colon", response(b"X\r\n" + CL3, b"abc")),
    bad("value with NUL", response(b"X: \x00\r\n" + CL3, b"abc")),
    bad("bare CR in value (splitting)", response(b"X: y\rSet-Cookie: z\r\n" + CL3, b"abc")),
    bad("bare LF in value (splitting)", response(b"X: y\nSet-Cookie: z\r\n" + CL3, b"abc")),
    bad("101 fields", response(b"X: y\r\n" * 101)),
    bad("head too large", response(b"X: " + b"y" * 70000 + b"\r\n")),
    bad("chunk size with sign", response(TE, b"+3\r\nabc\r\n" + ZERO)),
    bad("chunk size with space", response(TE, b"3 \r\nabc\r\n" + ZERO)),
    bad("chunk size overflow", response(TE, b"ffffffffffffffff1\r\nabc\r\n" + ZERO)),
    bad("chunk ends in LF", response(TE, b"3\nabc\r\n" + ZERO)),
    bad("chunk data without CRLF", response(TE, b"3\r\nabcXX" + ZERO)),
    bad("chunk extensions", response(TE, b"3;" + b"a" * 5000 + b"\r\nabc\r\n" + ZERO)),
    bad("trailers too large", response(TE, b"0\r\nX: " + b"y" * 9000 + b"\r\n\r\n")),
    bad("trailer malformed", response(TE, b"0\r\nX : y\r\n\r\n")),
]
