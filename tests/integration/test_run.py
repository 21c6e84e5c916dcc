"""`pillion run` with real processes, signals and terminals; a stand-in takes the sidecar's place."""

import fcntl
import os
import pty
import secrets
import select
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from support.pki import Pki

STANDIN = str(Path(__file__).parent.parent / "support" / "standin_sidecar.py")
PYTHON = sys.executable
PILLION = "import sys; from control_plane.cli import main; sys.exit(main())"
WAIT_S = 20.0

# Says what it gets, and ends with 0 on SIGTERM.
APPLICATION = """
import os, signal, sys, time
def say(text):
    with open(os.environ["STANDIN_RECORD"], "a") as file:
        file.write(text + "\\n")
def on(number, frame):
    say("application " + signal.Signals(number).name)
    if number == signal.SIGTERM:
        sys.exit(0)
for name in ("TERM", "INT", "HUP", "QUIT", "USR1", "USR2", "WINCH"):
    signal.signal(getattr(signal, "SIG" + name), on)
say("application starts")
while True:
    time.sleep(0.05)
"""


class Runner:
    """Starts `pillion run` in its own environment, and knows every process that came of it."""

    def __init__(self, tmp_path: Path) -> None:
        self.mark = secrets.token_hex(8)
        self.record = tmp_path / "record"
        self.record.touch()
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PILLION_")},
            "STANDIN_RECORD": str(self.record),
            "STANDIN_DIE": str(tmp_path / "die"),
            "PILLION_TEST_MARK": self.mark,
            "PILLION_POLICY": "unread",  # with a source of policy, no control plane is asked for a token
        }
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, *args: str, how: str = "", **options: object) -> "subprocess.Popen[bytes]":
        environment = {**self.environment, "STANDIN": how, **options.pop("environment", {})}  # type: ignore[dict-item]
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        driver = ["-c", PILLION, "run"] if options.pop("real", False) else [STANDIN, "--drive"]
        process = subprocess.Popen([PYTHON, *driver, *args], env=environment, **options)  # type: ignore[call-overload]
        self.started.append(process)
        return process

    def run(self, *args: str, how: str = "", **options: object) -> tuple[int, str, str]:
        process = self.start(*args, how=how, **options)
        out, err = process.communicate(timeout=WAIT_S)
        return process.returncode, out.decode(), err.decode()

    def events(self) -> list[str]:
        return self.record.read_text().splitlines()

    def wait_for(self, event: str, count: int = 1) -> None:
        until(lambda: sum(line.startswith(event) for line in self.events()) >= count, f"{event} in {self.events()}")

    def alive(self) -> list[int]:
        """All processes that inherited our mark."""
        found = []
        for name in os.listdir("/proc"):
            try:
                if name.isdigit() and self.mark.encode() in Path("/proc", name, "environ").read_bytes():
                    found.append(int(name))
            except OSError:
                continue
        return found

    def supervisor_of(self, process: "subprocess.Popen[bytes]") -> int:
        return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


def until(true: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.01)


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[Runner]:
    runner = Runner(tmp_path)
    yield runner
    for process in runner.started:
        if process.poll() is None:
            process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
    until(lambda: not runner.alive(), f"the end of {runner.alive()}")  # after every test: nothing is left behind


def code_of(command: str) -> list[str]:
    return ["web", "--port", "8000", "--", PYTHON, "-c", command]


def test_the_application_runs_with_its_environment_and_its_exit_code(runner: Runner) -> None:
    program = "import os, sys; print({n: os.environ[n] for n in sys.argv[1:]}); sys.exit(7)"
    names = ["PORT", "PILLION_OUTBOUND", "http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY"]
    code, out, err = runner.run(
        "web", "--port", "8123", "--outbound", "127.0.0.1:19999", "--", PYTHON, "-c", program, *names,
        environment={"no_proxy": "intranet.example, localhost", "NO_PROXY": ""},
    )  # fmt: skip
    assert code == 7, err
    assert eval(out) == {
        "PORT": "8123",
        "PILLION_OUTBOUND": "127.0.0.1:19999",
        "http_proxy": "http://127.0.0.1:19999",
        "HTTP_PROXY": "http://127.0.0.1:19999",
        "no_proxy": "intranet.example,localhost,127.0.0.1,::1",
        "NO_PROXY": "localhost,127.0.0.1,::1",
    }


