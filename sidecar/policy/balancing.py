"""Which endpoint gets the attempt.

A balancer (sidecar.api.Balancer) orders endpoints and knows nothing else. A Group adds what must be avoided: open
breakers, bad health, endpoints already tried. A Subset (all endpoints of a service, or those of one version) is one
Group, or where priorities and zones are stated the choice among several. Counters and breakers live in the endpoints,
so a new Subset goes on where the old one stopped.
Invariants: an endpoint whose breaker refuses is never picked; an endpoint of weight 0 is never picked; `Subset.pick` is
bound when the Subset is made, so that with everything well and nothing stated a pick costs one call of the balancer and
three tests.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .endpoint import Endpoint
from .levels import loads, panics
from .slow_start import Warmup

PICKS_MAX = 5  # then a scan decides
_SCAN_BELOW = 4  # of so few endpoints the usable ones are found at once
_ZONE_MIN = 2  # usable endpoints that the own zone needs to be preferred
_DRAWS = 100_003  # prime: how a key chooses among levels has nothing to do with how it chooses an endpoint

Rnd = Callable[[], float]
Order = Callable[[Sequence[Endpoint], int | None, float, Rnd], Endpoint | None]
"""(candidates, key, now, rnd) → one of them."""
Arrange = Callable[[tuple[Endpoint, ...]], Order]
"""What a balancer makes of a set of endpoints."""


@dataclass(frozen=True, slots=True)
class Balancing:
    """A service's balancer (sidecar.api.Balancer) as the plans see it. `keyed`: it goes by a key of the request;
    `told`: it wants to hear how attempts begin and end."""

    balancer: Any
    arrange: Arrange
    keyed: bool = False
    told: bool = False


def by_chance(candidates: Sequence[Endpoint], key: int | None, now: float, rnd: Rnd) -> Endpoint:
    return candidates[int(rnd() * len(candidates))]


def arrange_by_chance(endpoints: tuple[Endpoint, ...]) -> Order:
    """Where nobody says how."""
    return by_chance


BY_CHANCE = Balancing(None, arrange_by_chance)


class Group:
    """Endpoints among which one balancer decides. `panic` None: judged by `panic_threshold` when it matters."""

    __slots__ = ("again", "counts", "endpoints", "order", "panic", "panic_threshold", "pick")

    def __init__(
        self,
        endpoints: tuple[Endpoint, ...],
        arrange: Arrange,
        panic_threshold: float,
        counts: "Counts",
        keyed: bool = False,
    ) -> None:
        self.endpoints = endpoints
        self.panic_threshold = panic_threshold
        self.panic: bool | None = None
        self.counts = counts
        self.again = 0 if keyed or len(endpoints) < _SCAN_BELOW else PICKS_MAX - 1  # picks worth asking again
        self.order: Order = by_chance
        self.pick: PickAt = self._none
        if endpoints:
            self.rearrange(arrange)

    def rearrange(self, arrange: Arrange) -> None:
        """The balancer orders the endpoints anew, because a weight has changed."""
        order = self.order = arrange(self.endpoints)
        if len(self.endpoints) == 1:
            self.pick = _lone_picker(self.endpoints[0], self._scan)
        else:
            self.pick = _picker(self.endpoints, order, self._again)

    def in_panic(self) -> bool:
        """Whether so few endpoints are in good health that health is no longer asked."""
        if self.panic is not None:
            return self.panic
        healthy = sum([endpoint.healthy for endpoint in self.endpoints])
        return healthy * 100.0 < self.panic_threshold * len(self.endpoints)

    def takes(self, endpoint: Endpoint, now: float) -> bool:
        """Whether this one, which is a member, may be picked."""
        return (endpoint.healthy or self.in_panic()) and endpoint.breaker.allows(now)

    def _none(self, now: float, tried: tuple[Endpoint, ...], rnd: Rnd, key: int | None = None) -> Endpoint | None:
        return None

    def _again(
        self, endpoint: Endpoint | None, now: float, tried: tuple[Endpoint, ...], rnd: Rnd, key: int | None
    ) -> Endpoint | None:
        """The first answer of the balancer cannot be used."""
        if endpoint is None:
            return None
        panic: bool | None = None  # asked only where it decides, because it counts all endpoints
        for left in range(self.again, -1, -1):
            if endpoint not in tried and endpoint.breaker.allows(now):
                if endpoint.healthy:
                    return endpoint
                if panic is None:
                    panic = self.in_panic()
                if panic:
                    return self._picked(endpoint)
            if left:
                found = self.order(self.endpoints, key, now, rnd)
                if found is None:
                    return None
                endpoint = found
        return self._scan(now, tried, rnd, key)

    def _scan(self, now: float, tried: tuple[Endpoint, ...], rnd: Rnd, key: int | None) -> Endpoint | None:
        panic = self.in_panic()
        good = [e for e in self.endpoints if (e.healthy or panic) and e.breaker.allows(now)]
        if not good:
            return None
        fresh = [e for e in good if e not in tried] or good
        endpoint = fresh[0] if len(fresh) == 1 else self.order(fresh, key, now, rnd)
        return self._picked(endpoint) if endpoint is not None else None

    def _picked(self, endpoint: Endpoint) -> Endpoint:
        if not endpoint.healthy:
            self.counts.panic_picks += 1
        return endpoint


PickAt = Callable[..., Endpoint | None]
"""pick(now, tried, rnd, key=None): an endpoint, or None: then `Subset.why_none` has the word for it."""


def _lone_picker(endpoint: Endpoint, scan: PickAt) -> PickAt:
    def pick(now: float, tried: tuple[Endpoint, ...], rnd: Rnd, key: int | None = None) -> Endpoint | None:
        if endpoint.healthy and not endpoint.breaker.tripped:
            return endpoint  # tried or not: there is no other
        return scan(now, tried, rnd, key)

    return pick


def _picker(endpoints: tuple[Endpoint, ...], order: Order, again: Callable[..., Endpoint | None]) -> PickAt:
    """What every request of a service with several endpoints goes through: a closure, because it costs least."""

    def pick(now: float, tried: tuple[Endpoint, ...], rnd: Rnd, key: int | None = None) -> Endpoint | None:
        endpoint = order(endpoints, key, now, rnd)
        if endpoint and endpoint.healthy and not endpoint.breaker.tripped and (not tried or endpoint not in tried):
            return endpoint
        return again(endpoint, now, tried, rnd, key)

    return pick


class Counts:
    """What the subsets of one cluster share: numbers for the metrics, and `turn`, which grows whenever a breaker or the
    health of an endpoint changes."""

    __slots__ = ("panic_picks", "spilled_picks", "turn", "zone_picks")

    def __init__(self) -> None:
        self.panic_picks = 0  # of endpoints in bad health, because too few are in good health
        self.spilled_picks = 0  # of a worse priority
        self.zone_picks = 0  # kept in the own zone
        self.turn = 0


class _Level:
    """The endpoints of one priority."""

    __slots__ = ("all", "load", "local", "local_now")

    def __init__(self, everyone: Group, local: Group | None) -> None:
        self.all, self.local = everyone, local
        self.load = 0.0
        self.local_now = False


class Subset:
    """The endpoints that a destination may use. `panic_threshold` in percent; 0 turns panic off. `zone`: the own one,
    where it is to be preferred. `keyed`: the balancer goes by a key, so asking it again is vain and weights stand
    still."""

    __slots__ = (
        "_arrange",
        "_groups",
        "_keyed",
        "_levels",
        "_probes",
        "_round",
        "_seen",
        "_settled",
        "_warmup",
        "counts",
        "endpoints",
        "name",
        "pick",
    )

    def __init__(
        self,
        name: str,
        endpoints: tuple[Endpoint, ...],
        arrange: Arrange = arrange_by_chance,
        panic_threshold: float = 50.0,
        *,
        keyed: bool = False,
        zone: str = "",
        counts: Counts | None = None,
        warmup: Warmup | None = None,
    ) -> None:
        self.name = name
        self.endpoints = tuple([endpoint for endpoint in endpoints if endpoint.stated_weight > 0])
        self.counts = counts if counts is not None else Counts()
        self._arrange, self._keyed = arrange, keyed
        self._groups: list[Group] = []
        self._levels: list[_Level] = []
        self._probes: tuple[Endpoint, ...] = ()
        self._seen = -1
        self._warmup = warmup
        self._round = 0
        by_priority = _by_priority(self.endpoints)
        home = bool(zone) and _prefers(self.endpoints, zone)
        if len(by_priority) > 1 or home:
            for members in by_priority:
                local = tuple([e for e in members if e.zone == zone]) if home else ()
                narrower = _ZONE_MIN <= len(local) < len(members)
                everyone = self._group(members, panic_threshold)
                self._levels.append(_Level(everyone, self._group(local, 0.0) if narrower else None))
            self._settled: PickAt = self._by_level
        else:
            self._settled = self._group(self.endpoints, panic_threshold).pick
        self.pick: PickAt = self._settled
        if warmup is not None and warmup.since and not keyed and len(self.endpoints) > 1:
            self._round = warmup.round
            self.pick = self._warming

    def _group(self, endpoints: tuple[Endpoint, ...], panic_threshold: float) -> Group:
        group = Group(endpoints, self._arrange, panic_threshold, self.counts, self._keyed)
        self._groups.append(group)
        return group

    @property
    def panic_picks(self) -> int:
        return self.counts.panic_picks

    def why_none(self, now: float) -> str:
        """circuit_open: a usable endpoint was only open or being probed; else no_healthy_endpoint."""
        self._look()
        usable = any(e.healthy or group.in_panic() for group in self._whole() for e in group.endpoints)
        return "circuit_open" if usable else "no_healthy_endpoint"

    def in_panic(self) -> bool:
        """Whether so few endpoints are in good health that health is no longer asked; of one level at least."""
        self._look()
        return any(group.in_panic() for group in self._whole())

    def takes(self, endpoint: Endpoint, now: float) -> bool:
        """Whether this endpoint, which a cookie names, may have the attempt."""
        self._look()
        for group in self._whole():
            if endpoint in group.endpoints:
                return group.takes(endpoint, now)
        return False

    def instead(self, other: "Subset") -> "Subset | Aimed | None":
        """Where a request that found nobody here goes on; None: it has been there."""
        return other if other is not self else None

    def _whole(self) -> list[Group]:
        """Groups in which every endpoint stands once."""
        return [level.all for level in self._levels] or self._groups

    # -- slow start

    def _warming(self, now: float, tried: tuple[Endpoint, ...], rnd: Rnd, key: int | None = None) -> Endpoint | None:
        """As `_settled`, while weights are still moving."""
        warmup = self._warmup
        assert warmup is not None
        if now >= warmup.due:
            warmup.step(now)
        if self._round != warmup.round:
            self._round = warmup.round
            for group in self._groups:
                group.rearrange(self._arrange)
            if self._groups and not self._levels:
                self._settled = self._groups[0].pick
            if not warmup.since:
                self.pick = self._settled
        return self._settled(now, tried, rnd, key)

    # -- priorities and zones

    def _by_level(self, now: float, tried: tuple[Endpoint, ...], rnd: Rnd, key: int | None = None) -> Endpoint | None:
        self._look()
        for probe in self._probes:
            if probe.breaker.allows(now) and probe not in tried:
                return probe
        levels = self._levels
        chosen = 0
        if levels[0].load < 100.0:
            draw = rnd() * 100.0 if key is None else (key % _DRAWS) * 100.0 / _DRAWS
            for index, level in enumerate(levels):
                draw -= level.load
                if draw < 0.0:
                    chosen = index
                    break
        again: Endpoint | None = None  # tried already: only if there is nobody else
        for index in (chosen, *(other for other in range(len(levels)) if other != chosen)):
            level = levels[index]
            for group in (level.local, level.all) if level.local_now else (level.all,):
                assert group is not None
                endpoint = group.pick(now, tried, rnd, key)
                if endpoint is None:
                    continue
                if tried and endpoint in tried:
                    again = again or endpoint
                    continue
                if group is level.local:
                    self.counts.zone_picks += 1
                if index:
                    self.counts.spilled_picks += 1
                return endpoint
        return again

    def _look(self) -> None:
        """Divide the load anew if a breaker or somebody's health has changed."""
        if self._levels and self._seen != self.counts.turn:
            self._seen = self.counts.turn
            self._weigh()

    def _weigh(self) -> None:
        levels = self._levels
        usable, well = [], []
        for level in levels:
            members = level.all.endpoints
            usable.append((sum([_usable(e) for e in members]), len(members)))
            well.append((sum([e.healthy for e in members]), len(members)))
        # An open breaker takes a share from its level, but no more than a share: where all are open, health decides.
        shares = loads(usable if any(count for count, _ in usable) else well)
        threshold = levels[0].all.panic_threshold
        probes: list[Endpoint] = []
        for level, share, panic in zip(levels, shares, panics(well, threshold), strict=True):
            level.load = share
            level.all.panic = panic
            local = level.local
            level.local_now = (
                local is not None and not panic and sum([_usable(e) for e in local.endpoints]) >= _ZONE_MIN
            )
            if not share:  # or its breakers would never close again
                probes += [e for e in level.all.endpoints if e.healthy and e.breaker.tripped]
        self._probes = tuple(probes)


