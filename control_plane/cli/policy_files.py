"""Policy files of the command line: which ones are meant, what is wrong with them, how that is shown.

Must not call anybody. Invariant: problems go to stderr, as a compiler shows them, wherever they were found.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sidecar.model.problems import Problem, Severity, render

from .output import colors, note, plural

if TYPE_CHECKING:
    from sidecar.model.load import Loaded
    from sidecar.model.snapshot import Snapshot

DEFAULT_FILE = "mesh.yaml"
FILES_VARIABLE = "PILLION_POLICY"
EXIT_INVALID = 2

Command = TypeVar("Command", bound=Callable[..., Any])


def files_option(command: Command) -> Command:
    option = click.option(
        "-f",
        "--file",
        "files",
        multiple=True,
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="A policy file or folder.",
    )
    return option(command)


def paths_of(files: Sequence[Path]) -> list[Path]:
    named = os.environ.get(FILES_VARIABLE, "")
    return list(files) or [Path(each) for each in named.split(os.pathsep) if each] or [Path(DEFAULT_FILE)]


def report(loaded: "Loaded", problems: Sequence[Problem]) -> None:
    report_problems(problems, loaded.texts, loaded.dropped)


def report_problems(problems: Sequence[Problem], texts: Mapping[str, str], dropped: int = 0) -> None:
    if not problems:
        return
    click.echo(render(problems, texts, colors(sys.stderr)), err=True, color=True)
    note(_count(problems, dropped))


def _count(problems: Sequence[Problem], dropped: int) -> str:
    errors = sum(1 for problem in problems if problem.severity is Severity.ERROR)
    parts = [(errors, "error"), (len(problems) - errors, "warning"), (dropped, "further problem")]
    return ", ".join(plural(count, word) for count, word in parts if count)


def load(files: Sequence[Path]) -> "Snapshot":
    """The snapshot; where there is none, the problems go to stderr and the command ends."""
    from sidecar.model.load import load_policy

    loaded = load_policy(paths_of(files))
    if loaded.snapshot is None:
        report(loaded, loaded.errors)
        raise click.exceptions.Exit(EXIT_INVALID)
    return loaded.snapshot
