"""The ruleset as text: what it holds, in which order, and what it refuses to be made of."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.intercept.ruleset import (
    MARK,
    ConfigError,
    InterceptConfig,
    Marker,
    marker,
    parse_marker,
    render,
    render_removal,
    shape,
)


def chain(text: str, name: str) -> list[str]:
    lines = [line.strip() for line in text.splitlines()]
    start = lines.index(f"chain {name} {{")
    return lines[start + 1 : lines.index("}", start)]


def test_the_transaction_replaces_one_table_of_our_own() -> None:
    text = render(InterceptConfig())
    assert text.startswith("table inet pillion {\n}\ndelete table inet pillion\ntable inet pillion {\n")
    tables = [line for line in text.splitlines() if not line.startswith(("\t", "}"))]
    assert tables == ["table inet pillion {", "delete table inet pillion", "table inet pillion {"]
    assert "flush ruleset" not in text
    assert render_removal() == "table inet pillion {\n}\ndelete table inet pillion\n"


def test_outbound_leaves_alone_before_it_redirects() -> None:
    config = InterceptConfig(
        outbound_port=9101,
        excluded_uids=(33, 7),
        excluded_gids=(5,),
        excluded_cidrs=("10.0.0.0/8", "fd00::/8"),
        excluded_ports=(22,),
    )
    assert chain(render(config), "output") == [
        "type nat hook output priority -110; policy accept;",
        "meta l4proto != tcp return",
        "tcp flags & (fin | syn | rst | ack) != syn return",
        "meta mark 0x0070696c return",
        "meta skuid { 7, 33 } return",
        "meta skgid { 5 } return",
        "fib daddr type local return",
        "tcp dport { 22, 53 } return",
        "ip daddr @excluded4 return",
        "ip6 daddr @excluded6 return",
        "meta l4proto tcp counter redirect to :9101",
    ]


def test_inbound_captures_the_declared_ports_only() -> None:
    assert chain(render(InterceptConfig(app_ports=(8000, 80))), "prerouting") == [
        "type nat hook prerouting priority -110; policy accept;",
        "meta l4proto != tcp return",
        "tcp flags & (fin | syn | rst | ack) != syn return",
        'iifname "lo" return',
        "meta mark 0x0070696c return",
        "fib daddr type local tcp dport { 80, 8000 } counter redirect to :15006",
    ]
    assert "prerouting" not in render(InterceptConfig())


def test_networks_are_merged_because_the_kernel_refuses_overlap() -> None:
    text = render(InterceptConfig(excluded_cidrs=("10.1.0.0/16", "10.0.0.0/8", "192.0.2.1", "fe80::1")))
    assert "elements = { 10.0.0.0/8, 192.0.2.1/32 }" in text
    assert "elements = { fe80::/10 }" in text


def test_order_and_repetition_do_not_matter() -> None:
    one = InterceptConfig(app_ports=(1, 2, 2), excluded_cidrs=("10.0.0.0/9", "10.128.0.0/9"))
    two = InterceptConfig(app_ports=(2, 1), excluded_cidrs=("10.0.0.0/8",))
    assert one == two and render(one) == render(two)


def test_the_shape_counts_the_rules_that_are_rendered() -> None:
    for uids, gids, cidrs, ports in itertools.product([(), (1,)], [(), (1,)], [(), ("10.0.0.0/8",)], [(), (80,)]):
        config = InterceptConfig(excluded_uids=uids, excluded_gids=gids, excluded_cidrs=cidrs, app_ports=ports)
        text = render(config)
        assert shape(config) == {
            name: len([line for line in chain(text, name) if not line.startswith("type nat")])
            for name in ("marker", "output", "prerouting")
            if f"chain {name} " in text
        }


def test_the_marker_survives_the_comment_of_a_rule() -> None:
    config = InterceptConfig(owner="o" * 48, strict=True)
    comment = str(marker(config))
    assert len(comment) <= 128
    assert f'return comment "{comment}"' in render(config)
    assert parse_marker(comment) == marker(config)


@pytest.mark.parametrize(
    "comment",
    [
        "",
        "pillion",
        "x" * 128,
        "pillion owner= version=1 strict=0 rules=9 digest=0123456789abcdef",
        "pillion owner=a version=1 strict=0 rules=9 digest=0123456789abcdef ",
        "pillion owner=a version=1 strict=2 rules=9 digest=0123456789abcdef",
    ],
)
def test_other_comments_are_not_ours(comment: str) -> None:
    assert parse_marker(comment) is None


def test_every_difference_changes_the_digest() -> None:
    configs = [
        InterceptConfig(),
        InterceptConfig(outbound_port=1),
        InterceptConfig(app_ports=(1,)),
        InterceptConfig(app_ports=(1,), inbound_port=2),
        InterceptConfig(excluded_uids=(1,)),
        InterceptConfig(excluded_gids=(1,)),
        InterceptConfig(excluded_cidrs=("10.0.0.0/8",)),
        InterceptConfig(excluded_ports=(1,)),
        InterceptConfig(mark=1),
        InterceptConfig(owner="a"),
        InterceptConfig(strict=True),
    ]
    assert len({marker(config).digest for config in configs}) == len(configs)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"outbound_port": 0}, "outbound_port: 0 is not a port"),
        ({"inbound_port": 65536}, "inbound_port: 65536 is not a port"),
        ({"app_ports": (8000, 70000)}, "app_ports: 70000 is not a port"),
        ({"excluded_ports": (-1,)}, "excluded_ports: -1 is not a port"),
        ({"app_ports": tuple(range(1, 1026))}, "at most 1024"),
        ({"excluded_uids": (0xFFFFFFFF,)}, "not a numeric id"),
        ({"excluded_gids": (-1,)}, "not a numeric id"),
        ({"excluded_cidrs": ("10.0.0.1/8",)}, "host bits set"),
        ({"excluded_cidrs": ("0.0.0.0/0 }; flush ruleset",)}, "excluded_cidrs"),
        ({"excluded_cidrs": ("fe80::1%eth0 }",)}, "excluded_cidrs"),
        ({"excluded_cidrs": ("10.0.0.0/8",) * 4097}, "at most 4096"),
        ({"mark": 0}, "mark: 0x0"),
        ({"mark": 1 << 32}, "mark"),
        ({"owner": 'a"; flush ruleset'}, "owner"),
        ({"owner": ""}, "owner"),
        ({"owner": "a" * 49}, "owner"),
        ({"inbound_port": 15001}, "must differ"),
        ({"app_ports": (15006,)}, "would be a loop"),
    ],
)
def test_bad_values_are_refused_by_name(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace("(", r"\(")):
        InterceptConfig(**arguments)  # type: ignore[arg-type]


@given(owner=st.text(max_size=80), cidr=st.text(max_size=40))
def test_no_text_escapes_into_the_ruleset(owner: str, cidr: str) -> None:
    try:
        text = render(InterceptConfig(owner=owner, excluded_cidrs=(cidr,)))
    except ConfigError:
        return
    assert text.isascii() and text.count("table inet pillion") == 3 and text.count('"') == 2


def test_a_marker_prints_what_it_was_made_of() -> None:
    assert (
        str(Marker("web", 1, False, 9, "0" * 16))
        == "pillion owner=web version=1 strict=0 rules=9 digest=0000000000000000"
    )
    assert int.from_bytes(b"pil") == MARK
