"""What people write after `--store`, and the options of etcd, understood and checked.

    embedded                           the file store.db in the state directory
    embedded:PATH                      that file
    etcd://HOST:PORT[,HOST:PORT…]      a cluster; TLS, user and prefix are options of their own

Must not open anything but the files that options name. Invariant: a text that is not understood ends in StoreError with
what to write instead; no password is ever in a text, an error or a `repr`.
"""

from dataclasses import dataclass, field
from ipaddress import IPv6Address
from pathlib import Path

from control_plane.store.base import StoreError

EMBEDDED_FILE = "store.db"
ETCD_PORT = 2379
ETCD_PREFIX = "/pillion/v1/"
HOSTS_MAX = 16
PASSWORD_BYTES_MAX = 4096

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class EtcdOptions:
    """`cacert` alone: TLS; `cert` and `key`: a client certificate, with TLS. `prefix` stands before every key."""

    cacert: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    user: str = ""
    password: str = field(default="", repr=False)
    prefix: str = ETCD_PREFIX


@dataclass(frozen=True, slots=True)
class EmbeddedAddress:
    path: Path


@dataclass(frozen=True, slots=True)
class EtcdAddress:
    hosts: tuple[Address, ...]


def parse_store(text: str, state_dir: Path) -> EmbeddedAddress | EtcdAddress:
    """Raises StoreError."""
    if text == "embedded":
        return EmbeddedAddress(state_dir / EMBEDDED_FILE)
    kind, colon, rest = text.partition(":")
    if colon and kind == "embedded":
        if not rest or rest.endswith("/"):
            raise StoreError("embedded: needs the name of a file, such as embedded:/var/lib/pillion/store.db")
        return EmbeddedAddress(Path(rest).expanduser())
    if colon and kind == "etcd" and rest.startswith("//"):
        return EtcdAddress(_hosts(rest[2:].removesuffix("/")))
    if text.startswith(("http://", "https://")) or kind == "etcds":
        raise StoreError(f"{_shown(text)}: write etcd://HOST:PORT; for TLS add --etcd-cacert")
    raise StoreError(f"{_shown(text)} is no store; write embedded, embedded:PATH or etcd://HOST:PORT[,HOST:PORT…]")


def _hosts(text: str) -> tuple[Address, ...]:
    text = text.replace(",etcd://", ",")  # people repeat it
    if "@" in text:
        raise StoreError("etcd://: no user or password here; use --etcd-user and --etcd-password-file")
    if "/" in text or "?" in text or "#" in text:
        raise StoreError(f"{_shown('etcd://' + text)}: nothing follows the addresses; for a prefix use --etcd-prefix")
    hosts = tuple(_host(part.strip()) for part in text.split(","))
    if len(hosts) > HOSTS_MAX:
        raise StoreError(f"etcd://: {len(hosts)} addresses; at most {HOSTS_MAX}")
    if len(set(hosts)) != len(hosts):
        raise StoreError(f"{_shown('etcd://' + text)}: the same address twice")
    return hosts


def _host(text: str) -> Address:
    if text.startswith("["):
        host, _, after = text[1:].partition("]")
        if not _is_ipv6(host) or not (after.startswith(":") or text.endswith("]")):
            raise StoreError(f"etcd://: {text[:80]!r} is no address; write [::1]:{ETCD_PORT}")
        number = after[1:] if after else str(ETCD_PORT)
    else:
        host, colon, number = text.partition(":")
        if ":" in number:
            raise StoreError(f"etcd://: {text[:80]!r}: write an IPv6 address in brackets, [::1]:{ETCD_PORT}")
        if not host or not host.isascii() or not all(letter.isalnum() or letter in "-._" for letter in host):
            raise StoreError(
                f"etcd://: {text[:80]!r} is no address; write HOST:PORT, such as etcd1.example:{ETCD_PORT}"
            )
        number = number if colon else str(ETCD_PORT)
    if not (number.isascii() and number.isdigit() and len(number) <= 5 and 0 < int(number) < 65536):
        raise StoreError(f"etcd://: {number[:20]!r} is no port; etcd's own is {ETCD_PORT}")
    return host, int(number)


def _is_ipv6(text: str) -> bool:
    try:
        IPv6Address(text)
    except ValueError:
        return False
    return True


def _shown(text: str) -> str:
    """For messages: what stands before an @ may hold a password."""
    head, at, tail = text.rpartition("@")
    return repr(f"{head.partition('//')[0]}//…@{tail}"[:100] if at else text[:100])


def etcd_options(
    *,
    cacert: Path | None = None,
    cert: Path | None = None,
    key: Path | None = None,
    user: str = "",
    password_file: Path | None = None,
    prefix: str = ETCD_PREFIX,
) -> EtcdOptions:
    """From flags. Raises StoreError where they do not fit together or a file cannot be read."""
    if (cert is None) != (key is None):
        raise StoreError("--etcd-cert and --etcd-key go together")
    if cert is not None and cacert is None:
        raise StoreError("--etcd-cert needs --etcd-cacert too: the authority that signed the servers' certificates")
    if bool(user) != (password_file is not None):
        raise StoreError("--etcd-user and --etcd-password-file go together")
    for path in (cacert, cert, key):
        if path is not None:
            _read(path, 1024 * 1024)
    if prefix and (not prefix.endswith("/") or not prefix.isascii() or not prefix.isprintable() or " " in prefix):
        raise StoreError(f"--etcd-prefix {prefix[:60]!r}: write a prefix that ends in a slash, such as {ETCD_PREFIX}")
    password = ""
    if password_file is not None:
        try:
            password = _read(password_file, PASSWORD_BYTES_MAX).decode().strip("\r\n")
        except UnicodeDecodeError:
            raise StoreError(f"{password_file}: not text") from None
        if not password:
            raise StoreError(f"{password_file} is empty; it must hold the password of {user}")
    return EtcdOptions(cacert, cert, key, user, password, prefix)


def _read(path: Path, bytes_max: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(bytes_max + 1)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from None
    if len(data) > bytes_max:
        raise StoreError(f"{path}: more than {bytes_max} bytes")
    return data
