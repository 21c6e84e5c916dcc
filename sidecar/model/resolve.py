"""From the decoded documents of one policy to its services: merged, cross-checked, frozen.

Must not know files. Reports every problem it can; what it gives is only served where no error was reported.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .calls import build_calls
from .fields import DEFAULTS, ENFORCED, SERVICE_TABLE, SETTINGS
from .kinds import Block, Ref, Stated
from .merge import (
    BUILT_IN_SETTINGS,
    Effective,
    apply,
    circuit_breaker_of,
    limits_of,
    timeouts_of,
)
from .problems import Sink
from .routes import Frame, build_routes, check_backoff
from .rules import authz_level, check_callers
from .snapshot import (
    AuthzLevel,
    EndpointSpec,
    Level,
    PathHandling,
    Port,
    Protocol,
    Route,
    Service,
    Tls,
)
from .tables import Table
from .yaml_tree import Map

_ENFORCED_SETTINGS = Table("enforced", tuple(each for each in ENFORCED.fields if each.key in SETTINGS.by_key))
_CALLEE_ENFORCES = ("authz", "mtls", "rate_limit")


@dataclass(slots=True)
class Documents:
    """The files of one policy, put together."""

    services: dict[str, Stated] = field(default_factory=dict)
    defaults: Stated | None = None
    enforced: Stated | None = None


def resolve(documents: Documents, sink: Sink) -> dict[str, Service]:
    """Every service by name, sorted."""
    defaults = documents.defaults.value if documents.defaults is not None else None
    enforced = documents.enforced.value if documents.enforced is not None else None
    below = apply(BUILT_IN_SETTINGS, Level.DEFAULTS, defaults, SETTINGS)
    check_backoff(below, sink)
    check_callers(defaults, documents.services, sink)
    check_callers(enforced, documents.services, sink)
    shared = authz_level(Level.DEFAULTS, defaults, "defaults.")
    ceiling = authz_level(Level.ENFORCED, enforced, "enforced.")
    built = {
        name: _service(name, documents.services[name], documents, below, enforced, shared, ceiling, sink)
        for name in sorted(documents.services)
    }
    _check_fallbacks(documents, sink)
    services = {}
    ceilings: dict[str, Mapping[str, float]] = {}
    for name, service in built.items():
        stated = documents.services[name].value.get("calls") or {}
        calls = build_calls(name, stated, built, documents.services, ceilings, sink)
        services[name] = _with_calls(service, calls) if calls else service
    return services


def _with_calls(service: Service, calls: Mapping[str, Any]) -> Service:
    return replace(service, calls=calls)


def _service(
    name: str,
    stated: Stated,
    documents: Documents,
    below: Effective,
    enforced: Block | None,
    shared: AuthzLevel | None,
    ceiling: AuthzLevel | None,
    sink: Sink,
) -> Service:
    block: Block = stated.value
    effective = apply(below, Level.SERVICE, block, SETTINGS)
    own = authz_level(Level.SERVICE, block, f"services.{name}.")
    check_callers(block, documents.services, sink)
    versions: Mapping[str, Stated] = block.get("versions") or {}
    levels = tuple(level for level in (shared, own) if level is not None)
    frame = Frame(name, versions, documents.services, effective, enforced, levels, ceiling)
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
        limits=limits_of(final),
        circuit_breaker=circuit_breaker_of(final),
        timeouts=timeouts_of(final),
        authz=(*levels, ceiling) if ceiling is not None else levels,
        mtls=values["mtls"],
        pool_idle_s=values["pool.idle"],
        max_connection_age_s=values["max_connection_age"],
        owners=block.get("owners") or (),
        source=stated.key.source,
        provenance=final.origins,
    )


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
        host, port = each.get("at")
        at = each.fields["at"].node
        if (host, port) in seen:
            sink.error("P0116", f"the address {host}:{port} stands twice", at, f"first here: {seen[host, port]}")
        seen[host, port] = at.source
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


def _check_fallbacks(documents: Documents, sink: Sink) -> None:
    """Fallback services must not form a circle."""
    edges: dict[str, dict[str, Ref]] = {}
    for name, stated in documents.services.items():
        for route in stated.value.get("routes") or ():
            fallback = route.get("fallback")
            ref = fallback.get("service") if fallback is not None else None
            if ref is not None and ref.name != name:
                edges.setdefault(name, {})[ref.name] = ref
    done: set[str] = set()
    for start in sorted(edges):
        trail: dict[str, Iterator[str]] = {} if start in done else {start: iter(sorted(edges[start]))}
        while trail:
            name = next(reversed(trail))
            after = next(trail[name], None)
            if after is None:
                del trail[name]
                done.add(name)
            elif after in trail:
                names = list(trail)
                circle = " -> ".join([*names[names.index(after) :], after])
                sink.error("P0117", f"fallbacks in a circle: {circle}", edges[name][after].node)
            elif after not in done:
                trail[after] = iter(sorted(edges.get(after, ())))


assert {each.key for each in SETTINGS.fields} <= {each.key for each in DEFAULTS.fields} & {
    each.key for each in SERVICE_TABLE.fields
}
