"""What a start finds out about interception; the real ruleset is put right in the integration tests."""

import os

import pytest

from sidecar.intercept import startup
from sidecar.intercept.listing import State
from sidecar.intercept.nft import Change, Completed, InterceptError, Problem
from sidecar.intercept.ruleset import MARK, InterceptConfig
from sidecar.intercept.startup import Prepared, prepare

ABSENT = Completed(1, "", "Error: No such file or directory\n")


def run(arguments: tuple[str, ...], text: str) -> Completed:
    return ABSENT if "list" in arguments else Completed(0, "", "")


def as_process(monkeypatch: pytest.MonkeyPatch, *, marks: bool, uid: int) -> None:
    monkeypatch.setattr(startup, "can_mark", lambda mark: marks)
    monkeypatch.setattr(os, "geteuid", lambda: uid)


def test_with_the_capability_the_ruleset_is_put_right(monkeypatch: pytest.MonkeyPatch) -> None:
    as_process(monkeypatch, marks=True, uid=0)
    prepared = prepare(InterceptConfig(strict=True), run)
    assert prepared == Prepared(MARK, Change(State.ABSENT, True, True)) and prepared.strict
    assert str(prepared) == "interception: the ruleset was absent, put right"


def test_without_it_the_user_must_be_excluded(monkeypatch: pytest.MonkeyPatch) -> None:
    as_process(monkeypatch, marks=False, uid=990)
    with pytest.raises(InterceptError) as caught:
        prepare(InterceptConfig(), run)
    assert caught.value.problem is Problem.SELF and "--exclude-uid 990" in str(caught.value)
    prepared = prepare(InterceptConfig(excluded_uids=(990,)), run)
    assert prepared == Prepared(None, None) and not prepared.strict
    assert "not checked" in str(prepared)
