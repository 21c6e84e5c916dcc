"""Scenario files: strict, with every problem at once, each in its place."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.scenarios import codes, pair, read

from sidecar.model.problems import render
from sidecar.simulate.reading import read_scenario, read_text

HEAD = "version: 1\npolicy: {version: 1, services: {web: {}, reviews: {}}}\n"


def test_what_is_not_stated_is_built_in() -> None:
    scenario = read(pair(reviews="{}")).scenario
    assert scenario is not None
    assert (scenario.duration_s, scenario.seed, scenario.network_s) == (60.0, 1, 0.0005)
    assert (scenario.discovery_s, scenario.lease_s) == (1.0, 15.0)
    (endpoint,) = scenario.services["reviews"].endpoints
    assert (endpoint.name, endpoint.behaviour.latency.a) == ("reviews-1", 0.01)


def test_groups_inherit_what_the_service_says() -> None:
    reviews = (
        "{latency: 5ms, errors: {rate: 1%}, capacity: {concurrency: 3},"
        " endpoints: {a: {count: 2, zone: x}, b: {latency: {p50: 1ms, p99: 9ms}, labels: {version: '2'}, weight: 7}}}"
    )
    scenario = read(pair(reviews=reviews)).scenario
    assert scenario is not None
    a1, a2, b = scenario.services["reviews"].endpoints
    assert [each.name for each in (a1, a2, b)] == ["reviews-a-1", "reviews-a-2", "reviews-b-1"]
    assert (a1.behaviour.latency.kind, b.behaviour.latency.kind) == ("fixed", "lognormal")
    assert b.behaviour.capacity == a1.behaviour.capacity is not None
    assert (a1.zone, b.spec.labels, b.spec.weight) == ("x", {"version": "2"}, 7)


def test_endpoints_of_the_policy_are_taken_where_none_are_stated() -> None:
    scenario = read(pair("{address: ['10.0.0.1:80', {at: '10.0.0.2:80', tls: plain}]}")).scenario
    assert scenario is not None
    assert [each.name for each in scenario.services["reviews"].endpoints] == ["10.0.0.1:80", "10.0.0.2:80"]


def test_everything_wrong_is_said_at_once_and_in_its_place() -> None:
    found = read("""
        version: 1
        policy: {version: 1, services: {web: {}, reviews: {versions: {v1: {labels: {version: "1"}}}}}}
        services:
          web: {endpoints: 0}
          reviws: {latency: 20}
          reviews: {latency: {p50: 50ms, p99: 20ms}, errors: {statuses: [200]}, capcity: {}}
        load:
          - {from: web, to: review, rate: 10}
          - {from: web, to: reviews}
        outages:
          - {at: 90s, service: reviews, version: v2, errors: {rate: 100%}}
          - {at: 1s, service: reviews}
        objectives: [{p99: 20}, {amplification: 1.5, after: 3s}]
        """)
    assert found.scenario is None
    assert {problem.code for problem in found.errors} >= {"P0104", "P0106", "P0109", "P0115", "P0501", "P0502", "P0503"}
    assert all(problem.source.line and problem.source.file == "scenario.yaml" for problem in found.errors)
    shown = render(found.errors, found.texts)
    for words in ('did you mean "capacity"?', 'did you mean "reviews"?', "write 20s or 20ms", "say one of rate"):
        assert words in shown


@pytest.mark.parametrize(
    ("rest", "code"),
    [
        ("services: {web: {}, reviews: {}}\nload: []\n", "P0106"),
        ("services: {web: {}, other: {}}\nload: [{from: web, to: web, rate: 1}]\n", "P0501"),
        ("services: {web: {calls: [{to: nobody}]}}\nload: [{from: web, to: web, rate: 1}]\n", "P0501"),
        (
            "services: {web: {calls: [{to: reviews}]}, reviews: {calls: [{to: web}]}}\n"
            "load: [{from: web, to: reviews, rate: 1}]\n",
            "P0504",
        ),
        (
            "services: {web: {}}\n"
            "load: [{from: web, to: web, rate: 1, ramp: [{at: 0s, rate: 1}, {at: 1s, rate: 2}]}]\n",
            "P0502",
        ),
        ("services: {web: {}}\nload: [{from: web, to: web, steps: [{at: 2s, rate: 1}, {at: 1s, rate: 2}]}]\n", "P0503"),
        ("services: {web: {endpoints: {a: {from: 5s, until: 2s}}}}\nload: [{from: web, to: web, rate: 1}]\n", "P0503"),
        ("services: {web: {latency: {fixed: 1s, p50: 2s}}}\nload: [{from: web, to: web, rate: 1}]\n", "P0502"),
        (
            "services: {web: {endpoints: 400}, reviews: {endpoints: 400}}\nload: [{from: web, to: web, rate: 1}]\n",
            "P0114",
        ),
        ("services: {web: {}}\nload: [{from: web, to: web, rate: 1}]\noutages: [{at: 1s, down: silent}]\n", "P0502"),
        (
            "services: {web: {}}\nload: [{from: web, to: web, rate: 1}]\n"
            "outages: [{at: 1s, zone: nowhere, down: silent}]\n",
            "P0501",
        ),
        ("services: {web: {}}\nload: [{from: web, to: web, rate: 1}]\nobjectives: [{service: web}]\n", "P0502"),
    ],
)
def test_what_one_key_says_of_another(rest: str, code: str) -> None:
    assert codes(HEAD + rest) == [code]


def test_a_service_of_tcp_serves_no_requests() -> None:
    assert codes(pair("{ports: {sql: {port: 5432, protocol: tcp}}}")) == ["P0505"]


def test_problems_of_the_policy_are_problems_of_the_scenario() -> None:
    found = read(pair("{timeout: {total: soon}}"))
    assert [(problem.code, problem.source.line) for problem in found.errors] == [("P0106", 2)]


def test_a_policy_file_is_found_beside_the_scenario(tmp_path: Path) -> None:
    text = "version: 1\npolicy: mesh.yaml\nservices: {web: {}}\nload: [{from: web, to: web, rate: 1}]\n"
    scenario = tmp_path / "scenario.yaml"
    scenario.write_text(text)
    assert [problem.code for problem in read_scenario(scenario).errors] == ["P0100"]
    (tmp_path / "mesh.yaml").write_text("version: 1\nservices: {web: {}}\n")
    assert read_scenario(scenario).policy_name == "mesh.yaml"
    (tmp_path / "mesh.yaml").write_text("version: 1\nservices: {web: {bad: 1}}\n")
    found = read_scenario(scenario)
    assert [(problem.code, Path(problem.source.file).name) for problem in found.errors] == [("P0104", "mesh.yaml")]


@pytest.mark.parametrize("text", ["", "- 1\n", "version: [\n", "version: 2\n", "policy: 7\n"])
def test_nonsense_is_refused(text: str) -> None:
    assert codes(text)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert [problem.code for problem in read_scenario(tmp_path / "none.yaml").errors] == ["P0100"]


def test_the_reference_in_the_documentation_is_current() -> None:
    """To bring it up to date: put what `reference()` gives between the markers."""
    from sidecar.simulate.reference import reference

    page = (Path(__file__).parents[3] / "docs" / "simulate.md").read_text(encoding="utf-8")
    between = page.partition("<!-- reference: made from the declarations -->\n")[2].partition(
        "<!-- end of reference -->"
    )[0]
    assert between.strip() == reference().strip()


def test_the_scenario_in_the_documentation_is_the_example() -> None:
    root = Path(__file__).parents[3]
    example = (root / "examples" / "scenarios" / "version-erring.yaml").read_text(encoding="utf-8")
    assert f"```yaml\n{example.rstrip()}\n```" in (root / "docs" / "simulate.md").read_text(encoding="utf-8")


WHOLE = """
version: 1
policy: {version: 1, services: {web: {}, reviews: {versions: {v1: {labels: {a: b}}}}}}
services:
  web:
    endpoints: 2
    calls: [{to: reviews, method: GET, path: /, headers: {a: b}, times: 2, share: 5%, on_failure: 500}]
  reviews:
    latency: {p50: 1ms, p99: 2ms}
    errors: {rate: 1%, statuses: [500, hang], latency: {uniform: {min: 1ms, max: 2ms}}, retry_after: 1s}
    capacity: {concurrency: 1, queue: 2, status: 503}
    cold_start: {for: 1s, slowdown: 2}
    endpoints: {v1: {count: 2, labels: {a: b}, zone: z, weight: 1, priority: 0, from: 1s, until: 2s, latency: 1ms}}
    propagates: true
    on_cancel: stop
