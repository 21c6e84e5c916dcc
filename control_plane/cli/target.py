"""Which control plane a verb asks, and as whom: flags, environment, context file.

Where: --url, PILLION_URL, the addresses in a token that was given, the context file. As whom: --token, --token-file or
--cert, then PILLION_TOKEN, PILLION_TOKEN_FILE, then the context file. How the server is known: by the fingerprint of
its root, which stands in the token; or by the bundle of --cert. Must not call anybody. Invariants: a token never stands
in a message; a context file that others can read is refused, and is written 0600.
"""

import json
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .output import note

if TYPE_CHECKING:
    from certs.files import IdentityFiles

EXIT_UNREACHABLE = 3
JOIN_PORT = 15011
SECRET_BYTES_MAX = 64 * 1024
JOIN_PREFIX = "pil_j_"

Command = TypeVar("Command", bound=Callable[..., Any])


Held = Callable[[], "Context | None"]


class NotConfigured(click.ClickException):
    """Nothing says where a control plane is."""

    exit_code = EXIT_UNREACHABLE


class BadTarget(click.UsageError):
    """What says it is unusable."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the flags of a verb say."""

    url: str | None = None
    token: str | None = None
    token_file: Path | None = None
    cert: Path | None = None


@dataclass(frozen=True, slots=True)
class Context:
    """The context file. `cert`: a directory with an operator's certificate, which then stands for the token."""

    url: str = ""
    fingerprint: str = ""
    trust_domain: str = ""
    token: str = ""
    cert: str = ""

    def __repr__(self) -> str:
        return f"Context({self.url!r})"


@dataclass(frozen=True, slots=True)
class Target:
    """`addresses`: HOST:PORT, to be tried in this order. One of `token` and `identity`. `where` and `whom`: where these
    came from, for messages."""

    addresses: tuple[str, ...]
    trust_domain: str
    fingerprint: str | None
    token: str | None
    identity: "IdentityFiles | None"
    where: str
    whom: str

    def __repr__(self) -> str:
        return f"Target({', '.join(self.addresses)}, {self.whom})"


def remote_options(command: Command) -> Command:
    """The flags that name a control plane; the verb gets them as `asked`."""
    cert = click.option(
        "--cert",
        "asked_cert",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="An operator's certificate instead: a directory with cert.pem, key.pem and bundle.pem.",
    )
    return _with_asked(command, [*_token_options(), cert])


def token_options(command: Command) -> Command:
    """The same for who has nothing but a token."""
    return _with_asked(command, _token_options())


def _token_options() -> list[Callable[[Any], Any]]:
    return [
        click.option("--url", metavar="URL", help="The control plane, https://HOST:PORT.  [env: PILLION_URL]"),
        click.option(
            "--token",
            metavar="TOKEN",
            help="An operator token (other users see flags; better: --token-file).  [env: PILLION_TOKEN]",
        ),
        click.option(
            "--token-file",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="A file with an operator token.  [env: PILLION_TOKEN_FILE]",
        ),
    ]


def _with_asked(command: Command, options: list[Callable[[Any], Any]]) -> Command:
    def with_asked(*args: Any, **kwargs: Any) -> Any:
        token_file, cert = kwargs.pop("token_file", None), kwargs.pop("asked_cert", None)
        asked = Asked(kwargs.pop("url", None), kwargs.pop("token", None), token_file, cert)
        return command(*args, asked=asked, **kwargs)

    with_asked.__name__, with_asked.__doc__ = command.__name__, command.__doc__
    wrapped: Any = with_asked
    wrapped.__click_params__ = []
    for option in reversed(options):
        wrapped = option(wrapped)
    # What the verb itself takes stands first in its help; click reads this list backwards.
    wrapped.__click_params__ += getattr(command, "__click_params__", [])
    result: Command = wrapped
    return result


def context_path(environ: Mapping[str, str]) -> Path:
    named = environ.get("PILLION_CONTEXT")
    if named:
        return Path(named)
    base = environ.get("XDG_CONFIG_HOME") or os.path.join(environ.get("HOME") or os.path.expanduser("~"), ".config")
    return Path(base) / "pillion" / "context.json"


