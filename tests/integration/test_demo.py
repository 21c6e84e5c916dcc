"""`pillion demo` as its users run it: the story whole, and every way in which it may be ended.

Each demo gets a temporary directory of its own by TMPDIR, so that whatever is left of it, a file or a process, is
found.
"""

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PILLION = (sys.executable, "-P", "-c", "import sys; from control_plane.cli import main; sys.exit(main())")
START_S = 45.0
STORY_S = 240.0  # on a machine that is busy with other tests; alone it takes 45 s
END_S = 10.0

STEPS = ["baseline", "retry", "canary", "denied", "filter", "killed", "joined"]


class Demo:
    """A running `pillion demo`; `output` is all that it has printed so far."""

    def __init__(self, directory: Path, *options: str, **started: Any) -> None:
        self.directory = directory
        self.output = ""
        self.process = subprocess.Popen([*PILLION, "demo", *options], env=environment(directory), **started)
        self.reading = self.process.stdout.fileno() if self.process.stdout is not None else started["stdout"]

    @property
    def plain(self) -> str:
        """Without colours; each move of the cursor begins a line."""
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", re.sub(r"\x1b\[[0-9]*[AK]", "\n", self.output))

    def wait_for(self, pattern: str, within_s: float = START_S) -> "re.Match[str]":
        deadline = time.monotonic() + within_s
        while not (found := re.search(pattern, self.plain)):
            assert time.monotonic() < deadline, f"no {pattern!r} within {within_s} s in:\n{self.plain[-5000:]}"
            if select.select([self.reading], [], [], 0.2)[0]:
                self._read()
        return found

    def _read(self) -> None:
        try:
            data = os.read(self.reading, 65536)
        except OSError:  # a terminal whose other end is closed
            data = b""
        assert data, f"it ended:\n{self.output}"
        self.output += data.decode(errors="replace")

    def ended(self, within_s: float = END_S) -> int:
        """Its exit code; what it still prints is read away."""
        deadline = time.monotonic() + within_s
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"still there after {within_s} s:\n{self.output}"
            if select.select([self.reading], [], [], 0.05)[0]:
                try:
                    self._read()
                except AssertionError:
                    time.sleep(0.05)
        while select.select([self.reading], [], [], 0)[0]:
            try:
                self._read()
            except AssertionError:
                break
        return self.process.returncode

    def processes(self) -> list[int]:
        """Everything that works in its directory, itself not counted."""
        return processes_of(self.directory)

    def assert_nothing_left(self) -> None:
        until(lambda: not self.processes() and not list(self.directory.iterdir()), self._left)

    def _left(self) -> str:
        return f"left: processes {self.processes()}, files {list(self.directory.iterdir())}"


def environment(directory: Path, **more: str) -> dict[str, str]:
    unwanted = ("PILLION_", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    return kept | {"TMPDIR": str(directory), "TERM": "xterm-256color"} | more


def processes_of(directory: Path) -> list[int]:
    """Processes that name the directory in their command line, or had it as TMPDIR from such a parent."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            command = Path(f"/proc/{name}/cmdline").read_bytes()
            variables = Path(f"/proc/{name}/environ").read_bytes()
        except OSError:
            continue
        if str(directory).encode() in command or f"TMPDIR={directory}\0".encode() in variables:
            found.append(int(name))
    return found


def until(true: Callable[[], object], problem: Callable[[], str], within_s: float = END_S) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, problem()
        time.sleep(0.02)


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "tmp"
    directory.mkdir()
    yield directory
    for pid in processes_of(directory):  # only where a test has failed
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def start(scratch: Path) -> Iterator[Callable[..., Demo]]:
    started: list[Demo] = []

    def start(*options: str) -> Demo:
        started.append(Demo(scratch, "--headless", *options, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
        return started[-1]

    yield start
    for demo in started:
        demo.process.kill()
        demo.process.wait()
        if demo.process.stdout is not None:
            demo.process.stdout.close()


# -- the story


@pytest.mark.long
@pytest.mark.alone
def test_the_whole_story_holds_and_is_told_as_json(scratch: Path) -> None:
    done = subprocess.run(
        [*PILLION, "demo", "--headless", "--once", "-o", "json"],
        env=environment(scratch),
        capture_output=True,
        text=True,
        timeout=STORY_S,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] and report["failed"] == []
    assert [step["step"] for step in report["steps"]] == STEPS
    steps = {step["step"]: step for step in report["steps"]}
    assert all(step["requests"] > 0 for step in report["steps"])

    baseline, retry, canary = (steps[name]["reviews"] for name in STEPS[:3])
    assert baseline["effective"] == pytest.approx(baseline["actual"], abs=0.02)
    assert retry["effective"] > baseline["effective"]
    assert retry["v2"]["actual"] < 0.85 < retry["v2"]["effective"]
    assert retry["retries"] > 0
    assert canary["v2"]["requests"] / canary["requests"] < baseline["v2"]["requests"] / baseline["requests"]
    assert steps["canary"]["policy_changes"] == ["-        to: {v1: 70, v2: 30}", "+        to: {v1: 90, v2: 10}"]

    assert steps["canary"]["commands"] == ['pillion policy apply -f policy/reviews.yaml -m "less of v2"']

    hops = {(hop["from"], hop["to"]): hop for hop in report["identities"]}
    assert set(hops) == {
        ("customers", "web"),
        ("web", "reviews"),
        ("web", "orders"),
        ("reviews", "ratings"),
        ("orders", "ratings"),
    }
    for (caller, _), hop in hops.items():
        assert hop["identity"] == f"spiffe://demo.mesh/service/{caller}"
        assert hop["seen_by_application"] and hop["in_access_log"]

    denied = report["denied"]
    assert (denied["caller"], denied["status"], denied["reason"]) == (
        "spiffe://demo.mesh/service/orders",
        403,
        "denied",
    )
    assert re.search(r"ratings\.yaml:\d+$", denied["rule"])
    assert denied["traced_through"] == ["customers", "web", "orders", "ratings"]
    assert (report["filter"]["header"], report["filter"]["value"]) == ("x-tenant", "web")

    killed, joined = report["killed"], report["joined"]
    assert killed["gone_after_s"] < killed["ttl_s"] + 5
    assert killed["attempts_failed_by_v1"] > killed["failed_by_v1"] == 0
    assert killed["failed"] <= killed["failed_by_v2"]
    assert joined["first_call_after_s"] <= 2
    assert (killed["endpoints_listed"], joined["endpoints_listed"]) == (2, 3)

    for step in STEPS:
        assert steps[step]["said"]
    assert list(scratch.iterdir()) == [] and processes_of(scratch) == []


@pytest.mark.long
def test_a_step_that_does_not_hold_is_named_and_the_others_go_on(start: Callable[..., Demo], scratch: Path) -> None:
    demo = start("--once")
    demo.wait_for(r"1/7")
    policy = next(scratch.glob("pillion-demo-*")) / "policy" / "ratings.yaml"
    policy.write_text(policy.read_text().replace("[reviews, orders]", "[orders, reviews]"))
    assert demo.ended(STORY_S) == 1
    assert "step denied did not hold" in demo.output
    assert "ratings.yaml does not say what it said at the start" in demo.output
    assert "reviews saw x-tenant: web" in demo.output
    demo.assert_nothing_left()


# -- its end


@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.long),
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.long),
    ],
    ids=["INT", "TERM", "HUP"],
)
def test_a_signal_ends_everything(start: Callable[..., Demo], number: signal.Signals, code: int) -> None:
    demo = start()
    demo.wait_for("ready after")
    assert len(demo.processes()) == 16  # itself, the control plane, seven sidecars, six applications, the keeper
    demo.process.send_signal(number)
    assert demo.ended() == code
    demo.assert_nothing_left()


def test_a_signal_while_it_starts_ends_everything(start: Callable[..., Demo], scratch: Path) -> None:
    demo = start()
    until(lambda: len(demo.processes()) >= 4, lambda: "it does not start", START_S)
    demo.process.send_signal(signal.SIGTERM)
    assert demo.ended() == 143
    demo.assert_nothing_left()


@pytest.mark.long
def test_the_second_signal_ends_it_at_once(start: Callable[..., Demo]) -> None:
    demo = start()
    demo.wait_for("ready after")
    sidecars = [pid for pid in demo.processes() if b"--ready-fd" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(sidecars[0], signal.SIGSTOP)  # so that an orderly end has to wait
    demo.process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    demo.process.send_signal(signal.SIGINT)
    began = time.monotonic()
    assert demo.ended() == 130
    assert time.monotonic() - began < 2.0
    demo.assert_nothing_left()


@pytest.mark.long
def test_a_killed_demo_leaves_nothing_either(start: Callable[..., Demo]) -> None:
    demo = start()
    demo.wait_for("ready after")
    demo.process.kill()
    assert demo.ended() == -signal.SIGKILL
    demo.assert_nothing_left()


@pytest.mark.long
@pytest.mark.parametrize(
    "which", ["sidecar", *(pytest.param(each, marks=pytest.mark.long) for each in ("service", "control plane"))]
)
def test_a_child_that_dies_ends_the_demo_which_says_so(start: Callable[..., Demo], which: str) -> None:
    demo = start()
    demo.wait_for("ready after")
    marks = {
        "sidecar": b"sidecar\0--service\0ratings",
        "service": b"service.py\0ratings",
        "control plane": b"control-plane\0--state-dir",
    }
    (victim,) = [pid for pid in demo.processes() if marks[which] in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(victim, signal.SIGKILL)
    assert demo.ended() == 1
    name = {"sidecar": "sidecar of ratings", "service": "ratings"}.get(which, which)
    assert f"{name} ended (SIGKILL)" in demo.output
    demo.assert_nothing_left()


@pytest.mark.long
def test_a_reader_that_goes_away_ends_it(start: Callable[..., Demo]) -> None:
    demo = start()
    demo.wait_for("ready after")
    assert demo.process.stdout is not None
    demo.process.stdout.close()
    assert demo.process.wait(STORY_S) == 1
    demo.assert_nothing_left()


@pytest.mark.long
def test_while_it_stays_up_other_commands_reach_it(start: Callable[..., Demo], scratch: Path) -> None:
    demo = start()
    demo.wait_for(r"export PILLION_CONTEXT=\$PWD/context.json", STORY_S)
    (directory,) = scratch.glob("pillion-demo-*")
    variables = environment(scratch, PILLION_CONTEXT=str(directory / "context.json"))

    def pillion(*args: str) -> str:
        done = subprocess.run(
            [*PILLION, *args], env=variables, cwd=directory, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    assert re.search(r"reviews .* 3/3", pillion("get", "services"))
    assert "policy/reviews.yaml" in pillion("describe", "service", "reviews")
    assert "all is well" in pillion("check", "--wait", "20")
    path = directory / "policy" / "reviews.yaml"
    path.write_text(path.read_text().replace("v1: 90, v2: 10", "v1: 50, v2: 50"))
    assert "accepted by all 7 sidecars" in pillion("policy", "apply", "-f", "policy/reviews.yaml")
    demo.process.send_signal(signal.SIGINT)
    assert demo.ended() == 0
    demo.assert_nothing_left()


# -- on a terminal


def on_terminal(directory: Path, columns: int, lines: int, **more: str) -> Demo:
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    demo = Demo.__new__(Demo)
    demo.directory, demo.output, demo.reading = directory, "", ours

    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    demo.process = subprocess.Popen(
        [*PILLION, "demo"],
        env=environment(directory, **more),
        stdin=its,
        stdout=its,
        stderr=its,
        preexec_fn=take_terminal,
    )
    os.close(its)
    return demo


@pytest.mark.long
@pytest.mark.parametrize(
    ("columns", "lines", "more", "heading"),
    [
        (80, 24, {}, "source .*service .*version .*effective .*actual .*rate .*p50 .*p99 .*retries .*breaker"),
        (50, 20, {"NO_COLOR": "1"}, "source +service version effective actual retries"),
    ],
    ids=["80x24", "50x20 without colour"],
)
def test_a_live_table_that_fits_and_ctrl_c(
    scratch: Path, columns: int, lines: int, more: dict[str, str], heading: str
) -> None:
    demo = on_terminal(scratch, columns, lines, **more)
    try:
        demo.wait_for(heading)
        demo.wait_for(r"reviews .*all")
        os.write(demo.reading, b"\x03")
        assert demo.ended() == 130
        assert ("\x1b[1;36m" in demo.output) == (not more)  # the heading of a step in colour
        assert max(len(line.rstrip("\r")) for line in demo.plain.split("\n")) <= columns + 2  # the echo of ^C
        assert demo.output.rfind("\x1b[?25h") > demo.output.rfind("\x1b[?25l")  # the cursor is shown again
        demo.assert_nothing_left()
    finally:
        os.close(demo.reading)
