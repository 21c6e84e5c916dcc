"""A balancer that prefers the endpoints with the lowest label `price`: {policy: "balancer_cheapest:Cheapest"}."""

from collections.abc import Sequence

from sidecar.api import Balancer, Endpoint, Rnd

BUSY = 10  # attempts in flight of an endpoint that sends further ones to the next price


class Cheapest(Balancer):
    def pick(self, candidates: Sequence[Endpoint], key: int | None, now: float, rnd: Rnd) -> Endpoint:
        return min(candidates, key=lambda e: (e.active >= BUSY, price(e), (e.active + 1) / e.weight, rnd()))


def price(endpoint: Endpoint) -> float:
    return float(endpoint.labels.get("price", "inf"))
