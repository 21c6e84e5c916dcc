"""`explain` and `can`: what a policy says, and where that comes from, whatever the policy was read from.

Here stand their options and what they print; policy.py reads files for them, explain.py asks a control plane. Must not
read anything itself. `can` decides with the functions that the sidecar runs.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import click

from sidecar.model.problems import suggest
from sidecar.model.snapshot import AuthzLevel, Match, Origin, Route, Service, Snapshot
from sidecar.model.summary import concurrency_text, destination_text, match_text

from . import EXIT_FAILED
from .completion import complete_services
from .output import echo_json, output_option, table

Command = TypeVar("Command", bound=Callable[..., Any])


def known_service(snapshot: Snapshot, name: str, what: str = "SERVICE") -> Service:
    service = snapshot.services.get(name)
    if service is None:
        help = suggest(name, snapshot.services) or f"known: {', '.join(snapshot.services) or 'none'}"
        raise click.BadParameter(f"unknown service {name!r}; {help}", param_hint=what)
    return service


def _decorated(command: Command, decorators: Iterable[Callable[[Any], Any]]) -> Command:
    result: Any = command
    for decorate in reversed(list(decorators)):
        result = decorate(result)
    made: Command = result
    return made


def explain_options(command: Command) -> Command:
    return _decorated(
        command,
        (
            click.argument("service", shell_complete=complete_services),
            click.option("--route", "route_name", help="Explain one route."),
            click.option("--caller", help="As this service calls it: with what it tightens under `calls`."),
            output_option("table", "json"),
        ),
    )


def can_options(command: Command) -> Command:
    return _decorated(
        command,
        (
            click.argument("src", shell_complete=complete_services),
            click.argument("dst", shell_complete=complete_services),
            click.argument("method", required=False),
            click.argument("path", required=False),
            click.option(
                "-H", "--header", "headers", multiple=True, metavar="NAME:VALUE", help="A header of the request."
            ),
            click.option("--port", help="The port of DST, by name or number; else its first HTTP port."),
            click.option("--plain", is_flag=True, help="SRC comes without a certificate."),
            click.option("--trace", is_flag=True, help="Show every rule, and whether it matched."),
            output_option("text", "json"),
        ),
    )


def explain_service(snapshot: Snapshot, service: str, route_name: str | None, caller: str | None, output: str) -> None:
    """Print where every effective value comes from, and what it overrode."""
    subject = known_service(snapshot, service)
    route = _route(subject, route_name) if route_name is not None else None
    origins = dict(subject.provenance)
    if route is not None:
        origins |= route.provenance
    origins = dict(sorted(origins.items()))  # in one order, wherever the policy was read from
    if caller is not None:
        origins = _as_called(origins, subject, route, known_service(snapshot, caller, "--caller"))
    levels = subject.authz if route is None else route.authz
    if output == "json":
        from sidecar.model.canonical import origin_to_json, value_to_json

        data: dict[str, object] = {"service": service, "route": route_name, "caller": caller}
        data["settings"] = {key: origin_to_json(origin) for key, origin in origins.items()}
        data["authz"] = value_to_json(levels)
        echo_json(data)
        return
    place = subject.source if route is None else route.source
    title = (
        service
        if route is None
        else f"{service}, route {route.name}: {match_text(route.match)} -> {destination_text(route)}"
    )
    click.echo(f"{title} ({place})\n")
    rows = [
        (key, origin.value, origin.level.value, _place(origin), _overrode(origin)) for key, origin in origins.items()
    ]
    click.echo(table(rows, ("SETTING", "VALUE", "LEVEL", "WHERE", "OVERRODE")))
    click.echo(f"\n{_authz_table(levels)}")
    if route is None:
        limit = concurrency_text(subject)
        if limit is not None:
            click.echo(f"\nconcurrency: {limit}")
        click.echo(
            f"\nroutes: {', '.join(each.name for each in subject.routes)} (--route NAME shows what each overrides)"
        )


def _route(service: Service, name: str) -> Route:
    names = [route.name for route in service.routes]
    if name not in names:
        help = suggest(name, names) or f"known: {', '.join(names)}"
        raise click.BadParameter(f"{service.name} has no route {name!r}; {help}", param_hint="--route")
    return service.routes[names.index(name)]


def _as_called(origins: dict[str, Origin], service: Service, route: Route | None, caller: Service) -> dict[str, Origin]:
    """A caller's own value holds where it is tighter."""
    call = caller.calls.get(service.name)
    if call is None:
        return origins
    timeouts, retry = (service.timeouts, service.routes[-1].retry) if route is None else (route.timeouts, route.retry)
    for key, own in call.provenance.items():
        if key == "retry.max_retries":
            tighter = call.max_retries is not None and call.max_retries < retry.max_retries
        else:
            name = f"{key.removeprefix('timeout.')}_s"
            tighter = getattr(call, name) < getattr(timeouts, name)
        if tighter:
            below = origins[key]
            first = Origin(below.value, below.level, below.source)
            origins[key] = Origin(own.value, own.level, own.source, (first, *below.overrode))
    return origins


