"""The filter `rate-limit`: a token bucket or a sliding window for each caller, address or header value, or one for all.

A refusal says when to come back, in Retry-After (RFC 9110, 10.2.3) and in the fields RateLimit and RateLimit-Policy
(draft-ietf-httpapi-ratelimit-headers).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from sidecar.api import Filter, FilterContext, Headers, Limiter, Reply, Request

_CEILING_SLACK_S = 1e-6  # 6.0000000001 seconds are six


@dataclass(frozen=True)
class Settings:
    """`burst` None: as `requests`; a sliding window has none. `key`: none, caller, address or header:NAME. `algorithm`:
    token-bucket or sliding-window. `scope`: local or global (of this instance, or all of the service together)."""

    requests: int
    per_s: float = 1.0
    burst: int | None = None
    key: str = "none"
    algorithm: str = "token-bucket"
    scope: str = "local"

    def __post_init__(self) -> None:
        if self.requests < 1:
            raise ValueError("requests must be at least 1")
        if not 0.001 <= self.per_s <= 86_400.0:
            raise ValueError("per_s must be between 0.001 and 86400")
        if self.burst is not None and self.burst < 1:
            raise ValueError("burst must be at least 1")
        if self.algorithm not in ("token-bucket", "sliding-window"):
            raise ValueError(f'"{self.algorithm}" is not an algorithm: token-bucket or sliding-window')
        if self.scope not in ("local", "global"):
            raise ValueError(f'"{self.scope}" is not a scope: local or global')
        key_of(self.key)


def key_of(key: str) -> Callable[[Request], str]:
    """What of a request has a bucket of its own. Callers without an identity share one, and so do requests without the
    header; of a header sent twice all values make the key."""
    if key == "none":
        return lambda request: ""
    if key == "caller":
        return lambda request: request.caller
    if key == "address":
        return lambda request: request.address
    if key.startswith("header:"):
        name = key.removeprefix("header:")
        Headers([]).set(name, "")  # refuses what is no name
        return lambda request: "\n".join(request.headers.get_all(name))
    raise ValueError(f'"{key}" is not a key: none, caller, address or header:NAME')


class RateLimit(Filter):
    Config = Settings
    config: Settings
    _limiter: Limiter

    def __init__(self, config: Settings) -> None:
        super().__init__(config)
        self._key = key_of(config.key)
        self._burst = config.burst if config.burst is not None else config.requests
        # The draft counts the window in whole seconds and lets it be left out.
        window = f";w={config.per_s:.0f}" if config.per_s == int(config.per_s) else ""
        self._policy = f'"default";q={config.requests}{window}'

    async def open(self, context: FilterContext) -> None:
        await super().open(context)
        config = self.config
        self._limiter = context.limiter(config.requests, config.per_s, self._burst, config.algorithm, config.scope)

    def on_request(self, request: Request) -> Reply | None:
        verdict = self._limiter.take(self._key(request), self.context.clock())
        if verdict.allowed:
            return None
        wait_s = max(1, math.ceil(verdict.retry_after_s - _CEILING_SLACK_S))
        return Reply.refusal(
            request,
            429,
            "rate_limited",
            "too many requests; try again later",
            {
                "retry-after": str(wait_s),
                "ratelimit": f'"default";r={verdict.remaining};t={wait_s}',
                "ratelimit-policy": self._policy,
            },
        )
