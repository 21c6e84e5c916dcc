"""How data are shown: tables, spans, differences, completion."""

from typing import Any

import pytest

from control_plane.cli import main
from control_plane.cli.describe import overrode_text, render
from control_plane.cli.output import GOOD, ago, expiry, span, table, text_diff
from control_plane.cli.policy_history import assemble
from sidecar.model.load import load_texts


def test_a_table_is_aligned_without_its_colours() -> None:
    rows = [("web", ("up", GOOD), "x"), ("reviews", ("suspect", GOOD), "")]
    plain = "NAME     STATE    WHY\nweb      up       x\nreviews  suspect"
    assert table(rows, ("NAME", "STATE", "WHY")) == plain
    painted = table(rows, ("NAME", "STATE", "WHY"), color=True)
    assert painted != plain and painted.replace(f"\x1b[{GOOD}m", "").replace("\x1b[0m", "") == plain


def test_a_text_from_elsewhere_cannot_steer_the_terminal() -> None:
    assert "\x1b" not in table([("\x1b[2Jboo\n",)]) and "\n" not in table([("a\nb",)])
    assert "\x1b" not in text_diff("a", "\x1b]0;x\x07", "old", "new\x1b[1m")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59, "59s"),
        (61, "1m 1s"),
        (3600, "1h"),
        (3660, "1h 1m"),
        (90_000, "1d 1h"),
        (86_405, "1d"),
        (-5, "0s"),
    ],
)
def test_spans(seconds: float, text: str) -> None:
    assert span(seconds) == text


def test_moments_before_and_after() -> None:
    assert ago(100, 160) == "1m ago" and ago(160, 100) == "in 1m"
    assert expiry(160, 100) == "in 1m" and expiry(None, 100) == "-"
    assert expiry(100, 160) == ("expired 1m ago", "31")


def test_differences() -> None:
    assert text_diff("a\nb\n", "a\nc\n", "old", "new") == "--- old\n+++ new\n@@ -1,2 +1,2 @@\n a\n-b\n+c"
    assert text_diff(None, "a\n", "old", "new").startswith("--- (nothing)\n+++ new")
    assert text_diff("a\n", None, "old", "new").startswith("--- old\n+++ (nothing)")
    assert text_diff("a", "a\n", "old", "new") == ""


def document(name: str, text: str, whole: bool = False) -> dict[str, Any]:
    return {"name": name, "text": text, "whole": whole, "file": "mesh.yaml", "line": 3, "change": 1, "author": "mia"}


def test_applied_pieces_make_a_policy_again() -> None:
    made = assemble(
        [
            document("services/web", "    web:\n      calls:\n        reviews: {}\n"),
            document("services/reviews", "  # ours\n  reviews:\n    ports: {api: {port: 8000}}\n\n    # below\n"),
            document("enforced", "enforced:\n  mtls: strict\n"),
            document("defaults", "defaults:\n  timeout: {total: 10s}\n"),
        ]
    )
    assert made.index("defaults:") < made.index("services:") < made.index("enforced:")
    loaded = load_texts({"mesh.yaml": made})
    assert loaded.snapshot is not None, loaded.problems
    assert set(loaded.snapshot.services) == {"web", "reviews"}
    assert "  # ours\n  reviews:\n" in made and "\n  web:\n    calls:\n" in made


def test_files_that_cannot_be_cut_are_printed_once() -> None:
    whole = "{version: 1, services: {a: {}, b: {}}}\n"
    assert assemble([document("services/a", whole, True), document("services/b", whole, True)]) == whole


def test_what_a_value_overrode() -> None:
    deep = [{"value": "15s", "level": "built-in", "source": ""}, {"value": "9s", "level": "defaults", "source": "m:3"}]
    assert overrode_text(deep) == "15s (built-in), 9s (defaults, m:3)"
    assert overrode_text(None) == "" and overrode_text("as told") == "as told"


def test_a_service_of_which_nothing_is_known_is_described() -> None:
    page = render({"name": "web"}, 0.0, False)
    assert page.startswith("web\n") and "0 of 0 healthy" in page and "none applied for this service" in page


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    out, err = capsys.readouterr()
    assert f"_PILLION_COMPLETE={shell}_complete" in out and err == ""


def complete(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str) -> list[str]:
    monkeypatch.setenv("_PILLION_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
    with pytest.raises(SystemExit):
        main([])
    out, err = capsys.readouterr()
    assert err == ""
    return [line.partition(",")[2] for line in out.splitlines() if line]


def test_completion_of_verbs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    monkeypatch.setenv("PILLION_CONTEXT", str(tmp_path / "none"))
    for name in ("PILLION_TOKEN", "PILLION_TOKEN_FILE", "PILLION_URL"):
        monkeypatch.delenv(name, raising=False)
    assert complete(monkeypatch, capsys, "pillion ge") == ["get"]
    assert complete(monkeypatch, capsys, "pillion policy ap") == ["apply"]
    assert complete(monkeypatch, capsys, "pillion get s") == ["services", "sidecars"]
    assert complete(monkeypatch, capsys, "pillion get services --u") == ["--url"]
    assert complete(monkeypatch, capsys, "pillion completion f") == ["fish"]
    assert complete(monkeypatch, capsys, "pillion nonsense x") == []
    assert complete(monkeypatch, capsys, "pillion describe service w") == []  # nothing is known: silence
