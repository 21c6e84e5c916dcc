import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.policy.outcome import Outcome
from sidecar.policy.paths import BadPath, judge, opaque


@pytest.mark.parametrize(
    "target",
    [
        b"/",
        b"/a",
        b"/a/",
        b"/a/b.c/d-e_f~g",
        b"/a/b@c:d,e=f!$&'()*+",
        b"/a.b/c..d/e...",
        b"/.well-known/x",
        b"/...",
        b"/a/.../b",
        b"/..a",
        b"/a%20b",
        b"/a%3Bb",
        b"/a%252e%252e/b",
        b"/%C0%AE%C0%AE/x",
        b"/a?x=1",
        b"/a?../..//;%2f%zz",
        b"/?",
        b"/a?b?c",
    ],
)
def test_ordinary_paths_pass_as_they_are(target: bytes) -> None:
    readings = judge(target)
    path, _, query = target.partition(b"?")
    assert readings.forward == target
    assert readings.as_is == path
    assert readings.merged is readings.as_is
    assert not readings.ambiguous
    assert readings.query == query


def test_a_clean_target_is_not_copied() -> None:
    target = b"/a/b"
    readings = judge(target)
    assert readings.forward is target
    assert readings.as_is is target
    assert judge(b"/a/b?c").forward == b"/a/b?c"


@pytest.mark.parametrize(
    ("target", "forward"),
    [
        # unreserved characters are decoded once, in any spelling
        (b"/%61dmin", b"/admin"),
        (b"/%41%5a%61%7A%30%39%2d%2D%2E%5f%7e", b"/AZaz09--._~"),
        (b"/a%3b%3B", b"/a%3B%3B"),
        (b"/%c3%a9", b"/%C3%A9"),
        (b"/%25%36%31", b"/%2561"),
        (b"/%2561dmin", b"/%2561dmin"),
        (b"/%252e%252e/admin", b"/%252e%252e/admin"),
        (b"/%c0%ae%c0%ae/admin", b"/%C0%AE%C0%AE/admin"),
        (b"/%c0%af", b"/%C0%AF"),
        (b"/%e0%80%af", b"/%E0%80%AF"),
        # characters that a path may not hold are encoded
        (b"/a|b", b"/a%7Cb"),
        (b"/a[1]{2}", b"/a%5B1%5D%7B2%7D"),
        ("/é".encode(), b"/%C3%A9"),
        (b"/\xff", b"/%FF"),
        # dot segments
        (b"/a/./b", b"/a/b"),
        (b"/a/../b", b"/b"),
        (b"/a/b/..", b"/a/"),
        (b"/a/.", b"/a/"),
        (b"/a/..", b"/"),
        (b"/.", b"/"),
        (b"/./", b"/"),
        (b"/a/b/../../c", b"/c"),
        (b"/a/%2e%2e/b", b"/b"),
        (b"/a/%2E./b", b"/b"),
        (b"/a/.%2e/b", b"/b"),
        (b"/a/%2e/b", b"/a/b"),
        (b"/a/../b?x=/../y%2f", b"/b?x=/../y%2f"),
        (b"/public/../admin", b"/admin"),
        (b"/a/..b/.c/d..", b"/a/..b/.c/d.."),
    ],
)
def test_one_normal_form_is_judged_and_forwarded(target: bytes, forward: bytes) -> None:
    readings = judge(target)
    assert readings.forward == forward
    assert readings.as_is == forward.partition(b"?")[0]
    assert readings.merged == readings.as_is