load:
  - {from: web, to: web, steps: [{at: 0s, rate: 1}, {at: 1s, rate: 2}], requests: [{weight: 2, headers: {a: b}}]}
  - {from: web, to: reviews, rate: 1, arrivals: even}
outages: [{at: 1s, for: 2s, service: reviews, version: v1, slowdown: 2, errors: {rate: 1%}, down: silent}]
objectives: [{p99: 1s, success_effective: 9%, service: web, after: 1s, before: 2s}, {openings: 3, amplification: 2}]
duration: 10s
seed: 1
"""
ODD = [None, "x", -1, True, [None], {"x": 1}, "99999h"]


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, each in items:
        yield from places(each, (*path, key))


def changed(document: Any, path: tuple[Any, ...], odd: Any, cut: bool) -> Any:
    if not path:
        return odd
    fresh = copy.deepcopy(document)
    inner = fresh
    for key in path[:-1]:
        inner = inner[key]
    if cut:
        del inner[path[-1]]
    else:
        inner[path[-1]] = odd
    return fresh


def test_whatever_a_file_holds_reading_gives_a_scenario_or_problems() -> None:
    """Each value of a sound scenario in turn becomes something odd, or is left out."""
    document = yaml.safe_load(WHOLE)
    assert read(WHOLE).scenario is not None
    for path in places(document):
        for odd in ODD:
            found = read(yaml.safe_dump(changed(document, path, odd, False)))
            assert (found.scenario is None) is bool(found.errors), (path, odd)
        found = read(yaml.safe_dump(changed(document, path, None, True)))
        assert (found.scenario is None) is bool(found.errors), path


WRONG = """
version: 1
policy: {version: 1, services: {web: {}, reviews: {}}}
services:
  web: {endpoints: 0}
  reviews:
    latency: {p50: 20ms}
    errors: {rate: 150%, statuses: [200, rest]}
    endpoint: 3
