"""`pillion get`: what a control plane knows, one kind at a time.

Must not know how lists are shown; here stand the kinds and their columns.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from .completion import complete_services
from .listing import Column, Item, Listing, show, text
from .output import BAD, DOUBTFUL, FAINT, FORMATS, GOOD, Cell, ago, expiry, labels_text, output_option
from .target import Asked, remote_options

Command = TypeVar("Command", bound=Callable[..., Any])


def _service_health(item: Item, now: float) -> Cell:
    healthy, count = item.get("healthy", 0), item.get("endpoints", 0)
    style = "" if not count else GOOD if healthy == count else BAD if not healthy else DOUBTFUL
    return f"{healthy}/{count}", style


def _ports(item: Item, now: float) -> Cell:
    ports = item.get("ports") or []
    return ",".join(port_text(port) for port in ports) or "-"


def port_text(port: Any) -> str:
    if not isinstance(port, dict):
        return str(port)
    return f"{port.get('name', '')}:{port.get('number', '?')}/{port.get('protocol', 'http')}"


def endpoint_health(item: Item, now: float = 0.0) -> Cell:
    state = item.get("state", "up")
    if item.get("healthy") is False:
        return "unhealthy", BAD
    return {"static": ("static", FAINT), "suspect": ("suspect", DOUBTFUL)}.get(state, ("healthy", GOOD))


def breakers_text(item: Item, now: float = 0.0) -> Cell:
    """What callers see of an endpoint; nothing is said of closed breakers."""
    breakers = item.get("breakers") or []
    told = ", ".join(f"{each.get('state')} for {each.get('caller')}" for each in breakers)
    return (told, BAD) if told else "-"


def _connected(item: Item, now: float) -> Cell:
    return ("connected", GOOD) if item.get("connected") else ("away", BAD)


def sidecar_policy(item: Item, now: float = 0.0) -> Cell:
    if item.get("rejected"):
        return "rejected", BAD
    if item.get("current"):
        return "current", GOOD
    return ("behind", DOUBTFUL) if item.get("connected") else ("-", "")


def _rejected(item: Item, now: float) -> Cell:
    rejected = item.get("rejected") or {}
    return "; ".join(f"{name}: {reason}" for name, reason in rejected.items()) or "-"


def expires_cell(key: str) -> Callable[[Item, float], Cell]:
    return lambda item, now: expiry(item.get(key), now)


def ago_cell(key: str) -> Callable[[Item, float], Cell]:
    return lambda item, now: ago(item[key], now) if item.get(key) else "-"


def _health_word(item: Item, now: float) -> Cell:
    healthy = item.get("healthy")
    return "-" if healthy is None else ("healthy", GOOD) if healthy else ("unhealthy", BAD)


def _labels(item: Item, now: float) -> Cell:
    return labels_text(item.get("labels"))


def _subject(item: Item, now: float) -> Cell:
    if item.get("kind") == "join":
        return f"service {item.get('service')}"
    teams = ",".join(item.get("teams") or ())
    return f"{item.get('role')} {item.get('operator')}{f' ({teams})' if teams else ''}"


def _uses(item: Item, now: float) -> Cell:
    if item.get("kind") != "join":
        return "-"
    uses = item.get("uses")
    return "any" if uses is None else (str(uses), "" if uses else FAINT)


def _address_of(item: Item) -> str:
    return f"{item.get('service')}/{item.get('address')}"


SERVICES = Listing(
    "/v1/services", "services", "service", lambda item: str(item["name"]),
    (
        Column("SERVICE", text("name")),
        Column("PORTS", _ports),
        Column("HEALTHY", _service_health),
        Column("VERSIONS", text("versions")),
        Column("MTLS", text("mtls")),
        Column("CALLERS", text("callers", "0")),
        Column("OWNERS", text("owners"), wide=True),
        Column("POLICY", text("policy"), wide=True),
    ),
    "no services yet. Next: pillion policy apply -f mesh.yaml, or pillion token create --service NAME",
)  # fmt: skip
ENDPOINTS = Listing(
    "/v1/endpoints", "endpoints", "endpoint", _address_of,
    (
        Column("SERVICE", text("service")),
        Column("ADDRESS", text("address")),
        Column("VERSION", text("version")),
        Column("HEALTH", endpoint_health),
        Column("BREAKERS", breakers_text),
        Column("WEIGHT", text("weight")),
        Column("SIDECAR", text("sidecar"), wide=True),
        Column("LABELS", _labels, wide=True),
        Column("CERTIFICATE", expires_cell("certificate_not_after"), wide=True),
        Column("REASON", text("reason"), wide=True),
    ),
    "no endpoints. A sidecar that joins registers its own: pillion token create --service NAME",
)  # fmt: skip
SIDECARS = Listing(
    "/v1/sidecars", "sidecars", "sidecar", lambda item: str(item["id"]),
    (
        Column("SIDECAR", text("id")),
        Column("SERVICE", text("service")),
        Column("HOST", text("name")),
        Column("STREAM", _connected),
        Column("POLICY", sidecar_policy),
        Column("HEALTH", _health_word),
        Column("CERTIFICATE", expires_cell("not_after")),
        Column("ADDRESS", text("address"), wide=True),
        Column("REPLICA", text("replica"), wide=True),
        Column("VERSION", text("version"), wide=True),
        Column("REJECTED", _rejected, wide=True),
    ),
    "no sidecars have joined. Next: pillion token create --service NAME",
)  # fmt: skip
POLICIES = Listing(
    "/v1/policy", "documents", "document", lambda item: str(item["name"]),
    (
        Column("DOCUMENT", text("name")),
        Column("DEFINED", lambda item, now: f"{item.get('file')}:{item.get('line')}"),
        Column("CHANGE", text("change")),
        Column("AUTHOR", text("author")),
        Column("APPLIED", ago_cell("applied")),
        Column("LINES", lambda item, now: str(len(str(item.get("text", "")).splitlines())), wide=True),
    ),
    "no policy has been applied. Next: pillion policy apply -f mesh.yaml",
)  # fmt: skip
TOKENS = Listing(
    "/v1/tokens", "tokens", "token", lambda item: str(item["id"]),
    (
        Column("TOKEN", text("id")),
        Column("KIND", text("kind")),
        Column("FOR", _subject),
        Column("USES", _uses),
        Column("EXPIRES", expires_cell("expires")),
        Column("BY", text("by"), wide=True),
        Column("CREATED", ago_cell("created"), wide=True),
    ),
    "no tokens. Next: pillion token create --service NAME",
)  # fmt: skip
REPLICAS = Listing(
    "/v1/replicas", "replicas", "replica", lambda item: str(item["name"]),
    (
        Column("REPLICA", text("name")),
        Column("MESH", text("mesh")),
        Column("JOIN", text("join")),
        Column("VERSION", text("version")),
        Column("STARTED", ago_cell("started")),
        Column("FOLDER", text("folder"), wide=True),
        Column("ISSUER", text("issuer"), wide=True),
    ),
    "no replica is running",
)  # fmt: skip


class _Kinds(click.Group):
    """Takes the singular too."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        aliases = {"policy": "policies"} | {name.removesuffix("s"): name for name in self.commands}
        return super().get_command(ctx, aliases.get(cmd_name, cmd_name))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0] if args else ""
        if not ctx.resilient_parsing and name and not name.startswith("-") and self.get_command(ctx, name) is None:
            raise click.UsageError(f"there is no kind {name!r}; known: {', '.join(self.list_commands(ctx))}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=_Kinds)
def get() -> None:
    """List what a control plane knows."""


def _options(command: Command) -> Command:
    for decorate in (
        remote_options,
        click.option("-w", "--watch", is_flag=True, help="Go on and show what changes, until Ctrl-C."),
        output_option(*FORMATS),
    ):
        command = decorate(command)
    return command


@get.command()
@click.argument("names", nargs=-1, metavar="[SERVICE]...", shell_complete=complete_services)
@_options
def services(names: tuple[str, ...], output: str, watch: bool, asked: Asked) -> int:
    """Services, and how many of their endpoints are healthy."""
    return _show(SERVICES, asked, output, names, watch)


@get.command()
@click.argument("service", required=False, shell_complete=complete_services)
@_options
def endpoints(service: str | None, output: str, watch: bool, asked: Asked) -> int:
    """Endpoints, of all services or of one."""
    return _show(ENDPOINTS, asked, output, (), watch, service=service)


@get.command()
@click.argument("ids", nargs=-1, metavar="[SIDECAR]...")
@_options
def sidecars(ids: tuple[str, ...], output: str, watch: bool, asked: Asked) -> int:
    """Sidecars that have joined: whether they are connected, and what they hold."""
    return _show(SIDECARS, asked, output, ids, watch)


@get.command()
@click.argument("names", nargs=-1, metavar="[DOCUMENT]...")
@_options
def policies(names: tuple[str, ...], output: str, watch: bool, asked: Asked) -> int:
    """Policy documents that are applied; `pillion policy get` prints them."""
    return _show(POLICIES, asked, output, names, watch)


@get.command()
@click.argument("ids", nargs=-1, metavar="[TOKEN]...")
@_options
def tokens(ids: tuple[str, ...], output: str, watch: bool, asked: Asked) -> int:
    """Tokens, without their secrets."""
    return _show(TOKENS, asked, output, ids, watch)


@get.command()
@click.argument("names", nargs=-1, metavar="[REPLICA]...")
@_options
def replicas(names: tuple[str, ...], output: str, watch: bool, asked: Asked) -> int:
    """Control planes that are running."""
    return _show(REPLICAS, asked, output, names, watch)


def _show(
    listing: Listing, asked: Asked, output: str, names: tuple[str, ...], watch: bool, **query: str | int | None
) -> int:
    from .remote import connect

    return show(connect(asked), listing, output, names, watch, **query)