def test_a_sidecar_without_a_way_out_leaves_the_environment_alone(runner: Runner) -> None:
    program = "import os; print(os.environ.get('http_proxy'), 'PILLION_OUTBOUND' in os.environ)"
    code, out, err = runner.run(
        "web", "--port", "1", "--outbound", "off", "--", PYTHON, "-c", program, environment={"http_proxy": "http://x"}
    )
    assert (code, out) == (0, "http://x False\n"), err


def test_the_sidecar_gets_its_options_and_those_we_do_not_know(runner: Runner) -> None:
    args = ["web", "--port", "8000", "--policy", "mesh.yaml", "--identity=id", "--log-level", "debug", "--", "true"]
    code, _, err = runner.run(*args)
    assert code == 0, err
    (line,) = [line for line in runner.events() if line.startswith("sidecar --")]
    words = line.split()
    assert words[1:5] == ["--service", "web", "--app", "127.0.0.1:8000"]
    assert words[5:9] == ["--outbound", "127.0.0.1:0", "--admin", "127.0.0.1:0"]
    assert words[9:-2] == ["--policy", "mesh.yaml", "--identity=id", "--log-level", "debug"]


def test_the_applications_own_arguments_are_left_alone(runner: Runner) -> None:
    code, out, _ = runner.run("web", "--port", "1", "--", "echo", "--port", "2", "--", "-x", "--help")
    assert (code, out) == (0, "--port 2 -- -x --help\n")


def test_the_sidecar_outlives_the_application_and_drains(runner: Runner) -> None:
    code, _, _ = runner.run(*code_of("import os; open(os.environ['STANDIN_RECORD'],'a').write('ends\\n')"), how="drain")
    assert code == 0
    assert runner.events()[1:] == ["ends", "sidecar drains", "sidecar ends"]


def test_a_sidecar_that_does_not_drain_is_killed_and_it_is_said(runner: Runner) -> None:
    code, _, err = runner.run(*code_of("pass"), how="stuck", environment={"DRAIN_S": "0.3"})
    assert code == 0 and "still draining after 0 s and was killed" in err


def test_a_sidecar_that_fails_while_draining_is_told_and_the_code_stays(runner: Runner) -> None:
    code, _, err = runner.run(*code_of("import sys; sys.exit(4)"), how="drain-fails")
    assert code == 4 and "the sidecar did not drain well (exit code 9)" in err


def test_every_signal_is_forwarded_once(runner: Runner) -> None:
    process = runner.start(*code_of(APPLICATION))
    runner.wait_for("application starts")
    names = ["HUP", "INT", "QUIT", "USR1", "USR2", "WINCH", "TERM"]
    for name in names:
        process.send_signal(getattr(signal, "SIG" + name))
        runner.wait_for(f"application SIG{name}")
    assert process.wait(WAIT_S) == 0
    assert [line for line in runner.events() if " SIG" in line] == [f"application SIG{name}" for name in names]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, 137), (signal.SIGSEGV, 139)])
def test_an_application_that_a_signal_ends_gives_128_and_its_number(runner: Runner, number: int, code: int) -> None:
    program = f"import os, signal; signal.signal({int(number)}, 0) if {int(number)} != 9 else 0; "
    assert runner.run(*code_of(program + f"os.kill(os.getpid(), {int(number)})"))[0] == code


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["web", "--port", "8000", "--", "no-such-program-xyz"], 127, "no-such-program-xyz: command not found"),
        (["web", "--port", "8000", "--", "/no/such"], 127, "/no/such: command not found"),
        (["web", "--port", "8000", "--", "/etc/passwd"], 126, "permission denied"),
        (["web", "--port", "8000", "--", "/etc"], 126, "is a directory"),
        (["web", "--port", "8000", "--"], 2, "put the command to run after --"),
        (["web", "--port", "8000"], 2, "put the command to run after --"),
        (["web", "--port", "8000", "python", "app.py"], 2, "after --: pillion run web --port 8000 -- python app.py"),
        (["web", "--", "true"], 2, "Missing option '--port'"),
        (["web", "--port", "0", "--", "true"], 2, "1<=x<=65535"),
        (["Web", "--port", "1", "--", "true"], 2, "service name 'Web'"),
    ],
)
def test_what_cannot_run_is_told_before_anything_starts(runner: Runner, args: list[str], code: int, says: str) -> None:
    result, out, err = runner.run(*args)
    assert (result, out) == (code, "") and says in err
    assert runner.events() == []