load:
  - {from: web, to: review, rate: fast}
  - {from: web, to: reviews, rate: 1, steps: [{at: 0s, rate: 1}]}
outages:
  - {at: 100s, service: reviews}
  - {at: 1s, service: reviews, endpoint: reviews-9, down: maybe}
objectives:
  - {p99: 1s, after: 5s, before: 2s}
  - {p99: 1}
  - {}
picture: [sucess, p99]
duration: 10
"""


def test_all_that_is_wrong_is_said_at_once_each_thing_once_and_where() -> None:
    """One line for each mistake: what follows from another one is not said as well."""
    errors = read_text(WRONG, "x.yaml").errors
    found = [(problem.source.line, problem.source.column, problem.code) for problem in errors]
    assert found == [
        (5, 20, "P0115"),
        (7, 14, "P0502"),
        (8, 20, "P0115"),
        (8, 37, "P0115"),
        (8, 42, "P0106"),
        (9, 5, "P0104"),
        (11, 21, "P0501"),
        (11, 35, "P0105"),
        (12, 5, "P0502"),
        (14, 5, "P0502"),
        (14, 10, "P0503"),
        (15, 42, "P0501"),
        (15, 59, "P0106"),
        (17, 34, "P0503"),
        (18, 11, "P0106"),
        (19, 5, "P0502"),
        (20, 11, "P0106"),
        (21, 11, "P0106"),
    ]
    helped = [problem.help for problem in errors if problem.code in ("P0104", "P0501")]
    assert helped == ['did you mean "endpoints"?', 'did you mean "reviews"?', 'did you mean "reviews-1"?']


def test_the_schema_knows_what_is_read() -> None:
    from jsonschema import Draft7Validator

    from sidecar.simulate.schema import json_schema

    schema = json_schema()
    Draft7Validator.check_schema(schema)
    validator = Draft7Validator(schema)
    root = Path(__file__).parents[3] / "examples" / "scenarios"
    examples = [path.read_text() for path in root.glob("*.yaml") if not path.stem.endswith("-policy")]
    for text in [WHOLE, *examples]:
        validator.validate(yaml.safe_load(text))
    assert not validator.is_valid(yaml.safe_load(WRONG))
    for bad in ("policy: {version: 1, services: {web: {timout: {}}}}", "picture: [all]", "load: []", "policy: 7"):
        key = bad.partition(":")[0]
        assert not validator.is_valid({**yaml.safe_load(WHOLE), key: yaml.safe_load(bad)[key]}), bad
