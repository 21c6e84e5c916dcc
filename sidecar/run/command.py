"""`pillion run NAME --port PORT -- CMD…`: an application with a sidecar beside it, as one command.

Works out what to start and with which environment; `supervisor` starts and ends it. Must not know the sidecar's options
but those that it needs itself: all others are passed on as they are.
"""

import os
import shutil
import sys
from collections.abc import Mapping, Sequence

import click

from certs.spiffe import SpiffeError, check_service_name

from .processes import guarded
from .supervisor import EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND, Plan, Supervisor, start_problem

# In a process of its own, so that the application's supervisor stays small. -P: a folder named `sidecar` in the
# directory where the user happens to be must not be what is run.
SIDECAR = (sys.executable, "-P", "-c", "import sys; from control_plane.cli import main; sys.exit(main())", "sidecar")

LOOPBACK = "127.0.0.1"
NOT_PROXIED = ("localhost", LOOPBACK, "::1")
FREE_PORT = f"{LOOPBACK}:0"
ANY_FREE_PORT = "0.0.0.0:0"
EVERYWHERE = {"0.0.0.0": LOOPBACK, "[::]": "[::1]"}  # noqa: S104 - looked up, not bound


class RunCommand(click.Command):
    """Everything after the first `--` is the application's command, and never looked into."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--" in args:
            split = args.index("--")
            ctx.meta["pillion.run.command"] = tuple(args[split + 1 :])
            args = args[:split]
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return ["NAME", "--port PORT", "[OPTIONS]", "--", "CMD [ARGS]..."]


def _service(ctx: click.Context, param: click.Parameter, value: str) -> str:
    try:
        return check_service_name(value)
    except SpiffeError as error:
        raise click.BadParameter(f"{error} (NAME comes first, before all options)") from None


@click.command(
    cls=RunCommand,
    context_settings={"ignore_unknown_options": True, "help_option_names": ["-h", "--help"]},
)
@click.argument("name", callback=_service)
@click.argument("sidecar_options", nargs=-1, type=click.UNPROCESSED, metavar="")
@click.option(
    "--port", required=True, type=click.IntRange(1, 65535), help="The port on which the application listens (PORT)."
)
@click.option(
    "--outbound",
    metavar="HOST:PORT",
    envvar="PILLION_OUTBOUND",
    default=FREE_PORT,
    help="Where the sidecar takes the application's calls.  [default: loopback, a free port]",
)
@click.option(
    "--admin",
    metavar="HOST:PORT",
    envvar="PILLION_ADMIN",
    default=FREE_PORT,
    help="The sidecar's admin address.  [default: loopback, a free port]",
)
@click.option("--sidecar-log", metavar="FILE", help="Append the sidecar's output to a file instead of stderr.")
@click.pass_context
def run(
    ctx: click.Context,
    name: str,
    sidecar_options: tuple[str, ...],
    port: int,
    outbound: str,
    admin: str,
    sidecar_log: str | None,
) -> int:
    """Run a command with a sidecar beside it.

    Starts the sidecar of the service NAME, waits until it is ready, and starts CMD, whose calls go through the sidecar
    by way of http_proxy. When CMD ends the sidecar finishes what is in flight; the exit code is that of CMD.

    The sidecar joins the control plane of `pillion up` or `pillion login`, unless an option or the environment says
    otherwise. Options that are not listed here are the sidecar's (see `pillion sidecar --help`), such as --policy
    FILE, --identity DIR, --token-file FILE and --inbound HOST:PORT.
    """
    command = ctx.meta.get("pillion.run.command")
    stray = sidecar_options if sidecar_options and not sidecar_options[0].startswith("-") else ()
    if not command or stray:
        shown = " ".join(stray) or "CMD"
        raise click.UsageError(f"put the command to run after --: pillion run {name} --port {port} -- {shown}", ctx)
    variables = dict(os.environ)
    if not has_source(sidecar_options, variables):
        problem = find_problem(command[0])
        if problem is None:
            more, variables = from_context(name, port, sidecar_options, variables)
            sidecar_options = (*more, *sidecar_options)
    return execute(name, port, command, outbound, admin, sidecar_options, sidecar_log, variables)


SOURCES = ("--policy", "--identity", "--control-plane", "--token", "--token-file", "--state-dir", "--print-config")


def has_source(options: Sequence[str], variables: Mapping[str, str]) -> bool:
    """Whether somebody has said where policy and identity come from."""
    given = {option.partition("=")[0] for option in options}
    return any(
        source in given or variables.get(f"PILLION_{source[2:].replace('-', '_').upper()}") for source in SOURCES
    )


def from_context(
    service: str, port: int, options: Sequence[str], variables: Mapping[str, str]
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The sidecar's further options and environment, for the control plane that the user works with. Raises
    UsageError."""
    from sidecar.discovery.context import Away, ContextError, context_path, read_context, run_directory, token_by_child
    from sidecar.discovery.state_dir import MEMBERSHIP

    path, directory = context_path(variables), run_directory(service, port, variables)
    child = dict(variables)
    try:
        context = read_context(path)
        if context is None:
            raise click.UsageError(
                f"there is no control plane to join ({path} is missing). Start one in another terminal: pillion up\n"
                "Or join one with --token-file FILE; or run from files with --policy FILE and --identity DIR."
            )
        try:
            child["PILLION_TOKEN"] = token_by_child(path, service)
        except Away as error:
            if not (directory / MEMBERSHIP).exists():
                raise
            click.echo(f"pillion run: {error}; going on with what {directory} holds", err=True)
    except ContextError as error:
        raise click.UsageError(str(error)) from None
    more = [f"--state-dir={directory}"]
    if not variables.get("PILLION_INBOUND") and not any(each.partition("=")[0] == "--inbound" for each in options):
        more.append(f"--inbound={FREE_PORT if context.is_local else ANY_FREE_PORT}")
    return tuple(more), child


