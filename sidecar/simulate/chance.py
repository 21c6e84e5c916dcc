"""Chance by models: how long work takes, and how requests fail. Every draw comes from one seeded source.

Must not know endpoints or time. Invariant: a model draws the same numbers for the same seed, on every machine.
"""

import math
import random
from collections.abc import Callable

from .scenario import Errors, Latency

_Z99 = 2.3263478740408408  # of the standard normal distribution, 99 in 100 are below

Sample = Callable[[], float]


def source(seed: int, purpose: str) -> random.Random:
    """An independent source for each purpose: arrivals do not depend on what policy draws."""
    return random.Random(f"{seed} {purpose}")


def sampler(latency: Latency, rnd: random.Random) -> Sample:
    """Draws one latency in seconds."""
    a, b = latency.a, latency.b
    if latency.kind == "fixed":
        return lambda: a
    draw = rnd.random
    if latency.kind == "uniform":
        span = b - a
        return lambda: a + span * draw()
    assert latency.kind == "lognormal"
    mu, sigma = math.log(a), math.log(b / a) / _Z99
    gauss, exp = rnd.gauss, math.exp
    return lambda: exp(gauss(mu, sigma))


class Failing:
    """Errors, ready to draw from. `sample` None: a failure takes as long as a success."""

    __slots__ = ("rate", "retry_after_s", "sample", "statuses")

    def __init__(self, errors: Errors, rnd: random.Random) -> None:
        self.rate = errors.rate
        self.statuses = errors.statuses
        self.retry_after_s = errors.retry_after_s
        self.sample = sampler(errors.latency, rnd) if errors.latency is not None else None

    def status(self, draw: Callable[[], float]) -> int:
        statuses = self.statuses
        return statuses[0] if len(statuses) == 1 else statuses[int(draw() * len(statuses))]
