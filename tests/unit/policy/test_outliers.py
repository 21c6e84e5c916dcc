"""Ejection of outliers in virtual time: each sentence of the rule with exact numbers."""

import math
import random
from collections.abc import Iterable, Sequence

import pytest

from sidecar.model.snapshot import CircuitBreaker, EndpointSpec, Limits, Outliers, Retry
from sidecar.policy.balancing import Subset
from sidecar.policy.cluster import Cluster
from sidecar.policy.endpoint import Endpoint
from sidecar.policy.outliers import Detector

BUILT_IN = Outliers()


class Bench:
    """A cluster of `count` endpoints whose intervals are played one after the other."""

    def __init__(self, count: int, policy: Outliers = BUILT_IN, **options: int) -> None:
        self.cluster = Cluster("reviews", "out", Limits(), Retry(), 0.0)
        self.told: list[tuple[str, str]] = []
        self.panics: list[str] = []
        self.cluster.outlier_events = lambda endpoint, text: self.told.append((endpoint.host, text))
        self.cluster.panic_events = self.panics.append
        self.now = 0.0
        self.specs = [EndpointSpec(f"e{number}", 80, **options) for number in range(count)]
        self.policy: Outliers | None = policy
        self.publish()

    def publish(self) -> None:
        """A new policy, or new endpoints."""
        self.cluster.update(self.specs, CircuitBreaker(), {}, "", "", now=self.now)
        self.cluster.eject_outliers(self.policy, self.now)
        self.cluster.judge_panic(50.0)

    @property
    def endpoints(self) -> list[Endpoint]:
        return list(self.cluster.endpoints.values())

    @property
    def detector(self) -> Detector:
        assert self.cluster.outliers is not None
        return self.cluster.outliers

    def serve(self, *rates: float, requests: int = 200) -> None:
        """So many requests to each endpoint, with this share of successes."""
        for endpoint, rate in zip(self.endpoints, rates, strict=False):
            good = round(rate * requests)
            endpoint.successes += good
            endpoint.failures += requests - good

    def go(self, until: float) -> None:
        """Whoever watches calls whenever something is due."""
        while self.cluster.outliers is not None and self.cluster.outliers.due <= until:
            self.now = self.cluster.outliers.due
            self.cluster.step(self.now)
        self.now = until

    def interval(self, *rates: float, requests: int = 200) -> list[str]:
        """One interval, and who is ejected at its end."""
        self.serve(*rates, requests=requests)
        self.go(self.now + (self.policy or BUILT_IN).interval_s)
        return self.ejected

    @property
    def ejected(self) -> list[str]:
        return [endpoint.host for endpoint in self.endpoints if endpoint.ejected]


def test_built_in_numbers() -> None:
    assert Outliers(1.9, 10.0, 30.0, 300.0, 50.0) == BUILT_IN


# -- who is an outlier


def test_below_mean_less_stdev_factor_population_deviations() -> None:
    """Of rates 0.5 and nine times 1.0 the mean is 0.95 and the deviation (population) 0.15: 0.95 - 1.9 x 0.15."""
    bench = Bench(10)
    assert bench.interval(0.5, *[1.0] * 9) == ["e0"]
    assert bench.told == [
        ("e0", "ejected: success rate 50.0% of 200 requests, mean 95.0%, threshold 66.5%; for 30s (1st time)")
    ]


def test_the_evidence_as_it_is_written() -> None:
    bench = Bench(6)
    bench.serve(1.0, 1.0, 1.0, 1.0, 1.0, 0.7)
    assert bench.interval() == ["e5"]
    mean, sigma = 5.7 / 6, math.sqrt((5 * 0.05**2 + 0.25**2) / 6)
    assert bench.told[0][1] == (
        f"ejected: success rate 70.0% of 200 requests, mean 95.0%, threshold {(mean - 1.9 * sigma) * 100:.1f}%; "
        "for 30s (1st time)"
    )


def test_the_sample_deviation_would_not_have_ejected() -> None:
    """Of five, one is 2 deviations (of the population) below, but 1.79 by the sample's deviation."""
    assert Bench(5).interval(0.5, *[1.0] * 4) == ["e0"]


