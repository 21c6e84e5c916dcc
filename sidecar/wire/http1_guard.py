"""What HTTP/1.1 heads may contain: limits, the shape of the lines, and the words for what is wrong with one.

Heads are judged as raw bytes before anything is believed about them; one compiled pattern accepts a line, and only a
line that was not accepted is looked at more closely, to say why.
Invariants: the verdict depends on the bytes, never on how they were cut into reads; a detail never quotes the peer's
bytes, because it goes to a log. Statuses are those of a request. Must not know connections, policy or what the fields
mean.
"""

import re

LINE_BYTES_MAX = 8192
"""A request line or status line, without its CRLF."""
HEAD_BYTES_MAX = 65536
"""A whole head, with the empty line that ends it."""
FIELDS_MAX = 100
"""Fields in one head, and in one trailer section."""
SPARE_FIELDS = 16
"""Between two sidecars a head may be larger by what the first of them adds, or the second would refuse it."""
SPARE_BYTES = 4096
TRAILER_BYTES_MAX = 8192
CHUNK_EXTENSION_BYTES_MAX = 4096
"""All chunk extensions of one message together."""
LENGTH_DIGITS_MAX = 18

TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"

_BARE = "bare line feed or carriage return among the fields"


class ProtocolError(Exception):
    """The peer broke HTTP/1.1. `status` is what a client is told, 502 where it was a response; `detail` is for logs."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(status, detail)
        self.status = status
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.status}: {self.detail}"


# RFC 9112, section 3. Methods are case-sensitive; only capitals are served, so that no peer can disagree about "get".
# '#' is no part of any target form (section 3.2).
match_request_line = re.compile(rb"([A-Z][A-Z0-9_-]{0,31}) ([!-\"$-~]+) HTTP/1\.([01])").fullmatch
# The space before an empty reason is often left out.
match_status_line = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: [\t -~\x80-\xff]*)?").fullmatch

# A field as nearly everyone writes it; anything else goes through `split_field`.
match_usual_field = re.compile(rb"(" + TOKEN + rb"+): ([!-~][ -~]*)(?<! )").fullmatch

_fault_in_line = re.compile(rb"[\x00-\x1f\x7f]").search
_fault_in_value = re.compile(rb"[^\t -~\x80-\xff]").search
_is_token = re.compile(TOKEN + rb"+").fullmatch
_is_version = re.compile(rb"HTTP/[0-9]\.[0-9]").fullmatch
_request_line_parts = re.compile(rb"([^ ]+) ([^ ]+) ([^ ]+)").fullmatch


def is_field(name: bytes, value: bytes) -> bool:
    """Whether a field that someone else made (a filter, a policy) may stand in a head."""
    return _is_token(name) is not None and _fault_in_value(value) is None and value == value.strip(b" \t")


def has_bare_ending(data: bytes | bytearray, start: int, end: int) -> bool:
    """Whether data[start:end], cut anywhere, has a CR or LF that is no part of a CRLF. A last CR may yet become one."""
    end = min(end, len(data))
    if data[start - 1 : start + 1] == b"\r\n":
        start += 1
    pairs = data.count(b"\r\n", start, end)
    if data.count(b"\n", start, end) != pairs:
        return True
    return data.count(b"\r", start, end) != pairs + data.endswith(b"\r", start, end)


def is_token(name: bytes) -> bool:
    return _is_token(name) is not None


def split_field(line: bytes) -> tuple[bytes, bytes]:
    """Name as received and value without outer white space."""
    name, colon, value = line.partition(b":")
    if not colon or not is_token(name) or _fault_in_value(value):
        raise ProtocolError(400, _fault_of_line(line))
    return name, value.strip(b" \t")


def first_fault(lines: list[bytes], found: ProtocolError) -> ProtocolError:
    """The fault to report where one was found: a bare line ending anywhere comes first, as in an unfinished head."""
    bare = any(b"\r" in line or b"\n" in line for line in lines)
    return ProtocolError(400, _BARE) if bare else found


def _fault_of_line(line: bytes) -> str:
    if b"\n" in line or b"\r" in line:
        return _BARE
    if line[:1] == b" " or line[:1] == b"\t":
        return "folded header line"
    name, colon, _ = line.partition(b":")
    if not colon:
        return "header line without a colon"
    if not name:
        return "empty header name"
    if name[-1:] == b" " or name[-1:] == b"\t":
        return "white space before the colon of a header"
    if not is_token(name):
        return "invalid character in a header name"
    return "control character in a header value"


def refuse_request_line(line: bytes) -> ProtocolError:
    """Why a request line, or the first LINE_BYTES_MAX + 1 bytes of one, is refused."""
    if not line:
        return ProtocolError(400, "more than one empty line before the request line")
    if _fault_in_line(line, 0, LINE_BYTES_MAX):
        return ProtocolError(400, "control character or bare line ending in the request line")
    if len(line) > LINE_BYTES_MAX:
        return ProtocolError(414, "request line too long")
    parts = _request_line_parts(line)
    if parts is None:
        return ProtocolError(400, "malformed request line")
    method, target, version = parts.groups()
    if not is_token(method):
        return ProtocolError(400, "invalid character in the method")
    if _is_version(version) is None:
        return ProtocolError(400, "malformed HTTP version")
    if version not in (b"HTTP/1.0", b"HTTP/1.1"):
        return ProtocolError(505, "HTTP version is neither 1.0 nor 1.1")
    if b"#" in target:
        return ProtocolError(400, "fragment in the request target")
    if not target.isascii():
        return ProtocolError(400, "request target is not ASCII")
    return ProtocolError(501, "method is not in capitals, or too long")


def refuse_status_line(line: bytes) -> ProtocolError:
    """The same for a status line."""
    if _fault_in_line(line.replace(b"\t", b" "), 0, LINE_BYTES_MAX):
        return ProtocolError(400, "control character or bare line ending in the status line")
    if len(line) > LINE_BYTES_MAX:
        return ProtocolError(400, "status line too long")
    return ProtocolError(400, "malformed status line")


def check_unfinished(head: bytearray, seen: int, bytes_max: int, request: bool) -> None:
    """Raise if `head`, of which `seen` bytes were checked before, can no longer become a good head.

    Anything found here would be found in the finished head too; finding it now spares the wait for an end that a
    peer which does not speak HTTP will never send.
    """
    start = 2 if request and head.startswith(b"\r\n") else 0
    end = head.find(b"\r\n", start, start + LINE_BYTES_MAX + 2)
    refuse = refuse_request_line if request else refuse_status_line
    if end < 0:
        line = bytes(head[start : start + LINE_BYTES_MAX + 1])
        if len(head) - start >= LINE_BYTES_MAX + 2:
            raise refuse(line)
        line = line.removesuffix(b"\r")
        if _fault_in_line(line if request else line.replace(b"\t", b" ")):
            raise refuse(line)
        return
    if seen <= end + 1:
        line = bytes(head[start:end])
        if (match_request_line if request else match_status_line)(line) is None:
            raise refuse(line)
    if has_bare_ending(head, max(end + 2, seen - 1), bytes_max):
        raise ProtocolError(400, _BARE)
    if len(head) >= bytes_max:
        raise ProtocolError(431, "header section too large")