def test_a_script_with_a_missing_interpreter_or_without_any(runner: Runner, tmp_path: Path) -> None:
    for content, code in (("#!/no/such/interpreter\n", 127), ("\x7fELF nonsense", 126)):
        script = tmp_path / "script"
        script.write_text(content)
        script.chmod(0o755)
        result, _, err = runner.run("web", "--port", "1", "--", str(script))
        assert result == code and str(script) in err


@pytest.mark.parametrize(("how", "code"), [("early-end", 1), ("usage-error", 2)])
def test_a_sidecar_that_does_not_start_is_told_with_its_words(runner: Runner, how: str, code: int) -> None:
    result, _, err = runner.run(*code_of(APPLICATION), how=how)
    assert result == code
    assert f"the sidecar ended before it was ready (exit code {code})" in err and "was not started" in err
    if how == "early-end":
        assert "[sidecar] cannot listen on 127.0.0.1:1: permission denied\n" in err
    assert "application starts" not in runner.events()


def test_a_sidecar_that_never_gets_ready_is_told(runner: Runner) -> None:
    code, _, err = runner.run(*code_of(APPLICATION), how="never-ready", environment={"READY_WITHIN_S": "0.5"})
    assert code == 1
    assert "the sidecar was not ready within" in err
    assert "application starts" not in runner.events()


def test_a_signal_before_the_application_starts_ends_it_all(runner: Runner) -> None:
    process = runner.start(*code_of(APPLICATION), how="never-ready")
    runner.wait_for("sidecar --")
    process.send_signal(signal.SIGINT)
    assert process.wait(WAIT_S) == 130
    assert "application starts" not in runner.events()


def test_when_the_sidecar_dies_the_application_is_ended_and_it_is_said(runner: Runner) -> None:
    process = runner.start(*code_of(APPLICATION), how="dies")
    runner.wait_for("application starts")
    Path(runner.environment["STANDIN_DIE"]).touch()
    _, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 1
    assert b"the sidecar ended (killed by SIGKILL) before" in err
    assert runner.events()[-1] == "application SIGTERM"


def test_an_application_that_will_not_end_without_its_sidecar_is_killed(runner: Runner) -> None:
    program = APPLICATION.replace("sys.exit(0)", "pass")
    process = runner.start(*code_of(program), how="dies", environment={"APP_END_S": "0.2"})
    runner.wait_for("application starts")
    Path(runner.environment["STANDIN_DIE"]).touch()
    assert process.wait(WAIT_S) == 1


GRANDCHILDREN = [
    "web",
    "--port",
    "1",
    "--",
    "sh",
    "-c",
    'sleep 1000 & setsid sleep 1000 & echo on >>"$STANDIN_RECORD"; wait',
]


@pytest.mark.parametrize("victim", ["front", "supervisor", "application"])
def test_kill_9_of_any_of_us_leaves_no_process_behind(runner: Runner, victim: str) -> None:
    process = runner.start(*GRANDCHILDREN)
    runner.wait_for("on")
    assert len(runner.alive()) >= 5
    supervisor = runner.supervisor_of(process)
    if victim == "front":
        process.kill()
    elif victim == "supervisor":
        os.kill(supervisor, signal.SIGKILL)
    else:
        children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
        for pid in map(int, children):
            if Path(f"/proc/{pid}/comm").read_text().strip() == "sh":
                os.kill(pid, signal.SIGKILL)
    process.wait(WAIT_S)
    until(lambda: not runner.alive(), f"the end of {runner.alive()}")


def test_what_the_application_leaves_running_is_ended(runner: Runner) -> None:
    code, _, _ = runner.run("web", "--port", "1", "--", "sh", "-c", "sleep 1000 & setsid sleep 1000 & exit 3")
    assert code == 3


