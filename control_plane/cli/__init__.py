"""The `pillion` command: its root, and the one place that turns how a verb ended into an exit code.

Must know the verbs by name only: a verb's module is imported when that verb is called, so that `pillion --help` starts
in the time that Python and click take. Invariants: stdout carries data, stderr everything else; no traceback for what a
user can put right. Exit codes: 0 yes, 1 no (or failed), 2 usage or invalid policy, 3 control plane unreachable,
4 conflict, 130 interrupted; a verb may return another one as an int.
"""

import errno
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 3
EXIT_CONFLICT = 4
EXIT_INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Verb:
    target: str  # "module:attribute"
    summary: str  # stands here, so that --help imports nothing


VERBS = {
    "audit": Verb("control_plane.cli.audit:audit", "Show who changed what."),
    "ca": Verb("control_plane.cli.ca:ca", "Make a certificate authority and issue identities from it."),
    "can": Verb("control_plane.cli.explain:can", "Say whether one service may call another, and which rule decides."),
    "cert": Verb("control_plane.cli.cert:cert", "List the certificates of the mesh; ban and unban."),
    "check": Verb("control_plane.cli.check:check", "Find what is wrong, with cause and remedy."),
    "completion": Verb("control_plane.cli.completion:completion", "Print the completion script of a shell."),
    "control-plane": Verb("control_plane.command:control_plane", "Run a control plane."),
    "demo": Verb("control_plane.cli.demo:demo", "Run a small mesh on this machine, with a story."),
    "describe": Verb("control_plane.cli.describe:describe", "Show everything about one service."),
    "edges": Verb("control_plane.cli.edges:edges", "Show who calls whom, and how that goes."),
    "explain": Verb("control_plane.cli.explain:explain", "Show where a service's effective policy comes from."),
    "get": Verb("control_plane.cli.get:get", "List services, endpoints, sidecars, policies, tokens, replicas."),
    "intercept": Verb("sidecar.intercept.command:intercept", "Lead a machine's traffic through the sidecar (root)."),
    "login": Verb("control_plane.cli.login:login", "Remember a control plane and who you are."),
    "logout": Verb("control_plane.cli.login:logout", "Forget them."),
    "policy": Verb("control_plane.cli.policy:policy", "Check, apply and explain policy."),
    "run": Verb("sidecar.run.command:run", "Run a command with a sidecar beside it."),
    "sidecar": Verb("sidecar.command:sidecar", "Run a sidecar."),
    "simulate": Verb("sidecar.simulate.command:simulate", "Rehearse a policy on modelled services, in virtual time."),
    "store": Verb("control_plane.cli.store:store", "Move, back up and restore what a control plane keeps."),
    "token": Verb("control_plane.cli.token:token", "Make, list and revoke tokens for sidecars and operators."),
    "up": Verb("control_plane.up:up", "Start a control plane for a developer's own machine."),
}

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class LazyGroup(click.Group):
    """A group whose verbs are imported when called. Its own commands, added as usual, stand beside them."""

    def verbs(self) -> Mapping[str, Verb]:
        return VERBS

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*self.verbs(), *super().list_commands(ctx)})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        verb = self.verbs().get(cmd_name)
        if verb is None:
            return super().get_command(ctx, cmd_name)
        try:
            return load(cmd_name, verb)
        except click.ClickException:
            if ctx.resilient_parsing:  # a shell asks for completions: there is nobody to read a message
                return None
            raise

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = self.list_commands(ctx)
        if not ctx.resilient_parsing and args and not args[0].startswith("-") and args[0] not in known:
            raise click.UsageError(f"no such command {args[0]!r}.{_suggestion(args[0], known)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, self._summary(ctx, name)) for name in self.list_commands(ctx)])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> "list[CompletionItem[str]]":
        from click.shell_completion import CompletionItem

        names = [name for name in self.list_commands(ctx) if name.startswith(incomplete)]
        verbs = [CompletionItem(name, help=self._summary(ctx, name)) for name in names]
        return [*verbs, *click.Command.shell_complete(self, ctx, incomplete)]

    def _summary(self, ctx: click.Context, name: str) -> str:
        verb = self.verbs().get(name)
        if verb is not None:
            return verb.summary
        command = super().get_command(ctx, name)
        return command.get_short_help_str(100) if command is not None else ""


def _suggestion(name: str, known: Sequence[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, known, n=1)
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


def version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("pillion")
    except PackageNotFoundError:
        return "(not installed)"


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from sidecar.build_info import COMPILED, build

    click.echo(f"pillion {version()}{' (compiled)' if build() is COMPILED else ''}")
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
