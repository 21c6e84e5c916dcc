"""Which endpoint gets the request.

A Balancer orders endpoints and knows nothing else; a Subset (all endpoints of a service, or those of one version)
adds what must be avoided: open breakers, bad health, endpoints already tried. Counters and breakers live in the
endpoints, so a new Subset goes on where the old one stopped.
Invariants: an endpoint whose breaker refuses is never picked; an endpoint of weight 0 is never picked; with everything
well a pick costs one call of the balancer and three tests.
"""

import math
from collections.abc import Callable, Sequence

from .endpoint import Endpoint

PICKS_MAX = 5  # then a scan decides
_SCAN_BELOW = 4  # so few endpoints are simply all compared
_CYCLE_MAX = 65_536  # entries of a remembered round
_SKIP_MAX = 16


class Balancer:
    """The order of endpoints. `picks` is how often it is worth asking again when the answer cannot be used."""

    __slots__ = ("endpoints", "picks")

    def __init__(self, endpoints: tuple[Endpoint, ...]) -> None:
        assert endpoints
        self.endpoints = endpoints
        self.picks = PICKS_MAX

    def pick(self, rnd: Callable[[], float]) -> Endpoint:
        raise NotImplementedError

    def best(self, candidates: Sequence[Endpoint], rnd: Callable[[], float]) -> Endpoint:
        """One of a few that a scan has found; never empty."""
        return candidates[int(rnd() * len(candidates))]


