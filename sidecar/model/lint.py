"""Warnings: what is valid and yet surely not meant.

Works on a whole Snapshot, by the provenance of its values. Only what is certain is warned of. Must not know files, nor
change anything. Of values that many routes inherit, one warning is given, at the place that states them.
"""

import math
from collections import Counter
from collections.abc import Collection, Set

from .fields import OUTLIER_KEYS
from .forms import GRPC_STATUSES
from .inert_hedges import inert_hedges
from .problems import Sink
from .snapshot import (
    NONE,
    OUTLIER_ENDPOINTS_MIN,
    AuthzLevel,
    Level,
    Match,
    Origin,
    Protocol,
    Route,
    Service,
    Snapshot,
    ValueMatch,
)
from .source import BUILT_IN, Source
from .words import BALANCERS, KEYED_BALANCERS

_SAFE = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE"})
SAFE_TO_MIRROR = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})  # RFC 9110, section 9.2.1
_ZONE_MIN = 2  # addresses of a zone that can be preferred
_COMPARED_MAX = 100  # of each path: what lies beyond is not warned of
_OWN = (Level.SERVICE, Level.ROUTE)


def lint(snapshot: Snapshot, sink: Sink, only: Collection[str] | None = None) -> None:
    """`only`: of these services; all are looked at."""
    wanted = snapshot.services.keys() if only is None else frozenset(only)
    for name in sorted(wanted & snapshot.services.keys()):
        service = snapshot.services[name]
        _shadowed(service, sink)
        for route in service.routes:
            _tries(route, sink)
            _unsafe_retries(route, sink)
            _grpc_retries(route, sink)
            _mirror(route, sink)
        _inert(service, sink)
    _inert_retries(snapshot, wanted, sink)
    _inert_bursts(snapshot, wanted, sink)
    inert_hedges(snapshot, wanted, sink)
    _retry_layers(snapshot, wanted, sink)


def _stated(*origins: Origin) -> Source:
    """The place nearest to the user: that of the strongest level."""
    return max(origins, key=lambda origin: list(Level).index(origin.level)).source


def _shadowed(service: Service, sink: Sink) -> None:
    """The earlier routes are filed by path, so that many routes cost little."""
    by_path: dict[str | None, list[Route]] = {}
    for route in service.routes:
        if route.source == service.source and route.name == "default":
            continue  # the catch-all that is always there
        shadow = next(
            (
                wide
                for key in _wider_paths(route.match)
                for wide in by_path.get(key, ())
                if covers(wide.match, route.match)
            ),
            None,
        )
        if shadow is not None:
            sink.warning(
                "P0301",
                f'the route "{route.name}" of `{service.name}` can never be reached',
                route.source,
                label=f'"{shadow.name}" takes all its requests ({shadow.source})',
                help="put it before that one, or remove it",
            )
        else:
            earlier = by_path.setdefault(route.match.path, [])
            if len(earlier) < _COMPARED_MAX:
                earlier.append(route)


def _wider_paths(match: Match) -> list[str | None]:
    """The patterns of an earlier route that may cover this one's path."""
    paths: list[str | None] = [None, "/**"]
    if match.path is not None:
        parts = match.path.split("/")
        paths += [match.path] + ["/".join(parts[:count]) + "/**" for count in range(2, len(parts) + 1)]
    return list(dict.fromkeys(paths))


def covers(wide: Match, narrow: Match) -> bool:
    """Whether every request that `narrow` matches is surely matched by `wide`; its path is one of `_wider_paths`."""
    if wide.path not in _wider_paths(narrow):
        return False
    if wide.path is not None and wide.path.endswith("/**") and narrow.path is not None:
        lead = wide.path.removesuffix("/**")
        if narrow.path != wide.path and "*" in lead:
            return False
    if wide.path_regex is not None and wide.path_regex != narrow.path_regex:
        return False
    for broad, tight in ((wide.methods, narrow.methods), (wide.callers, narrow.callers)):
        if broad is not None and (tight is None or not tight <= broad):
            return False
    return (
        _values_cover(wide.headers, narrow.headers)
        and _values_cover(wide.query, narrow.query)
        and _values_cover(wide.cookies, narrow.cookies)
    )


def _values_cover(wide: tuple[tuple[str, ValueMatch], ...], narrow: tuple[tuple[str, ValueMatch], ...]) -> bool:
    asked = dict(narrow)
    return all(name in asked and (value == asked[name] or value.kind == "present") for name, value in wide)


