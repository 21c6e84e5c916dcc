"""The `pillion` command: its root, and the one place that turns how a verb ended into an exit code.

Must know the verbs by name only: a verb's module is imported when that verb is called, so that `pillion --help` starts
in the time that Python and click take. Invariants: stdout carries data, stderr everything else; no traceback for what a
user can put right. Exit codes: 0 yes, 1 no (or failed), 2 usage or invalid policy, 130 interrupted; a verb may return
another one as an int.
"""

import errno
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import click

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Verb:
    target: str  # "module:attribute"
    summary: str  # stands here, so that --help imports nothing


VERBS = {
    "ca": Verb("control_plane.cli.ca:ca", "Make a certificate authority and issue identities from it."),
    "demo": Verb("control_plane.cli.demo:demo", "Run a small mesh on this machine, with a story."),
    "intercept": Verb("sidecar.intercept.command:intercept", "Lead a machine's traffic through the sidecar (root)."),
    "policy": Verb("control_plane.cli.policy:policy", "Check, show and explain policy files."),
    "run": Verb("sidecar.run.command:run", "Run a command with a sidecar beside it."),
    "sidecar": Verb("sidecar.command:sidecar", "Run a sidecar."),
}

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class LazyGroup(click.Group):
    """A group whose verbs are imported when called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*VERBS, *super().list_commands(ctx)})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        verb = VERBS.get(cmd_name)
        return super().get_command(ctx, cmd_name) if verb is None else load(cmd_name, verb)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in VERBS:
            raise click.UsageError(f"no such command {args[0]!r}.{_suggestion(args[0])}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, VERBS[name].summary) for name in self.list_commands(ctx)])


def _suggestion(name: str) -> str:
    import difflib

    close = difflib.get_close_matches(name, VERBS, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def load(name: str, verb: Verb) -> click.Command:
    """Import a verb. One that does not import is this installation's fault, not the user's: say which part it is."""
    module_name, _, attribute = verb.target.partition(":")
    try:
        command = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(missing + "."):
            reason = "this installation does not have it"
        else:
            reason = (
                f"the Python package {missing.partition('.')[0]!r} is missing; install pillion again with its needs"
            )
        raise click.ClickException(f"pillion {name} is not available: {reason} (module {missing}).") from error
    except (ImportError, AttributeError, SyntaxError, OSError) as error:
        raise click.ClickException(
            f"pillion {name} is not available: {module_name} does not import ({type(error).__name__}: {error})."
        ) from error
    assert isinstance(command, click.Command), f"{verb.target} is not a command"
    return command


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        click.echo(f"pillion {version('pillion')}")
    except PackageNotFoundError:
        click.echo("pillion (not installed)")
    ctx.exit()


@click.group(cls=LazyGroup, context_settings=SETTINGS)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show the version."
)
def pillion() -> None:
    """A service mesh beside your services: mutual TLS, retries, circuit breakers and policy."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    try:
        code = _run(args)
        sys.stdout.flush()
    except OSError as error:
        if error.errno != errno.EPIPE:
            raise
        _discard_stdout()
        return EXIT_FAILED  # as click has it
    return code


def _run(args: Sequence[str] | None) -> int:
    try:
        result = pillion.main(args=None if args is None else list(args), prog_name="pillion", standalone_mode=False)
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except click.ClickException as error:
        sys.stdout.flush()
        error.show(file=sys.stderr)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except BaseExceptionGroup as group:  # Trio wraps what a nursery raised
        return _exit_code_of(group)
    return result if isinstance(result, int) and not isinstance(result, bool) else 0


def _exit_code_of(group: BaseExceptionGroup[BaseException]) -> int:
    """An interruption among other things is an interruption; any other group is a bug, and keeps its traceback."""
    others = group.split((KeyboardInterrupt, click.Abort))[1]
    if others is None:
        return EXIT_INTERRUPTED
    raise group


def _discard_stdout() -> None:
    """The reader has gone: let the interpreter's own flush at exit go nowhere rather than complain."""
    descriptor = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(descriptor, sys.stdout.fileno())
    except (OSError, ValueError):
        pass
    finally:
        os.close(descriptor)