def _place(origin: Origin) -> str:
    return str(origin.source) if origin.source.file else "-"


def _overrode(origin: Origin) -> str:
    return ", ".join(
        f"{each.value} ({each.level.value}{f', {each.source}' if each.source.file else ''})" for each in origin.overrode
    )


def _authz_table(levels: Sequence[AuthzLevel]) -> str:
    rows: list[tuple[str, str, str, str]] = []
    for level in levels:
        for key, value in (("default", level.default), ("mode", level.mode)):
            if value is not None:
                rows.append((f"authz.{key}", value, level.level.value, str(level.source)))
        if level.allow == ():
            rows.append(("authz.allow", "nobody", level.level.value, str(level.source)))
        for kind, rules in (("deny", level.deny), ("allow", level.allow or ())):
            for rule in rules:
                match = Match(None, None, rule.methods, rule.headers, (), None)
                parts = [f"from {','.join(rule.callers)}"] if rule.callers is not None else []
                parts += [match_text(match)] if match != Match() else []
                parts += [" ".join(rule.paths)] if rule.paths is not None else []
                rows.append((f"authz.{kind}", " ".join(parts) or "*", level.level.value, str(rule.source)))
    if not any(key == "authz.default" for key, *_ in rows):
        rows.append(("authz.default", "mesh", "built-in", "-"))
    return table(rows, ("AUTHORIZATION", "VALUE", "LEVEL", "WHERE"))


def answer_can(
    snapshot: Snapshot,
    src: str,
    dst: str,
    method: str | None,
    path: str | None,
    headers: tuple[str, ...],
    port: str | None,
    plain: bool,
    trust_domain: str,
    trace: bool,
    output: str,
) -> int:
    """Print whether SRC may call DST, and which rule decides; the exit code."""
    if not src.startswith("spiffe://"):
        known_service(snapshot, src, "SRC")
    service = known_service(snapshot, dst, "DST")
    from .policy_can import judge  # what decides is loaded only here

    answer = judge(
        service,
        src if src.startswith("spiffe://") else f"spiffe://{trust_domain}/service/{src}",
        method,
        path,
        [_header(each) for each in headers],
        port,
        plain,
        trust_domain,
    )
    if output == "json":
        echo_json(answer)
    else:
        click.echo(f"{'allowed' if answer['allowed'] else 'denied'}: {answer['reason']}")
        details = [(f"{key}:", str(answer[key])) for key in ("rule", "where", "route", "message") if answer[key]]
        details += [("audit:", each) for each in answer["audited"]]
        click.echo("\n".join(f"  {line}" for line in table(details).splitlines()))
        if trace:
            click.echo("\n".join(f"  {step}" for step in answer["steps"]))
    return 0 if answer["allowed"] else EXIT_FAILED


def _header(text: str) -> tuple[bytes, bytes]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        raise click.BadParameter(f"{text!r} is not NAME:VALUE", param_hint="--header")
    return name.strip().lower().encode(), value.strip().encode()
