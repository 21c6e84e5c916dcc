"""`pillion ca`: a certificate authority made of files, and the identities it issues.

Must know no X.509: it parses options, calls `certs`, and says what was written. Invariant: nothing that exists is
overwritten unless the verb's purpose is to replace it (`issue` into the same identity, `renew`).
"""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import click
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from certs.authority import LEAF_TTL, IssueError, certificate_pem, create_root, key_pem, new_key
from certs.files import (
    BUNDLE,
    CERT,
    ISSUING_CERT,
    ISSUING_KEY,
    KEY,
    ROOT_CERT,
    ROOT_KEY,
    TRUST_DOMAIN,
    IdentityError,
    load_ca,
    load_identity,
    load_root,
    read_bundle,
    read_chain,
    write_atomic,
    write_ca,
    write_identity,
    write_issuing,
)
from certs.spiffe import SpiffeError, SpiffeId, check_service_name, check_trust_domain
from certs.svid import fingerprint, validity_of

from .durations import parse_duration

CA_DIRECTORY = Path("pillion-ca")
IDENTITIES = Path("identities")
EXPIRES_SOON = timedelta(days=30)


def _duration(ctx: click.Context, param: click.Parameter, value: str) -> timedelta:
    return parse_duration(value)


def _checked(check: Callable[[str], str]) -> Callable[[click.Context, click.Parameter, str], str]:
    """A callback for a text that a function of `certs` must accept."""

    def callback(ctx: click.Context, param: click.Parameter, value: str) -> str:
        try:
            return check(value)
        except SpiffeError as error:
            raise click.BadParameter(str(error)) from None

    return callback


F = TypeVar("F", bound=Callable[..., object])


def _directory_option(default: Path, text: str) -> Callable[[F], F]:
    return click.option(
        "--dir",
        "directory",
        type=click.Path(path_type=Path),
        default=default,
        show_default=f"./{default}",
        envvar="PILLION_CA_DIR",
        show_envvar=True,
        help=text,
    )


@click.group()
def ca() -> None:
    """Make a certificate authority and issue identities from it.

    A service's identity is a certificate with a SPIFFE ID, spiffe://TRUST-DOMAIN/service/NAME. Keep the directory of
    the authority on one machine; give each service its own identity directory only.
    """


@ca.command()
@_directory_option(CA_DIRECTORY, "Where to write the authority.")
@click.option(
    "--trust-domain",
    metavar="NAME",
    callback=_checked(check_trust_domain),
    default="mesh.local",
    show_default=True,
    help="The name of the mesh; every identity begins with it.",
)
def init(directory: Path, trust_domain: str) -> None:
    """Make a root and an issuing authority."""
    now = _now()
    root = create_root(trust_domain, now)
    issuing = root.issue_authority(now)
    try:
        write_ca(directory, root, issuing)
    except FileExistsError:
        raise click.ClickException(
            f"{directory} is already there, and a new root would cut off every service that trusts the old one. "
            "Choose another --dir, or remove that directory first if it is of no more use."
        ) from None
    except OSError as error:
        raise _cannot_write(directory, error) from None
    click.echo(f"trust domain  {trust_domain}")
    _print_authority("root", root.certificate, directory / ROOT_CERT)
    _print_authority("issuing", issuing.certificate, directory / ISSUING_CERT)
    click.echo(f"bundle        {directory / 'bundle.pem'}")
    click.echo(
        f"{directory / ROOT_KEY} is needed only for `pillion ca renew` and `pillion ca replica`: "
        "keep it offline if you can.\n"
        f"Next: pillion ca issue --service NAME{_dir_hint(directory)}",
        err=True,
    )


