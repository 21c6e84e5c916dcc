"""`pillion up`: a control plane for a developer's own machine, with nothing to configure.

On loopback, in the user's own state directory; what other commands need to find it goes into the user's context file.
Must not load the server before the flags are known to be good. Invariants: a context that leads to another mesh is
never overwritten unasked, and what is printed then works all the same; what is printed can be typed as it stands.
"""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from .cli.program import program, typed
from .cli.target import BadTarget, Context, context_path, load_context, save_context
from .command import address

CONTEXT = "context.json"
RENEW_TOKEN_S = 300 * 86400.0  # an admin token is good for a year

Address = tuple[str, int]


def state_directory(environ: Mapping[str, str]) -> Path:
    """Where it keeps everything. A relative XDG_STATE_HOME does not count (XDG Base Directory Specification)."""
    home = environ.get("XDG_STATE_HOME", "")
    base = Path(home) if home.startswith("/") else Path(environ.get("HOME") or Path.home()) / ".local" / "state"
    return base / "pillion" / "up"


@click.command()
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path, file_okay=False),
    show_default="~/.local/state/pillion/up",
    metavar="DIR",
    help="Where everything is kept; remove it to begin anew.",
)
@click.option("--listen-mesh", callback=address, default="127.0.0.1:15010", show_default=True, metavar="HOST:PORT",
              help="For sidecars.")  # fmt: skip
@click.option("--listen-join", callback=address, default="127.0.0.1:15011", show_default=True, metavar="HOST:PORT",
              help="For who joins, and for commands.")  # fmt: skip
@click.option(
    "--policy-dir",
    type=click.Path(path_type=Path, exists=True),
    metavar="DIR",
    help="A folder of policy files to follow: what it holds is the policy, a second after it is saved.",
)
@click.option("--force", is_flag=True, help="Replace a context that leads to another mesh.")
@click.option(
    "--log-level", default="warning", show_default=True, type=click.Choice(["debug", "info", "warning", "error"])
)
@click.option("--ready-fd", type=click.IntRange(0), help="Write the addresses as JSON to this descriptor when ready.")
def up(
    state_dir: Path | None,
    listen_mesh: Address,
    listen_join: Address,
    policy_dir: Path | None,
    force: bool,
    log_level: str,
    ready_fd: int | None,
) -> int:
    """Start a control plane for this machine and say what to do next.

    `pillion run NAME --port PORT -- CMD` in another terminal then needs no further flag. Ctrl-C ends it; what it knows
    is kept, and services go on meanwhile.
    """
    directory = Path(os.path.abspath((state_dir or state_directory(os.environ)).expanduser()))
    _check_free(directory, listen_mesh, listen_join)
    from .app import ADMIN_TOKEN, Settings, run

    token_file = directory / ADMIN_TOKEN
    settings = Settings(
        state_dir=directory,
        listen_mesh=listen_mesh,
        listen_join=listen_join,
        name="up",
        policy_dir=policy_dir.absolute() if policy_dir is not None else None,  # by this name it is known next time
        admin_token_file=None if _is_good(token_file) else token_file,
        log_level=log_level,
        ready_fd=ready_fd,
    )

    def ready(told: Mapping[str, Any]) -> None:
        paths = context_path(os.environ), directory / CONTEXT
        told_context = context_of(told, token_file)
        problem = write_context(paths[0], told_context, force)
        if problem:
            save_context(paths[1], told_context)
        click.echo(welcome(told, directory, policy_dir, paths[1] if problem else paths[0], problem))

    return run(settings, ready)


# -- what may be in the way


class InTheWay(click.ClickException):
    """It cannot start; the text says why and what to do."""

    exit_code = 2  # as where the start itself says so


def _check_free(directory: Path, mesh: Address, join: Address) -> None:
    """Raises InTheWay where another one is at work. Who comes between this and the start is named by the start."""
    holder = _holder(directory / "store.db.lock")
    if holder is not None:
        raise InTheWay(
            f"pillion up is running already on {directory}{holder}. "
            f"Use that one, or start another beside it: {_another(directory)}"
        )
    for option, (host, port) in (("--listen-mesh", mesh), ("--listen-join", join)):
        if port and _is_taken(host, port):
            raise InTheWay(
                f"{host}:{port} is in use, by another pillion up or by something else. "
                f"Choose another address with {option} (port 0: any that is free)"
            )


def _another(directory: Path) -> str:
    more = ("--listen-mesh", "127.0.0.1:15012", "--listen-join", "127.0.0.1:15013")
    return typed(("up", "--state-dir", str(directory.with_name(f"{directory.name}-2")), *more), program())


def _holder(lock: Path) -> str | None:
    """Who has the store open, None: nobody."""
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None  # there is none, or the start says what is wrong with it
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        pid = os.read(descriptor, 20).decode("ascii", "replace").strip()
        return f" (process {pid})" if pid.isdigit() else ""
    else:
        return None
    finally:
        os.close(descriptor)


def _is_taken(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the listener itself has it
        try:
            sock.bind((host, port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def _is_good(token_file: Path) -> bool:
    try:
        return time.time() - token_file.stat().st_mtime < RENEW_TOKEN_S
    except OSError:
        return False


# -- what others need to find it


def context_of(told: Mapping[str, Any], token_file: Path) -> Context:
    return Context(
        url=f"https://{told['advertised_join']}",
        fingerprint=told["fingerprint"],
        trust_domain=told["trust_domain"],
        token=token_file.read_text().strip(),
    )


def write_context(path: Path, context: Context, force: bool) -> str:
    """Let other commands find this control plane; why that was not done, or ""."""
    try:
        held = load_context(path)
    except BadTarget as error:
        if not force:
            return error.format_message()
        held = None
    # One that leads to our own address can lead to nobody else: an earlier state of this control plane wrote it.
    ours = held is None or held.fingerprint == context.fingerprint or held.url == context.url
    if held is not None and not ours and not force:
        return f"{path} leads to another mesh, at {held.url}"
    try:
        save_context(path, context)
    except OSError as error:
        return f"{path} cannot be written: {error.strerror}"
    return ""


def welcome(told: Mapping[str, Any], directory: Path, policy_dir: Path | None, context: Path, problem: str) -> str:
    """What is printed when all is ready. `problem`: why it is not the usual context."""
    pillion = program()
    rows = [
        ("mesh", told["trust_domain"]),
        ("sidecars", told["advertised_mesh"]),
        ("commands", f"https://{told['advertised_join']}"),
        ("state", str(directory)),
        ("context", str(context)),
        *([("policy", f"{policy_dir}, followed")] if policy_dir is not None else []),
    ]
    lines = ["pillion is up; Ctrl-C ends it.", "", *(f"  {name:<10}{value}" for name, value in rows), ""]
    if problem:
        lines += [f"{problem}; it was left alone (pillion up --force replaces it).", ""]
    lines.append("Next, in other terminals:")
    if problem:
        lines.append(f"  export PILLION_CONTEXT={context}")
    commands = (
        ("run", "web", "--port", "8000", "--", "python3", "-m", "http.server", "8000"),
        ("run", "shop", "--port", "8001", "--", "curl", "-s", "http://web/"),
        ("get", "services"),
    )
    lines += [f"  {typed(args, pillion)}" for args in commands]
    lines += ["", f"The second is a call from shop to web. If something is amiss: {pillion} check"]
    return "\n".join(lines)
