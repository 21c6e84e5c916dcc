import pytest

from control_plane.state.access import Who, lacks_role, may_apply, may_join_as, may_revoke

VIEWER = Who("vic", "viewer", ("team-a",))
ANA = Who("ana", "operator", ("team-a", "team-b"))
NOBODYS = Who("noa", "operator")
ADMIN = Who("adi", "admin")
STRANGE = Who("stu", "emperor", ("team-a",))


@pytest.mark.parametrize(
    ("who", "role", "refusal"),
    [
        (VIEWER, "viewer", None),
        (VIEWER, "operator", "vic is a viewer; this needs an operator"),
        (ANA, "operator", None),
        (ANA, "admin", "ana is an operator; this needs an admin"),
        (ADMIN, "admin", None),
        (STRANGE, "viewer", "stu is an emperor; this needs a viewer"),
        (Who("x", ""), "viewer", "x is an unknown role; this needs a viewer"),
    ],
)
def test_roles(who: Who, role: str, refusal: str | None) -> None:
    assert lacks_role(who, role, "this") == refusal


@pytest.mark.parametrize(
    ("who", "document", "before", "after", "says"),
    [
        (ANA, "services/web", ["team-a"], ["team-a"], None),
        (ANA, "services/web", ["team-b", "team-z"], ["team-z", "team-b"], None),
        (ANA, "services/web", ["team-z"], ["team-z"], "owned by team-z; ana is of team-a, team-b"),
        (NOBODYS, "services/web", ["team-z"], ["team-z"], "noa is of no team"),
        (ANA, "services/web", [], [], "no team owns the service, so this needs an admin"),
        (ANA, "services/web", None, ["team-a"], "nobody owns it: adding it needs an admin"),
        (ANA, "services/web", ["team-a"], None, "removing web takes its owners away"),
        (ANA, "services/web", ["team-a"], ["team-a", "team-c"], "from team-a to team-a, team-c"),
        (ANA, "services/web", ["team-a"], [], "from team-a to nobody"),
        (ANA, "defaults", None, (), "holds for every service"),
        (ANA, "enforced", (), (), "holds for every service"),
        (VIEWER, "services/web", ["team-a"], ["team-a"], "needs an operator"),
        (STRANGE, "services/web", ["team-a"], ["team-a"], "needs an operator"),
        (ADMIN, "defaults", None, (), None),
        (ADMIN, "services/web", None, [], None),
        (ADMIN, "services/web", ["team-a"], None, None),
    ],
)
def test_who_may_apply_what(who: Who, document: str, before: object, after: object, says: str | None) -> None:
    refusal = may_apply(who, document, before, after)  # type: ignore[arg-type]
    assert refusal is None if says is None else refusal is not None and says in refusal


def test_join_tokens() -> None:
    assert may_join_as(ANA, "web", ["team-a"]) is None
    assert "owned by team-z" in str(may_join_as(ANA, "web", ["team-z"]))
    assert "needs an admin" in str(may_join_as(ANA, "new", []))
    assert "needs an operator" in str(may_join_as(VIEWER, "web", ["team-a"]))
    assert may_join_as(ADMIN, "new", []) is None


def test_revoking() -> None:
    def owners(name: str) -> list[str]:
        return {"web": ["team-a"]}.get(name, [])

    assert may_revoke(ANA, "join", "web", owners, own=False) is None
    assert may_revoke(ANA, "join", "other", owners, own=False) is not None
    assert "needs an admin" in str(may_revoke(ANA, "operator", "", owners, own=False))
    assert may_revoke(VIEWER, "operator", "", owners, own=True) is None
    assert may_revoke(ADMIN, "operator", "", owners, own=False) is None
