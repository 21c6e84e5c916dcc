"""What nft lists, read without trust, against what should be there."""

import json

import pytest

from sidecar.intercept.listing import Redirect, State, compare, parse_listing
from sidecar.intercept.ruleset import InterceptConfig, marker, shape

CONFIG = InterceptConfig(app_ports=(80, 8000), owner="web")


def listing(config: InterceptConfig = CONFIG, **changes: object) -> str:
    """What `nft -j` prints for a configuration; `changes` spoil it."""
    about = {"family": "inet", "table": "pillion"}
    entries: list[object] = [{"metainfo": {"version": "1.0.6"}}, {"table": {"family": "inet", "name": "pillion"}}]
    for name, rules in shape(config).items():
        hook = {} if name == "marker" else {"type": "nat", "hook": name, "prio": -110}
        if changes.get("unhooked") != name:
            entries.append({"chain": {**about, "name": name, **hook}})
        else:
            entries.append({"chain": {**about, "name": name}})
        for number in range(rules - (changes.get("short") == name)):
            rule: dict[str, object] = {**about, "chain": name, "expr": [{"return": None}]}
            if name == "marker":
                rule["comment"] = changes.get("comment", str(marker(config)))
            elif number == 0:
                to = config.outbound_port if name == "output" else config.inbound_port
                expressions: list[object] = [{"counter": {"packets": 3, "bytes": 180}}, {"redirect": {"port": to}}]
                if name == "prerouting":
                    dport = {"payload": {"protocol": "tcp", "field": "dport"}}
                    expressions.insert(0, {"match": {"op": "==", "left": dport, "right": {"set": [80, 8000]}}})
                if changes.get("astray") == name:
                    expressions[-1] = {"redirect": {"port": 1}}
                rule["expr"] = expressions
            entries.append({"rule": rule})
    return json.dumps({"nftables": entries})


def test_what_we_made_is_current() -> None:
    installed = parse_listing(listing())
    assert compare(installed, CONFIG) is State.CURRENT
    assert installed.marker == marker(CONFIG)
    assert installed.redirects == (Redirect("output", 15001, (), 3), Redirect("prerouting", 15006, (80, 8000), 3))


def test_nothing_is_absent() -> None:
    assert compare(None, CONFIG) is State.ABSENT


@pytest.mark.parametrize(
    "spoilt",
    [
        {"short": "output"},
        {"short": "prerouting"},
        {"unhooked": "output"},
        {"astray": "output"},
        {"astray": "prerouting"},
    ],
)
def test_what_somebody_edited_is_damaged(spoilt: dict[str, str]) -> None:
    assert compare(parse_listing(listing(CONFIG, **spoilt)), CONFIG) is State.DAMAGED


def test_another_configuration_is_stale_and_another_owner_is_not_ours() -> None:
    installed = parse_listing(listing())
    assert compare(installed, InterceptConfig(app_ports=(80, 81), owner="web")) is State.STALE
    assert compare(installed, InterceptConfig(app_ports=(80,), owner="web", inbound_port=1)) is State.STALE
    assert compare(installed, InterceptConfig(app_ports=(80,), owner="web", outbound_port=1)) is State.STALE
    for suited in (InterceptConfig(app_ports=(80,), owner="web"), InterceptConfig(owner="web", excluded_uids=(1,))):
        assert compare(installed, suited) is State.SUITABLE
    only_outbound = parse_listing(listing(InterceptConfig(owner="web")))
    assert compare(only_outbound, CONFIG) is State.STALE
    assert compare(installed, InterceptConfig(app_ports=(80, 8000), owner="api")) is State.OTHER_OWNER
    old = str(marker(CONFIG)).replace("version=1", "version=999")
    assert compare(parse_listing(listing(comment=old)), CONFIG) is State.STALE


def test_a_table_without_our_marker_is_foreign() -> None:
    state = compare(parse_listing(listing(comment="made by hand")), CONFIG)
    assert state is State.FOREIGN and not state.replaceable
    assert not State.OTHER_OWNER.replaceable and State.DAMAGED.replaceable


def test_a_marker_in_another_chain_does_not_count() -> None:
    rule = {"chain": "output", "comment": str(marker(CONFIG)), "expr": []}
    assert parse_listing(json.dumps({"nftables": [{"rule": rule}]})).marker is None


def test_an_empty_table_belongs_to_nobody() -> None:
    bare = parse_listing('{"nftables": [{"metainfo": {}}, {"table": {"name": "pillion"}}]}')
    assert compare(bare, CONFIG) is State.DAMAGED
    with_set = parse_listing('{"nftables": [{"table": {"name": "pillion"}}, {"set": {"name": "x"}}]}')
    assert compare(with_set, CONFIG) is State.FOREIGN


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"nftables": 1}', "nonsense"])
def test_what_is_no_listing_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        parse_listing(text)


@pytest.mark.parametrize(
    "entry",
    [
        1,
        None,
        {"chain": {}},
        {"rule": 1},
        {"rule": {}},
        {"rule": {"chain": 1, "comment": [], "expr": 1}},
        {"rule": {"chain": "output", "expr": [1, {"match": {"left": 1}}, {"redirect": {"port": "x"}}]}},
    ],
)
def test_odd_entries_are_no_exceptions(entry: object) -> None:
    assert compare(parse_listing(json.dumps({"nftables": [entry]})), CONFIG) in (State.FOREIGN, State.DAMAGED)


def test_a_range_of_ports_is_read() -> None:
    dport = {"payload": {"protocol": "tcp", "field": "dport"}}
    match = {"match": {"left": dport, "right": {"set": [80, {"range": [8000, 8002]}]}}}
    rule = {"chain": "prerouting", "expr": [match, {"redirect": {"port": 15006}}]}
    installed = parse_listing(json.dumps({"nftables": [{"rule": rule}]}))
    assert installed.redirects == (Redirect("prerouting", 15006, (80, 8000, 8001, 8002), 0),)
