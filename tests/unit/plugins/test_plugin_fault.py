"""The filters `fault-delay` and `fault-abort`: shares by chance that the test decides, waits in virtual time."""

import json

import pytest
import trio
import trio.testing

from sidecar.api import ConfigError
from sidecar.plugins.fault import FaultAbort, FaultDelay
from sidecar.testing import check_filter, make_context, make_request


def test_they_keep_the_contract() -> None:
    check_filter(FaultDelay, {"delay_s": 30, "percent": 50.5})
    check_filter(FaultAbort, {"status": 503})


@pytest.mark.parametrize(("chance", "waited_s"), [(0.0, 2.0), (0.4999, 2.0), (0.5, 0.0), (0.99, 0.0)])
async def test_the_delay_takes_its_share(
    chance: float, waited_s: float, autojump_clock: trio.testing.MockClock
) -> None:
    filter_ = FaultDelay(FaultDelay.decode({"delay_s": 2, "percent": 50}))
    await filter_.open(make_context(random=lambda: chance))
    begun = trio.current_time()
    await filter_.on_request(make_request())
    assert trio.current_time() - begun == waited_s


def test_a_long_delay_is_within_its_own_time_limit() -> None:
    assert FaultDelay(FaultDelay.decode({"delay_s": 60})).timeout_s == 61.0


@pytest.mark.parametrize(("chance", "aborted"), [(0.0, True), (0.0999, True), (0.1, False)])
async def test_the_abort_takes_its_share(chance: float, aborted: bool) -> None:
    filter_ = FaultAbort(FaultAbort.decode({"status": 503, "percent": 10}))
    await filter_.open(make_context(random=lambda: chance))
    reply = filter_.on_request(make_request(request_id="r"))
    assert (reply is not None) is aborted
    if reply is not None:
        assert (reply.status, reply.reason) == (503, "fault_injected")
        assert json.loads(reply.body)["request_id"] == "r"


@pytest.mark.parametrize("percent", [-1, 100.5])
def test_shares_are_percentages(percent: float) -> None:
    for cls, config in ((FaultDelay, {"delay_s": 1}), (FaultAbort, {"status": 500})):
        with pytest.raises(ConfigError, match="between 0 and 100"):
            cls.decode({**config, "percent": percent})


def test_impossible_faults_are_refused() -> None:
    with pytest.raises(ConfigError, match="not a final HTTP status"):
        FaultAbort.decode({"status": 99})
    with pytest.raises(ConfigError, match="delay_s must be between"):
        FaultDelay.decode({"delay_s": -1})
