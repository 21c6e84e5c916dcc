"""`pillion control-plane`: flags to Settings.

Each flag is also an environment variable PILLION_CONTROL_PLANE_*. Must not load the server before the flags are known
to be good.
"""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import click

from certs.spiffe import SpiffeError, check_trust_domain
from sidecar.command import ADDRESS, parse_address

from .cli.durations import parse_duration

PATH = click.Path(path_type=Path)
DEFAULT_STATE = "pillion-control-plane"


def duration(ctx: click.Context, param: click.Parameter, value: str) -> timedelta:
    return parse_duration(value)


def address(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, int]:
    """HOST:PORT."""
    found: tuple[str, int] = parse_address(value, ADDRESS, param, ctx)
    return found


def _trust_domain(ctx: click.Context, param: click.Parameter, value: str) -> str:
    try:
        return check_trust_domain(value)
    except SpiffeError as error:
        raise click.BadParameter(str(error)) from None


@click.command(
    "control-plane",
    context_settings={"auto_envvar_prefix": "PILLION_CONTROL_PLANE", "help_option_names": ["-h", "--help"]},
)
@click.option(
    "--store",
    default="embedded",
    show_default=True,
    metavar="STORE",
    help="embedded (a file in the state directory), or etcd://HOST:PORT[,HOST:PORT…].",
)
@click.option(
    "--state-dir",
    type=PATH,
    default=DEFAULT_STATE,
    show_default=f"./{DEFAULT_STATE}",
    help="Where this control plane keeps its keys and, with --store embedded, everything.",
)
@click.option(
    "--listen-mesh",
    callback=address,
    default="0.0.0.0:15010",
    show_default=True,
    metavar="HOST:PORT",
    help="For sidecars: mutual TLS.",
)
@click.option(
    "--listen-join",
    callback=address,
    default="0.0.0.0:15011",
    show_default=True,
    metavar="HOST:PORT",
    help="For who joins, and for operators: TLS and tokens.",
)
@click.option(
    "--advertise",
    metavar="HOST",
    help="The address by which others reach this control plane.  [default: the host's own where it listens everywhere]",
)
@click.option("--name", metavar="NAME", help="The name of this replica.  [default: the host's name]")
@click.option("--ca", type=PATH, metavar="DIR", help="The authority (pillion ca init).  [default: made at first start]")
@click.option(
    "--trust-domain",
    callback=_trust_domain,
    default="mesh.local",
    show_default=True,
    help="The name of the mesh, for an authority that is made at first start.",
)
@click.option("--leaf-ttl", callback=duration, default="24h", show_default=True, help="How long a certificate lives.")
@click.option(
    "--rejoin-grace",
    callback=duration,
    default="7d",
    show_default=True,
    help="How long after its end a certificate can still be renewed by who has its key; 0s: not at all.",
)
@click.option("--policy-dir", type=PATH, metavar="DIR", help="A folder of policy files to follow.")
@click.option("--etcd-cacert", type=PATH, metavar="FILE", help="The authority of etcd's certificates.")
@click.option("--etcd-cert", type=PATH, metavar="FILE", help="Our certificate towards etcd.")
@click.option("--etcd-key", type=PATH, metavar="FILE", help="Its key.")
@click.option("--etcd-user", metavar="NAME", help="Our name towards etcd.")
@click.option("--etcd-password-file", type=PATH, metavar="FILE", help="The password, in a file that only we can read.")
@click.option("--etcd-prefix", default="/pillion/v1/", show_default=True, help="What stands before our keys in etcd.")
@click.option("--admin-token-file", type=PATH, metavar="FILE", help="Make a new admin token and write it there.")
@click.option(
    "--log-level", default="info", show_default=True, type=click.Choice(["debug", "info", "warning", "error"])
)
@click.option("--log-format", default="text", show_default=True, type=click.Choice(["text", "json"]))
@click.option("--ready-fd", type=click.IntRange(0), help="Write the addresses as JSON to this descriptor when ready.")
@click.option("--print-config", is_flag=True, help="Print the settings in force as JSON and end.")
def control_plane(print_config: bool, **options: Any) -> int:
    """Run the control plane: registry, policy, certificates and distribution.

    The first start makes what is missing (an authority, a store, an admin token in the state directory) and says so.
    Each option can also be given as an environment variable: PILLION_CONTROL_PLANE_STORE and so on.
    """
    if print_config:
        click.echo(json.dumps(options, default=str, indent=2))
        return 0
    from .app import Settings, run

    return run(Settings(**options))
