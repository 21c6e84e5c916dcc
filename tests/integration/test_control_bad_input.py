"""What people and machines give a control plane wrongly: each is told clearly, and nothing is lost or left hanging.

Real processes throughout. What sidecars with bad intentions do is in fault/test_control_rogue.py, what full disks and
wrong clocks do in fault/test_control_scarcity.py.
"""

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from support.control import ControlPlane, registered
from support.etcd_cluster import Certificates, Etcd, need_etcd
from support.mesh import Mesh, environment, free_port, until
from support.rogue import Rogue, join
from support.standin_control import Member, launch

from certs.authority import new_key
from certs.client import new_csr
from certs.tokens import make_token, parse_token
from control_plane.state.records import KINDS, META, kind_of
from control_plane.store.address import EtcdOptions
from control_plane.store.base import Delete, Entry, Operation, Put, Store
from control_plane.store.open import opened

T = TypeVar("T")
SHOP: dict[str, Any] = {
    "reviews": {"ports": {"http": {"port": 8000}}, "authz": {"allow": [{"from": ["web"]}]}},
    "web": {"calls": {"reviews": {}}},
}


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    with Mesh(tmp_path) as mesh:
        yield mesh


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[Etcd]:
    need_etcd()
    (tmp_path / "etcd").mkdir()
    with Etcd(tmp_path / "etcd") as etcd:
        yield etcd


def store_of(etcd: Etcd) -> str:
    return "etcd://" + ",".join(f"{host}:{port}" for host, port in etcd.hosts)


def shop(control: ControlPlane) -> tuple[Member, Member]:
    control.apply(SHOP)
    reviews = control.member("reviews", app=control.mesh.backend())
    web = control.member("web", inbound="off")
    registered(control, "reviews")
    until(lambda: status(web) == 200, "an answer")
    return reviews, web


def status(web: Member) -> int:
    with web.client() as client:
        return client.get("/").status


def refused(control: ControlPlane, *options: str, limit_s: float = 20.0) -> str:
    """Start it where it cannot start: what it says."""
    done = subprocess.run(
        control.command(*options), stdin=subprocess.DEVNULL, capture_output=True, timeout=limit_s, env=environment(),
        cwd=control.mesh.path,
    )  # fmt: skip
    said = done.stderr.decode()
    assert done.returncode == 2, (done.returncode, said)
    assert "Traceback" not in said, said
    assert said.splitlines()[-1].startswith("error: "), said
    return said.splitlines()[-1]


def well(control: ControlPlane, limit_s: float = 15.0) -> None:
    """Wait until `check` finds nothing."""
    said = ""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        code, said, _ = control.cli("check")
        if code == 0:
            return
    raise AssertionError(said + control.log[-3000:])


# -- a store that is not as it should be


def unstarted(mesh: Mesh, store: str, name: str = "r1", **more: Any) -> ControlPlane:
    return ControlPlane(mesh, name, store=store, start=False, **more)


@pytest.mark.parametrize(
    ("store", "words"),
    [
        ("etcd://127.0.0.1:{port}", ["etcd is not available", "127.0.0.1:{port}", "connection refused"]),
        pytest.param(
            "etcd://no-such-host.invalid:2379",
            ["no-such-host.invalid:2379", "name cannot be resolved"],
            marks=pytest.mark.long,
        ),
        ("etcd://127.0.0.1:99999", ["'99999' is no port"]),
        ("etcd://me:secret@127.0.0.1:2379", ["--etcd-password-file"]),
        ("https://127.0.0.1:2379", ["etcd://HOST:PORT"]),
        ("postgres://x", ["is no store", "embedded"]),
    ],
)
def test_a_store_that_is_not_there(mesh: Mesh, store: str, words: list[str]) -> None:
    port = free_port()
    said = refused(unstarted(mesh, store.format(port=port)))
    for word in words:
        assert word.format(port=port) in said, said
    assert "secret" not in said


def test_an_embedded_store_that_is_no_store(mesh: Mesh) -> None:
    control = unstarted(mesh, "embedded")
    control.state.mkdir()
    (control.state / "store.db").write_bytes(b"something else entirely" * 1000)
    said = refused(control)
    assert str(control.state / "store.db") in said and "restore" in said
    assert (control.state / "store.db").read_bytes().startswith(b"something else")