def load_context(path: Path) -> Context | None:
    """None: there is none. Raises BadTarget."""
    try:
        content = read_secret(path, "the context file")
    except FileNotFoundError:
        return None
    try:
        data = json.loads(content)
    except ValueError as error:
        raise BadTarget(f"the context file {path} is not JSON ({error}); remove it and run: pillion login") from None
    known = Context.__dataclass_fields__
    if not isinstance(data, dict) or not all(isinstance(data.get(key, ""), str) for key in known):
        raise BadTarget(f"the context file {path} is damaged; remove it and run: pillion login")
    return Context(**{key: data.get(key, "") for key in known})


def save_context(path: Path, context: Context) -> None:
    """Raises OSError."""
    from certs.files import write_atomic

    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    data = {key: getattr(context, key) for key in Context.__dataclass_fields__}
    content = json.dumps({key: value for key, value in data.items() if value or key != "cert"}, indent=2) + "\n"
    write_atomic(path, content.encode(), 0o600)


def read_secret(path: Path, what: str, strict: bool = True) -> str:
    """The text of a small file that nobody else should be able to read; `strict`: or it is refused (secrets of
    containers often are readable, by whom there is no other). Raises FileNotFoundError and BadTarget."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise BadTarget(f"{what} {path} cannot be read: {error.strerror}") from None
    try:
        status = os.fstat(descriptor)
        mode = stat.S_IMODE(status.st_mode)
        # A pipe, as `--token-file <(…)` gives, belongs to this process alone.
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISFIFO(status.st_mode):
            raise BadTarget(f"{what} {path} is not a file")
        if stat.S_ISREG(status.st_mode) and mode & 0o077:
            problem = f"{what} {path} can be read by others (mode {mode:04o}); run: chmod 600 {path}"
            if strict:
                raise BadTarget(problem)
            note(f"Warning: {problem}")
        os.set_blocking(descriptor, True)
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(SECRET_BYTES_MAX + 1)
    finally:
        os.close(descriptor)
    if len(content) > SECRET_BYTES_MAX:
        raise BadTarget(f"{what} {path} holds more than {SECRET_BYTES_MAX} bytes")
    return content.decode("utf-8", "replace").strip()


def resolve(asked: Asked, environ: Mapping[str, str]) -> Target:
    """Raises NotConfigured and BadTarget."""
    path = context_path(environ)
    given = [
        name
        for name, value in (("--token", asked.token), ("--token-file", asked.token_file), ("--cert", asked.cert))
        if value is not None
    ]
    if len(given) > 1:
        raise BadTarget(f"{' and '.join(given)} both say who you are; give one of them")
    held = cache(lambda: load_context(path))  # read only where it is needed: a damaged one must not be in the way
    token, directory, whom = _whom(asked, environ, held, path)
    if token is None and directory is None:
        raise NotConfigured(_nothing_known(asked, environ, path))
    if directory is not None:
        identity = _load_identity(directory, whom)
        addresses, where = _where(asked, environ, (), held, path)
        return Target(addresses, identity.trust_domain, None, None, identity, where, whom)
    assert token is not None
    facts = _parse(token, whom)
    addresses, where = _where(asked, environ, facts.addresses, held, path, from_context=whom == str(path))
    return Target(addresses, facts.trust_domain, facts.fingerprint, token, None, where, whom)


def _whom(asked: Asked, environ: Mapping[str, str], held: Held, path: Path) -> tuple[str | None, Path | None, str]:
    if asked.cert is not None:
        return None, asked.cert, f"--cert {asked.cert}"
    if asked.token is not None:
        return asked.token.strip(), None, "--token"
    if asked.token_file is not None:
        return _token_of(asked.token_file, "--token-file"), None, f"--token-file {asked.token_file}"
    given, where = "", ""
    named = environ.get("PILLION_TOKEN_FILE")
    if environ.get("PILLION_TOKEN"):
        given, where = environ["PILLION_TOKEN"].strip(), "PILLION_TOKEN"
    elif named:
        given, where = _token_of(Path(named), "PILLION_TOKEN_FILE"), f"PILLION_TOKEN_FILE ({named})"
    if given and not (given.startswith(JOIN_PREFIX) and held() is not None):
        return given, None, where  # a sidecar reads these variables too: its join token is not meant for us
    context = held()
    if context is not None and context.cert:
        return None, Path(context.cert), str(path)
    if context is not None and context.token:
        return context.token, None, str(path)
    return None, None, ""


def _token_of(path: Path, what: str) -> str:
    try:
        text = read_secret(path, f"the token file of {what}", strict=False)
    except FileNotFoundError:
        raise BadTarget(f"{what}: {path}: no such file") from None
    if not text:
        raise BadTarget(f"{what}: {path} is empty")
    return text


def _where(
    asked: Asked,
    environ: Mapping[str, str],
    of_token: tuple[str, ...],
    held: Held,
    path: Path,
    from_context: bool = False,
) -> tuple[tuple[str, ...], str]:
    if asked.url is not None:
        return (address_of(asked.url, "--url"),), "--url"
    if environ.get("PILLION_URL"):
        return (address_of(environ["PILLION_URL"], "PILLION_URL"),), "PILLION_URL"
    if of_token and not from_context:
        return of_token, "the token"
    context = held()
    if context is not None and context.url:
        first = address_of(context.url, f"url in {path}")
        return (first, *(each for each in of_token if each != first)), str(path)
    if of_token:
        return of_token, "the token"
    raise NotConfigured(f"nothing says where the control plane is: no --url, no PILLION_URL, and no url in {path}")


def address_of(url: str, what: str) -> str:
    """HOST:PORT of a URL, or of an address without https://."""
    from urllib.parse import urlsplit

    text = url.strip()
    try:
        parts = urlsplit(text if "://" in text else f"https://{text}")
        port, host = parts.port, parts.hostname
    except ValueError:
        raise BadTarget(f"{what}: {url!r} is not a URL; write https://HOST:PORT") from None
    if parts.scheme == "http":
        raise BadTarget(f"{what}: a control plane speaks TLS only; write https://{parts.netloc}")
    if parts.scheme != "https" or not host or parts.username is not None or parts.path not in ("", "/") or parts.query:
        raise BadTarget(f"{what}: {url!r} is not the address of a control plane; write https://HOST:PORT")
    return f"[{host}]:{port or JOIN_PORT}" if ":" in host else f"{host}:{port or JOIN_PORT}"


