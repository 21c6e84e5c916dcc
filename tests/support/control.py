"""A whole mesh of real processes: control planes, sidecars that joined by token, and the command line.

    with Mesh(tmp_path) as mesh:
        control = ControlPlane(mesh)
        control.apply({"reviews": {}, "web": {"calls": {"reviews": {}}}})
        reviews = control.member("reviews", app=mesh.backend())
        web = control.member("web", inbound="off")

Blocks, as `support.mesh` does; whatever is started ends with the mesh.
"""

import json
import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.mesh import PILLION, WAIT_S, Backend, Mesh, environment, free_port, read_line, until
from support.standin_control import Member, launch


class ControlPlane:
    """One `pillion control-plane` process. The ports stay the same over a restart."""

    def __init__(
        self,
        mesh: Mesh,
        name: str = "r1",
        *options: str,
        store: str = "embedded",
        ca: Path | None = None,
        start: bool = True,
    ) -> None:
        self.mesh, self.name, self.options, self.store, self.ca = mesh, name, options, store, ca
        self.state = mesh.path / f"control-{name}"
        self.context = mesh.path / f"context-{name}.json"
        self.log_file = mesh.path / f"control-{name}.log"
        self.ports = (free_port(), free_port())
        self.process: subprocess.Popen[bytes] | None = None
        self.addresses: dict[str, str] = {}
        mesh.stack.callback(self.kill)
        if start:
            self.start()
            if store == "embedded" or not (mesh.path / "context-r1.json").exists():
                self.log_in()

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def command(self, *options: str) -> list[str]:
        ca = [f"--ca={self.ca}"] if self.ca is not None else []
        return [
            *PILLION, "control-plane", f"--state-dir={self.state}", f"--name={self.name}", f"--store={self.store}",
            f"--listen-mesh=127.0.0.1:{self.ports[0]}", f"--listen-join=127.0.0.1:{self.ports[1]}",
            *ca, *self.options, *options,
        ]  # fmt: skip

    def start(self, limit_s: float = WAIT_S) -> "ControlPlane":
        ready, tell = os.pipe()
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(f"--ready-fd={tell}"), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                pass_fds=[tell], env=environment(), cwd=self.mesh.path,
            )  # fmt: skip
        os.close(tell)
        try:
            line = read_line(ready, limit_s)
        finally:
            os.close(ready)
        assert line, f"the control plane did not start:\n{self.log}"
        self.addresses = json.loads(line)
        return self

    def log_in(self) -> None:
        code, _, said = self.cli("login", f"--token-file={self.state / 'admin-token'}")
        assert code == 0, said

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def stop(self, limit_s: float = 20.0) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(limit_s)
        if code:
            print(self.log)  # pytest shows it where the test fails
        return code

    # -- the command line

    def cli(self, *args: str, limit_s: float = 60.0) -> tuple[int, str, str]:
        """`pillion …` as the admin: exit code, stdout, stderr."""
        variables = environment() | {"PILLION_CONTEXT": str(self.context)}
        done = subprocess.run(
            [*PILLION, *args], stdin=subprocess.DEVNULL, capture_output=True, timeout=limit_s, env=variables,
            cwd=self.mesh.path,
        )  # fmt: skip
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    def ok(self, *args: str, limit_s: float = 60.0) -> str:
        """The same, where it must go well; stdout."""
        code, out, said = self.cli(*args, limit_s=limit_s)
        assert code == 0, f"pillion {' '.join(args)}: {code}\n{out}{said}\n{self.log}"
        return out

    def get(self, what: str) -> Any:
        return json.loads(self.ok("get", what, "-o", "json"))

    def policy_file(self, services: Mapping[str, Any], **levels: Any) -> Path:
        path = self.mesh.path / "mesh.yaml"
        self.mesh.write_policy(path, services, levels)
        return path

    def apply(self, services: Mapping[str, Any], *options: str, **levels: Any) -> str:
        return self.ok("policy", "apply", "-f", str(self.policy_file(services, **levels)), *options)

    # -- sidecars

    def token(self, service: str, *options: str) -> str:
        return self.ok("token", "create", "--service", service, *options).strip()

    def member(
        self, service: str, *options: str, app: Backend | None = None, ready: bool = True, **more: Any
    ) -> Member:
        """A sidecar that joins by a new token, and is ready."""
        member = launch(self.mesh, service, *options, app=app, token=self.token(service), **more)
        return member.await_ready() if ready else member


def registered(control: ControlPlane, service: str, count: int = 1, limit_s: float = WAIT_S) -> None:
    """Wait until so many instances of a service are registered."""

    def enough() -> bool:
        found = json.loads(control.ok("get", "endpoints", "-o", "json"))
        rows = found if isinstance(found, list) else found["endpoints"]
        return sum(row["service"] == service for row in rows) == count

    until(enough, f"{count} endpoints of {service}", limit_s)
