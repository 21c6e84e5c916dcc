"""A balancer that is not built in, watched: what it does wrong costs an order, never a request.

Where it raises, or picks what is not a candidate, one is picked by weight and chance, and the mistake is reported. Must
not know who hears the report. Invariant: whatever the balancer does, `pick` gives a candidate or None.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sidecar.api import AttemptResult, Balancer, Endpoint, Pick, Rnd, weighted

from .finding import describe

Report = Callable[[str], None]


class Guard(Balancer):
    def __init__(self, balancer: Balancer, report: Report) -> None:
        super().__init__(balancer.config)
        self.balancer, self._report = balancer, report

    def arrange(self, endpoints: Sequence[Endpoint]) -> Pick:
        report = self._report
        try:
            order = self.balancer.arrange(endpoints)
        except Exception as error:
            report(f"arrange raised {describe(error)}")
            return _by_weight

        def pick(candidates: Sequence[Endpoint], key: int | None, now: float, rnd: Rnd) -> Endpoint | None:
            try:
                endpoint = order(candidates, key, now, rnd)
            except Exception as error:
                report(f"pick raised {describe(error)}")
                return weighted(candidates, rnd)
            if endpoint is None or endpoint in candidates:
                return endpoint
            report(f"pick gave {str(endpoint)[:80]}, which is not a candidate")
            return weighted(candidates, rnd)

        return pick

    def began(self, endpoint: Endpoint, now: float) -> None:
        try:
            self.balancer.began(endpoint, now)
        except Exception as error:
            self._report(f"began raised {describe(error)}")

    def ended(self, endpoint: Endpoint, result: AttemptResult, latency_s: float, now: float) -> None:
        try:
            self.balancer.ended(endpoint, result, latency_s, now)
        except Exception as error:
            self._report(f"ended raised {describe(error)}")

    def describe(self, endpoint: Endpoint, now: float) -> Mapping[str, float | str]:
        try:
            return {str(name)[:40]: _plain(value) for name, value in self.balancer.describe(endpoint, now).items()}
        except Exception as error:
            self._report(f"describe raised {describe(error)}")
            return {}


def _by_weight(candidates: Sequence[Endpoint], key: int | None, now: float, rnd: Rnd) -> Endpoint:
    return weighted(candidates, rnd)


def _plain(value: Any) -> float | str:
    return value if isinstance(value, int | float) else str(value)[:200]
