"""Strict decoding: nothing ignored, nothing converted, every complaint with its key."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from sidecar.api import ConfigError, Filter, decode


@dataclass(frozen=True)
class Rule:
    name: str
    limit: int = 1

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise ValueError("limit must not be negative")


@dataclass(frozen=True)
class Settings:
    header: str
    share: float = 1.0
    on: bool = False
    mode: Literal["fast", "slow"] = "fast"
    burst: int | None = None
    names: tuple[str, ...] = ()
    tags: list[str] = field(default_factory=list)
    values: Mapping[str, int] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    main: Rule | None = None
    free: Any = None


def test_everything_that_can_be_declared() -> None:
    got = decode(
        Settings,
        {
            "header": "x",
            "share": 1,
            "on": True,
            "mode": "slow",
            "burst": 5,
            "names": ["a", "b"],
            "tags": ["c"],
            "values": {"d": 1},
            "rules": [{"name": "e"}, {"name": "f", "limit": 2}],
            "main": {"name": "g"},
            "free": {"anything": [1]},
        },
    )
    assert got == Settings(
        *("x", 1.0, True, "slow", 5, ("a", "b"), ["c"]),
        values={"d": 1},
        rules=(Rule("e"), Rule("f", 2)),
        main=Rule("g"),
        free={"anything": [1]},
    )
    assert type(got.share) is float


def test_defaults_stand_in() -> None:
    assert decode(Settings, {"header": "x"}) == Settings("x")
    assert decode(Settings, {"header": "x", "burst": None}) == Settings("x")


@pytest.mark.parametrize(
    ("config", "key", "problem"),
    [
        ({}, "header", "required, but missing"),
        ({"header": "x", "haeder": "y"}, "haeder", 'unknown key; did you mean "header"?'),
        ({"header": 1}, "header", "must be a string, not a whole number"),
        ({"header": None}, "header", "must be a string, not null"),
        ({"header": "x", "share": "1"}, "share", "must be a number, not a string"),
        ({"header": "x", "share": True}, "share", "must be a number, not true or false"),
        ({"header": "x", "share": math.nan}, "share", "must be a number"),
        ({"header": "x", "on": 1}, "on", "must be true or false, not a whole number"),
        ({"header": "x", "mode": "odd"}, "mode", "must be one of fast, slow, not 'odd'"),
        ({"header": "x", "burst": 1.5}, "burst", "must be a whole number, not a number"),
        ({"header": "x", "burst": True}, "burst", "must be a whole number, not true or false"),
        ({"header": "x", "names": "a"}, "names", "must be a list, not a string"),
        ({"header": "x", "names": ["a", 1]}, "names[1]", "must be a string, not a whole number"),
        ({"header": "x", "values": []}, "values", "must be a map, not a list"),
        ({"header": "x", "values": {"d": "1"}}, "values.d", "must be a whole number, not a string"),
        ({"header": "x", "rules": [{"name": "a"}, {}]}, "rules[1].name", "required, but missing"),
        ({"header": "x", "rules": [{"name": "a", "limit": -1}]}, "rules[0]", "limit must not be negative"),
        ({"header": "x", "main": {"nme": "a"}}, "main.nme", 'unknown key; did you mean "name"?'),
        ([], "", "must be a map, not a list"),
    ],
)
def test_what_is_wrong_is_named(config: Any, key: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        decode(Settings, config)
    assert (caught.value.key, caught.value.problem) == (key, problem)
    assert str(caught.value) == (f"{key}: {problem}" if key else problem)


def test_a_filter_without_settings_takes_none() -> None:
    assert Filter.decode({}) is None
    with pytest.raises(ConfigError, match="a: unknown key; this filter takes no settings"):
        Filter.decode({"a": 1})
    with pytest.raises(ConfigError, match="must be a map"):
        Filter.decode([])  # type: ignore[arg-type]


def test_an_undecodable_declaration_is_the_author_s_error() -> None:
    @dataclass
    class Odd:
        when: complex

    with pytest.raises(TypeError, match="cannot be declared"):
        decode(Odd, {"when": 1})
