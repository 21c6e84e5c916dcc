"""What the operators' pages say can be done, can be done.

The blocks of shell in docs/install.md run in an empty directory (`support.pages`). Of the commands in
blocks of `console`, and of those within sentences, verbs and options must exist.
"""

import re
import shlex
from pathlib import Path

import click
import pytest
from support.pages import replacer, run_page

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
INSTALL = DOCS / "install.md"
PAGES = [INSTALL, DOCS / "troubleshooting.md", DOCS / "control-plane.md", DOCS / "protocol.md"]
PORTS = ("15000", "15001", "15006", "15010", "15011", "15020", "8000")
LIMIT_S = 90.0

CONSOLE = re.compile(r"```(?:console|sh)\n(.*?)```", re.DOTALL)
INLINE = re.compile(r"`(pillion [a-z][^`]*)`")


def test_the_first_service_comes_up_as_it_says(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    run_page(INSTALL, work, tmp_path, replacer(PORTS), blocks_min=4, limit_s=LIMIT_S)
    assert list(work.iterdir()) == []


def commands(page: Path) -> list[str]:
    """Every command of pillion on a page."""
    text = page.read_text()
    found = INLINE.findall(text)
    for block in CONSOLE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            start = line.find("pillion ")
            if start >= 0 and re.fullmatch(r"(?:[$#] |\s*|.*docker compose exec.* |TOKEN=\$\()", line[:start]):
                found.append(line[start:])
    return found


def words_of(text: str) -> list[str]:
    """Up to where another command begins, or what is to be run begins."""
    text = re.split(r"\s[>|&;#]|\s-- |\)|\s\d?>", text)[0]
    try:
        return shlex.split(text)[1:]
    except ValueError:
        return text.split()[1:]


def resolve(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that the words name, and the words that are left."""
    from control_plane.cli import pillion as cli

    command: click.Command = cli
    context = click.Context(cli)
    rest = list(words)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        inner = command.get_command(context, rest[0])
        if inner is None:
            break
        command, context = inner, click.Context(inner, parent=context)
        rest.pop(0)
    return command, rest


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist_with_the_options_that_they_are_given(page: Path) -> None:
    found = commands(page)
    assert found
    wrong = []
    for text in found:
        words = words_of(text)
        if words[:1] == ["…"]:
            continue
        command, rest = resolve(words)
        if isinstance(command, click.Group) and rest and not rest[0].startswith("-") and rest[0] != "…":
            if "|" not in rest[0]:  # `pillion cert ls|ban`
                wrong.append(f"{text}: there is no {rest[0]!r}")
            continue
        known = {name for param in command.params for name in (*param.opts, *param.secondary_opts)} | {"--help", "-h"}
        if command.name == "run":
            from sidecar.command import sidecar

            known |= {name for param in sidecar.params for name in param.opts}
        for word in rest:
            if word.startswith("-") and word not in ("-", "--") and word.partition("=")[0] not in known:
                wrong.append(f"{text}: there is no option {word}")
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#\s]+)?(#[^)\s]+)?\)", text):
        path, mark = target
        if path.startswith("https:"):
            continue
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), path
        if mark and other.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", other.read_text(), re.MULTILINE)
            marks = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert mark[1:] in marks, f"{path}{mark}"


def test_every_check_of_the_control_plane_is_explained() -> None:
    """Each category of `pillion check` has a part of its own in docs/troubleshooting.md."""
    from control_plane.cli.check import LOCAL, REACH
    from control_plane.serve.checks import KINDS

    titles = re.findall(r"^### (.*)$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    explained = {each.strip() for title in titles for each in title.split(",")}
    assert {LOCAL, REACH, "store", *(kind.category for kind in KINDS)} <= explained


def test_every_code_that_refuses_a_join_is_explained() -> None:
    text = (DOCS / "troubleshooting.md").read_text()
    codes = set()
    for path in ("control_plane/serve/joins.py", "control_plane/state/tokens.py"):
        source = (ROOT / path).read_text()
        codes |= set(re.findall(r"ApiError\(\s*\d+,\s*\"(\w+)\"", source))
        codes |= set(re.findall(r"TokenRefused\(\s*\"(\w+)\"", source))
    assert len(codes) > 8
    missing = {code for code in codes if f"`{code}`" not in text}
    assert missing <= {"invalid", "too_often"}
