"""The contract of a balancer: which of a few endpoints gets the next attempt.

    decode(config) → __init__(settings) → arrange(endpoints) → pick … began … ended → arrange(other endpoints) → …

A balancer is asked for an order and nothing else: health, breakers, endpoints already tried, priorities, zones and
panic are looked after by whoever asks. Must not know the proxy; time and chance are arguments. Invariants: a hook that
a class does not override is never called; what is kept in `endpoint.memo` lives exactly as long as the endpoint.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from hashlib import blake2b
from typing import Any, ClassVar, Literal, Protocol

from .config import decode, nothing

Rnd = Callable[[], float]
"""A number in [0, 1)."""

AttemptResult = Literal["success", "failure", "throttled", "neutral"]
"""How an attempt ended: a `failure` is also one that a later attempt beside it has beaten, after so long without an
answer; `throttled` is 429 or RESOURCE_EXHAUSTED; `neutral` says nothing of the endpoint (the caller
left, or a sidecar refused by policy)."""


class Endpoint(Protocol):
    """What a balancer sees of an endpoint. The same object stands for the same address over every change of policy.

    - `key`: host:port; `weight`: above 0, and less than stated while the endpoint starts slowly
    - `active`: attempts of this sidecar in flight there
    - `zone`, `version` ("" where there is none) and `labels`
    - `memo`: the balancer's own, None at first
    """

    memo: Any

    @property
    def key(self) -> str: ...
    @property
    def weight(self) -> float: ...
    @property
    def active(self) -> int: ...
    @property
    def zone(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def labels(self) -> Mapping[str, str]: ...


Pick = Callable[[Sequence[Endpoint], int | None, float, Rnd], Endpoint | None]
"""`pick(candidates, key, now, rnd)`: see Balancer.pick."""


class Balancer:
    """One for each service that names it. Override `pick`, and what else is needed."""

    Config: ClassVar[type | None] = None
    """A dataclass with this balancer's settings; None: it takes none."""

    keyed: ClassVar[bool] = False
    """Whether it picks by a key of the request (`balance.by`): without it, no key is worked out."""

    def __init__(self, config: Any = None) -> None:
        """`config` is what `decode` gave. No I/O, here or anywhere."""
        self.config = config

    @classmethod
    def decode(cls, config: Mapping[str, object]) -> Any:
        """Settings from the policy's `with`. Raises ConfigError. Override it for more than a dataclass can say."""
        if cls.Config is None:
            return nothing(config)
        assert is_dataclass(cls.Config), f"{cls.__name__}.Config must be a dataclass"
        return decode(cls.Config, config)

    def arrange(self, endpoints: Sequence[Endpoint]) -> Pick:
        """Called when a set of endpoints begins to serve, and again whenever it or a weight in it changes; several sets
        (of each version, zone, priority) are in use at a time, and an empty one is no error. What it gives is asked
        for every attempt among these endpoints: a bound method of an object that holds tables for this set, or, as
        here, `self.pick`.
        """
        return self.pick

    def pick(self, candidates: Sequence[Endpoint], key: int | None, now: float, rnd: Rnd) -> Endpoint | None:
        """One of `candidates`, which are never empty; None: none of them will do.

        `candidates` is first the very sequence given to `arrange`; if the answer cannot be used it is asked again, and
        at last with only those that can. `key`: 64 bits made of what `balance.by` names; None where the request has
        none of it, or the balancer is not `keyed`. `now`: seconds, monotonic.
        """
        raise NotImplementedError

    def began(self, endpoint: Endpoint, now: float) -> None:
        """An attempt goes to this endpoint; `active` counts it already."""

    def ended(self, endpoint: Endpoint, result: AttemptResult, latency_s: float, now: float) -> None:
        """Its response head is here, or it failed. Follows each `began` once; `active` may count it still."""

    def describe(self, endpoint: Endpoint, now: float) -> Mapping[str, float | str]:
        """What is known of an endpoint, for people: shown in `/clusters`."""
        return {}


BALANCER_HOOKS = ("began", "ended", "describe")


def weighted(candidates: Sequence[Endpoint], rnd: Rnd) -> Endpoint:
    """One by chance, each with a share of its weight."""
    if len(candidates) == 1:
        return candidates[0]
    left = rnd() * sum([endpoint.weight for endpoint in candidates])
    for endpoint in candidates:
        left -= endpoint.weight
        if left < 0.0:
            return endpoint
    return candidates[-1]


def stable_hash(text: bytes) -> int:
    """64 bits that are the same in every sidecar (Python's own `hash` differs with each process)."""
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")


class BoundedLoad:
    """Consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam 2016), for balancers that are `keyed`.

    No endpoint has more than `percent` of its share (by weight) of the attempts in flight, the one that is about to
    begin included; 0: no bound. Under a bound of more than 100 % there is always one with room.
    """

    __slots__ = ("_factor",)

    def __init__(self, percent: float) -> None:
        self._factor = percent / 100.0

    @staticmethod
    def check(percent: float) -> None:
        """Raises ValueError."""
        if percent != 0.0 and not 101.0 <= percent <= 10_000.0:
            raise ValueError("bounded_load_percent must be 0 (no bound), or between 101 and 10000")

    def has_room(self, endpoint: Endpoint, candidates: Sequence[Endpoint]) -> bool:
        if not self._factor:
            return True
        slots = self._factor * (sum([each.active for each in candidates]) + 1)
        return endpoint.active < math.ceil(slots * endpoint.weight / sum([each.weight for each in candidates]))

    def next(self, owners: Sequence[Endpoint], at: int, candidates: Sequence[Endpoint]) -> Endpoint:
        """The first from `owners[at]` on, round and round, that is a candidate and has room."""
        slots = 0.0
        if self._factor:
            slots = self._factor * (sum([each.active for each in candidates]) + 1)
            slots /= sum([each.weight for each in candidates])
        left = {each.key for each in candidates}
        count = len(owners)
        for step in range(count):
            endpoint = owners[(at + step) % count]
            if endpoint.key in left:
                if not slots or endpoint.active < math.ceil(slots * endpoint.weight):
                    return endpoint
                left.remove(endpoint.key)
        return min(candidates, key=lambda each: each.active / each.weight)  # rounding, or an owner without an entry
