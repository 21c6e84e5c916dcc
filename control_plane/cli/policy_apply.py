"""`pillion policy apply` and `rollback`: change the mesh's policy, and see that every sidecar takes it.

The diff is that of a dry run at one revision, and what is then applied is bound to that revision: what is shown is what
is done, or it is a conflict. Must not judge a policy: the control plane does, knowing what else is applied. Exit codes:
0 done and accepted, 1 a sidecar rejected it or has not answered, 2 invalid, 3 unreachable, 4 conflict.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sidecar.model.load import read_texts
from sidecar.model.problems import Problem, Severity, Sink
from sidecar.model.source import Source
from sidecar.model.yaml_tree import normalise

from . import EXIT_CONFLICT, EXIT_FAILED, EXIT_USAGE
from .output import BAD, GOOD, colors, echo_data, indented, note, output_option, paint, plural, table, text_diff
from .policy_files import files_option, paths_of, report_problems
from .target import Asked, remote_options

if TYPE_CHECKING:
    from .remote import ApiError, Remote

APPLY_TIMEOUT_S = 60.0
STDIN = Path("-")
POLICY_BYTES_MAX = 8 * 1024 * 1024
SLICE_S = 5.0  # of waiting, so that progress can be told

Json = Any
Command = TypeVar("Command", bound=Callable[..., Any])


def _wait_options(command: Command) -> Command:
    for option in (
        click.option(
            "--timeout",
            "timeout_s",
            type=click.FloatRange(0, 3600),
            default=30.0,
            show_default=True,
            metavar="SECONDS",
            help="How long to wait.",
        ),
        click.option(
            "--wait/--no-wait", default=True, show_default=True, help="Wait until all connected sidecars have answered."
        ),
        click.option("-m", "--message", default="", help="Why, for the history."),
    ):
        command = option(command)
    return command


@click.command()
@files_option
@click.option("--dry-run", is_flag=True, help="Show what would change, and change nothing.")
@click.option("--prune", is_flag=True, help="Remove the services, defaults and enforced that the files do not name.")
@_wait_options
@click.option(
    "--base", type=click.IntRange(0), metavar="REVISION", help="Conflict if a document changed after this one."
)
@output_option("text", "json")
@remote_options
def apply(
    files: tuple[Path, ...],
    dry_run: bool,
    prune: bool,
    message: str,
    wait: bool,
    timeout_s: float,
    base: int | None,
    output: str,
    asked: Asked,
) -> int:
    """Make policy files the mesh's policy.

    The services that the files name are added or replaced, all or none; others stay unless --prune is given. Shows the
    difference, then waits until every connected sidecar has accepted it, and names those that have not.

    \b
    Ends with 0 if all accepted, 1 if a sidecar rejected it or has not answered, 2 if the policy is invalid,
    3 if the control plane cannot be reached, 4 if somebody else changed the same meanwhile.
    """
    texts = texts_of(files)
    from .remote import ApiError, connect

    with connect(asked) as remote:
        body = {"files": texts, "prune": prune, "message": message}
        try:
            planned = remote.post(
                "/v1/policy/apply", {**body, "base": base, "dry_run": True}, timeout_s=APPLY_TIMEOUT_S
            )
            changes = planned.get("diff") or []
            show_problems(planned.get("problems") or [], texts)
            _show_changes(changes, "applied", "yours")
            if dry_run or not changes:
                note(_summary(changes, dry_run))
                if output == "json":
                    echo_data(planned, "json")
                return 0
            if base is None:
                base = planned.get("revision")
            done = remote.post("/v1/policy/apply", {**body, "base": base, "dry_run": False}, timeout_s=APPLY_TIMEOUT_S)
        except ApiError as error:
            return refused(error, texts)
        return _finish(remote, done, wait, timeout_s, output)


@click.command()
@click.argument("change", type=click.IntRange(0))
@click.option("--dry-run", is_flag=True, help="Show what would change, and change nothing.")
@_wait_options
@output_option("text", "json")
@remote_options
def rollback(change: int, dry_run: bool, message: str, wait: bool, timeout_s: float, output: str, asked: Asked) -> int:
    """Go back to the policy as it was after CHANGE (0: before the first one).

    What was changed since stays in the history, and can be come back to in the same way. Ends as `apply` does.
    """
    from .remote import ApiError, connect

    with connect(asked) as remote:
        body = {"to": change, "message": message, "dry_run": dry_run}
        try:
            done = remote.post("/v1/policy/rollback", body, timeout_s=APPLY_TIMEOUT_S)
        except ApiError as error:
            return refused(error, {})
        changes = done.get("diff") or []
        show_problems(done.get("problems") or [], {})
        _show_changes(changes, "before", f"as after change {change}")
        if not changes:
            note(f"the policy is as it was after change {change} already: nothing to do")
        elif dry_run:
            note(_summary(changes, dry_run))
        if not changes or dry_run:
            if output == "json":
                echo_data(done, "json")
            return 0
        return _finish(remote, done, wait, timeout_s, output)


def texts_of(files: Sequence[Path]) -> dict[str, str]:
    """By file name; `-` is stdin. What cannot be read ends the command, as `policy check` shows it."""
    sink = Sink()
    paths = paths_of(files)
    named = [path for path in paths if path != STDIN]
    texts = read_texts(named, sink) if named else {}
    if STDIN in paths:
        texts["stdin"] = normalise(sys.stdin.read())
    if sink.failed:
        report_problems(sink.problems(), texts, sink.dropped)
        raise click.exceptions.Exit(EXIT_USAGE)
    size = sum(len(text.encode()) for text in texts.values())
    if size > POLICY_BYTES_MAX:
        raise click.UsageError(
            f"the files hold {size} bytes, and a control plane takes {POLICY_BYTES_MAX} at a time; apply them in parts"
        )
    return texts


# What the control plane said


def refused(error: "ApiError", texts: Mapping[str, str]) -> int:
    """Say why a change was refused, as well as we can; the exit code."""
    details = error.details if isinstance(error.details, dict) else {}
    problems = details.get("problems")
    if isinstance(problems, list) and problems:
        show_problems(problems, {**texts, **_texts_in(details)})
        return EXIT_USAGE
    documents = details.get("documents")
    if error.code == "conflict" and isinstance(documents, list):
        _show_conflict(documents)
        note(f"Error: {error.format_message()}")
        return EXIT_CONFLICT
    if error.code == "not_allowed" and isinstance(documents, list | dict) and len(documents) > 1:
        reasons = documents if isinstance(documents, list) else list(documents.values())
        note("Error: this is not allowed, nothing was changed:\n" + indented("\n".join(map(str, reasons))))
        return EXIT_FAILED
    raise error


def _texts_in(details: Mapping[str, Json]) -> dict[str, str]:
    texts = details.get("texts")
    return {str(key): str(value) for key, value in texts.items()} if isinstance(texts, dict) else {}


def show_problems(problems: Sequence[Json], texts: Mapping[str, str]) -> None:
    """Problems of the control plane's, as those of `policy check` are shown."""
    report_problems([_problem(each) for each in problems if isinstance(each, dict)], texts)


