"""The rate limits of one sidecar: makes limiters, and holds the share of those that several instances keep together.

A limit with scope `global` holds for all instances of the service: each has a share of it (a part from 0 to 1) and
counts for itself against that part. The control plane divides; what it needs to know of us is `demand`. Must not know
who divides, nor how. Invariants: the share applies to every global limiter, also to those made later; a limiter that is
no longer used is forgotten.
"""

from typing import Protocol
from weakref import WeakSet

from .ratelimit import Keyed, Verdict
from .sliding_window import KeyedWindows

TOKEN_BUCKET, SLIDING_WINDOW = "token-bucket", "sliding-window"
LOCAL, GLOBAL = "local", "global"
SHARE_MIN = 1e-6
COUNTED_S_MIN = 1.0


class Limiter(Protocol):
    def take(self, key: str, now: float) -> Verdict: ...


def make(requests: float, per_s: float, burst: float, algorithm: str = TOKEN_BUCKET) -> Keyed | KeyedWindows:
    """Raises ValueError."""
    if algorithm == SLIDING_WINDOW:
        return KeyedWindows(requests, per_s)
    if algorithm != TOKEN_BUCKET:
        raise ValueError(f'"{algorithm}" is not an algorithm: {TOKEN_BUCKET} or {SLIDING_WINDOW}')
    return Keyed(requests, per_s, burst)


class Shared:
    """A limiter that keeps a share of its limit, and counts what was asked of it and refused."""

    __slots__ = ("__weakref__", "_limiter", "asked", "rate", "refused")

    def __init__(self, limiter: Keyed | KeyedWindows, rate: float) -> None:
        self._limiter, self.rate = limiter, rate
        self.asked = self.refused = 0

    def scale(self, share: float) -> None:
        self._limiter.scale(share)

    def take(self, key: str, now: float) -> Verdict:
        verdict = self._limiter.take(key, now)
        self.asked += 1
        if not verdict.allowed:
            self.refused += 1
        return verdict


class Limits:
    """`share` is the control plane's where `told`; else a guess. `demand`: what was asked lately, as a part of the
    whole limit (2.0: twice as much as all instances together may allow; of several limits the largest); -1: not known
    yet."""

    def __init__(self) -> None:
        self.share, self.told, self.demand = 1.0, False, -1.0
        self._shared: WeakSet[Shared] = WeakSet()
        self._seen_at: float | None = None

    def __len__(self) -> int:
        return len(self._shared)

    def limiter(
        self, requests: float, per_s: float, burst: float, algorithm: str = TOKEN_BUCKET, scope: str = LOCAL
    ) -> Limiter:
        """Raises ValueError."""
        made = make(requests, per_s, burst, algorithm)
        if scope != GLOBAL:
            return made
        shared = Shared(made, requests / per_s)
        shared.scale(self.share)
        self._shared.add(shared)
        return shared

    def tell(self, share: float) -> None:
        """The control plane's word. It stands until there is another one."""
        self.told = True
        self._set(share)

    def guess(self, instances: int) -> None:
        """So many instances are known, this one with them. Acts only while nobody has told a share."""
        if not self.told:
            self._set(1.0 / max(1, instances))

    def _set(self, share: float) -> None:
        share = min(1.0, max(SHARE_MIN, share))
        if share != self.share:
            self.share = share
            for each in self._shared:
                each.scale(share)

    def shown(self) -> dict[str, object] | None:
        """For people; None: no limit is global. `share_from`: who says so."""
        if not self._shared:
            return None
        return {
            "limits": len(self._shared),
            "share": self.share,
            "share_from": "control plane" if self.told else "guess: all known instances alike",
            "demand": self.demand if self.demand >= 0.0 else None,
            "refused": sum(each.refused for each in self._shared),
        }

    def take_demand(self, now: float) -> float | None:
        """`demand`, counted anew where the last count is a second ago or more. None: no limit is global."""
        if not self._shared:
            self._seen_at, self.demand = None, -1.0
            return None
        elapsed_s = now - self._seen_at if self._seen_at is not None else 0.0
        if self._seen_at is not None and elapsed_s < COUNTED_S_MIN:
            return self.demand
        if self._seen_at is not None:
            self.demand = max(each.asked / elapsed_s / each.rate for each in self._shared)
        self._seen_at = now
        for each in self._shared:
            each.asked = 0
        return self.demand