def execute(
    service: str,
    port: int,
    command: Sequence[str],
    outbound: str,
    admin: str,
    sidecar_options: Sequence[str] = (),
    sidecar_log: str | None = None,
    sidecar_environment: Mapping[str, str] | None = None,
) -> int:
    """Run it all; the exit code."""
    problem = find_problem(command[0])
    if problem is not None:
        code, text = problem
        click.echo(f"pillion run: {text}", err=True)
        return code
    plan = Plan(
        sidecar=[
            *SIDECAR,
            *("--service", service, "--app", f"{LOOPBACK}:{port}", "--outbound", outbound, "--admin", admin),
            *sidecar_options,
        ],
        application=command,
        application_environment=lambda addresses: environment(os.environ, addresses.get("outbound"), port),
        sidecar_environment=sidecar_environment,
        sidecar_log=sidecar_log,
    )
    return guarded(lambda signals: Supervisor(plan, signals).run())


def find_problem(program: str) -> tuple[int, str] | None:
    """Why a program cannot be started, as far as it can be told before a sidecar is started for it."""
    if shutil.which(program) is not None:
        return None
    if os.path.isdir(program) and "/" in program:
        return EXIT_NOT_EXECUTABLE, f"{program}: is a directory"
    if "/" in program and os.path.exists(program):
        return start_problem(program, PermissionError())
    if "/" not in program and shutil.which(program, mode=os.F_OK) is not None:
        return start_problem(program, PermissionError())
    return EXIT_NOT_FOUND, f"{program}: command not found"


def reachable(address: str) -> str:
    """The address to call for an address that is listened on."""
    host, _, port = address.rpartition(":")
    return f"{EVERYWHERE.get(host, host)}:{port}"


def environment(own: Mapping[str, str], outbound: str | None, port: int) -> dict[str, str]:
    """The application's: as our own, with its calls led through the sidecar where that takes any."""
    child = dict(own)
    child["PORT"] = str(port)
    child.pop("PILLION_OUTBOUND", None)
    child.pop("PILLION_TOKEN", None)  # the sidecar's alone
    if outbound is None:
        return child
    proxy = f"http://{reachable(outbound)}"
    child["PILLION_OUTBOUND"] = reachable(outbound)
    child["http_proxy"] = proxy
    # In a CGI program this name is also what a client's `Proxy:` header becomes (CVE-2016-5385): leave it alone there.
    if "REQUEST_METHOD" in own:
        child.pop("HTTP_PROXY", None)
    else:
        child["HTTP_PROXY"] = proxy
    for name in ("no_proxy", "NO_PROXY"):
        held = [host.strip() for host in own.get(name, "").split(",") if host.strip()]
        child[name] = ",".join([*held, *(host for host in NOT_PROXIED if host not in held)])
    return child
