import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from certs.tokens import TOKEN_CHARACTERS_MAX, TokenError, make_token, parse_token

ROOT = "ab" * 32
SECRET = "Zm9vYmFyLXNlY3JldF8x"


def made(kind: str = "join", addresses: tuple[str, ...] = ("10.0.0.1:15011", "[fd00::1]:15011")) -> str:
    return make_token(kind, "t1", SECRET, addresses, ROOT, "mesh.local")


@pytest.mark.parametrize("kind", ["join", "operator"])
def test_what_is_made_is_read(kind: str) -> None:
    token = parse_token(f"  {made(kind)}\n")
    assert (token.id, token.secret, token.kind) == ("t1", SECRET, kind)
    assert token.addresses == ("10.0.0.1:15011", "[fd00::1]:15011")
    assert (token.fingerprint, token.trust_domain) == (ROOT, "mesh.local")
    assert token.text == made(kind)


def test_the_secret_is_not_shown() -> None:
    token = parse_token(made())
    assert SECRET not in repr(token) and token.text not in repr(token)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("hunter2", "no token of pillion"),
        ("ghp_abcdefghijk", "no token of pillion"),
        ("pil_j_", "damaged"),
        ("pil_j_%%%", "damaged"),
        ("pil_x_abcd", "this version too old"),
        (made()[:-1], "damaged"),
        (made()[:40], "damaged"),
        (made()[:30] + "\n" + made()[30:], "white space"),
        (made().replace("pil_j", "pil_o"), "damaged"),
        (made() + made(), "damaged"),
        ("pil_j_" + "a" * TOKEN_CHARACTERS_MAX, "longer than"),
    ],
)
def test_bad_texts(text: str, says: str) -> None:
    with pytest.raises(TokenError, match=says) as caught:
        parse_token(text)
    assert SECRET not in str(caught.value)


@given(st.integers(0, len(made()) - 1), st.sampled_from("ABCxyz019-_"))
def test_one_wrong_character_is_noticed(place: int, letter: str) -> None:
    text = made()
    changed = text[:place] + letter + text[place + 1 :]
    if changed == text:
        return
    try:
        token = parse_token(changed)
    except TokenError:
        return
    # Base64's last letter can have bits that stand for nothing.
    assert token == parse_token(text) and place == len(text) - 1


@given(st.binary(max_size=200))
def test_no_content_is_an_exception_of_ours(content: bytes) -> None:
    import hashlib

    check = hashlib.sha256(b"j" + content).digest()[:4]
    text = "pil_j_" + base64.urlsafe_b64encode(content + check).rstrip(b"=").decode()
    with pytest.raises(TokenError):
        parse_token(text)


@pytest.mark.parametrize(
    "wrong",
    [
        {"id": ""},
        {"id": "a/b"},
        {"secret": "with space"},
        {"addresses": ()},
        {"addresses": ("nowhere",)},
        {"addresses": ("h:0",)},
        {"addresses": ("h:99999",)},
        {"addresses": ("https://h:1",)},
        {"fingerprint": "ABC"},
        {"trust_domain": "Mesh"},
        {"trust_domain": ""},
        {"kind": "other"},
    ],
)
def test_what_no_token_can_hold(wrong: dict[str, object]) -> None:
    good = {
        "kind": "join", "id": "t1", "secret": "s", "addresses": ("h:1",), "fingerprint": ROOT, "trust_domain": "m",
    }  # fmt: skip
    make_token(**good)  # type: ignore[arg-type]
    with pytest.raises(TokenError):
        make_token(**good | wrong)  # type: ignore[arg-type]