def test_a_store_that_another_control_plane_has_open(mesh: Mesh) -> None:
    first = ControlPlane(mesh, "r1")
    said = refused(unstarted(mesh, f"embedded:{first.state / 'store.db'}", "r2"))
    assert "in use by process" in said and "use etcd for several" in said, said
    assert first.cli("check")[0] == 0


@pytest.mark.long
def test_etcd_that_demands_tls_and_a_password(mesh: Mesh, tmp_path: Path) -> None:
    need_etcd()
    ours, others = Certificates(tmp_path / "tls"), Certificates(tmp_path / "other")
    (tmp_path / "etcd").mkdir()
    with Etcd(tmp_path / "etcd", tls=ours) as etcd:
        etcd.passwords("pillion", "right", "/pillion/v1/")
        good, bad = tmp_path / "good", tmp_path / "bad"
        good.write_text("right\n")
        bad.write_text("wrong-password\n")
        for path in (good, bad):
            path.chmod(0o600)
        control = unstarted(mesh, store_of(etcd))
        tls = f"--etcd-cacert={ours.ca}"
        assert "speaks TLS" in refused(control)
        assert "unknown CA" in refused(control, f"--etcd-cacert={others.ca}")
        assert "user" in refused(control, tls)
        said = refused(control, tls, "--etcd-user=pillion", f"--etcd-password-file={bad}")
        assert "does not accept the password of user 'pillion'" in said
        assert "wrong-password" not in said
        said = refused(control, tls, "--etcd-user=pillion", f"--etcd-password-file={tmp_path / 'none'}")
        assert "none" in said
        said = refused(control, tls, "--etcd-user=pillion", f"--etcd-password-file={good}", "--etcd-prefix=/other/")
        assert "does not let user 'pillion'" in said and "/other/" in said
        control.options = (tls, "--etcd-user=pillion", f"--etcd-password-file={good}")
        control.start()
        control.log_in()
        assert control.cli("check")[0] == 0
        assert "right" not in control.log
    with Etcd(tmp_path / "etcd2", tls=ours, client_certificates=True) if _made(tmp_path / "etcd2") else etcd as etcd:
        control = unstarted(mesh, store_of(etcd), "r2")
        assert "demands a client certificate" in refused(control, tls)
        cert, key = others.issue("stranger")
        said = refused(control, tls, f"--etcd-cert={cert}", f"--etcd-key={key}")
        assert "does not accept our client certificate" in said


def _made(path: Path) -> bool:
    path.mkdir()
    return True


@pytest.mark.long
def test_etcd_that_is_down_at_the_start_is_said_and_systemd_tries_again(mesh: Mesh, etcd: Etcd) -> None:
    """It ends, with the reason as its last words: a supervisor starts it again, as the unit in examples/deploy does."""
    control = unstarted(mesh, store_of(etcd))
    etcd.members[0].freeze()
    began = time.monotonic()
    said = refused(control)
    assert "no answer in time" in said and "start again when it answers" in said
    assert time.monotonic() - began < 15
    etcd.members[0].thaw()
    etcd.wait()
    control.start()
    control.log_in()
    assert control.cli("check")[0] == 0
    etcd.members[0].kill()
    assert control.stop() == 0
    assert "connection refused" in refused(control)
    etcd.members[0].start()
    etcd.wait()
    assert control.start().cli("check", "--wait", "20")[0] == 0


# -- an authority that is not this mesh's


def test_an_authority_that_does_not_fit_the_store(mesh: Mesh, etcd: Etcd) -> None:
    one = ControlPlane(mesh, "r1", store=store_of(etcd))
    said = refused(unstarted(mesh, store_of(etcd), "r2"))  # makes an authority of its own: another root
    assert "pillion ca replica" in said and "--ca" in said
    said = refused(unstarted(mesh, store_of(etcd), "r3"), "--trust-domain=other.example")
    assert "mesh.local" in said and "other.example" in said
    assert len(one.get("replicas")["replicas"]) == 1
    assert one.cli("check")[0] == 0, "nothing was changed by those that were refused"
    one.ok("ca", "replica", "--dir", str(one.state / "ca"), "--out", str(mesh.path / "ca2"))
    two = ControlPlane(mesh, "r2", store=store_of(etcd), ca=mesh.path / "ca2")
    until(lambda: len(one.get("replicas")["replicas"]) == 2, "both")
    assert two.process is not None and two.process.poll() is None


