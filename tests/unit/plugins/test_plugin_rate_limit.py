"""The filter `rate-limit`: exact numbers and the fields of its refusals."""

import json

import pytest

from sidecar.api import ConfigError, Reply, Request
from sidecar.plugins.rate_limit import RateLimit
from sidecar.testing import check_filter, make_context, make_request


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def opened(clock: Clock, **config: object) -> RateLimit:
    filter_ = RateLimit(RateLimit.decode(config))
    await filter_.open(make_context(clock=clock))
    return filter_


def refused(filter_: RateLimit, request: Request) -> Reply:
    reply = filter_.on_request(request)
    assert reply is not None
    return reply


def test_it_keeps_the_contract() -> None:
    check_filter(RateLimit, {"requests": 1})
    check_filter(RateLimit, {"requests": 1, "per_s": 0.5, "burst": 3, "key": "header:x-tenant"})


async def test_a_refusal_says_when_to_come_back() -> None:
    filter_ = await opened(Clock(), requests=2, per_s=60.0)
    assert filter_.on_request(make_request()) is None
    assert filter_.on_request(make_request()) is None
    reply = refused(filter_, make_request(request_id="r7"))
    assert (reply.status, reply.reason) == (429, "rate_limited")
    assert reply.headers == (
        (b"retry-after", b"30"),
        (b"ratelimit", b'"default";r=0;t=30'),
        (b"ratelimit-policy", b'"default";q=2;w=60'),
        (b"content-type", b"application/json"),
    )
    assert json.loads(reply.body)["request_id"] == "r7"


async def test_who_waits_as_told_is_admitted() -> None:
    clock = Clock()
    filter_ = await opened(clock, requests=3, per_s=10.0, burst=1)
    assert filter_.on_request(make_request()) is None
    wait_s = int(dict(refused(filter_, make_request()).headers)[b"retry-after"])
    assert wait_s == 4
    clock.now = float(wait_s)
    assert filter_.on_request(make_request()) is None


async def test_burst_is_how_many_may_come_at_once() -> None:
    filter_ = await opened(Clock(), requests=100, burst=5)
    assert [filter_.on_request(make_request()) is None for _ in range(6)] == [True] * 5 + [False]
    assert dict(refused(filter_, make_request()).headers)[b"retry-after"] == b"1"


async def test_a_window_that_is_no_whole_second_is_left_out() -> None:
    filter_ = await opened(Clock(), requests=1, per_s=0.5)
    assert filter_.on_request(make_request()) is None
    assert dict(refused(filter_, make_request()).headers)[b"ratelimit-policy"] == b'"default";q=1'


@pytest.mark.parametrize(
    ("key", "one", "other"),
    [
        ("caller", {"caller": "spiffe://m/service/web"}, {"caller": "spiffe://m/service/admin"}),
        ("address", {"address": "10.0.0.1"}, {"address": "10.0.0.2"}),
        ("header:X-Tenant", {"headers": {"x-tenant": "a"}}, {"headers": {"x-tenant": "b"}}),
        ("header:x-tenant", {}, {"headers": [("x-tenant", "a"), ("x-tenant", "b")]}),
    ],
)
async def test_each_key_has_its_own_bucket(key: str, one: dict[str, object], other: dict[str, object]) -> None:
    filter_ = await opened(Clock(), requests=1, per_s=60.0, key=key)
    assert filter_.on_request(make_request(**one)) is None  # type: ignore[arg-type]
    assert filter_.on_request(make_request(**one)) is not None  # type: ignore[arg-type]
    assert filter_.on_request(make_request(**other)) is None  # type: ignore[arg-type]


async def test_a_sliding_window_says_exactly_when_to_come_back() -> None:
    clock = Clock()
    filter_ = await opened(clock, requests=3, per_s=10.0, algorithm="sliding-window", scope="global")
    clock.now = 4.0
    assert [filter_.on_request(make_request()) is None for _ in range(4)] == [True, True, True, False]
    # 6 s to the next window, of which 3 * (1 - x / 10) + 1 <= 3 from x = 3 1/3 on: 9 1/3, in whole seconds 10
    assert refused(filter_, make_request()).headers[:3] == (
        (b"retry-after", b"10"),
        (b"ratelimit", b'"default";r=0;t=10'),
        (b"ratelimit-policy", b'"default";q=3;w=10'),
    )
    clock.now = 13.3
    assert filter_.on_request(make_request()) is not None
    clock.now = 13.4
    assert filter_.on_request(make_request()) is None


async def test_without_a_key_all_share_one_bucket() -> None:
    filter_ = await opened(Clock(), requests=1, per_s=60.0)
    assert filter_.on_request(make_request(caller="spiffe://m/a")) is None
    assert filter_.on_request(make_request(caller="spiffe://m/b")) is not None


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"requests": 0}, "requests must be at least 1"),
        ({"requests": 1, "burst": 0}, "burst must be at least 1"),
        ({"requests": 1, "per_s": 0}, "per_s must be between"),
        ({"requests": 1, "algorithm": "leaky"}, "token-bucket or sliding-window"),
        ({"requests": 1, "scope": "mesh"}, "local or global"),
        ({"requests": 1, "key": "ip"}, "none, caller, address or header:NAME"),
        ({"requests": 1, "key": "header:a b"}, "not a header name"),
    ],
)
def test_impossible_limits_are_refused(config: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        RateLimit.decode(config)
