"""The demo's policy: whole, valid, and edited as the story tells."""

from pathlib import Path

import pytest

from control_plane.demo.mesh import WAYS
from control_plane.demo.policy import CANARY, DENIAL, FILES, FILTER, RETRIES, Edit, EditError, PolicyDirectory
from sidecar.model.load import load_policy


@pytest.fixture
def policy(tmp_path: Path) -> PolicyDirectory:
    directory = PolicyDirectory(tmp_path / "policy")
    directory.begin()
    return directory


def revision(policy: PolicyDirectory) -> str:
    loaded = load_policy([policy.path])
    assert loaded.snapshot is not None
    return loaded.snapshot.revision


def test_it_names_no_addresses_and_nothing_is_warned_of(policy: PolicyDirectory) -> None:
    assert {path.name for path in policy.path.iterdir()} == set(FILES)
    assert not any("address:" in path.read_text() for path in policy.path.iterdir())
    loaded = load_policy([policy.path])
    assert loaded.problems == ()
    assert set(loaded.snapshot.services) == {"customers", "web", "orders", "ratings", "reviews"}  # type: ignore[union-attr]


def test_who_calls_whom_is_declared(policy: PolicyDirectory) -> None:
    snapshot = load_policy([policy.path]).snapshot
    assert snapshot is not None
    assert {(name, callee) for name, service in snapshot.services.items() for callee in service.calls} == set(WAYS)


def test_each_edit_of_the_story_fits_and_changes_the_policy(policy: PolicyDirectory) -> None:
    seen = {revision(policy)}
    for edit in (RETRIES, CANARY, DENIAL, FILTER):
        lines = policy.edit(edit)
        assert revision(policy) not in seen
        assert any(line.startswith("+") for line in lines)
        seen.add(revision(policy))
    assert load_policy([policy.path]).problems == ()


def test_an_edit_shows_only_the_lines_that_changed(policy: PolicyDirectory) -> None:
    assert policy.edit(DENIAL) == ["-        - {from: [reviews, orders]}", "+        - {from: [reviews]}"]


def test_a_file_that_somebody_has_changed_is_left_alone(policy: PolicyDirectory) -> None:
    path = policy.path / "ratings.yaml"
    path.write_text(path.read_text().replace("[reviews, orders]", "[reviews]"))
    before = path.read_text()
    with pytest.raises(EditError, match=r"ratings\.yaml does not say what it said"):
        policy.edit(DENIAL)
    assert path.read_text() == before


def test_an_edit_that_would_break_the_policy_is_not_made(policy: PolicyDirectory) -> None:
    before = revision(policy)
    with pytest.raises(EditError, match="v9"):
        policy.edit(Edit("reviews.yaml", "{v1: 70, v2: 30}", "{v1: 70, v9: 30}"))
    assert revision(policy) == before
