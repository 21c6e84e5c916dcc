"""A scripted stand-in for a control plane's join and operator listener: real TLS, made-up answers.

    with StandIn(Pki()) as server:
        server.answer("GET", "/v1/services", {"services": []})
        server.token()                       # an operator token that leads to it

An answer is data (200), (status, data), or a function of the request that returns one of these. `requests` holds what
was asked: (method, path with query, headers, body).
"""

import json
import ssl
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from certs.tokens import make_token
from support.pki import Pki

Answer = Any
Request = tuple[str, str, dict[str, str], Any]


class StandIn:
    def __init__(self, pki: Pki, service: str = "pillion-control-plane", fault: str | None = None) -> None:
        self.pki = pki
        self.requests: list[Request] = []
        self._answers: dict[tuple[str, str], Answer] = {}
        bundle = {"trust_domain": pki.trust_domain, "bundle": pki.bundle.pem.decode()}
        self.answer("GET", "/v1/ca", bundle)
        self.answer("GET", "/v1/whoami", {"name": "mia", "role": "admin", "teams": ["team-reviews"]})
        self.answer("GET", "/v1/check", {"ok": True, "checks": []})
        context = pki.server_context(service, fault=fault)
        context.verify_mode = ssl.CERT_OPTIONAL
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._server.server_address[1]}"

    @property
    def url(self) -> str:
        return f"https://{self.address}"

    def token(self, kind: str = "operator", *addresses: str) -> str:
        fingerprint = self.pki.bundle.roots[0].fingerprint
        return make_token(kind, "t1", "s3cret", addresses or (self.address,), fingerprint, self.pki.trust_domain)

    def answer(self, method: str, path: str, answer: Answer) -> None:
        self._answers[method, path] = answer

    def asked(self, method: str, path: str) -> list[Any]:
        """The bodies of the requests for a path."""
        return [body for verb, asked, _, body in self.requests if (verb, asked.partition("?")[0]) == (method, path)]

    def __enter__(self) -> "StandIn":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        standin = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 10
            disable_nagle_algorithm = True

            def handle(self) -> None:
                try:
                    super().handle()
                except OSError:  # a client that refuses our certificate hangs up
                    self.close_connection = True

            def _serve(self) -> None:
                length = int(self.headers.get("content-length") or 0)
                content = self.rfile.read(length)
                body = json.loads(content) if content else None
                request = (self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, body)
                standin.requests.append(request)
                status, data = standin._find(request)
                raw = data if isinstance(data, bytes) else json.dumps(data).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            do_GET = do_POST = do_DELETE = _serve

            def log_message(self, *_: object) -> None:
                pass

        return Handler

    def _find(self, request: Request) -> tuple[int, Any]:
        method, path, _, _ = request
        found = self._answers.get((method, path.partition("?")[0]))
        if isinstance(found, Callable):  # type: ignore[arg-type]
            found = found(request)
        if found is None:
            return 404, error("not_found", f"there is no {path}")
        return found if isinstance(found, tuple) else (200, found)


def error(code: str, message: str, help: str = "", details: Any = None) -> dict[str, Any]:
    data = {"code": code, "message": message, "help": help}
    return {"error": data if details is None else data | {"details": details}}
