"""Joining, renewing and coming back, over a store in memory."""

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from support.memory_store import MemoryStore
from support.operators import AUTHORITY, EPOCH, NOW, Api, csr, make_authority, running_api

from certs.authority import bundle_of, certificate_pem, create_root, new_key
from certs.files import CaFiles
from certs.pem import read_blocks
from certs.svid import check_leaf, fingerprint, parse_certificate, validity_of
from certs.tokens import make_token
from control_plane.serve.http import ApiError, parse_peer
from control_plane.serve.joins import renew
from control_plane.serve.minting import make
from control_plane.state.records import SIDECARS, Sidecar


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    async with running_api(MemoryStore()) as api:
        yield api


def leaf_of(text: str) -> x509.Certificate:
    return parse_certificate(read_blocks(text.encode(), 10**6, 8)[0].der)


def shown(leaf: x509.Certificate) -> str:
    return fingerprint(leaf.public_bytes(Encoding.DER))


def record_of(api: Api, sidecar: str) -> Sidecar:
    return api.replica.state.get(SIDECARS, sidecar)  # type: ignore[no-any-return]


async def join(api: Api, token: str, request: str | None = None, service: str = "web", **more: Any) -> tuple[int, Any]:
    body = {"token": token, "csr": request or csr(), "service": service, **more}
    return await api.call("POST", "/v1/join", body)


def code(answer: Any) -> str:
    error = answer["error"]
    assert error["message"] and isinstance(error["help"], str)
    return str(error["code"])


async def test_a_sidecar_joins(api: Api) -> None:
    key = new_key()
    welcome = await api.join("web", key, name="host-1")
    leaf = leaf_of(welcome["certificate"])
    assert str(check_leaf(leaf.public_bytes(Encoding.DER), "mesh.local")) == "spiffe://mesh.local/service/web"
    assert welcome["spiffe_id"] == "spiffe://mesh.local/service/web"
    assert leaf.public_key() == key.public_key()
    assert validity_of(leaf).not_after.timestamp() == welcome["not_after"] == pytest.approx(EPOCH + 86400, abs=2)
    assert len(read_blocks(welcome["certificate"].encode(), 10**6, 8)) == 2  # with its issuer, without the root
    assert welcome["bundle"] == AUTHORITY.bundle.pem.decode()
    assert (welcome["mesh"], welcome["join"]) == (["127.0.0.1:15010"], ["127.0.0.1:15011"])
    record = record_of(api, welcome["sidecar"])
    assert (record.service, record.fingerprints, record.name) == ("web", (shown(leaf),), "host-1")
    assert api.replica.by_fingerprint[shown(leaf)] == welcome["sidecar"]
    await trio.sleep(0.1)
    _, audit = await api.call("GET", "/v1/audit?limit=1", token=api.admin)
    assert audit["audit"][0]["action"] == "join" and "host-1" in audit["audit"][0]["message"]


async def test_a_token_is_used_as_often_as_it_says(api: Api) -> None:
    token = await api.token(kind="join", service="web", uses=2)
    assert (await join(api, token))[0] == (await join(api, token))[0] == 200
    status, answer = await join(api, token)
    assert (status, code(answer)) == (401, "token_used_up")


async def test_many_at_once_share_its_uses(api: Api) -> None:
    token = await api.token(kind="join", service="web", uses=20)
    found: list[int] = []

    async def one() -> None:
        found.append((await join(api, token))[0])

    async with trio.open_nursery() as nursery:
        for _ in range(30):
            nursery.start_soon(one)
    assert sorted(found) == [200] * 20 + [401] * 10
    assert len(api.replica.state.table(SIDECARS)) == 20


async def test_two_replicas_share_its_uses(api: Api) -> None:
    async with running_api(api.replica.store, name="r2") as other:
        token = await api.token(kind="join", service="web", uses=6)
        await other.replica.changed(api.replica.state.revision - 1)
        found: list[int] = []

        async def one(where: Api) -> None:
            found.append((await join(where, token))[0])

        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(one, (api, other)[number % 2])
        assert sorted(found) == [200] * 6 + [401] * 4


