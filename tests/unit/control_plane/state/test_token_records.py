from dataclasses import replace

import pytest

from certs.tokens import Token as TokenText
from certs.tokens import make_token, parse_token
from control_plane.state.mirror import Held
from control_plane.state.records import Token, decode
from control_plane.state.tokens import (
    TokenRefused,
    check_home,
    check_service,
    digest,
    join_token,
    judge,
    mint,
    operator_token,
    use,
)
from control_plane.store.base import Compare, Put

ROOT = "ab" * 32
NOW = 1000.0
RECORD = join_token("s3cret", "web", 2, by="adi", now=NOW, ttl_s=60)
OPERATOR = operator_token("s3cret", "ana", "operator", ["b", "a", "b"], by="adi", now=NOW, ttl_s=60)


def text(kind: str = "join", secret: str = "s3cret") -> TokenText:
    return parse_token(make_token(kind, "t1", secret, ["h:1"], ROOT, "mesh.local"))


def test_a_record_holds_no_secret() -> None:
    (operation,), (compare,) = mint("t1", RECORD)
    assert isinstance(operation, Put) and b"s3cret" not in operation.value
    assert compare == Compare("tokens/t1", 0)
    assert decode(Token, operation.value) == RECORD
    assert OPERATOR.teams == ("a", "b")


def test_a_good_one() -> None:
    assert judge(text(), RECORD, "join", NOW) == RECORD
    assert judge(text("operator"), OPERATOR, "operator", NOW) == OPERATOR
    assert judge(text(), replace(RECORD, uses=None), "join", NOW + 59.9)
    assert judge(text(), replace(RECORD, uses=0), "join", NOW, again=True)


@pytest.mark.parametrize(
    ("token", "record", "kind", "now", "code"),
    [
        (text(), None, "join", NOW, "token_unknown"),
        (text(secret="guess"), RECORD, "join", NOW, "token_forged"),
        (text(secret="guess"), replace(RECORD, expires=0.0), "join", NOW, "token_forged"),
        (text("operator"), RECORD, "operator", NOW, "token_forged"),
        (text(), RECORD, "operator", NOW, "token_wrong_kind"),
        (text(), RECORD, "join", NOW + 60, "token_expired"),
        (text(), replace(RECORD, uses=0), "join", NOW, "token_used_up"),
        (text(), replace(RECORD, secret_sha256=""), "join", NOW, "token_forged"),
        (text(), replace(RECORD, secret_sha256="é"), "join", NOW, "token_forged"),
    ],
)
def test_bad_ones(token: TokenText, record: Token | None, kind: str, now: float, code: str) -> None:
    with pytest.raises(TokenRefused) as caught:
        judge(token, record, kind, now)
    assert caught.value.code == code
    assert caught.value.help
    assert caught.value.proven is (code not in ("token_unknown", "token_forged"))


def test_only_its_own_service() -> None:
    check_service("t1", RECORD, "web")
    with pytest.raises(TokenRefused, match='is for the service "web", not for "admin"'):
        check_service("t1", RECORD, "admin")


def test_of_another_mesh() -> None:
    check_home(text(), "mesh.local", {ROOT, "cd" * 32})
    with pytest.raises(TokenRefused, match=r"of the mesh mesh\.local; this is other\.example"):
        check_home(text(), "other.example", {ROOT})
    with pytest.raises(TokenRefused, match="by the root abababababababab"):
        check_home(text(), "mesh.local", {"cd" * 32})


def test_a_use_is_a_compare_and_set() -> None:
    (operation,), (compare,) = use("t1", Held(RECORD, 7))
    assert isinstance(operation, Put) and decode(Token, operation.value) == replace(RECORD, uses=1)
    assert compare == Compare("tokens/t1", 7)
    assert use("t1", Held(replace(RECORD, uses=None), 7)) == ([], [Compare("tokens/t1", 7)])


def test_digest() -> None:
    assert digest("s3cret") == RECORD.secret_sha256 and len(digest("")) == 64
