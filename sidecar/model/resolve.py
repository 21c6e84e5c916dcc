"""From the decoded documents of one policy to its services: merged, cross-checked, frozen.

Must not know files. Reports every problem it can; what it gives is only served where no error was reported.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .calls import build_calls
from .fields import DEFAULTS, ENFORCED, SERVICE_TABLE, SETTINGS
from .kinds import Block, Ref, Stated
from .merge import (
    BUILT_IN_SETTINGS,
    Effective,
    apply,
    balancing_of,
    circuit_breaker_of,
    concurrency_of,
    health_of,
    limits_of,
    outliers_of,
    provenance_of,
    timeouts_of,
)
from .problems import Sink
from .records import record
from .routes import Frame, build_routes, check_backoff
from .rules import authz_level, check_callers, check_refs
from .snapshot import (
    AuthzLevel,
    Balancing,
    EndpointSpec,
    Health,
    Level,
    PathHandling,
    Port,
    Protocol,
    Route,
    Service,
    Tls,
)
from .tables import Table
from .words import KEYED_BALANCERS
from .yaml_tree import Map

_ENFORCED_SETTINGS = Table("enforced", tuple(each for each in ENFORCED.fields if each.key in SETTINGS.by_key))
_NO_LABELS: Mapping[str, str] = {}
_CALLEE_ENFORCES = ("authz", "mtls", "rate_limit", "health", "concurrency")
_SWITCHES = {"outliers": "interval: 10s", "concurrency": "adaptive: true", "rate_limit": "requests: 100"}


@dataclass(slots=True)
class Documents:
    """The files of one policy, put together."""

    services: dict[str, Stated] = field(default_factory=dict)
    defaults: Stated | None = None
    enforced: Stated | None = None


@record(frozen=True, slots=True)
class Levels:
    """What every service of a policy stands between: `defaults` below it, `enforced` above."""

    below: Effective
    enforced: Block | None
    shared: AuthzLevel | None
    ceiling: AuthzLevel | None


def resolve(documents: Documents, sink: Sink) -> dict[str, Service]:
    """Every service by name, sorted."""
    stated = documents.services
    levels = build_levels(documents.defaults, documents.enforced, stated, sink)
    built = {name: build_service(name, stated[name], stated, levels, sink) for name in sorted(stated)}
    for circle in fallback_circles({name: fallbacks_of(each) for name, each in stated.items()}):
        report_circle(circle, stated, sink)
    ceilings: dict[str, Mapping[str, float]] = {}
    return {name: add_calls(service, stated[name], built, stated, ceilings, sink) for name, service in built.items()}


def build_levels(defaults: Stated | None, enforced: Stated | None, services: Collection[str], sink: Sink) -> Levels:
    weakest = defaults.value if defaults is not None else None
    strongest = enforced.value if enforced is not None else None
    below = apply(BUILT_IN_SETTINGS, Level.DEFAULTS, weakest, SETTINGS)
    check_backoff(below, sink)
    for block in (weakest, strongest):
        check_callers(block, services, sink)
        _check_classes(block, services, sink)
        _check_health(block, sink)
        _check_switches(block, sink)
    shared = authz_level(Level.DEFAULTS, weakest, "defaults.")
    ceiling = authz_level(Level.ENFORCED, strongest, "enforced.")
    return Levels(below, strongest, shared, ceiling)


def add_calls(
    service: Service,
    stated: Stated,
    built: Mapping[str, Service],
    services: Mapping[str, Stated],
    ceilings: dict[str, Mapping[str, float]],
    sink: Sink,
) -> Service:
    """`built` holds at least the services that this one calls, still without calls of their own; `ceilings` is filled
    as they are met."""
    calls = build_calls(service.name, stated.value.get("calls") or {}, built, services, ceilings, sink)
    return replace(service, calls=calls) if calls else service


def build_service(name: str, stated: Stated, services: Mapping[str, Stated], levels: Levels, sink: Sink) -> Service:
    """One service, still without its calls. Of the others it asks for no more than their names, and the ports of those
    that it falls back to."""
    enforced, ceiling = levels.enforced, levels.ceiling
    block: Block = stated.value
    effective = apply(levels.below, Level.SERVICE, block, SETTINGS)
    own = authz_level(Level.SERVICE, block, f"services.{name}.")
    check_callers(block, services, sink)
    _check_classes(block, services, sink)
    _check_health(block, sink)
    _check_switches(block, sink)
    versions: Mapping[str, Stated] = block.get("versions") or {}
    rules = tuple(level for level in (levels.shared, own) if level is not None)
    frame = Frame(name, versions, services, effective, enforced, rules, ceiling)
    routes = build_routes(block.get("routes") or (), frame, stated.key.source, sink)
    final = apply(effective, Level.ENFORCED, enforced, _ENFORCED_SETTINGS)
    endpoints = _endpoints(block, sink)
    ports = _ports(block, sink)
    _check_enforcement(name, block, endpoints, sink)
    _check_paths(block, routes, sink)
    values = final.values
    return Service(
        name=name,
        ports=ports,
        endpoints=endpoints,
        versions={version: _labels(versions[version], sink) for version in sorted(versions)},
        routes=routes,
        balance=values["balance.policy"],
        balancing=_balancing(block, final, sink),
        limits=limits_of(final),
        circuit_breaker=circuit_breaker_of(final),
        outliers=outliers_of(final),
        concurrency=concurrency_of(final),
        timeouts=timeouts_of(final),
        authz=(*rules, ceiling) if ceiling is not None else rules,
        mtls=values["mtls"],
        pool_idle_s=values["pool.idle"],
        max_connection_age_s=values["max_connection_age"],
        health=_health(name, final, ports, sink),
        owners=block.get("owners") or (),
        source=stated.key.source,
        provenance=provenance_of(final),
    )


def _balancing(block: Block, effective: Effective, sink: Sink) -> Balancing:
    policy, stated = effective.values["balance.policy"], block.stated("balance")
    malformed = stated is not None and isinstance(stated.node, Map) and "by" in stated.node.entries
    if policy in KEYED_BALANCERS and effective.values["balance.by"] is None and not malformed:
        message = f"`balance.policy: {policy}` needs `by`"
        sink.error("P0109", message, effective.origins["balance.policy"].source, help="for example by: header:x-user")
    return balancing_of(effective)


def _labels(version: Stated, sink: Sink) -> Mapping[str, str]:
    stated = version.value.stated("labels")
    if stated is None:
        return {}
    if isinstance(stated.node, Map) and not stated.node.entries:
        help = 'for example labels: {version: "1"}'
        sink.error("P0109", "a version needs at least one label", stated.node, help=help)
    return _texts(stated.value)


def _texts(labels: Mapping[str, Stated]) -> dict[str, str]:
    return {name: labels[name].value for name in sorted(labels)}


def _ports(block: Block, sink: Sink) -> tuple[Port, ...]:
    stated: Mapping[str, Stated] = block.get("ports") or {}
    numbers: dict[int, str] = {}
    ports = []
    for name, each in stated.items():
        port: Block = each.value
        number = port.get("port")
        if number is None:
            continue
        if number in numbers:
            sink.error(
                "P0116",
                f"the ports `{numbers[number]}` and `{name}` have the same number",
                port.fields["port"].node,
                help="one number has one protocol and one name",
            )
        numbers[number] = name
        protocol = port.get("protocol") or Protocol.HTTP
        handling = port.stated("path_handling")
        if handling is not None and protocol is Protocol.TCP:
            sink.error("P0111", "`path_handling` on a port that speaks TCP", handling.key)
        ports.append(Port(name, number, protocol, port.get("path_handling")))
    return tuple(ports)


def _endpoints(block: Block, sink: Sink) -> tuple[EndpointSpec, ...]:
    usual = block.get("tls") or Tls.MESH
    stated = block.stated("tls")
    addresses: tuple[Block, ...] = block.get("address") or ()
    if stated is not None and not addresses:
        sink.warning("P0305", "`tls` on a service without `address` never acts", stated.key)
    endpoints = []
    seen: dict[tuple[str, int], Any] = {}
    for each in addresses:
        host, port = address = each.fields["at"].value
        at = each.fields["at"].node
        if address in seen:
            sink.error("P0116", f"the address {host}:{port} stands twice", at, f"first here: {seen[address]}")
        seen[address] = at.source
        if len(each.fields) == 1:  # most say no more, and there may be thousands
            endpoints.append(EndpointSpec(host, port, _NO_LABELS, 1, usual))
            continue
        tls = each.get("tls") or usual
        identity = each.stated("identity")
        if identity is not None and tls is not Tls.MESH:
            sink.error("P0111", f"`identity` goes with tls: mesh, not with {tls.value}", identity.key)
        weight = each.get("weight")
        endpoints.append(
            EndpointSpec(
                host=host,
                port=port,
                labels=_texts(each.get("labels") or {}),
                weight=1 if weight is None else weight,
                tls=tls,
                identity=each.get("identity"),
                zone=each.get("zone") or "",
                priority=each.get("priority") or 0,
            )
        )
    return tuple(endpoints)


def _check_enforcement(name: str, block: Block, endpoints: tuple[EndpointSpec, ...], sink: Sink) -> None:
    """The callee's sidecar enforces these: where there is none, a rule would be a promise that nobody keeps."""
    outside = [each for each in endpoints if each.tls is not Tls.MESH]
    if not outside:
        return
    for holder in (block, *(block.get("routes") or ())):
        for key in _CALLEE_ENFORCES:
            stated = holder.stated(key)
            if stated is None:
                continue
            if len(outside) == len(endpoints):
                sink.error(
                    "P0112",
                    f"nothing would enforce `{key}`: no endpoint of `{name}` has a sidecar",
                    stated.key,
                    label=f"every address is tls: {outside[0].tls.value}",
                    help=f"remove `{key}`, or put a sidecar there and say tls: mesh",
                )
            else:
                where = f"{outside[0].host}:{outside[0].port}"
                sink.warning("P0309", f"`{key}` is not enforced at {where}, which has no sidecar", stated.key)
        filters = holder.stated("filters")
        if filters is not None and len(outside) == len(endpoints):
            for each in filters.value:
                if (each.get("side") or "in") == "in":
                    message = f"nothing would run this filter: no endpoint of `{name}` has a sidecar"
                    sink.error("P0112", message, each.node, help="with side: out the caller's sidecar runs it")


