"""Two ways to count requests against a limit, alone and by key: a token bucket and a sliding window.

A bucket of `burst` tokens starts full and gains `requests` per `per_s` seconds; a request takes one. Its whole state is
one number, the time at which it will be full again (the generic cell rate algorithm), so a hundred thousand keys stay
small. The sliding window is in `sliding_window`. Must not know what a key means. Invariant: memory is bounded by the
number of keys, whatever their length.
"""

from itertools import islice
from typing import NamedTuple

KEYS_MAX = 100_000
SWEEP_MIN = 1024
_EVICTED_SHARE = 128  # a full table forgets this share of itself at once: finding the oldest costs a scan
_ROUNDING_S = 1e-6  # a burst of thousands adds up that many roundings of the clock's value
_SHORT_MASK = (1 << 60) - 1  # two digits of an int: 32 bytes instead of 48


class Verdict(NamedTuple):
    """`remaining`: requests that would still be allowed at once. `retry_after_s`: 0 where allowed. `reset_s`: until the
    bucket is full."""

    allowed: bool
    remaining: int
    retry_after_s: float
    reset_s: float


def short(key: str | bytes) -> int:
    """60 bits of a keyed hash (SipHash with a seed of this process): peers cannot make two alike."""
    return hash(key) & _SHORT_MASK


def evict(table: dict[int, float] | dict[int, int], keys_max: int) -> None:
    """Forget the oldest of a table."""
    for each in list(islice(table, max(1, keys_max // _EVICTED_SHARE))):
        del table[each]


class TokenBucket:
    __slots__ = ("_full_at", "_interval_s", "_spare_s", "burst")

    def __init__(self, requests: float, per_s: float, burst: float) -> None:
        if requests <= 0 or per_s <= 0 or burst < 1:
            raise ValueError("requests and per must be above 0, burst at least 1")
        self.burst = burst
        self._interval_s = per_s / requests
        self._spare_s = (burst - 1) * self._interval_s  # missing more than this, it holds less than one token
        self._full_at = float("-inf")

    def take(self, now: float) -> Verdict:
        verdict, self._full_at = self.judge(self._full_at, now)
        return verdict

    def judge(self, full_at: float, now: float) -> tuple[Verdict, float]:
        """The verdict for a bucket that will be full at `full_at`, and when it will be full after that."""
        missing_s = max(0.0, full_at - now)
        left_s = self._spare_s - missing_s
        if left_s < -_ROUNDING_S:
            return Verdict(False, 0, -left_s, missing_s), full_at
        missing_s += self._interval_s
        return Verdict(True, int(max(0.0, left_s + _ROUNDING_S) / self._interval_s), 0.0, missing_s), now + missing_s


class Keyed:
    """A bucket for each key. Buckets that are full again are forgotten now and then, which changes nothing; where that
    is not enough, the least recently used go first (in a large table a few at once)."""

    __slots__ = ("_bucket", "_full_at", "_keys_max", "_limit", "_moved", "_new", "_sweep_after")

    def __init__(self, requests: float, per_s: float, burst: float, keys_max: int = KEYS_MAX) -> None:
        self._limit = requests, per_s, burst
        self._bucket = TokenBucket(requests, per_s, burst)
        self._full_at: dict[int, float] = {}  # least recently used first
        self._keys_max = keys_max
        self._new = 0  # keys since the last sweep
        self._moved = 0  # since the table was last made anew
        self._sweep_after = SWEEP_MIN

    def __len__(self) -> int:
        return len(self._full_at)

    def scale(self, share: float) -> None:
        """Go on with this part of the stated rate and burst, and at least a burst of 1. A bucket
        keeps the time at which it will be full: it is as empty after as before, in proportion to its rate."""
        requests, per_s, burst = self._limit
        self._bucket = TokenBucket(requests * share, per_s, max(1.0, burst * share))

    def take(self, key: str | bytes, now: float) -> Verdict:
        table = self._full_at
        name = short(key)
        full_at = table.pop(name, None)
        if full_at is None:
            full_at = float("-inf")
            self._new += 1
            if self._new > self._sweep_after:
                self._sweep(now)
            if len(table) >= self._keys_max:
                evict(table, self._keys_max)
        self._moved += 1
        if self._moved > SWEEP_MIN and self._moved > len(table) // 2:
            table = self._full_at = dict(table)  # without the holes, for which it would grow to twice the size
            self._moved = 0
        verdict, table[name] = self._bucket.judge(full_at, now)
        return verdict

    def _sweep(self, now: float) -> None:
        """At most twice as many steps as keys have come since the last time: constant cost for each."""
        for name in [name for name, full_at in self._full_at.items() if full_at <= now]:
            del self._full_at[name]
        self._new = 0
        self._sweep_after = max(SWEEP_MIN, len(self._full_at))
