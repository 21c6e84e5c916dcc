"""The root command: lazy, quick to start, and exact about exit codes."""

import os
import subprocess
import sys

import click
import pytest

import control_plane.cli as cli
from control_plane.cli import Verb, main


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> object:
    """Put a command of the test's own behind the name `try`."""

    def install(command: click.Command) -> None:
        monkeypatch.setattr(cli, "load", lambda name, verb: command)
        monkeypatch.setitem(cli.VERBS, "try", Verb("nowhere:nothing", "A test's own."))

    return install


def ending(callback: object) -> click.Command:
    return click.Command("try", callback=callback)  # type: ignore[arg-type]


def raising(error: BaseException) -> click.Command:
    def callback() -> None:
        raise error

    return ending(callback)


def test_help_lists_every_verb_and_imports_none(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("-h", "--help"):
        assert main([flag]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        for name, verb in cli.VERBS.items():
            assert f"  {name} " in out and verb.summary.split()[0] in out


@pytest.mark.parametrize("args", [["--help"], ["--version"]])
def test_starting_imports_nothing_heavy(args: list[str]) -> None:
    """What makes a start slow is imports; so this counts them rather than milliseconds."""
    heavy = {"trio", "httpx", "cryptography", "yaml", "rich", "httptools", "h2", "ssl", "re2", "asyncio"}
    heavy |= {"sidecar.app", "sidecar.model", "sidecar.policy", "sidecar.proxy"}
    program = (
        "import sys\nfrom control_plane.cli import main\n"
        f"code = main({args!r})\n"
        f"print(sorted({heavy!r} & set(sys.modules)), file=sys.stderr)\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("pillion ")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["polcy"], "Did you mean 'policy'?"),
        (["nonsense-xyz"], "no such command"),
        (["--nonsense"], "No such option"),
        (["ca", "issue"], "Missing option '--service'"),
        ([], "Usage:"),
    ],
)
def test_wrong_usage_is_2_and_goes_to_stderr(args: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("control_plane.cli.no_such:thing", "this installation does not have it (module control_plane.cli.no_such)"),
        ("no_such_package.inner:thing", "this installation does not have it"),
        ("control_plane.cli:no_such_attribute", "does not import (AttributeError"),
    ],
)
def test_a_verb_that_does_not_import_is_an_error_without_traceback(
    target: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cli.VERBS, "try", Verb(target, "A test's own."))
    assert main(["try"]) == 1
    err = capsys.readouterr().err
    assert says in err and "pillion try is not available" in err and "Traceback" not in err


def test_a_missing_dependency_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "verb_with_needs.py").write_text("import a_package_that_is_absent.inner\n")  # type: ignore[operator]
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.VERBS, "try", Verb("verb_with_needs:thing", "A test's own."))
    assert main(["try"]) == 1
    assert "the Python package 'a_package_that_is_absent' is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (click.ClickException("no"), 1),
        (click.UsageError("no"), 2),
        (click.exceptions.Exit(3), 3),
        (SystemExit(4), 4),
        (KeyboardInterrupt(), 130),
        (click.Abort(), 130),
        (BaseExceptionGroup("", [KeyboardInterrupt()]), 130),
        (BaseExceptionGroup("", [BaseExceptionGroup("", [KeyboardInterrupt(), KeyboardInterrupt()])]), 130),
    ],
)
def test_how_a_verb_ends_is_the_exit_code(
    error: BaseException, code: int, verb: object, capsys: pytest.CaptureFixture[str]
) -> None:
    verb(raising(error))  # type: ignore[operator]
    try:
        result = main(["try"])
    except SystemExit as exit_:
        result = exit_.code  # type: ignore[assignment]
    assert result == code
    out, err = capsys.readouterr()
    assert out == ""
    assert ("no" in err) if isinstance(error, click.ClickException) else not err.strip()


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (1, 1), (4, 4), (True, 0), ("text", 0)])
def test_a_verb_may_return_its_exit_code(result: object, code: int, verb: object) -> None:
    verb(ending(lambda: result))  # type: ignore[operator]
    assert main(["try"]) == code


def test_a_bug_keeps_its_traceback(verb: object) -> None:
    verb(raising(ZeroDivisionError()))  # type: ignore[operator]
    with pytest.raises(ZeroDivisionError):
        main(["try"])
    verb(raising(BaseExceptionGroup("", [KeyboardInterrupt(), ZeroDivisionError()])))  # type: ignore[operator]
    with pytest.raises(BaseExceptionGroup):
        main(["try"])


def test_a_reader_that_goes_away_is_no_error_message() -> None:
    program = "import sys\nfrom control_plane.cli import main\nsys.exit(main(['--help']))"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=writing, stderr=subprocess.PIPE, timeout=30, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")
