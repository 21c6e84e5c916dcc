"""The demo's control plane: one process with the embedded store, and the `pillion` commands that people would give it.

Runs every command for real, in the demo's directory, with the context that a real `pillion login` wrote there. Must not
know the services nor the story. Invariants: a token never stands on a command line; a command that fails says why.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import trio

from control_plane.cli.program import typed

from .processes import Children, Done

TRUST_DOMAIN = "demo.mesh"
COMMAND_S = 60.0
CONTEXT = "context.json"
PYTHON = (sys.executable, "-P", "-c", "import sys; from control_plane.cli import main; sys.exit(main())")
"""`pillion`, whatever way this one was started. -P: a folder named `sidecar` here must not be what is run."""

_STATE = "control-plane"
_ANY_PORT = "127.0.0.1:0"

Show = Callable[[str], None]
"""Is told each command before it runs, as one would type it."""


class CommandError(Exception):
    """A command that did not end well; the text says which, and what it said."""


class Control:
    """`directory` is the demo's."""

    def __init__(self, directory: Path, children: Children) -> None:
        self.directory, self.children = directory, children
        self.context = directory / CONTEXT
        self.join = ""  # the address of the join and operator listener

    async def start(self, show: Show) -> None:
        """The process, and a login. Raises ChildEnded, CommandError."""
        state = self.directory / _STATE
        options = ["--trust-domain", TRUST_DOMAIN, "--listen-mesh", _ANY_PORT, "--listen-join", _ANY_PORT]
        show(shown("control-plane", "--state-dir", _STATE) + " …")
        command = [*PYTHON, "control-plane", "--state-dir", str(state), "--name", "demo", *options]
        # Its sockets belong into the demo's directory, so that they go with it whatever way it ends; by a descriptor,
        # because a socket's path is short (unix(7): 108 bytes) and that of the directory may not be.
        run = self.directory / "run"
        run.mkdir()
        descriptor = os.open(run, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        reading, telling = os.pipe2(os.O_CLOEXEC)
        try:
            child = self.children.start(
                "control plane",
                [*command, "--ready-fd", str(telling)],
                environment() | {"TMPDIR": f"/proc/self/fd/{descriptor}"},
                [telling, descriptor],
            )
        finally:
            os.close(telling)
            os.close(descriptor)
        self.join = json.loads(await child.tells(reading))["join"]
        login = ("login", "--token-file", f"{_STATE}/admin-token")
        show(shown(*login))
        await self.ask(*login)

    async def command(self, *args: str) -> Done:
        """Run `pillion …`. Raises CommandError where it does not end in time."""
        with trio.move_on_after(COMMAND_S):
            variables = environment() | {"PILLION_CONTEXT": str(self.context)}
            return await self.children.run(f"pillion {args[0]}", [*PYTHON, *args], variables)
        raise CommandError(f"{shown(*args)} did not end within {COMMAND_S:g} s")

    async def ask(self, *args: str) -> Done:
        """The same, where it must end well. Raises CommandError."""
        done = await self.command(*args)
        if done.code:
            raise CommandError(f"{shown(*args)} ended with exit code {done.code}:\n{done.said.strip()}")
        return done


def shown(*args: str) -> str:
    """A command as one would type it."""
    return typed(args)


def environment() -> dict[str, str]:
    """Ours, without what would configure pillion or lead a service's calls elsewhere, or colour what we show."""
    unwanted = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "force_color")
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PILLION_") and name.lower() not in unwanted
    }
