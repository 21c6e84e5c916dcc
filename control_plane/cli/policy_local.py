"""`pillion policy check`, `show`, `explain`, `can` and `schema`: policy files, without a mesh.

Data goes to stdout, problems and everything else to stderr. Exit codes: 0 yes, 1 the answer is no, 2 usage or invalid
policy. Must not load the data plane (Trio), nor anything that makes the start slow: what only one verb needs is
imported there. Invariant: nobody is called.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from sidecar.model.load import load_policy
from sidecar.model.problems import Severity, problem_to_json, strict
from sidecar.model.snapshot import AuthzLevel, Call, Service, Snapshot
from sidecar.model.summary import destination_text, match_text, tries_text

from .output import echo_data, echo_json, labels_text, note, output_option, plural, table
from .policy_explain import answer_can, can_options, explain_options, explain_service, known_service
from .policy_files import EXIT_INVALID, files_option, load, paths_of, report


@click.command()
@click.argument("files", nargs=-1, type=click.Path(path_type=Path), metavar="[FILE]...")
@click.option("--strict", "is_strict", is_flag=True, help="Warnings are errors.")
@output_option("text", "json")
def check(files: tuple[Path, ...], is_strict: bool, output: str) -> int:
    """Report every problem in the policy files."""
    loaded = load_policy(paths_of(files))
    problems = strict(loaded.problems) if is_strict else loaded.problems
    valid = all(problem.severity is not Severity.ERROR for problem in problems)
    count = len(loaded.snapshot.services) if loaded.snapshot is not None else 0
    if output == "json":
        facts = {
            "valid": valid,
            "revision": loaded.snapshot.revision if loaded.snapshot is not None else None,
            "problems": [problem_to_json(problem) for problem in problems],
            "further_problems": loaded.dropped,
        }
        echo_json(facts)
    else:
        report(loaded, problems)
        if valid:
            note(f"valid: {plural(count, 'service')} in {plural(len(loaded.texts), 'file')}")
    return 0 if valid else EXIT_INVALID


@click.command()
@click.argument("service", required=False)
@files_option
@output_option("table", "wide", "json", "yaml", "name")
def show(service: str | None, files: tuple[Path, ...], output: str) -> None:
    """Show what is effective: all services, or one."""
    snapshot = load(files)
    if service is not None:
        snapshot = Snapshot({service: known_service(snapshot, service)}, snapshot.revision)
    if output == "name":
        click.echo("\n".join(snapshot.services))
    elif output in ("json", "yaml"):
        from sidecar.model.canonical import service_to_json, snapshot_to_json

        data = snapshot_to_json(snapshot) if service is None else service_to_json(snapshot.services[service])
        echo_data(data, output)
    elif service is not None:
        click.echo(_describe(snapshot.services[service]))
    else:
        head = ["SERVICE", "PORTS", "VERSIONS", "ROUTES", "MTLS", "AUTHORIZATION", "CALLS"]
        rows = [_overview(each) for each in snapshot.services.values()]
        if output == "wide":
            head.append("DEFINED")
            rows = [[*row, str(each.source)] for row, each in zip(rows, snapshot.services.values(), strict=True)]
        click.echo(table(rows, head))


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
            (f"{each.host}:{each.port}", each.tls.value, f"weight {each.weight}", labels_text(each.labels))
            for each in service.endpoints
        ]
        blocks.append(table(rows, ("ADDRESS", "TLS", "WEIGHT", "LABELS")))
    if service.versions:
        blocks.append(
            table([(name, labels_text(labels)) for name, labels in service.versions.items()], ("VERSION", "LABELS"))
        )
    rows_of_routes = [
        (route.name, match_text(route.match), destination_text(route), tries_text(route), str(route.source))
        for route in service.routes
    ]
    blocks.append(table(rows_of_routes, ("ROUTE", "MATCH", "TO", "TRIES", "DEFINED")))
    calls = [_call_row(call) for call in service.calls.values()]
    if calls:
        blocks.append(table(calls, ("CALLS", "PORT", "LOCAL PORT", "TIGHTENS", "DEFINED")))
    return "\n\n".join(blocks)


def _call_row(call: Call) -> tuple[str, ...]:
    tightens = " ".join(f"{key}={origin.value}" for key, origin in call.provenance.items())
    return call.service, call.port or "-", str(call.local_port or "-"), tightens or "-", str(call.source)


@click.command()
@explain_options
@files_option
def explain(service: str, route_name: str | None, caller: str | None, files: tuple[Path, ...], output: str) -> None:
    """Show where every effective value comes from, and what it overrode.

    By files; `pillion explain` asks the control plane.
    """
    explain_service(load(files), service, route_name, caller, output)


@click.command()
@can_options
@click.option("--trust-domain", default="mesh.local", show_default=True, help="The trust domain of service names.")
@files_option
def can(files: tuple[Path, ...], **options: Any) -> int:
    """Say whether SRC may call DST, and which rule decides. SRC is a service or a SPIFFE ID.

    Ends with 0 if allowed, 1 if denied. By files; `pillion can` asks the control plane.
    """
    return answer_can(load(files), **options)


@click.command()
def schema() -> None:
    """Print the JSON Schema of policy files (draft-07), for editors."""
    from sidecar.model.schema import json_schema

    echo_json(json_schema())
