"""The demo as a whole: directory, mesh, load, story, screen; and the end of it all.

The composition root of this package. Invariants: whatever way it ends, no process, port or file is left (a second
signal ends it at once, SIGKILL leaves it to the kernel and the keeper, see `processes`); a child that ends by itself
ends the demo, which says so.
"""

import errno
import io
import json
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import trio
from rich.console import Console

from control_plane.cli.program import program, typed

from .control import CONTEXT, CommandError
from .figures import difference
from .load import Load
from .mesh import Mesh, StartError
from .policy import EditError
from .processes import ChildEnded, Children, Ending
from .screen import Screen, terminal_is_usable
from .story import Story

EXIT_OK, EXIT_FAILED = 0, 1
QUIET_RATE = 20.0  # requests a second once the story has been told


@dataclass(frozen=True, slots=True)
class Settings:
    headless: bool
    once: bool
    output: str  # text or json
    pause_s: float | None
    rate: float


class Output(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, "nobody reads the output")  # rich itself would end the program here


class Demo:
    def __init__(self, settings: Settings, ending: Ending) -> None:
        self.settings, self.ending = settings, ending
        json_wanted = settings.output == "json"
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # a terminal that knows no arrows gets question marks
        console = Output(stderr=json_wanted, highlight=False, emoji=False)
        self.live = not settings.headless and not json_wanted and terminal_is_usable(console)
        if not console.is_terminal:
            console.width = 100
        self.screen = Screen(console, live=self.live)
        self.story: Story | None = None
        self.told = False
        self.problem = ""
        self._began = time.monotonic()

    async def run(self, directory: Path, children: Children) -> None:
        """Until the story is over (`--once`), a signal comes, or something breaks."""
        mesh = Mesh(directory, children)
        try:
            with self.screen, trio.CancelScope() as scope:
                self.ending.cancels(scope)
                await self._live_and_tell(mesh, scope)
        finally:
            await children.end()
        if self.ending.number is not None:
            self.screen.say("ended: no process, port or file is left")

    async def _live_and_tell(self, mesh: Mesh, scope: trio.CancelScope) -> None:
        screen = self.screen
        screen.say("pillion demo: a control plane, and a shop of five services with sidecars", "bold")
        screen.say(f"in {mesh.directory}, on loopback only; Ctrl-C ends it, and removes all")
        screen.status("starting a control plane, 7 sidecars and 6 applications …")
        try:
            await mesh.start(screen.command)
            async with trio.open_nursery() as nursery:
                mesh.watch_children(nursery)
                nursery.start_soon(mesh.watch)
                nursery.start_soon(self._show, mesh)
                load = Load(mesh.instances[0].addresses["outbound"], self.settings.rate)
                nursery.start_soon(load.run)
                await self._tell(mesh, load)
                nursery.cancel_scope.cancel()
        except* (StartError, EditError, CommandError, ChildEnded) as group:
            self.problem = str(_first(group))
            screen.say(f"✗ {self.problem}", "bold red")

    async def _tell(self, mesh: Mesh, load: Load) -> None:
        screen, settings = self.screen, self.settings
        screen.say(
            f"ready after {time.monotonic() - self._began:.1f} s; customers send {load.rate:g} requests a second"
        )
        pause_s = settings.pause_s if settings.pause_s is not None else 10.0 if self.live else 0.0
        self.story = Story(mesh, load, screen, pause_s)
        await self.story.tell()
        self.told = True
        failed = self.story.failed
        screen.say("")
        if failed:
            screen.say(f"Steps that did not hold: {', '.join(failed)}", "bold red")
        else:
            screen.say("All seven steps held.", "bold green")
        if settings.once:
            return
        if settings.output == "json":
            self.print_report()
        load.rate = min(load.rate, QUIET_RATE)
        self._say_what_next(mesh)
        screen.status("the story has been told, the mesh stays up; Ctrl-C ends it")
        await trio.sleep_forever()

    def _say_what_next(self, mesh: Mesh) -> None:
        screen, pillion = self.screen, program()
        screen.say("The mesh stays up; Ctrl-C ends it. In another terminal:")
        screen.command(f"cd {shlex.quote(str(mesh.directory))}")
        screen.command(f"export PILLION_CONTEXT=$PWD/{CONTEXT}")
        for args in (
            ("get", "services"),
            ("describe", "service", "reviews"),
            ("can", "orders", "ratings", "GET", "/ratings/7"),
            ("edges",),
        ):
            screen.command(typed(args, pillion))
        screen.say("Or edit policy/reviews.yaml, apply it, and watch the table here:")
        screen.command(typed(("policy", "apply", "-f", "policy/reviews.yaml"), pillion))

    async def _show(self, mesh: Mesh) -> None:
        while True:
            if len(mesh.samples) >= 2:
                window = difference(mesh.samples[-1], mesh.samples[0])
                self.screen.figures(window)
            await trio.sleep(0.5)

    def print_report(self) -> None:
        report: dict[str, Any] = self.story.report() if self.story is not None else {"ok": False, "failed": ["start"]}
        if self.problem:
            report |= {"ok": False, "problem": self.problem}
        elif not self.told:
            report |= {"ok": False, "problem": "interrupted"}
        report["seconds"] = round(time.monotonic() - self._began, 1)
        json.dump(report, sys.stdout, indent=2)
        sys.stdout.write("\n")
        sys.stdout.flush()

    def exit_code(self) -> int:
        if self.problem:
            return EXIT_FAILED
        if not self.told:
            return self.ending.exit_code
        assert self.story is not None
        return EXIT_FAILED if self.story.failed else EXIT_OK


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found


def run(settings: Settings) -> int:
    """Run the demo; the exit code."""
    ending = Ending()
    ending.install()
    unread = False
    try:
        directory = Path(tempfile.mkdtemp(prefix="pillion-demo-"))
    except OSError as error:
        raise click.ClickException(f"no temporary directory can be made ({error}); set TMPDIR to one") from None
    children = ending.children = Children(directory)
    try:
        demo = Demo(settings, ending)
        trio.run(demo.run, directory, children)
    except* BrokenPipeError:
        unread = True
    finally:
        children.kill()  # where Trio could not even begin; else it has all been done
    if unread:
        raise BrokenPipeError(errno.EPIPE, "nobody reads the output")  # the command line knows what to do
    if settings.output == "json" and (settings.once or not demo.told):
        demo.print_report()
    for failed in demo.story.failed if demo.story is not None else ():
        print(f"step {failed} did not hold", file=sys.stderr)  # noqa: T201
    return demo.exit_code()
