"""What stands at an address where etcd does not answer: found with a plain socket, since gRPC does not tell.

Blocks (for a worker thread), at most some seconds. Must know nothing of gRPC. Sends nothing but the beginning of
HTTP/2 and of TLS.
"""

import socket
import ssl
from dataclasses import dataclass

# RFC 9113, 3.4: the client's preface, then a SETTINGS frame, here without any setting.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_SETTINGS = 4

# OpenSSL's x509_vfy.h
_UNKNOWN_CA = (2, 18, 19, 20, 21)
_OTHER_NAME = (62, 64)
_NOT_YET, _EXPIRED = 9, 10


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Paths; of the client's certificate and key both or none."""

    cacert: str
    cert: str | None = None
    key: str | None = None

    def context(self) -> ssl.SSLContext:
        """Raises ValueError that names the file."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.set_alpn_protocols(["h2"])
        try:
            context.load_verify_locations(self.cacert)
        except (OSError, ssl.SSLError) as exc:
            raise ValueError(f"cannot use the CA certificate {self.cacert}: {_why(exc)}") from None
        if self.cert is not None:
            try:
                # Without a password given, an encrypted key would make OpenSSL ask for one at the terminal.
                context.load_cert_chain(self.cert, self.key, password="")
            except (OSError, ssl.SSLError) as exc:
                where = f"{self.cert} with the key {self.key}"
                raise ValueError(f"cannot use the client certificate {where}: {_why(exc)}") from None
        return context


@dataclass(frozen=True, slots=True)
class Finding:
    text: str
    refused: bool = False  # trying again changes nothing


def diagnose(host: str, port: int, tls: TlsFiles | None, timeout_s: float) -> Finding | None:
    """None: an HTTP/2 server answers, in the way that is configured."""
    try:
        return _plain(host, port, timeout_s) if tls is None else _tls(host, port, tls, timeout_s)
    except ValueError as exc:
        return Finding(str(exc), refused=True)
    except socket.gaierror as exc:
        return Finding(f"its name cannot be resolved ({exc.strerror})")
    except ConnectionRefusedError:
        return Finding("connection refused: nothing listens there")
    except TimeoutError:
        return Finding("no answer in time")
    except OSError as exc:
        return Finding(_why(exc))


def _plain(host: str, port: int, timeout_s: float) -> Finding | None:
    answer = _answer_in_plain(host, port, timeout_s)
    if len(answer) >= 4 and answer[3] == _SETTINGS and not answer.startswith(b"HTTP/"):
        return None
    if answer.startswith(b"HTTP/"):
        return Finding(
            "an HTTP/1 server answers there, not etcd (its port for clients is 2379 by default)", refused=True
        )
    if answer[:2] == b"\x15\x03" or (not answer and _speaks_tls(host, port, timeout_s)):
        return Finding("it speaks TLS, and no CA certificate was given (cacert)", refused=True)
    return Finding("it closes the connection" if not answer else "something else than etcd answers there", bool(answer))


def _tls(host: str, port: int, tls: TlsFiles, timeout_s: float) -> Finding | None:
    context = tls.context()
    try:
        with (
            socket.create_connection((host, port), timeout_s) as sock,
            context.wrap_socket(sock, server_hostname=host) as wrapped,
        ):
            wrapped.sendall(_PREFACE)
            # In TLS 1.3 the server judges our certificate after our handshake is done: only reading tells.
            answer = _read(wrapped)
    except ssl.SSLCertVerificationError as exc:
        return Finding(_certificate(exc, host, tls), refused=True)
    except ssl.SSLError as exc:
        return _alert(exc, host, port, tls, timeout_s)
    except ConnectionResetError:
        answer = b""
    if not answer and tls.cert is None:
        return Finding("it closes the TLS connection: it may demand a client certificate (cert and key)")
    if answer[3:4] == bytes((_SETTINGS,)) and not answer.startswith(b"HTTP/"):
        return None
    return Finding("a TLS server answers there, but not etcd", refused=bool(answer))


def _certificate(exc: ssl.SSLCertVerificationError, host: str, tls: TlsFiles) -> str:
    if exc.verify_code in _UNKNOWN_CA:
        return f"its certificate is of an unknown CA, not of {tls.cacert} ({exc.verify_message})"
    if exc.verify_code in _OTHER_NAME:
        return f"its certificate is for another name than {host}"
    if exc.verify_code in (_NOT_YET, _EXPIRED):
        return "its certificate has expired" if exc.verify_code == _EXPIRED else "its certificate is not yet valid"
    return f"its certificate is not good: {exc.verify_message}"


def _alert(exc: ssl.SSLError, host: str, port: int, tls: TlsFiles, timeout_s: float) -> Finding:
    reason = exc.reason or ""
    if "ALERT" in reason and ("CERTIFICATE" in reason or "UNKNOWN_CA" in reason or "HANDSHAKE_FAILURE" in reason):
        if tls.cert is None:
            return Finding("it demands a client certificate, and none was given (cert and key)", refused=True)
        return Finding(f"it does not accept our client certificate {tls.cert} ({_why(exc)})", refused=True)
    if reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE") or isinstance(exc, ssl.SSLEOFError):
        answer = _answer_in_plain(host, port, timeout_s)
        if answer.startswith(b"HTTP/"):
            return Finding("an HTTP/1 server without TLS answers there, not etcd", refused=True)
        if answer:
            return Finding("it speaks without TLS, and a CA certificate was given (cacert)", refused=True)
    return Finding(f"the TLS handshake failed: {_why(exc)}")


def _answer_in_plain(host: str, port: int, timeout_s: float) -> bytes:
    with socket.create_connection((host, port), timeout_s) as sock:
        try:
            sock.sendall(_PREFACE)
            return _read(sock)
        except ConnectionResetError:
            return b""


def _speaks_tls(host: str, port: int, timeout_s: float) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # nothing is told and nothing believed: only whether it is TLS
    try:
        with socket.create_connection((host, port), timeout_s) as sock, context.wrap_socket(sock):
            return True
    except ssl.SSLError as exc:
        return "ALERT" in (exc.reason or "")
    except OSError:
        return False


def _read(sock: socket.socket) -> bytes:
    answer = b""
    while len(answer) < 9:
        part = sock.recv(64)
        if not part:
            break
        answer += part
    return answer


def _why(exc: OSError) -> str:
    if isinstance(exc, ssl.SSLError) and exc.reason:
        return exc.reason.lower().replace("_", " ")
    return exc.strerror or str(exc) or type(exc).__name__
