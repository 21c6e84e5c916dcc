"""One nftables ruleset as text: what is captured, what is left alone, and how we know the table for our own.

Pure: `InterceptConfig` in, text for `nft -f -` out; it runs nothing and reads nothing. Invariants: equal configurations
render byte for byte the same; everything happens in the one table `inet pillion`, replaced in a single transaction;
the sidecar's own connections (its mark, its user) are never captured; no value reaches the text unchecked.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_network

FAMILY = "inet"
TABLE = "pillion"
VERSION = 1
"""Of the ruleset's shape. Raised when the rules change, so that an upgraded sidecar replaces what an old one left."""

MARK = 0x70696C
"""Firewall mark of the sidecar's own sockets ("pil"): SO_MARK there, `meta mark` here."""

OUTBOUND_PORT = 15001
INBOUND_PORT = 15006
DNS_PORT = 53

APP_PORTS_MAX = 1024
IDS_MAX = 256
CIDRS_MAX = 4096
OUTPUT, PREROUTING, MARKER = "output", "prerouting", "marker"

# Before the usual dstnat (-100): the sidecar must see the destination that the application named, not one that another
# NAT (Docker, kube-proxy) has already turned into an address of its own. The sidecar's own connections still meet it.
_PRIORITY = -110

# Link-local destinations cannot be dialled again: SO_ORIGINAL_DST does not tell the interface.
_LINK_LOCAL_6 = IPv6Network("fe80::/10")

_OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,47}")
_MARKER = re.compile(
    r"pillion owner=(?P<owner>[A-Za-z0-9._-]{1,48}) version=(?P<version>\d{1,6})"
    r" strict=(?P<strict>[01]) rules=(?P<rules>\d{1,3}) digest=(?P<digest>[0-9a-f]{16})"
)


class ConfigError(ValueError):
    """A configuration that no ruleset can be made of; the text says which value and what to do."""


def _sorted(values: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(set(values)))


@dataclass(frozen=True, slots=True, kw_only=True)
class InterceptConfig:
    """What to capture. Tuples may come in any order and with repetitions: they are kept sorted and without.

    `app_ports` are captured inbound (none: nothing is); `excluded_*` is left alone outbound. `mark` is that of the
    sidecar's own sockets. `strict` makes no rule: it is kept in the marker, for the sidecar and for `show`.
    """

    outbound_port: int = OUTBOUND_PORT
    inbound_port: int = INBOUND_PORT
    app_ports: tuple[int, ...] = ()
    excluded_uids: tuple[int, ...] = ()
    excluded_gids: tuple[int, ...] = ()
    excluded_cidrs: tuple[str, ...] = ()
    excluded_ports: tuple[int, ...] = ()
    mark: int = MARK
    owner: str = TABLE
    strict: bool = False

    def __post_init__(self) -> None:
        for name in ("app_ports", "excluded_uids", "excluded_gids", "excluded_ports"):
            object.__setattr__(self, name, _sorted(getattr(self, name)))
        object.__setattr__(self, "excluded_cidrs", tuple(str(network) for network in _networks(self.excluded_cidrs)))
        for name in ("outbound_port", "inbound_port"):
            _check_port(name, getattr(self, name))
        for name in ("app_ports", "excluded_ports"):
            for port in _bounded(name, getattr(self, name), APP_PORTS_MAX):
                _check_port(name, port)
        for name in ("excluded_uids", "excluded_gids"):
            for number in _bounded(name, getattr(self, name), IDS_MAX):
                if not 0 <= number < 0xFFFFFFFF:
                    raise ConfigError(f"{name}: {number} is not a numeric id (0 to 4294967294)")
        if not 0 < self.mark <= 0xFFFFFFFF:
            raise ConfigError(f"mark: {self.mark:#x} is not between 0x1 and 0xffffffff (0 is every unmarked packet)")
        if not _OWNER.fullmatch(self.owner):
            raise ConfigError(f"owner: {self.owner!r} is not a name of at most 48 letters, digits, '.', '_' and '-'")
        if self.outbound_port == self.inbound_port:
            raise ConfigError(f"outbound_port and inbound_port are both {self.inbound_port}: they must differ")
        for port in self.app_ports:
            if port in (self.outbound_port, self.inbound_port):
                raise ConfigError(f"app_ports: {port} is the sidecar's own port: capturing it would be a loop")


@dataclass(frozen=True, slots=True)
class Marker:
    """What the table says of itself: `rules` is their number, `digest` stands for the whole configuration."""

    owner: str
    version: int
    strict: bool
    rules: int
    digest: str

    def __str__(self) -> str:
        # nftables keeps at most 128 bytes of comment; this is 120 at its longest.
        return (
            f"pillion owner={self.owner} version={self.version} strict={int(self.strict)} rules={self.rules}"
            f" digest={self.digest}"
        )


def parse_marker(comment: str) -> Marker | None:
    """The marker in a rule's comment; None if the comment is not ours."""
    match = _MARKER.fullmatch(comment)
    if match is None:
        return None
    return Marker(match["owner"], int(match["version"]), match["strict"] == "1", int(match["rules"]), match["digest"])


def marker(config: InterceptConfig) -> Marker:
    """What the table made of `config` says of itself."""
    text = "\n".join([config.owner, str(VERSION), str(config.strict), *_body(config)])
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Marker(config.owner, VERSION, config.strict, sum(shape(config).values()), digest)


