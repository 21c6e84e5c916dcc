"""The sliding window: two counters a key, weighted by time.

Time is cut into windows of `per_s`. Of each key the requests allowed in this window and in the one before are counted;
the window before is taken to have been filled evenly, so of its count that part is still in the last `per_s` which
overlaps them (the approximation of Cloudflare's "How we built rate limiting capable of scaling to millions of domains",
2017):

    used = before * (1 - elapsed / per_s) + now;  allowed where used + 1 <= requests

A refusal is not counted. Must not know what a key means. Invariants: in one window of the grid at most `requests` are
allowed, in any stretch as long as one less than twice as many; memory is bounded by the number of keys.
"""

from .ratelimit import KEYS_MAX, SWEEP_MIN, Verdict, evict, short

_BITS = 24
_COUNT_MAX = (1 << _BITS) - 1
_ROUNDING = 1e-9
_SHRINK_MASK = 0x3FFF  # every so many keys


def judge(requests: float, per_s: float, before: int, count: int, elapsed_s: float) -> Verdict:
    """The verdict for a key that was allowed `before` in the last window and `count` in this one."""
    used = before * (1.0 - elapsed_s / per_s) + count
    slack = requests - used - 1.0
    if slack >= -_ROUNDING * max(1.0, requests):
        return Verdict(True, int(slack + _ROUNDING * requests), 0.0, 2 * per_s - elapsed_s)
    reset_s = (2 * per_s if count else per_s) - elapsed_s
    if count + 1.0 <= requests:  # in this window, as the one before fades: `before` is above 0
        at_s = per_s * (1.0 - (requests - count - 1.0) / before)
        return Verdict(False, 0, max(0.0, at_s - elapsed_s), reset_s)
    at_s = per_s * max(0.0, 1.0 - (requests - 1.0) / count)  # in the next, in which this one fades
    return Verdict(False, 0, per_s - elapsed_s + at_s, reset_s)


class KeyedWindows:
    """A sliding window for each key. A key has one entry: both its counts in one number, in the table of the window in
    which it was last used. What is two windows old counts nothing and is forgotten at once, a table at a time; where
    there are too many keys, the least recently used go first (in a large table a few at once)."""

    __slots__ = ("_before", "_index", "_keys_max", "_limit", "_moved", "_now", "_per_s", "requests")

    def __init__(self, requests: float, per_s: float, keys_max: int = KEYS_MAX) -> None:
        if not 1 <= requests < _COUNT_MAX or per_s <= 0:
            raise ValueError(f"requests must be from 1 to {_COUNT_MAX}, per above 0")
        self._limit = requests
        self.requests = requests
        self._per_s = per_s
        self._keys_max = keys_max
        self._index = 0  # of the window that `_now` is of
        self._now: dict[int, int] = {}  # least recently used first
        self._before: dict[int, int] = {}
        self._moved = 0  # since the table was last made anew

    def __len__(self) -> int:
        return len(self._now) + len(self._before)

    def scale(self, share: float) -> None:
        """Go on with this part of the stated limit, at least 1. What was counted stays counted."""
        self.requests = max(1.0, self._limit * share)

    def take(self, key: str | bytes, now: float) -> Verdict:
        index = int(now // self._per_s)
        if index != self._index:
            self._turn(index)
        table, name = self._now, short(key)
        both = table.pop(name, None)
        if both is None:
            both = self._from_before(name) << _BITS
            if len(table) + len(self._before) >= self._keys_max:
                evict(self._before or table, self._keys_max)
        before, count = both >> _BITS, both & _COUNT_MAX
        verdict = judge(self.requests, self._per_s, before, count, now - index * self._per_s)
        if verdict.allowed:
            both += 1
        self._moved += 1
        if self._moved > SWEEP_MIN and self._moved > len(table) // 2:
            table = self._now = dict(table)  # without the holes, for which it would grow to twice the size
            self._moved = 0
        table[name] = both
        return verdict

    def _from_before(self, name: int) -> int:
        """What a key was allowed in the last window; it moves from there into this one."""
        count = self._before.pop(name, None)
        if count is None:
            return 0
        if not len(self._before) & _SHRINK_MASK:
            self._before = dict(self._before)  # a dict does not give back by itself what its keys took
        return count & _COUNT_MAX

    def _turn(self, index: int) -> None:
        """A new window has begun; the last one counts only where it is the one right before."""
        self._before = self._now if index - self._index == 1 else {}
        self._now = {}
        self._index, self._moved = index, 0
