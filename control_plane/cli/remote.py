"""The client of the operator API: authenticated both ways, one address after another, every failure explained.

Made of the standard library, because every command waits for what this loads: httpx takes Trio, rich and h2 with it,
and would double the time of `pillion get services`. Must not know what the answers mean. Invariants: nothing secret is
sent before the server has proved to be the control plane of the target's root; a change is sent to a second address
only where it cannot have reached the first; answers are bounded.
"""

import http.client
import json
import os
import socket
import ssl
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any
from urllib.parse import urlencode

import click

from certs.bundle import BundleError, TrustBundle
from certs.client import (
    JOIN_SNI,
    WrongPeer,
    control_plane_id,
    pinned_context,
    root_by_fingerprint,
    unverified_context,
)

from . import EXIT_CONFLICT, EXIT_FAILED, EXIT_UNREACHABLE, EXIT_USAGE
from .target import Asked, Target, resolve

CONNECT_TIMEOUT_S = 5.0
TIMEOUT_S = 30.0
ANSWER_BYTES_MAX = 64 * 1024 * 1024
READ_BYTES = 64 * 1024

Json = Any
Query = Mapping[str, str | int | float | None]


class Unreachable(click.ClickException):
    """No control plane answered. `tried`: each address with the reason."""

    exit_code = EXIT_UNREACHABLE

    def __init__(self, message: str, tried: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.tried = tuple(tried)


class ApiError(click.ClickException):
    """The control plane answered no. `code` as the API names it; `details` as it gave them."""

    exit_code = EXIT_FAILED

    def __init__(self, status: int, code: str, message: str, help: str = "", details: Json = None) -> None:
        super().__init__(message)
        self.status, self.code, self.help, self.details = status, code, help, details

    def format_message(self) -> str:
        return f"{self.message}\n  help: {self.help}" if self.help else self.message


class Invalid(ApiError):
    """What was asked for is malformed, or an invalid policy."""

    exit_code = EXIT_USAGE


class Conflict(ApiError):
    """Somebody else was first."""

    exit_code = EXIT_CONFLICT


class Unavailable(ApiError):
    """The control plane is there, but cannot do it now."""

    exit_code = EXIT_UNREACHABLE


def _kind_of(status: int, code: str) -> type[ApiError]:
    if code == "conflict":
        return Conflict
    if status in (400, 413, 422):
        return Invalid
    return Unavailable if status in (502, 503, 504) else ApiError


class _Failed(Exception):
    """An exchange with one address failed. `sent`: the request may have arrived."""

    def __init__(self, reason: str, sent: bool) -> None:
        super().__init__(reason)
        self.reason, self.sent = reason, sent


def connect(asked: Asked, timeout_s: float = TIMEOUT_S, connect_timeout_s: float = CONNECT_TIMEOUT_S) -> "Remote":
    """The client for what the flags, the environment and the context file say; calls nobody yet."""
    return Remote(resolve(asked, os.environ), timeout_s, connect_timeout_s)


class Remote:
    def __init__(self, target: Target, timeout_s: float = TIMEOUT_S, connect_timeout_s: float = CONNECT_TIMEOUT_S):
        self.target = target
        self.bundle: TrustBundle | None = target.identity.bundle if target.identity is not None else None
        self.date: str | None = None  # of the last answer, as the server's clock has it
        self._timeout_s, self._connect_timeout_s = timeout_s, connect_timeout_s
        self._answered = ""
        self._connection: _Connection | None = None

    def __enter__(self) -> "Remote":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @property
    def address(self) -> str:
        """The address that answered last, else the first to be tried."""
        return self._answered or self.target.addresses[0]

    def get(self, path: str, query: Query | None = None, timeout_s: float | None = None) -> Json:
        return self._call("GET", path, None, query or {}, timeout_s)

    def post(self, path: str, body: Json, timeout_s: float | None = None) -> Json:
        return self._call("POST", path, body, {}, timeout_s)

    def delete(self, path: str) -> Json:
        return self._call("DELETE", path, None, {}, None)

    def _call(self, method: str, path: str, body: Json, query: Query, timeout_s: float | None) -> Json:
        words = urlencode({key: value for key, value in query.items() if value is not None})
        whole = f"{path}?{words}" if words else path
        tried: list[tuple[str, str]] = []
        for address in sorted(self.target.addresses, key=lambda each: each != self._answered):
            try:
                answer = self._ask(address, method, whole, body, timeout_s or self._timeout_s)
            except _Failed as failure:
                self.close()
                if failure.sent and method != "GET":
                    raise Unreachable(
                        f"the control plane at {address} did not answer ({failure.reason}), and what was asked may or "
                        "may not have been done.\nNext: look with pillion audit, or pillion policy history",
                        [(address, failure.reason)],
                    ) from None
                tried.append((address, failure.reason))
            else:
                self._answered = address
                return answer.read(path)
        raise self._unreachable(tried)

    def _ask(self, address: str, method: str, path: str, body: Json, timeout_s: float) -> "_Answer":
        held = self._connection
        if held is not None and held.address == address:
            try:
                return self._exchange(held, method, path, body, timeout_s, self._credentials())
            except _Failed:
                if method != "GET":
                    raise
                self.close()  # a server may close a connection that was idle: once more on a fresh one
        self.close()
        bundle = self.bundle or self._roots(address)
        context = pinned_context(bundle, control_plane_id(self.target.trust_domain), self.target.identity)
        self._connection = _Connection(address, context, self._connect_timeout_s)
        return self._exchange(self._connection, method, path, body, timeout_s, self._credentials())

    def _credentials(self) -> dict[str, str]:
        token = self.target.token
        return {} if token is None else {"authorization": f"Bearer {token}"}

    def _unreachable(self, tried: Sequence[tuple[str, str]]) -> Unreachable:
        target = self.target
        lines = [f"  https://{address}: {reason}" for address, reason in tried]
        known = f"the address is from {target.where}" if target.where != target.whom else f"from {target.whom}"
        return Unreachable(
            "the control plane cannot be reached. Tried:\n" + "\n".join(lines) + f"\n({known})\n"
            "Next: pillion check says more; pillion up starts a control plane on this machine",
            tried,
        )

    def _roots(self, address: str) -> TrustBundle:
        """The root that our fingerprint vouches for. This connection proves nothing and carries nothing secret."""
        target = self.target
        assert target.fingerprint is not None
        connection = _Connection(address, unverified_context(), self._connect_timeout_s)
        try:
            answer = self._exchange(connection, "GET", "/v1/ca", None, self._connect_timeout_s, {})
        finally:
            connection.close()
        try:
            data = answer.read("/v1/ca")
            bundle = TrustBundle.parse(target.trust_domain, data["bundle"].encode())
        except (BundleError, ApiError, KeyError, TypeError, AttributeError) as error:
            raise _Failed(f"what answers there is no control plane of {target.trust_domain} ({error})", False) from None
        own = root_by_fingerprint(bundle, target.fingerprint)
        if own is None:
            found = ", ".join(root.fingerprint[:16] for root in bundle.roots)
            raise _Failed(
                f"another control plane answers there: its root is {found}…, but {target.whom} names "
                f"{target.fingerprint[:16]}… (was it set up anew? then log in again)",
                False,
            )
        return own

    def _exchange(
        self,
        connection: "_Connection",
        method: str,
        path: str,
        body: Json,
        timeout_s: float,
        credentials: Mapping[str, str],
    ) -> "_Answer":
        """One request over one connection. Raises _Failed."""
        answer = connection.exchange(method, path, body, timeout_s, credentials)
        self.date = answer.date
        return answer


class _Answer:
    """What came back, not yet understood."""

    def __init__(self, status: int, date: str | None, content: bytes) -> None:
        self.status, self.date, self.content = status, date, content

    def read(self, path: str) -> Json:
        """The data of it. Raises ApiError."""
        try:
            data = json.loads(self.content) if self.content else {}
        except (ValueError, RecursionError):
            data = None
        if 200 <= self.status < 300 and isinstance(data, dict):
            return data
        error = data.get("error") if isinstance(data, dict) else None
        if isinstance(error, dict) and isinstance(error.get("message"), str):
            code, help = str(error.get("code", "")), error.get("help")
            kind = _kind_of(self.status, code)
            raise kind(self.status, code, error["message"], help if isinstance(help, str) else "", error.get("details"))
        raise ApiError(
            self.status,
            "",
            f"the control plane's answer to {path} is not understood (status {self.status})",
            "is its version the same as this one's? pillion --version",
        )


class _Connection(http.client.HTTPSConnection):
    """One connection to one address, made when it is first used."""

    def __init__(self, address: str, context: ssl.SSLContext, connect_timeout_s: float) -> None:
        host, _, port = address.rpartition(":")
        super().__init__(host.removeprefix("[").removesuffix("]"), int(port), timeout=connect_timeout_s)
        self.address = address
        self._tls, self._connect_timeout_s = context, connect_timeout_s

    def connect(self) -> None:
        sock = socket.create_connection((self.host, self.port), self._connect_timeout_s)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.sock = self._tls.wrap_socket(sock, server_hostname=JOIN_SNI)
        except BaseException:
            sock.close()
            raise

    def exchange(self, method: str, path: str, body: Json, timeout_s: float, credentials: Mapping[str, str]) -> _Answer:
        """Raises _Failed."""
        headers = {"user-agent": "pillion", "accept": "application/json", **credentials}
        content = None
        if body is not None:
            headers["content-type"] = "application/json"
            content = json.dumps(body).encode()
        end = time.monotonic() + timeout_s
        sent = False
        try:
            if self.sock is None:
                self.connect()
            assert self.sock is not None
            self.sock.settimeout(timeout_s)
            sent = True
            try:
                self.request(method, path, content, headers)
            except (BrokenPipeError, ConnectionResetError, ssl.SSLEOFError):
                pass  # it may have refused a large body without reading all of it: its answer says so
            response = self.getresponse()
            parts, size = [], 0
            while part := response.read1(READ_BYTES):
                size += len(part)
                left = end - time.monotonic()
                if size > ANSWER_BYTES_MAX:
                    raise _Failed(f"the answer holds more than {ANSWER_BYTES_MAX} bytes", True)
                if left <= 0:
                    raise TimeoutError
                if self.sock is not None:  # None: it was the last answer of this connection
                    self.sock.settimeout(left)
                parts.append(part)
            response.close()  # the answer; the connection stays
            return _Answer(response.status, response.headers.get("date"), b"".join(parts))
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise _Failed(_reason(error, sent), sent) from None


def _reason(error: Exception, sent: bool) -> str:
    """What went wrong, in a few words."""
    match error:
        case ssl.SSLCertVerificationError():
            text = error.verify_message or str(error)
            hint = "; is the clock of this machine right?" if "valid" in text or "expired" in text else ""
            return f"its certificate is refused: {text}{hint}"
        case WrongPeer():
            return error.text
        case ssl.SSLError() if not sent:
            return f"no TLS 1.3 there ({(error.reason or str(error)).replace('_', ' ').lower()})"
        case socket.gaierror():
            return f"the name of that host is not known ({error.strerror})"
        case TimeoutError():
            return "no answer in time" if sent else "no connection in time; is a firewall in between?"
        case ConnectionRefusedError():
            return "connection refused: nothing listens there"
        case http.client.RemoteDisconnected() | ConnectionResetError() | BrokenPipeError() | ssl.SSLError():
            return "the connection was closed without an answer"
        case http.client.HTTPException():
            return f"what answers there does not speak HTTP ({type(error).__name__})"
        case OSError() if error.strerror:
            return error.strerror
    return str(error) or type(error).__name__
