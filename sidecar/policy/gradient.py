"""How many requests at a time an application can work on, learnt from how long it takes.

The rule is that of Envoy's adaptive concurrency filter (gradient controller), with its numbers. Now and then the
limit falls to the least, and what requests take then is `min_rtt_s`: the time without queueing. In between, each
window's median is compared with it:

    gradient = min_rtt · (1 + 25 %) / median, within 0.5 and 2
    limit    = limit · gradient + sqrt(limit · gradient), within least and most

so that the limit settles where requests take a quarter longer than they must, and a little above. Unlike Envoy, the
limit does not grow while less than half of it is used (Netflix' concurrency-limits has that rule), a window needs
SAMPLES_MIN samples, measuring ends in time where an application is slow, and nothing is measured again as long as
nobody has had to wait: what costs requests is done only where the limit matters.
Pure: time and chance are arguments. Must not know requests. Invariant: least <= limit <= most.
"""

import math
from collections.abc import Callable

BUFFER = 0.25  # what a request may take longer than it must
WINDOW_S = 0.1
SAMPLES_MIN = 10  # in a window; fewer, and it goes on
SAMPLES_MAX = 1000  # that are kept of a window
GRADIENT_MIN, GRADIENT_MAX = 0.5, 2.0
MEASURE_EVERY_S = 60.0
JITTER = 0.15  # of it, so that instances do not measure together
MEASURE_SAMPLES = 50
MEASURE_S_MAX, MEASURE_SAMPLES_MIN = 1.0, 5  # an application that is slow is measured for so long, by so many
MEASURE_GIVE_UP_S = 10.0  # with fewer samples by then, what was known stays
LEAST_WINDOWS = 5  # in a row at the least limit: what it must take has grown, so it is measured


class Gradient:
    """`limit` is the one in force: while measuring, the least. `rnd` gives 0 to 1."""

    __slots__ = ("_at_least", "_bounds", "_due", "_rnd", "_samples", "_since", "_window_ends", "contended", "learnt",
                 "measured_at", "measuring", "median_s", "min_rtt_s", "peak")  # fmt: skip

    def __init__(self, least: int, most: int, now: float, rnd: Callable[[], float]) -> None:
        self._bounds = (least, most)
        self._rnd = rnd
        self.learnt = float(least)  # what holds between measurements
        self.min_rtt_s = self.median_s = 0.0  # 0: not known
        self.peak = 0  # most in flight in this window, told by the owner
        self.contended = False  # somebody has had to wait since the least was measured, told by the owner
        self._at_least = 0
        self._samples: list[float] = []
        self.measuring = False
        self._measure(now)

    @property
    def limit(self) -> int:
        return self._bounds[0] if self.measuring else int(self.learnt)

    def bound(self, least: int, most: int) -> None:
        self._bounds = (least, most)
        self.learnt = min(float(most), max(float(least), self.learnt))

    def sample(self, took_s: float, begun: float, now: float) -> None:
        """A request that began at `begun` was answered after `took_s`."""
        if self.measuring and begun < self._since:
            return  # it began among more than the least
        if len(self._samples) < SAMPLES_MAX:
            self._samples.append(took_s)

    def lost(self, took_s: float) -> None:
        """Nobody waited for the answer. What it would have taken is more than that: it says something only where that
        is slow already."""
        if not self.measuring and took_s > self.min_rtt_s * (1.0 + BUFFER) and len(self._samples) < SAMPLES_MAX:
            self._samples.append(took_s)

    def step(self, now: float) -> bool:
        """What is due by now: asked with each request. Whether the limit may have changed."""
        if self.measuring:
            count = len(self._samples)
            if count < MEASURE_SAMPLES and (count < MEASURE_SAMPLES_MIN or now < self._since + MEASURE_S_MAX):
                if now < self._since + MEASURE_GIVE_UP_S or not self.min_rtt_s:
                    return False
            else:
                self.min_rtt_s = self.median_s = _median(self._samples)
            self.measuring = self.contended = False
            self.measured_at = now
            self._due = now + MEASURE_EVERY_S * (1.0 + JITTER * self._rnd())
            self._begin_window(now)
            return True
        if now < self._window_ends:
            return False
        if len(self._samples) >= SAMPLES_MIN:
            self.median_s = _median(self._samples)
            self._move()
            self._begin_window(now)
        if (now >= self._due and self.contended) or self._at_least >= LEAST_WINDOWS:
            self._measure(now)
        return True

    def _move(self) -> None:
        least, most = self._bounds
        wanted = self.min_rtt_s * (1.0 + BUFFER)
        gradient = max(GRADIENT_MIN, min(GRADIENT_MAX, wanted / self.median_s)) if self.median_s else GRADIENT_MAX
        scaled = self.learnt * gradient
        limit = max(float(least), min(float(most), scaled + math.sqrt(scaled)))
        if limit > self.learnt and self.peak * 2 < self.learnt:
            limit = self.learnt  # nobody knows whether more would be well
        self.learnt = limit
        self._at_least = self._at_least + 1 if least < most and limit <= least else 0

    def _begin_window(self, now: float) -> None:
        self._samples = []
        self.peak = 0
        self._window_ends = now + WINDOW_S

    def _measure(self, now: float) -> None:
        self.measuring = True
        self._since = now
        self._at_least = 0
        self._samples = []


def _median(samples: list[float]) -> float:
    return sorted(samples)[(len(samples) - 1) // 2]
