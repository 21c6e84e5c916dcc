"""`pillion run` without any flag: the context of `pillion up` gives the sidecar its token and its control plane."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.mesh import Mesh, free_port, until
from support.standin_control import Control, service

APPLICATION = "import os; print('app', os.environ.get('PILLION_TOKEN'), 'PILLION_OUTBOUND' in os.environ)"


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    with Mesh(tmp_path) as mesh:
        yield mesh


@pytest.fixture
def control(mesh: Mesh) -> Iterator[Control]:
    with Control(mesh.pki) as control:
        control.hold({"service/web": service("web")})
        yield control


class Home:
    """A user's home with a context file."""

    def __init__(self, mesh: Mesh, control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
        self.mesh, self.path = mesh, mesh.path / "home"
        self.context = self.path / ".config" / "pillion" / "context.json"
        self.context.parent.mkdir(parents=True)
        self.write(
            {
                "url": f"https://{control.join}",
                "fingerprint": mesh.pki.bundle.roots[0].fingerprint,
                "trust_domain": "mesh.local",
                "token": control.operator,
            }
        )
        monkeypatch.setenv("HOME", str(self.path))
        for name in ("XDG_CONFIG_HOME", "XDG_STATE_HOME", "PILLION_CONTEXT", "STATE_DIRECTORY"):
            monkeypatch.delenv(name, raising=False)

    def write(self, data: object) -> None:
        self.context.write_text(json.dumps(data))
        self.context.chmod(0o600)

    def run(self, port: int) -> tuple[int, str, str]:
        return self.mesh.run("run", "web", "--port", str(port), "--", "python3", "-c", APPLICATION, limit_s=60)


@pytest.fixture
def home(mesh: Mesh, control: Control, monkeypatch: pytest.MonkeyPatch) -> Home:
    return Home(mesh, control, monkeypatch)


def test_no_further_flag_is_needed(home: Home, control: Control) -> None:
    port = free_port()
    code, out, err = home.run(port)
    assert (code, out) == (0, "app None True\n"), err
    state = home.path / ".local" / "state" / "pillion" / "run" / f"web-{port}"
    assert (state / "sidecar.json").exists()
    (known,) = control.sidecars.values()
    assert known.service == "web"

    control.stop()  # a second time it goes on with what it has
    code, out, err = home.run(port)
    assert (code, out) == (0, "app None True\n"), err
    assert "Connection refused" in err and "going on with what" in err


@pytest.mark.long
def test_the_application_is_registered_while_it_runs(home: Home, control: Control) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        seen: list[object] = []
        before = control._verb

        def verb(path: str, id: str, body: dict[str, object]) -> object:
            if path == "/v1/register":
                seen.append(body)
            return before(path, id, body)

        control._verb = verb  # type: ignore[method-assign, assignment]
        program = "import time; time.sleep(4)"
        code, _, err = home.mesh.run("run", "web", "--port", str(port), "--", "python3", "-c", program, limit_s=60)
    assert code == 0, err
    (body,) = seen
    assert body["host"] == "127.0.0.1" and body["ports"] == {"http": port}  # type: ignore[index]
    until(lambda: control.withdrawn, "the withdrawal")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (None, "Start one in another terminal: pillion up"),
        ({}, "is damaged"),
        ({"url": "http://x"}, "is damaged"),
        ({"token": "wrong"}, "gives no token for web: this operator is not known"),
        ({"fingerprint": "0" * 64}, "is not the control plane that was meant"),
        ({"url": "https://127.0.0.1:9"}, "Start it with: pillion up"),
    ],
)
def test_what_stands_in_the_way_is_told(home: Home, change: dict[str, str] | None, words: str) -> None:
    data = json.loads(home.context.read_text())
    if change is None:
        home.context.unlink()
    else:
        home.write({**data, **change} if change else {})
    code, out, err = home.run(free_port())
    assert code == 2 and not out and words in " ".join(err.split()), err


def test_a_context_that_others_can_read_is_refused(home: Home) -> None:
    home.context.chmod(0o644)
    code, _, err = home.run(free_port())
    assert code == 2 and "chmod 600" in err