@ca.command()
@click.option(
    "--service",
    required=True,
    metavar="NAME",
    callback=_checked(check_service_name),
    help="The service that is to be identified.",
)
@_directory_option(CA_DIRECTORY, "The authority.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=None,
    show_default=f"./{IDENTITIES}/SERVICE",
    help="Where to write the identity; one that is there is replaced.",
)
@click.option(
    "--ttl",
    metavar="DURATION",
    callback=_duration,
    default=f"{int(LEAF_TTL / timedelta(hours=1))}h",
    show_default=True,
    help="How long the certificate is valid.",
)
def issue(service: str, directory: Path, out: Path | None, ttl: timedelta) -> None:
    """Issue an identity for a service.

    Writes cert.pem, key.pem and bundle.pem.
    """
    out = out or IDENTITIES / service
    now = _now()
    try:
        authority = load_ca(directory)
        spiffe_id = SpiffeId.for_service(authority.trust_domain, service)
        key = new_key()
        leaf = authority.issuing.issue_to_key(key.public_key(), spiffe_id, ttl, now)
    except IdentityError as error:
        raise click.ClickException(str(error)) from None
    except IssueError as error:
        hint = f"; run: pillion ca renew{_dir_hint(directory)}" if "expired" in str(error) else ""
        raise click.ClickException(f"{error}{hint}") from None
    _refuse_to_replace_another(out, spiffe_id)
    try:
        write_identity(out, [leaf, *authority.issuing.chain], key, authority.bundle)
    except OSError as error:
        raise _cannot_write(out, error) from None
    not_after = validity_of(leaf).not_after
    click.echo(f"identity      {spiffe_id}")
    click.echo(f"expires       {_moment(not_after)} ({_span(not_after - now)} from now)")
    click.echo(f"fingerprint   {_fingerprint(leaf)}")
    click.echo(f"written       {out / CERT}  {out / KEY}  {out / 'bundle.pem'}")
    if not_after < now + ttl:
        click.echo(
            f"Shorter than asked: the issuing authority itself ends then. Renew it: pillion ca renew"
            f"{_dir_hint(directory)}",
            err=True,
        )


def _refuse_to_replace_another(out: Path, spiffe_id: SpiffeId) -> None:
    """Issuing `web` into the directory of `reviews` is a slip that would take `reviews` down."""
    try:
        leaf = read_chain(out / CERT)[0]
        held = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (IdentityError, x509.ExtensionNotFound, ValueError):
        return  # nothing there, or nothing usable
    uris = held.get_values_for_type(x509.UniformResourceIdentifier)
    if uris != [str(spiffe_id)]:
        raise click.ClickException(
            f"{out} holds the identity {', '.join(uris)}; choose another --out for {spiffe_id}, or remove it first"
        )


@ca.command()
@_directory_option(CA_DIRECTORY, "The authority.")
def renew(directory: Path) -> None:
    """Replace the issuing authority.

    The new one is under the same root, so identities that exist stay valid.
    """
    try:
        issuing = load_root(directory).issue_authority(_now())
        write_atomic(directory / ISSUING_KEY, key_pem(issuing.key), 0o600)
        write_atomic(directory / ISSUING_CERT, certificate_pem(issuing.chain), 0o644)
    except (IdentityError, IssueError) as error:
        raise click.ClickException(str(error)) from None
    except OSError as error:
        raise _cannot_write(directory, error) from None
    _print_authority("issuing", issuing.certificate, directory / ISSUING_CERT)


@ca.command()
@_directory_option(CA_DIRECTORY, "The authority, with its root's key.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="Where to write the new one; carry it to the replica's machine.",
)
def replica(directory: Path, out: Path) -> None:
    """Make an issuing authority for a further control plane.

    It is under the same root, whose key it does not hold: pillion control-plane --ca DIR takes it. Each replica needs
    its own, and what one issues is trusted in the whole mesh.
    """
    if directory.is_dir() and not (directory / ROOT_KEY).exists():
        raise click.ClickException(
            f"{directory} does not hold the root's key ({ROOT_KEY}): do this where the authority was made, "
            "or bring the key back for it"
        )
    try:
        root = load_root(directory)
        bundle = read_bundle(directory / BUNDLE, root.trust_domain)
        issuing = root.issue_authority(_now())
        write_issuing(out, root.certificate, issuing, bundle)
    except FileExistsError:
        raise click.ClickException(
            f"{out} is already there; choose another --out, or remove that directory first if it is of no more use"
        ) from None
    except (IdentityError, IssueError) as error:
        raise click.ClickException(str(error)) from None
    except OSError as error:
        raise _cannot_write(out, error) from None
    _print_authority("issuing", issuing.certificate, out / ISSUING_CERT)
    click.echo(f"root          {_fingerprint(root.certificate)}")
    click.echo(
        f"{out / ISSUING_KEY} is a secret of that replica alone: carry it there safely, and keep no copy.\n"
        f"Next: there, pillion control-plane --ca {out.name} --store etcd://…",
        err=True,
    )