def _parse(token: str, whom: str) -> Any:
    from certs.tokens import TokenError, parse_token

    try:
        facts = parse_token(token)
    except TokenError as error:
        raise BadTarget(f"the token of {whom}: {error}") from None
    if facts.kind == "join":
        raise BadTarget(
            f"the token of {whom} is a join token: it lets a sidecar join, and answers no questions. "
            "An admin makes yours: pillion token create --operator NAME --role viewer"
        )
    return facts


def _load_identity(directory: Path, whom: str) -> "IdentityFiles":
    from certs.files import IdentityError, load_identity

    try:
        return load_identity(directory)
    except IdentityError as error:
        again = "" if whom.startswith("--cert") else "; log in again: pillion login --cert --token-file FILE"
        raise BadTarget(f"{whom}: {error}{again}") from None


def _nothing_known(asked: Asked, environ: Mapping[str, str], path: Path) -> str:
    if asked.url is not None or environ.get("PILLION_URL"):
        return (
            f"nothing says who you are: no --token-file, --token or --cert, no PILLION_TOKEN, and no context file "
            f"{path}.\n"
            "Next: pillion login --token-file FILE (an admin makes the token: pillion token create --operator NAME "
            "--role viewer)"
        )
    return (
        f"no control plane is known here: no --token-file or --url, no PILLION_TOKEN or PILLION_URL, and no context "
        f"file {path}.\n"
        "Next: pillion up starts one on this machine; pillion login remembers one that runs elsewhere"
    )
