"""`check_balancer`: a balancer is put through changing endpoints, loads and results, with chance from a seed.

It finds what types cannot say: settings that are ignored, picks that are no candidates, chance or time of its own, keys
that move when nothing has happened to their endpoint, shares far from what weights say, memory that grows with what has
gone. Every finding is an AssertionError that says where, and what to do.
"""

import gc
import inspect
import math
import random
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dis import get_instructions
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, get_args

from sidecar.api import BALANCER_HOOKS, AttemptResult, Balancer, ConfigError, Pick
from sidecar.model.snapshot import EndpointSpec
from sidecar.policy.endpoint import Endpoint

from .checking import _UNKNOWN_KEY, _watched

_SIZES = (1, 2, 3, 4, 10, 100)
_ALMOST_ONE = math.nextafter(1.0, 0.0)
_PICKS = 6_000
_IN_FLIGHT = 40
_GENERATIONS = 20
_GROWTH_MAX = 100  # objects


def make_endpoints(count: int, weights: Sequence[int] = (), *, first: int = 0, zone: str = "") -> list[Endpoint]:
    """Endpoints as a balancer sees them: idle, of weight 1 unless said otherwise, each with another key. `active` may
    be written."""
    return [
        Endpoint(EndpointSpec(f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}", 80, weight=weight, zone=zone))
        for n, weight in zip(range(first, first + count), (*weights, *[1] * (count - len(weights))), strict=True)
    ]


def check_balancer(
    cls: type[Balancer],
    config: Mapping[str, object] | None = None,
    *,
    spread: float | None = 0.5,
    moved_max: float = 0.1,
) -> None:
    """Raises AssertionError where the balancer breaks its contract. `spread`: how far from its fair share an endpoint
    may be, as a part of it; None, for one that means to prefer some. `moved_max`: of one that is `keyed`, what part of
    the keys of other endpoints may move when one leaves."""
    name = getattr(cls, "__name__", repr(cls))
    assert isinstance(cls, type) and issubclass(cls, Balancer), (
        f"{name} must be a class that derives from sidecar.api.Balancer"
    )
    for method in ("arrange", "pick", *BALANCER_HOOKS):
        assert not inspect.iscoroutinefunction(getattr(cls, method)), (
            f"{name}.{method} must be a plain function: a balancer never waits"
        )
    check = _Check(cls, dict(config or {}))
    check.settings_are_strict()
    with _watched(name, "a balancer does no I/O; what it needs to know comes by its hooks"):
        check.picks_are_candidates()
        check.chance_is_an_argument()
        check.any_result_may_come()
        if cls.keyed:
            check.hashes_are_stable()
            check.keys_stay(moved_max)
        if spread is not None:
            check.shares_are_fair(spread)
        check.memory_is_bounded()


class _Check:
    def __init__(self, cls: type[Balancer], config: dict[str, object]) -> None:
        self.cls, self.config, self.name = cls, config, cls.__name__

    def make(self) -> Balancer:
        return self.cls(self.cls.decode(self.config))

    def arranged(self, endpoints: tuple[Endpoint, ...]) -> Pick:
        try:
            return self.make().arrange(endpoints)
        except Exception as error:
            raise AssertionError(f"{self.name}.arrange raised {error!r} for {len(endpoints)} endpoints") from error

    def ask(self, pick: Pick, candidates: Sequence[Endpoint], key: int | None, now: float, rnd: Any) -> Endpoint:
        what = f"{len(candidates)} candidates and the key {key}"
        try:
            before = [(each.active, each.weight) for each in candidates]
            picked = pick(candidates, key, now, rnd)
        except Exception as error:
            raise AssertionError(f"{self.name}.pick raised {error!r} for {what}") from error
        assert before == [(each.active, each.weight) for each in candidates], (
            f"{self.name}.pick writes to endpoints: only `memo` is the balancer's own, the rest is for all to read"
        )
        assert picked is not None, f"{self.name}.pick gave None for {what}, all of them usable: nobody would serve"
        assert picked in candidates, (
            f"{self.name}.pick gave {picked!r} for {what}, and it is none of them: pick among `candidates`, which may "
            "be fewer than `arrange` was given"
        )
        assert isinstance(picked, Endpoint)
        return picked

    def key_of(self, rnd: random.Random) -> int | None:
        return rnd.getrandbits(64) if self.cls.keyed else None

    def settings_are_strict(self) -> None:
        try:
            self.cls.decode(self.config)
        except ConfigError as error:
            raise AssertionError(f"{self.name}.decode refuses the settings given to check_balancer: {error}") from error
        try:
            self.cls.decode({**self.config, _UNKNOWN_KEY: 1})
        except ConfigError:
            return
        except Exception as error:
            raise AssertionError(
                f"{self.name}.decode must raise ConfigError for an unknown key, not {error!r}"
            ) from error
        raise AssertionError(
            f"{self.name}.decode ignores unknown keys, so a misspelt setting would go unnoticed; state a Config"
        )

    def picks_are_candidates(self) -> None:
        chance = random.Random(1)
        self.arranged(())
        for size in _SIZES:
            endpoints = tuple(make_endpoints(size, [1 + n % 3 for n in range(size)]))
            pick = self.arranged(endpoints)
            for number in range(60):
                for endpoint in endpoints:
                    endpoint.active = chance.choice((0, 0, 1, 7))
                some = chance.sample(endpoints, chance.randint(1, size))
                for candidates in (endpoints, some, [endpoints[-1]]):
                    for key in (None, self.key_of(chance), 0, (1 << 64) - 1):
                        for rnd in (chance.random, lambda: 0.0, lambda: _ALMOST_ONE):
                            self.ask(pick, candidates, key, number / 10.0, rnd)

    def chance_is_an_argument(self) -> None:
        """The same seed gives the same picks."""
        runs = []
        for _ in range(2):
            chance = random.Random(2)
            endpoints = tuple(make_endpoints(7, (1, 2, 3)))
            pick = self.make().arrange(endpoints)
            runs.append([
                self.ask(pick, endpoints, self.key_of(chance), n / 10.0, chance.random).key for n in range(300)
            ])  # fmt: skip
        assert runs[0] == runs[1], (
            f"{self.name} picks otherwise when all is the same: use `rnd` and `now`, not chance and time of your own, "
            "and sidecar.api.stable_hash instead of hash()"
        )

    def any_result_may_come(self) -> None:
        balancer, now = self.make(), 0.0
        endpoints = tuple(make_endpoints(5))
        pick = balancer.arrange(endpoints)
        chance = random.Random(3)
        for result in get_args(AttemptResult):
            for latency_s in (0.0, 0.001, 5.0, 1e7):
                for endpoint in endpoints:
                    try:
                        balancer.began(endpoint, now)
                        balancer.ended(endpoint, result, latency_s, now + latency_s)
                        described = balancer.describe(endpoint, now + latency_s)
                    except Exception as error:
                        raise AssertionError(
                            f"{self.name} raised {error!r} for {result} after {latency_s} s"
                        ) from error
                    assert isinstance(described, Mapping) and all(
                        isinstance(value, int | float | str) for value in described.values()
                    ), f"{self.name}.describe must give a map of numbers and texts, not {described!r}"
                now += latency_s
                self.ask(pick, endpoints, self.key_of(chance), now, chance.random)

    def keys_stay(self, moved_max: float) -> None:
        chance = random.Random(4)
        keys = [chance.getrandbits(64) for _ in range(2_000)]
        endpoints = make_endpoints(10)
        before = self._homes(endpoints, keys)
        assert before == self._homes(endpoints, keys), f"{self.name} moves keys when nothing has changed"
        assert before == self._homes(endpoints[::-1], keys), (
            f"{self.name} moves keys when the same endpoints are told in another order; sort them by key"
        )
        gone = endpoints[3]
        after = self._homes([each for each in endpoints if each is not gone], keys)
        stayed = [key for key in keys if before[key] != gone.key]
        moved = sum(before[key] != after[key] for key in stayed) / len(stayed)
        assert moved <= moved_max, (
            f"{self.name} moves {moved:.0%} of the keys of other endpoints when one of ten leaves; at most "
            f"{moved_max:.0%} should: use a ring or a table, not a remainder"
        )
        twice = self._homes(endpoints, keys)
        assert twice == before, f"{self.name} does not give keys back to an endpoint that returns"

    def hashes_are_stable(self) -> None:
        """Python's own hash of texts is another one in every process, and this is only one."""
        functions = [
            each for kind in self.cls.__mro__ for each in vars(kind).values() if isinstance(each, FunctionType)
        ]
        codes = [each.__code__ for each in functions if each.__globals__.get("hash", hash) is hash]
        while codes:
            code = codes.pop()
            assert "hash" not in {each.argval for each in get_instructions(code) if each.opname == "LOAD_GLOBAL"}, (
                f"{self.name}.{code.co_name} uses hash(), which differs between processes: one key would have another "
                "home in each sidecar; use sidecar.api.stable_hash"
            )
            codes += [each for each in code.co_consts if isinstance(each, CodeType)]

    def _homes(self, endpoints: Sequence[Endpoint], keys: Sequence[int]) -> dict[int, str]:
        everyone = tuple(endpoints)
        pick = self.make().arrange(everyone)
        return {key: self.ask(pick, everyone, key, 0.0, lambda: 0.5).key for key in keys}

    def shares_are_fair(self, spread: float) -> None:
        for size, weights in ((2, ()), (5, ()), (10, ()), (3, (1, 1, 3))):
            shares = self._served(make_endpoints(size, weights))
            if weights:
                light, heavy = shares[0], shares[-1]
                assert heavy >= 1.5 * light, (
                    f"{self.name} sends {heavy} to weight 3, and {light} to weight 1: heed `weight`"
                )
                continue
            fair = _PICKS / size
            for share in shares:
                assert abs(share - fair) <= spread * fair, (
                    f"{self.name} sends {share} of {_PICKS} attempts to one of {size} equal endpoints, where "
                    f"{fair:.0f} were fair; if it means to, say check_balancer(..., spread=None)"
                )

    def _served(self, endpoints: Sequence[Endpoint]) -> list[int]:
        """Attempts by endpoint, under load: each takes as long as forty others take to begin."""
        chance = random.Random(5)
        balancer, everyone = self.make(), tuple(endpoints)
        pick = balancer.arrange(everyone)
        flying: deque[Endpoint] = deque()
        served: Counter[str] = Counter()
        for number in range(_PICKS):
            now = number / 1000.0
            endpoint = self.ask(pick, everyone, self.key_of(chance), now, chance.random)
            served[endpoint.key] += 1
            endpoint.active += 1
            balancer.began(endpoint, now)
            flying.append(endpoint)
            if len(flying) > _IN_FLIGHT:
                done = flying.popleft()
                balancer.ended(done, "success", _IN_FLIGHT / 1000.0, now)
                done.active -= 1
        return [served[endpoint.key] for endpoint in endpoints]

    def memory_is_bounded(self) -> None:
        """Endpoints come and go, and so do keys."""
        balancer, chance = self.make(), random.Random(6)
        sizes = []
        for generation in range(_GENERATIONS):
            endpoints = tuple(make_endpoints(3, first=generation * 3))
            pick = balancer.arrange(endpoints)
            for number in range(60):
                now = generation + number / 100.0
                endpoint = self.ask(pick, endpoints, self.key_of(chance), now, chance.random)
                balancer.began(endpoint, now)
                balancer.ended(endpoint, "success", 0.01, now)
            sizes.append(_reach([balancer, *vars(self.cls).values()]))
        growth = sizes[-1] - sizes[_GENERATIONS // 4]
        assert growth <= _GROWTH_MAX, (
            f"{self.name} held {growth} objects more after {_GENERATIONS} changes of endpoints than before: keep what "
            "is known of an endpoint in its `memo`, which goes with it"
        )


def _reach(roots: Sequence[object]) -> int:
    """How many objects can be reached from these, code left aside."""
    seen = set(map(id, roots))
    queue = list(roots)
    while queue:
        each = queue.pop()
        if isinstance(each, FunctionType):
            following: list[Any] = list(each.__closure__ or ())
        elif isinstance(each, MethodType):
            following = [each.__self__]
        else:
            following = gc.get_referents(each)
        for other in following:
            if id(other) not in seen and not isinstance(other, type | ModuleType):
                seen.add(id(other))
                queue.append(other)
    return len(seen)
