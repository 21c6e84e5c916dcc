"""`pillion policy`: check, show, explain and try policy files, without a mesh.

Data goes to stdout, problems and everything else to stderr. Exit codes: 0 yes, 1 the answer is no, 2 usage or invalid
policy. `can` decides with the functions that the sidecar runs. Must not load the data plane (Trio), nor anything that
makes the start slow: what only one verb needs is imported there.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from sidecar.model.load import Loaded, load_policy
from sidecar.model.problems import Problem, Severity, one_line, problem_to_json, render, strict, suggest
from sidecar.model.snapshot import AuthzLevel, Call, Match, Origin, Route, Service, Snapshot, ValueMatch

DEFAULT_FILE = "mesh.yaml"
FILES_VARIABLE = "PILLION_POLICY"
EXIT_NO = 1
EXIT_INVALID = 2

Command = TypeVar("Command", bound=Callable[..., Any])


@click.group()
def policy() -> None:
    """Check, show and explain policy files.

    FILE is a policy file or a folder of them; without one, $PILLION_POLICY (several separated by a colon), else
    ./mesh.yaml.
    """


def _files_option(command: Command) -> Command:
    option = click.option(
        "-f",
        "--file",
        "files",
        multiple=True,
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="A policy file or folder.",
    )
    return option(command)


def _output_option(*formats: str) -> Callable[[Command], Command]:
    return click.option("-o", "--output", type=click.Choice(formats), default=formats[0], show_default=True)


def _paths(files: Sequence[Path]) -> list[Path]:
    named = os.environ.get(FILES_VARIABLE, "")
    return list(files) or [Path(each) for each in named.split(os.pathsep) if each] or [Path(DEFAULT_FILE)]


def _color() -> bool:
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _report(loaded: Loaded, problems: Sequence[Problem]) -> None:
    if not problems:
        return
    click.echo(render(problems, loaded.texts, _color()), err=True, color=True)
    click.echo(_count(problems, loaded.dropped), err=True)


def _count(problems: Sequence[Problem], dropped: int) -> str:
    errors = sum(1 for problem in problems if problem.severity is Severity.ERROR)
    parts = [(errors, "error"), (len(problems) - errors, "warning"), (dropped, "further problem")]
    return ", ".join(f"{count} {word}{'' if count == 1 else 's'}" for count, word in parts if count)


def _load(files: Sequence[Path]) -> Snapshot:
    """The snapshot; where there is none, the problems go to stderr and the command ends."""
    loaded = load_policy(_paths(files))
    if loaded.snapshot is None:
        _report(loaded, loaded.errors)
        raise click.exceptions.Exit(EXIT_INVALID)
    return loaded.snapshot


def _service(snapshot: Snapshot, name: str, what: str = "SERVICE") -> Service:
    service = snapshot.services.get(name)
    if service is None:
        help = suggest(name, snapshot.services) or f"known: {', '.join(snapshot.services) or 'none'}"
        raise click.BadParameter(f"unknown service {name!r}; {help}", param_hint=what)
    return service


def _echo_json(data: object) -> None:
    click.echo(json.dumps(data, indent=2))


def _table(rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
    """Columns aligned with spaces; the last one is not padded."""
    lines = [tuple(head)] * bool(head) + [tuple(one_line(cell) for cell in row) for row in rows]
    if not lines:
        return ""
    widths = [max(len(row[column]) for row in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in lines
    )


@policy.command()
@click.argument("files", nargs=-1, type=click.Path(path_type=Path), metavar="[FILE]...")
@click.option("--strict", "is_strict", is_flag=True, help="Warnings are errors.")
@_output_option("text", "json")
def check(files: tuple[Path, ...], is_strict: bool, output: str) -> int:
    """Report every problem in the policy files."""
    loaded = load_policy(_paths(files))
    problems = strict(loaded.problems) if is_strict else loaded.problems
    valid = all(problem.severity is not Severity.ERROR for problem in problems)
    count = len(loaded.snapshot.services) if loaded.snapshot is not None else 0
    if output == "json":
        report = {
            "valid": valid,
            "revision": loaded.snapshot.revision if loaded.snapshot is not None else None,
            "problems": [problem_to_json(problem) for problem in problems],
            "further_problems": loaded.dropped,
        }
        _echo_json(report)
    else:
        _report(loaded, problems)
        if valid:
            click.echo(f"valid: {count} service{'' if count == 1 else 's'} in {len(loaded.texts)} file"
                       f"{'' if len(loaded.texts) == 1 else 's'}", err=True)  # fmt: skip
    return 0 if valid else EXIT_INVALID


@policy.command()
@click.argument("service", required=False)
@_files_option
@_output_option("table", "wide", "json", "yaml", "name")
def show(service: str | None, files: tuple[Path, ...], output: str) -> None:
    """Show what is effective: all services, or one."""
    snapshot = _load(files)
    if service is not None:
        snapshot = Snapshot({service: _service(snapshot, service)}, snapshot.revision)
    if output == "name":
        click.echo("\n".join(snapshot.services))
    elif output in ("json", "yaml"):
        from sidecar.model.canonical import service_to_json, snapshot_to_json

        data = snapshot_to_json(snapshot) if service is None else service_to_json(snapshot.services[service])
        if output == "json":
            _echo_json(data)
        else:
            import yaml

            data = json.loads(json.dumps(data))  # what is shared would be written as aliases
            click.echo(yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120), nl=False)
    elif service is not None:
        click.echo(_describe(snapshot.services[service]))
    else:
        head = ["SERVICE", "PORTS", "VERSIONS", "ROUTES", "MTLS", "AUTHORIZATION", "CALLS"]
        rows = [_overview(each) for each in snapshot.services.values()]
        if output == "wide":
            head.append("DEFINED")
            rows = [[*row, str(each.source)] for row, each in zip(rows, snapshot.services.values(), strict=True)]
        click.echo(_table(rows, head))


def _overview(service: Service) -> list[str]:
    return [
        service.name,
        _ports(service),
        ",".join(service.versions) or "-",
        str(len(service.routes)),
        service.mtls.value,
        _authz_summary(service.routes[-1].authz),
        ",".join(service.calls) or "-",
    ]


def _ports(service: Service) -> str:
    return ",".join(f"{port.name}:{port.number}/{port.protocol.value}" for port in service.ports) or "-"


def _authz_summary(levels: Sequence[AuthzLevel]) -> str:
    allows = sum(len(level.allow or ()) for level in levels)
    denies = sum(len(level.deny) for level in levels)
    default = next((level.default for level in reversed(levels) if level.default is not None), "mesh")
    rules = [f"{allows} allow" if allows else f"default {default}", f"{denies} deny" if denies else ""]
    return ", ".join(each for each in rules if each)


def _describe(service: Service) -> str:
    blocks = [f"{service.name} ({service.source})"]
    if service.ports:
        blocks.append(f"ports: {_ports(service)}")
    if service.endpoints:
        rows = [
            (f"{each.host}:{each.port}", each.tls.value, f"weight {each.weight}", _labels(each.labels))
            for each in service.endpoints
        ]
        blocks.append(_table(rows, ("ADDRESS", "TLS", "WEIGHT", "LABELS")))
    if service.versions:
        blocks.append(
            _table([(name, _labels(labels)) for name, labels in service.versions.items()], ("VERSION", "LABELS"))
        )
    rows_of_routes = [
        (route.name, match_text(route.match), destination_text(route), _tries(route), str(route.source))
        for route in service.routes
    ]
    blocks.append(_table(rows_of_routes, ("ROUTE", "MATCH", "TO", "TRIES", "DEFINED")))
    calls = [_call_row(call) for call in service.calls.values()]
    if calls:
        blocks.append(_table(calls, ("CALLS", "PORT", "LOCAL PORT", "TIGHTENS", "DEFINED")))
    return "\n\n".join(blocks)


def _labels(labels: Mapping[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in labels.items()) or "-"


def _tries(route: Route) -> str:
    origins = route.provenance
    return f"{route.retry.max_retries + 1} x {origins['timeout.try'].value} in {origins['timeout.total'].value}"


def _call_row(call: Call) -> tuple[str, ...]:
    tightens = " ".join(f"{key}={origin.value}" for key, origin in call.provenance.items())
    return call.service, call.port or "-", str(call.local_port or "-"), tightens or "-", str(call.source)


def match_text(match: Match) -> str:
    """A match in a few words."""
    parts = [",".join(sorted(match.methods))] if match.methods is not None else []
    parts += [match.path] if match.path is not None else []
    parts += [f"~{match.path_regex}"] if match.path_regex is not None else []
    parts += [f"{name}{_value_text(value)}" for name, value in match.headers]
    parts += [f"?{name}{_value_text(value)}" for name, value in match.query]
    parts += [f"from {','.join(sorted(match.callers))}"] if match.callers is not None else []
    return " ".join(parts) or "*"


def _value_text(value: ValueMatch) -> str:
    return {"exact": f"={value.value}", "prefix": f"^={value.value}", "regex": f"~{value.value}"}.get(value.kind, "")


def destination_text(route: Route) -> str:
    if route.respond is not None:
        return f"respond {route.respond.status}"
    if route.redirect is not None:
        return f"redirect {route.redirect.status} {route.redirect.to}"
    if len(route.destinations) == 1:
        return route.destinations[0].version or "every endpoint"
    return ", ".join(f"{each.version} {each.weight}%" for each in route.destinations)


@policy.command()
@click.argument("service")
@click.option("--route", "route_name", help="Explain one route.")
@click.option("--caller", help="As this service calls it: with what it tightens under `calls`.")
@_files_option
@_output_option("table", "json")
def explain(service: str, route_name: str | None, caller: str | None, files: tuple[Path, ...], output: str) -> None:
    """Show where every effective value comes from, and what it overrode."""
    snapshot = _load(files)
    subject = _service(snapshot, service)
    route = _route(subject, route_name) if route_name is not None else None
    origins = dict(subject.provenance)
    if route is not None:
        origins |= route.provenance
    if caller is not None:
        origins = _as_called(origins, subject, route, _service(snapshot, caller, "--caller"))
    levels = subject.authz if route is None else route.authz
    if output == "json":
        from sidecar.model.canonical import origin_to_json, value_to_json

        data: dict[str, object] = {"service": service, "route": route_name, "caller": caller}
        data["settings"] = {key: origin_to_json(origin) for key, origin in origins.items()}
        data["authz"] = value_to_json(levels)
        _echo_json(data)
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
    click.echo(_table(rows, ("SETTING", "VALUE", "LEVEL", "WHERE", "OVERRODE")))
    click.echo(f"\n{_authz_table(levels)}")
    if route is None:
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
    return _table(rows, ("AUTHORIZATION", "VALUE", "LEVEL", "WHERE"))


@policy.command()
@click.argument("src")
@click.argument("dst")
@click.argument("method", required=False)
@click.argument("path", required=False)
@click.option("-H", "--header", "headers", multiple=True, metavar="NAME:VALUE", help="A header of the request.")
@click.option("--port", help="The port of DST, by name or number; else its first HTTP port.")
@click.option("--plain", is_flag=True, help="SRC comes without a certificate.")
@click.option("--trust-domain", default="mesh.local", show_default=True, help="The trust domain of service names.")
@click.option("--trace", is_flag=True, help="Show every rule, and whether it matched.")
@_files_option
@_output_option("text", "json")
def can(
    src: str,
    dst: str,
    method: str | None,
    path: str | None,
    headers: tuple[str, ...],
    port: str | None,
    plain: bool,
    trust_domain: str,
    trace: bool,
    files: tuple[Path, ...],
    output: str,
) -> int:
    """Say whether SRC may call DST, and which rule decides. SRC is a service or a SPIFFE ID.

    Ends with 0 if allowed, 1 if denied.
    """
    snapshot = _load(files)
    if not src.startswith("spiffe://"):
        _service(snapshot, src, "SRC")
    service = _service(snapshot, dst, "DST")
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
        _echo_json(answer)
    else:
        click.echo(f"{'allowed' if answer['allowed'] else 'denied'}: {answer['reason']}")
        details = [(f"{key}:", str(answer[key])) for key in ("rule", "where", "route", "message") if answer[key]]
        details += [("audit:", each) for each in answer["audited"]]
        click.echo("\n".join(f"  {line}" for line in _table(details).splitlines()))
        if trace:
            click.echo("\n".join(f"  {step}" for step in answer["steps"]))
    return 0 if answer["allowed"] else EXIT_NO


def _header(text: str) -> tuple[bytes, bytes]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        raise click.BadParameter(f"{text!r} is not NAME:VALUE", param_hint="--header")
    return name.strip().lower().encode(), value.strip().encode()


@policy.command()
def schema() -> None:
    """Print the JSON Schema of policy files (draft-07), for editors."""
    from sidecar.model.schema import json_schema

    _echo_json(json_schema())
