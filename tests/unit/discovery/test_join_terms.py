"""The pure part of membership: how old a certificate is, when to renew it, whom to ask."""

from dataclasses import replace
from datetime import timedelta

import pytest
from support.pki import Pki

from certs.files import IdentityFiles, load_identity
from sidecar.discovery.http import Refused, Unreachable
from sidecar.discovery.join import Replicas, Term, each_in_turn, issued_at, skew_note, term_of


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> IdentityFiles:
    return load_identity(Pki().identity(tmp_path_factory.mktemp("pki"), "web", ttl=timedelta(hours=1)))


def test_a_term_counts_from_issuance(identity: IdentityFiles) -> None:
    here = issued_at(identity)
    assert term_of(identity, here, here, 50.0) == Term(50.0, 3600.0)
    assert term_of(identity, here, here + 600, 50.0) == Term(-550.0, 3600.0)


@pytest.mark.parametrize("ahead_s", [-3600.0, -300.0, 0.0, 300.0, 86400.0])
def test_clocks_that_differ_do_not_matter(identity: IdentityFiles, ahead_s: float) -> None:
    here = issued_at(identity) + ahead_s
    assert term_of(identity, here, here + 60, 100.0) == Term(40.0, 3600.0)


def test_a_clock_that_went_back_makes_no_negative_age(identity: IdentityFiles) -> None:
    here = issued_at(identity)
    assert term_of(identity, here, here - 500, 100.0).begun == 100.0


def test_renewal_is_at_half_life_give_or_take_a_tenth() -> None:
    term = Term(100.0, 1000.0)
    assert (term.renewal_s(0.0), term.renewal_s(0.5), term.renewal_s(1.0)) == pytest.approx((450.0, 500.0, 550.0))
    assert term.ends == 1100.0


@pytest.mark.parametrize(
    ("ahead_s", "words"),
    [
        (-59.0, None),
        (59.0, None),
        (240.0, "240 s ahead of"),
        (-90.0, "90 s behind"),
        (7200.0, "has expired. Put the clock right"),
        (-300.0, "is not valid yet. Put the clock right"),
    ],
)
def test_what_is_said_of_clocks(identity: IdentityFiles, ahead_s: float, words: str | None) -> None:
    note = skew_note(identity, issued_at(identity) + ahead_s)
    assert (note is None) == (words is None)
    assert words is None or (note is not None and words in note)


def test_a_clamped_certificate_still_has_a_term(identity: IdentityFiles) -> None:
    short = replace(identity, not_after=identity.not_before + timedelta(seconds=10))
    assert term_of(short, 0.0, 0.0, 5.0).ttl_s == 1.0


def test_replicas_the_good_one_first_and_the_others_in_an_order_of_our_own() -> None:
    replicas = Replicas(["a:1", "b:1", "c:1", "a:1"], shuffle=lambda addresses: addresses.reverse())
    assert replicas.order() == ["c:1", "b:1", "a:1"]
    replicas.good = "a:1"
    assert replicas.order() == ["a:1", "c:1", "b:1"]
    assert not replicas.update(["b:1", "a:1", "c:1"]) and not replicas.update([])
    assert replicas.update(["b:1"]) and replicas.order() == ["b:1"]


async def test_each_in_turn() -> None:
    replicas = Replicas(["a:1", "b:1", "c:1"], shuffle=lambda _: None)
    asked: list[str] = []

    async def ask(address: str) -> str:
        asked.append(address)
        if address == "a:1":
            raise Unreachable("gone")
        if address == "b:1":
            raise Refused(503, "busy")
        return address

    assert await each_in_turn(replicas, ask) == "c:1"
    assert asked == ["a:1", "b:1", "c:1"] and replicas.order()[0] == "c:1"


async def test_a_refusal_that_lasts_ends_the_round() -> None:
    async def ask(address: str) -> str:
        raise Refused(403, "banned")

    with pytest.raises(Refused):
        await each_in_turn(Replicas(["a:1", "b:1"]), ask)


async def test_when_nobody_answers_the_last_reason_is_told() -> None:
    async def ask(address: str) -> str:
        raise Unreachable(f"{address} is gone")

    with pytest.raises(Unreachable, match="b:1 is gone"):
        await each_in_turn(Replicas(["a:1", "b:1"], shuffle=lambda _: None), ask)
    with pytest.raises(Unreachable, match="no address"):
        await each_in_turn(Replicas([]), ask)
