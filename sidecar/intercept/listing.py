"""What the kernel holds under our table's name (from `nft -j list table`), and how that compares with what should be.

Pure: JSON text in, `Installed` out. Must not trust it: another program may have made the table, so everything that is
not shaped as ours reads as foreign or damaged, never as an exception but ValueError for what is no nft JSON at all.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from .ruleset import MARKER, OUTPUT, PREROUTING, InterceptConfig, Marker, marker, parse_marker, shape


class State(Enum):
    """The table in place, against a configuration."""

    ABSENT = "absent"
    CURRENT = "current"
    SUITABLE = "suitable"  # ours, for another configuration that leads to the same ports and captures what is needed
    STALE = "stale"  # ours, for another configuration or by another version
    DAMAGED = "damaged"  # ours, but edited since: chains or rules are missing or added
    OTHER_OWNER = "other owner"  # made by pillion for somebody else
    FOREIGN = "foreign"  # not made by pillion

    @property
    def replaceable(self) -> bool:
        """Whether the table may be replaced or removed without being forced."""
        return self not in (State.OTHER_OWNER, State.FOREIGN)


@dataclass(frozen=True, slots=True)
class Redirect:
    """One redirecting rule. `connections` counts since the table was last replaced."""

    chain: str
    to_port: int
    ports: tuple[int, ...]  # empty: every port
    connections: int


@dataclass(frozen=True, slots=True)
class Installed:
    """`shape` maps chain to number of rules; `hooked` are the chains that the kernel calls."""

    marker: Marker | None
    shape: dict[str, int]
    hooked: frozenset[str]
    redirects: tuple[Redirect, ...] = ()
    empty: bool = False  # the bare table: it captures nothing and belongs to nobody
    raw: dict[str, object] = field(default_factory=dict, compare=False)

    def redirect(self, chain: str) -> Redirect | None:
        return next((redirect for redirect in self.redirects if redirect.chain == chain), None)


def parse_listing(text: str) -> Installed:
    """ValueError where the text is not what `nft -j` prints."""
    document = json.loads(text)
    entries = document.get("nftables") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise ValueError("no list under 'nftables'")
    found: Marker | None = None
    counts: dict[str, int] = {}
    hooked = set()
    redirects = []
    empty = True
    for kind, entry in _entries(entries):
        empty = empty and kind in ("metainfo", "table")
        if kind == "chain":
            counts.setdefault(_text(entry, "name"), 0)
            if entry.get("type") == "nat" and entry.get("hook") == entry.get("name"):
                hooked.add(_text(entry, "name"))
        elif kind == "rule":
            chain = _text(entry, "chain")
            counts[chain] = counts.get(chain, 0) + 1
            if chain == MARKER:
                found = found or parse_marker(_text(entry, "comment"))
            redirect = _redirect(chain, entry.get("expr"))
            if redirect is not None:
                redirects.append(redirect)
    return Installed(found, counts, frozenset(hooked), tuple(redirects), empty, document)


def compare(installed: Installed | None, config: InterceptConfig) -> State:
    """How what is in place relates to what `config` asks for."""
    if installed is None:
        return State.ABSENT
    if installed.marker is None:
        return State.DAMAGED if installed.empty else State.FOREIGN
    wanted = marker(config)
    if installed.marker.owner != wanted.owner:
        return State.OTHER_OWNER
    if installed.marker.version != wanted.version:
        return State.STALE
    if not _whole(installed, installed.marker):
        return State.DAMAGED
    if installed.marker == wanted:
        whole = installed.shape == shape(config) and _serves(installed, config)
        return State.CURRENT if whole else State.DAMAGED
    return State.SUITABLE if _serves(installed, config) else State.STALE


def _whole(installed: Installed, marker: Marker) -> bool:
    """Whether nobody has added or taken rules, or unhooked a chain."""
    chains = frozenset(installed.shape)
    hooks_stand = installed.hooked == chains - {MARKER} and chains <= {MARKER, OUTPUT, PREROUTING}
    return hooks_stand and sum(installed.shape.values()) == marker.rules


def _serves(installed: Installed, config: InterceptConfig) -> bool:
    """Whether what is captured goes where a sidecar of this configuration listens."""
    outbound, inbound = installed.redirect(OUTPUT), installed.redirect(PREROUTING)
    if outbound is None or outbound.to_port != config.outbound_port:
        return False
    if inbound is None:
        return not config.app_ports
    return inbound.to_port == config.inbound_port and set(config.app_ports) <= set(inbound.ports)


def _entries(entries: list[object]) -> Iterator[tuple[str, dict[str, object]]]:
    for entry in entries:
        if isinstance(entry, dict):
            for kind, value in entry.items():
                if isinstance(value, dict):
                    yield kind, value


def _text(entry: dict[str, object], key: str) -> str:
    value = entry.get(key)
    return value if isinstance(value, str) else ""


def _redirect(chain: str, expressions: object) -> Redirect | None:
    if not isinstance(expressions, list):
        return None
    ports: tuple[int, ...] = ()
    packets = 0
    for expression in expressions:
        if not isinstance(expression, dict):
            continue
        match expression:
            case {"match": {"left": {"payload": {"protocol": "tcp", "field": "dport"}}, "right": right}}:
                ports = _ports(right)
            case {"counter": {"packets": int(count)}}:
                packets = count
            case {"redirect": {"port": int(port)}}:
                return Redirect(chain, port, ports, packets)
    return None


def _ports(right: object) -> tuple[int, ...]:
    match right:
        case int(port):
            return (port,)
        case {"set": list(members)}:
            return tuple(_expand(members))
    return ()


def _expand(members: list[object]) -> Iterator[int]:
    for member in members:
        match member:
            case int(port):
                yield port
            case {"range": [int(low), int(high)]} if high - low < 65536:
                yield from range(low, high + 1)
