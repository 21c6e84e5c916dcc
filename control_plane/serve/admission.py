"""May this control plane serve this mesh? The first one founds it; a further one must be of its root.

Must not know what is served afterwards. Invariant: nothing in the store is changed by a control plane that is refused.
"""

from dataclasses import replace

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from certs.authority import certificate_pem
from certs.files import CaFiles
from certs.svid import fingerprint
from control_plane.state.mirror import State
from control_plane.state.records import ISSUERS, META, REPLICAS, ROOTS, Issuer, Meta, Root, encode
from control_plane.store.base import Compare, Conflict, Operation, Put, Store


class AdmissionError(Exception):
    """This control plane must not serve this store; the text says why and what to do."""


def own_roots(authority: CaFiles) -> dict[str, Root]:
    """The records of the roots that we know from our own authority, by key."""
    return {
        ROOTS + root.fingerprint: Root(certificate_pem([x509.load_der_x509_certificate(root.der)]).decode(), 0.0)
        for root in authority.bundle.roots
    }


async def admit(store: Store, authority: CaFiles, name: str, now: float, mesh_id: str, mesh_address: str = "") -> None:
    """Found the mesh, or enter our issuing certificate in it. Raises AdmissionError, StoreError."""
    state = State(own_roots(authority))
    state.load(await store.read())
    meta = state.meta
    if meta is None:
        problem = state.problems.get(META)
        if problem is not None:
            raise AdmissionError(
                f'{store.description}: the record "{META}", which says what mesh this is, cannot be read: {problem}. '
                "Restore a backup, or run the version of pillion that wrote it"
            )
        if state.revision and any(True for _ in state):
            raise AdmissionError(
                f'{store.description} holds records of a mesh, but not "{META}", which says what mesh it is. '
                "Restore a backup, or point --store at an empty one"
            )
        await _found(store, authority, name, now, mesh_id)
        return
    if meta.trust_domain != authority.trust_domain:
        raise AdmissionError(
            f"{store.description} holds the mesh {meta.trust_domain}, but this control plane's authority is of "
            f"{authority.trust_domain}: name the right one with --ca, or another store with --store"
        )
    roots = {fingerprint(der) for der in (root.der for root in authority.bundle.roots)}
    known = state.table(ROOTS)
    if not roots & known.keys():
        raise AdmissionError(
            f"this control plane's authority has the root {_short(roots)}, but the mesh in {store.description} trusts "
            f"{_short(known)}: no sidecar would accept what it issues. Make an authority for a further replica with "
            "`pillion ca replica` where the mesh's root key is, and name it with --ca"
        )
    running = state.get(REPLICAS, name)
    if running is not None and mesh_address and running.mesh != mesh_address:
        raise AdmissionError(
            f"a control plane named {name} runs already, at {running.mesh}: give this one another name with --name "
            "(where that one has just ended, try again in a quarter of a minute)"
        )
    own = _issuer(authority)
    if own not in state.table(ISSUERS):
        await store.commit([_put_issuer(authority, name, now)])


async def _found(store: Store, authority: CaFiles, name: str, now: float, mesh_id: str) -> None:
    operations: list[Operation] = [Put(META, encode(Meta(mesh_id, authority.trust_domain, now)))]
    operations += [Put(key, encode(replace(root, added=now))) for key, root in own_roots(authority).items()]
    operations.append(_put_issuer(authority, name, now))
    try:
        await store.commit(operations, [Compare(META, 0)])
    except Conflict:  # another one was quicker: then we are a further one
        await admit(store, authority, name, now, mesh_id)


def _issuer(authority: CaFiles) -> str:
    return fingerprint(authority.issuing.certificate.public_bytes(Encoding.DER))


def _put_issuer(authority: CaFiles, name: str, now: float) -> Put:
    pem = certificate_pem(authority.issuing.chain).decode()
    return Put(ISSUERS + _issuer(authority), encode(Issuer(pem, name, now)))


def _short(fingerprints: object) -> str:
    assert isinstance(fingerprints, set | dict)
    return ", ".join(sorted(each[:16] for each in fingerprints)) or "none"