def _tries(route: Route, sink: Sink) -> None:
    timeouts, tries = route.timeouts, route.retry.max_retries + 1
    if tries == 1 or timeouts.try_s == NONE or timeouts.total_s == NONE or timeouts.try_s * tries <= timeouts.total_s:
        return
    one, total, retries = (route.provenance[key] for key in ("timeout.try", "timeout.total", "retry.max_retries"))
    if timeouts.try_s >= timeouts.total_s:
        message = f"`timeout.try` ({one.value}) leaves no time for a retry within `timeout.total` ({total.value})"
    else:
        message = f"{tries} tries of {one.value} may take longer than `timeout.total` ({total.value})"
    at = _stated(one, total, retries)
    others = [
        f"{key} {origin.value} ({origin.source})"
        for key, origin in (("try", one), ("total", total), ("max_retries", retries))
        if origin.source != at
    ]
    sink.warning("P0302", message, at, ", ".join(others), "shorten `try`, lengthen `total`, or retry less")


def _grpc_retries(route: Route, sink: Sink) -> None:
    """A call that got `unavailable` has in all likelihood not been served; of the others nobody knows."""
    named = {name for name, code in GRPC_STATUSES.items() if code in route.retry.grpc and name != "unavailable"}
    if named and route.retry.max_retries:
        sink.warning(
            "P0303",
            f"gRPC calls that may have had an effect are retried: {', '.join(sorted(named))}",
            route.provenance["retry.when"].source,
            help="name `unavailable` alone, unless every method of the route may be called twice",
        )


def _unsafe_retries(route: Route, sink: Sink) -> None:
    methods, hedged = route.retry.methods, route.hedge_after_s != NONE
    if methods is None or not (route.retry.max_retries or hedged):
        return
    asked = route.match.methods
    unsafe = methods - _SAFE if asked is None or "any" in methods else (methods & asked) - _SAFE
    if unsafe and not (asked is not None and asked <= _SAFE):
        origin = route.provenance["retry.methods"]
        what = "retried" if route.retry.max_retries else "hedged"
        sink.warning(
            "P0303",
            f"requests that are not safe to repeat are {what}: {', '.join(sorted(unsafe))}",
            origin.source,
            help="leave retry.methods out and let callers send an Idempotency-Key",
        )


def _mirror(route: Route, sink: Sink) -> None:
    """What is copied is done twice."""
    mirror, asked = route.mirror, route.match.methods
    if mirror is None:
        return
    safe_only = asked is not None and asked <= SAFE_TO_MIRROR
    if not mirror.percent:
        sink.warning("P0305", "`mirror` never acts: its share is 0%", mirror.source)
    elif mirror.writes and safe_only:
        sink.warning("P0305", "`mirror.writes` never acts: the route takes safe methods alone", mirror.source)
    elif mirror.writes:
        unsafe = "" if asked is None else f": {', '.join(sorted(asked - SAFE_TO_MIRROR))}"
        help = "safe where copies have a store of their own, or the service knows them by x-pillion-mirror"
        sink.warning("P0310", f"requests that may change something are mirrored{unsafe}", mirror.source, help=help)
    elif asked is not None and not asked & SAFE_TO_MIRROR:
        message = f"`mirror` never acts: {', '.join(sorted(asked))} may change something"
        sink.warning("P0305", message, mirror.source, help="say writes: true if they are to be copied all the same")


def _inert_retries(snapshot: Snapshot, wanted: Set[str], sink: Sink) -> None:
    """What is stated of retries and acts on no route at all."""
    acting: set[tuple[str, Source]] = set()
    inert: dict[tuple[str, Source], tuple[str, str]] = {}
    for service in snapshot.services.values():
        for route in service.routes:
            retry, origins = route.retry, route.provenance
            for key in ("when", "methods", "base", "max"):
                origin = origins[f"retry.{key}"]
                if retry.max_retries or (key == "methods" and route.hedge_after_s != NONE):
                    acting.add((key, origin.source))
                elif origin.level in _OWN and service.name in wanted:
                    why = _where(origins["retry.max_retries"])
                    inert[key, origin.source] = (f"`retry.{key}` never acts: max_retries is 0", why)
            if "timeout" in retry.failures:
                at = ("timeout", origins["retry.when"].source)
                if route.timeouts.try_s != NONE:
                    acting.add(at)
                elif retry.max_retries and service.name in wanted:
                    inert[at] = ("`timeout` in `retry.when` never acts: no `timeout.try` is set", "")
    for at, (message, label) in inert.items():
        if at not in acting:
            sink.warning("P0305", message, at[1], label)


def _inert_bursts(snapshot: Snapshot, wanted: Set[str], sink: Sink) -> None:
    """A burst that no token bucket at all goes by."""
    acting: set[Source] = set()
    inert: dict[Source, str] = {}
    for service in snapshot.services.values():
        for route in service.routes:
            burst = route.provenance["rate_limit.burst"]
            if route.rate_limit is None or burst.level is Level.BUILT_IN:
                continue
            if route.rate_limit.algorithm != "sliding-window":
                acting.add(burst.source)
            elif burst.level in _OWN and service.name in wanted:
                inert[burst.source] = _where(route.provenance["rate_limit.algorithm"])
    for source, label in inert.items():
        if source not in acting:
            message = "`rate_limit.burst` never acts: a sliding window has none"
            sink.warning("P0305", message, source, label, "remove it, or say algorithm: token-bucket")


