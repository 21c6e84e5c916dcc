"""A sidecar that has joined properly and then behaves as it likes: raw requests over the mesh's own TLS.

    rogue = Rogue(control, "web")
    rogue.post("/v1/heartbeat", {"edges": []})       # (status, JSON)
    stream = rogue.stream()                            # open, its hello not yet read
    stream.line()

Blocks, as `support.mesh` does.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from certs.authority import PrivateKey, new_key
from certs.bundle import TrustBundle
from certs.client import JOIN_SNI, MESH_SNI, control_plane_id, new_csr, pinned_context, unverified_context
from certs.files import load_identity, write_identity
from certs.pem import read_blocks
from certs.svid import parse_certificate
from certs.tokens import parse_token
from support.control import ControlPlane
from support.mesh import Client, dial

Json = Any
HELLO: dict[str, Json] = {"protocol": [1, 0], "version": "test", "held": {}, "uses": [], "all": False, "policy": 0}


def ask(client: Client, method: str, path: str, body: Json = None, **headers: str) -> tuple[int, Json]:
    raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    fields = {"content-type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    client.request(method, path, "control", fields, raw)
    answer = client.response(method)
    return answer.status, json.loads(answer.body) if answer.body else None


def join_client(control: ControlPlane) -> Client:
    """A connection to the join listener that trusts whoever answers: for what must be refused."""
    sock = dial(control.addresses["join"])
    return Client(unverified_context().wrap_socket(sock, server_hostname=JOIN_SNI))


def join(control: ControlPlane, token: str, service: str, csr: bytes | None = None, **more: Json) -> tuple[int, Json]:
    body = {"token": token, "csr": (csr or new_csr(new_key())).decode(), "service": service, "name": "rogue", **more}
    with join_client(control) as client:
        return ask(client, "POST", "/v1/join", body)


class Stream:
    """An open stream."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self._behind = b""

    def head(self) -> int:
        line, _ = self.client.reader.head()
        return int(line.split(b" ")[1])

    def line(self) -> dict[str, Json]:
        """The next one, however it was cut into chunks; an empty one: there are no more."""
        reader = self.client.reader
        while b"\n" not in self._behind:
            size = int(reader.until(b"\r\n")[:-2], 16)
            data = reader.exactly(size)
            assert reader.exactly(2) == b"\r\n"
            if not data:
                return {}
            self._behind += data
        line, _, self._behind = self._behind.partition(b"\n")
        found: dict[str, Json] = json.loads(line)
        return found

    def push(self) -> dict[str, Json]:
        while (line := self.line())["type"] != "push":
            pass
        return line


class Rogue:
    def __init__(self, control: ControlPlane, service: str = "web", token: str | None = None) -> None:
        self.control, self.service = control, service
        self.key: PrivateKey = new_key()
        text = token or control.token(service)
        status, answer = join(control, text, service, new_csr(self.key))
        assert status == 200, answer
        self.id: str = answer["sidecar"]
        self.joined = answer
        trust_domain = parse_token(text).trust_domain
        bundle = TrustBundle.parse(trust_domain, answer["bundle"].encode())
        chain = [parse_certificate(block.der) for block in read_blocks(answer["certificate"].encode(), 65536, 8)]
        with tempfile.TemporaryDirectory() as folder:
            write_identity(Path(folder) / "identity", chain, self.key, bundle)
            identity = load_identity(Path(folder) / "identity")
        self.context = pinned_context(bundle, control_plane_id(trust_domain), identity)
        self._client: Client | None = None

    def connect(self, **options: Any) -> Client:
        """Closed with the mesh at the latest."""
        sock = dial(self.control.addresses["mesh"], **options)
        try:
            client = Client(self.context.wrap_socket(sock, server_hostname=MESH_SNI))
        except BaseException:
            sock.close()
            raise
        self.control.mesh.stack.callback(client.close)
        return client

    def post(self, path: str, body: Json = None, **headers: str) -> tuple[int, Json]:
        """On a connection that is kept while it goes well."""
        client = self._client or self.connect()
        self._client = None
        try:
            answer = ask(client, "POST", path, body, **headers)
        except BaseException:
            client.close()
            raise
        self._client = client
        return answer

    def stream(self, receive_bytes: int | None = None, **hello: Json) -> Stream:
        client = self.connect(receive_bytes=receive_bytes)
        body = json.dumps(HELLO | {"service": self.service} | hello).encode()
        client.request("POST", "/v1/stream", "control", {"content-type": "application/json"}, body)
        return Stream(client)

    def opened(self, **hello: Json) -> Stream:
        stream = self.stream(**hello)
        assert stream.head() == 200
        assert stream.line()["type"] == "hello"
        return stream


def resident_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS:"))
