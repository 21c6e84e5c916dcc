"""What has changed at endpoints, with the evidence: breakers that opened and closed, ejections, panic.

The last EVENTS_MAX of them are kept for the admin interface; the sidecar's own log has all. Must not know what the
words mean.
"""

from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

EVENTS_MAX = 256


class Events:
    """`epoch` gives Unix time."""

    def __init__(self, epoch: Callable[[], float]) -> None:
        self._epoch = epoch
        self._all: deque[tuple[float, str, str, str, str]] = deque(maxlen=EVENTS_MAX)

    def add(self, kind: str, service: str, endpoint: str, text: str) -> str:
        """`kind`: breaker, outlier, panic or overload; `endpoint` "": of the whole service. The same as one line."""
        at = self._epoch()
        self._all.append((at, kind, service, endpoint, text))
        return f"{_shown(at)} {kind} {text}"

    def rows(self) -> Iterator[dict[str, object]]:
        """The newest first."""
        for at, kind, service, endpoint, text in reversed(list(self._all)):
            yield {"time": _shown(at), "kind": kind, "service": service, "endpoint": endpoint, "event": text}


def _shown(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
