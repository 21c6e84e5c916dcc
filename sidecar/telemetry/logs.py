"""The sidecar's own log: the standard `logging` module in front, a thread that writes behind.

A record is rendered where it is logged and written elsewhere (see `writer`), so that a blocked stderr stops nothing.
Must not know who logs what.
Invariants: one record is one line in JSON, and in text one line plus indented traceback lines; control characters of
a message never reach a terminal; private keys and tokens never leave this module, whoever logged them.
"""

import json
import logging
import re
import time
from collections import OrderedDict
from collections.abc import Callable

from .writer import LineWriter, Sink

PACKAGES = ("sidecar", "control_plane", "certs")
"""The loggers whose level is set; libraries stay at WARNING."""

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
FORMATS = ("text", "json")
MESSAGE_CHARS_MAX = 4096
TRACE_CHARS_MAX = 8192
QUEUE_MAX = 500  # with the limits above: some 6 MB where nobody reads
ONCE_KEYS_MAX = 1024

# Peers can bring long texts into messages, so each pattern runs in linear time: no two starts scan the same run.
_REDACTIONS = (
    # A PEM block, also one whose end was cut off.
    (re.compile(r"-----BEGIN ([A-Z0-9 ]+)-----.*?(?:-----END \1-----|\Z)", re.DOTALL), r"[\1 redacted]"),
    # JSON Web Tokens: two or three parts, the first of which is the base64 of '{"'.
    (re.compile(r"(?<![\w-])eyJ[\w-]{5,}\.[\w-]+(?:\.[\w-]*)?"), "[token redacted]"),
    (re.compile(r"(?i)\b(bearer|basic)(\s+)[\w.~+/=-]{12,}"), r"\1\2[redacted]"),
    # key=value and key: value, in any quotes; `token_file=…` and the like are not secrets.
    (
        re.compile(
            r"(?i)(token|password|passwd|secret|api[_-]?key)(['\"]?\s*[=:]\s*b?['\"]?)"
            r"(?!\[[\w ]{0,40}redacted\])[^\s'\",;&}]+"
        ),
        r"\1\2[redacted]",
    ),
)
_HINTS = ("-----", "eyj", "bearer", "basic", "token", "passw", "secret", "key")

_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}
# Separators of lines and bidirectional overrides: harmless to machines, misleading to people.
_CONTROLS.update({code: f"\\u{code:04x}" for code in (0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))})
_CONTROLS[ord("\n")] = "\\n"
_CONTROLS[ord("\r")] = "\\r"
_CONTROLS[ord("\t")] = "\\t"


def redact(text: str) -> str:
    """The text without PEM blocks, tokens and passwords."""
    lower = text.lower()
    if not any(hint in lower for hint in _HINTS):
        return text
    for pattern, replacement in _REDACTIONS:
        text = pattern.sub(replacement, text)
    end = text.rfind("-----END ")
    if end >= 0:  # a block whose beginning was cut off: nothing before its end can be told from it
        text = "[PEM block redacted]" + text[end + len("-----END ") :]
    return text


class Formatter(logging.Formatter):
    """Renders a record as bytes with a line end; `style` is text or json."""

    def __init__(self, style: str) -> None:
        super().__init__()
        if style not in FORMATS:
            raise ValueError(f"unknown log format {style!r}: give text or json")
        self._json = style == "json"

    def line(self, record: logging.LogRecord) -> bytes:
        whole = record.getMessage()
        message = redact(whole[:MESSAGE_CHARS_MAX])
        if len(whole) > MESSAGE_CHARS_MAX:
            message += f"… ({len(whole)} characters)"
        trace = redact(self._trace(record))
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        when = f"{when}.{int(record.created % 1 * 1000):03d}Z"
        level = record.levelname.lower()
        if self._json:
            fields = {"time": when, "level": level, "logger": record.name, "message": message}
            if trace:
                fields["exception"] = trace
            return json.dumps(fields).encode("ascii") + b"\n"
        lines = [f"{when} {level:<7} {record.name}: {message.translate(_CONTROLS)}\n"]
        lines.extend(f"    {line.translate(_CONTROLS)}\n" for line in trace.split("\n") if line)
        return "".join(lines).encode("utf-8", "backslashreplace")

    def _trace(self, record: logging.LogRecord) -> str:
        parts = []
        if record.exc_info and record.exc_info[0] is not None:
            parts.append(self.formatException(record.exc_info))
        if record.stack_info:
            parts.append(self.formatStack(record.stack_info))
        return "\n".join(parts)[-TRACE_CHARS_MAX:]  # the end of a traceback says what happened


