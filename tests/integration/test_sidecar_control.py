"""A real sidecar process as the client of a scripted control plane: join, stream, registration, renewal, state."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from support.grpc_calls import GrpcServer
from support.mesh import Mesh, until
from support.standin_control import Control, Refusal, calls, endpoint, join, launch, service

from certs.authority import bundle_of
from certs.files import read_chain
from certs.tokens import make_token


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    with Mesh(tmp_path) as mesh:
        yield mesh


@pytest.fixture
def control(mesh: Mesh) -> Iterator[Control]:
    with Control(mesh.pki) as control:
        control.hold({"names": ["reviews", "web"]})
        yield control


def test_two_sidecars_join_register_and_talk(mesh: Mesh, control: Control) -> None:
    app = mesh.backend()
    control.hold({"service/reviews": service("reviews"), "service/web": service("web", calls=calls("reviews"))})
    reviews = join(mesh, control, "reviews", "--label=version=1", app=app)
    registered = until(lambda: control.registered.get(control.id_of("reviews")), "the registration")
    assert registered["host"] == "127.0.0.1" and registered["labels"] == {"version": "1"}
    assert registered["ports"] == {"http": app.address[1]} and registered["healthy"] is True
    address = f"{registered['host']}:{registered['port']}"
    assert address == reviews.inbound

    web = join(mesh, control, "web", inbound="off")
    control.change({"service/reviews": service("reviews"), "endpoints/reviews": [endpoint(address)]})
    with web.client() as client:
        until(lambda: client.get("/").status == 200, "an answer through both")
    until(lambda: any(body["edges"] for id, body in control.heartbeats if id == control.id_of("web")), "an edge")
    edges = [edge for _, body in control.heartbeats for edge in body["edges"]]
    assert edges[0][0] == "reviews" and edges[0][1] > 0
    assert all(not rejected for _, rejected in control.acks)
    assert web.source["kind"] == "control plane" and web.source["connected"] == control.mesh


def test_a_restart_needs_no_token_and_no_control_plane(mesh: Mesh, control: Control) -> None:
    app = mesh.backend()
    held = {"service/web": service("web", calls=calls("reviews")), "service/reviews": service("reviews")}
    control.hold(held)
    reviews = join(mesh, control, "reviews", app=app)
    control.hold({"endpoints/reviews": [endpoint(reviews.inbound)]})
    web = join(mesh, control, "web", inbound="off")
    until(lambda: (web.state / "snapshot.json").exists(), "the state on disk")
    assert (web.state.stat().st_mode & 0o777, (web.state / "snapshot.json").stat().st_mode & 0o777) == (0o700, 0o600)
    with web.client() as client:
        assert client.get("/").status == 200
    assert web.stop() == 0

    control.stop()
    again = launch(mesh, "web", state=web.state, inbound="off").await_ready()
    with again.client() as client:
        assert client.get("/").status == 200
    again.says("serving by the policy of")
    assert control.mesh in again.source["problem"]
    control.start()
    until(lambda: again.source["connected"], "the connection")
    (stream,) = [each for each in control.streams if each.sidecar == control.id_of("web")]
    assert stream.hello["held"].keys() >= {"service/web", "service/reviews", "endpoints/reviews"}


def test_without_state_and_control_plane_it_waits_and_says_so(mesh: Mesh, control: Control) -> None:
    control.hold({"service/web": service("web")})
    token = control.token("web")
    control.stop()
    web = launch(mesh, "web", token=token, inbound="off")
    web.says("waiting for the control plane, to join as web")
    assert web.alive and not web.is_ready
    control.start()
    web.await_ready()


def test_joined_but_without_a_policy_it_waits(mesh: Mesh, control: Control) -> None:
    web = launch(mesh, "web", token=control.token("web"), inbound="off")
    until(lambda: control.streams, "the stream")
    assert not web.is_ready
    control.change({"service/web": service("web")})
    web.await_ready()


def test_a_bad_service_is_refused_by_name_and_the_rest_is_taken(mesh: Mesh, control: Control) -> None:
    control.hold({"service/web": service("web", calls=calls("reviews")), "service/reviews": service("reviews")})
    web = join(mesh, control, "web", inbound="off")
    until(lambda: control.acks, "the first answer")
    control.change(
        {
            "service/reviews": service("reviews", nonsense=1),
            "service/admin": service("admin", routes=[{"name": "odd", "filters": [{"use": "no-such", "side": "out"}]}]),
            "service/shop": service("shop"),
        },
        split=True,
    )
    until(lambda: len(control.acks) > 1, "the second answer")
    rejected = control.acks[-1][1]
    assert rejected.keys() == {"service/reviews", "service/admin"}
    assert "nonsense" in rejected["service/reviews"] and "no-such" in rejected["service/admin"]
    services = web.admin("/config")["policy"]["services"]
    assert services == ["reviews", "shop", "web"]
    control.change({"service/admin": None, "service/shop": None})
    until(lambda: web.admin("/config")["policy"]["services"] == ["reviews", "web"], "the removal")


def test_the_next_replica_at_once_after_a_goodbye(mesh: Mesh, control: Control) -> None:
    control.hold({"service/web": service("web")})
    with Control(mesh.pki, name="two") as other:
        other.sidecars, other.resources = control.sidecars, control.resources
        control.replicas = other.replicas = [control.mesh, other.mesh]
        web = join(mesh, control, "web", inbound="off")
        replicas = {control.mesh: control, other.mesh: other}
        first = replicas[until(lambda: web.source["connected"], "the connection")]
        first.goodbye()
        until(lambda: web.source["connected"] not in ("", first.mesh), "the other replica", 2.0)
        second = replicas[web.source["connected"]]
        second.stop()
        until(lambda: web.source["connected"] == first.mesh, "the first one again", 5.0)


@pytest.mark.long
def test_renewal_while_traffic_flows(mesh: Mesh, control: Control) -> None:
    control.ttl = timedelta(seconds=6)
    app = mesh.backend()
    control.hold({"service/web": service("web", calls=calls("reviews")), "service/reviews": service("reviews")})
    reviews = join(mesh, control, "reviews", app=app)
    control.hold({"endpoints/reviews": [endpoint(reviews.inbound)]})
    web = join(mesh, control, "web", inbound="off")
    before = web.admin("/config")["identity"]["fingerprint"]
    statuses = set()
    with web.client() as client:

        def renewed() -> bool:
            statuses.add(client.get("/").status)
            return control.renewals >= 4 and web.admin("/config")["identity"]["fingerprint"] != before

        until(renewed, "renewals", 20.0)
    assert statuses == {200}
    assert "could not be renewed" not in web.log + reviews.log


@pytest.mark.long
def test_an_expired_leaf_is_renewed_by_its_key(mesh: Mesh, control: Control) -> None:
    control.ttl = timedelta(seconds=5)
    control.hold({"service/web": service("web")})
    web = join(mesh, control, "web", inbound="off")
    web.process.kill()
    web.process.wait()
    leaf = read_chain(web.state / "identity" / "cert.pem")[0]
    until(lambda: datetime.now(UTC) > leaf.not_valid_after_utc, "the end of the leaf")
    again = launch(mesh, "web", state=web.state, inbound="off").await_ready()
    again.says("expired")
    assert ("/v1/rejoin", "") in control.requests
    assert read_chain(web.state / "identity" / "cert.pem")[0].serial_number != leaf.serial_number


def test_withdraws_before_it_drains(mesh: Mesh, control: Control) -> None:
    control.hold({"service/reviews": service("reviews")})
    reviews = join(mesh, control, "reviews", app=mesh.backend())
    id = control.id_of("reviews")
    until(lambda: id in control.registered, "the registration")
    assert reviews.stop() == 0
    assert control.withdrawn == [id] and id not in control.registered


def test_registers_again_when_told_that_it_is_not(mesh: Mesh, control: Control) -> None:
    control.hold({"service/reviews": service("reviews")})
    join(mesh, control, "reviews", app=mesh.backend())
    id = control.id_of("reviews")
    until(lambda: id in control.registered, "the registration")
    del control.registered[id]
    until(lambda: id in control.registered, "the registration")


@pytest.mark.parametrize(("minor", "more"), [(0, set()), (1, {"evidence"})])
def test_what_an_older_control_plane_does_not_know_is_left_out(
    mesh: Mesh, control: Control, minor: int, more: set[str]
) -> None:
    """It refuses keys that are newer than itself, and without heartbeats the registration would lapse."""
    control.protocol = [1, minor]
    held = {"service/reviews": service("reviews"), "service/web": service("web", calls=calls("reviews"))}
    control.hold({**held, "endpoints/reviews": [endpoint(mesh.dead_address())]})
    web = join(mesh, control, "web", app=mesh.backend())
    id = control.id_of("web")
    registered = until(lambda: control.registered.get(id), "the registration")
    assert ("priority" in registered) is (minor == 1)
    with web.client() as client:
        for _ in range(8):
            client.get("/")
    told = until(lambda: [body for each, body in control.heartbeats if each == id and body["breakers"]], "a breaker")
    assert set(told[0]) == {"edges", "breakers", "healthy", "reason"} | more


def test_registers_only_once_the_application_answers_and_tells_its_health(mesh: Mesh, control: Control) -> None:
    health = {"http": "/status/200", "interval_s": 0.1, "timeout_s": 1.0, "unhealthy": 2, "healthy": 1}
    control.hold({"service/reviews": service("reviews", health=health)})
    app = mesh.backend()
    join(mesh, control, "reviews", app=app)
    id = control.id_of("reviews")
    until(lambda: id in control.registered, "the registration")
    control.change({"service/reviews": service("reviews", health={**health, "http": "/status/503"})})
    until(lambda: control.registered[id]["healthy"] is False, "bad health")
    assert "503" in control.registered[id]["reason"]
    control.change({"service/reviews": service("reviews", health=health)})
    until(lambda: control.registered[id]["healthy"] is True, "good health")
    app.stop()
    until(lambda: control.registered[id]["healthy"] is False, "bad health")


def test_health_by_grpc_is_told(mesh: Mesh, control: Control) -> None:
    health = {"grpc": "shop.v1.Cart", "interval_s": 0.1, "timeout_s": 2.0, "unhealthy": 2, "healthy": 1}
    ports = [{"name": "web", "number": 1}, {"name": "api", "number": 2, "protocol": "grpc"}]
    control.hold({"service/reviews": service("reviews", health=health, ports=ports)})
    server = GrpcServer()
    app = mesh.backend()
    try:
        join(mesh, control, "reviews", f"--app=web={app}", app=f"api={server.address}")
        id = control.id_of("reviews")
        until(lambda: id in control.registered and control.registered[id]["healthy"] is True, "good health")
        server.health = b"\x08\x02"
        until(lambda: control.registered[id]["healthy"] is False, "bad health")
        assert control.registered[id]["reason"] == "the health service says NOT_SERVING"
        server.health = b"\x08\x01"
        until(lambda: control.registered[id]["healthy"] is True, "good health")
    finally:
        server.stop()


def test_services_on_demand(mesh: Mesh, control: Control) -> None:
    control.hold({"service/web": service("web"), "names": ["reviews", "web"]})
    web = join(mesh, control, "web", inbound="off")
    plain = endpoint(str(mesh.backend()), tls="plain")

    def uses(path: str, sidecar: str) -> None:
        if path == "/v1/uses":
            control.change({"service/reviews": service("reviews"), "endpoints/reviews": [plain]})

    control.before = uses
    with web.client() as client:
        assert client.get("/").status == 200
    assert control.used == [["reviews"]]
    control.goodbye()
    until(lambda: control.streams and control.streams[-1].hello["uses"] == ["reviews"], "the use in the next hello")


def test_bans_end_connections(mesh: Mesh, control: Control) -> None:
    app = mesh.backend()
    control.hold({"service/web": service("web", calls=calls("reviews")), "service/reviews": service("reviews")})
    reviews = join(mesh, control, "reviews", app=app)
    control.hold({"endpoints/reviews": [endpoint(reviews.inbound)]})
    web = join(mesh, control, "web", inbound="off")
    with web.client() as client:
        assert client.get("/").status == 200
        control.change({"bans": {"identities": ["spiffe://mesh.local/service/web"], "certificates": []}})
        until(lambda: client.get("/").status == 503, "the refusal")
        control.change({"bans": {"identities": [], "certificates": []}})
        until(lambda: client.get("/").status == 200, "peace")


def test_a_refused_token_ends_it_with_the_reason(mesh: Mesh, control: Control) -> None:
    token = control.token("web")
    control.tokens.clear()
    web = launch(mesh, "web", token=token)
    assert web.process.wait(15) == 2
    assert "refuses the token: this token is not known (make another)" in web.log


def test_a_token_of_another_mesh_sends_nothing(mesh: Mesh, control: Control) -> None:
    other = mesh.pki.other.bundle.roots[0].fingerprint
    token = make_token("join", "i", "s", [control.join], other, "mesh.local")
    web = launch(mesh, "web", token=token)
    web.says("its root is another")
    assert not any(path == "/v1/join" for path, _ in control.requests)


def test_another_services_state_is_refused(mesh: Mesh, control: Control) -> None:
    control.hold({"service/web": service("web")})
    web = join(mesh, control, "web", inbound="off")
    second = launch(mesh, "web", state=web.state)
    assert second.process.wait(15) == 2 and "in use by another sidecar" in second.log
    web.stop()
    third = launch(mesh, "reviews", state=web.state)
    assert third.process.wait(15) == 2 and "is of a sidecar of web" in third.log


def test_an_unknown_sidecar_says_so_and_joins_anew_where_it_has_a_token(mesh: Mesh, control: Control) -> None:
    control.hold({"service/web": service("web")})
    web = join(mesh, control, "web", inbound="off")
    first = control.id_of("web")
    control.sidecars.clear()
    control.goodbye()
    until(lambda: control.sidecars and control.id_of("web") != first and control.streams, "another membership")
    assert web.alive


def test_a_banned_sidecar_serves_on_and_says_so(mesh: Mesh, control: Control) -> None:
    control.hold({"service/web": service("web")})
    web = join(mesh, control, "web", inbound="off")

    def banned(path: str, sidecar: str) -> None:
        raise Refusal(403, "banned", "this sidecar is banned")

    control.before = banned
    control.goodbye()
    until(lambda: "banned" in web.source["problem"], "the reason")
    assert web.alive


def test_a_damaged_snapshot_is_asked_for_again(mesh: Mesh, control: Control) -> None:
    control.hold({"service/web": service("web")})
    web = join(mesh, control, "web", inbound="off")
    until(lambda: (web.state / "snapshot.json").exists(), "the state on disk")
    web.stop()
    (web.state / "snapshot.json").write_text('{"format": 1, "at": 0')
    again = launch(mesh, "web", state=web.state, inbound="off").await_ready()
    assert "snapshot.json is damaged" in again.log and control.streams[-1].hello["held"] == {}


def test_a_damaged_membership_says_what_to_do(mesh: Mesh, control: Control) -> None:
    control.hold({"service/web": service("web")})
    web = join(mesh, control, "web", inbound="off")
    web.stop()
    (web.state / "sidecar.json").write_text("{")
    again = launch(mesh, "web", state=web.state)
    assert again.process.wait(15) == 2
    assert "is damaged" in again.log and "pillion token create --service web" in again.log
    third = launch(mesh, "web", state=web.state, token=control.token("web"), inbound="off").await_ready()
    assert "put aside" in third.log


@pytest.mark.long
@pytest.mark.parametrize("minutes", [-10, 10])
def test_clocks_that_differ_by_minutes(mesh: Mesh, minutes: int) -> None:
    """Renewal goes by the certificate's own period, and the difference is said."""
    with Control(mesh.pki, ttl=timedelta(seconds=6), clock=timedelta(minutes=minutes)) as control:
        control.hold({"service/web": service("web")})
        web = join(mesh, control, "web", inbound="off")
        web.says("s ahead of that of the control plane" if minutes < 0 else "s behind that of the control plane")
        until(lambda: control.renewals >= 2, "renewals")


