"""`pillion intercept up|down|show`: the ruleset from the command line.

Loads neither Trio nor the data plane. Exit codes: 0 done or in place, 1 not in place, refused or not possible, 2 usage.
stdout is data, stderr is everything else.
"""

import grp
import json
import pwd
from collections.abc import Callable
from typing import TypeVar

import click

from .listing import Installed, Redirect
from .nft import InterceptError, down, look, up
from .ruleset import (
    INBOUND_PORT,
    MARK,
    OUTBOUND_PORT,
    OUTPUT,
    PREROUTING,
    TABLE,
    VERSION,
    ConfigError,
    InterceptConfig,
    render,
    render_removal,
)

T = TypeVar("T")


def _ids(kind: str, of_name: Callable[[str], int]) -> Callable[..., tuple[int, ...]]:
    """A callback that takes numeric ids and this machine's names."""

    def convert(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[int, ...]:
        numbers = []
        for value in values:
            try:
                numbers.append(int(value) if value.isdecimal() else of_name(value))
            except KeyError:
                raise click.BadParameter(f"there is no {kind} {value!r} on this machine", ctx, param) from None
        return tuple(numbers)

    return convert


def _mark(ctx: click.Context, param: click.Parameter, value: str) -> int:
    try:
        return int(value, 0)
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a number like {MARK:#x}", ctx, param) from None


_UIDS = _ids("user", lambda name: pwd.getpwnam(name).pw_uid)
_GIDS = _ids("group", lambda name: grp.getgrnam(name).gr_gid)
_PORT = click.IntRange(1, 65535)
_OUTPUT_FORM = click.option(
    "-o", "--output", "form", type=click.Choice(["table", "json"]), default="table", show_default=True
)


@click.group()
def intercept() -> None:
    """Transparent interception of this network namespace's TCP (Linux, needs CAP_NET_ADMIN)."""


@intercept.command("up")
@click.option("--outbound-port", type=_PORT, default=OUTBOUND_PORT, show_default=True, help="Takes what leaves.")
@click.option("--inbound-port", type=_PORT, default=INBOUND_PORT, show_default=True, help="Takes what arrives.")
@click.option("--app-port", "app_ports", type=_PORT, multiple=True, help="Capture what arrives for this port; repeat.")
@click.option(
    "--policy", "policy", type=click.Path(), multiple=True, help="Capture the ports that it declares; repeat."
)
@click.option("--service", default=None, help="Whose ports these are, with --policy.")
@click.option("--exclude-uid", "uids", callback=_UIDS, multiple=True, help="Leave this user's connections alone.")
@click.option("--exclude-gid", "gids", callback=_GIDS, multiple=True, help="Leave this group's connections alone.")
@click.option("--exclude-cidr", "cidrs", multiple=True, help="Leave connections to these addresses alone.")
@click.option("--exclude-port", "ports", type=_PORT, multiple=True, help="Leave connections to this port alone.")
@click.option(
    "--mark", callback=_mark, default=f"{MARK:#x}", show_default=True, help="Firewall mark of the sidecar's sockets."
)
@click.option("--owner", default=TABLE, show_default=True, help="Whose interception this is.")
@click.option("--strict", is_flag=True, help="The sidecar refuses destinations that it does not know.")
@click.option("--force", is_flag=True, help="Replace a table that pillion or this owner did not make.")
@click.option("--dry-run", is_flag=True, help="Print the ruleset and change nothing.")
@_OUTPUT_FORM
def up_command(
    outbound_port: int,
    inbound_port: int,
    app_ports: tuple[int, ...],
    policy: tuple[str, ...],
    service: str | None,
    uids: tuple[int, ...],
    gids: tuple[int, ...],
    cidrs: tuple[str, ...],
    ports: tuple[int, ...],
    mark: int,
    owner: str,
    strict: bool,
    force: bool,
    dry_run: bool,
    form: str,
) -> None:
    """Put the ruleset in place, in one transaction; doing it again changes nothing.

    Without --app-port the declared ports of --service in --policy are captured; without either, nothing inbound is.
    """
    if bool(policy) != (service is not None):
        raise click.UsageError("--policy and --service belong together")
    if service is not None and not app_ports:
        app_ports = _declared(policy, service)
    try:
        config = InterceptConfig(
            outbound_port=outbound_port,
            inbound_port=inbound_port,
            app_ports=app_ports,
            excluded_uids=uids,
            excluded_gids=gids,
            excluded_cidrs=cidrs,
            excluded_ports=ports,
            mark=mark,
            owner=owner,
            strict=strict,
        )
    except ConfigError as problem:
        raise click.UsageError(str(problem)) from None
    if dry_run:
        click.echo(render(config), nl=False)
        return
    change = _done(lambda: up(config, force))
    _say(form, {"found": change.found.value, "changed": change.changed})
    click.echo(
        f"interception is in place: outbound to {outbound_port}"
        + (f", inbound {_numbers(config.app_ports)} to {inbound_port}" if config.app_ports else ", nothing inbound")
        + f" (was {change.found.value})",
        err=True,
    )


@intercept.command("down")
@click.option("--owner", default=None, help="Remove it only if it is this owner's.")
@click.option("--force", is_flag=True, help="Remove a table of that name that pillion did not make.")
@click.option("--dry-run", is_flag=True, help="Print the transaction and change nothing.")
@_OUTPUT_FORM
def down_command(owner: str | None, force: bool, dry_run: bool, form: str) -> None:
    """Remove the ruleset; nothing else is touched."""
    if dry_run:
        click.echo(render_removal(), nl=False)
        return
    removed = _done(lambda: down(owner, force))
    _say(form, {"removed": removed})
    click.echo("interception is removed" if removed else "there was no interception to remove", err=True)


@intercept.command("show")
@_OUTPUT_FORM
def show_command(form: str) -> None:
    """Show what is in place; exit code 1 if nothing of ours is."""
    installed = _done(look)
    if form == "json":
        click.echo(json.dumps(_describe(installed), indent=2))
    elif installed is not None:
        click.echo(_table(installed))
    if installed is None:
        click.echo("no interception in this network namespace", err=True)
        raise SystemExit(1)
    if installed.marker is None:
        click.echo("the table inet pillion was not made by pillion", err=True)
        raise SystemExit(1)


def _declared(policy: tuple[str, ...], service: str) -> tuple[int, ...]:
    """The ports that a policy declares for a service."""
    from pathlib import Path

    from sidecar.model.load import load_policy
    from sidecar.model.problems import render as render_problems

    loaded = load_policy([Path(path) for path in policy])
    if loaded.snapshot is None:
        click.echo(render_problems(loaded.errors, loaded.texts), nl=False, err=True)
        raise SystemExit(2)
    found = loaded.snapshot.services.get(service)
    if found is None:
        known = ", ".join(sorted(loaded.snapshot.services)[:20])
        raise click.UsageError(f"the policy has no service {service!r}; it has: {known}")
    return tuple(port.number for port in found.ports)


def _done(action: Callable[[], T]) -> T:
    try:
        return action()
    except InterceptError as problem:
        click.echo(f"error: {problem}", err=True)
        raise SystemExit(1) from None


def _say(form: str, facts: dict[str, object]) -> None:
    if form == "json":
        click.echo(json.dumps(facts))


def _describe(installed: Installed | None) -> dict[str, object]:
    if installed is None:
        return {"installed": False}
    marker = installed.marker
    return {
        "installed": True,
        "ours": marker is not None,
        "owner": marker.owner if marker else None,
        "version": marker.version if marker else None,
        "strict": marker.strict if marker else None,
        "digest": marker.digest if marker else None,
        "outbound": _redirect(installed.redirect(OUTPUT)),
        "inbound": _redirect(installed.redirect(PREROUTING)),
        "nft": installed.raw.get("nftables"),
    }


def _redirect(redirect: Redirect | None) -> dict[str, object] | None:
    if redirect is None:
        return None
    return {"port": redirect.to_port, "app_ports": list(redirect.ports), "connections": redirect.connections}


def _table(installed: Installed) -> str:
    rows = [("DIRECTION", "CAPTURED", "TO PORT", "CONNECTIONS")]
    for title, chain in (("outbound", OUTPUT), ("inbound", PREROUTING)):
        redirect = installed.redirect(chain)
        if redirect is None:
            rows.append((title, "nothing", "-", "-"))
        else:
            captured = _numbers(redirect.ports) if redirect.ports else "all TCP"
            rows.append((title, captured, str(redirect.to_port), str(redirect.connections)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    marker = installed.marker
    if marker is not None:
        note = "" if marker.version == VERSION else f" (this pillion makes version {VERSION})"
        strict = "yes" if marker.strict else "no"
        lines.append(f"owner {marker.owner}, strict {strict}, ruleset version {marker.version}{note}")
    return "\n".join(lines)


def _numbers(ports: tuple[int, ...]) -> str:
    shown = ",".join(map(str, ports[:8]))
    return shown if len(ports) <= 8 else f"{shown},… ({len(ports)})"


if __name__ == "__main__":
    intercept()