def _check_classes(block: Block | None, services: Collection[str], sink: Sink) -> None:
    concurrency = block.get("concurrency") if block is not None else None
    for each in (concurrency.get("priorities") or ()) if concurrency is not None else ():
        check_refs(each.get("from") or (), services, sink)


def _check_switches(block: Block | None, sink: Sink) -> None:
    """What is off until one of its keys is stated, and none is."""
    for key, example in _SWITCHES.items():
        stated = block.stated(key) if block is not None else None
        if stated is not None and isinstance(stated.node, Map) and not stated.node.entries:
            message = f"`{key}: {{}}` says nothing: one of its keys switches it on"
            sink.warning("P0305", message, stated.key, help=f"for example {key}: {{{example}}}")


def _check_health(block: Block | None, sink: Sink) -> None:
    """One level says one way to check."""
    health = block.get("health") if block is not None else None
    if health is None:
        return
    ways = [(key, stated) for key in ("http", "grpc", "tcp") if (stated := health.stated(key)) is not None]
    ways = [(key, stated) for key, stated in ways if stated.value is not False]
    if len(ways) > 1:
        message = f"`health` says both `{ways[0][0]}` and `{ways[1][0]}`"
        sink.error("P0111", message, ways[1][1].key, help="remove one of them")


def _health(name: str, effective: Effective, ports: tuple[Port, ...], sink: Sink) -> Health | None:
    """A check by HTTP/1.1 needs a port that speaks it."""
    health = health_of(effective)
    if health is None or health.http is None or not ports or any(port.protocol is Protocol.HTTP for port in ports):
        return health
    sink.warning(
        "P0305",
        f"`health.http` never acts on `{name}`: none of its ports has protocol: http",
        effective.origins["health.http"].source,
        help="check by grpc, or by tcp, as is done now",
    )
    return replace(health, http=None)