def _where(origin: Origin) -> str:
    return "" if origin.source == BUILT_IN else f"stated at {origin.source}"


def _inert(service: Service, sink: Sink) -> None:
    origins = service.provenance
    limits, breaker = service.limits, service.circuit_breaker
    most = origins["limits.connections"]
    if limits.requests < limits.connections and most.level in _OWN:
        sink.warning(
            "P0305",
            f"`limits.connections` ({limits.connections}) can never be reached: `limits.requests` is {limits.requests}",
            most.source,
            _where(origins["limits.requests"]),
        )
    if breaker.max_open_s < breaker.open_for_s:
        first, longest = origins["circuit_breaker.open_for"], origins["circuit_breaker.max_open"]
        sink.warning(
            "P0305",
            f"`circuit_breaker.open_for` ({first.value}) never holds: `max_open` is {longest.value}",
            _stated(first, longest),
        )
    for name, labels in service.versions.items():
        if service.endpoints and not any(labels.items() <= each.labels.items() for each in service.endpoints):
            sink.warning(
                "P0305",
                f'no address of `{service.name}` carries the labels of the version "{name}"',
                service.source,
                help="add labels to an address; until then requests for the version are refused",
            )
    _inert_balancing(service, sink)
    _inert_outliers(service, sink)
    _inert_concurrency(service, sink)
    if service.ports and all(port.protocol is Protocol.TCP for port in service.ports):
        _tcp_only(service, sink)


def _inert_balancing(service: Service, sink: Sink) -> None:
    """What is stated of balancing and has nothing to choose, or nothing to choose by. Only of static addresses is it
    known how many there are."""
    origins, stated = service.provenance, service.balancing
    keyed, named = service.balance in KEYED_BALANCERS, service.balance in BALANCERS
    by, policy, warm = (origins[key] for key in ("balance.by", "balance.policy", "slow_start"))
    if stated.by is not None and named and not keyed and by.level in _OWN:
        message = f"`balance.by` never acts: {service.balance} goes by no key"
        sink.warning("P0305", message, by.source, _where(policy), f"for example policy: {min(KEYED_BALANCERS)}")
    if stated.slow_start_s and keyed and _stated(warm, policy) != BUILT_IN and {warm.level, policy.level} & set(_OWN):
        message = f"`slow_start` never acts on `{service.name}`: {service.balance} keeps keys where they are"
        sink.warning("P0305", message, _stated(warm, policy))
    addresses = [each for each in service.endpoints if each.weight]
    if len(addresses) == 1:
        for key, what in (("balance.policy", "chooses"), ("slow_start", "acts")):
            if origins[key].level in _OWN:
                message = f"`{key}` never {what}: `{service.name}` has one address"
                sink.warning("P0305", message, origins[key].source)
    zones = Counter(each.zone for each in addresses if each.zone)
    acts = any(_ZONE_MIN <= count < len(addresses) for count in zones.values())
    if zones and stated.zone == "prefer" and not acts:
        message = f"zones of `{service.name}` never act: a zone is preferred that has 2 addresses, and not all of them"
        sink.warning("P0305", message, service.source)
    if addresses and len({each.priority for each in addresses}) == 1 and addresses[0].priority:
        message = f"`priority` never acts: every address of `{service.name}` has {addresses[0].priority}"
        sink.warning("P0305", message, service.source)


def _inert_outliers(service: Service, sink: Sink) -> None:
    """Ejection that ejects nobody, or that panic takes back at once."""
    policy, origins = service.outliers, service.provenance
    if policy is None:
        return
    name = f"`outliers` of `{service.name}`"
    stated = [origins[key] for key in sorted(OUTLIER_KEYS)]
    factor, most, first, longest, panic = (
        origins[f"outliers.{key}"]
        for key in ("stdev_factor", "max_ejected", "eject_for", "max_eject_for", "panic_threshold")
    )
    own = [each for each in stated if each.level in _OWN]
    addresses = sum(1 for each in service.endpoints if each.weight)
    if not policy.max_ejected:
        if any(each is not most and each.level is most.level for each in stated):  # else it switches them off
            sink.warning("P0305", f"{name} never act: `max_ejected` is 0%", most.source)
    elif own and 0 < addresses < OUTLIER_ENDPOINTS_MIN:
        has = "one address" if addresses == 1 else f"{addresses} addresses"
        message = f"{name} never act: it has {has}, and fewer than {OUTLIER_ENDPOINTS_MIN} are not compared"
        sink.warning("P0305", message, _stated(*own), help="circuit_breaker.success_rate judges each by itself")
    elif own and addresses and policy.stdev_factor >= math.sqrt(addresses - 1):
        message = (
            f"{name} never act: of {addresses} endpoints none can be {policy.stdev_factor:g} standard deviations "
            "below the mean"
        )
        limit = math.floor(math.sqrt(addresses - 1) * 100) / 100
        sink.warning("P0305", message, _stated(factor, *own), help=f"a `stdev_factor` under {limit:g} can act")
    if policy.max_eject_for_s < policy.eject_for_s:
        message = f"`outliers.eject_for` ({first.value}) never holds: `max_eject_for` is {longest.value}"
        sink.warning("P0305", message, _stated(first, longest))
    if 100.0 - policy.max_ejected < service.balancing.panic_threshold:
        message = f"`outliers.max_ejected` ({most.value}) may bring panic, in which ejected endpoints serve again"
        help = f"`panic_threshold` is {panic.value}: lower one of the two, so that they add up to 100% at most"
        sink.warning("P0305", message, _stated(most, panic), help=help)


