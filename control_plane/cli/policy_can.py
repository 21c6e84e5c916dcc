"""What `pillion policy can` answers: the decision of a callee's sidecar, by the functions that the sidecar runs.

The same steps in the same order as the inbound side of the data path: mtls, the reading of the path, the route (both
routes, where the path has two readings), authorization. Must not read files or print.
"""

from collections.abc import Sequence
from typing import Any

import click

from sidecar.model.snapshot import AuthzLevel, Mtls, Port, Protocol, Service
from sidecar.policy.authz import Authorizer, Verdict, service_of
from sidecar.policy.paths import BadPath, opaque
from sidecar.policy.plan import ports, reader
from sidecar.policy.routing import RouteTable


def judge(
    service: Service,
    identity: str,
    method: str | None,
    path: str | None,
    headers: list[tuple[bytes, bytes]],
    port_name: str | None,
    plain: bool,
    trust_domain: str,
) -> dict[str, Any]:
    """What the callee's sidecar decides, step by step as it does."""
    port = _port(service, ports(service), port_name)
    answer: dict[str, Any] = {
        "allowed": False, "reason": "", "rule": "", "where": "", "route": "", "port": port.name, "message": "",
        "audited": [], "steps": [],
    }  # fmt: skip
    mtls_origin = service.provenance.get("mtls")
    mtls_place = str(mtls_origin.source) if mtls_origin is not None else ""
    if plain and service.mtls is Mtls.STRICT:
        return answer | {"reason": "mtls is strict, and plain peers are refused", "rule": "mtls", "where": mtls_place}
    caller = None if plain or service.mtls is Mtls.OFF else identity
    plain_allowed = service.mtls is not Mtls.STRICT

    def settle(levels: Sequence[AuthzLevel], **request: Any) -> Verdict:
        verdict, steps = Authorizer(levels, trust_domain).trace(caller, plain_allowed=plain_allowed, **request)
        answer["steps"] += [str(step) for step in steps]
        answer["audited"] += [one.would for one in verdict.audited]
        answer.update(
            allowed=verdict.allowed,
            reason=verdict.reason,
            rule=verdict.name,
            where=str(verdict.source),
            message=(verdict.rule.message or "") if verdict.rule is not None else "",
        )
        return verdict

    if port.protocol is Protocol.TCP:
        settle(service.authz, method=b"", readings=None, headers=[], tcp=True)
        return answer
    if method is None or path is None:
        raise click.UsageError(f"METHOD and PATH are needed: the port {port.name!r} of {service.name} speaks HTTP")
    read = reader(service, port)
    target = path.partition("#")[0].encode()
    try:
        readings = read(target)
    except BadPath as error:
        return answer | {"reason": f"bad request (400): {error.reason}"}
    table = RouteTable([(route.match, route) for route in service.routes])
    targets = [readings.forward if read is not opaque else target]
    if readings.ambiguous:
        targets.append(readings.merged + b"?" + readings.query if readings.query else readings.merged)
    of_caller = service_of(caller, trust_domain)
    names: list[str] = []
    for each in targets:
        route = table.find(method.encode(), each, headers, of_caller)
        if route is None:
            return answer | {"allowed": False, "reason": f"no route of {service.name} takes this request (404)"}
        if f"{route.name} ({route.source})" in names:
            continue
        names.append(f"{route.name} ({route.source})")
        answer["route"] = ", ".join(names)
        if not settle(route.authz, method=method.encode(), readings=readings, headers=headers).allowed:
            break
    return answer


def _port(service: Service, ports: Sequence[Port], name: str | None) -> Port:
    if name is None:
        return next((port for port in ports if port.protocol.is_http), ports[0])
    for port in ports:
        if name in (port.name, str(port.number)):
            return port
    known = ", ".join(f"{port.name} ({port.number})" for port in ports)
    raise click.BadParameter(f"{service.name} has no port {name!r}; known: {known}", param_hint="--port")