async def test_who_asks_again_is_the_same_sidecar(api: Api) -> None:
    """The answer was lost: the token has one use, and the key is the same."""
    key = new_key()
    token = await api.token(kind="join", service="web", uses=1)
    _, first = await join(api, token, csr(key))
    status, again = await join(api, token, csr(key))
    assert status == 200 and again["sidecar"] == first["sidecar"] and again["certificate"] != first["certificate"]
    record = record_of(api, first["sidecar"])
    assert record.fingerprints == (shown(leaf_of(again["certificate"])), shown(leaf_of(first["certificate"])))
    assert (await join(api, token))[0] == 401
    api.clock.added += 3601
    status, answer = await join(api, token, csr(key))
    assert (status, code(answer)) == (401, "token_expired")


async def test_only_as_the_service_of_the_token(api: Api) -> None:
    token = await api.token(kind="join", service="web")
    status, answer = await join(api, token, service="admin")
    assert (status, code(answer)) == (403, "token_wrong_service")
    assert 'for the service "web", not for "admin"' in answer["error"]["message"]
    assert (await join(api, token))[0] == 200, "a refusal takes no use"


async def test_nobody_joins_as_the_control_plane(api: Api) -> None:
    name = "pillion-control-plane"
    status, answer = await api.call(
        "POST", "/v1/tokens", {"kind": "join", "service": name, "ttl_s": 60}, token=api.admin
    )
    assert (status, code(answer)) == (400, "reserved")
    token = (await make(api.replica, "join", by="x", ttl_s=60, service=name))["token"]
    status, answer = await join(api, token, service=name)
    assert (status, code(answer)) == (403, "reserved")


async def test_bad_tokens(api: Api) -> None:
    token = await api.token(kind="join", service="web")
    root = AUTHORITY.bundle.roots[0].fingerprint

    async def refused(text: str) -> tuple[int, str]:
        status, answer = await join(api, text)
        return status, code(answer)

    assert await refused(token[:-2]) == (401, "token_damaged")
    assert await refused("hunter2") == (401, "token_damaged")
    assert await refused(make_token("join", "t9", "x", ["h:1"], root, "other.example")) == (401, "token_foreign")
    assert await refused(make_token("join", "t9", "x", ["h:1"], "ab" * 32, "mesh.local")) == (401, "token_foreign")
    assert await refused(make_token("join", "t9", "x", ["h:1"], root, "mesh.local")) == (401, "token_unknown")
    _, tokens = await api.call("GET", "/v1/tokens", token=api.admin)
    id = tokens["tokens"][-1]["id"]
    assert await refused(make_token("join", id, "guess", ["h:1"], root, "mesh.local")) == (401, "token_forged")
    assert await refused(api.admin) == (403, "token_wrong_kind")
    api.clock.added += 3601
    assert await refused(token) == (401, "token_expired")
    assert (await api.call("DELETE", f"/v1/tokens/{id}", token=api.admin))[0] == 200
    assert await refused(token) == (401, "token_unknown")


def request_for(key: Any, *uris: str, name: str = "admin") -> str:
    names = x509.SubjectAlternativeName(
        [x509.DNSName("admin.mesh.local"), *(x509.UniformResourceIdentifier(uri) for uri in uris)]
    )
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject).add_extension(names, False)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM).decode()


async def test_names_in_a_request_decide_nothing(api: Api) -> None:
    token = await api.token(kind="join", service="web", uses=None)
    status, welcome = await join(api, token, request_for(new_key(), "spiffe://mesh.local/service/web"))
    assert status == 200
    leaf = leaf_of(welcome["certificate"])
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [each.value for each in names] == ["spiffe://mesh.local/service/web"]
    assert "admin" not in leaf.subject.rfc4514_string()
    for uris in (
        ["spiffe://mesh.local/service/admin"],
        ["spiffe://mesh.local/service/web", "spiffe://mesh.local/service/admin"],
        ["spiffe://other.example/service/web"],
        ["https://elsewhere"],
    ):
        status, answer = await join(api, token, request_for(new_key(), *uris))
        assert (status, code(answer)) == (403, "wrong_identity")
        assert "spiffe://mesh.local/service/web" in answer["error"]["message"]


