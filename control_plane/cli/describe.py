"""`pillion describe service NAME`: everything that the control plane knows of one service, on one page.

Must not work anything out: what is shown is what the API says, in blocks that are left out where they are empty.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from .completion import complete_services
from .edges import rate, success
from .get import breakers_text, endpoint_health, port_text
from .output import (
    BAD,
    FAINT,
    STRONG,
    Cell,
    ago,
    colors,
    echo_data,
    expiry,
    indented,
    labels_text,
    output_option,
    paint,
    plural,
    table,
)
from .target import Asked, remote_options

BUILT_IN = "built-in"

Json = Any
Data = Mapping[str, Json]


@click.group()
def describe() -> None:
    """Show everything about one service."""


@describe.command()
@click.argument("name", shell_complete=complete_services)
@output_option("text", "wide", "json", "yaml")
@remote_options
def service(name: str, output: str, asked: Asked) -> None:
    """Show everything about a service.

    Its versions, endpoints with health and breakers as their callers see them, routes, callers and callees, effective
    policy and where it comes from (with -o wide also what is built in).
    """
    from urllib.parse import quote

    from .remote import ApiError, connect

    with connect(asked) as remote:
        try:
            data = remote.get(f"/v1/services/{quote(name, safe='')}")
        except ApiError as error:
            if error.status == 404:
                error.help = _nearest(name, remote.get("/v1/services").get("services") or [])
            raise
    if output in ("text", "wide"):
        click.echo(render(data, time.time(), colors(sys.stdout), output == "wide"), color=True)
    else:
        echo_data(data, output)


def _nearest(name: str, services: Sequence[Data]) -> str:
    from sidecar.model.problems import suggest

    names = [str(each.get("name")) for each in services]
    return suggest(name, names) or (f"known: {', '.join(names[:20])}" if names else "there is no service yet")


def render(data: Data, now: float, color: bool, wide: bool = False) -> str:
    """The whole page; `wide`: with what is built in."""
    blocks = [_summary(data, now, color)]
    for title, make in BLOCKS.items():
        rows, head = make(data, now)
        if rows:
            blocks.append(f"{paint(title, STRONG, color)}\n{indented(table(rows, head, color))}")
    settings = data.get("policy") or []
    stated = [each for each in settings if wide or each.get("level") != BUILT_IN]
    policy = [paint("Effective policy", STRONG, color)]
    if stated:
        policy.append(indented(table(*_policy(stated), color)))
    if len(settings) > len(stated):
        rest = f"{plural(len(settings) - len(stated), 'setting')}{' more' if stated else ''} as built in (-o wide)"
        policy.append(f"  {rest}; authorization: pillion explain {data.get('name')}")
    if settings:
        blocks.append("\n".join(policy))
    return "\n\n".join(blocks)


def _summary(data: Data, now: float, color: bool) -> str:
    document = data.get("document") or {}
    endpoints = data.get("endpoints") or []
    healthy = sum(1 for each in endpoints if each.get("healthy") is not False and each.get("state") != "gone")
    rows: list[tuple[Cell, Cell]] = [
        ("ports", ", ".join(port_text(port) for port in data.get("ports") or []) or "-"),
        ("mtls", str(data["mtls"])) if data.get("mtls") else ("", ""),
        ("concurrency", str(data["concurrency"])) if data.get("concurrency") else ("", ""),
        ("owners", ", ".join(data.get("owners") or ()) or "-") if "owners" in data else ("", ""),
        (
            "endpoints",
            (f"{healthy} of {len(endpoints)} healthy", "" if endpoints and healthy == len(endpoints) else BAD),
        ),
        ("policy", _document(document, now)),
    ]
    if data.get("problem"):
        rows.append(("problem", (f"{data['problem']}; the last good policy holds", BAD)))
    name = paint(str(data.get("name")), STRONG, color)
    return f"{name}\n{indented(table([row for row in rows if row[0]], (), color))}"


def _document(document: Data, now: float) -> str:
    if not document:
        return "none applied for this service; defaults and what is built in hold"
    when = f", {ago(document['applied'], now)}" if document.get("applied") else ""
    place = f"{document.get('file')}:{document.get('line')}"
    return f"{place}, change {document.get('change')} by {document.get('author')}{when}"


Block = tuple[list[list[Cell]], tuple[str, ...]]


def _versions(data: Data, now: float) -> Block:
    rows: list[list[Cell]] = [
        [str(each.get("name")), labels_text(each.get("labels")), _count(each.get("endpoints"))]
        for each in data.get("versions") or []
    ]
    return rows, ("VERSION", "LABELS", "ENDPOINTS")


def _count(value: Json) -> Cell:
    return str(value) if value else ("0", BAD)


def _endpoints(data: Data, now: float) -> Block:
    rows: list[list[Cell]] = []
    for each in data.get("endpoints") or []:
        rows.append(
            [
                str(each.get("address")),
                str(each.get("version") or "-"),
                endpoint_health(each),
                breakers_text(each),
                str(each.get("weight", 1)),
                expiry(each.get("certificate_not_after"), now),
                str(each.get("sidecar") or "-"),
                str(each.get("reason") or ""),
            ]
        )
    return rows, ("ENDPOINT", "VERSION", "HEALTH", "BREAKERS", "WEIGHT", "CERTIFICATE", "SIDECAR", "")


def _evidence(data: Data, now: float) -> Block:
    """Why callers avoid an endpoint."""
    rows: list[list[Cell]] = [
        [str(each.get("address")), str(told.get("caller")), str(told.get("text"))]
        for each in data.get("endpoints") or []
        for told in each.get("evidence") or []
    ]
    return rows, ("ENDPOINT", "CALLER", "WHAT HAPPENED LAST")


def _limit_shares(data: Data, now: float) -> Block:
    """Of the global rate limits: what each instance may use, and what it was asked."""

    def percent(value: Json) -> Cell:
        return f"{100 * value:.1f}%" if isinstance(value, int | float) else "-"

    rows: list[list[Cell]] = [
        [str(each.get("address") or "-"), percent(each.get("share")), percent(each.get("demand")), str(each["sidecar"])]
        for each in data.get("limit_shares") or []
    ]
    return rows, ("ENDPOINT", "SHARE", "DEMAND", "SIDECAR")


def _routes(data: Data, now: float) -> Block:
    rows: list[list[Cell]] = [
        [str(each.get(key) or "-") for key in ("name", "match", "to", "tries", "source")]
        for each in data.get("routes") or []
    ]
    return rows, ("ROUTE", "MATCH", "TO", "TRIES", "DEFINED")


def _policy(settings: Sequence[Data]) -> Block:
    rows: list[list[Cell]] = []
    for each in settings:
        level = str(each.get("level") or "-")
        style = FAINT if level == BUILT_IN else ""
        overrode = overrode_text(each.get("overrode"))
        cells = (each.get("key"), each.get("value"), level, each.get("source") or "-", overrode)
        rows.append([(str(cell), style) for cell in cells])
    return rows, ("SETTING", "VALUE", "LEVEL", "WHERE", "OVERRODE")


def overrode_text(overrode: Json) -> str:
    """What a value took the place of, however deep."""
    if isinstance(overrode, str):
        return overrode
    told = []
    for each in overrode or ():
        if isinstance(each, str):
            told.append(each)
        else:
            place = f", {each['source']}" if each.get("source") else ""
            told.append(f"{each.get('value')} ({each.get('level')}{place})")
    return ", ".join(told)


def _edges(key: str, head: str) -> Callable[[Data, float], Block]:
    def block(data: Data, now: float) -> Block:
        rows: list[list[Cell]] = [
            [
                str(each.get("service")),
                rate(each.get("requests_per_s")),
                rate(each.get("failures_per_s")),
                success(each),
            ]
            for each in data.get(key) or []
        ]
        return rows, (head, "REQUESTS/S", "FAILURES/S", "SUCCESS")

    return block


BLOCKS: Mapping[str, Callable[[Data, float], Block]] = {
    "Versions": _versions,
    "Endpoints": _endpoints,
    "Avoided": _evidence,
    "Global rate limits": _limit_shares,
    "Routes": _routes,
    "Callers": _edges("callers", "CALLER"),
    "Callees": _edges("callees", "CALLEE"),
}