def _inert_concurrency(service: Service, sink: Sink) -> None:
    """What is stated of a limit that is off, and classes that take nothing."""
    policy, origins = service.concurrency, service.provenance
    stated = {key: origin for key, origin in origins.items() if key.startswith("concurrency.") and origin.level in _OWN}
    if not stated:
        return
    name = f"`concurrency` of `{service.name}`"
    if policy is None:
        off = origins["concurrency.adaptive"]
        if off not in stated.values():  # else it is switched off on purpose
            message = f"{name} never acts: neither `adaptive` nor `max` turns it on"
            sink.warning("P0305", message, _stated(*stated.values()), help="say adaptive: true")
        return
    if service.ports and all(port.protocol is Protocol.TCP for port in service.ports):
        sink.warning("P0305", f"{name} never acts: its ports speak TCP", _stated(*stated.values()))
    least, most = origins["concurrency.min"], origins["concurrency.max"]
    if not policy.adaptive and least in stated.values():
        sink.warning("P0305", "`concurrency.min` never acts: the limit is not adaptive", least.source)
    elif policy.adaptive and policy.least == policy.most:
        message = f"`concurrency.adaptive` never acts: `min` ({least.value}) leaves no room below `max` ({most.value})"
        sink.warning("P0305", message, _stated(least, most))
    classes = origins["concurrency.priorities"]
    seen: set[str] = set()
    for each in policy.priorities if classes in stated.values() else ():
        bare = each.callers is None and not each.headers
        if each.name in seen:
            sink.warning("P0305", f'the class "{each.name}" stands twice: they are shown as one', classes.source)
        elif bare and each.name != "default":
            message = f'the class "{each.name}" takes no request: it says neither `from` nor `headers`'
            sink.warning("P0305", message, classes.source, help="only `default` is what no other class takes")
        seen.add(each.name)


def _tcp_only(service: Service, sink: Sink) -> None:
    for route in service.routes:
        if route.source != service.source:
            sink.warning("P0305", f"routes never act on `{service.name}`: its ports speak TCP", route.source)
            break
    for level in service.authz:
        if level.level is Level.SERVICE:
            _tcp_rules(service, level, sink)


def _tcp_rules(service: Service, level: AuthzLevel, sink: Sink) -> None:
    for rule in level.allow or ():
        if rule.http_only:
            message = f"this rule never allows anything: the ports of `{service.name}` speak TCP"
            sink.warning("P0305", message, rule.source, help="allow by `from` alone")
    for rule in level.deny:
        if rule.http_only:
            message = f"this rule denies whatever its HTTP conditions: the ports of `{service.name}` speak TCP"
            sink.warning("P0305", message, rule.source, help="deny by `from` alone")


def _retry_layers(snapshot: Snapshot, wanted: Set[str], sink: Sink) -> None:
    """A calls B, B calls C, and both B and C are retried on purpose."""
    own: dict[str, Origin] = {}
    for service in snapshot.services.values():
        for route in service.routes:
            for key in ("retry.max_retries", "retry.when"):
                origin = route.provenance[key]
                if route.retry.max_retries and origin.level in _OWN:
                    own.setdefault(service.name, origin)
    callers = {call for service in snapshot.services.values() for call in service.calls}
    for service in snapshot.services.values():
        if service.name not in own or service.name not in callers:
            continue
        for name, call in service.calls.items():
            if name in own and call.max_retries != 0 and not wanted.isdisjoint((service.name, name)):
                sink.warning(
                    "P0306",
                    f"`{service.name}` and `{name}`, which it calls, are both retried",
                    own[name].source,
                    label=f"`{service.name}` is retried too ({own[service.name].source})",
                    help="retry at one hop of a call path; the tries multiply",
                )
