"""Write a filter for pillion: the whole public contract.

    from sidecar.api import Filter

    class AddTenant(Filter):
        def on_request(self, request):
            request.headers.set("x-tenant", request.caller_service)

Test it with `sidecar.testing.check_filter`. Everything that is exported here is stable; nothing else is.
"""

from .config import ConfigError, decode
from .filters import (
    HOOKS,
    AsyncFilter,
    Counter,
    Filter,
    FilterBase,
    FilterContext,
    Limiter,
    LimitVerdict,
    overrides,
)
from .headers import HeaderError, Headers
from .message import REASONS, Connection, Reply, Request, RequestMessage, Response, ResponseMessage

__all__ = [
    "HOOKS",
    "REASONS",
    "AsyncFilter",
    "ConfigError",
    "Connection",
    "Counter",
    "Filter",
    "FilterBase",
    "FilterContext",
    "HeaderError",
    "Headers",
    "LimitVerdict",
    "Limiter",
    "Reply",
    "Request",
    "RequestMessage",
    "Response",
    "ResponseMessage",
    "decode",
    "overrides",
]