async def test_bad_requests(api: Api) -> None:
    token = await api.token(kind="join", service="web", uses=1)
    good = csr()
    middle = len(good) // 2
    other = x509.load_pem_x509_csr(good.encode()).public_bytes(Encoding.DER)
    spoiled = other[:-3] + bytes([other[-3] ^ 1]) + other[-2:]
    weak = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    small = weak.sign(rsa.generate_private_key(65537, 1024), hashes.SHA256()).public_bytes(Encoding.PEM).decode()
    odd = weak.sign(ec.generate_private_key(ec.SECP521R1()), hashes.SHA256()).public_bytes(Encoding.PEM).decode()
    import base64

    from_der = "-----BEGIN CERTIFICATE REQUEST-----\n{}\n-----END CERTIFICATE REQUEST-----\n".format
    for text in (
        "x",
        good[:middle],
        good + good,
        certificate_pem([AUTHORITY.root]).decode(),
        from_der(base64.b64encode(spoiled).decode()),
        from_der(base64.b64encode(other[:-9]).decode()),
        from_der("AAAA"),
        small,
        odd,
    ):
        status, answer = await join(api, token, text)
        assert (status, code(answer)) == (400, "invalid_csr"), text
    assert (await join(api, token, good))[0] == 200, "none of these has taken the token's use"


async def renewed(api: Api, sidecar: str, leaf: x509.Certificate, request: str | None = None) -> Any:
    peer = parse_peer(api.peer("spiffe://mesh.local/service/web", shown(leaf)))
    return await renew(api.replica, sidecar, peer, request or csr())


async def test_a_sidecar_renews(api: Api) -> None:
    welcome = await api.join("web")
    sidecar, first = welcome["sidecar"], leaf_of(welcome["certificate"])
    api.clock.added += 43200
    answer = await renewed(api, sidecar, first)
    second = leaf_of(answer["certificate"])
    assert answer["not_after"] == pytest.approx(EPOCH + 43200 + 86400, abs=2)
    assert answer["bundle"] == AUTHORITY.bundle.pem.decode()
    assert record_of(api, sidecar).fingerprints == (shown(second), shown(first))
    api.clock.added += 2
    third = leaf_of((await renewed(api, sidecar, first))["certificate"])  # the answer was lost
    assert record_of(api, sidecar).fingerprints == (shown(third), shown(first))
    with pytest.raises(ApiError) as caught:  # what nobody has ever used counts no more
        await renewed(api, sidecar, second)
    assert caught.value.code == "unknown_sidecar"
    with pytest.raises(ApiError) as caught:
        await renewed(api, sidecar, first)
    assert (caught.value.status, caught.value.retry_after_s) == (429, 1)


async def ended(api: Api, key: Any, **settings: Any) -> tuple[str, str]:
    welcome = await api.join("web", key)
    api.clock.added += 86400 + 60
    return welcome["sidecar"], welcome["certificate"]


async def rejoin(api: Api, certificate: str, request: str) -> tuple[int, Any]:
    return await api.call("POST", "/v1/rejoin", {"certificate": certificate, "csr": request})


async def test_coming_back_after_the_certificate_has_ended(api: Api) -> None:
    key = new_key()
    sidecar, old = await ended(api, key)
    status, welcome = await rejoin(api, old, csr(key))
    assert status == 200 and welcome["sidecar"] == sidecar
    assert welcome["not_after"] == pytest.approx(EPOCH + 2 * 86400 + 60, abs=2)
    assert leaf_of(welcome["certificate"]).public_key() == key.public_key()


async def test_coming_back_needs_the_key(api: Api) -> None:
    _, old = await ended(api, new_key())
    status, answer = await rejoin(api, old, csr())
    assert (status, code(answer)) == (403, "wrong_key")


