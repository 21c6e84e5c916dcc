"""`pillion explain` and `pillion can`: as the mesh has it now.

The policy that they judge by is the control plane's, at one revision; with -f it is that of files, as
`pillion policy explain` and `pillion policy can` have it. Must not decide anything: policy_explain does.
"""

from pathlib import Path
from typing import Any

import click

from sidecar.model.snapshot import Snapshot

from .policy_explain import answer_can, can_options, explain_options, explain_service
from .policy_files import files_option
from .target import Asked, remote_options

USUAL_TRUST_DOMAIN = "mesh.local"


@click.command()
@explain_options
@files_option
@remote_options
def explain(
    service: str, route_name: str | None, caller: str | None, files: tuple[Path, ...], output: str, asked: Asked
) -> None:
    """Show where every effective value of a service comes from, and what it overrode.

    By what the control plane has; with -f by policy files, without asking anybody.
    """
    snapshot, _ = _snapshot(files, asked)
    explain_service(snapshot, service, route_name, caller, output)


@click.command()
@can_options
@click.option("--trust-domain", help="The trust domain of service names.  [default: the mesh's own]")
@files_option
@remote_options
def can(files: tuple[Path, ...], asked: Asked, trust_domain: str | None, **options: Any) -> int:
    """Say whether SRC may call DST, and which rule decides. SRC is a service or a SPIFFE ID.

    Ends with 0 if allowed, 1 if denied. By what the control plane has; with -f by policy files, without asking anybody.
    """
    snapshot, own = _snapshot(files, asked)
    return answer_can(snapshot, trust_domain=trust_domain or own, **options)


def _snapshot(files: tuple[Path, ...], asked: Asked) -> tuple[Snapshot, str]:
    """The policy, and the trust domain that it is for."""
    if files:
        from .policy_files import load

        return load(files), USUAL_TRUST_DOMAIN
    from sidecar.model.canonical import SnapshotError, snapshot_from_json

    from .remote import connect

    with connect(asked) as remote:
        data = remote.get("/v1/policy/snapshot")
        try:
            return snapshot_from_json(data.get("snapshot", data)), remote.target.trust_domain
        except SnapshotError as error:
            raise click.ClickException(
                f"the control plane's policy is not understood ({error}); is its version newer than this one's?"
            ) from None
