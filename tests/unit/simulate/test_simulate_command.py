"""`pillion simulate`: exit codes, what goes where, and the examples."""

import json
import re
import time
from pathlib import Path

import pytest
from support.scenarios import pair

from control_plane.cli import main

EXAMPLES = Path(__file__).parents[3] / "examples" / "scenarios"
SCENARIOS = sorted(path for path in EXAMPLES.glob("*.yaml") if not path.stem.endswith("-policy"))

Said = pytest.CaptureFixture[str]


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: str(path.stem))
def test_the_examples_keep_their_objectives(path: Path, capsys: Said) -> None:
    assert main(["simulate", str(path)]) == 0
    out, err = capsys.readouterr()
    assert "BROKEN" not in out and "kept" in out and "real time" in err


def test_there_are_the_examples_that_the_documentation_names() -> None:
    names = {"version-erring", "retry-storm", "cold-start", "zone-lost", "slow-instance", "slow-endpoint", "deadline"}
    assert names <= {path.stem for path in SCENARIOS}


def test_a_policy_against_another(capsys: Said, tmp_path: Path) -> None:
    svg = tmp_path / "storm.svg"
    scenario, other = str(EXAMPLES / "retry-storm.yaml"), str(EXAMPLES / "no-budget-policy.yaml")
    short = ["--requests", "6000", "--duration", "20s"]
    assert main(["simulate", scenario, "--against", other, "--svg", str(svg), *short]) == 1
    out = capsys.readouterr().out
    assert "no-budget-policy.yaml" in out and "BROKEN" in out and "amplification: ratings" in out
    assert svg.read_text().startswith("<svg")
    assert main(["simulate", scenario, "--against", other, "-o", "json", *short]) == 1
    data = json.loads(capsys.readouterr().out)
    assert [run["policy"] for run in data["runs"]] == ["budget-policy.yaml", "no-budget-policy.yaml"]
    assert data["runs"][0]["requests"] == data["runs"][1]["requests"]
    assert data["kept"] is False


def test_the_seed_and_the_length_of_the_run(capsys: Said, tmp_path: Path) -> None:
    path = tmp_path / "calm.yaml"
    path.write_text(pair())
    runs = []
    for options in (["--seed", "1"], [], ["--seed", "2"], ["--duration", "10s"], ["--requests", "77"]):
        assert main(["simulate", str(path), "-o", "json", *options]) == 0
        runs.append(json.loads(capsys.readouterr().out))
    assert runs[0] == runs[1] != runs[2]
    assert runs[3]["duration_s"] == 10.0 and runs[3]["runs"][0]["requests"] < 1200
    assert runs[4]["runs"][0]["requests"] == 77


@pytest.mark.long
def test_half_a_million_requests_take_less_than_a_minute(capsys: Said) -> None:
    """A tenth of both, by the processor's time: the machine may be busy."""
    began_s = time.process_time()
    assert main(["simulate", str(EXAMPLES / "retry-storm.yaml"), "--duration", "10m", "--requests", "50000"]) in (0, 1)
    assert time.process_time() - began_s < 6.0
    assert int(capsys.readouterr().err.split()[0]) >= 50_000


def test_an_objective_that_breaks(capsys: Said, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(pair(more=["objectives: [{p99: 1ms}]"]))
    assert main(["simulate", str(path)]) == 1
    assert "BROKEN" in capsys.readouterr().out


def test_the_schema_needs_no_scenario(capsys: Said) -> None:
    assert main(["simulate", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["title"] == "pillion scenario" and "outages" in schema["properties"]
    assert main(["simulate"]) == 2
    assert "SCENARIO" in capsys.readouterr().err


def test_panels_by_the_scenario_and_by_option(capsys: Said, tmp_path: Path) -> None:
    path, svg = tmp_path / "calm.yaml", tmp_path / "calm.svg"
    path.write_text(pair(more=["picture: [p99, groups]"]))
    run = ["simulate", str(path), "--svg", str(svg), "--requests", "50"]
    assert main(run) == 0
    assert re.findall(r'y="\d+">([^<]+)</text>', svg.read_text())[1:] == ["p99, ms", "attempts/s"]
    assert main([*run, "--panel", "retries", "--panel", "success", "--panel", "retries"]) == 0
    assert re.findall(r'y="\d+">([^<]+)</text>', svg.read_text())[1:] == ["retries/s", "success"]
    assert main([*run, "--panel", "all"]) == 2
    assert main([*run, "--against", str(path)]) == 2  # a scenario is no policy


def test_a_bad_scenario(capsys: Said, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(pair(load="{from: web, to: nobody, rate: 1}"))
    assert main(["simulate", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "error[P0501]" in err and "bad.yaml:4:" in err and "1 error" in err
    assert main(["simulate", str(path), "-o", "json"]) == 2
    assert json.loads(capsys.readouterr().out)["problems"][0]["code"] == "P0501"


def test_a_bad_policy_to_compare_with(capsys: Said, tmp_path: Path) -> None:
    path, other = tmp_path / "calm.yaml", tmp_path / "other.yaml"
    path.write_text(pair())
    other.write_text("version: 1\nservices: {web: {}}\n")
    assert main(["simulate", str(path), "--against", str(other)]) == 2
    assert 'the policy has no service "reviews"' in capsys.readouterr().err
    assert main(["simulate", str(path), "--against", str(tmp_path / "none.yaml")]) == 2
    assert "cannot read the file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [["--duration", "soon"], ["--duration", "30"], ["--seed", "-1"], ["--requests", "0"]]
)
def test_options_that_make_no_sense(options: list[str], capsys: Said, tmp_path: Path) -> None:
    path = tmp_path / "calm.yaml"
    path.write_text(pair())
    assert main(["simulate", str(path), *options]) == 2
    assert "Traceback" not in capsys.readouterr().err
