"""The filters `fault-delay` and `fault-abort`: they disturb a share of requests on purpose.

Two, because only the delay must wait: an abort alone costs no task.
"""

from dataclasses import dataclass

from sidecar.api import AsyncFilter, Filter, Reply, Request

_DELAY_S_MAX = 3600.0


@dataclass(frozen=True)
class DelaySettings:
    delay_s: float
    percent: float = 100.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.delay_s <= _DELAY_S_MAX:
            raise ValueError(f"delay_s must be between 0 and {_DELAY_S_MAX:.0f}")
        _check_percent(self.percent)


@dataclass(frozen=True)
class AbortSettings:
    status: int
    percent: float = 100.0

    def __post_init__(self) -> None:
        Reply(self.status)  # refuses what is no status
        _check_percent(self.percent)


class FaultDelay(AsyncFilter):
    Config = DelaySettings
    side = "both"
    config: DelaySettings

    def __init__(self, config: DelaySettings) -> None:
        super().__init__(config)
        self.timeout_s = config.delay_s + 1.0

    async def on_request(self, request: Request) -> None:
        if self.context.random() * 100.0 < self.config.percent:
            await self.context.sleep(self.config.delay_s)


class FaultAbort(Filter):
    Config = AbortSettings
    side = "both"
    config: AbortSettings

    def on_request(self, request: Request) -> Reply | None:
        if self.context.random() * 100.0 < self.config.percent:
            return Reply.refusal(request, self.config.status, "fault_injected", "this fault was injected by policy")
        return None


def _check_percent(percent: float) -> None:
    if not 0.0 <= percent <= 100.0:
        raise ValueError("percent must be between 0 and 100")
