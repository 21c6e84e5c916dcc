"""Write a filter or a balancer for pillion: the whole public contract.

    from sidecar.api import Filter

    class AddTenant(Filter):
        def on_request(self, request):
            request.headers.set("x-tenant", request.caller_service)

    from sidecar.api import Balancer

    class First(Balancer):
        def pick(self, candidates, key, now, rnd):
            return min(candidates, key=lambda endpoint: endpoint.key)

Test them with `sidecar.testing.check_filter` and `check_balancer`. Everything that is exported here is stable; nothing
else is.
"""

from .balancers import (
    BALANCER_HOOKS,
    AttemptResult,
    Balancer,
    BoundedLoad,
    Endpoint,
    Pick,
    Rnd,
    stable_hash,
    weighted,
)
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
    "BALANCER_HOOKS",
    "HOOKS",
    "REASONS",
    "AsyncFilter",
    "AttemptResult",
    "Balancer",
    "BoundedLoad",
    "ConfigError",
    "Connection",
    "Counter",
    "Endpoint",
    "Filter",
    "FilterBase",
    "FilterContext",
    "HeaderError",
    "Headers",
    "LimitVerdict",
    "Limiter",
    "Pick",
    "Reply",
    "Request",
    "RequestMessage",
    "Response",
    "ResponseMessage",
    "Rnd",
    "decode",
    "overrides",
    "stable_hash",
    "weighted",
]
