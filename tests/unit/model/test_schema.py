from pathlib import Path

import pytest
import yaml
from jsonschema import Draft7Validator

from sidecar.model.problems import CODES
from sidecar.model.reference import codes, reference
from sidecar.model.schema import json_schema

ROOT = Path(__file__).parents[3]
SCHEMA = Draft7Validator(json_schema())


def test_it_is_a_schema() -> None:
    Draft7Validator.check_schema(json_schema())
    assert json_schema()["$schema"] == "http://json-schema.org/draft-07/schema#"


def test_the_example_fits() -> None:
    SCHEMA.validate(yaml.safe_load((Path(__file__).parent / "example.yaml").read_text()))


@pytest.mark.parametrize(
    "text",
    [
        "services: {}",
        "version: 2",
        "version: 1\nservice: {}",
        "version: 1\nservices: {Web: {}}",
        "version: 1\nservices: {web: {timout: {}}}",
        "version: 1\ndefaults: {timeout: {total: 10}}",
        "version: 1\ndefaults: {timeout: {total: 10 s}}",
        "version: 1\ndefaults: {timeout: {connect: {max: 1s}}}",
        "version: 1\nenforced: {timeout: {total: {most: 1s}}}",
        "version: 1\ndefaults: {retry: {budget: {percent: 20}}}",
        "version: 1\ndefaults: {retry: {budget: {percent: 120%}}}",
        "version: 1\ndefaults: {retry: {when: [reste]}}",
        "version: 1\nservices: {web: {ports: {http: {port: 70000}}}}",
        "version: 1\nservices: {web: {ports: {http: {}}}}",
        "version: 1\nservices: {web: {ports: {http: {port: 1, protocol: h2c}}}}",
        "version: 1\nservices: {web: {outliers: {interval: 10}}}",
        "version: 1\nservices: {web: {versions: {v1: {labels: {version: 1}}}}}",
        "version: 1\nservices: {web: {authz: {default: maybe}}}",
        "version: 1\nservices: {web: {authz: null}}",
        "version: 1\nservices: {web: {routes: [{to: {v1: 101}}]}}",
        "version: 1\nservices: {web: {routes: [{match: {path: a}}]}}",
        "version: 1\nservices: {web: {routes: [{match: {headers: {x: {present: false}}}}]}}",
        "version: 1\nservices: {web: {routes: [{redirect: {to: /a, status: 200}}]}}",
        "version: 1\nservices: {web: {routes: {}}}",
    ],
)
def test_bad_files_do_not_fit(text: str) -> None:
    assert not SCHEMA.is_valid(yaml.safe_load(text))


def between(name: str) -> str:
    text = (ROOT / "docs" / "policy.md").read_text(encoding="utf-8")
    return (
        text.partition(f"<!-- {name}: made from the declarations -->\n")[2]
        .partition(f"<!-- end of {name} -->")[0]
        .strip()
    )


def test_the_reference_in_the_documentation_is_current() -> None:
    """To bring it up to date: put what `reference()` and `codes()` give between the markers."""
    assert between("reference") == reference().strip()
    assert between("codes") == codes().strip()


def test_every_code_is_documented() -> None:
    assert all(f"| {code} |" in between("codes") for code in CODES)


def test_the_examples_in_the_documentation_are_valid() -> None:
    from sidecar.model.load import load_texts

    text = (ROOT / "docs" / "policy.md").read_text(encoding="utf-8")
    examples = [block.partition("```")[0] for block in text.split("```yaml\n")[1:]]
    whole = [example for example in examples if "version: 1" in example]
    assert len(whole) >= 3
    for example in whole:
        loaded = load_texts({"mesh.yaml": example})
        assert loaded.problems == (), loaded.problems