@pytest.mark.long
def test_an_authority_that_is_damaged(mesh: Mesh) -> None:
    control = ControlPlane(mesh)
    assert control.stop() == 0
    ca = control.state / "ca"
    keys = {path: path.read_bytes() for path in ca.iterdir()}
    for path in sorted(keys):
        if path.stem == "root":  # for making further authorities: it may be kept elsewhere
            continue
        path.write_bytes(b"\0 damaged")
        said = refused(control)
        assert str(path) in said, (path, said)
        path.write_bytes(keys[path])
    control.start()
    assert control.cli("check")[0] == 0


# -- records that are not ours, or not good


def on(control: ControlPlane, work: Callable[[Store], Any]) -> Any:
    """Something done to the store itself."""

    async def do() -> Any:
        etcd = EtcdOptions() if control.store.startswith("etcd") else None
        async with opened(control.store, state_dir=control.state, etcd=etcd) as store:
            return await work(store)

    return trio.run(do)


def put(control: ControlPlane, values: Mapping[str, bytes | None]) -> None:
    async def work(store: Store) -> None:
        operations: list[Operation] = [
            Delete(key) if value is None else Put(key, value) for key, value in values.items()
        ]
        await store.commit(operations)

    on(control, work)


def everything(control: ControlPlane) -> Mapping[str, Entry]:
    async def work(store: Store) -> Mapping[str, Entry]:
        return (await store.read()).entries

    found: Mapping[str, Entry] = on(control, work)
    return found


DAMAGE: Mapping[str, tuple[bytes, str]] = {
    "garbage": (b"\xff\x00\xfe garbage", "not JSON"),
    "empty": (b"", "not JSON"),
    "newer": (b'{"format":2,"new":true}', "newer pillion"),
    "foreign": (b'{"hello":"world"}', "no record of pillion"),
    "list": (b"[1,2]", "not a JSON object"),
    "shape": (b'{"format":1,"nothing":"known"}', ""),
    "deep": (b"[" * 100_000, "not JSON"),
    "bomb": (b'{"format":1,"deflated":"eJw="}', "compressed badly"),
}
WRITTEN_ANEW = (
    "policy/settled",
    "alive/",
    "live/",
    "observed/",
    "replicas/",
    "status/",
    "instances/",
)  # by who knows better
NAMES = {"instances/": "reviews/strange", "policy/changes/": "0000000999"}


def reported(control: ControlPlane, keys: Mapping[str, str]) -> bool:
    """`check` and `store show` name each of these keys, with the reason."""
    code, out, said = control.cli("check", "-o", "json")
    rows = {each["name"]: each["cause"] for each in json.loads(out)["checks"]} if out else {}
    missing = {key: rows.get(f"record {key}") for key, why in keys.items() if why not in rows.get(f"record {key}", "-")}
    if code != 1 or missing:
        return False
    code, out, said = show(control)
    assert code == 1, out + said
    told = {each["key"]: each["reason"] for each in json.loads(out)["problems"]}
    assert all(reason in told[key] for key, reason in keys.items()), told
    return True


def show(control: ControlPlane) -> tuple[int, str, str]:
    return control.cli("store", "show", "--store", control.store, "--state-dir", str(control.state), "-o", "json")


def by_kind(control: ControlPlane) -> dict[str, tuple[str, Entry]]:
    found: dict[str, tuple[str, Entry]] = {}
    for key, entry in sorted(everything(control).items()):
        kind = kind_of(key)
        if kind is not None and b'"role":"admin"' not in entry.value:  # that one asks for us
            found.setdefault(kind, (key, entry))
    return found


@pytest.mark.long
@pytest.mark.parametrize("all_damages", [False, pytest.param(True, marks=pytest.mark.long)])
def test_each_kind_of_record_damaged_in_turn_while_it_runs(mesh: Mesh, etcd: Etcd, all_damages: bool) -> None:
    control = ControlPlane(mesh, store=store_of(etcd))
    _, web = shop(control)
    control.apply(SHOP, defaults={"timeout": {"total": "3s"}})
    control.apply({}, enforced={"mtls": "strict"})
    control.ok("cert", "ban", "spiffe://mesh.local/service/nobody", "--reason", "test")
    until(lambda: {"live/", "observed/"} & by_kind(control).keys(), "what sidecars report")
    held = by_kind(control)
    missing = KINDS.keys() - held.keys()
    assert missing <= {"observed/", "policy/settled", "shares/", "demands/"}, missing  # the last two: of global limits
    damages = list(DAMAGE.items())
    for number, (kind, (key, entry)) in enumerate(sorted(held.items())):
        for name, (value, reason) in damages if all_damages else [damages[number % len(damages)]]:
            put(control, {key: value})
            if kind in WRITTEN_ANEW:
                until(lambda: show(control)[0] == 0, f"{key}, written anew", 30)
                continue
            assert until(lambda: reported(control, {key: reason}), f"{name} {kind}", 20)  # noqa: B023
            assert status(web) in (200, 503), (kind, name)
            put(control, {key: entry.value})
        assert "Traceback" not in control.log, (kind, control.log[-3000:])
    until(lambda: status(web) == 200, "all well again", 30)
    well(control, 30)
    control.apply(SHOP)
    until(lambda: status(web) == 200, "an answer by the new policy")


