"""What a caller says of the services it depends on: tightened for itself, never loosened.

Must not know files. A value that would loosen is clamped to what the service says, with a warning.
"""

from collections.abc import Mapping
from typing import Any

from .kinds import Block, Ref, Stated, format_seconds
from .merge import LEAVES
from .problems import Sink, clip
from .routes import known_service
from .snapshot import NONE, Call, Level, Origin, Protocol, Service
from .source import Source

_TIMEOUTS = ("total", "try", "idle", "body", "connect")


def build_calls(
    caller: str,
    stated: Mapping[str, Stated],
    services: Mapping[str, Service],
    declared: Mapping[str, Stated],
    ceilings: dict[str, Mapping[str, float]],
    sink: Sink,
) -> dict[str, Call]:
    """The calls of one caller by the name of the service, sorted. `ceilings` is filled as services are met."""
    calls = {}
    local_ports: dict[int, Source] = {}
    for name in sorted(stated):
        each = stated[name]
        block: Block = each.value
        if name == caller:
            sink.error("P0111", f"`{caller}` cannot depend on itself", each.key)
            continue
        if not known_service(Ref(name, each.key), declared, sink):
            continue
        local = block.stated("local_port")
        if local is not None:
            if local.value in local_ports:
                first = local_ports[local.value]
                sink.error("P0116", f"the local port {local.value} is used twice", local.node, f"first here: {first}")
            local_ports[local.value] = local.node.source
        if name not in ceilings:
            ceilings[name] = _ceilings(services[name])
        calls[name] = _call(each, services[name], ceilings, sink)
    return calls


def _ceilings(service: Service) -> dict[str, float]:
    """The most generous value that any route of the service has: beyond it a caller would loosen."""
    timeouts = {each.timeouts for each in service.routes}
    ceilings = {key: max(getattr(each, f"{key}_s") for each in timeouts) for key in _TIMEOUTS}
    if any(port.protocol is Protocol.GRPC for port in service.ports):  # to whose calls a built-in total does not apply
        ceilings["total"] = max(each.of_grpc_s for each in timeouts)
    ceilings["idle"] = max(ceilings["idle"], service.timeouts.idle_tcp_s)
    return ceilings | {"max_retries": max(route.retry.max_retries for route in service.routes)}


def _call(stated: Stated, service: Service, ceilings: Mapping[str, Mapping[str, float]], sink: Sink) -> Call:
    block: Block = stated.value
    timeout: Block | None = block.get("timeout")
    retry: Block | None = block.get("retry")
    origins: dict[str, Origin] = {}
    limits: dict[str, float] = {}
    for key in _TIMEOUTS:
        own = timeout.stated(key) if timeout is not None else None
        if own is None:
            continue
        ceiling = ceilings[service.name][key]
        limits[f"{key}_s"] = _tightened(f"timeout.{key}", own, ceiling, format_seconds(ceiling), service, origins, sink)
    max_retries = None
    own = retry.stated("max_retries") if retry is not None else None
    if own is not None:
        most = ceilings[service.name]["max_retries"]
        max_retries = int(_tightened("retry.max_retries", own, most, f"{most:g}", service, origins, sink))
    return Call(
        service=service.name,
        port=_port(stated, service, sink),
        local_port=block.get("local_port"),
        total_s=limits.get("total_s", NONE),
        try_s=limits.get("try_s", NONE),
        idle_s=limits.get("idle_s", NONE),
        body_s=limits.get("body_s", NONE),
        connect_s=limits.get("connect_s", NONE),
        max_retries=max_retries,
        source=stated.key.source,
        provenance=origins,
    )


def _tightened(
    path: str, own: Stated, ceiling: float, shown: str, service: Service, origins: dict[str, Origin], sink: Sink
) -> float:
    value: float = own.value
    if value > ceiling:
        sink.warning(
            "P0308",
            f"`{path}` would loosen what `{service.name}` says",
            own.node,
            label=f"{shown} holds",
            help="a caller may only tighten; change it at the service",
        )
        value = ceiling
    origins[path] = Origin(LEAVES[path].kind.format(value), Level.CALLER, own.key.source)
    return value


def _port(stated: Stated, service: Service, sink: Sink) -> str | None:
    block: Block = stated.value
    ref: Any = block.get("port")
    names = [port.name for port in service.ports]
    if ref is None:
        local = block.stated("local_port")
        if local is not None and len(names) > 1:
            help = f"add port: {names[0]} (known: {', '.join(names)})"
            sink.error("P0109", f"`{service.name}` has several ports: say which", local.key, help=help)
        return None
    if ref.name not in names:
        label = f"declared: {', '.join(names)}" if names else f"`{service.name}` declares no ports"
        sink.error("P0108", f'unknown port "{clip(ref.name)}"', ref.node, label, sink.suggest(ref.name, names))
    return str(ref.name)
