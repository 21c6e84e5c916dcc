"""The life of a filter, and the hooks that it may override.

    decode(config) → __init__(settings) → open(context) → hooks … → aclose()

Must not know the proxy: what a filter may use of it is handed over in a FilterContext. Invariant: a hook that a class
does not override is never called, so it costs nothing (`overrides`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any, ClassVar, Literal, Protocol

from .config import decode, nothing
from .message import Connection, Reply, Request, Response

HOOKS = ("on_connection", "on_request", "on_request_data", "on_response", "on_response_data")


class Counter(Protocol):
    """A number in the sidecar's metrics that only grows."""

    def inc(self, n: int = 1) -> None: ...


class LimitVerdict(Protocol):
    """`remaining`: how many more would be allowed at once. `retry_after_s`: 0 where allowed. `reset_s`: until nothing
    is used up."""

    @property
    def allowed(self) -> bool: ...
    @property
    def remaining(self) -> int: ...
    @property
    def retry_after_s(self) -> float: ...
    @property
    def reset_s(self) -> float: ...


class Limiter(Protocol):
    """A token bucket, or a sliding window, for each key."""

    def take(self, key: str, now: float) -> LimitVerdict: ...


@dataclass(frozen=True, slots=True)
class FilterContext:
    """What a filter may use of the sidecar. Time and chance come from here, so that tests decide both.

    - `service`, `side`: for which service the filter works, and whether on requests that arrive ("in") or leave ("out")
    - `clock()`: seconds, monotonic; `random()`: a number in [0, 1)
    - `log(level, text)`: level is debug, info, warning or error; never blocks
    - `counter(name, help)`: a counter of the sidecar's metrics, shown as pillion_filter_NAME_total
    - `limiter(requests, per_s, burst)`: token buckets by key, bounded in memory; further arguments are `algorithm`
      (token-bucket or sliding-window) and `scope` (local, or global: of all instances of the service together)
    - `sleep(seconds)`: for asynchronous filters; cancelled when the request ends
    """

    service: str
    side: str
    clock: Callable[[], float]
    random: Callable[[], float]
    log: Callable[[str, str], None]
    counter: Callable[[str, str], Counter]
    limiter: Callable[..., Limiter]
    sleep: Callable[[float], Any]


class FilterBase:
    """What synchronous and asynchronous filters share. Subclass Filter or AsyncFilter, not this."""

    Config: ClassVar[type | None] = None
    """A dataclass with this filter's settings; None: it takes none."""

    side: ClassVar[Literal["in", "out", "both"]] = "in"
    """Where it may be used: on requests that arrive at its service, on those that leave for it, or both."""

    on_error: ClassVar[Literal["closed", "open"]] = "closed"
    """When a hook raises: "closed" answers 500, "open" goes on as if the filter were not there. Policy may override."""

    budget_s: ClassVar[float] = 0.001
    """A synchronous hook that takes longer is counted and named in the log: it holds up all traffic."""

    context: FilterContext

    def __init__(self, config: Any = None) -> None:
        """`config` is what `decode` gave. No I/O here: it may be made only to check a policy. What can fail belongs
        into `open`."""
        self.config = config

    @classmethod
    def decode(cls, config: Mapping[str, object]) -> Any:
        """Settings from the policy's `with`. Raises ConfigError. Override it for more than a dataclass can say."""
        if cls.Config is None:
            return nothing(config)
        assert is_dataclass(cls.Config), f"{cls.__name__}.Config must be a dataclass"
        return decode(cls.Config, config)

    async def open(self, context: FilterContext) -> None:
        """Before the first request. May wait: for a file, a connection. If it raises, the policy is refused and
        `aclose` is called. Call `super().open(context)` where you override it."""
        self.context = context

    async def aclose(self) -> None:
        """After the last request; also after an `open` that failed half-way. Must not raise."""

    def on_connection(self, connection: Connection) -> str | None:
        """A connection was accepted. None goes on; a text closes it, and is logged."""
        return None

    def on_request_data(self, request: Request, data: bytes, end: bool) -> bytes:
        """A piece of the request's body, as it passes; what is returned goes on in its place. `end` is True exactly
        once, with the last piece (which may be empty). A retry sends again what was returned."""
        return data

    def on_response_data(self, request: Request, data: bytes, end: bool) -> bytes:
        """A piece of the response's body; as `on_request_data`."""
        return data


class Filter(FilterBase):
    """A filter whose hooks never wait. Override any of the hooks; each must return within `budget_s`."""

    def on_request(self, request: Request) -> Reply | None:
        """The request's head is here, routed and allowed. None goes on; a Reply is the answer, and later filters and
        the application are not asked. Called once for a request, also where it is retried."""
        return None

    def on_response(self, request: Request, response: Response) -> Reply | None:
        """The response's head is here. None goes on; a Reply takes its place. Filters are asked in reverse order."""
        return None


class AsyncFilter(FilterBase):
    """A filter that must wait, for another service perhaps. Each call costs a task; prefer Filter where it will do.

    Runs in Trio. When the caller goes away the hook is cancelled; do not swallow `trio.Cancelled`.
    """

    timeout_s: float = 1.0
    """A hook that takes longer has failed: see `on_error`."""

    async def on_request(self, request: Request) -> Reply | None:
        """As Filter.on_request."""
        return None

    async def on_response(self, request: Request, response: Response) -> Reply | None:
        """As Filter.on_response."""
        return None


def overrides(cls: type[FilterBase], hook: str) -> bool:
    """Whether the class does something of its own in this hook."""
    if hook not in HOOKS:
        raise ValueError(f"{hook!r} is not a hook; hooks are {', '.join(HOOKS)}")
    base = AsyncFilter if issubclass(cls, AsyncFilter) else Filter
    return getattr(cls, hook) is not getattr(base, hook)