@pytest.mark.long
@pytest.mark.parametrize("kind", ["embedded", pytest.param("etcd", marks=pytest.mark.long)])
def test_foreign_and_damaged_records_at_the_start(mesh: Mesh, kind: str, tmp_path: Path) -> None:
    if kind == "embedded":
        check_strange_records(ControlPlane(mesh))
        return
    need_etcd()
    (tmp_path / "etcd").mkdir()
    with Etcd(tmp_path / "etcd") as etcd:
        check_strange_records(ControlPlane(mesh, store=store_of(etcd)))


def check_strange_records(control: ControlPlane) -> None:
    reviews, web = shop(control)
    control.kill()
    strange: dict[str, tuple[bytes, str]] = {"what/is/this": (b"\0", "not a key of pillion"), "x": (b"{}", "not a key")}
    for number, prefix in enumerate(sorted(KINDS)):
        damage = list(DAMAGE.values())[number % len(DAMAGE)]
        if prefix.endswith("/"):
            strange[prefix + NAMES.get(prefix, "strange")] = damage
        # Singletons: without `meta` it cannot start; `settled` it works out anew; without `defaults` or `enforced`
        # nothing can be said of any service (below).
    before = everything(control)
    put(control, {key: value for key, (value, _) in strange.items()})
    control.start()
    until(lambda: reported(control, {key: reason for key, (_, reason) in strange.items()}), "the report", 20)
    until(lambda: web.source["connected"] and reviews.source["connected"], "the sidecars", 20)
    assert status(web) == 200
    assert "Traceback" not in control.log
    third = control.member("reviews", app=control.mesh.backend())  # joining and registering work
    registered(control, "reviews", 2, 20)
    assert third.stop() == 0
    control.apply(SHOP, "--wait")
    # What cannot be read is still there: nobody deletes what they do not understand.
    after = everything(control) if control.store != "embedded" else everything_of_stopped(control)
    assert {key for key in strange if after[key].value == strange[key][0]} == strange.keys()
    put(control, {key: before[key].value if key in before else None for key in strange})
    if control.store == "embedded":
        control.start()
    well(control, 30)


@pytest.mark.long
def test_defaults_that_cannot_be_read(mesh: Mesh) -> None:
    """They are still known from the change that brought them. Without that, nothing can be said of any service:
    sidecars keep what they have, and no newcomer is told less than holds."""
    control = ControlPlane(mesh)
    _, web = shop(control)
    control.apply(SHOP, defaults={"timeout": {"total": "3s"}})
    assert control.stop() == 0
    before = everything(control)
    put(control, {"policy/defaults": DAMAGE["newer"][0]})
    control.start()
    until(lambda: reported(control, {"policy/defaults": "newer pillion"}), "the report", 20)
    assert "3s" in control.ok("explain", "reviews")
    assert control.stop() == 0

    put(control, {"policy/changes/0000000002": DAMAGE["newer"][0]})
    control.start()
    until(lambda: web.source["connected"], "the return")
    assert status(web) == 200
    third = control.member("web", inbound="off", ready=False)
    time.sleep(1.0)
    assert third.alive and not third.is_ready
    control.kill()
    put(control, {key: before[key].value for key in ("policy/defaults", "policy/changes/0000000002")})
    control.start()
    third.await_ready(30)
    assert status(third) == 200
    well(control, 20)