def test_the_sidecars_output_goes_to_stderr_with_a_prefix_or_to_a_file(runner: Runner, tmp_path: Path) -> None:
    code, out, err = runner.run("web", "--port", "1", "--", "echo", "hello")
    assert (code, out, err) == (0, "hello\n", "[sidecar] stand-in starts\n")
    log = tmp_path / "sidecar.log"
    code, out, err = runner.run("web", "--port", "1", "--sidecar-log", str(log), "--", "echo", "hello")
    assert (code, out, err) == (0, "hello\n", "")
    assert log.read_text() == "stand-in starts\n"


def test_a_stderr_that_nobody_reads_holds_nothing_up(runner: Runner) -> None:
    process = runner.start(*code_of(APPLICATION), how="chatty")
    runner.wait_for("application starts")
    runner.wait_for("sidecar output is full")  # stderr, what we queue, and the sidecar's pipe
    process.send_signal(signal.SIGUSR1)
    runner.wait_for("application SIGUSR1")
    process.send_signal(signal.SIGTERM)
    assert process.wait(WAIT_S) == 0


def test_control_c_in_a_terminal_reaches_the_application_once_and_the_sidecar_never(runner: Runner) -> None:
    controller, terminal = pty.openpty()

    def become_session() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    with closing(os.fdopen(controller, "wb", buffering=0)) as keyboard:
        process = runner.start(
            *code_of(APPLICATION), stdin=terminal, stdout=terminal, stderr=terminal, preexec_fn=become_session
        )
        os.close(terminal)
        runner.wait_for("application starts")
        keyboard.write(b"\x03")
        runner.wait_for("application SIGINT")
        keyboard.write(b"\x03")
        runner.wait_for("application SIGINT", count=2)
        process.send_signal(signal.SIGTERM)
        while process.poll() is None:  # a terminal that is not read would hold the last lines
            if select.select([controller], [], [], 0.05)[0]:
                try:
                    os.read(controller, 4096)
                except OSError:
                    pass
    assert process.returncode == 0
    signals = [line for line in runner.events() if " SIG" in line]
    assert signals == ["application SIGINT", "application SIGINT", "application SIGTERM"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


SERVER = """
import os
from http.server import BaseHTTPRequestHandler, HTTPServer
class Reviews(BaseHTTPRequestHandler):
    def do_GET(self):
        body = self.headers["host"].encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass
server = HTTPServer(("127.0.0.1", int(os.environ["PORT"])), Reviews)
open(os.environ["STANDIN_RECORD"], "a").write("application listens\\n")
server.serve_forever()
"""


def test_two_services_talk_through_their_real_sidecars(runner: Runner, tmp_path: Path) -> None:
    pki = Pki()
    port, inbound, web_port, web_inbound = (free_port() for _ in range(4))
    policy = tmp_path / "mesh.yaml"
    policy.write_text(
        "version: 1\n"
        "services:\n"
        f"  reviews: {{ports: {{api: {{port: {port}, protocol: http}}}}, address: ['127.0.0.1:{inbound}'],"
        " authz: {allow: [{from: [web]}]}}\n"
        f"  web: {{ports: {{api: {{port: {web_port}, protocol: http}}}}}}\n"
    )

    def options(service: str, own_port: int, own_inbound: int) -> list[str]:
        identity = pki.identity(tmp_path, service)
        return [
            *(service, "--port", str(own_port), "--inbound", f"127.0.0.1:{own_inbound}"),
            *("--policy", str(policy), "--identity", str(identity), "--", PYTHON, "-c"),
        ]

    reviews = runner.start(*options("reviews", port, inbound), SERVER, real=True)
    runner.wait_for("application listens")
    client = "import urllib.request as r; print(r.urlopen('http://reviews/x').read().decode())"
    code, out, err = runner.run(*options("web", web_port, web_inbound), client, real=True)
    assert (code, out) == (0, "reviews\n"), err
    reviews.send_signal(signal.SIGTERM)
    _, err_bytes = reviews.communicate(timeout=WAIT_S)
    assert reviews.returncode == 143, err_bytes.decode()
