"""One route of a service: from its decoded block to a frozen Route, with every cross-check inside the route.

Must not know files or other services' content, but their names. Reports to the sink and still gives a route where it
can, so that all problems show at once.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from .fields import ENFORCED, ROUTE, ROUTE_SETTINGS
from .kinds import Block, Ref, Stated
from .merge import LEAVES, Effective, apply, filters_of, hedge_of, once, rate_limit_of, retry_of, timeouts_of
from .problems import Sink, clip
from .records import record
from .rules import authz_level, check_callers, check_refs, value_matches
from .snapshot import (
    AuthzLevel,
    Destination,
    Fallback,
    Fault,
    HeaderEdit,
    Level,
    Match,
    Mirror,
    Origin,
    Protocol,
    RateLimit,
    Redirect,
    Respond,
    Retry,
    Rewrite,
    Route,
    Sticky,
    Timeouts,
)
from .source import Source
from .tables import Table
from .yaml_tree import Map

_ROUTE_ONLY = ("to", "fault", "sticky", "fallback", "mirror", "rewrite", "redirect", "respond", "headers", "upgrade")
_ROUTE_PATHS = tuple(path for path in LEAVES if path.partition(".")[0] in ROUTE_SETTINGS.by_key)
_ENFORCED_ROUTE = Table("enforced", tuple(each for each in ENFORCED.fields if each.key in ROUTE_SETTINGS.by_key))


@record(frozen=True, slots=True)
class Frame:
    """What a route stands in: its service and the levels above and below it."""

    service: str
    versions: Mapping[str, Stated]
    services: Mapping[str, Stated]
    below: Effective  # built-in, defaults, service
    enforced: Block | None
    levels: tuple[AuthzLevel, ...]  # defaults, service
    ceiling: AuthzLevel | None  # enforced


@record(frozen=True, slots=True)
class _Settings:
    timeouts: Timeouts
    retry: Retry
    hedge_after_s: float
    rate_limit: RateLimit | None
    filters: tuple[Any, ...]
    origins: Mapping[str, Origin]


def build_routes(stated: Sequence[Block], frame: Frame, source: Source, sink: Sink) -> tuple[Route, ...]:
    """The routes in order, ending with a catch-all."""
    common = _settings(frame.below, frame, sink)
    routes: list[Route] = []
    names: dict[str, Source] = {}
    for index, block in enumerate(stated):
        name = block.get("name") or f"route-{index + 1}"
        at = block.stated("name")
        if name in names:
            sink.error(
                "P0116",
                f'the route name "{clip(name)}" is used twice',
                at.node if at else block.node,
                label=f"first here: {names[name]}",
            )
        names[name] = at.node.source if at else block.node.source
        route = _route(name, block, frame, common, sink)
        if name == "default" and route.match != Match():
            sink.error("P0116", 'the name "default" belongs to the route that matches everything',
                       at.node if at else block.node, help="choose another name")  # fmt: skip
        routes.append(route)
    if not routes or routes[-1].match != Match():
        levels = (*frame.levels, frame.ceiling) if frame.ceiling else frame.levels
        routes.append(_plain_route("default", common, levels, source))
    return tuple(routes)


def _plain_route(name: str, settings: _Settings, authz: tuple[AuthzLevel, ...], source: Source) -> Route:
    return Route(
        name=name,
        timeouts=settings.timeouts,
        retry=settings.retry,
        hedge_after_s=settings.hedge_after_s,
        authz=authz,
        rate_limit=settings.rate_limit,
        filters=settings.filters,
        source=source,
        provenance=settings.origins,
    )


def _settings(below: Effective, frame: Frame, sink: Sink) -> _Settings:
    effective = apply(below, Level.ENFORCED, frame.enforced, _ENFORCED_ROUTE)
    check_settings(effective, sink)
    return _Settings(
        timeouts_of(effective),
        retry_of(effective),
        hedge_of(effective),
        rate_limit_of(effective),
        filters_of(effective),
        _route_origins(effective),
    )


@once
def _route_origins(effective: Effective) -> Mapping[str, Origin]:
    return {path: effective.origins[path] for path in _ROUTE_PATHS}


def check_settings(effective: Effective, sink: Sink) -> None:
    """What the values of several keys say of each other, after merging."""
    check_backoff(effective, sink)
    if effective.values["rate_limit.requests"] is not None:
        return
    precedence = list(Level).index
    known = precedence(effective.origins["rate_limit.requests"].level)  # where null may have switched it off
    for path in ("rate_limit.per", "rate_limit.burst", "rate_limit.key", "rate_limit.algorithm", "rate_limit.scope"):
        origin = effective.origins[path]
        if origin.level in (Level.SERVICE, Level.ROUTE) and precedence(origin.level) > known:
            sink.error("P0109", "`rate_limit` needs `requests`", origin.source, help="for example requests: 100")
            return


def check_backoff(effective: Effective, sink: Sink) -> None:
    values, origins = effective.values, effective.origins
    if values["retry.max"] < values["retry.base"]:
        at = max(origins["retry.max"], origins["retry.base"], key=lambda origin: list(Level).index(origin.level))
        sink.error(
            "P0111",
            f"`retry.max` ({origins['retry.max'].value}) is shorter than `retry.base` ({origins['retry.base'].value})",
            at.source,
        )


def _route(name: str, block: Block, frame: Frame, common: _Settings, sink: Sink) -> Route:
    effective = apply(frame.below, Level.ROUTE, block, ROUTE_SETTINGS)
    settings = common if effective is frame.below else _settings(effective, frame, sink)
    authz = authz_level(Level.ROUTE, block, f"services.{frame.service}.routes.{name}.")
    check_callers(block, frame.services, sink)
    stack = (*frame.levels, authz, frame.ceiling)
    own: dict[str, Origin] = {}
    for key in _ROUTE_ONLY:
        stated = block.stated(key)
        if stated is not None:
            text = clip(ROUTE.by_key[key].kind.format(stated.value), 200)
            own[key] = Origin(text, Level.ROUTE, stated.key.source)
    _check_actions(block, sink)
    headers = block.get("headers")
    match = _match(block.get("match"), frame, sink)
    return Route(
        name=name,
        match=match,
        destinations=_destinations(block.stated("to"), frame, sink),
        timeouts=settings.timeouts,
        retry=settings.retry,
        hedge_after_s=settings.hedge_after_s,
        authz=tuple(level for level in stack if level is not None),
        rate_limit=settings.rate_limit,
        fault=_fault(block.stated("fault"), sink),
        filters=settings.filters,
        request_headers=_edit(headers.get("request") if headers else None),
        response_headers=_edit(headers.get("response") if headers else None),
        sticky=_sticky(block, sink),
        fallback=_fallback(block.stated("fallback"), frame, sink),
        mirror=mirror_of(block.stated("mirror"), frame, sink),
        respond=_respond(block.stated("respond"), sink),
        redirect=_redirect(block.get("redirect"), match, sink),
        rewrite=_rewrite(block.stated("rewrite"), match, sink),
        upgrade=frozenset(block.get("upgrade") or ()),
        source=block.node.source,
        provenance={**settings.origins, **own} if own else settings.origins,
    )


def _match(block: Block | None, frame: Frame, sink: Sink) -> Match:
    if block is None:
        return Match()
    paths = [(key, stated) for key in ("path", "path_regex", "grpc") if (stated := block.stated(key)) is not None]
    if len(paths) > 1:
        first, second = paths[0][0], paths[1][0]
        sink.error("P0111", f"`match` takes `{first}` or `{second}`, not both", paths[1][1].key)
    grpc, methods, callers = block.stated("grpc"), block.get("methods"), block.get("from")
    check_refs(callers or (), frame.services, sink)
    return Match(
        path=block.get("path") if grpc is None else _grpc_path(grpc, sink),
        path_regex=block.get("path_regex"),
        methods=None if methods is None else frozenset(methods),
        headers=value_matches(block.get("headers")),
        query=value_matches(block.get("query")),
        cookies=value_matches(block.get("cookies")),
        callers=None if callers is None else frozenset(ref.name for ref in callers),
    )


def _grpc_path(stated: Stated, sink: Sink) -> str:
    """What gRPC asks for (PROTOCOL-HTTP2.md, Path)."""
    service, method = stated.value.get("service"), stated.value.get("method")
    if isinstance(stated.node, Map) and not stated.node.entries:
        help = "for example service: shop.v1.Cart"
        sink.error("P0109", "`match.grpc` needs `service` or `method`", stated.key, help=help)
    return f"/{service or '*'}/{method or '*'}"


def _destinations(to: Stated | None, frame: Frame, sink: Sink) -> tuple[Destination, ...]:
    if to is None:
        return (Destination(None),)
    for ref, _ in to.value:
        _known_version(ref, frame, sink)
    # A version of weight 0 is named to be known, and gets nothing.
    return tuple(Destination(ref.name, weight) for ref, weight in to.value if weight)


def _known_version(ref: Ref, frame: Frame, sink: Sink) -> None:
    if ref.name in frame.versions:
        return
    label = f"`{frame.service}` declares no versions"
    if frame.versions:
        declared = sorted(frame.versions)
        shown = ", ".join(declared[:8]) + (", ..." if len(declared) > 8 else "")
        label = f"declared: {shown} ({next(iter(frame.versions.values())).key.source})"
    help = sink.suggest(ref.name, frame.versions) or ("" if frame.versions else "declare it under `versions`")
    sink.error("P0107", f'unknown version "{clip(ref.name)}"', ref.node, label, help)


def _check_actions(block: Block, sink: Sink) -> None:
    ends = [stated for key in ("redirect", "respond") if (stated := block.stated(key)) is not None]
    if len(ends) == 2:
        sink.error("P0111", "a route takes `redirect` or `respond`, not both", ends[1].key)
    if ends:
        for key in ("to", "sticky", "fallback", "mirror", "rewrite", "upgrade"):
            stated = block.stated(key)
            if stated is not None:
                sink.error(
                    "P0111",
                    f"`{key}` on a route that answers by itself",
                    stated.key,
                    label="nothing is sent on",
                    help="remove one of the two",
                )
    authz = block.stated("authz")
    if authz is not None and block.stated("rewrite") is not None:
        sink.error(
            "P0111",
            "authorization on a route with `rewrite`",
            authz.key,
            label="the callee matches routes again on the rewritten request",
            help="state `authz` on the service, or on a route that matches the rewritten path",
        )


def _fault(stated: Stated | None, sink: Sink) -> Fault | None:
    if stated is None:
        return None
    delay, abort = stated.value.get("delay"), stated.value.get("abort")
    if delay is None and abort is None:
        if not stated.value.fields:
            sink.error("P0109", "`fault` needs `delay` or `abort`", stated.key)
        return None
    usual = Fault()
    return Fault(
        delay_s=_or(delay, "fixed", usual.delay_s),
        delay_percent=_or(delay, "percent", usual.delay_percent),
        abort_status=_or(abort, "status", None),
        abort_percent=_or(abort, "percent", usual.abort_percent),
        source=stated.key.source,
    )


def _or(block: Block | None, key: str, otherwise: Any) -> Any:
    value = block.get(key) if block is not None else None
    return otherwise if value is None else value


def _edit(block: Block | None) -> HeaderEdit:
    if block is None:
        return HeaderEdit()

    def pairs(key: str) -> tuple[tuple[str, str], ...]:
        return tuple((name, each.value) for name, each in (block.get(key) or {}).items())

    return HeaderEdit(pairs("set"), pairs("add"), block.get("remove") or ())


def _sticky(block: Block, sink: Sink) -> Sticky | None:
    stated = block.stated("sticky")
    if stated is None:
        return None
    to = block.get("to")
    level = _or(stated.value, "level", "version")
    if level == "version" and (to is None or sum(1 for _, weight in to if weight) < 2):
        sink.warning("P0305", "`sticky` on a route that leads to one place never acts", stated.key)
    return Sticky(_or(stated.value, "cookie", f"pillion_{level}"), _or(stated.value, "ttl", 3600.0), level)


def _fallback(stated: Stated | None, frame: Frame, sink: Sink) -> Fallback | None:
    if stated is None:
        return None
    block: Block = stated.value
    given = [key for key in ("version", "service", "status") if block.stated(key) is not None]
    if len(given) != 1:
        invalid = not given and isinstance(block.fields.get("body"), Stated)
        help = "a fixed response needs a status" if invalid else "for example {status: 503, body: try later}"
        sink.error("P0111", "`fallback` takes exactly one of version, service, status", stated.key, help=help)
        return None
    body = block.stated("body")
    if body is not None and given != ["status"]:
        sink.error("P0111", f"`fallback.body` goes with `status`, not with `{given[0]}`", body.key)
    version: Ref | None = block.get("version")
    service: Ref | None = block.get("service")
    if version is not None:
        _known_version(version, frame, sink)
        return Fallback(version=version.name)
    if service is not None:
        if service.name == frame.service:
            sink.error("P0117", f'"{clip(service.name)}" cannot fall back to itself', service.node)
        else:
            _serves_requests(service, frame, sink)
        return Fallback(service=service.name)
    return Fallback(respond=_respond(stated, sink))


def mirror_of(stated: Stated | None, frame: Frame, sink: Sink) -> Mirror | None:
    if stated is None:
        return None
    block: Block = stated.value
    if len([key for key in ("to", "service") if block.stated(key) is not None]) != 1:
        sink.error("P0111", "`mirror` takes exactly one of to, service", stated.key, help="for example {to: v2}")
        return None
    version: Ref | None = block.get("to")
    service: Ref | None = block.get("service")
    if version is not None:
        _known_version(version, frame, sink)
    if service is not None:
        if service.name == frame.service:
            help = "name the version that gets the copies: to"
            sink.error("P0111", f'"{clip(service.name)}" mirrors to itself', service.node, help=help)
        else:
            _serves_requests(service, frame, sink)
    usual = Mirror()
    return Mirror(
        version.name if version is not None else None,
        service.name if service is not None else None,
        _or(block, "percent", usual.percent),
        _or(block, "writes", usual.writes),
        stated.key.source,
    )


def _serves_requests(service: Ref, frame: Frame, sink: Sink) -> None:
    if known_service(service, frame.services, sink):
        ports = (frame.services[service.name].value.get("ports") or {}).values()
        if ports and all(port.value.get("protocol") is Protocol.TCP for port in ports):
            sink.error("P0111", f"`{service.name}` cannot serve requests: its ports speak TCP", service.node)


def known_service(ref: Ref, services: Mapping[str, Stated], sink: Sink) -> bool:
    if ref.name in services:
        return True
    near = sink.suggest(ref.name, services)
    sink.error("P0108", f'unknown service "{clip(ref.name)}"', ref.node, help=near or "declare it under `services`")
    return False


def _respond(stated: Stated | None, sink: Sink) -> Respond | None:
    if stated is None or stated.value.get("status") is None:
        return None
    status, body = stated.value.get("status"), stated.value.get("body") or ""
    if body and status in (204, 205, 304):
        sink.error("P0111", f"a response with status {status} has no body", stated.value.stated("body").node)
    return Respond(status, body)


def _redirect(block: Block | None, match: Match, sink: Sink) -> Redirect | None:
    if block is None or block.get("to") is None:
        return None
    _check_tree("redirect.to", block.stated("to"), match, sink)
    return Redirect(block.get("to"), _or(block, "status", 302))


def _rewrite(stated: Stated | None, match: Match, sink: Sink) -> Rewrite | None:
    if stated is None:
        return None
    if not stated.value.fields:
        sink.error("P0109", "`rewrite` needs `path` or `host`", stated.key)
    _check_tree("rewrite.path", stated.value.stated("path"), match, sink)
    return Rewrite(stated.value.get("path"), stated.value.get("host"))


def _check_tree(key: str, stated: Stated | None, match: Match, sink: Sink) -> None:
    """A path that ends with `/**` takes over what the match has there: it must be plain what that is."""
    if stated is None or not stated.value.partition("?")[0].endswith("/**"):
        return
    path = match.path
    if match.path_regex is not None or (path is not None and (path[-3:] != "/**" or "**" in path[:-3])):
        message = f"`{key}` takes over what `**` stands for in `match.path`, which has none at its end"
        if path is not None and path[-3:] == "/**":
            message = f"`{key}` takes over what `**` stands for in `match.path`, which has more than one"
        help = "for example match: {path: /old/**} and /new/**; without /** the whole path is replaced"
        sink.error("P0111", message, stated.node, help=help)
