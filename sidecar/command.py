"""`pillion sidecar`: flags to Settings.

Each flag is also an environment variable PILLION_*. Must not load the data path before the flags are known to be good.
Invariant: a sidecar runs from files or from a control plane, never from some of both.
"""

import gc
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

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
    """[PORT_NAME=]HOST:PORT, or [PORT_NAME=]unix:PATH."""

    name = "[PORT=]HOST:PORT|unix:PATH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        if value.startswith("unix:"):
            return "", parse_unix(value, self, param, ctx)
        port, equals, address = value.partition("=") if "=unix:" in value else value.rpartition("=")
        if equals and not port:
            self.fail(f"{value!r} names no port before the equals sign", param, ctx)
        parse = parse_unix if address.startswith("unix:") else parse_address
        return port, parse(address, self, param, ctx)


def parse_address(text: str, kind: ParamType, param: click.Parameter | None, ctx: click.Context | None) -> Any:
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        kind.fail(f"{text!r} is not HOST:PORT (a port is a number up to 65535)", param, ctx)
    host = host.removeprefix("[").removesuffix("]")
    if not host:
        kind.fail(f"{text!r} has no host; write 127.0.0.1:{port}, say", param, ctx)
    return host, int(port)


def parse_unix(text: str, kind: ParamType, param: click.Parameter | None, ctx: click.Context | None) -> Any:
    path = text.removeprefix("unix:")
    if not path.startswith("/") or "\0" in path:
        kind.fail(f"{text!r}: a Unix socket is named by its whole path: unix:/run/app.sock, say", param, ctx)
    if len(path.encode()) > UNIX_PATH_BYTES_MAX:
        kind.fail(f"{text!r}: the path of a Unix socket has at most {UNIX_PATH_BYTES_MAX} bytes", param, ctx)
    return text, 0


class LabelType(ParamType):
    """NAME=VALUE."""

    name = "NAME=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        name, equals, text = value.partition("=")
        if not equals or not name:
            self.fail(f"{value!r} is not NAME=VALUE, such as version=1", param, ctx)
        if max(len(name), len(text)) > LABEL_LENGTH_MAX or not value.isprintable():
            self.fail(f"a label's name and value are printable, of {LABEL_LENGTH_MAX} characters at most", param, ctx)
        return name, text


class AdvertiseType(ParamType):
    """HOST[:PORT]."""

    name = "HOST[:PORT]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        bare = value.removeprefix("[").removesuffix("]") if value.startswith("[") and value.endswith("]") else value
        if ":" not in value or bare != value:
            host, port = bare, 0
        else:
            host, port = parse_address(value, self, param, ctx)
        if host in ("0.0.0.0", "::", ""):  # noqa: S104 - refused
            self.fail(f"{value!r} is not an address at which callers reach this sidecar", param, ctx)
        return host, port


