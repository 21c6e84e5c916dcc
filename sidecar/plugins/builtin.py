"""The built-in filters and balancers by name, and what a route says of limits, faults and headers as uses of filters.

So the built-ins go through the same contract as everybody's. Must not know how filters are made. Invariant: equal
routes give equal uses; routes that inherit one rate limit give the same use, and so may share its buckets.
"""

from sidecar.model.snapshot import FilterUse, HeaderEdit, RateLimit, Route

BUILT_INS = {
    "fault-abort": "sidecar.plugins.fault:FaultAbort",
    "fault-delay": "sidecar.plugins.fault:FaultDelay",
    "headers": "sidecar.plugins.headers:HeaderEdit",
    "rate-limit": "sidecar.plugins.rate_limit:RateLimit",
}
BUILT_IN_BALANCERS = {
    "least-request": "sidecar.plugins.least_request:LeastRequest",
    "maglev": "sidecar.plugins.maglev:Maglev",
    "peak-ewma": "sidecar.plugins.peak_ewma:PeakEwma",
    "random": "sidecar.plugins.random_choice:RandomChoice",
    "ring-hash": "sidecar.plugins.ring_hash:RingHash",
    "round-robin": "sidecar.plugins.round_robin:RoundRobin",
}


def uses(route: Route, side: str) -> tuple[FilterUse, ...]:
    """Every filter of this route on this side ("in": beside the service, "out": beside its caller), in order."""
    before = _inbound(route) if side == "in" else _outbound(route)
    return (*before, *(use for use in route.filters if use.side == side))


def _inbound(route: Route) -> list[FilterUse]:
    return [_rate_limit(route.rate_limit)] if route.rate_limit is not None else []


def _outbound(route: Route) -> list[FilterUse]:
    found: list[FilterUse] = []
    fault = route.fault
    if fault is not None and fault.delay_s > 0.0 and fault.delay_percent > 0.0:
        config: dict[str, object] = {"delay_s": fault.delay_s, "percent": fault.delay_percent}
        found.append(FilterUse("fault-delay", config, "out", source=fault.source))
    if fault is not None and fault.abort_status is not None and fault.abort_percent > 0.0:
        config = {"status": fault.abort_status, "percent": fault.abort_percent}
        found.append(FilterUse("fault-abort", config, "out", source=fault.source))
    if route.request_headers or route.response_headers:
        config = {"request": _edit(route.request_headers), "response": _edit(route.response_headers)}
        found.append(FilterUse("headers", config, "out", source=route.source))
    return found


def _rate_limit(limit: RateLimit) -> FilterUse:
    config: dict[str, object] = {
        "requests": limit.requests,
        "per_s": limit.per_s,
        "burst": limit.burst,
        "key": limit.key or "none",
        "algorithm": limit.algorithm,
        "scope": limit.scope,
    }
    return FilterUse("rate-limit", config, "in", source=limit.source)


def _edit(edit: HeaderEdit) -> dict[str, object]:
    return {"set": dict(edit.set), "add": dict(edit.add), "remove": list(edit.remove)}
