"""Figures of the demo: a sidecar's pages in, effective and actual success out."""

import pytest

from control_plane.demo.figures import DURATION, Counts, Endpoints, Sample, add_sidecar, difference, read_samples, rows

METRICS = """\
# HELP DURATION Duration of outbound requests.
pillion_retries_total{side="out",service="reviews",port="http"} 30.0
pillion_retries_total{side="in",service="web",port="http"} 5.0
DURATION_bucket{service="reviews",version="v1",le="0.005"} 50
DURATION_bucket{service="reviews",version="v1",le="0.01"} 70
DURATION_bucket{service="reviews",version="v1",le="+Inf"} 70
DURATION_count{service="reviews",version="v1",http_response_status_code="200",reason="ok"} 70
DURATION_count{service="reviews",version="v2",http_response_status_code="200",reason="ok"} 29
DURATION_count{service="reviews",version="v2",http_response_status_code="503",reason="ok"} 1
DURATION_count{service="ratings",http_response_status_code="403",reason="denied"} 4
DURATION_count{service="ratings",reason="caller_gone"} 1
""".replace("DURATION", DURATION)


def endpoint(service: str, version: str, good: int, bad: int, **more: object) -> dict[str, object]:
    known = {"side": "out", "service": service, "version": version, "successes": good, "failures": bad}
    return known | {"breaker": "closed"} | more


CLUSTERS = [
    endpoint("reviews", "v1", 70, 0),
    endpoint("reviews", "v2", 29, 31, breaker="open"),
    endpoint("web", "", 100, 0, side="in"),
]


@pytest.fixture
def sample() -> Sample:
    result = Sample(10.0)
    add_sidecar(result, "web", METRICS, CLUSTERS)
    return result


def test_effective_is_by_request_and_actual_by_attempt(sample: Sample) -> None:
    sick = sample.of("web", "reviews", "v2")
    assert (sick.effective, sick.actual) == (29 / 30, 29 / 60)
    total = sample.total("web", "reviews")
    assert (total.requests, total.effective, total.actual, total.retries) == (100, 0.99, 99 / 130, 30)


def test_what_no_service_answered_is_no_success_and_denials_are_counted(sample: Sample) -> None:
    ratings = sample.total("web", "ratings")
    assert (ratings.requests, ratings.good, ratings.denied, ratings.actual) == (5, 0, 4, None)


def test_the_serving_side_and_what_never_happened_are_left_out(sample: Sample) -> None:
    assert {service for _, service, _ in sample.calls} == {"reviews", "ratings"}


def test_instances_of_a_service_add_up(sample: Sample) -> None:
    add_sidecar(sample, "web", METRICS, [endpoint("reviews", "v2", 1, 1, breaker="half-open")])
    assert sample.of("web", "reviews", "v2").requests == 60
    assert sample.breakers["web", "reviews", "v2"] == "open"


def test_what_an_endpoint_counted_outlives_it() -> None:
    known = Endpoints()
    first, second = endpoint("reviews", "v1", 5, 1, endpoint="a:1"), endpoint("reviews", "v1", 7, 0, endpoint="b:1")

    def counted(*shown: dict[str, object]) -> tuple[int, int]:
        taken = known.take(shown)
        return sum(row["successes"] for row in taken), sum(row["failures"] for row in taken)

    assert counted(first, second) == (12, 1)
    assert counted(second) == (12, 1)  # the first has gone
    assert counted(second, {**first, "successes": 2, "failures": 0}) == (14, 1)  # and comes back, at 0
    assert counted(second) == (14, 1)
    assert {row["breaker"] for row in known.take([])} == {""}


def test_a_sidecar_that_is_gone_counts_but_has_no_breakers(sample: Sample) -> None:
    gone = Sample(1.0, {("web", "reviews", "v2"): Counts(requests=10, good=9)}, {("web", "reviews", "v2"): "half-open"})
    sample.breakers["web", "reviews", "v2"] = "closed"
    sample.add(gone, breakers=False)
    assert sample.of("web", "reviews", "v2").requests == 40
    assert sample.breakers["web", "reviews", "v2"] == "closed"
    sample.add(gone)
    assert sample.breakers["web", "reviews", "v2"] == "half-open"
    assert gone.of("web", "reviews", "v2").requests == 10


def test_a_difference_is_what_happened_between(sample: Sample) -> None:
    later = Sample(14.0)
    add_sidecar(later, "web", METRICS, CLUSTERS)
    later.calls["web", "reviews", "v1"] += Counts(requests=8, good=8, buckets={0.005: 8, float("inf"): 8})
    window = difference(later, sample)
    assert window.total("web", "reviews").requests == 8
    (all_, healthy, sick) = rows(window, [("web", "reviews")], {"reviews": ("v1", "v2")})
    assert (all_.version, all_.rate, all_.effective, all_.breaker) == ("all", 2.0, 1.0, "open")
    assert (healthy.rate, healthy.breaker) == (2.0, "closed")
    assert (sick.rate, sick.effective, sick.p50_s, sick.retries) == (0.0, None, None, 0.0)


def test_retries_of_a_version_are_its_further_attempts_after_bad_ones(sample: Sample) -> None:
    sample.calls["web", "reviews", "v1"].attempts_good += 3  # read a moment later than its requests
    window = difference(sample, Sample(0.0))
    (_, healthy, sick) = rows(window, [("web", "reviews")], {"reviews": ("v1", "v2")})
    assert (healthy.retries, sick.retries) == (0.0, 3.0)


@pytest.mark.parametrize(("share", "expected"), [(0.5, 0.0035), (0.7, 0.0049), (1.0, 0.01)])
def test_quantiles_are_interpolated(sample: Sample, share: float, expected: float) -> None:
    assert sample.of("web", "reviews", "v1").quantile_s(share) == pytest.approx(expected)


def test_a_quantile_beyond_the_last_bound_is_that_bound() -> None:
    assert Counts(buckets={10.0: 0, float("inf"): 4}).quantile_s(0.5) == 10.0
    assert Counts().quantile_s(0.5) is None


def test_labels_may_hold_anything() -> None:
    line = r'pillion_retries_total{service="a\"},b",side="out"} 2'
    assert list(read_samples(line)) == [("pillion_retries_total", {"service": r"a\"},b", "side": "out"}, 2.0)]
