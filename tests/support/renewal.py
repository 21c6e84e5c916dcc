"""A new certificate for a running sidecar, in force when this returns."""

import signal

from certs.files import write_identity
from support.mesh import Sidecar, until


def renew(sidecar: Sidecar) -> None:
    """By the same authority, for the same service."""
    pki = sidecar.mesh.pki
    leaf = pki.leaf(sidecar.name)
    before = sidecar.log.count("identity renewed")
    write_identity(sidecar.identity, leaf.chain, leaf.key, pki.bundle)  # type: ignore[arg-type]
    sidecar.process.send_signal(signal.SIGHUP)
    until(lambda: sidecar.log.count("identity renewed") > before, "the new certificate")
