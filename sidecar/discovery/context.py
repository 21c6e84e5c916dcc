"""The control plane that a user works with (`pillion up`, `pillion login`), for `pillion run`: a token for the asking.

Reads the context file and asks the operator API for a token to join with. Must not know how a sidecar is started.
Invariant: the operator's token is sent to nobody but the control plane whose root the context names.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from certs.client import JOIN_SNI, control_plane_id, pinned_context
from certs.files import IdentityError, read_limited

CONTEXT_BYTES_MAX = 64 * 1024
TTL_S = 3600
USES = 5  # one is needed; an answer may get lost
ASK_S = 10.0
EXIT_AWAY = 3


class ContextError(Exception):
    """No token can be had; says why and what to do."""


class Away(ContextError):
    """The control plane of the context does not answer."""


@dataclass(frozen=True, slots=True)
class Context:
    """`address`: HOST:PORT of the join and operator listener."""

    address: str
    fingerprint: str
    trust_domain: str
    token: str = field(repr=False)

    @property
    def is_local(self) -> bool:
        host = self.address.rpartition(":")[0]
        return host in ("localhost", "[::1]") or host.startswith("127.")


def context_path(environment: Mapping[str, str]) -> Path:
    named = environment.get("PILLION_CONTEXT", "")
    if named:
        return Path(named)
    home = environment.get("XDG_CONFIG_HOME", "")
    base = Path(home) if home.startswith("/") else Path(environment.get("HOME") or "/") / ".config"
    return base / "pillion" / "context.json"


def read_context(path: Path) -> Context | None:
    """None: there is none. Raises ContextError."""
    if not path.exists():
        return None
    again = "make it anew with: pillion up, or pillion login"
    try:
        data = json.loads(read_limited(path, CONTEXT_BYTES_MAX, secret=True))
        url = urlsplit(data["url"])
        texts = [data[key] for key in ("fingerprint", "trust_domain", "token")]
        if url.scheme != "https" or not url.hostname or not all(isinstance(each, str) and each for each in texts):
            raise ValueError("a value in it is of the wrong kind")
        host = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
        return Context(f"{host}:{url.port or 443}", *texts)
    except IdentityError as error:
        raise ContextError(str(error)) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        shown = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ContextError(f"{path} is damaged ({shown[:100]}); {again}") from None


def ask_for_token(context: Context, service: str) -> str:
    """A token with which a sidecar of this service can join. Raises ContextError (Away: nobody answers)."""
    import trio

    return trio.run(_ask, context, service)


async def _ask(context: Context, service: str) -> str:
    from .http import Client, Refused, Unreachable
    from .join import first_trust

    where = f"the control plane at {context.address}"
    try:
        bundle = await first_trust(context.address, context.trust_domain, context.fingerprint)
        client = Client(pinned_context(bundle, control_plane_id(context.trust_domain)), JOIN_SNI)
        body = {"kind": "join", "service": service, "uses": USES, "ttl_s": TTL_S}
        try:
            answer = await client.call(
                "POST", context.address, "/v1/tokens", body, bearer=context.token, timeout_s=ASK_S, repeat=False
            )
        finally:
            await client.aclose()
    except Unreachable as error:
        raise Away(f"{where} cannot be used: {error}; is it running? Start it with: pillion up") from None
    except Refused as error:
        raise ContextError(f"{where} gives no token for {service}: {error}") from None
    token = answer.get("token") if isinstance(answer, dict) else None
    if not isinstance(token, str):
        raise ContextError(f"{where} gave no token; is it of this version?")
    return token


def token_by_child(path: Path, service: str) -> str:
    """The same in a process of its own, for one that is going to fork and must have no threads. Raises ContextError."""
    command = [sys.executable, "-P", "-m", __name__, str(path), service]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)  # noqa: S603
    text = done.stdout.decode("utf-8", "replace").strip()
    if done.returncode == 0:
        return text
    if not text:
        raise ContextError(f"asking for a token has failed:\n{done.stderr.decode('utf-8', 'replace')[-2000:]}")
    raise (Away if done.returncode == EXIT_AWAY else ContextError)(text)


def main(path: str, service: str) -> int:
    """Print a token, or why there is none."""
    try:
        context = read_context(Path(path))
        if context is None:
            raise ContextError(f"{path} is gone")
        text, code = ask_for_token(context, service), 0
    except ContextError as error:
        text, code = str(error), EXIT_AWAY if isinstance(error, Away) else 1
    sys.stdout.write(text + "\n")
    return code


def run_directory(service: str, port: int, environment: Mapping[str, str] = os.environ) -> Path:
    """Where the sidecar of `pillion run` keeps its state: one directory for each service and port of a user."""
    home = environment.get("XDG_STATE_HOME", "")
    base = Path(home) if home.startswith("/") else Path(environment.get("HOME") or "/") / ".local" / "state"
    return base / "pillion" / "run" / f"{service}-{port}"


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