def _check_paths(block: Block, routes: tuple[Route, ...], sink: Sink) -> None:
    """Paths that are passed on as they came cannot be judged."""
    levels = {id(level): level for route in routes for level in route.authz}.values()
    rules = (rule for level in levels for rule in (*(level.allow or ()), *level.deny))
    rule = next((rule for rule in rules if rule.paths is not None), None)
    by_path = any(r.match.path not in (None, "/**") or r.match.path_regex is not None for r in routes)
    own = next((level for r in routes for level in r.authz if level.level is Level.ROUTE), None) if by_path else None
    if rule is not None:
        label = f"{rule.name} has paths ({rule.source})"
    elif own is not None:
        label = f"routes that match by path have authorization of their own ({own.source})"
    else:
        return
    for port in (block.get("ports") or {}).values():
        handling = port.value.stated("path_handling")
        if handling is not None and handling.value is PathHandling.OPAQUE:
            sink.error(
                "P0111",
                "`path_handling: opaque` together with authorization by path",
                handling.node,
                label=label,
                help="use path_handling: strict, or rules without paths",
            )


def fallbacks_of(stated: Stated) -> dict[str, Ref]:
    """The other services that a service falls back to, each with a place that says so."""
    refs: dict[str, Ref] = {}
    for route in stated.value.get("routes") or ():
        fallback = route.get("fallback")
        ref = fallback.get("service") if fallback is not None else None
        if ref is not None:
            refs[ref.name] = ref
    return refs


def mirrors_of(stated: Stated) -> frozenset[str]:
    """The other services that a service's routes mirror to."""
    blocks = [route.get("mirror") for route in stated.value.get("routes") or ()]
    refs = [block.get("service") for block in blocks if block is not None]
    return frozenset(ref.name for ref in refs if ref is not None)


def fallback_circles(edges: Mapping[str, Collection[str]]) -> Iterator[list[str]]:
    """Services that fall back to each other in a circle, each circle once: its names in order. A service that falls
    back to itself is reported elsewhere."""
    done: set[str] = set()
    for start in sorted(name for name, after in edges.items() if after):
        trail: dict[str, Iterator[str]] = {} if start in done else {start: iter(sorted(edges[start]))}
        while trail:
            name = next(reversed(trail))
            after = next(trail[name], None)
            if after is None:
                del trail[name]
                done.add(name)
            elif after in trail:
                names = list(trail)
                if after != name:
                    yield names[names.index(after) :]
            elif after not in done:
                trail[after] = iter(sorted(edges.get(after, ())))


def report_circle(circle: list[str], services: Mapping[str, Stated], sink: Sink) -> None:
    refs = fallbacks_of(services[circle[-1]])
    message = f"fallbacks in a circle: {' -> '.join([*circle, circle[0]])}"
    sink.error("P0117", message, refs[circle[0]].node)


assert {each.key for each in SETTINGS.fields} <= {each.key for each in DEFAULTS.fields} & {
    each.key for each in SERVICE_TABLE.fields
}