class _Handler(logging.Handler):
    """Renders in the caller and queues."""

    def __init__(self, formatter: Formatter, writer: LineWriter[bytes]) -> None:
        super().__init__()
        self._line = formatter.line
        self._writer = writer
        self.broken = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self._line(record)
        except Exception:  # arguments that do not fit the message; logging.raiseExceptions would write to stderr here
            self.broken += 1
            line = b"a log message could not be rendered: %b:%d\n" % (
                record.pathname.encode("utf-8", "backslashreplace"),
                record.lineno,
            )
        self._writer.put(line)


class OncePer:
    """Says how often something happened since it was last logged. Bounded: the oldest keys are forgotten."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seen: OrderedDict[str, list[float]] = OrderedDict()

    def __call__(self, key: str, seconds: float) -> int:
        """0: be silent. n: log now; it happened n times since the last time that this was said.

        `if n := once_per("accept", 10): log.warning("out of descriptors (%d times)", n)`"""
        now_s = self._clock()
        seen = self._seen.get(key)
        if seen is None:
            if len(self._seen) >= ONCE_KEYS_MAX:
                self._seen.popitem(last=False)
            self._seen[key] = [now_s, 0]
            return 1
        seen[1] += 1
        if now_s - seen[0] < seconds:
            return 0
        self._seen.move_to_end(key)
        times = int(seen[1])
        seen[:] = [now_s, 0]
        return times


class Logs:
    """Installed on the root logger until `close`. `clock` is monotonic, for `once_per` alone."""

    def __init__(
        self,
        *,
        clock: Callable[[], float],
        level: str = "info",
        style: str = "text",
        target: int | str = 2,
        root: logging.Logger | None = None,
    ) -> None:
        """`target`: a descriptor (stderr) or a file's path."""
        formatter = Formatter(style)
        check_level(level)

        def note(dropped: int) -> bytes:
            created = {"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING"}
            message = f"log records dropped: {dropped}; nobody reads the log fast enough"
            return formatter.line(logging.makeLogRecord({**created, "msg": message}))

        self._root = root or logging.getLogger()
        self._writer: LineWriter[bytes] = LineWriter(Sink(target), bytes, name="log", queue_max=QUEUE_MAX, note=note)
        self._handler = _Handler(formatter, self._writer)
        self._root.addHandler(self._handler)
        self._root.setLevel(logging.WARNING)
        self.once_per = OncePer(clock)
        self.set_level(level)

    def set_level(self, level: str) -> None:
        """Change the level of pillion's own loggers, at any time."""
        number = check_level(level)
        for package in PACKAGES:
            self._logger(package).setLevel(number)
        self.level = level.lower()

    @property
    def dropped(self) -> int:
        """Lines that were not written, for whatever cause."""
        return self._writer.dropped + self._writer.lost

    def reopen(self) -> None:
        """After a rotation of the file."""
        self._writer.reopen()

    def close(self, timeout_s: float = 1.0) -> bool:
        """Take the handler away and write what is queued."""
        self._root.removeHandler(self._handler)
        for package in PACKAGES:
            self._logger(package).setLevel(logging.NOTSET)
        return self._writer.close(timeout_s)

    def _logger(self, package: str) -> logging.Logger:
        return self._root.getChild(package)


def check_level(level: str) -> int:
    """The number of a level's name; ValueError names the levels."""
    number = LEVELS.get(level.lower())
    if number is None:
        raise ValueError(f"unknown log level {level!r}: give one of {', '.join(LEVELS)}")
    return number
