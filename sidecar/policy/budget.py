"""The retry budget: how much of the traffic to one service may be retries.

Balance = reserve + deposits - withdrawals, each over the last ten seconds: every original request deposits `percent`
of a retry, every retry withdraws one, and the reserve (`min_per_second` · 10 s) lets a quiet caller retry at all.
Kept in ten one-second buckets that are counted from `now` at construction: an entry leaves the balance between nine
and ten seconds after it was made.
Must not know requests or services. Invariant: buckets hold whole requests, never shares, so that the sums are exact;
history is therefore judged by the percentage of today, also after a change of policy.
"""

_BUCKETS = 10
_ROUNDING = 1e-9  # 0.1 + 0.2 is enough where 0.3 is asked for


class Budget:
    """One for each service that a sidecar calls. `deposit` is on the hot path: one comparison and one addition."""

    __slots__ = (
        "_deposits",
        "_deposits_now",
        "_deposits_past",
        "_second_ends",
        "_withdrawals",
        "_withdrawals_now",
        "_withdrawals_past",
        "percent",
        "reserve",
    )

    def __init__(self, percent: float, min_per_second: float, now: float) -> None:
        self.configure(percent, min_per_second)
        self._second_ends = now + 1.0
        self._deposits_now = 0
        self._withdrawals_now = 0
        self._deposits = [0] * (_BUCKETS - 1)  # the nine full seconds before this one, oldest first
        self._withdrawals = [0] * (_BUCKETS - 1)
        self._deposits_past = 0  # their sums
        self._withdrawals_past = 0

    def configure(self, percent: float, min_per_second: float) -> None:
        """A new policy over the same history."""
        self.percent = percent
        self.reserve = min_per_second * _BUCKETS

    def deposit(self, now: float) -> None:
        """An original request was seen."""
        if now >= self._second_ends:
            self._roll(now)
        self._deposits_now += 1

    def withdraw(self, now: float) -> bool:
        """Pays for one retry; False where the balance is below one, and nothing changes."""
        if self.balance(now) < 1.0 - _ROUNDING:
            return False
        self._withdrawals_now += 1
        return True

    def withdraw_spare(self, now: float) -> bool:
        """Pays for one hedge, which is a luxury: half of what has come in is left to retries."""
        if now >= self._second_ends:
            self._roll(now)
        came = self.reserve + (self._deposits_past + self._deposits_now) * self.percent / 100.0
        if self._withdrawals_past + self._withdrawals_now + 1 > came / 2.0 + _ROUNDING:
            return False
        self._withdrawals_now += 1
        return True

    def balance(self, now: float) -> float:
        if now >= self._second_ends:
            self._roll(now)
        deposits = self._deposits_past + self._deposits_now
        return self.reserve + deposits * self.percent / 100.0 - self._withdrawals_past - self._withdrawals_now

    def _roll(self, now: float) -> None:
        """Closes the seconds that have ended. Ends stay whole seconds apart, so that buckets never drift."""
        seconds = int(now - self._second_ends) + 1
        self._second_ends += seconds
        for _ in range(min(seconds, _BUCKETS)):
            self._deposits.append(self._deposits_now)
            self._deposits_past += self._deposits_now - self._deposits.pop(0)
            self._withdrawals.append(self._withdrawals_now)
            self._withdrawals_past += self._withdrawals_now - self._withdrawals.pop(0)
            self._deposits_now = self._withdrawals_now = 0