class ControlPlaneType(ParamType):
    """https://HOST:PORT of the join listener; several are separated by commas."""

    name = "URL"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        return tuple(self._one(each.strip(), param, ctx) for each in value.split(",") if each.strip())

    def _one(self, text: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        example = f"such as https://control.example:{JOIN_PORT}"
        try:
            url = urlsplit(text if "://" in text else f"https://{text}")
            host, port = url.hostname or "", url.port or JOIN_PORT
        except ValueError:
            self.fail(f"{text!r} is not a URL; write https://HOST:PORT, {example}", param, ctx)
        if url.scheme != "https" or not host or url.path not in ("", "/") or url.query or url.username:
            self.fail(f"{text!r} is not the URL of a control plane; write https://HOST:PORT, {example}", param, ctx)
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


ADDRESS, APP = AddressType(), AppType()
JOIN_PORT = 15011
STARTING_GC = (1_000_000, 50, 100)  # modules and policy are objects that stay: there is little garbage to look for
LABEL_LENGTH_MAX, LABELS_MAX = 128, 32
TOKEN_FILE_BYTES_MAX = 16 * 1024
UNIX_PATH_BYTES_MAX = 107  # unix(7): sun_path with its final zero
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
    "--policy", multiple=True, type=PATH, help="From files: policy file or folder; may be given several times."
)
@click.option("--identity", type=PATH, help="From files: directory with cert.pem, key.pem and bundle.pem.")
@click.option(
    "--control-plane",
    type=ControlPlaneType(),
    help="From a control plane: its join address, where token and state do not name it (any more).",
)
@click.option("--token", metavar="TOKEN", help="From a control plane: the token to join with. Better in a file.")
@click.option("--token-file", type=PATH, metavar="FILE", help="The same in a file. Needed for the first start only.")
@click.option(
    "--state-dir",
    type=PATH,
    metavar="DIR",
    show_default="$STATE_DIRECTORY, or ~/.local/state/pillion/sidecar/NAME",
    help="From a control plane: keeps identity and last policy, for this sidecar alone.",
)
@click.option("--advertise", type=AdvertiseType(), help="Where callers reach us.  [default: where inbound listens]")
@click.option(
    "--label", "labels", multiple=True, type=LabelType(), envvar="PILLION_LABEL", help="What versions select by."
)
@click.option(
    "--weight", type=click.IntRange(1, 1000), default=1, show_default=True, help="Our share, relative to the others."
)
@click.option("--zone", default="", metavar="NAME", help="Where we are: endpoints of the same zone are preferred.")
@click.option(
    "--priority",
    type=click.IntRange(0, 100),
    default=0,
    show_default=True,
    help="0 serves first; others when too few of those before them are usable.",
)
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
@click.option(
    "--http2-engine",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "ngh2", "h2"]),
    help="What reads and writes HTTP/2: ngh2 (libnghttp2), h2 (in Python), or ngh2 where it can be loaded.",
)
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

    From a control plane: --token-file FILE for the first start, nothing for the next ones. From files alone: --policy
    FILE and --identity DIR.

    Each option can also be given as an environment variable: PILLION_SERVICE, PILLION_POLICY and so on.
    """
    _choose_source(options)
    options["apps"], options["labels"] = dict(options["apps"]), dict(options["labels"])
    if len(options["labels"]) > LABELS_MAX:
        raise click.UsageError(f"at most {LABELS_MAX} labels")
    if options["admin"] == "off":
        options["admin"] = None
    if print_config:
        click.echo(json.dumps(options, default=str, indent=2))
        return 0
    if options["state_dir"] is not None and not _has_state(options["state_dir"]) and options["token"] is None:
        raise click.UsageError(
            f"there is no identity in {options['state_dir']}, and no token to get one with. Make a token with: "
            f"pillion token create --service {options['service']}  and give it with --token-file (or run from files: "
            "--policy FILE and --identity DIR)"
        )
    gc.set_threshold(*STARTING_GC)
    from .app import Settings, run

    return run(Settings(**options))


def _choose_source(options: dict[str, Any]) -> None:
    """Files or a control plane; a state directory says which. Raises UsageError."""
    token_file = options.pop("token_file")
    from_files = [name for name in ("--policy", "--identity") if options[name[2:]]]
    controlled = [
        name
        for name, value in (
            ("--control-plane", options["control_plane"]),
            ("--token", options["token"]),
            ("--token-file", token_file),
            ("--state-dir", options["state_dir"]),
        )
        if value
    ]
    options["control_plane"] = options["control_plane"] or ()
    if from_files and controlled:
        raise click.UsageError(
            f"{' and '.join(from_files)} (files) and {' and '.join(controlled)} (a control plane) exclude each other: "
            "a sidecar has one source of policy. An option may also come from the environment, as PILLION_*"
        )
    if from_files:
        if len(from_files) == 1:
            missing = "--identity DIR" if from_files == ["--policy"] else "--policy FILE"
            raise click.UsageError(f"a sidecar that runs from files needs {missing} as well as {from_files[0]}")
        return
    options["token"] = _token(options["token"], token_file)
    if options["state_dir"] is None:
        from .discovery.state_dir import default_directory

        options["state_dir"] = default_directory(options["service"], os.environ)


def _token(text: str | None, path: Path | None) -> Any:
    """The token of a flag or a file. Raises UsageError."""
    if text is None and path is None:
        return None
    if text is not None and path is not None:
        raise click.UsageError("give the token with --token or with --token-file, not with both")
    if path is not None:
        try:
            with open(path, "rb") as file:
                text = file.read(TOKEN_FILE_BYTES_MAX).decode("ascii", "replace")
        except OSError as error:
            raise click.UsageError(f"--token-file: {path}: {error.strerror}") from None
    from certs.tokens import TokenError, parse_token

    try:
        return parse_token(text or "")
    except TokenError as error:
        raise click.UsageError(f"{'--token' if path is None else path}: {error}") from None


def _has_state(path: Path) -> bool:
    from .discovery.state_dir import MEMBERSHIP

    return (path / MEMBERSHIP).exists()