@pytest.mark.parametrize(
    ("target", "forward", "merged"),
    [
        (b"//", b"//", b"/"),
        (b"//admin", b"//admin", b"/admin"),
        (b"/a//b", b"/a//b", b"/a/b"),
        (b"/a///b//", b"/a///b//", b"/a/b/"),
        (b"/a;x=1/b;y", b"/a;x=1/b;y", b"/a/b"),
        (b"/admin;", b"/admin;", b"/admin"),
        (b"/a/;/b", b"/a/;/b", b"/a/b"),
        (b"/;/admin", b"/;/admin", b"/admin"),
        (b"/a/..;/admin", b"/a/..;/admin", b"/admin"),
        (b"/a/b/..;x=%2e/admin", b"/a/b/..;x=./admin", b"/a/admin"),
        (b"/a/.;/b", b"/a/.;/b", b"/a/b"),
        (b"/a/%2e%2e;/admin", b"/a/..;/admin", b"/admin"),
        (b"/a//../b", b"/a/b", b"/a/b"),
        (b"/a/..//b", b"//b", b"/b"),
        (b"//../admin", b"/admin", b"/admin"),
        (b"/a;/../b", b"/b", b"/b"),
        (b"/a//b?x=//;", b"/a//b?x=//;", b"/a/b"),
    ],
)
def test_double_slashes_and_parameters_are_judged_in_two_readings(target: bytes, forward: bytes, merged: bytes) -> None:
    readings = judge(target)
    assert readings.forward == forward
    assert readings.as_is == forward.partition(b"?")[0]
    assert readings.merged == merged
    assert readings.ambiguous == (merged != readings.as_is)


@pytest.mark.parametrize(
    "target",
    [
        b"",
        b"a",
        b"*",
        b"?x",
        b"http://x/",
        b"/..",
        b"/../a",
        b"/a/../..",
        b"/a/../../b",
        b"/%2e%2e/a",
        b"/./../a",
        b"/..;/a",
        b"/a/..;/..;/b",
        b"/;/..;/b",
        b"/%",
        b"/%2",
        b"/a%2",
        b"/%zz",
        b"/%2g",
        b"/%%34%31",
        b"/%u002e",
        b"/% 41",
        b"/%+1",
        b"/a%2fb",
        b"/a%2Fb",
        b"/a%5cb",
        b"/a%5Cb",
        b"/a\\b",
        b"/..\\a",
        b"/a%00",
        b"/a%0a",
        b"/a%0D%0a",
        b"/a%1f",
        b"/a%7f",
        b"/a\x00",
        b"/a\nb",
        b"/a\tb",
        b"/a b",
        b"/a\x7f",
        b"/a#b",
        b"/a#",
        b"/admin#/../public",
    ],
)
def test_bad_and_ambiguous_paths_are_refused(target: bytes) -> None:
    with pytest.raises(BadPath) as caught:
        judge(target)
    assert caught.value.outcome is Outcome.BAD_REQUEST
    assert caught.value.reason


def test_the_reason_says_what_was_wrong() -> None:
    for target, reason in (
        (b"/a%2fb", "the path contains an encoded slash or backslash"),
        (b"/%zz", "the path contains a malformed percent-encoding"),
        (b"/a%00", "the path contains an encoded control character"),
        (b"/..", "the path climbs above the root"),
        (b"/a\\b", r"the path contains the character b'\\'"),
        (b"x", "the target is not an absolute path"),
    ):
        with pytest.raises(BadPath) as caught:
            judge(target)
        assert caught.value.reason == reason


pieces = st.lists(
    st.sampled_from(
        [b"/", b"/", b".", b"..", b";", b"%2e", b"%2E", b"%2561", b"%c0%ae", b"a", b"B", b"%41", b"|", b"="]
    ),
    max_size=12,
).map(lambda parts: b"/" + b"".join(parts))


@settings(deadline=None, derandomize=True)
@given(target=pieces | st.binary(max_size=30).map(lambda raw: b"/" + raw))
def test_the_normal_form_is_a_fixed_point(target: bytes) -> None:
    try:
        first = judge(target)
    except BadPath:
        return
    again = judge(first.forward)
    assert again.forward == first.forward
    assert again.as_is == first.as_is
    assert again.merged == first.merged
    assert judge(first.merged).as_is == first.merged
    assert judge(first.merged).merged == first.merged
    path = first.merged
    assert b"//" not in path and b";" not in path
    assert not {b".", b".."} & set(path.split(b"/")) and not {b".", b".."} & set(first.as_is.split(b"/"))


@settings(deadline=None, derandomize=True)
@given(target=st.binary(max_size=40))
def test_opaque_never_changes_or_refuses(target: bytes) -> None:
    readings = opaque(target)
    assert readings.forward is target
    assert readings.as_is == target.partition(b"?")[0]
    assert readings.merged is readings.as_is