def everything_of_stopped(control: ControlPlane) -> Mapping[str, Entry]:
    assert control.stop() == 0
    return everything(control)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("newer", "newer pillion"),
        pytest.param("garbage", "cannot be read", marks=pytest.mark.long),
        pytest.param("", "holds", marks=pytest.mark.long),
    ],
)
def test_a_store_whose_meta_record_is_not_good(mesh: Mesh, name: str, word: str) -> None:
    """Only here it must refuse: it would not know what mesh this is."""
    control = ControlPlane(mesh)
    assert control.stop() == 0
    good = everything(control)[META].value
    put(control, {META: DAMAGE[name][0] if name else None})
    said = refused(control)
    assert '"meta"' in said and word in said and "backup" in said.lower()
    put(control, {META: good})
    control.start()
    assert control.cli("check")[0] == 0


# -- a policy of a newer version


@pytest.mark.long
def test_a_policy_file_of_a_newer_version(mesh: Mesh) -> None:
    control = ControlPlane(mesh)
    _, web = shop(control)
    path = mesh.path / "newer.yaml"
    path.write_text("version: 2\nservices:\n  reviews:\n    timeout: 1s\n")
    code, _, said = control.cli("policy", "apply", "-f", str(path))
    assert code != 0 and "newer.yaml:1" in said and "version" in said, said
    path.write_text("services:\n  reviews:\n    quantum: yes\n")
    code, _, said = control.cli("policy", "apply", "-f", str(path))
    assert code != 0 and "newer.yaml:3" in said and "quantum" in said, said
    assert status(web) == 200


@pytest.mark.long
def test_a_document_of_a_newer_version_in_the_store(mesh: Mesh, etcd: Etcd) -> None:
    """A newer replica has written what we do not know: the last good one serves on, and `check` says which and why."""
    control = ControlPlane(mesh, store=store_of(etcd))
    _, web = shop(control)
    until(lambda: "policy/services/reviews" in everything(control), "the document under its own key")
    key, entry = "policy/services/reviews", everything(control)["policy/services/reviews"]
    record = json.loads(entry.value)
    for text, word in (
        ("reviews:\n  quantum: true\n", "quantum"),
        ("reviews: [1, 2]\n", ""),
        ("reviews:\n  timeout: {every: 1s}\n", ""),
        ("\0\1", ""),
        ("other: {}\n", ""),
    ):
        put(control, {key: json.dumps(record | {"text": text}).encode()})

        def told() -> bool:
            code, out, _ = control.cli("check", "-o", "json")
            causes = {each["name"]: each["cause"] for each in json.loads(out)["checks"]}
            return code == 1 and word in causes.get("document services/reviews", "-")  # noqa: B023

        until(told, f"a word about {text!r}", 10)
        assert status(web) == 200
        assert "Traceback" not in control.log
    put(control, {key: entry.value})
    well(control, 20)
    assert status(web) == 200


# -- tokens


def joined_badly(mesh: Mesh, token: str | None, *options: str, service: str = "web", limit_s: float = 20.0) -> str:
    """A sidecar that cannot join must end with 2, and say why."""
    member = launch(mesh, service, *options, token=token, inbound="off")
    assert member.process.wait(limit_s) == 2, member.log
    assert "Traceback" not in member.log
    return member.log


def waits(mesh: Mesh, token: str, word: str) -> None:
    member = launch(mesh, "web", token=token, inbound="off")
    member.says(word)
    assert member.alive and not member.is_ready
    assert member.stop() in (0, -15)
    assert "Traceback" not in member.log


@pytest.mark.long
def test_tokens_that_are_not_good(mesh: Mesh) -> None:
    control = ControlPlane(mesh)
    control.apply(SHOP)
    expired = control.token("web", "--ttl", "1s")
    good = control.token("web", "--uses", "1")
    parsed = parse_token(good)
    assert Rogue(control, "web", good).id

    assert "has been used up" in joined_badly(mesh, good)

    forged = make_token("join", parsed.id, "A" * len(parsed.secret), parsed.addresses, parsed.fingerprint, "mesh.local")
    assert "not the secret" in joined_badly(mesh, forged)

    unknown = make_token("join", "nobody", parsed.secret, parsed.addresses, parsed.fingerprint, "mesh.local")
    assert "there is no token" in joined_badly(mesh, unknown)

    # Whoever answers is not whom these two mean: nothing is sent to them, and the sidecar waits and says so, since the
    # right one may come back to that address.
    foreign = make_token("join", parsed.id, parsed.secret, parsed.addresses, "0" * 64, "mesh.local")
    waits(mesh, foreign, "its root is another")
    other = make_token("join", parsed.id, parsed.secret, parsed.addresses, parsed.fingerprint, "other.example")
    waits(mesh, other, "other.example")

    for damaged in (good[:-7], good[:40] + ("x" if good[40] != "x" else "y") + good[41:], good + "AAAA"):
        assert "copy it again" in joined_badly(mesh, damaged)
    assert "token" in joined_badly(mesh, "hello world")

    admin = (control.state / "admin-token").read_text().strip()
    assert "token" in joined_badly(mesh, admin)
    assert admin not in control.log

    assert 'for the service "web"' in joined_badly(mesh, control.token("web"), service="reviews")
    assert "expired" in joined_badly(mesh, expired)  # by now

    revoked = control.token("web")
    control.ok("token", "revoke", parse_token(revoked).id)
    assert "there is no token" in joined_badly(mesh, revoked)
    # Every attempt that showed a real token's id is on record, and none of this has let anybody in.
    assert [each["service"] for each in control.get("sidecars")["sidecars"]] == ["web"]
    assert control.cli("check")[0] in (0, 1)
    assert "Traceback" not in control.log


