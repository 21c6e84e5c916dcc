"""How much of a control plane one sidecar may take: requests at a time, and changes of what it has registered.

A sidecar that is broken or hostile must cost the others nothing: neither memory (a body is held while it is read, a
push while it is sent) nor writes to the store. Must not know what is asked. Invariant: nothing is kept for a sidecar
that has asked nothing for a while.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import trio

from .http import ApiError

AT_ONCE_MAX: Mapping[str, int] = {"streams": 4, "large bodies": 3, "requests": 32}
CHANGES, CHANGES_PER_S = 10.0, 1.0
KEPT_MAX = 4096


class Shares:
    """One for an application. Time is trio's."""

    def __init__(self) -> None:
        self._under_way: dict[tuple[str, str], int] = {}
        self._changes: dict[str, tuple[float, float]] = {}  # what is left, and when that was

    @contextmanager
    def taken(self, sidecar: str, kind: str) -> Iterator[None]:
        """Hold one of this kind. Raises ApiError."""
        key = sidecar, kind
        count = self._under_way.get(key, 0)
        if count >= AT_ONCE_MAX[kind]:
            raise ApiError(429, "too_many", f"this sidecar has {count} {kind} under way")
        self._under_way[key] = count + 1
        try:
            yield
        finally:
            self._under_way[key] -= 1
            if not self._under_way[key]:
                del self._under_way[key]

    def change(self, sidecar: str) -> bool:
        """Whether a sidecar may change something in the store now; counted."""
        now = trio.current_time()
        left, at = self._changes.pop(sidecar, (CHANGES, now))
        left = min(CHANGES, left + (now - at) * CHANGES_PER_S)
        if len(self._changes) >= KEPT_MAX:
            self._changes = {
                each: (had, then)
                for each, (had, then) in self._changes.items()
                if had + (now - then) * CHANGES_PER_S < CHANGES
            }
        self._changes[sidecar] = (left - 1.0 if left >= 1.0 else left), now
        return left >= 1.0
