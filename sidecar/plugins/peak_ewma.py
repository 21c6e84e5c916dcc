"""The balancer `peak-ewma`: the better of two random endpoints, by what a request there is likely to cost.

Cost is a moving average of the time to the response head that goes up at once and comes down slowly: a slower answer
replaces it, a faster one counts for 1 - e^(-t/decay), t being the time since the last. It also fades while nothing is
heard, so that an endpoint which was slow once is asked again. Load is cost · (attempts in flight + 1) / weight. An
endpoint nobody has heard of costs `seed_s`; one that throttles (429) costs `throttled_s`; a failure never makes an
endpoint cheaper, or one that fails at once would draw all traffic.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sidecar.api import AttemptResult, Balancer, Endpoint, Rnd

_SCAN_BELOW = 4  # so few endpoints are simply all compared


@dataclass(frozen=True)
class Settings:
    decay_s: float = 10.0
    seed_s: float = 0.03
    throttled_s: float = 5.0

    def __post_init__(self) -> None:
        if not 0.1 <= self.decay_s <= 3600.0:
            raise ValueError("decay_s must be between 0.1 and 3600")
        if not 0.0 < self.seed_s <= 60.0:
            raise ValueError("seed_s must be above 0 and at most 60")
        if not 0.0 <= self.throttled_s <= 3600.0:
            raise ValueError("throttled_s must be between 0 and 3600")


class Cost:
    """Seconds, as of a moment."""

    __slots__ = ("at", "value_s")

    def __init__(self, value_s: float, at: float) -> None:
        self.value_s, self.at = value_s, at


class PeakEwma(Balancer):
    Config = Settings
    config: Settings

    def __init__(self, config: Settings = Settings()) -> None:
        super().__init__(config)
        self._per_s = -1.0 / config.decay_s
        self._seed_s = config.seed_s

    def cost_s(self, endpoint: Endpoint, now: float) -> float:
        cost: Cost | None = endpoint.memo
        if cost is None:
            cost = endpoint.memo = Cost(self._seed_s, now)
        since_s = now - cost.at
        return cost.value_s * math.exp(since_s * self._per_s) if since_s > 0.0 else cost.value_s

    def pick(self, candidates: Sequence[Endpoint], key: int | None, now: float, rnd: Rnd) -> Endpoint:
        count = len(candidates)
        if count < _SCAN_BELOW:
            return self._best(candidates, now, rnd)
        first = int(rnd() * count)
        second = int(rnd() * (count - 1))
        a = candidates[first]
        b = candidates[second + 1 if second >= first else second]
        lighter = self.cost_s(b, now) * (b.active + 1) * a.weight < self.cost_s(a, now) * (a.active + 1) * b.weight
        return b if lighter else a

    def _best(self, candidates: Sequence[Endpoint], now: float, rnd: Rnd) -> Endpoint:
        best = candidates[0]
        least = math.inf
        ties = 0
        for endpoint in candidates:
            load = self.cost_s(endpoint, now) * (endpoint.active + 1) / endpoint.weight
            if load < least:
                best, least, ties = endpoint, load, 1
            elif load == least:
                ties += 1
                if rnd() * ties < 1.0:
                    best = endpoint
        return best

    def ended(self, endpoint: Endpoint, result: AttemptResult, latency_s: float, now: float) -> None:
        if result == "neutral":
            return
        before_s = self.cost_s(endpoint, now)
        sample_s = self.config.throttled_s if result == "throttled" else latency_s
        cost: Cost = endpoint.memo
        if sample_s >= before_s:
            cost.value_s = sample_s
        elif result == "failure":
            cost.value_s = before_s
        else:  # what has faded since the last answer is made up by this one
            cost.value_s = before_s + sample_s * (1.0 - math.exp((now - cost.at) * self._per_s))
        cost.at = now

    def describe(self, endpoint: Endpoint, now: float) -> Mapping[str, float | str]:
        return {"ewma_ms": round(self.cost_s(endpoint, now) * 1000.0, 3)}
