"""`pillion cert`: the certificates of the mesh, who is shut out of it, and the keys of its cookies.

Must not know X.509: the control plane keeps what is shown here.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import quote

import click

from . import EXIT_FAILED
from .durations import parse_duration
from .get import ago_cell, expires_cell
from .listing import Column, Listing, show, text
from .output import BAD, FORMATS, moment, note, output_option
from .target import Asked, remote_options

_FINGERPRINT = re.compile(r"[0-9a-fA-F]{64}", re.ASCII)

CERTIFICATES = Listing(
    "/v1/certs", "certs", "certificate", lambda item: str(item.get("fingerprint", "")),
    (
        Column("SIDECAR", text("sidecar")),
        Column("SERVICE", text("service")),
        Column("HOST", text("name")),
        Column("EXPIRES", expires_cell("not_after")),
        Column("RENEWED", ago_cell("renewed")),
        Column("BANNED", lambda item, now: ("banned", BAD) if item.get("banned") else "-"),
        Column("FINGERPRINT", lambda item, now: str(item.get("fingerprint", "-"))[:16]),
        Column("JOINED", ago_cell("joined"), wide=True),
        Column("SPIFFE ID", text("spiffe_id"), wide=True),
    ),
    "no certificate has been issued. Next: pillion token create --service NAME",
)  # fmt: skip
AUTHORITIES = Listing(
    "/v1/certs", "authorities", "authority", lambda item: str(item.get("fingerprint", "")),
    (
        Column("AUTHORITY", text("kind")),
        Column("REPLICA", text("replica")),
        Column("EXPIRES", expires_cell("not_after")),
        Column("ADDED", ago_cell("added")),
        Column("FINGERPRINT", lambda item, now: str(item.get("fingerprint", "-"))[:16]),
    ),
    "no authority is known",
)  # fmt: skip
BANS = Listing(
    "/v1/bans", "bans", "ban", lambda item: str(item.get("id") or item.get("value")),
    (
        Column("BAN", text("id")),
        Column("KIND", text("kind")),
        Column("WHOM", text("value")),
        Column("BY", text("by")),
        Column("WHEN", ago_cell("at")),
        Column("REASON", text("reason")),
    ),
    "nobody is banned",
)  # fmt: skip


@click.group()
def cert() -> None:
    """List the certificates of the mesh; ban and unban; change the keys of sticky cookies."""


@cert.command("ls")
@click.option("--authorities", is_flag=True, help="Those of the roots and issuing authorities instead.")
@click.option("-w", "--watch", is_flag=True, help="Go on and show what changes, until Ctrl-C.")
@output_option(*FORMATS)
@remote_options
def list_certificates(authorities: bool, watch: bool, output: str, asked: Asked) -> int:
    """List the certificate of each sidecar that has joined."""
    from .remote import connect

    return show(connect(asked), AUTHORITIES if authorities else CERTIFICATES, output, (), watch)


@cert.command()
@click.option("-w", "--watch", is_flag=True, help="Go on and show what changes, until Ctrl-C.")
@output_option(*FORMATS)
@remote_options
def bans(watch: bool, output: str, asked: Asked) -> int:
    """List who is banned."""
    from .remote import connect

    return show(connect(asked), BANS, output, (), watch)


@cert.command()
@click.argument("subject")
@click.option("--reason", default="", help="Why, for those who see the ban.")
@remote_options
def ban(subject: str, reason: str, asked: Asked) -> None:
    """Shut somebody out of the mesh.

    \b
    SUBJECT is a sidecar (its id, from `pillion get sidecars`): whatever certificate it has;
    a certificate (its SHA-256 fingerprint): that one only;
    or a SPIFFE ID, spiffe://DOMAIN/service/NAME: every sidecar of that service.

    Connections that it has are ended; it can neither renew nor join again.
    """
    from .remote import connect

    kind, value = kind_of(subject)
    with connect(asked) as remote:
        remote.post("/v1/bans", {"kind": kind, "value": value, "reason": reason})
    note(f"banned: {kind} {value}\nTo lift it: pillion cert unban {value}")


def kind_of(subject: str) -> tuple[str, str]:
    """What somebody who is to be banned is, and how it is written."""
    if subject.startswith("spiffe://"):
        return "identity", subject
    bare = subject.replace(":", "")
    if _FINGERPRINT.fullmatch(bare):
        return "certificate", bare.lower()
    return "sidecar", subject


@cert.command()
@click.argument("subjects", nargs=-1, required=True, metavar="SUBJECT...")
@remote_options
def unban(subjects: tuple[str, ...], asked: Asked) -> int:
    """Lift bans: by their id, or by whom they shut out."""
    from .remote import connect

    with connect(asked) as remote:
        held = {str(each.get("value")): str(each.get("id") or "") for each in remote.get("/v1/bans")["bans"]}

        def lift(subject: str) -> Any:
            value = subject if subject in held.values() else held.get(kind_of(subject)[1], subject)
            return remote.delete(f"/v1/bans/{quote(value, safe='')}")

        return each_in_turn(subjects, lift, "lifted")


@cert.command("rotate-cookies")
@click.option(
    "--keep", metavar="DURATION", default="24h", show_default=True, help="How long cookies made before are honoured."
)
@remote_options
def rotate_cookies(keep: str, asked: Asked) -> None:
    """Make sticky cookies with other keys from now on.

    Each calling service has a key of its own, which follows from one secret of the mesh. Sidecars that are connected
    have the new one within a second. Clients whose cookies are honoured no longer are given another version or
    endpoint; nothing fails.
    """
    from .remote import connect

    keep_s = int(parse_duration(keep, "--keep").total_seconds())
    with connect(asked) as remote:
        made = remote.post("/v1/cookies/rotate", {"keep_s": keep_s})
    note(f"rotated; cookies made before are honoured until {moment(made['honoured_until'])}")


def each_in_turn(names: Sequence[str], act: Callable[[str], Any], done: str) -> int:
    """The same for several; each that fails is told, and the others are done all the same."""
    from .remote import ApiError

    code = 0
    for name in names:
        try:
            act(name)
        except ApiError as error:
            if len(names) == 1:
                raise
            note(f"Error: {name}: {error.format_message()}")
            code = EXIT_FAILED
        else:
            note(f"{done}: {name}")
    return code
