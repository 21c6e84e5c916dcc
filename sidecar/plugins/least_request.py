"""The balancer `least-request`: the better of two random endpoints, by weight / (attempts in flight + 1); of fewer than
four, the best of all.

Two choices are nearly as good as all (Mitzenmacher 2001) and keep callers from all running to the same endpoint. Ties
of few are broken by chance, or an idle service would send everything to its first endpoint.
"""

from collections.abc import Sequence

from sidecar.api import Balancer, Endpoint, Pick, Rnd

_SCAN_BELOW = 4  # so few endpoints are simply all compared


class LeastRequest(Balancer):
    """What serves most requests by far is made for its set of endpoints beforehand: a pair, or four and more."""

    def arrange(self, endpoints: Sequence[Endpoint]) -> Pick:
        if len(endpoints) == 2:
            return _of_two(endpoints)
        return _of_many(endpoints) if len(endpoints) >= _SCAN_BELOW else pick


def pick(candidates: Sequence[Endpoint], key: int | None, now: float, rnd: Rnd) -> Endpoint | None:
    """Of any candidates."""
    if len(candidates) >= _SCAN_BELOW:
        return _of_many(candidates)(candidates, key, now, rnd)
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


def _of_two(endpoints: Sequence[Endpoint]) -> Pick:
    a, b = endpoints

    def pick_one(candidates: Sequence[Endpoint], key: int | None, now: float, rnd: Rnd) -> Endpoint | None:
        if candidates is not endpoints:
            return pick(candidates, key, now, rnd)
        lead = b.weight * (a.active + 1) - a.weight * (b.active + 1)
        return b if lead > 0 or (lead == 0 and rnd() < 0.5) else a

    return pick_one


def _of_many(endpoints: Sequence[Endpoint]) -> Pick:
    count = len(endpoints)
    others = count - 1

    def pick_one(candidates: Sequence[Endpoint], key: int | None, now: float, rnd: Rnd) -> Endpoint | None:
        if candidates is not endpoints:
            return pick(candidates, key, now, rnd)
        first = int(rnd() * count)
        second = int(rnd() * others)
        a = endpoints[first]
        b = endpoints[second + 1 if second >= first else second]
        return b if b.weight * (a.active + 1) > a.weight * (b.active + 1) else a

    return pick_one
