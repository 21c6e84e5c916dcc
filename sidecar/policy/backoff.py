"""How long to wait before a retry.

Pure arithmetic: chance comes in as `rnd`, which returns a number in [0, 1). Must not know why something is retried,
nor whether a deadline leaves room for the wait.
"""

from collections.abc import Callable, Iterable
from datetime import UTC
from email.utils import parsedate_to_datetime

_RETRY_AFTER_CHARS_MAX = 40  # the longest date has 33
_DOUBLINGS_MAX = 62  # far beyond any ceiling, and safe as a float


def backoff_s(retry: int, base_s: float, max_s: float, rnd: Callable[[], float]) -> float:
    """The wait before retry number `retry` (1 is the first): full jitter, uniform between 0 and
    min(base · 2^(retry-1), max)."""
    return rnd() * min(base_s * (1 << min(retry - 1, _DOUBLINGS_MAX)), max_s)


def server_delay_s(asked_s: float, max_server_delay_s: float, rnd: Callable[[], float]) -> float | None:
    """The wait where the server has named one (`Retry-After`, `grpc-retry-pushback-ms`): uniform between it and half
    as much again, so that the refused do not all come back at once. None: it asks for too long, or for no retry at all
    (a negative pushback); do not retry."""
    if not 0.0 <= asked_s <= max_server_delay_s:
        return None
    return asked_s * (1.0 + 0.5 * rnd())


def retry_after_s(fields: Iterable[tuple[bytes, bytes]], epoch_s: float) -> float | None:
    """What `Retry-After` among these fields asks for, in seconds or as a date (RFC 9110, 10.2.3); of several the
    longest. None: nothing that can be understood. `epoch_s` is the time of day."""
    longest: float | None = None
    for name, value in fields:
        if name == b"retry-after":
            asked_s = _delay_s(value, epoch_s)
            if asked_s is not None and (longest is None or asked_s > longest):
                longest = asked_s
    return longest


def _delay_s(value: bytes, epoch_s: float) -> float | None:
    if len(value) > _RETRY_AFTER_CHARS_MAX:
        return None
    if value.isdigit():
        return float(value)
    try:
        at = parsedate_to_datetime(value.decode("ascii"))
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return max(at.replace(tzinfo=at.tzinfo or UTC).timestamp() - epoch_s, 0.0)  # asctime's form says no zone: GMT
