"""One endpoint of a service: how its application works, queues and fails at the moment.

Holds state and draws from models; what happens next is the engine's business. Invariants: `busy` never exceeds
`concurrency`; nobody waits while there is a free place.
"""

import random
from collections import deque
from typing import TYPE_CHECKING

from .chance import Failing, Sample, sampler
from .scenario import Down, EndpointModel, Outage, ServiceModel

if TYPE_CHECKING:
    from sidecar.policy.limits import Limiter
    from sidecar.policy.overload import Gate

    from .life import Ask, Attempt
    from .sidecars import Sidecar

UNLIMITED = 1 << 60


class Server:
    """`sample` draws the time of one piece of work, `slowdown` multiplies it. `running` is kept only where an outage
    may end what runs. `born` is when the process started, for its cold start."""

    __slots__ = (
        "attempts",
        "beaten",
        "born",
        "bucket_attempts",
        "busy",
        "cold_for_s",
        "cold_slowdown",
        "concurrency",
        "down",
        "failing",
        "full_status",
        "gate",
        "good",
        "hits",
        "key",
        "limits",
        "model",
        "queue",
        "queue_max",
        "refusals",
        "running",
        "sample",
        "service",
        "sidecar",
        "slowdown",
        "steps",
        "stops",
    )

    def __init__(
        self, model: EndpointModel, service: ServiceModel, key: str, rnd: random.Random, buckets: int = 0
    ) -> None:
        behaviour = model.behaviour
        self.model, self.service, self.key = model, service, key
        self.stops = service.stops
        self.sample: Sample = sampler(behaviour.latency, rnd)
        self.failing = Failing(behaviour.errors, rnd) if behaviour.errors is not None else None
        self.slowdown = 1.0
        self.down: Down | None = None
        capacity = behaviour.capacity
        self.concurrency = capacity.concurrency if capacity is not None else UNLIMITED
        self.queue_max = capacity.queue if capacity is not None else 0
        self.full_status = capacity.status if capacity is not None else 503
        cold = behaviour.cold_start
        self.cold_for_s = cold.for_s if cold is not None else 0.0
        self.cold_slowdown = cold.slowdown if cold is not None else 1.0
        # Before the run there was time to warm up.
        self.born = model.starts_s if model.starts_s > 0.0 else -self.cold_for_s
        self.busy = 0
        self.queue: deque[Attempt] = deque()
        self.running: dict[Attempt, None] | None = None
        self.attempts = self.good = self.beaten = self.refusals = 0
        self.bucket_attempts = [0] * (buckets + 1)
        self.sidecar: Sidecar | None = None  # None: it would decide nothing
        self.steps: list[Ask] = []  # the calls of one request, one after the other
        self.limits: dict[int, tuple[Limiter, str]] = {}  # the rate limits of its sidecar, by number of what is asked
        self.gate: Gate | None = None  # of its sidecar, before the application
        self.hits: list[Outage] = []  # the outages in force, oldest first

    def work_s(self, now: float) -> float:
        """How long a success takes that begins now."""
        work_s = self.sample()
        if self.slowdown != 1.0:
            work_s *= self.slowdown
        age_s = now - self.born
        if age_s < self.cold_for_s:
            work_s *= 1.0 + (self.cold_slowdown - 1.0) * (1.0 - age_s / self.cold_for_s)
        return work_s

    def settle(self, rnd: random.Random) -> None:
        """Behave as the outages in force say: of several the latest."""
        behaviour = self.model.behaviour
        latency, errors = behaviour.latency, behaviour.errors
        self.slowdown, self.down = 1.0, None
        for outage in self.hits:
            latency = outage.latency or latency
            errors = outage.errors or errors
            self.slowdown = outage.slowdown if outage.slowdown is not None else self.slowdown
            self.down = outage.down or self.down
        self.sample = sampler(latency, rnd)
        self.failing = Failing(errors, rnd) if errors is not None else None
