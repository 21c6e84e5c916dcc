"""The command line: usage, what it prints, and that it stays light. What it changes is tested on a real kernel."""

import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner

from sidecar.intercept.command import intercept
from sidecar.intercept.ruleset import InterceptConfig, render, render_removal


def test_a_dry_run_prints_the_ruleset() -> None:
    arguments = "up --dry-run --inbound-port 9 --outbound-port 10 --app-port 80 --app-port 81 --exclude-uid 33"
    arguments += " --exclude-gid 44 --exclude-cidr 10.0.0.0/8 --exclude-port 22 --mark 0x10 --owner web --strict"
    done = CliRunner().invoke(intercept, arguments.split())
    expected = InterceptConfig(
        inbound_port=9,
        outbound_port=10,
        app_ports=(80, 81),
        excluded_uids=(33,),
        excluded_gids=(44,),
        excluded_cidrs=("10.0.0.0/8",),
        excluded_ports=(22,),
        mark=16,
        owner="web",
        strict=True,
    )
    assert (done.exit_code, done.output) == (0, render(expected))
    assert CliRunner().invoke(intercept, ["down", "--dry-run"]).output == render_removal()
    assert CliRunner().invoke(intercept, ["up", "--dry-run"]).output == render(InterceptConfig())


def test_names_of_users_and_groups_are_looked_up() -> None:
    done = CliRunner().invoke(intercept, ["up", "--dry-run", "--exclude-uid", "root", "--exclude-gid", "root"])
    assert "meta skuid { 0 } return" in done.output and "meta skgid { 0 } return" in done.output


def test_bad_usage_is_exit_code_2_and_says_why() -> None:
    for arguments, says in [
        ("up --app-port 0", "0 is not in the range"),
        ("up --exclude-cidr 10.0.0.1/8", "host bits set"),
        ("up --exclude-uid no-such-user-here", "there is no user"),
        ("up --mark red", "is not a number"),
        ("up --app-port 15001", "would be a loop"),
        ("up --owner a/b", "owner"),
        ("sideways", "No such command"),
    ]:
        done = CliRunner().invoke(intercept, arguments.split())
        assert done.exit_code == 2, done.output
        assert says in done.output


def test_it_loads_neither_trio_nor_the_data_plane() -> None:
    code = (
        "import sys, sidecar.intercept.command;"
        "print([name for name in sys.modules if name in ('trio', 'ssl') or name.startswith('sidecar.proxy')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


POLICY = """version: 1
services:
  reviews:
    ports: {api: {port: 8000, protocol: http}, db: {port: 6379, protocol: tcp}}
"""


def test_the_declared_ports_are_captured_by_default(tmp_path: Path) -> None:
    file = tmp_path / "mesh.yaml"
    file.write_text(POLICY)
    arguments = ["up", "--dry-run", "--policy", str(file), "--service", "reviews"]
    done = CliRunner().invoke(intercept, arguments)
    assert (done.exit_code, done.output) == (0, render(InterceptConfig(app_ports=(6379, 8000))))
    done = CliRunner().invoke(intercept, [*arguments, "--app-port", "80"])
    assert done.output == render(InterceptConfig(app_ports=(80,)))


def test_a_policy_that_does_not_help_is_usage(tmp_path: Path) -> None:
    file = tmp_path / "mesh.yaml"
    file.write_text(POLICY)
    unknown = CliRunner().invoke(intercept, ["up", "--policy", str(file), "--service", "ratings"])
    assert unknown.exit_code == 2 and "no service 'ratings'; it has: reviews" in unknown.output
    alone = CliRunner().invoke(intercept, ["up", "--service", "ratings"])
    assert alone.exit_code == 2 and "belong together" in alone.output
    file.write_text("version: 1\nservicess: {}\n")
    broken = CliRunner().invoke(intercept, ["up", "--policy", str(file), "--service", "reviews"])
    assert broken.exit_code == 2 and "P0104" in broken.output and "mesh.yaml:2:1" in broken.output
