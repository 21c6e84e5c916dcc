"""Commands as the demo shows them: what is shown can be typed."""

import shlex

import pytest

from control_plane.demo.control import environment, shown


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("get", "services"), "pillion get services"),
        (("policy", "apply", "-m", "less of v2"), 'pillion policy apply -m "less of v2"'),
        (("policy", "apply", "-m", 'a "word"'), "pillion policy apply -m 'a \"word\"'"),
        (("policy", "apply", "-m", "for $HOME; `id`"), "pillion policy apply -m 'for $HOME; `id`'"),
    ],
)
def test_what_is_shown_means_what_is_run(args: tuple[str, ...], expected: str) -> None:
    assert shown(*args) == expected
    assert shlex.split(shown(*args)) == ["pillion", *args]


def test_commands_and_services_inherit_nothing_that_would_lead_them_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PILLION_CONTEXT", "PILLION_TOKEN", "HTTP_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "somewhere")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "somewhere" not in environment().values()
    assert environment()["NO_COLOR"] == "1"