@pytest.mark.parametrize(("factor", "ejected"), [(1.99, ["e0"]), (2.0, []), (2.01, [])])
def test_below_the_threshold_not_at_it(factor: float, ejected: list[str]) -> None:
    """One of n can be √(n - 1) deviations below the mean at most: of five exactly 2."""
    assert Bench(5, Outliers(stdev_factor=factor)).interval(0.5, *[1.0] * 4) == ejected


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 0.7, 0.999, 1.0])
def test_nobody_where_all_are_alike(rate: float) -> None:
    """Also where their mean is not exactly representable."""
    bench = Bench(7, Outliers(stdev_factor=0.0))
    assert bench.interval(*[rate] * 7, requests=1000) == []


def test_two_of_nine_that_fail_alike_hide_each_other_and_two_of_ten_do_not() -> None:
    """k of n alike are √((n - k)/k) deviations below: 1.87 and 2."""
    assert Bench(9).interval(0.5, 0.5, *[1.0] * 7) == []
    assert Bench(10).interval(0.5, 0.5, *[1.0] * 8) == ["e0", "e1"]


def test_nobody_is_judged_among_four() -> None:
    assert Bench(4, Outliers(stdev_factor=1.0)).interval(0.0, 1.0, 1.0, 1.0) == []
    assert Bench(5, Outliers(stdev_factor=1.0)).interval(0.0, 1.0, 1.0, 1.0, 1.0) == ["e0"]


@pytest.mark.parametrize(("requests", "ejected"), [(99, []), (100, ["e0"])])
def test_a_hundred_requests_in_the_interval(requests: int, ejected: list[str]) -> None:
    assert Bench(5).interval(0.5, *[1.0] * 4, requests=requests) == ejected


def test_who_has_fewer_is_neither_judged_nor_part_of_the_mean() -> None:
    """e5 fails wholly, but with 99 requests; the five others are judged among themselves."""
    bench = Bench(6)
    bench.serve(1.0, 1.0, 1.0, 1.0, 0.9)
    bench.endpoints[5].failures += 99
    assert bench.interval() == ["e4"]
    assert "mean 98.0%" in bench.told[0][1]


def test_each_interval_is_counted_by_itself() -> None:
    """99 requests of one interval and 99 of the next are not 198; a bad minute before is not held against it."""
    bench = Bench(6)
    assert bench.interval(0.0, *[1.0] * 5, requests=99) == []
    assert bench.interval(0.0, *[1.0] * 5, requests=99) == []
    assert bench.interval(*[1.0] * 6) == []


def test_429_counts_against_the_rate_as_for_the_breaker() -> None:
    bench = Bench(6)
    bench.serve(*[1.0] * 6, requests=100)
    bench.endpoints[2].throttled += 100
    assert bench.interval() == ["e2"]
    assert "success rate 50.0% of 200 requests" in bench.told[0][1]


# -- when


def test_judged_at_the_end_of_each_interval_and_not_before() -> None:
    bench = Bench(6)
    bench.serve(0.5, *[1.0] * 5)
    bench.go(9.999)
    assert bench.ejected == [] and bench.detector.due == 10.0
    bench.go(10.0)
    assert bench.ejected == ["e0"] and bench.detector.due == 20.0


def test_back_after_eject_for_without_any_traffic() -> None:
    bench = Bench(6)
    bench.interval(0.5, *[1.0] * 5)
    bench.go(39.999)
    assert bench.ejected == ["e0"] and not bench.endpoints[0].healthy and bench.cluster.ejected == 1
    bench.go(40.0)
    assert bench.ejected == [] and bench.endpoints[0].healthy and bench.cluster.ejected == 0
    assert bench.told[-1] == ("e0", "returned: its ejection is over (1st time)")


