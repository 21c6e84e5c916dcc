"""The demo's policy: whole, valid, and edited as the story tells."""

from pathlib import Path

import pytest

from control_plane.demo.policy import CANARY, DENIAL, FILES, FILTER, RETRIES, Edit, EditError, PolicyDirectory
from sidecar.model.load import load_policy

ADDRESSES = {
    f"ADDRESS_{name}": f"127.0.0.1:{9000 + number}"
    for number, name in enumerate(("WEB", "ORDERS", "RATINGS", "REVIEWS_V1", "REVIEWS_V2"))
}


@pytest.fixture
def policy(tmp_path: Path) -> PolicyDirectory:
    directory = PolicyDirectory(tmp_path / "policy")
    directory.begin()
    directory.complete(ADDRESSES)
    return directory


def test_every_address_is_put_in_and_nothing_is_warned_of(policy: PolicyDirectory) -> None:
    assert {path.name for path in policy.path.iterdir()} == set(FILES)
    assert "ADDRESS" not in "".join(path.read_text() for path in policy.path.iterdir())
    loaded = load_policy([policy.path])
    assert loaded.problems == ()
    assert set(loaded.snapshot.services) == {"customers", "web", "orders", "ratings", "reviews"}  # type: ignore[union-attr]


def test_the_first_policy_serves_until_the_addresses_are_known(tmp_path: Path) -> None:
    directory = PolicyDirectory(tmp_path / "policy")
    assert directory.begin() == directory.revision() != ""


def test_each_edit_of_the_story_fits_and_gives_the_revision_that_sidecars_will_show(policy: PolicyDirectory) -> None:
    seen = {policy.revision()}
    for edit in (RETRIES, CANARY, DENIAL, FILTER):
        revision, lines = policy.edit(edit)
        assert revision == policy.revision()
        assert revision not in seen
        assert any(line.startswith("+") for line in lines)
        seen.add(revision)
    assert load_policy([policy.path]).problems == ()


def test_an_edit_shows_only_the_lines_that_changed(policy: PolicyDirectory) -> None:
    assert policy.edit(DENIAL)[1] == ["-        - {from: [reviews, orders]}", "+        - {from: [reviews]}"]


def test_a_file_that_somebody_has_changed_is_left_alone(policy: PolicyDirectory) -> None:
    path = policy.path / "ratings.yaml"
    path.write_text(path.read_text().replace("[reviews, orders]", "[reviews]"))
    before = path.read_text()
    with pytest.raises(EditError, match=r"ratings\.yaml does not say what it said"):
        policy.edit(DENIAL)
    assert path.read_text() == before


def test_an_edit_that_would_break_the_policy_is_not_made(policy: PolicyDirectory) -> None:
    before = policy.revision()
    with pytest.raises(EditError, match="v9"):
        policy.edit(Edit("reviews.yaml", "{v1: 70, v2: 30}", "{v1: 70, v9: 30}"))
    assert policy.revision() == before