def _problem(data: Mapping[str, Json]) -> Problem:
    def number(key: str, usual: int = 0) -> int:
        value = data.get(key)
        return value if isinstance(value, int) else usual

    severity = Severity.WARNING if data.get("severity") == "warning" else Severity.ERROR
    source = Source(str(data.get("file", "")), number("line"), number("column"))
    words = (str(data.get(key, "")) for key in ("label", "help"))
    return Problem(
        str(data.get("code", "")), severity, str(data.get("message", "")), source, number("length", 1), *words
    )


def _show_conflict(documents: Sequence[Mapping[str, Json]]) -> None:
    color = colors(sys.stderr)
    for each in documents:
        name, author, change = each.get("document"), each.get("author"), each.get("change")
        by = f" (change {change} by {author})" if change else ""
        shown = text_diff(each.get("theirs"), each.get("yours"), f"{name}, theirs{by}", f"{name}, yours", color)
        note(shown or f"{name} was changed meanwhile{by}, to what you have too")
        note("")


def _show_changes(changes: Sequence[Mapping[str, Json]], old: str, new: str) -> None:
    color = colors(sys.stderr)
    for each in changes:
        name = each.get("document")
        shown = text_diff(each.get("before"), each.get("after"), f"{name}, {old}", f"{name}, {new}", color)
        if shown:
            click.echo(shown + "\n", err=True, color=True)
        else:
            note(f"{name}: the same text in another place\n")