@ca.command()
@click.argument("directory", type=click.Path(path_type=Path), default=CA_DIRECTORY)
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
def show(directory: Path, output: str) -> int:
    """Show an authority or an identity.

    What it is, how long it is valid, and its fingerprints. DIRECTORY is that of an authority or of an identity
    [default: ./pillion-ca]. Exits with 1 where it cannot be used.
    """
    now = _now()
    try:
        if (directory / TRUST_DOMAIN).exists() or not (directory / CERT).exists():
            facts = _describe_authority(directory)
        else:
            facts = _describe_identity(directory)
    except IdentityError as error:
        raise click.ClickException(str(error)) from None
    if output == "json":
        click.echo(json.dumps(facts, indent=2))
    else:
        _print_table(facts)
    return _report_expiry(facts["certificates"], now)


def _describe_authority(directory: Path) -> dict[str, Any]:
    files = load_ca(directory)
    kept = (directory / ROOT_KEY).exists()
    return {
        "kind": "authority",
        "directory": str(directory),
        "trust_domain": files.trust_domain,
        "root_key_here": kept,
        "certificates": [
            *(_describe("issuing", certificate) for certificate in files.issuing.chain),
            *(_describe("root", x509.load_der_x509_certificate(root.der)) for root in files.bundle.roots),
        ],
    }


def _describe_identity(directory: Path) -> dict[str, Any]:
    chain = read_chain(directory / CERT)
    # Judged at its own beginning: an expired identity is shown too, and said to be expired.
    identity = load_identity(directory, max(validity_of(certificate).not_before for certificate in chain))
    return {
        "kind": "identity",
        "directory": str(directory),
        "trust_domain": identity.trust_domain,
        "spiffe_id": str(identity.spiffe_id),
        "certificates": [
            _describe("leaf", chain[0]),
            *(_describe("issuing", certificate) for certificate in chain[1:]),
            *(_describe("root", x509.load_der_x509_certificate(root.der)) for root in identity.bundle.roots),
        ],
    }


def _describe(role: str, certificate: x509.Certificate) -> dict[str, Any]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    validity = validity_of(certificate)
    return {
        "role": role,
        "id": ", ".join(names.get_values_for_type(x509.UniformResourceIdentifier)),
        "not_before": _moment(validity.not_before),
        "not_after": _moment(validity.not_after),
        "serial": f"{certificate.serial_number:x}",
        "fingerprint_sha256": _fingerprint(certificate),
    }


def _print_table(facts: dict[str, Any]) -> None:
    click.echo(f"{facts['kind']:<14}{facts['directory']}")
    click.echo(f"trust domain  {facts['trust_domain']}")
    if facts["kind"] == "authority":
        where = (
            "here (needed only for `pillion ca renew` and `pillion ca replica`)"
            if facts["root_key_here"]
            else "not here"
        )
        click.echo(f"root key      {where}")
    for certificate in facts["certificates"]:
        click.echo(f"{certificate['role']:<14}{certificate['id']}")
        click.echo(f"  valid       {certificate['not_before']} to {certificate['not_after']}")
        click.echo(f"  fingerprint {certificate['fingerprint_sha256']}")


def _report_expiry(certificates: list[dict[str, Any]], now: datetime) -> int:
    code = 0
    for certificate in certificates:
        left = datetime.fromisoformat(certificate["not_after"]) - now
        if left < timedelta(0):
            code = 1
            click.echo(f"The {certificate['role']} certificate expired {_span(-left)} ago.", err=True)
        elif certificate["role"] != "leaf" and left < EXPIRES_SOON:
            click.echo(f"The {certificate['role']} certificate expires in {_span(left)}.", err=True)
    return code


def _print_authority(role: str, certificate: x509.Certificate, path: Path) -> None:
    click.echo(f"{role:<14}{path}, until {_moment(validity_of(certificate).not_after)}")
    click.echo(f"  fingerprint {_fingerprint(certificate)}")


def _fingerprint(certificate: x509.Certificate) -> str:
    return fingerprint(certificate.public_bytes(Encoding.DER))


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def _moment(when: datetime) -> str:
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")


def _span(length: timedelta) -> str:
    seconds = int(length.total_seconds())
    for unit, name in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= 2 * unit:
            return f"{seconds // unit}{name}"
    return f"{seconds}s"


def _dir_hint(directory: Path) -> str:
    return "" if directory == CA_DIRECTORY else f" --dir {directory}"


def _cannot_write(path: Path, error: OSError) -> click.ClickException:
    return click.ClickException(f"cannot write {error.filename or path}: {error.strerror}")
