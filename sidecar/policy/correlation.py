"""What a sidecar remembers of the inbound requests in flight, so that outbound requests of the application inherit it.

The trace-id ties the two: an outbound request with the trace-id of an inbound one that is still in flight inherits its
deadline and attempt number, and an outbound request whose retries were spent marks the inbound one as exhausted.
Must not know headers or clocks. Invariants: bounded (what does not fit is simply not inherited, which is the behaviour
of an application that does not propagate); an entry lives exactly as long as its inbound request; one request in flight
with a trace-id costs one dictionary operation at each step.
"""

import math

TraceId = bytes | str

_PER_TRACE_MAX = 64  # in flight at once with the same trace-id; a fan-out that comes back in is a handful
NOTHING = (math.inf, 0)
"""What `lookup` gives, this very object, where nothing is in flight."""


class Token:
    """One inbound request in flight. `exhausted`: retries below it were spent."""

    __slots__ = ("attempt", "deadline", "exhausted", "trace_id")

    def __init__(self, trace_id: TraceId, deadline: float, attempt: int) -> None:
        self.trace_id = trace_id
        self.deadline = deadline
        self.attempt = attempt
        self.exhausted = False


class Correlation:
    """One for each sidecar. A deadline of math.inf means none. `dropped` counts requests that did not fit."""

    __slots__ = ("_entries", "_entries_max", "_more", "_more_count", "dropped")

    def __init__(self, entries_max: int = 65_536) -> None:
        self._entries: dict[TraceId, Token] = {}
        self._more: dict[TraceId, dict[Token, None]] = {}  # further requests with the same trace-id, oldest first
        self._more_count = 0
        self._entries_max = entries_max
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._entries) + self._more_count

    def __contains__(self, trace_id: TraceId) -> bool:
        """Whether an inbound request with it is in flight."""
        return trace_id in self._entries

    def enter(self, trace_id: TraceId, deadline: float, attempt: int) -> Token:
        """An inbound request has arrived. The token is what `leave` and `head_gone` want."""
        token = Token(trace_id, deadline, attempt)
        if len(self._entries) + self._more_count >= self._entries_max:
            self.dropped += 1
        elif self._entries.setdefault(trace_id, token) is not token:
            more = self._more.setdefault(trace_id, {})
            if len(more) + 1 >= _PER_TRACE_MAX:
                self.dropped += 1
            else:
                more[token] = None
                self._more_count += 1
        return token

    def leave(self, token: Token) -> None:
        """The inbound request has ended. Once is enough; more does no harm."""
        trace_id = token.trace_id
        if not self._more_count:
            if self._entries.get(trace_id) is token:
                del self._entries[trace_id]
            return
        more = self._more.get(trace_id)
        if self._entries.get(trace_id) is token:
            if more:
                heir = next(iter(more))
                del more[heir]
                self._more_count -= 1
                self._entries[trace_id] = heir
            else:
                del self._entries[trace_id]
        elif more is not None and token in more:
            del more[token]
            self._more_count -= 1
        if more is not None and not more:
            del self._more[trace_id]

    def head_gone(self, token: Token) -> None:
        """The inbound response head has gone: what the application still does is bound by no deadline."""
        token.deadline = math.inf

    def lookup(self, trace_id: TraceId) -> tuple[float, int]:
        """(deadline, attempt) for an outbound request: of several in flight the latest and the highest."""
        token = self._entries.get(trace_id)
        if token is None:
            return NOTHING
        deadline, attempt = token.deadline, token.attempt
        if self._more_count and trace_id in self._more:
            for other in self._more[trace_id]:
                deadline = max(deadline, other.deadline)
                attempt = max(attempt, other.attempt)
        return deadline, attempt

    def mark_exhausted(self, trace_id: TraceId) -> None:
        """An outbound request with this trace-id has spent its retries and failed."""
        token = self._entries.get(trace_id)
        if token is None:
            return
        token.exhausted = True
        for other in self._more.get(trace_id, ()):
            other.exhausted = True

    def is_exhausted(self, trace_id: TraceId) -> bool:
        """Whether to mark a failing inbound response; `token.exhausted` says it of one request."""
        token = self._entries.get(trace_id)
        if token is None:
            return False
        return token.exhausted or any(other.exhausted for other in self._more.get(trace_id, ()))
