"""`pillion login` and `logout`: remember which control plane to ask, and as whom.

Must not store what was not tried: a context is written only when the control plane has proved who it is and has told
who we are. Invariant: what is stored is readable by its owner only; the token is never printed.
"""

import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .output import note, output_option, span
from .target import (
    Asked,
    BadTarget,
    Context,
    Target,
    context_path,
    load_context,
    resolve,
    save_context,
    token_options,
)

if TYPE_CHECKING:
    from .remote import Remote

IDENTITY = "operator"  # the directory beside the context file


@click.command()
@click.option(
    "--cert", "certificate", is_flag=True, help="Store a certificate of the operator's own instead of the token."
)
@output_option("text", "json")
@token_options
def login(certificate: bool, output: str, asked: Asked) -> None:
    """Remember a control plane and who you are.

    Tries an operator token, from --token-file, --token, PILLION_TOKEN or as you type it, and stores it in the context
    file (~/.config/pillion/context.json, or $PILLION_CONTEXT), so that other commands need no flags.

    With --cert a certificate for this operator is fetched and stored instead of the token: its key is made here
    and never leaves.
    """
    from .remote import Remote

    path = context_path(os.environ)
    target = resolve(_asked(asked), os.environ)
    if target.token is None:
        raise click.UsageError("logging in needs a token: --token-file FILE")
    with Remote(target) as remote:
        who = remote.get("/v1/whoami")
        directory = path.parent / IDENTITY
        until = _fetch_certificate(remote, target, directory) if certificate else None
        context = Context(
            url=f"https://{remote.address}",
            fingerprint=target.fingerprint or "",
            trust_domain=target.trust_domain,
            token="" if certificate else target.token,
            cert=str(directory) if certificate else "",
        )
        replaced = _held(path)
        try:
            save_context(path, context)
        except OSError as error:
            raise click.ClickException(f"cannot write {path}: {error.strerror}") from None
    if output == "json":
        from .output import echo_json

        echo_json({**who, "url": context.url, "trust_domain": context.trust_domain, "context": str(path)})
        return
    teams = ", ".join(who.get("teams") or ())
    note(f"logged in to {context.url} ({context.trust_domain}) as {who.get('name')}, {who.get('role')}"
         f"{f' of {teams}' if teams else ''}")  # fmt: skip
    if until is not None:
        note(f"certificate in {directory}, good for {span(until - datetime.now(UTC).timestamp())}")
    if replaced and replaced != context.url:
        note(f"the context for {replaced} was replaced")
    note(f"stored in {path}; pillion logout forgets it")


def _asked(asked: Asked) -> Asked:
    """The same, with a token that is typed where nothing gives one. The context file does not count here."""
    if asked.token is not None or asked.token_file is not None:
        return asked
    if os.environ.get("PILLION_TOKEN") or os.environ.get("PILLION_TOKEN_FILE"):
        return asked
    typed: str = _ask() if sys.stdin.isatty() else sys.stdin.readline()
    if not typed.strip():
        raise BadTarget("no token was given: use --token-file FILE, or give it on stdin")
    return Asked(asked.url, typed.strip(), None, None)


def _ask() -> str:
    return str(click.prompt("Operator token", hide_input=True, err=True))


def _held(path: Path) -> str:
    try:
        context = load_context(path)
    except BadTarget:
        return "something damaged"
    return context.url if context is not None else ""


def _fetch_certificate(remote: "Remote", target: Target, directory: Path) -> float:
    """A key of our own and a certificate for it, as an identity directory; when it ends."""
    from certs.authority import key_pem, new_key
    from certs.client import new_csr
    from certs.files import BUNDLE, CERT, KEY, IdentityError, parse_identity, write_atomic

    key = new_key()
    answer = remote.post("/v1/login", {"csr": new_csr(key).decode()})
    chain, bundle = str(answer.get("certificate", "")).encode(), str(answer.get("bundle", "")).encode()
    try:
        identity = parse_identity(chain, key_pem(key), bundle, datetime.now(UTC), directory)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(directory / BUNDLE, bundle, 0o644)
        write_atomic(directory / KEY, key_pem(key), 0o600)
        write_atomic(directory / CERT, chain, 0o644)
    except IdentityError as error:
        raise click.ClickException(f"the certificate that the control plane issued cannot be used: {error}") from None
    except OSError as error:
        raise click.ClickException(f"cannot write {directory}: {error.strerror}") from None
    return identity.not_after.timestamp()


@click.command()
def logout() -> None:
    """Forget the control plane, the token and the certificate.

    The token stays valid where else it is kept: pillion token revoke makes it void.
    """
    path = context_path(os.environ)
    directory = path.parent / IDENTITY
    try:
        context = load_context(path)
    except BadTarget:
        context = Context()
    found = context is not None
    try:
        path.unlink(missing_ok=True)
        for name in ("key.pem", "cert.pem", "bundle.pem"):
            if (directory / name).exists():
                (directory / name).unlink()
                found = True
        if directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()
    except OSError as error:
        raise click.ClickException(f"cannot remove {error.filename or path}: {error.strerror}") from None
    if context is not None:
        note(f"logged out{f' of {context.url}' if context.url else ''}: {path} is removed")
    elif found:
        note(f"{directory} is removed")
    else:
        note(f"nobody is logged in: there is no {path}")
