"""`pillion policy get`, `history` and `diff`: what is applied, and how it came to be.

Must not change anything. Invariant: what `get` prints is a policy again, which `apply` takes as it is.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sidecar.model.problems import suggest

from . import EXIT_FAILED
from .listing import Column, Listing, show, text
from .output import FORMATS, ago, colors, echo_data, note, output_option, text_diff
from .policy_files import files_option
from .target import Asked, remote_options

if TYPE_CHECKING:
    from .remote import Remote

INDENT = 2

Json = Any
Documents = dict[str, str | None]

HISTORY = Listing(
    "/v1/policy/changes",
    "changes",
    "change",
    lambda item: str(item["change"]),
    (
        Column("CHANGE", text("change")),
        Column("WHEN", lambda item, now: ago(item["at"], now) if item.get("at") else "-"),
        Column("AUTHOR", text("author")),
        Column("BY", text("source")),
        Column("DOCUMENTS", text("documents")),
        Column("MESSAGE", text("message", "")),
    ),
    "no policy has been applied yet. Next: pillion policy apply -f mesh.yaml",
)


@click.command()
@click.option("-w", "--watch", is_flag=True, help="Go on and show what is new, until Ctrl-C.")
@output_option(*FORMATS)
@remote_options
def history(watch: bool, output: str, asked: Asked) -> int:
    """List the changes that were applied."""
    from .remote import connect

    return show(connect(asked), HISTORY, output, (), watch)


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@output_option("yaml", "json", "name")
@remote_options
def get(names: tuple[str, ...], output: str, asked: Asked) -> int:
    """Print the policy that is applied, as YAML.

    NAME is a service, or defaults, or enforced; without one, all of it.
    """
    from .remote import connect

    with connect(asked) as remote:
        data = remote.get("/v1/policy")
    documents = {str(each["name"]): each for each in data.get("documents") or []}
    wanted = [_document(name, documents) for name in names] if names else list(documents)
    missing = [name for name, found in zip(names, wanted, strict=False) if found is None]
    for name in missing:
        short = [each.removeprefix("services/") for each in documents]
        note(f"Error: no policy is applied for {name!r}; {suggest(name, short) or 'see pillion get policies'}")
    chosen = [documents[name] for name in wanted if name is not None]
    if output == "name":
        for each in chosen:
            click.echo(each["name"])
    elif output == "json":
        echo_data({**data, "documents": chosen}, "json")
    elif chosen:
        click.echo(assemble(chosen), nl=False)
        revision = data.get("revision")
        note(f"revision {revision}: apply a change that is based on it with --base {revision}")
    elif not missing:
        note(HISTORY.empty)
    return EXIT_FAILED if missing else 0


def _document(name: str, documents: Mapping[str, Json]) -> str | None:
    return next((each for each in (name, f"services/{name}") if each in documents), None)


def assemble(documents: Sequence[Mapping[str, Json]]) -> str:
    """One policy file of applied documents, each piece with the text that was applied."""
    whole = {str(each["file"]): str(each["text"]) for each in documents if each.get("whole")}
    cut = [each for each in documents if not each.get("whole")]
    parts = []
    for file, content in sorted(whole.items()):
        parts.append((f"# {file}\n" if len(whole) > 1 or cut else "") + content.rstrip("\n") + "\n")
    if cut:
        parts.append(_assemble_cut(cut))
    return "---\n".join(parts)


def _assemble_cut(documents: Sequence[Mapping[str, Json]]) -> str:
    by_name = {str(each["name"]): each for each in documents}
    blocks = ["version: 1\n"]
    if "defaults" in by_name:
        blocks.append(_piece(by_name["defaults"], 0))
    services = [each for name, each in sorted(by_name.items()) if name.startswith("services/")]
    if services:
        columns = {_column(each) for each in services}
        column = columns.pop() if len(columns) == 1 else INDENT  # as it stood, where all stood alike
        blocks.append("services:\n" + "\n".join(_piece(each, column or INDENT) for each in services))
    if "enforced" in by_name:
        blocks.append(_piece(by_name["enforced"], 0))
    return "\n".join(blocks)


def _lines_of(document: Mapping[str, Json]) -> list[str]:
    return str(document["text"]).rstrip("\n").split("\n")


def _column(document: Mapping[str, Json]) -> int:
    """How far the key of a document is indented."""
    lines = _lines_of(document)
    key = next((line for line in lines if line.strip() and not line.lstrip().startswith("#")), "")
    return len(key) - len(key.lstrip(" "))


def _piece(document: Mapping[str, Json], column: int) -> str:
    """The text of a document, moved so that its key is indented by this much."""
    by = column - _column(document)
    moved = []
    for line in _lines_of(document):
        bare = line.lstrip(" ")
        moved.append(" " * max(0, len(line) - len(bare) + by) + bare if bare else "")
    return "\n".join(moved) + "\n"


@click.command()
@click.argument("changes", nargs=-1, type=click.IntRange(0), metavar="[FROM [TO]]")
@files_option
@output_option("text", "json")
@remote_options
def diff(changes: tuple[int, ...], files: tuple[Path, ...], output: str, asked: Asked) -> int:
    """Show how policies differ.

    \b
    pillion policy diff -f mesh.yaml   what applying the files would change
    pillion policy diff 3              the policy after change 3, and the one applied now
    pillion policy diff 3 5            the policy after change 3, and after change 5

    Without arguments, the files are those of `policy check`. Ends with 0 if there is no difference, else with 1.
    """
    if len(changes) > 2:
        raise click.UsageError("two changes at most: FROM and TO")
    if changes and files:
        raise click.UsageError("give files (-f) or changes, not both")
    from .remote import ApiError, connect

    with connect(asked) as remote:
        if changes:
            found = _between(remote, changes[0], changes[1] if len(changes) == 2 else None)
            after = f"after change {changes[1]}" if len(changes) == 2 else "applied now"
            return _print(found, f"after change {changes[0]}", after, output)
        from .policy_apply import APPLY_TIMEOUT_S, refused, show_problems, texts_of

        texts = texts_of(files)
        try:
            planned = remote.post(
                "/v1/policy/apply",
                {"files": texts, "base": None, "prune": False, "dry_run": True, "message": ""},
                timeout_s=APPLY_TIMEOUT_S,
            )
        except ApiError as error:
            return refused(error, texts)
        show_problems(planned.get("problems") or [], texts)
        return _print(planned.get("diff") or [], "applied", "yours", output)


def _between(remote: "Remote", first: int, last: int | None) -> list[Json]:
    """What the changes after `first`, up to `last`, have brought about together."""
    numbers = sorted(int(each["change"]) for each in remote.get("/v1/policy/changes")["changes"])
    newest = numbers[-1] if numbers else 0
    for each in (first, last):
        if each is not None and each > newest:
            raise click.BadParameter(f"there is no change {each}; the newest is {newest}", param_hint="[FROM [TO]]")
    low, high = first, newest if last is None else last
    backwards = low > high
    if backwards:
        low, high = high, low
    before: Documents = {}
    after: Documents = {}
    for number in range(low + 1, high + 1):
        if number not in numbers:
            raise click.ClickException(f"change {number} is no longer kept; the oldest is {numbers[0]}")
        change = remote.get(f"/v1/policy/changes/{number}")
        for name, document in (change.get("before") or {}).items():
            before.setdefault(name, _text_of(document))
        after |= {name: _text_of(document) for name, document in (change.get("after") or {}).items()}
    if backwards:
        before, after = after, before
    return [
        {"document": name, "before": before.get(name), "after": after.get(name)}
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]


def _text_of(document: Json) -> str | None:
    if isinstance(document, dict):
        return str(document.get("text", ""))
    return document if isinstance(document, str) else None


def _print(changes: Sequence[Mapping[str, Json]], old: str, new: str, output: str) -> int:
    if output == "json":
        echo_data({"diff": list(changes)}, "json")
    else:
        color = colors(sys.stdout)
        for each in changes:
            name = each.get("document")
            shown = text_diff(each.get("before"), each.get("after"), f"{name}, {old}", f"{name}, {new}", color)
            click.echo(shown + "\n", color=True)
    if not changes:
        note("no difference")
    return EXIT_FAILED if changes else 0
