"""What is to happen, in order of time; of the same moment, in the order in which it was put down.

Must not know what happens. Invariants: time never goes back; nothing but time and order of entry decides what comes
first, so equal entries give equal runs; `bucket` is the slice of the run, of equal widths, that `now` lies in, and
after the end of the load it is `buckets`, one more than there are.
"""

import gc
import math
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

Handler = Callable[[Any, Any, float], None]
"""handler(a, b, now)."""


class Agenda:
    """`on_bucket` is told of each slice that begins."""

    def __init__(self, ends_s: float, buckets: int, on_bucket: Callable[[int], None]) -> None:
        self.buckets, self.width_s = buckets, ends_s / buckets
        self.bucket = 0
        self.now = 0.0
        self.events = 0
        self._on_bucket = on_bucket
        self._bucket_ends = self.width_s
        self._heap: list[tuple[float, int, Handler, Any, Any]] = []
        self._made = 0

    def push(self, at_s: float, handler: Handler, a: Any, b: Any) -> None:
        self._made = made = self._made + 1
        heappush(self._heap, (at_s, made, handler, a, b))

    def run(self) -> None:
        """Until nothing is left to happen."""
        enabled = gc.isenabled()
        gc.disable()  # what a run makes is freed by its counts: looking for circles only costs
        try:
            self._run()
        finally:
            if enabled:
                gc.enable()

    def _run(self) -> None:
        heap = self._heap
        events = 0
        while heap:
            now, _, handler, a, b = heappop(heap)
            events += 1
            if now >= self._bucket_ends:
                self._roll(now)
            self.now = now
            handler(a, b, now)
        self.events = events

    def _roll(self, now: float) -> None:
        while now >= self._bucket_ends:
            self.bucket += 1
            self._bucket_ends = math.inf if self.bucket == self.buckets else (self.bucket + 1) * self.width_s
            self._on_bucket(self.bucket)
