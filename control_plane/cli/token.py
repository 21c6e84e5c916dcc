"""`pillion token`: the tokens with which sidecars join and operators ask.

Must not know what stands in a token. Invariant: of `create`, stdout holds the token and nothing else.
"""

from typing import Any

import click

from .completion import complete_services
from .durations import parse_duration
from .get import TOKENS
from .listing import show
from .output import FORMATS, echo_data, moment, note, output_option, span
from .target import Asked, remote_options

JOIN_TTL, OPERATOR_TTL = "1h", "30d"
ROLES = ("viewer", "operator", "admin")


@click.group()
def token() -> None:
    """Make, list and revoke tokens for sidecars and operators."""


@token.command()
@click.option(
    "--service", metavar="NAME", shell_complete=complete_services, help="A join token: a sidecar joins as this."
)
@click.option("--uses", metavar="N|any", help="How many sidecars may join with it.  [default: 1]")
@click.option("--operator", metavar="NAME", help="An operator token instead: for this person or program.")
@click.option("--role", type=click.Choice(ROLES), help="What the operator may do.")
@click.option("--team", "teams", multiple=True, metavar="TEAM", help="A team of the operator's; may be repeated.")
@click.option(
    "--ttl",
    metavar="DURATION",
    help=f"How long it is good.  [default: {JOIN_TTL} to join, {OPERATOR_TTL} for operators]",
)
@output_option("text", "json")
@remote_options
def create(
    service: str | None,
    uses: str | None,
    operator: str | None,
    role: str | None,
    teams: tuple[str, ...],
    ttl: str | None,
    output: str,
    asked: Asked,
) -> None:
    """Make a token, and print it.

    \b
    pillion token create --service reviews               one sidecar may join as reviews, within an hour
    pillion token create --operator mia --role operator --team team-reviews

    The token is on stdout alone, so that TOKEN=$(pillion token create …) works. It is shown this once.
    """
    body = _body(service, uses, operator, role, teams)
    ttl_s = int(parse_duration(ttl or (JOIN_TTL if service is not None else OPERATOR_TTL), "--ttl").total_seconds())
    body["ttl_s"] = ttl_s
    from .remote import connect

    with connect(asked) as remote:
        made = remote.post("/v1/tokens", body)
    if output == "json":
        echo_data({**body, **made}, "json")
        return
    until = (
        f"good for {span(ttl_s)}, until {moment(made['expires'])}; revoke it with: pillion token revoke {made['id']}"
    )
    if service is not None:
        often = "by any number of sidecars" if body["uses"] is None else f"by {body['uses']} sidecar{_s(body['uses'])}"
        note(f"join token {made['id']} for the service {service}, to be used {often}\n{until}")
        note(f"Next: give it to pillion sidecar --service {service} --token-file FILE")
    else:
        note(f"operator token {made['id']} for {operator} ({role}{', ' + ', '.join(teams) if teams else ''})\n{until}")
        note("Next: there, pillion login --token-file FILE")
    click.echo(made["token"])


def _s(count: int) -> str:
    return "" if count == 1 else "s"


def _body(
    service: str | None, uses: str | None, operator: str | None, role: str | None, teams: tuple[str, ...]
) -> dict[str, Any]:
    if (service is None) == (operator is None):
        raise click.UsageError("say whom it is for: --service NAME for a sidecar, or --operator NAME for a person")
    if service is not None:
        if role is not None or teams:
            raise click.UsageError("--role and --team belong to --operator; a sidecar has no role")
        return {"kind": "join", "service": service, "uses": _uses(uses)}
    if uses is not None:
        raise click.UsageError("--uses belongs to --service; an operator token may be used until it expires")
    if role is None:
        raise click.UsageError(f"an operator needs a --role: {', '.join(ROLES)}")
    return {"kind": "operator", "operator": operator, "role": role, "teams": list(teams)}


def _uses(text: str | None) -> int | None:
    if text is None:
        return 1
    if text == "any":
        return None
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= 1_000_000:
        raise click.BadParameter(f"{text!r} is neither a number from 1 nor any", param_hint="--uses")
    return int(text)


@token.command("ls")
@click.option("-w", "--watch", is_flag=True, help="Go on and show what changes, until Ctrl-C.")
@output_option(*FORMATS)
@remote_options
def list_tokens(watch: bool, output: str, asked: Asked) -> int:
    """List the tokens, without their secrets."""
    from .remote import connect

    return show(connect(asked), TOKENS, output, (), watch)


@token.command()
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@remote_options
def revoke(ids: tuple[str, ...], asked: Asked) -> int:
    """Make tokens void. Sidecars that have joined stay; to shut one out: pillion cert ban."""
    from .cert import each_in_turn
    from .remote import connect

    with connect(asked) as remote:
        return each_in_turn(ids, lambda id: remote.delete(f"/v1/tokens/{id}"), "revoked")
