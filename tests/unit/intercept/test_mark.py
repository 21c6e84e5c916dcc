"""A start that would capture its own connections is refused."""

from sidecar.intercept.mark import exclusion_problem
from sidecar.intercept.ruleset import InterceptConfig


def test_one_of_mark_user_and_group_is_enough() -> None:
    config = InterceptConfig(excluded_uids=(990,), excluded_gids=(5,))
    assert exclusion_problem(config, marks=True, uid=0, gid=0) is None
    assert exclusion_problem(config, marks=False, uid=990, gid=0) is None
    assert exclusion_problem(config, marks=False, uid=0, gid=5) is None


def test_without_any_the_advice_names_the_user() -> None:
    problem = exclusion_problem(InterceptConfig(), marks=False, uid=990, gid=0)
    assert problem is not None and "--exclude-uid 990" in problem and "0x70696c" in problem
