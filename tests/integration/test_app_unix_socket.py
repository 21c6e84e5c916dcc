"""Applications that listen on a Unix socket, behind live sidecars."""

import signal
from pathlib import Path

import pytest
from support.mesh import Conn, Mesh, until


def test_http_and_tcp_to_unix_sockets(tmp_path: Path) -> None:
    def shout(conn: Conn) -> None:
        while data := conn.sock.recv(65536):
            conn.send(data.upper())

    paths = {name: tmp_path / f"{name}.sock" for name in ("http", "raw")}
    services = {"web": {}, "reviews": {"ports": {"http": {"port": 80}, "raw": {"port": 81, "protocol": "tcp"}}}}
    with Mesh(tmp_path) as mesh:
        http, raw = mesh.backend(path=paths["http"]), mesh.backend(shout, paths["raw"])
        reviews = mesh.sidecar("reviews", services, app={"http": http, "raw": raw}, outbound=False)
        with reviews.mesh_client() as client:
            seen = client.get("/x", host="reviews").json
            assert ["host", "reviews"] in seen["headers"] and seen["target"] == "/x"
            assert client.post("/", b"x" * 500_000).status == 200
            assert client.get("/").json["connection"] == 0  # all on one
        with reviews.mesh_client(port="raw", alpn="pillion-tcp") as client:
            client.send(b"\0\0\0\x05hello")  # one frame, as another sidecar sends it
            assert client.reader.exactly(9) == b"\0\0\0\x05HELLO"
        entry = reviews.logged(side="in", status=200)
        assert entry["upstream"] == f"unix:{paths['http']}"
        rows = [row for row in reviews.admin("/clusters") if row["side"] == "in"]
        shown = {row["port"]: row["endpoint"] for row in rows}
        assert shown == {name: f"unix:{path}" for name, path in paths.items()}
        assert (
            reviews.metric("pillion_endpoint_attempts_total", endpoint=f"unix:{paths['http']}", result="success") == 3
        )

        paths["http"].unlink()
        http.end_connections()
        until(lambda: not http.open, "the end of the application's connections")
        with reviews.mesh_client() as client:
            answer = client.get("/")
            assert (answer.status, answer.reason) == (503, "connect_failed")
        until(lambda: f"unix:{paths['http']}: No such file or directory" in reviews.log, "the reason in the log")
        raw.stop()
        reviews.process.send_signal(signal.SIGTERM)
        assert reviews.process.wait(20) == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("unix:app.sock", "named by its whole path"),
        ("unix:", "named by its whole path"),
        ("http=unix:relative", "named by its whole path"),
        ("=unix:/run/app.sock", "names no port before the equals sign"),
        (f"unix:/{'x' * 107}", "at most 107 bytes"),
    ],
)
def test_bad_paths(tmp_path: Path, given: str, message: str) -> None:
    with Mesh(tmp_path) as mesh:
        identity = mesh.pki.identity(tmp_path, "web")
        code, _, err = mesh.run(*mesh.command("web", tmp_path / "mesh.yaml", identity, app=given)[4:])
        assert code == 2 and message in " ".join(err.split()), err
