"""Who may do what: roles, teams, owners.

A viewer may read everything. An operator may also apply the policy of services that one of their teams owns, and let
sidecars join as these. An admin may do everything; only an admin may say who owns a service, or touch one that nobody
owns, `defaults` and `enforced`. Pure; must not know how somebody has proven who they are. Invariant: every refusal says
what would be needed.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from .records import DEFAULTS, ENFORCED

VIEWER, OPERATOR, ADMIN = "viewer", "operator", "admin"
_RANK = {VIEWER: 1, OPERATOR: 2, ADMIN: 3}

Owners = Collection[str]


@dataclass(frozen=True, slots=True)
class Who:
    """An operator who has proven to be that. `token`: the id of the token that gives these rights."""

    name: str
    role: str
    teams: tuple[str, ...] = ()
    token: str = ""

    @property
    def rank(self) -> int:
        return _RANK.get(self.role, 0)


def lacks_role(who: Who, role: str, to: str) -> str | None:
    """Why not; None: they may."""
    if who.rank >= _RANK[role]:
        return None
    return f"{who.name} is {_article(who.role)}; {to} needs {_article(role)}"


def may_join_as(who: Who, service: str, owners: Owners) -> str | None:
    """Make or revoke tokens by which sidecars join as a service."""
    return lacks_role(who, OPERATOR, f"tokens for {service}") or _owns(who, f"tokens for {service}", owners)


def may_apply(who: Who, document: str, before: Owners | None, after: Owners | None) -> str | None:
    """Replace a document (`defaults`, `enforced`, `services/NAME`). `before` and `after`: the owners that it states;
    None: there is no such document."""
    if who.rank >= _RANK[ADMIN]:
        return None
    refusal = lacks_role(who, OPERATOR, f"changing {document}")
    if refusal is not None:
        return refusal
    if document in (DEFAULTS.removeprefix("policy/"), ENFORCED.removeprefix("policy/")):
        return f"{document} holds for every service: changing it needs an admin, {who.name} is an operator"
    name = document.removeprefix("services/")
    if before is None:
        return f"{name} has no policy yet, so nobody owns it: adding it needs an admin, {who.name} is an operator"
    refusal = _owns(who, name, before)
    if refusal is not None:
        return refusal
    if after is None:
        return f"removing {name} takes its owners away, which needs an admin; {who.name} is an operator"
    if set(after) != set(before):
        return (
            f"the owners of {name} change from {_listed(before)} to {_listed(after)}, which needs an admin; "
            f"{who.name} is an operator"
        )
    return None


def may_revoke(who: Who, kind: str, service: str, owners_of: Callable[[str], Owners], own: bool) -> str | None:
    """Delete a token. `own`: it is the one by which they are here."""
    if own or who.rank >= _RANK[ADMIN]:
        return None
    if kind == "join":
        return may_join_as(who, service, owners_of(service))
    return f"revoking the token of an operator needs an admin; {who.name} is {_article(who.role)}"


def _owns(who: Who, what: str, owners: Owners) -> str | None:
    if who.rank >= _RANK[ADMIN] or not set(owners).isdisjoint(who.teams):
        return None
    teams = f"is of {_listed(who.teams)}" if who.teams else "is of no team"
    if not owners:
        return f"{what}: no team owns the service, so this needs an admin; {who.name} is an operator"
    return f"{what}: the service is owned by {_listed(owners)}; {who.name} {teams}"


def _article(role: str) -> str:
    return f"{'an' if role[:1] in 'aeiou' else 'a'} {role or 'unknown role'}"


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names)) or "nobody"