class RoundRobin(Balancer):
    """Smooth weighted: each pick adds its weight to every endpoint, takes the one that has most, and takes the sum of
    weights from it, so that weights 5, 1, 1 give a a b a c a a. All is zero again after sum/gcd picks; the round is
    therefore remembered and only its first pass costs a scan. Begins at a random place, or all callers would begin
    with the same endpoint."""

    __slots__ = ("_at", "_current", "_cycle", "_period", "_sum", "_weights")

    def __init__(self, endpoints: tuple[Endpoint, ...]) -> None:
        super().__init__(endpoints)
        weights = [endpoint.weight for endpoint in endpoints]
        divisor = math.gcd(*weights) or 1
        self._weights = [weight // divisor for weight in weights]
        self._sum = sum(self._weights)
        equal = len(set(weights)) == 1
        self._period = len(endpoints) if equal else self._sum
        self._cycle: list[Endpoint] = list(endpoints) if equal else []
        self._current = [0] * len(endpoints)
        self._at = -1  # before the first pick

    def pick(self, rnd: Callable[[], float]) -> Endpoint:
        at = self._at
        if at < 0:
            at = self._begin(rnd)
        cycle = self._cycle
        if at < len(cycle):
            endpoint = cycle[at]
        else:
            endpoint = self._next()
            if self._period > _CYCLE_MAX:
                return endpoint  # too long to remember: worked out each time
            cycle.append(endpoint)
        at += 1
        self._at = 0 if at == self._period else at
        return endpoint

    def _begin(self, rnd: Callable[[], float]) -> int:
        if self._cycle:
            return int(rnd() * self._period)
        self._at = 0
        for _ in range(int(rnd() * min(len(self.endpoints), _SKIP_MAX))):
            self.pick(rnd)
        return self._at

    def _next(self) -> Endpoint:
        current, weights = self._current, self._weights
        best = 0
        for index, weight in enumerate(weights):
            current[index] += weight
            if current[index] > current[best]:
                best = index
        current[best] -= self._sum
        return self.endpoints[best]


class LeastRequest(Balancer):
    """The better of two random endpoints, by weight / (requests in flight + 1); of fewer than four, the best of all.
    Ties are broken by chance, or an idle service would send everything to its first endpoint."""

    __slots__ = ("_count",)

    def __init__(self, endpoints: tuple[Endpoint, ...]) -> None:
        super().__init__(endpoints)
        self._count = len(endpoints)
        if self._count < _SCAN_BELOW:
            self.picks = 1  # asking again would give the same answer

    def pick(self, rnd: Callable[[], float]) -> Endpoint:
        count = self._count
        endpoints = self.endpoints
        if count == 2:  # by far the most frequent
            a, b = endpoints
            lead = b.weight * (a.active + 1) - a.weight * (b.active + 1)
            return b if lead > 0 or (lead == 0 and rnd() < 0.5) else a
        if count < _SCAN_BELOW:
            return self.best(endpoints, rnd)
        first = int(rnd() * count)
        second = int(rnd() * (count - 1))
        a = endpoints[first]
        b = endpoints[second + 1 if second >= first else second]
        return b if b.weight * (a.active + 1) > a.weight * (b.active + 1) else a

    def best(self, candidates: Sequence[Endpoint], rnd: Callable[[], float]) -> Endpoint:
        best = candidates[0]
        ties = 1
        for endpoint in candidates[1:]:
            lead = endpoint.weight * (best.active + 1) - best.weight * (endpoint.active + 1)
            if lead > 0:
                best, ties = endpoint, 1
            elif lead == 0:
                ties += 1
                if rnd() * ties < 1.0:
                    best = endpoint
        return best


BALANCERS: dict[str, type[Balancer]] = {"round-robin": RoundRobin, "least-request": LeastRequest}


class Subset:
    """The endpoints that a destination may use. `panic_threshold` in percent; 0 turns panic off."""

    __slots__ = ("_only", "_panic_threshold", "balancer", "endpoints", "name", "panic_picks")

    def __init__(
        self,
        name: str,
        endpoints: tuple[Endpoint, ...],
        balancer: type[Balancer] = LeastRequest,
        panic_threshold: float = 50.0,
    ) -> None:
        self.name = name
        self.endpoints = tuple(endpoint for endpoint in endpoints if endpoint.weight > 0)
        self.balancer = balancer(self.endpoints) if self.endpoints else None
        self._only = self.endpoints[0] if len(self.endpoints) == 1 else None
        self._panic_threshold = panic_threshold
        self.panic_picks = 0  # of endpoints in bad health, because too few are in good health

    def pick(self, now: float, tried: tuple[Endpoint, ...], rnd: Callable[[], float]) -> Endpoint | None:
        """An endpoint, or None: then `why_none` has the word for it."""
        endpoint = self._only
        if endpoint is not None:
            if endpoint.healthy and not endpoint.breaker.tripped:
                return endpoint  # tried or not: there is no other
            return self._scan(now, tried, rnd)
        balancer = self.balancer
        if balancer is None:
            return None
        endpoint = balancer.pick(rnd)
        if endpoint.healthy and not endpoint.breaker.tripped and (not tried or endpoint not in tried):
            return endpoint
        return self._pick_again(endpoint, balancer, now, tried, rnd)

    def why_none(self, now: float) -> str:
        """circuit_open: a usable endpoint was only open or being probed; else no_healthy_endpoint."""
        usable = self.endpoints if self.in_panic() else [endpoint for endpoint in self.endpoints if endpoint.healthy]
        return "circuit_open" if usable else "no_healthy_endpoint"

    def in_panic(self) -> bool:
        """Whether so few endpoints are in good health that health is no longer asked."""
        healthy = sum(endpoint.healthy for endpoint in self.endpoints)
        return healthy * 100.0 < self._panic_threshold * len(self.endpoints)

    def _pick_again(
        self,
        endpoint: Endpoint,
        balancer: Balancer,
        now: float,
        tried: tuple[Endpoint, ...],
        rnd: Callable[[], float],
    ) -> Endpoint | None:
        panic: bool | None = None  # asked only where it decides, because it counts all endpoints
        for left in range(balancer.picks - 1, -1, -1):
            if endpoint not in tried and endpoint.breaker.allows(now):
                if endpoint.healthy:
                    return endpoint
                if panic is None:
                    panic = self.in_panic()
                if panic:
                    return self._picked(endpoint)
            if left:
                endpoint = balancer.pick(rnd)
        return self._scan(now, tried, rnd)

    def _scan(self, now: float, tried: tuple[Endpoint, ...], rnd: Callable[[], float]) -> Endpoint | None:
        panic = self.in_panic()
        good = [e for e in self.endpoints if (e.healthy or panic) and e.breaker.allows(now)]
        if not good:
            return None
        assert self.balancer is not None
        return self._picked(self.balancer.best([e for e in good if e not in tried] or good, rnd))

    def _picked(self, endpoint: Endpoint) -> Endpoint:
        if not endpoint.healthy:
            self.panic_picks += 1
        return endpoint
