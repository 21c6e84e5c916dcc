"""Authorization: what each level of a policy says, stacked and not merged.

Denies and allows of all levels add up (docs/policy.md, Authorization), so a level is kept whole, with the names and
places of its rules. Must not decide anything: sidecar.policy.authz does.
"""

from collections.abc import Collection, Iterable
from typing import Any

from .kinds import RESET, Block, Ref
from .problems import Sink
from .snapshot import AuthzLevel, Level, Rule, ValueMatch


def authz_level(level: Level, block: Block | None, prefix: str) -> AuthzLevel | None:
    """What the `authz` of one level's block says; None where it says nothing. `prefix` names it in rules."""
    stated = block.stated("authz") if block is not None else None
    if stated is None or not stated.value.fields:
        return None
    authz: Block = stated.value
    allow = authz.get("allow")
    return AuthzLevel(
        level=level,
        allow=None if allow is None else _rules(allow, f"{prefix}authz.allow"),
        deny=_rules(authz.get("deny") or (), f"{prefix}authz.deny"),
        default=_closest(authz, "default", "mesh"),
        mode=_closest(authz, "mode", "enforce"),
        source=stated.key.source,
    )


def _closest(authz: Block, key: str, built_in: str) -> str | None:
    """Null is a statement: it puts the built-in over the levels below."""
    stated = authz.fields.get(key)
    return None if stated is None else built_in if stated.value is RESET else stated.value


def _rules(blocks: Iterable[Block], prefix: str) -> tuple[Rule, ...]:
    return tuple(_rule(block, f"{prefix}[{index}]") for index, block in enumerate(blocks))


def _rule(block: Block, name: str) -> Rule:
    callers = block.get("from")
    methods = block.get("methods")
    return Rule(
        name=name,
        callers=None if callers is None else tuple(ref.name for ref in callers),
        methods=None if methods is None else frozenset(methods),
        paths=block.get("paths"),
        headers=value_matches(block.get("headers")),
        message=block.get("message"),
        source=block.node.source,
    )


def value_matches(stated: Any) -> tuple[tuple[str, ValueMatch], ...]:
    """By name, so that the order in the file makes no difference."""
    return tuple(sorted(((name, each.value) for name, each in (stated or {}).items()), key=lambda pair: pair[0]))


def check_callers(block: Block | None, services: Collection[str], sink: Sink) -> None:
    """Warns of each rule of a level that names a service the policy does not know."""
    authz = block.get("authz") if block is not None else None
    if authz is None:
        return
    for key in ("allow", "deny"):
        for rule in authz.get(key) or ():
            check_refs(rule.get("from") or (), services, sink)


def check_refs(callers: Iterable[Ref], services: Collection[str], sink: Sink) -> None:
    for ref in callers:
        if ref.name not in services and not ref.name.startswith("spiffe:"):
            sink.warning(
                "P0307",
                f'the caller "{ref.name}" is no service of this policy',
                ref.node,
                help=sink.suggest(ref.name, services) or f"declare it under services, be it as `{ref.name}: {{}}`",
            )
