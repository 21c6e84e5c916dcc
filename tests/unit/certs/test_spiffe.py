"""SPIFFE IDs: what is canonical is kept as it is, everything else is refused and never mended."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from certs.spiffe import ID_BYTES_MAX, SpiffeError, SpiffeId, check_service_name, check_trust_domain


@pytest.mark.parametrize(
    "text",
    [
        "spiffe://mesh.local/service/web",
        "spiffe://mesh.local/a",
        "spiffe://m/service/web-2",
        "spiffe://my_domain-1.example/ns/Prod/sa/a.b_c-d",
        "spiffe://10.0.0.1/x",
        "spiffe://mesh.local/...",
        "spiffe://mesh.local/.hidden",
    ],
)
def test_canonical_ids_are_kept(text: str) -> None:
    assert str(SpiffeId.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "does not begin with"),
        ("https://mesh.local/service/web", "does not begin with"),
        ("spiffe:/mesh.local/service/web", "does not begin with"),
        ("SPIFFE://mesh.local/service/web", "scheme must be lower case"),
        ("Spiffe://mesh.local/service/web", "scheme must be lower case"),
        ("spiffe://Mesh.local/service/web", "must be lower case"),
        ("spiffe://mesh.local:8443/service/web", "port"),
        ("spiffe://mesh.local:/service/web", "port"),
        ("spiffe://user@mesh.local/service/web", "user information"),
        ("spiffe://user:secret@mesh.local/service/web", "user information"),
        ("spiffe:///service/web", "trust domain is empty"),
        ("spiffe://mesh..local/service/web", "label is empty"),
        ("spiffe://mesh.local./service/web", "label is empty"),
        ("spiffe://.mesh.local/service/web", "label is empty"),
        ("spiffe://[::1]/service/web", "port"),
        ("spiffe://mesh%2elocal/service/web", "only a-z"),
        ("spiffe://mesh.local", "path is empty"),
        ("spiffe://mesh.local/", "path is empty"),
        ("spiffe://mesh.local//service/web", "empty segment"),
        ("spiffe://mesh.local/service//web", "empty segment"),
        ("spiffe://mesh.local/service/web/", "ends with '/'"),
        ("spiffe://mesh.local/service/./web", "segment '.'"),
        ("spiffe://mesh.local/service/../web", "segment '..'"),
        ("spiffe://mesh.local/service/web/..", "segment '..'"),
        ("spiffe://mesh.local/service/%77eb", "percent-encoding"),
        ("spiffe://mesh.local/service/web%00", "percent-encoding"),
        ("spiffe://mesh.local/service/web?x=1", "query"),
        ("spiffe://mesh.local/service/web?", "query"),
        ("spiffe://mesh.local/service/web#x", "fragment"),
        ("spiffe://mesh.local/service/web\x00", "control characters"),
        ("spiffe://mesh.local\x00.evil.example/service/web", "control characters"),
        ("spiffe://mesh.local/service/web\n", "control characters"),
        (" spiffe://mesh.local/service/web", "does not begin with"),
        ("spiffe://mesh.local/service/we b", "white space"),
        ("spiffe://mesh.local/service/wéb", "ASCII"),
        ("spiffe://mesh.loca\u0131/service/web", "ASCII"),
        ("spiffe://mesh.local/service/web;a=b", "only letters"),
        ("spiffe://mesh.local/service\\web", "only letters"),
        ("spiffe://mesh.local/service/web+1", "only letters"),
        ("spiffe://" + "a" * 256 + "/service/web", "255 bytes"),
        ("spiffe://mesh.local/" + "a" * ID_BYTES_MAX, "2048 bytes"),
    ],
)
def test_everything_else_is_refused_and_says_why(text: str, says: str) -> None:
    with pytest.raises(SpiffeError) as caught:
        SpiffeId.parse(text)
    assert says in str(caught.value)


def test_the_longest_id_is_2048_bytes() -> None:
    text = "spiffe://mesh.local/".ljust(ID_BYTES_MAX, "a")
    assert str(SpiffeId.parse(text)) == text
    with pytest.raises(SpiffeError):
        SpiffeId.parse(text + "a")


def test_a_hostile_text_is_escaped_and_cut_in_the_message() -> None:
    with pytest.raises(SpiffeError) as caught:
        SpiffeId.parse("spiffe://m/\r\n\x1b[31m" + "x" * 1000)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 250


@given(st.text(alphabet="spife:/.%@?#AaZ09-_\x00é ", max_size=60) | st.text(max_size=60).map("spiffe://".__add__))
def test_whatever_is_accepted_is_spelt_the_same_again(text: str) -> None:
    try:
        parsed = SpiffeId.parse(text)
    except SpiffeError:
        return
    assert str(parsed) == text


def test_services() -> None:
    web = SpiffeId.for_service("mesh.local", "web")
    assert str(web) == "spiffe://mesh.local/service/web"
    assert web.service == "web"
    for text in ("spiffe://m/service/web/1", "spiffe://m/node/web", "spiffe://m/service/WEB", "spiffe://m/service/.w"):
        assert SpiffeId.parse(text).service is None


@pytest.mark.parametrize("name", ["", "Web", "-web", "web-", "we.b", "we_b", "w/b", "web\n", "a" * 64, "wéb"])
def test_names_that_no_service_may_have(name: str) -> None:
    with pytest.raises(SpiffeError):
        check_service_name(name)


def test_a_trust_domain_is_checked_by_itself() -> None:
    assert check_trust_domain("mesh.local") == "mesh.local"
    with pytest.raises(SpiffeError, match="lower case"):
        check_trust_domain("Mesh.local")


def test_an_id_cannot_be_built_round_the_parser() -> None:
    with pytest.raises(SpiffeError):
        SpiffeId("mesh.local", "service/web")
    with pytest.raises(SpiffeError):
        SpiffeId("mesh.local", "")
