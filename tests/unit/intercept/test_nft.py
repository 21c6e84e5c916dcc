"""What is run, what a failure means, what is refused: with an nft made of two answers (the real one: integration)."""

import pytest

from sidecar.intercept import nft
from sidecar.intercept.listing import State
from sidecar.intercept.nft import Change, Completed, InterceptError, Problem, diagnose
from sidecar.intercept.ruleset import InterceptConfig, render, render_removal

ABSENT = Completed(1, "", "Error: No such file or directory\nlist table inet pillion\n                ^^^^^^^\n")
FOREIGN = Completed(0, '{"nftables": [{"chain": {"name": "c"}}]}', "")
FINE = Completed(0, "", "")


class Nft:
    """Answers to listing and to loading, and what was asked."""

    def __init__(self, listed: Completed, loaded: Completed = FINE) -> None:
        self.listed, self.loaded = listed, loaded
        self.texts: list[str] = []

    def __call__(self, arguments: tuple[str, ...], text: str) -> Completed:
        if arguments == ("-j", "list", "table", "inet", "pillion"):
            return self.listed
        assert arguments == ("-f", "-")
        self.texts.append(text)
        return self.loaded


@pytest.mark.parametrize(
    ("stderr", "problem"),
    [
        ("Operation not permitted (you must be root)\nnetlink: Error: cache", Problem.NO_PRIVILEGE),
        ("netlink: Error: cache initialization failed: Invalid argument", Problem.NO_KERNEL),
        ("Unable to initialize Netlink socket: Protocol not supported", Problem.NO_KERNEL),
        ("/dev/stdin:6:8-13: Error: Could not process rule: No such file or directory\n\tchain", Problem.NO_KERNEL),
        ("/dev/stdin:6:8-13: Error: Could not process rule: Operation not supported", Problem.NO_KERNEL),
        ("/dev/stdin:2:109-109: Error: syntax error, unexpected '}', expecting newline", Problem.SYNTAX),
        ("/dev/stdin:1:31-33: Error: unknown chain type", Problem.SYNTAX),
        ("Error: Could not process rule: Device or resource busy", Problem.FAILED),
        ("", Problem.FAILED),
    ],
)  # fmt: skip
def test_what_nft_says_is_turned_into_what_to_do(stderr: str, problem: Problem) -> None:
    assert diagnose(stderr) is problem
    run = Nft(ABSENT, Completed(1, "", stderr))
    with pytest.raises(InterceptError) as caught:
        nft.up(InterceptConfig(), run=run)
    assert caught.value.problem is problem
    assert "nothing was changed" in str(caught.value) and problem.advice in str(caught.value)


def test_up_is_one_transaction() -> None:
    run = Nft(ABSENT)
    assert nft.up(InterceptConfig(), run=run) == Change(State.ABSENT, True)
    assert run.texts == [render(InterceptConfig())]


def test_a_repair_says_how_strict_what_is_in_place_is() -> None:
    strict = InterceptConfig(strict=True)
    assert nft.repair(strict, run=Nft(ABSENT)) == Change(State.ABSENT, True, strict=True)


def test_down_is_one_transaction_or_nothing() -> None:
    run = Nft(ABSENT)
    assert nft.down(run=run) is False and run.texts == []


@pytest.mark.parametrize("action", [nft.up, nft.repair])
def test_a_foreign_table_is_left_alone_unless_forced(action: object) -> None:
    assert callable(action)
    run = Nft(FOREIGN)
    with pytest.raises(InterceptError) as caught:
        action(InterceptConfig(), run=run)
    assert caught.value.problem is Problem.FOREIGN and "--force" in str(caught.value) and run.texts == []
    assert action(InterceptConfig(), force=True, run=run) == Change(State.FOREIGN, True)
    assert run.texts == [render(InterceptConfig())]


def test_down_leaves_a_foreign_table_alone_unless_forced() -> None:
    run = Nft(FOREIGN)
    with pytest.raises(InterceptError):
        nft.down(run=run)
    assert run.texts == []
    assert nft.down(force=True, run=run) is True
    assert run.texts == [render_removal()]


def test_a_listing_that_fails_or_cannot_be_read_is_an_error() -> None:
    with pytest.raises(InterceptError) as caught:
        nft.look(Nft(Completed(1, "", "netlink: Error: cache initialization failed: Operation not permitted")))
    assert caught.value.problem is Problem.NO_PRIVILEGE
    with pytest.raises(InterceptError):
        nft.look(Nft(Completed(0, "not json", "")))