def shape(config: InterceptConfig) -> dict[str, int]:
    """Chain -> number of rules, as the kernel must list them: tells a table that somebody has edited."""
    return {MARKER: 1} | {name: len(rules) for name, (_, rules) in _chains(config).items()}


def render(config: InterceptConfig) -> str:
    """The transaction that puts the ruleset in place, whatever was there before.

    An empty declaration first: deleting a table that does not exist would fail the transaction.
    """
    lines = [f"table {FAMILY} {TABLE} {{", "}", f"delete table {FAMILY} {TABLE}", f"table {FAMILY} {TABLE} {{"]
    # Never jumped to: it carries the marker. (A table's own comment needs a newer nft, and its JSON lacks it.)
    lines += [f"\tchain {MARKER} {{", f'\t\treturn comment "{marker(config)}"', "\t}"]
    return "\n".join([*lines, *_body(config), "}", ""])


def render_removal() -> str:
    """The transaction that removes the table, also where there is none."""
    return f"table {FAMILY} {TABLE} {{\n}}\ndelete table {FAMILY} {TABLE}\n"


def _body(config: InterceptConfig) -> list[str]:
    lines = []
    for name, (kind, elements) in _sets(config).items():
        lines += [f"\tset {name} {{", f"\t\ttype {kind}", "\t\tflags interval"]
        lines += [f"\t\telements = {{ {', '.join(elements)} }}", "\t}"]
    for name, (hook, rules) in _chains(config).items():
        lines += [f"\tchain {name} {{", f"\t\t{hook}", *(f"\t\t{rule}" for rule in rules), "\t}"]
    return lines


def _chains(config: InterceptConfig) -> dict[str, tuple[str, tuple[str, ...]]]:
    chains = {OUTPUT: (f"type nat hook output priority {_PRIORITY}; policy accept;", _output(config))}
    if config.app_ports:
        hook = f"type nat hook prerouting priority {_PRIORITY}; policy accept;"
        chains[PREROUTING] = (hook, _prerouting(config))
    return chains


# Only a real SYN begins a connection. One that is older than the table may reach a nat chain too (conntrack picks it up
# in mid-stream); redirecting that packet would break it.
_ONLY_NEW = ("meta l4proto != tcp return", "tcp flags & (fin | syn | rst | ack) != syn return")


def _output(config: InterceptConfig) -> tuple[str, ...]:
    rules = [*_ONLY_NEW, f"meta mark {config.mark:#010x} return"]
    if config.excluded_uids:
        rules.append(f"meta skuid {_set(config.excluded_uids)} return")
    if config.excluded_gids:
        rules.append(f"meta skgid {_set(config.excluded_gids)} return")
    # Loopback and the machine's own addresses: such traffic never leaves it.
    rules.append("fib daddr type local return")
    rules.append(f"tcp dport {_set(_sorted((DNS_PORT, *config.excluded_ports)))} return")
    sets = _sets(config)
    if "excluded4" in sets:
        rules.append("ip daddr @excluded4 return")
    rules.append("ip6 daddr @excluded6 return")
    rules.append(f"meta l4proto tcp counter redirect to :{config.outbound_port}")
    return tuple(rules)


def _prerouting(config: InterceptConfig) -> tuple[str, ...]:
    return (
        *_ONLY_NEW,
        'iifname "lo" return',
        f"meta mark {config.mark:#010x} return",
        # Addressed to this machine: what it merely forwards is not its application's.
        f"fib daddr type local tcp dport {_set(config.app_ports)} counter redirect to :{config.inbound_port}",
    )


def _sets(config: InterceptConfig) -> dict[str, tuple[str, tuple[str, ...]]]:
    networks = _networks((*config.excluded_cidrs, str(_LINK_LOCAL_6)))
    sets = {}
    four = tuple(str(network) for network in networks if network.version == 4)
    if four:
        sets["excluded4"] = ("ipv4_addr", four)
    sets["excluded6"] = ("ipv6_addr", tuple(str(network) for network in networks if network.version == 6))
    return sets


def _set(values: Iterable[int]) -> str:
    return "{ " + ", ".join(map(str, values)) + " }"


def _bounded(name: str, values: tuple[int, ...], most: int) -> tuple[int, ...]:
    if len(values) > most:
        raise ConfigError(f"{name}: {len(values)} values; at most {most} are accepted")
    return values


def _check_port(name: str, port: int) -> None:
    if not 0 < port < 65536:
        raise ConfigError(f"{name}: {port} is not a port (1 to 65535)")


def _networks(cidrs: tuple[str, ...]) -> tuple[IPv4Network | IPv6Network, ...]:
    """Sorted and merged: the kernel refuses intervals that overlap."""
    if len(cidrs) > CIDRS_MAX:
        raise ConfigError(f"excluded_cidrs: {len(cidrs)} values; at most {CIDRS_MAX} are accepted")
    four: list[IPv4Network] = []
    six: list[IPv6Network] = []
    for cidr in cidrs:
        if "%" in cidr:  # ipaddress takes any text at all for a zone, and prints it again
            raise ConfigError(f"excluded_cidrs: {cidr!r} names a zone, which a rule cannot")
        try:
            network = ip_network(cidr)
        except ValueError as problem:
            raise ConfigError(f"excluded_cidrs: {problem} (write it like 10.0.0.0/8 or fd00::/8)") from None
        if isinstance(network, IPv4Network):
            four.append(network)
        else:
            six.append(network)
    return (*collapse_addresses(four), *collapse_addresses(six))
