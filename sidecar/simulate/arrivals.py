"""When requests arrive: a rate over time, evenly or as a Poisson process.

The rate is a line of pieces, each straight. The n-th request arrives when the integral of the rate reaches the n-th
count: 1, 2, 3, … evenly, or a sum of exponential steps, which is exactly a Poisson process of that rate.
Must not know who asks whom. Invariant: times never go back; the same source gives the same times.
"""

import math
import random
from collections.abc import Sequence

Point = tuple[float, float]


class Arrivals:
    """`next()` gives the time of the next arrival, math.inf after the end."""

    __slots__ = ("_at", "_even", "_first", "_log", "_piece", "_pieces", "_rnd")

    def __init__(self, points: Sequence[Point], ramp: bool, even: bool, ends_s: float, rnd: random.Random) -> None:
        self._pieces = pieces(points, ramp, ends_s)
        self._even = even
        self._rnd = rnd.random
        self._log = math.log
        self._piece = 0
        self._at = self._pieces[0][0] if self._pieces else 0.0
        self._first = even

    def next(self) -> float:
        wanted = 1.0 if self._even else -self._log(1.0 - self._rnd())
        if self._first:
            wanted, self._first = 0.5, False  # an even load begins half a step in
        found = self._pieces
        while self._piece < len(found):
            begins, ends, first, last = found[self._piece]
            at = self._at if self._at > begins else begins
            slope = (last - first) / (ends - begins)
            rate = first + slope * (at - begins)
            left = (rate + last) / 2.0 * (ends - at)
            if wanted < left:
                if slope == 0.0:
                    at += wanted / rate
                else:  # rate·t + slope·t²/2 = wanted
                    at += 2.0 * wanted / (rate + math.sqrt(max(0.0, rate * rate + 2.0 * slope * wanted)))
                self._at = at
                return at
            wanted -= left
            self._piece += 1
            self._at = ends
        return math.inf


def pieces(points: Sequence[Point], ramp: bool, ends_s: float) -> list[tuple[float, float, float, float]]:
    """(begins, ends, rate at its beginning, rate at its end); nothing before the first point; the last rate holds."""
    found = []
    for index, (at, rate) in enumerate(points):
        following = points[index + 1] if index + 1 < len(points) else None
        ends = min(following[0] if following is not None else ends_s, ends_s)
        if at >= ends:
            continue
        last = rate
        if ramp and following is not None:
            last = rate + (following[1] - rate) * (ends - at) / (following[0] - at)
        found.append((at, ends, rate, last))
    return found
