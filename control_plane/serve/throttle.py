"""Failed proofs of identity, slowed down.

Behind our listener every caller has the same address, so the bound is one for all: failures beyond a few a second are
answered late, and beyond what may wait at once, not at all but with a request to come back. Who proves who they are is
never held up. Invariant: what waits is bounded.
"""

import trio

from .http import ApiError

BURST = 20.0
PER_SECOND = 5.0
DELAY_S_MAX = 2.0
WAITING_MAX = 200


class Throttle:
    """One for an application. Time is trio's."""

    def __init__(self, burst: float = BURST, per_s: float = PER_SECOND) -> None:
        self._burst, self._per_s = burst, per_s
        self._tokens, self._at = burst, 0.0
        self.waiting = 0

    async def failed(self) -> None:
        """Count a failure, and hold its answer back where there were too many. Raises ApiError."""
        now = trio.current_time()
        self._tokens = min(self._burst, self._tokens + max(0.0, now - self._at) * self._per_s)
        self._at = now
        if self._tokens >= 1.0:
            self._tokens -= 1.0
            return
        if self.waiting >= WAITING_MAX:
            raise ApiError(429, "too_many_failures", "too many attempts fail at the moment", "try again in a while")
        self.waiting += 1
        try:
            await trio.sleep(DELAY_S_MAX)
        finally:
            self.waiting -= 1
