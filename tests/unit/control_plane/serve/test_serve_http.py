import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from certs.spiffe import SpiffeError
from control_plane.serve.http import (
    ApiError,
    decode_json,
    of_store,
    parse_peer,
    peer_of,
    read_body,
    read_json,
    read_query,
    send_error,
)
from control_plane.store.base import StoreFull, StoreUnavailable

OWN = "spiffe://mesh.local/service/pillion-control-plane"
WEB = "spiffe://mesh.local/service/web"
HASH = "ab" * 32


def receiving(*parts: Any) -> Any:
    pending = list(parts)

    async def receive() -> Any:
        part = pending.pop(0)
        if part is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": part, "more_body": bool(pending)}

    return receive


async def test_bodies_are_bounded() -> None:
    assert await read_body(receiving(b"ab", b"", b"c"), 3) == b"abc"
    with pytest.raises(ApiError) as caught:
        await read_body(receiving(b"ab", b"cd", b"never read"), 3)
    assert caught.value.status == 413
    with pytest.raises(ConnectionError):
        await read_body(receiving(b"ab", None), 3)
    assert await read_json(receiving(b""), 9) == {}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "not JSON"),
        (b"\xff", "not UTF-8"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b'{"a": NaN}', "NaN is no number"),
        (b"[-Infinity]", "-Infinity is no number"),
        (b'{"a": 1, "b": {"x": 1, "x": 2}}', "the key 'x' stands there twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b"9" * 5000, "not JSON as it should be"),
        (b'"\\ud800"', "half of a surrogate pair"),
        (b'{"\\uDFFF": 1}', "half of a surrogate pair"),
        (b"{} {}", "not JSON"),
    ],
)
def test_what_is_no_json(body: bytes, says: str) -> None:
    with pytest.raises(ApiError, match=says) as caught:
        decode_json(body)
    assert (caught.value.status, caught.value.code) == (400, "invalid")


def test_a_whole_pair_is_good() -> None:
    assert decode_json(b'"\\ud83d\\ude00"') == "\N{GRINNING FACE}"


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner), max_leaves=10)
)
def test_what_json_writes_is_read(value: Any) -> None:
    assert decode_json(json.dumps(value).encode()) == value


@given(st.binary(max_size=40))
def test_any_bytes(body: bytes) -> None:
    with contextlib.suppress(ApiError):
        json.dumps(decode_json(body)).encode()


def test_the_peer_is_what_our_listener_says() -> None:
    peer = parse_peer(f"By={OWN};Hash={HASH};URI={WEB}")
    assert (str(peer.identity), peer.fingerprint, peer.service, peer.operator) == (WEB, HASH, "web", None)
    ana = parse_peer(f"By={OWN};Hash={HASH};URI=spiffe://mesh.local/operator/ana/t1")
    assert (ana.service, ana.operator) == (None, ("ana", "t1"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        f"Hash={HASH};URI={WEB}",
        f"By={OWN};Hash={HASH.upper()};URI={WEB}",
        f"By={OWN};Hash={HASH[:-1]};URI={WEB}",
        f"By={OWN};Hash={HASH};URI={WEB};URI=spiffe://mesh.local/service/admin",
        f"By={OWN};Hash={HASH};URI={WEB},By={OWN};Hash={HASH};URI={WEB}",
        f'By={OWN};Hash={HASH};Subject="CN=x;URI={WEB}";URI={WEB}',
        f"By={OWN};Hash={HASH};URI={WEB} ",
        f"by={OWN};hash={HASH};uri={WEB}",
        f"By={WEB};Hash={HASH};URI={WEB}",
        f"By={OWN};Hash={HASH};URI=spiffe://other.example/service/web",
        f"By={OWN};Hash={HASH};URI=spiffe://mesh.local/service/../web",
        f"By={OWN};Hash={HASH};URI=https://mesh.local/service/web",
        f"By={OWN};Hash={HASH};URI={WEB}\n",
    ],
)
def test_any_other_form_is_refused(text: str) -> None:
    with pytest.raises(SpiffeError):
        parse_peer(text)


def test_a_peer_told_twice_is_refused() -> None:
    header = (b"x-forwarded-client-cert", f"By={OWN};Hash={HASH};URI={WEB}".encode())
    assert peer_of({"headers": []}) is None
    assert peer_of({"headers": [header]}) is not None
    for headers in ([header, header], [(header[0], b"\xff")], [(header[0], b"")], [(b"X-Forwarded-Client-Cert", b"x")]):
        with pytest.raises(ApiError) as caught:
            peer_of({"headers": headers})
        assert caught.value.status == 401


@pytest.mark.parametrize(
    ("query", "says"),
    [
        (b"x=1", "unknown parameter 'x'"),
        (b"limit=1&limit=2", "given twice"),
        (b"limit", "malformed"),
        (b"%ff=1", "malf"),
    ],
)
def test_bad_queries(query: bytes, says: str) -> None:
    with pytest.raises(ApiError, match=says):
        read_query({"query_string": query}, {"limit": None})


def test_good_queries() -> None:
    assert read_query({"query_string": b""}, {}) == {}
    assert read_query({"query_string": b"limit=3&service=a%20b"}, {"limit": 1, "service": 1}) == {
        "limit": "3",
        "service": "a b",
    }


async def answered(error: ApiError) -> tuple[int, dict[bytes, bytes], Any]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await send_error(send, error)
    return sent[0]["status"], dict(sent[0]["headers"]), json.loads(sent[1]["body"])


async def test_errors_have_one_form() -> None:
    status, headers, body = await answered(ApiError(403, "no", "because", "do this", {"x": 1}))
    assert status == 403
    assert body == {"error": {"code": "no", "message": "because", "help": "do this", "details": {"x": 1}}}
    assert headers[b"content-type"] == b"application/json" and headers[b"cache-control"] == b"no-store"
    _, headers, body = await answered(ApiError(401, "who", "who are you"))
    assert headers[b"www-authenticate"].startswith(b"Bearer") and "details" not in body["error"]
    assert (await answered(ApiError(429, "x", "y")))[1][b"retry-after"] == b"2"
    status, headers, body = await answered(of_store(StoreFull("quota")))
    assert (status, headers[b"retry-after"], body["error"]["code"]) == (503, b"30", "store_full")
    assert of_store(StoreUnavailable("gone")).code == "store_unavailable"