def _summary(changes: Sequence[Mapping[str, Json]], dry_run: bool) -> str:
    if not changes:
        return "nothing to change: this is the policy that is applied"
    kinds = [_kind(each.get("before"), each.get("after")) for each in changes]
    counts = [(kinds.count(word), word) for word in ("added", "changed", "moved", "removed")]
    told = ", ".join(f"{count} {word}" for count, word in counts if count)
    return f"{'dry run, nothing was applied: ' if dry_run else ''}{told}"


def _kind(before: Json, after: Json) -> str:
    if before is None:
        return "added"
    return "removed" if after is None else "moved" if before == after else "changed"


# Waiting for the sidecars


def _finish(remote: "Remote", done: Mapping[str, Json], wait: bool, timeout_s: float, output: str) -> int:
    note(f"change {done.get('change')}: {_summary(done.get('diff') or [], False)}")
    status: Json = None
    code = 0
    if wait:
        status = _wait(remote, int(done.get("revision") or 0), timeout_s)
        code = _tell(status)
    if output == "json":
        echo_data({**done, "status": status}, "json")
    return code


def _wait(remote: "Remote", revision: int, timeout_s: float) -> Json:
    """The state of the sidecars once all have answered, or when the time is up. Ctrl-C ends the waiting only."""
    end = time.monotonic() + timeout_s
    told = False
    try:
        while True:
            left = max(0.0, end - time.monotonic())
            slice_s = min(SLICE_S, left)
            status = remote.get(
                "/v1/policy/status", {"revision": revision, "wait_s": round(slice_s, 1)}, timeout_s=slice_s + 15
            )
            waiting = status.get("waiting") or []
            if not waiting or left <= slice_s:
                return status
            if not told:
                note(f"waiting for {plural(len(waiting), 'sidecar')} of {status.get('connected')}")
            told = True
    except KeyboardInterrupt:
        note("\nno longer waiting; the change is applied. See: pillion get sidecars")
        raise


def _tell(status: Mapping[str, Json]) -> int:
    connected, accepted = int(status.get("connected") or 0), int(status.get("accepted") or 0)
    rejected, waiting = status.get("rejected") or [], status.get("waiting") or []
    color = colors(sys.stderr)
    if not rejected and not waiting:
        if connected:
            note(
                paint(
                    f"accepted by {'the one sidecar' if connected == 1 else f'all {connected} sidecars'}", GOOD, color
                )
            )
        else:
            note("no sidecar is connected; each takes it when it comes")
        return 0
    note(f"accepted by {accepted} of {plural(connected, 'sidecar')}")
    for each in rejected:
        note(f"{paint('rejected', BAD, color)} by {_sidecar(each)}:")
        rows = [(str(name), str(reason)) for name, reason in (each.get("resources") or {}).items()]
        note(indented(table(rows)))
    for each in waiting:
        note(f"{paint('no answer', BAD, color)} from {_sidecar(each)}")
    note(
        "The change stays applied; a sidecar that rejected it goes on with what it had.\n"
        "Next: pillion get sidecars --watch, or pillion policy rollback to an earlier change"
    )
    return EXIT_FAILED


def _sidecar(each: Mapping[str, Json]) -> str:
    return f"{each.get('service')} ({each.get('sidecar')})"
