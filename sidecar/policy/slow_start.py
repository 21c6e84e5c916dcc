"""Slow start: an endpoint that appears among others gets a small share at first, and its own after a window.

Its weight is the stated one times max(10 %, age/window). Weights are moved in steps, a hundredth of the window apart,
when somebody picks: nothing runs on its own. Must not know balancers. Invariants: `round` grows with every change of a
weight; once the window is over, weights are exactly the stated ones.
"""

import math

from .endpoint import Endpoint

FLOOR = 0.1
STEPS = 100
STEP_MIN_S = 0.01


class Warmup:
    """The endpoints of one cluster that are not warm yet. `due`: when weights move next."""

    __slots__ = ("due", "round", "since", "window_s")

    def __init__(self) -> None:
        self.window_s = 0.0
        self.since: dict[Endpoint, float] = {}
        self.due = math.inf
        self.round = 0

    def begin(self, fresh: list[Endpoint], kept: dict[str, Endpoint], window_s: float, now: float) -> None:
        """The endpoints were told anew: `kept` are all of them, `fresh` those that were not there before. Where all are
        fresh, none is slower than another."""
        self.window_s = window_s
        here = set(kept.values())
        self.since = {endpoint: since for endpoint, since in self.since.items() if endpoint in here}
        if window_s > 0.0 and len(fresh) < len(kept):
            self.since.update(dict.fromkeys(fresh, now))
        if self.since:
            self.step(now)

    def step(self, now: float) -> None:
        """Give every endpoint the weight of this moment."""
        window_s = self.window_s
        for endpoint, since in list(self.since.items()):
            age_s = now - since
            if age_s >= window_s:
                endpoint.weight = float(endpoint.stated_weight)
                del self.since[endpoint]
            else:
                endpoint.weight = endpoint.stated_weight * max(FLOOR, age_s / window_s)
        self.round += 1
        self.due = now + max(STEP_MIN_S, window_s / STEPS) if self.since else math.inf