async def test_the_grace_ends(api: Api) -> None:
    key = new_key()
    _, old = await ended(api, key)
    api.clock.added += 7 * 86400
    status, answer = await rejoin(api, old, csr(key))
    assert (status, code(answer)) == (403, "grace_over")
    assert "could be renewed for 7 days" in answer["error"]["message"]


async def test_no_grace_at_all(autojump_clock: Any) -> None:
    async with running_api(MemoryStore(), rejoin_grace=timedelta(0)) as api:
        key = new_key()
        _, old = await ended(api, key)
        status, answer = await rejoin(api, old, csr(key))
        assert (status, code(answer)) == (403, "grace_over")


async def test_coming_back_with_what_is_not_ours(api: Api) -> None:
    key = new_key()
    _, old = await ended(api, key)
    foreign = make_authority().issuing.issue_to_key(
        key.public_key(), check_leaf(leaf_of(old).public_bytes(Encoding.DER), "mesh.local"), timedelta(hours=1),
        api.replica.today(),
    )  # fmt: skip
    for text in (certificate_pem([foreign]).decode(), certificate_pem([AUTHORITY.root]).decode()):
        status, answer = await rejoin(api, text, csr(key))
        assert (status, code(answer)) == (401, "unknown_sidecar")
    assert (await rejoin(api, "nonsense", csr(key)))[0] == 400
    assert (await rejoin(api, csr(key), csr(key)))[0] == 400


@pytest.mark.parametrize("kind", ["sidecar", "identity", "certificate"])
async def test_who_is_banned_gets_nothing(api: Api, kind: str) -> None:
    key = new_key()
    token = await api.token(kind="join", service="web", uses=None)
    _, welcome = await join(api, token, csr(key))
    leaf = leaf_of(welcome["certificate"])
    value = {"sidecar": welcome["sidecar"], "identity": welcome["spiffe_id"], "certificate": shown(leaf)}[kind]
    status, _ = await api.call("POST", "/v1/bans", {"kind": kind, "value": value}, token=api.admin)
    assert status == 200
    with pytest.raises(ApiError) as caught:
        await renewed(api, welcome["sidecar"], leaf)
    assert caught.value.code == "banned"
    for status, answer in (await rejoin(api, welcome["certificate"], csr(key)), await join(api, token, csr(key))):
        assert (status, code(answer)) == (403, "banned")
    assert (await join(api, token))[0] == (403 if kind == "identity" else 200)


async def test_a_leaf_does_not_outlive_its_issuer(autojump_clock: Any) -> None:
    root = create_root("mesh.local", NOW)
    authority = CaFiles("mesh.local", root.certificate, root.issue_authority(NOW, timedelta(hours=2)), bundle_of(root))
    async with running_api(MemoryStore(), authority) as api:
        token = await api.token(kind="join", service="web", uses=None, ttl_s=86400)
        api.clock.added = 3600
        _, welcome = await join(api, token)
        assert welcome["not_after"] == EPOCH + 7200
        api.clock.added = 7300
        status, answer = await join(api, token)
        assert (status, code(answer)) == (503, "authority_unusable")
        assert "expired" in answer["error"]["message"]


async def test_leaves_of_seconds(autojump_clock: Any) -> None:
    async with running_api(MemoryStore(), leaf_ttl=timedelta(seconds=5)) as api:
        welcome = await api.join("web")
        leaf = leaf_of(welcome["certificate"])
        for _ in range(5):
            await trio.sleep(2.5)
            leaf = leaf_of((await renewed(api, welcome["sidecar"], leaf))["certificate"])
        assert validity_of(leaf).not_after.timestamp() == pytest.approx(EPOCH + 17.5, abs=2)


async def test_the_store_is_away(api: Api) -> None:
    token = await api.token(kind="join", service="web")
    store: Any = api.replica.store
    store.away = True
    status, answer = await join(api, token)
    assert (status, code(answer)) == (503, "store_unavailable")
    assert api.replies[-1]["retry-after"] == "2"
    store.away = False
    assert (await join(api, token))[0] == 200