def _usable(endpoint: Endpoint) -> bool:
    return endpoint.healthy and not endpoint.breaker.tripped


def _prefers(endpoints: tuple[Endpoint, ...], zone: str) -> bool:
    """Whether there can be a choice between the own zone and others."""
    own = sum([endpoint.zone == zone for endpoint in endpoints])
    return _ZONE_MIN <= own < len(endpoints)


def _by_priority(endpoints: tuple[Endpoint, ...]) -> list[tuple[Endpoint, ...]]:
    """The endpoints of each priority, the best (0) first."""
    numbers = sorted({endpoint.priority for endpoint in endpoints})
    if len(numbers) < 2:
        return [endpoints]
    return [tuple([e for e in endpoints if e.priority == number]) for number in numbers]


class Aimed:
    """A Subset as one request sees it: with the key that a balancer goes by, or the endpoint that its cookie names."""

    __slots__ = ("endpoint", "endpoints", "key", "name", "subset")

    def __init__(self, subset: Subset, key: int | None = None, endpoint: Endpoint | None = None) -> None:
        self.subset, self.key, self.endpoint = subset, key, endpoint
        self.name, self.endpoints = subset.name, subset.endpoints

    def pick(self, now: float, tried: tuple[Endpoint, ...], rnd: Rnd) -> Endpoint | None:
        endpoint = self.endpoint
        if endpoint is not None and endpoint not in tried and self.subset.takes(endpoint, now):
            return endpoint
        return self.subset.pick(now, tried, rnd, self.key)

    def why_none(self, now: float) -> str:
        return self.subset.why_none(now)

    def instead(self, other: Subset) -> "Subset | Aimed | None":
        return Aimed(other, self.key) if other is not self.subset else None
