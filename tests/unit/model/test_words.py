import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.model import words
from sidecar.policy.globs import compile_glob
from sidecar.policy.regexes import compile_regex


@pytest.mark.parametrize("text", ["web", "web-2", "0", "a" * 63])
def test_labels(text: str) -> None:
    assert words.label(text) is None


@pytest.mark.parametrize("text", ["", "Web", "-a", "a-", "a.b", "a_b", "a" * 64, "a\n", "ä"])
def test_not_labels(text: str) -> None:
    assert words.label(text) is not None


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("10.0.3.7:8443", ("10.0.3.7", 8443)),
        ("[fd00::1]:80", ("fd00::1", 80)),
        ("[FD00:0::1]:80", ("fd00::1", 80)),
        ("Db.Example.:5432", ("db.example", 5432)),
        ("localhost:1", ("localhost", 1)),
    ],
)
def test_addresses(text: str, parts: tuple[str, int]) -> None:
    assert words.address(text) is None
    assert words.split_address(text) == parts


@pytest.mark.parametrize(
    "text",
    ["", "a", ":80", "a:", "a:0", "a:65536", "a:080808", "a:-1", "a:٣", "fd00::1:80", "[fd00::1]", "[a]:80",
     "[10.0.0.1]:80", "10.0.0.01:80",
     "10.0.0:80", "10.0.0.256:80", "a b:80", "a..b:80", "fe80::1%eth0:80", "[fe80::1%eth0]:80", "user@a:80"],
)  # fmt: skip
def test_not_addresses(text: str) -> None:
    assert words.address(text) is not None


@pytest.mark.parametrize("text", ["spiffe://mesh/service/web", "spiffe://a.b-c_d/x/y.Z_0"])
def test_spiffe_ids(text: str) -> None:
    assert words.spiffe_id(text) is None


@pytest.mark.parametrize(
    "text",
    ["spiffe://mesh", "spiffe://mesh/", "spiffe://Mesh/a", "spiffe://mesh:1/a", "spiffe://u@mesh/a", "spiffe://mesh/a/",
     "spiffe://mesh//a", "spiffe://mesh/./a", "spiffe://mesh/../a", "spiffe://mesh/%41", "spiffe://mesh/a?b",
     "SPIFFE://mesh/a", "http://mesh/a", "spiffe://mesh/" + "a" * 2048],
)  # fmt: skip
def test_not_spiffe_ids(text: str) -> None:
    assert words.spiffe_id(text) is not None


@pytest.mark.parametrize("text", ["Content-Length", "transfer_encoding", "X-Pillion-Reason", "x_forwarded_for", "TE"])
def test_headers_that_only_the_sidecar_writes(text: str) -> None:
    assert words.edited_header(text) is not None


@pytest.mark.parametrize("text", ["", ":path", "a b", "a:", "ä", "a\n"])
def test_not_header_names(text: str) -> None:
    assert words.header_name(text) is not None


@pytest.mark.parametrize("text", ["a\r\nb", "a\0", " a", "a ", "\x1b"])
def test_not_header_values(text: str) -> None:
    assert words.header_value(text) is not None


@pytest.mark.parametrize(
    "text",
    [
        "//evil.example", "/\\evil.example", "javascript:alert(1)", "/a b", "/a\r\nSet-Cookie: x", "", "x", "ftp://x/",
        "https://e.example?x", "https://e.example#x", "https://u@e.example", "https://e.example:0/", "https:/x",
        "https:",
    ],
)  # fmt: skip
def test_not_redirect_targets(text: str) -> None:
    assert words.redirect_target(text) is not None


@pytest.mark.parametrize("text", ["reviews.example", "reviews.example:8080", "[::1]:80", "[::1]", "10.0.0.1"])
def test_authorities(text: str) -> None:
    assert words.authority(text) is None


@pytest.mark.parametrize("text", ["", "a/b", "a b", "u@a", "a:b", "::1", "a:99999"])
def test_not_authorities(text: str) -> None:
    assert words.authority(text) is not None


@settings(max_examples=500, deadline=None)
@given(st.text(alphabet=st.sampled_from("/a*.%2Ff5c0?#{}[]\\ ü~e"), max_size=24).map(lambda text: "/" + text))
def test_what_passes_as_a_path_pattern_compiles(text: str) -> None:
    if words.path_glob(text) is None:
        compile_glob(text)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab()[]{}*+?|\\1.^$9,ü"), max_size=16))
def test_what_passes_as_a_regular_expression_compiles(text: str) -> None:
    if words.regex(text) is None:
        compile_regex(text)


@pytest.mark.parametrize("text", ["/" + "ü" * 400, "/" + "|" * 400, "/" + "a" * 1100, "/a" * 65])
def test_long_paths_are_refused_as_the_compiler_would(text: str) -> None:
    assert words.path_glob(text) is not None
    with pytest.raises(ValueError, match="too long"):
        compile_glob(text)


def test_regular_expressions_are_bounded() -> None:
    assert words.regex("(a{500}){500}") is not None
    assert words.regex("a{900}{9}") is not None