def test_back_between_two_intervals_it_is_counted_from_there() -> None:
    """What it answered while it was out, in panic or late, is not held against it."""
    bench = Bench(6, Outliers(eject_for_s=13.0))
    bench.interval(0.5, *[1.0] * 5)
    bench.endpoints[0].failures += 500
    bench.go(20.0)
    bench.go(22.999)
    assert bench.ejected == ["e0"]
    bench.go(23.0)
    assert bench.ejected == []
    bench.serve(*[1.0] * 6)
    bench.go(30.0)
    assert bench.ejected == []


def test_eject_for_times_the_number_of_ejections_up_to_the_most() -> None:
    bench = Bench(6, Outliers(max_eject_for_s=80.0))
    lasted = []
    for _ in range(5):
        assert bench.interval(0.5, *[1.0] * 5) == ["e0"]
        until = bench.detector.until(bench.endpoints[0])
        assert until is not None
        lasted.append(until - bench.now)
        bench.go(until)  # the end of an interval: the one that begins is the next to be judged
    assert lasted == [30.0, 60.0, 80.0, 80.0, 80.0]
    said = [text.partition("; ")[2] for _, text in bench.told if text.startswith("ejected")]
    assert said[:4] == ["for 30s (1st time)", "for 60s (2nd time)", "for 80s (3rd time)", "for 80s (3rd time)"]


def test_the_multiplier_falls_by_one_each_healthy_interval() -> None:
    bench = Bench(6)
    for _ in range(3):  # 30, 60, 90 s
        bench.interval(0.5, *[1.0] * 5)
        bench.go(bench.detector.until(bench.endpoints[0]) or math.nan)
    bench.interval(*[1.0] * 6)  # 3 - 1
    bench.interval(requests=0)  # 2 - 1: an interval without requests is healthy too
    bench.interval(0.5, *[1.0] * 5)
    assert bench.told[-1][1].endswith("for 60s (2nd time)")
    bench.go(bench.detector.until(bench.endpoints[0]) or math.nan)
    for _ in range(9):
        bench.interval(*[1.0] * 6)
    bench.interval(0.5, *[1.0] * 5)
    assert bench.told[-1][1].endswith("for 30s (1st time)")


def test_an_interval_of_which_it_missed_a_part_is_not_healthy() -> None:
    bench = Bench(6, Outliers(eject_for_s=15.0))
    bench.interval(0.5, *[1.0] * 5)  # to 25 s
    bench.go(30.0)
    bench.interval(0.5, *[1.0] * 5)
    assert bench.told[-1][1].endswith("for 30s (2nd time)")


def test_a_question_that_comes_late_begins_a_new_interval_there() -> None:
    bench = Bench(6)
    bench.serve(0.5, *[1.0] * 5)
    bench.cluster.step(47.0)
    assert bench.ejected == ["e0"] and bench.detector.due == 57.0
    assert bench.detector.until(bench.endpoints[0]) == 77.0


# -- how many


