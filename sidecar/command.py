"""`pillion sidecar`: flags to Settings.

Each flag is also an environment variable PILLION_*. Must not load the data path before the flags are known to be good.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    ParamType = click.ParamType[Any]
else:
    ParamType = click.ParamType  # cannot be subscripted before click 8.4


class AddressType(ParamType):
    """HOST:PORT, or `off`."""

    name = "HOST:PORT|off"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        return None if value == "off" else parse_address(value, self, param, ctx)


class AppType(ParamType):
    """[PORT_NAME=]HOST:PORT."""

    name = "[PORT=]HOST:PORT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        port, equals, address = value.rpartition("=")
        if equals and not port:
            self.fail(f"{value!r} names no port before the equals sign", param, ctx)
        return port, parse_address(address, self, param, ctx)


def parse_address(text: str, kind: ParamType, param: click.Parameter | None, ctx: click.Context | None) -> Any:
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        kind.fail(f"{text!r} is not HOST:PORT (a port is a number up to 65535)", param, ctx)
    host = host.removeprefix("[").removesuffix("]")
    if not host:
        kind.fail(f"{text!r} has no host; write 127.0.0.1:{port}, say", param, ctx)
    return host, int(port)


ADDRESS, APP = AddressType(), AppType()
PATH = click.Path(path_type=Path)


@click.command(context_settings={"auto_envvar_prefix": "PILLION"})
@click.option("--service", required=True, metavar="NAME", help="The service beside which this sidecar stands.")
@click.option(
    "--app",
    "apps",
    multiple=True,
    type=APP,
    envvar="PILLION_APP",
    help="Where the application listens [127.0.0.1 and the port declared].",
)
@click.option(
    "--policy", multiple=True, required=True, type=PATH, help="Policy file or folder; may be given several times."
)
@click.option("--identity", required=True, type=PATH, help="Directory with cert.pem, key.pem and bundle.pem.")
@click.option("--inbound", type=ADDRESS, default="0.0.0.0:15006", show_default=True, help="Mutual TLS from the mesh.")
@click.option(
    "--outbound", type=ADDRESS, default="127.0.0.1:15001", show_default=True, help="The application's way out."
)
@click.option("--admin", default="127.0.0.1:15000", show_default=True, help="HOST:PORT on loopback, unix:PATH, or off.")
@click.option("--strict", is_flag=True, help="Refuse destinations outside the mesh instead of passing them through.")
@click.option("--intercept", is_flag=True, help="Also serve what `pillion intercept up` leads here (Linux).")
@click.option(
    "--allow-filters", multiple=True, metavar="PREFIX", help="Python packages from which a policy may name filters."
)
@click.option("--filter-path", multiple=True, metavar="DIR", help="A further directory to import filters from.")
@click.option("--access-log", default="off", show_default=True, help="stdout, off, or a file.")
@click.option(
    "--log-level", default="info", show_default=True, type=click.Choice(["debug", "info", "warning", "error"])
)
@click.option("--log-format", default="text", show_default=True, type=click.Choice(["text", "json"]))
@click.option(
    "--grace",
    "grace_s",
    envvar="PILLION_GRACE",
    default=20.0,
    show_default=True,
    type=click.FloatRange(0, 25),
    help="Seconds that the application may still call out after the sidecar was told to end.",
)
@click.option("--ready-fd", type=click.IntRange(0), help="Write the addresses as JSON to this descriptor when ready.")
@click.option("--print-config", is_flag=True, help="Print the settings in force as JSON and end.")
def sidecar(print_config: bool, **options: Any) -> int:
    """Run the sidecar of one service.

    Each option can also be given as an environment variable: PILLION_SERVICE, PILLION_POLICY and so on.
    """
    options["apps"] = dict(options["apps"])
    if options["admin"] == "off":
        options["admin"] = None
    if print_config:
        click.echo(json.dumps(options, default=str, indent=2))
        return 0
    from .app import Settings, run

    return run(Settings(**options))
