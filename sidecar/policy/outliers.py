"""Statistical ejection: an endpoint that serves clearly worse than its peers is left out for a while.

Once an interval the success rates of all endpoints of a cluster are compared. Whoever lies more than stdev_factor
standard deviations (of the population) below the mean is ejected for eject_for times the number of its ejections; that
number falls by one with each interval that it serves in good order. Only what the exchange counts anyway is looked at,
so the hot path knows nothing of this. Must not know requests, breakers or panic: it says who is ejected, and others
conclude.
Invariants: an interval without five endpoints of a hundred requests each judges nobody; who is ejected is neither
judged nor part of the mean; a judgement never ejects more at once than the policy allows; `due` is never later than
the next thing that has to happen.
"""

import math
from collections.abc import Callable, Iterable

from sidecar.model.snapshot import OUTLIER_ENDPOINTS_MIN, OUTLIER_REQUESTS_MIN, Outliers

from .endpoint import Endpoint

_ALMOST = 1e-9  # what arithmetic may be wrong by: nobody is ejected for that

OnChange = Callable[[Endpoint, str], None]
"""Told of each ejection, each return and each endpoint that is spared, with the evidence."""


class _Record:
    """What is known of one endpoint. The counts are those at the beginning of what is judged next; `until` None: it is
    not ejected; `times` is the multiplier of its next ejection, less one; `since`: from when on it has served."""

    __slots__ = ("failures", "since", "successes", "throttled", "times", "until")

    def __init__(self, endpoint: Endpoint, now: float) -> None:
        self.times = 0
        self.until: float | None = None
        self.start(endpoint, now)

    def start(self, endpoint: Endpoint, now: float) -> None:
        self.since = now
        self.successes, self.failures, self.throttled = endpoint.successes, endpoint.failures, endpoint.throttled

    def take(self, endpoint: Endpoint) -> tuple[int, int]:
        """Successes and requests since the last time."""
        good = endpoint.successes - self.successes
        bad = endpoint.failures - self.failures + endpoint.throttled - self.throttled
        self.successes, self.failures, self.throttled = endpoint.successes, endpoint.failures, endpoint.throttled
        return good, good + bad


class Detector:
    """The outliers of one cluster. `due`: when `step` is wanted next."""

    __slots__ = ("_began", "_ends", "_records", "capped", "due", "ejections", "on_change", "policy")

    def __init__(self, policy: Outliers, now: float, on_change: OnChange | None = None) -> None:
        self.policy = policy
        self.on_change = on_change
        self.ejections = 0
        self.capped = 0  # endpoints that were spared because too many are ejected already
        self._records: dict[Endpoint, _Record] = {}
        self._began = now
        self._ends = self.due = now + policy.interval_s

    def configure(self, policy: Outliers, endpoints: Iterable[Endpoint], now: float) -> None:
        """The terms and the endpoints from now on. Whoever is ejected stays so for the time that was said; whoever
        comes is counted from now."""
        if policy.interval_s != self.policy.interval_s:
            self._ends = max(now, self._began + policy.interval_s)
        self.policy = policy
        before = self._records
        self._records = {endpoint: before.get(endpoint) or _Record(endpoint, now) for endpoint in endpoints}
        self._set_due()

    def release(self) -> None:
        """Nobody is ejected any more: the policy has no outliers from now on."""
        for endpoint, record in self._records.items():
            if record.until is not None:
                self._end(endpoint, record, "returned: the policy ejects no outliers any more")

    @property
    def ejected(self) -> int:
        return sum([record.until is not None for record in self._records.values()])

    def until(self, endpoint: Endpoint) -> float | None:
        """When an ejection ends; None where there is none."""
        record = self._records.get(endpoint)
        return record.until if record is not None else None

    def step(self, now: float) -> bool:
        """What is due by now: ejections that end, then the judgement of an interval. True: somebody's ejection has
        begun or ended."""
        changed = False
        for endpoint, record in self._records.items():
            if record.until is not None and now >= record.until:
                self._end(endpoint, record, f"returned: its ejection is over ({_times(record.times)})")
                record.start(endpoint, now)
                changed = True
        if now >= self._ends:
            changed = self._judge(now) or changed
            interval_s = self.policy.interval_s
            self._began = self._ends if now < self._ends + interval_s else now
            self._ends = self._began + interval_s
        self._set_due()
        return changed

    def _set_due(self) -> None:
        ends = [record.until for record in self._records.values() if record.until is not None]
        self.due = min([self._ends, *ends])

    # -- the judgement

    def _judge(self, now: float) -> bool:
        """The interval is over."""
        compared: list[tuple[float, int, Endpoint]] = []
        for endpoint, record in self._records.items():
            if record.until is None:
                good, total = record.take(endpoint)
                if total >= OUTLIER_REQUESTS_MIN:
                    compared.append((good / total, total, endpoint))
        mean, threshold = self._threshold([rate for rate, _, _ in compared])
        worst_first = sorted(compared, key=lambda each: each[0])
        found = [each for each in worst_first if each[0] < threshold - _ALMOST]
        self._pass({endpoint for _, _, endpoint in found})
        members = sum([endpoint.stated_weight > 0 for endpoint in self._records])
        room = self.policy.ejected_max(members) - self.ejected
        for number, (rate, total, endpoint) in enumerate(found):
            evidence = (
                f"success rate {rate * 100.0:.1f}% of {total} requests, "
                f"mean {mean * 100.0:.1f}%, threshold {threshold * 100.0:.1f}%"
            )
            if number < room:
                self._eject(endpoint, evidence, now)
            else:
                self.capped += 1
                already = f"{self.ejected} of {members} are ejected (max_ejected {self.policy.max_ejected:g}%)"
                self._tell(endpoint, f"spared: {evidence}; {already}")
        return bool(found) and room > 0

    def _threshold(self, rates: list[float]) -> tuple[float, float]:
        """Mean and threshold; where there is too little to compare, nothing is below it."""
        if len(rates) < OUTLIER_ENDPOINTS_MIN:
            return 0.0, -math.inf
        mean = math.fsum(rates) / len(rates)
        variance = math.fsum([(rate - mean) ** 2 for rate in rates]) / len(rates)
        return mean, mean - self.policy.stdev_factor * math.sqrt(variance)

    def _pass(self, found: set[Endpoint]) -> None:
        """Whoever has served the whole interval and was not found wanting owes one ejection less."""
        for endpoint, record in self._records.items():
            if record.times and record.until is None and record.since <= self._began and endpoint not in found:
                record.times -= 1

    def _eject(self, endpoint: Endpoint, evidence: str, now: float) -> None:
        policy, record = self.policy, self._records[endpoint]
        if not record.times or policy.eject_for_s * record.times < policy.max_eject_for_s:
            record.times += 1  # it stops growing where it says nothing any more, or it would take days to fall
        lasts_s = min(policy.eject_for_s * record.times, policy.max_eject_for_s)
        record.until = now + lasts_s
        endpoint.eject()
        self.ejections += 1
        self._tell(endpoint, f"ejected: {evidence}; for {lasts_s:g}s ({_times(record.times)})")

    def _end(self, endpoint: Endpoint, record: _Record, text: str) -> None:
        record.until = None
        endpoint.readmit()
        self._tell(endpoint, text)

    def _tell(self, endpoint: Endpoint, text: str) -> None:
        if self.on_change is not None:
            self.on_change(endpoint, text)


def _times(count: int) -> str:
    ending = "th" if count % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(count % 10, "th")
    return f"{count}{ending} time"