def test_a_token_of_another_mesh_is_refused_by_the_one_that_is_asked(mesh: Mesh) -> None:
    """The text leads to this control plane; the root that it names is another's. And the other way round: what another
    mesh issued does not get in here."""
    one, two = ControlPlane(mesh, "r1"), ControlPlane(mesh, "r2")
    ours, theirs = parse_token(one.token("web")), parse_token(two.token("web"))
    mixed = make_token("join", theirs.id, theirs.secret, ours.addresses, theirs.fingerprint, "mesh.local")
    waits(mesh, mixed, "its root is another")
    status_, answer = join(one, mixed, "web")
    assert status_ in (401, 403) and answer["error"]["code"] == "token_foreign", answer
    rogue = Rogue(two, "web")
    rogue.control = one
    with pytest.raises(OSError):  # their root is not ours, on either side
        rogue.post("/v1/heartbeat", {})


def test_a_request_for_anothers_name(mesh: Mesh) -> None:
    control = ControlPlane(mesh)
    key = new_key()

    def csr(*names: x509.GeneralName, subject: str = "") -> bytes:
        attributes = [x509.NameAttribute(x509.NameOID.COMMON_NAME, subject)] if subject else []
        builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(attributes))
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        return builder.sign(key, hashes.SHA256()).public_bytes(encoding=_pem())

    uri = x509.UniformResourceIdentifier
    token = control.token("web", "--uses", "20")
    others = ("mesh.local/service/reviews", "other/service/web", "mesh.local/service/pillion-control-plane",
              "mesh.local/operator/admin/x")  # fmt: skip
    for name in (f"spiffe://{each}" for each in others):
        code, answer = join(control, token, "web", csr(uri(name)))
        assert (code, answer["error"]["code"]) == (403, "wrong_identity"), answer
        assert name in answer["error"]["message"]
    code, answer = join(control, token, "web", csr(uri("spiffe://mesh.local/service/web"), subject="reviews"))
    assert code in (200, 400), answer
    if code == 200:
        leaf = x509.load_pem_x509_certificate(answer["certificate"].encode())
        sans = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert [each.value for each in sans] == ["spiffe://mesh.local/service/web"]
        assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        assert "reviews" not in leaf.subject.rfc4514_string()
    code, answer = join(control, token, "reviews")
    assert code == 403 and answer["error"]["code"] == "token_wrong_service"
    # A request whose proof of the key is broken.
    broken = re.sub(rb"[A-Za-z0-9+/]{6}=*\n-----END", b"AAAAAA==\n-----END", new_csr(key))
    code, answer = join(control, token, "web", broken)
    assert code == 400 and answer["error"]["code"] == "invalid_csr", answer
    # The control plane's own name is nobody's to join as.
    code, _, said = control.cli("token", "create", "--service", "pillion-control-plane")
    assert code != 0 and "pillion-control-plane" in said
    # The same when it renews.
    rogue = Rogue(control, "web")
    code, answer = rogue.post("/v1/renew", {"csr": csr(uri("spiffe://mesh.local/service/reviews")).decode()})
    assert (code, answer["error"]["code"]) == (403, "wrong_identity")
    assert rogue.post("/v1/heartbeat", {})[0] == 410, "it is a member still"


def _pem() -> Any:
    from cryptography.hazmat.primitives.serialization import Encoding

    return Encoding.PEM