def test_a_root_that_is_added_is_trusted_and_kept(mesh: Mesh, control: Control) -> None:
    control.hold({"service/web": service("web")})
    web = join(mesh, control, "web", inbound="off")
    both = bundle_of(mesh.pki.root, mesh.pki.other.root)
    control.change({"bundle": {"trust_domain": "mesh.local", "pem": both.pem.decode()}})
    until(lambda: (web.state / "identity" / "bundle.pem").read_bytes() == both.pem, "the bundle on disk")
    control.change({"bundle": {"trust_domain": "mesh.local", "pem": mesh.pki.other.bundle.pem.decode()}})
    until(lambda: control.acks[-1][1].keys() == {"bundle"}, "the refusal of a bundle without our root")
    assert (web.state / "identity" / "bundle.pem").read_bytes() == both.pem


def test_one_source_of_policy(mesh: Mesh) -> None:
    for options, words in (
        (["--policy", "x", "--state-dir", "y"], "exclude each other"),
        (["--policy", "x"], "needs --identity"),
        (["--state-dir", str(mesh.path / "none")], "pillion token create --service web"),
        (["--token", "nonsense"], "no token of pillion"),
        (["--token-file", str(mesh.path / "none")], "No such file"),
        (["--state-dir", "y", "--control-plane", "http://x"], "not the URL"),
        (["--state-dir", "y", "--advertise", "0.0.0.0:1"], "not an address"),
        (["--state-dir", "y", "--label", "x"], "NAME=VALUE"),
    ):
        code, _, err = mesh.run("sidecar", "--service", "web", *options)
        assert code == 2 and words in " ".join(err.split()), (options, err)


def test_print_config_shows_no_secret(mesh: Mesh, control: Control) -> None:
    token = control.token("web")
    code, out, _ = mesh.run("sidecar", "--service=web", f"--token={token}", "--label=version=2", "--print-config")
    assert code == 0 and token not in out and '"version": "2"' in out
