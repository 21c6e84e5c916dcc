"""Precedence: built-in < defaults < service < route < enforced; the closest wins, field by field.

Maps merge by key, scalars and lists replace, null restores the built-in, `{min, max}` under `enforced` clamps. Every
effective value carries its Origin. Must not know authorization, whose levels add up (rules.py). Invariant: an
Effective is never changed; what states nothing gives the very same object back.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import field, replace
from functools import wraps
from typing import Any, TypeVar

from .fields import BUDGET, OUTLIER_KEYS, SETTINGS, walk
from .forms import failures_and_statuses
from .kinds import RESET, Block, Clamp, Stated
from .records import record
from .rules import value_matches
from .snapshot import (
    CONCURRENCY_MAX,
    Balancing,
    Budget,
    CircuitBreaker,
    Concurrency,
    FilterUse,
    Health,
    Level,
    Limits,
    Origin,
    Outliers,
    Priority,
    RateLimit,
    Retry,
    Timeouts,
)
from .source import BUILT_IN
from .tables import Field, Table

T = TypeVar("T")

_HIDDEN = {
    "timeout.idle": ("timeout.idle_tcp", Timeouts().idle_tcp_s),
    "timeout.total": ("timeout.total_grpc", Timeouts().of_grpc_s),
}
"""Values that follow another, with a built-in of their own."""

_EJECTING = "outliers.stated"
"""Holds those of OUTLIER_KEYS that a level states and no closer one resets."""

LEAVES: Mapping[str, Field] = dict(walk(SETTINGS))


@record(frozen=True, slots=True)
class Effective:
    values: Mapping[str, Any]
    origins: Mapping[str, Origin]
    memo: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)


def once(make: Callable[[Effective], T]) -> Callable[[Effective], T]:
    """What `make` gives, made once for each Effective: where nothing is stated, services and routes share it."""

    @wraps(make)
    def shared(effective: Effective) -> T:
        memo = effective.memo
        if make not in memo:
            memo[make] = make(effective)
        found: T = memo[make]
        return found

    return shared


def _built_in(path: str, declared: Field) -> Origin:
    return Origin(declared.builtin_text or declared.kind.format(declared.builtin), Level.BUILT_IN, BUILT_IN)


BUILT_IN_SETTINGS = Effective(
    {path: declared.builtin for path, declared in LEAVES.items()} | dict(_HIDDEN.values()) | {_EJECTING: frozenset()},
    {path: _built_in(path, declared) for path, declared in LEAVES.items()},
)


def apply(below: Effective, level: Level, block: Block | None, table: Table) -> Effective:
    """What holds after one more level has spoken; `table` says which keys of the block count."""
    if block is None:
        return below
    stated = list(_leaves(block, table, ""))
    if not stated:
        return below
    values, origins = dict(below.values), dict(below.origins)
    for path, each in stated:
        before = origins[path]
        hidden, hidden_built_in = _HIDDEN.get(path, ("", None))
        value: Any
        if isinstance(each.value, Clamp):
            value = _clamped(each.value, values[path])
            if hidden:
                values[hidden] = _clamped(each.value, values[hidden])
            if value == values[path]:
                continue
        elif each.value is RESET:
            value = LEAVES[path].builtin if path != "retry.max" else 10 * values["retry.base"]
            if hidden:
                values[hidden] = hidden_built_in
        else:
            value = each.value
            if hidden:
                values[hidden] = value
        if path in OUTLIER_KEYS and not isinstance(each.value, Clamp):
            stated_keys: frozenset[str] = values[_EJECTING]
            values[_EJECTING] = stated_keys - {path} if each.value is RESET else stated_keys | {path}
        text = BUILT_IN_SETTINGS.origins[path].value if each.value is RESET else LEAVES[path].kind.format(value)
        values[path] = value
        origins[path] = Origin(text, level, each.key.source, (_alone(before), *before.overrode))
        if path == "retry.base" and origins["retry.max"].value == LEAVES["retry.max"].builtin_text:
            values["retry.max"] = 10 * value  # stated nowhere, it follows
    return Effective(values, origins)


def _alone(origin: Origin) -> Origin:
    return origin if not origin.overrode else Origin(origin.value, origin.level, origin.source)


def _clamped(clamp: Clamp, value: Any) -> Any:
    if value is None:
        return None  # nothing is stated that could be clamped
    if clamp.minimum is not None and value < clamp.minimum:
        return clamp.minimum
    if clamp.maximum is not None and value > clamp.maximum:
        return clamp.maximum
    return value


def _leaves(block: Block, table: Table, prefix: str) -> Iterator[tuple[str, Stated]]:
    for declared in table.fields:
        stated = block.fields.get(declared.key)
        if stated is None or declared.later:
            continue
        path = prefix + declared.key
        if not isinstance(declared.kind, Table):
            yield path, stated
        elif stated.value is RESET:
            for leaf, _ in walk(declared.kind, f"{path}."):
                yield leaf, stated
        else:
            yield from _leaves(stated.value, declared.kind, f"{path}.")


@once
def timeouts_of(effective: Effective) -> Timeouts:
    values = effective.values
    timeouts = Timeouts(
        total_s=values["timeout.total"],
        try_s=values["timeout.try"],
        idle_s=values["timeout.idle"],
        body_s=values["timeout.body"],
        connect_s=values["timeout.connect"],
        idle_tcp_s=values["timeout.idle_tcp"],
    )
    total_grpc_s: float = values["timeout.total_grpc"]
    return timeouts if timeouts.of_grpc_s == total_grpc_s else replace(timeouts, total_grpc_s=total_grpc_s)


@once
def retry_of(effective: Effective) -> Retry:
    values = effective.values
    failures, statuses, grpc = failures_and_statuses(values["retry.when"])
    methods = values["retry.methods"]
    return Retry(
        max_retries=values["retry.max_retries"],
        failures=failures,
        statuses=statuses,
        grpc=grpc,
        methods=None if methods is None else frozenset(methods),
        base_s=values["retry.base"],
        max_s=values["retry.max"],
        max_server_delay_s=values["retry.max_server_delay"],
        honour_retry_after=values["retry.honour_retry_after"],
        budget=Budget(**{each.key: values[f"retry.budget.{each.key}"] for each in BUDGET.fields}),
    )


def hedge_of(effective: Effective) -> float:
    after_s: float = effective.values["hedge.after"]
    return after_s


@once
def balancing_of(effective: Effective) -> Balancing:
    """`with` belongs to the `policy` that it was stated for: one of a weaker level says nothing to another balancer."""
    values, origins = effective.values, effective.origins
    order = list(Level)
    policy, config = origins["balance.policy"], origins["balance.with"]
    ours = order.index(config.level) >= order.index(policy.level)
    return Balancing(
        by=values["balance.by"],
        config=(values["balance.with"] or {}) if ours else {},
        zone=values["balance.zone"],
        slow_start_s=values["slow_start"],
        panic_threshold=values["outliers.panic_threshold"],
        source=policy.source,
    )


@once
def limits_of(effective: Effective) -> Limits:
    values = effective.values
    return Limits(values["limits.connections"], values["limits.pending"], values["limits.requests"])


@once
def circuit_breaker_of(effective: Effective) -> CircuitBreaker:
    values = effective.values
    return CircuitBreaker(
        consecutive_failures=values["circuit_breaker.consecutive_failures"],
        open_for_s=values["circuit_breaker.open_for"],
        max_open_s=values["circuit_breaker.max_open"],
        success_rate=values["circuit_breaker.success_rate"] or None,
    )


@once
def outliers_of(effective: Effective) -> Outliers | None:
    """None where no level states how they are ejected."""
    values = effective.values
    if not values[_EJECTING]:
        return None
    return Outliers(
        stdev_factor=values["outliers.stdev_factor"],
        interval_s=values["outliers.interval"],
        eject_for_s=values["outliers.eject_for"],
        max_eject_for_s=values["outliers.max_eject_for"],
        max_ejected=values["outliers.max_ejected"],
    )


@once
def provenance_of(effective: Effective) -> Mapping[str, Origin]:
    """Of everything; what does not act, because ejection is off, says so."""
    if effective.values[_EJECTING]:
        return effective.origins
    off = {path: replace(effective.origins[path], value="off") for path in OUTLIER_KEYS}
    return {**effective.origins, **off}


@once
def health_of(effective: Effective) -> Health | None:
    """Of several ways to check the one that the strongest level states; None where no level states anything."""
    values, origins = effective.values, effective.origins
    stated = [path for path in values if path.startswith("health.") and origins[path].level is not Level.BUILT_IN]
    if not stated:
        return None
    ways = [path for path in ("health.tcp", "health.grpc", "health.http") if values[path] not in (None, False)]
    order = list(Level)
    way = max(ways, key=lambda path: order.index(origins[path].level), default="")
    return Health(
        http=values[way] if way == "health.http" else None,
        grpc=values[way] if way == "health.grpc" else None,
        interval_s=values["health.interval"],
        timeout_s=values["health.timeout"],
        healthy=values["health.healthy"],
        unhealthy=values["health.unhealthy"],
    )


@once
def concurrency_of(effective: Effective) -> Concurrency | None:
    """None where no level turns it on. Its source is where that is done."""
    values, origins = effective.values, effective.origins
    adaptive, most = values["concurrency.adaptive"], values["concurrency.max"]
    if not adaptive and most is None:
        return None
    most = CONCURRENCY_MAX if most is None else most
    priorities = [
        Priority(
            name=block.get("class"),
            callers=None if block.get("from") is None else frozenset(ref.name for ref in block.get("from")),
            headers=value_matches(block.get("headers")),
        )
        for block in values["concurrency.priorities"]
        if block.get("class") is not None
    ]
    return Concurrency(
        adaptive=adaptive,
        least=min(values["concurrency.min"], most),
        most=most,
        queue=values["concurrency.queue"],
        queue_timeout_s=values["concurrency.queue_timeout"],
        priorities=tuple(priorities),
        source=origins["concurrency.adaptive" if adaptive else "concurrency.max"].source,
    )


@once
def rate_limit_of(effective: Effective) -> RateLimit | None:
    """Its source is where `requests` is stated: routes that inherit one limit share that place."""
    values = effective.values
    requests = values["rate_limit.requests"]
    if requests is None:
        return None
    key = values["rate_limit.key"]
    return RateLimit(
        requests=requests,
        per_s=values["rate_limit.per"],
        burst=requests if values["rate_limit.burst"] is None else values["rate_limit.burst"],
        key=None if key == "none" else key.lower(),
        source=effective.origins["rate_limit.requests"].source,
        algorithm=values["rate_limit.algorithm"],
        scope=values["rate_limit.scope"],
    )


@once
def filters_of(effective: Effective) -> tuple[FilterUse, ...]:
    return tuple(
        FilterUse(
            use=block.get("use"),
            config=block.get("with") or {},
            side=block.get("side") or "in",
            on_error=block.get("on_error"),
            source=block.node.source,
        )
        for block in effective.values["filters"]
        if block.get("use") is not None
    )