@pytest.mark.parametrize(
    ("endpoints", "percent", "most"),
    [
        *((count, 50.0, most) for count, most in ((0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (5, 2), (6, 3), (11, 5))),
        *((count, 10.0, most) for count, most in ((1, 0), (2, 1), (5, 1), (9, 1), (10, 1), (20, 2))),  # as Envoy
        *((count, 0.0, 0) for count in (1, 2, 100)),
        *((count, 100.0, count) for count in (1, 2, 7)),
        (100, 29.0, 29),
    ],
)  # fmt: skip
def test_at_most_max_ejected_and_at_least_one_of_two(endpoints: int, percent: float, most: int) -> None:
    assert Outliers(max_ejected=percent).ejected_max(endpoints) == most


def test_the_worst_goes_first_and_the_other_is_spared() -> None:
    bench = Bench(10, Outliers(stdev_factor=1.0, max_ejected=10.0))
    assert bench.interval(0.6, 0.5, *[1.0] * 8) == ["e1"]
    assert [host for host, _ in bench.told] == ["e1", "e0"]
    assert bench.told[1][1].startswith("spared: success rate 60.0% of 200 requests, mean 91.0%, threshold ")
    assert bench.told[1][1].endswith("; 1 of 10 are ejected (max_ejected 10%)")
    assert (bench.cluster.ejections, bench.cluster.ejections_capped) == (1, 1)


def test_those_that_are_ejected_already_count_and_are_not_part_of_the_mean() -> None:
    bench = Bench(6, Outliers(max_ejected=34.0))
    assert bench.interval(0.5, *[1.0] * 5) == ["e0"]
    assert bench.interval(0.0, 0.5, *[1.0] * 4) == ["e0", "e1"]
    assert "mean 90.0%" in bench.told[-1][1]
    assert bench.interval(0.0, 0.0, 0.5, *[1.0] * 3) == ["e0", "e1"]  # four are left to compare


def test_an_endpoint_of_weight_nought_is_none_of_those_that_count() -> None:
    bench = Bench(6, Outliers(max_ejected=30.0))
    bench.specs = [*bench.specs, *(EndpointSpec(f"z{number}", 80, weight=0) for number in range(10))]
    bench.publish()
    bench.serve(0.5, 0.4, *[1.0] * 4)
    bench.detector.policy = Outliers(stdev_factor=1.0, max_ejected=30.0)
    assert bench.interval() == ["e1"]


# -- what it means


def test_an_ejected_endpoint_is_not_picked_and_comes_back() -> None:
    bench = Bench(6)
    subset = Subset("", tuple(bench.endpoints), counts=bench.cluster.counts)
    draw = random.Random(1).random
    bench.interval(0.5, *[1.0] * 5)
    picked = {subset.pick(bench.now, (), draw) for _ in range(200)}
    assert picked == set(bench.endpoints[1:]) and subset.panic_picks == 0
    bench.go(40.0)
    assert {subset.pick(bench.now, (), draw) for _ in range(200)} == set(bench.endpoints)


def test_each_change_raises_the_turn() -> None:
    bench = Bench(6)
    turn = bench.cluster.counts.turn
    bench.interval(0.5, *[1.0] * 5)
    assert bench.cluster.counts.turn == turn + 1
    bench.go(40.0)
    assert bench.cluster.counts.turn == turn + 2


def test_ejection_may_bring_panic_and_its_end_ends_it() -> None:
    bench = Bench(6)
    bench.specs = [*bench.specs[:3], *(EndpointSpec(f"e{n}", 80, healthy=False) for n in (3, 4, 5))]
    bench.publish()
    subset = Subset("", tuple(bench.endpoints), counts=bench.cluster.counts)
    assert not bench.cluster.panic
    bench.interval(0.5, *[1.0] * 5)
    assert bench.cluster.panic and subset.in_panic()
    bench.go(40.0)
    assert not bench.cluster.panic and not subset.in_panic()
    assert bench.panics == [
        "panic: 2 of 6 endpoints are healthy (1 ejected), under 50%: health is not asked any more",
        "panic is over: 3 of 6 endpoints are healthy",
    ]


# -- another policy, other endpoints


def test_state_survives_a_swap_by_endpoint() -> None:
    bench = Bench(6)
    bench.interval(0.5, *[1.0] * 5)
    bench.policy = Outliers(stdev_factor=3.0, eject_for_s=5.0)
    bench.specs = [*bench.specs[:3], EndpointSpec("new", 80), EndpointSpec("e4", 80, weight=2)]
    bench.publish()
    assert bench.ejected == ["e0"] and bench.detector.until(bench.endpoints[0]) == 40.0
    assert not bench.endpoints[0].healthy
    bench.go(40.0)
    assert bench.ejected == []
    bench.policy, bench.specs = BUILT_IN, [EndpointSpec(f"e{n}", 80) for n in range(6)]
    bench.publish()
    bench.interval(0.5, *[1.0] * 5)
    assert bench.told[-1][1].endswith("for 60s (2nd time)")


def test_health_that_comes_and_goes_meanwhile_is_kept() -> None:
    bench = Bench(6)
    bench.interval(0.5, *[1.0] * 5)
    for healthy in (False, True, False):
        bench.specs[0] = EndpointSpec("e0", 80, healthy=healthy)
        bench.publish()
        assert not bench.endpoints[0].healthy and bench.endpoints[0].stated_healthy is healthy
    bench.go(40.0)
    assert bench.ejected == [] and not bench.endpoints[0].healthy


def test_turned_off_everybody_comes_back_at_once() -> None:
    bench = Bench(6)
    bench.interval(0.5, *[1.0] * 5)
    bench.policy = None
    bench.publish()
    assert bench.cluster.outliers is None and bench.endpoints[0].healthy and bench.ejected == []
    assert bench.told[-1] == ("e0", "returned: the policy ejects no outliers any more")
    assert bench.cluster.ejections == 1  # a counter never falls


def test_turned_on_nothing_that_was_before_counts() -> None:
    bench = Bench(6)
    bench.policy = None
    bench.publish()
    bench.serve(0.0, *[1.0] * 5, requests=10_000)
    bench.now, bench.policy = 100.0, BUILT_IN
    bench.publish()
    assert bench.detector.due == 110.0
    assert bench.interval(*[1.0] * 6) == []


@pytest.mark.parametrize(("interval_s", "due"), [(2.0, 4.0), (5.0, 5.0), (60.0, 60.0)])
def test_another_interval_holds_for_the_one_under_way(interval_s: float, due: float) -> None:
    bench = Bench(6)
    bench.now, bench.policy = 4.0, Outliers(interval_s=interval_s)
    bench.publish()
    assert bench.detector.due == due


def test_an_ejected_endpoint_that_leaves_is_forgotten() -> None:
    bench = Bench(6)
    bench.interval(0.5, *[1.0] * 5)
    bench.specs = bench.specs[1:]
    bench.publish()
    assert bench.cluster.ejected == 0 and bench.detector.due == 20.0
    bench.specs = [EndpointSpec("e0", 80), *bench.specs]
    bench.publish()
    assert bench.ejected == []


@pytest.mark.parametrize("seed", range(40))
def test_whatever_happens(seed: int) -> None:
    """Never more ejected by a judgement than allowed, never back too early or too late, health never lost."""
    draw = random.Random(seed)
    bench = Bench(
        draw.randint(2, 12), Outliers(draw.choice((0.5, 1.5, 1.9)), 10.0, 20.0, 70.0, draw.choice((0, 10, 50)))
    )
    for _ in range(40):
        policy = bench.policy
        before = bench.cluster.ejections
        bench.serve(
            *[draw.choice((1.0, 0.99, 0.9, 0.5, 0.0)) for _ in bench.specs], requests=draw.choice((50, 100, 300))
        )
        bench.go(bench.now + draw.choice((1.0, 7.0, 10.0, 33.0)))
        if policy is not None:
            most = policy.ejected_max(len(bench.specs))
            assert bench.cluster.ejections == before or bench.cluster.ejected <= most
            assert bench.detector.due > bench.now
            for endpoint in bench.endpoints:
                until = bench.detector.until(endpoint)
                assert endpoint.ejected is (until is not None)
                assert until is None or bench.now < until <= bench.now + 70.0
        for endpoint in bench.endpoints:
            assert endpoint.healthy is (endpoint.stated_healthy and not endpoint.ejected)
        event = draw.random()
        if event < 0.1:
            bench.policy = None if policy is not None else BUILT_IN
        elif event < 0.3:
            place = draw.randrange(len(bench.specs))
            bench.specs[place] = EndpointSpec(f"e{place}", 80, healthy=draw.random() < 0.5)
        if event < 0.3:
            bench.publish()


# -- what goes before what: docs/failure-detection.md, "The order"


def states(words: Iterable[str]) -> list[Endpoint]:
    """Endpoints from words: ok, sick (health), out (ejected), open (breaker), or several joined by +."""
    found = []
    for number, word in enumerate(words):
        endpoint = Endpoint(EndpointSpec(f"e{number}", 80, healthy="sick" not in word))
        if "out" in word:
            endpoint.eject()
        if "open" in word:
            for _ in range(7):
                endpoint.breaker.failure(endpoint.breaker.generation, 0.0, lambda: 0.0)
        found.append(endpoint)
    return found


INTERPLAY: list[tuple[str, list[int], bool, str]] = [
    ("ok ok ok ok", [0, 1, 2, 3], False, ""),
    ("ok ok ok sick", [0, 1, 2], False, ""),  # health
    ("ok ok ok out", [0, 1, 2], False, ""),  # ejection, the same
    ("ok ok ok open", [0, 1, 2], False, ""),  # breaker, the same
    ("ok ok sick out", [0, 1], False, ""),  # just not under 50 %
    ("ok sick sick out", [0, 1, 2, 3], True, ""),  # health and ejection count together
    ("ok out out out", [0, 1, 2, 3], True, ""),
    ("ok ok sick+out ok", [0, 1, 3], False, ""),  # who is both counts once
    ("ok open open open", [0], False, ""),  # open breakers bring no panic
    ("ok sick out+open sick", [0, 1, 3], True, ""),  # and hold in it
    ("open sick sick sick", [1, 2, 3], True, ""),
    ("open open sick sick", [], False, "circuit_open"),  # a usable one is only open
    ("open open open out", [], False, "circuit_open"),
    ("sick+open out+open sick+open out+open", [], True, "circuit_open"),  # in panic all of them count as usable
]


@pytest.mark.parametrize(("words", "picked", "panic", "why"), INTERPLAY, ids=[case[0] for case in INTERPLAY])
def test_interplay(words: str, picked: list[int], panic: bool, why: str) -> None:
    endpoints = states(words.split())
    subset = Subset("", tuple(endpoints))
    assert subset.in_panic() is panic
    draw = random.Random(1).random
    found = {subset.pick(0.5, (), draw) for _ in range(100)}
    assert {endpoints.index(each) for each in found if each is not None} == set(picked)
    for index, endpoint in enumerate(endpoints):  # what a sticky cookie asks
        assert subset.takes(endpoint, 0.5) is (index in picked)
    if not picked:
        assert found == {None} and subset.why_none(0.5) == why


def test_without_panic_nobody_is_left() -> None:
    subset = Subset("", tuple(states(["sick", "out", "sick", "out"])), panic_threshold=0.0)
    assert subset.pick(0.5, (), random.Random(1).random) is None
    assert subset.why_none(0.5) == "no_healthy_endpoint"


LEVELS: list[tuple[str, str, float, bool]] = [
    ("ok ok ok ok", "ok ok ok ok", 100.0, False),
    ("ok ok ok out", "ok ok ok ok", 100.0, False),  # 105 %
    ("ok ok out out", "ok ok ok ok", 70.0, False),
    ("ok sick out open", "ok ok ok ok", 35.0, False),
    ("out out out out", "ok ok ok ok", 0.0, False),  # no panic: the others carry all
    ("out out out ok", "out sick sick ok", 50.0, True),  # 35 + 35 < 100: both panic
]


@pytest.mark.parametrize(("first", "second", "load", "panic"), LEVELS)
def test_ejection_spills_over_as_bad_health_does(first: str, second: str, load: float, panic: bool) -> None:
    endpoints = states(f"{first} {second}".split())
    for endpoint in endpoints[4:]:
        endpoint.priority = 1
    subset = Subset("", tuple(endpoints))
    assert subset.in_panic() is panic
    draw = random.Random(1).random
    picked = [subset.pick(0.5, (), draw) for _ in range(4000)]
    share = sum(each is not None and each.priority == 0 for each in picked) / 40.0
    assert share == pytest.approx(load, abs=2.5)


def test_the_own_zone_is_left_where_ejection_leaves_one_of_it() -> None:
    def zones(words: Sequence[str]) -> Subset:
        endpoints = states(words)
        for endpoint in endpoints[:3]:
            endpoint.zone = "a"
        return Subset("", tuple(endpoints), zone="a")

    def hosts(subset: Subset) -> set[str]:
        draw = random.Random(1).random
        return {each.host for _ in range(100) if (each := subset.pick(0.5, (), draw)) is not None}

    assert hosts(zones(["ok", "ok", "out", "ok", "ok", "ok"])) == {"e0", "e1"}
    assert hosts(zones(["ok", "out", "out", "ok", "ok", "ok"])) == {"e0", "e3", "e4", "e5"}
