"""One service of the demo, as anybody might have written it: the standard library, nothing else.

Run as a file, not imported: `python -I -S service.py NAME --listen-fd N [--version V] [--failing SHARE]`. Calls other
services by their names through the sidecar at PILLION_OUTBOUND, and passes `traceparent` on. Must not know that there
is a mesh: certificates, retries and policy are the sidecar's. Every answer is JSON that says who answered, who the
sidecar said was calling, and what the services further down said.
"""

import argparse
import http.client
import json
import os
import random
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CALL_S = 10.0
WORK_S = {"web": 0.001, "reviews": 0.004, "ratings": 0.002, "orders": 0.003}
SLOWER = {"v2": 3.0}
BLOCK = 10


class Failing:
    """Decides which requests fail: the stated share of every ten, in an order that nobody can foresee. So the share is
    exact, and yet failures come singly and in rows as they do in life."""

    def __init__(self, share: float) -> None:
        self.share = share
        self._block: list[bool] = []
        self._lock = threading.Lock()

    def next(self) -> bool:
        if not self.share:
            return False
        with self._lock:
            if not self._block:
                failing = round(self.share * BLOCK)
                self._block = [True] * failing + [False] * (BLOCK - failing)
                random.shuffle(self._block)
            return self._block.pop()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    name = ""
    version = ""
    failing = Failing(0)
    _sidecar: http.client.HTTPConnection | None = None

    def do_GET(self) -> None:
        time.sleep(random.uniform(0.5, 1.5) * WORK_S[self.name] * SLOWER.get(self.version, 1.0))
        status, answer = getattr(self, f"answer_{self.name}")()
        caller = self.headers.get("x-forwarded-client-cert", "")
        known = {"service": self.name, "version": self.version, "caller": caller}
        if tenant := self.headers.get("x-tenant"):
            known["tenant"] = tenant
        self._send(status, known | answer)

    def answer_web(self) -> tuple[int, dict[str, Any]]:
        callee = "orders" if self.path.startswith("/orders/") else "reviews"
        status, answer = self._call(callee, f"/{callee}/{self._number()}")
        if status != 200:
            return 502, {"problem": f"{callee} answered {status}", callee: answer}
        return 200, {callee: answer}

    def answer_reviews(self) -> tuple[int, dict[str, Any]]:
        if self.failing.next():
            return 503, {"problem": "the new release of reviews has a fault"}
        return 200, {"text": "Holds what it promises."} | self._stars()

    def answer_orders(self) -> tuple[int, dict[str, Any]]:
        return 200, {"order": self._number()} | self._stars()

    def answer_ratings(self) -> tuple[int, dict[str, Any]]:
        return 200, {"stars": 1 + int(self._number()) % 5}

    def _stars(self) -> dict[str, Any]:
        """Stars are a nicety: without them the answer is still one."""
        status, answer = self._call("ratings", f"/ratings/{self._number()}")
        return (
            {"ratings": answer} if status == 200 else {"ratings": None, "ratings_refused": answer | {"status": status}}
        )

    def _number(self) -> str:
        return self.path.rpartition("/")[2]

    def _call(self, service: str, path: str) -> tuple[int, dict[str, Any]]:
        """One GET; a kept connection that the sidecar has closed meanwhile is replaced once."""
        headers = {"host": service}
        if trace := self.headers.get("traceparent"):
            headers["traceparent"] = trace
        for fresh in (self._sidecar is None, True):
            if self._sidecar is None:
                host, _, port = os.environ["PILLION_OUTBOUND"].rpartition(":")
                self._sidecar = http.client.HTTPConnection(host, int(port), timeout=CALL_S)
            try:
                self._sidecar.request("GET", path, headers=headers)
                response = self._sidecar.getresponse()
                answer = json.loads(response.read() or b"{}")
                if filtered := response.getheader("x-filtered-by"):
                    answer["filtered_by"] = filtered
                return response.status, answer
            except (OSError, http.client.HTTPException, ValueError) as error:
                self._sidecar.close()
                self._sidecar = None
                if fresh:
                    return 0, {"problem": f"no answer from the sidecar: {error!r}"}
        raise AssertionError

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode() + b"\n"
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self._headers_buffer: list[bytes]
        self._headers_buffer += [b"\r\n", body]  # head and body in one write
        self.flush_headers()

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, listening: socket.socket) -> None:
        super().__init__(("", 0), Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listening


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=sorted(WORK_S))
    parser.add_argument("--listen-fd", type=int, required=True)
    parser.add_argument("--version", default="")
    parser.add_argument("--failing", type=float, default=0.0)
    options = parser.parse_args()
    Handler.name, Handler.version, Handler.failing = options.name, options.version, Failing(options.failing)
    Server(socket.socket(fileno=options.listen_fd)).serve_forever()


if __name__ == "__main__":
    main()
