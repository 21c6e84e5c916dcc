"""The ruleset in a real kernel: put in place, replaced, repaired, removed; and what it does to real connections."""

import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.netns import Namespace, remove_leftovers, require_root, wired

from sidecar.intercept.ruleset import InterceptConfig, render

pytestmark = pytest.mark.root

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "sidecar.intercept.command"]
OTHERS = """
table ip mine { chain c { type filter hook input priority 0; policy accept; tcp dport 9999 drop; } ; }
table inet pillion2 { set s { type inet_service; elements = { 1, 2 }; } ; }
table ip6 pillion { chain c { return comment "not ours, though its name is"; } ; }
"""

# Accepts for ever on a port and answers with one JSON line: where the connection arrived and where it wanted to go.
LISTENER = """
import json, socket, sys
from sidecar.intercept.original_dst import local_address, original_destination
listener = socket.create_server(("::", int(sys.argv[1])), family=socket.AF_INET6, dualstack_ipv6=sys.argv[2:] != ["v6"])
while True:
    accepted, peer = listener.accept()
    answer = {"original": original_destination(accepted), "arrived": local_address(accepted)}
    accepted.sendall(json.dumps(answer).encode() + b"\\n")
    accepted.close()
"""

# Connects, with a mark where one is given, and prints the first line that comes back.
CLIENT = """
import socket, sys
host, port, mark = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
family = socket.AF_INET6 if ":" in host else socket.AF_INET
with socket.socket(family) as client:
    client.settimeout(5)
    if mark:
        client.setsockopt(socket.SOL_SOCKET, 36, mark)
    client.connect((host, port))
    print(client.makefile().readline(), end="")
"""


@pytest.fixture
def pair() -> Iterator[tuple[Namespace, Namespace]]:
    require_root("nft", "ss")
    with wired() as (left, right):
        yield left, right


@pytest.fixture
def left(pair: tuple[Namespace, Namespace]) -> Namespace:
    return pair[0]


def intercept(where: Namespace, *arguments: str, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return where.run([*before, *COMMAND, *arguments], env={"PYTHONPATH": str(ROOT)})


def up(where: Namespace, *arguments: str) -> dict[str, object]:
    done = intercept(where, "up", "-o", "json", *arguments)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert isinstance(answer, dict)
    return answer


def load(where: Namespace, text: str) -> None:
    done = where.run(["nft", "-f", "-"], text=text)
    assert done.returncode == 0, done.stderr


def ruleset(where: Namespace) -> str:
    """Everything in the kernel, without handles and counters."""
    done = where.run(["nft", "-s", "list", "ruleset"])
    assert done.returncode == 0, done.stderr
    return done.stdout


def listen(where: Namespace, port: int, *arguments: str) -> None:
    where.start([sys.executable, "-c", LISTENER, str(port), *arguments], env={"PYTHONPATH": str(ROOT)})
    where.listening(port)


def ask(where: Namespace, host: str, port: int, mark: int = 0) -> dict[str, list[object] | None]:
    done = where.run([sys.executable, "-c", CLIENT, host, str(port), str(mark)])
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert isinstance(answer, dict)
    return answer


# Life of the table


def test_up_twice_is_up_once_and_down_leaves_nothing(left: Namespace) -> None:
    load(left, OTHERS)
    others = ruleset(left)
    arguments = (
        "--app-port",
        "8000",
        "--exclude-cidr",
        "10.0.0.0/8",
        "--exclude-cidr",
        "fd00::/8",
        "--exclude-uid",
        "7",
    )
    assert up(left, *arguments) == {"found": "absent", "changed": True}
    once = ruleset(left)
    assert once != others and "table inet pillion {" in once
    assert up(left, *arguments) == {"found": "current", "changed": False}
    assert ruleset(left) == once
    assert up(left, "--app-port", "8001")["found"] == "stale"
    assert up(left, *arguments)["found"] == "stale"
    assert up(left, *arguments, "--exclude-uid", "8") == {"found": "suitable", "changed": True}
    assert up(left, *arguments)["changed"] is True
    assert ruleset(left) == once

    removed = intercept(left, "down", "-o", "json")
    assert (removed.returncode, json.loads(removed.stdout)) == (0, {"removed": True})
    assert ruleset(left) == others
    again = intercept(left, "down", "-o", "json")
    assert (again.returncode, json.loads(again.stdout)) == (0, {"removed": False})
    assert ruleset(left) == others


def test_show_tells_what_is_in_place(left: Namespace) -> None:
    nothing = intercept(left, "show")
    assert nothing.returncode == 1 and "no interception" in nothing.stderr
    as_json = intercept(left, "show", "-o", "json")
    assert (as_json.returncode, json.loads(as_json.stdout)) == (1, {"installed": False})

    up(left, "--app-port", "8000", "--app-port", "6379", "--owner", "reviews", "--strict")
    table = intercept(left, "show")
    assert table.returncode == 0, table.stderr
    assert re.search(r"^outbound +all TCP +15001 +0$", table.stdout, re.M)
    assert re.search(r"^inbound +6379,8000 +15006 +0$", table.stdout, re.M)
    assert "owner reviews, strict yes" in table.stdout
    facts = json.loads(intercept(left, "show", "-o", "json").stdout)
    assert facts["inbound"] == {"port": 15006, "app_ports": [6379, 8000], "connections": 0}
    assert facts["outbound"]["port"] == 15001 and facts["owner"] == "reviews"
    assert any("table" in entry for entry in facts["nft"])


def test_a_foreign_table_is_refused_and_only_force_takes_it(left: Namespace) -> None:
    load(left, "table inet pillion { chain precious { tcp dport 1 accept; } ; }")
    before = ruleset(left)
    for verb in ("up", "down"):
        done = intercept(left, verb)
        assert done.returncode == 1
        assert "that pillion did not make" in done.stderr and "--force" in done.stderr
        assert ruleset(left) == before
    shown = intercept(left, "show")
    assert shown.returncode == 1 and "not made by pillion" in shown.stderr
    assert up(left, "--force") == {"found": "foreign", "changed": True}
    assert "precious" not in ruleset(left)

    load(left, "delete table inet pillion\ntable inet pillion { chain precious { tcp dport 1 accept; } ; }")
    assert intercept(left, "down", "--force").returncode == 0
    assert ruleset(left) == ""


def test_another_owners_interception_is_not_taken_over(left: Namespace) -> None:
    up(left, "--owner", "web")
    before = ruleset(left)
    done = intercept(left, "up", "--owner", "reviews")
    assert done.returncode == 1 and "belongs to 'web'" in done.stderr
    assert intercept(left, "down", "--owner", "reviews").returncode == 1
    assert ruleset(left) == before
    assert intercept(left, "down").returncode == 0
    assert ruleset(left) == ""


def test_a_load_that_is_killed_half_way_changes_nothing_and_is_repaired(left: Namespace) -> None:
    load(left, OTHERS)
    up(left, "--app-port", "8000")
    before = ruleset(left)
    text = render(InterceptConfig(app_ports=(9000,)))
    command = left.command(["nft", "-f", "-"])
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert process.stdin is not None
    process.stdin.write(text[: len(text) // 2].encode())
    process.stdin.flush()
    process.send_signal(signal.SIGKILL)
    process.stdin.close()
    process.wait()
    assert ruleset(left) == before


REPAIR = """
import sys
from sidecar.intercept.nft import repair
from sidecar.intercept.ruleset import InterceptConfig
change = repair(InterceptConfig(app_ports=(8000,)))
print(change.found.value, change.changed)
"""


def repair(where: Namespace) -> str:
    done = where.run([sys.executable, "-c", REPAIR], env={"PYTHONPATH": str(ROOT)})
    return done.stdout.strip() if done.returncode == 0 else done.stderr


def test_the_next_start_repairs_whatever_it_finds(left: Namespace) -> None:
    load(left, OTHERS)
    others = ruleset(left)
    assert repair(left) == "absent True"
    right = ruleset(left)
    assert repair(left) == "current False"  # as after kill -9: all is as it should be
    spoils = {
        "flush chain inet pillion output": "damaged True",
        "delete chain inet pillion prerouting": "damaged True",
        "add rule inet pillion output counter accept": "damaged True",
        "add chain inet pillion extra": "damaged True",
        "flush table inet pillion": "InterceptError",  # the marker went with the rules: it could be anybody's
        "delete table inet pillion": "absent True",
    }
    for spoil, said in spoils.items():
        load(left, spoil + "\n")
        assert said in repair(left), spoil
        if "InterceptError" in said:
            assert intercept(left, "up", "--force", "--app-port", "8000").returncode == 0
        assert ruleset(left) == right, spoil
    up(left, "--app-port", "9000")
    assert repair(left) == "stale True"
    assert ruleset(left) == right
    # What somebody else asked for and what serves as well is left alone, with what it excludes.
    up(left, "--app-port", "8000", "--app-port", "9000", "--exclude-uid", "5", "--strict")
    by_hand = ruleset(left)
    assert repair(left) == "suitable False"
    assert ruleset(left) == by_hand
    assert intercept(left, "down").returncode == 0
    assert ruleset(left) == others


# What cannot work says why


def test_without_the_capability(left: Namespace) -> None:
    require_root("setpriv")
    for verb in ("up", "down", "show"):
        done = intercept(left, verb, before=("setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin"))
        assert done.returncode == 1
        assert "CAP_NET_ADMIN" in done.stderr and "sudo pillion intercept" in done.stderr
        assert "Traceback" not in done.stderr
    assert ruleset(left) == ""


def test_an_ordinary_user(left: Namespace) -> None:
    require_root("setpriv")
    readable = os.stat(sys.executable).st_mode & 0o005 and os.access(ROOT, os.R_OK)
    if not readable or subprocess.run(
        ["setpriv", "--reuid=65534", "--clear-groups", *COMMAND, "--help"], cwd="/", env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
    ).returncode:  # fmt: skip
        pytest.skip("an ordinary user cannot read this checkout")
    done = intercept(left, "up", before=("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"))
    assert done.returncode == 1 and "CAP_NET_ADMIN" in done.stderr


def test_without_nft(left: Namespace) -> None:
    require_root("unshare", "mount")
    program = left.run(["sh", "-c", "readlink -f $(command -v nft)"]).stdout.strip()
    hide = f'mount --bind /dev/null {program} && exec "$@"'
    done = intercept(left, "up", before=("unshare", "-m", "sh", "-c", hide, "sh"))
    assert done.returncode == 1
    assert "the program nft was not found" in done.stderr and "apt install nftables" in done.stderr


# What it does to connections


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
def test_outbound_reaches_the_listener_with_its_original_destination(
    pair: tuple[Namespace, Namespace], family: str
) -> None:
    left, right = pair
    target = getattr(right, family)
    listen(left, 15001)
    listen(right, 8000)
    listen(right, 53)
    listen(right, 2222)
    up(left, "--exclude-port", "2222")
    captured = ask(left, target, 8000)
    assert captured["original"] == [target, 8000]
    assert captured["arrived"] == ["127.0.0.1" if family == "ipv4" else "::1", 15001]
    # Nobody need listen there: the sidecar is asked first.
    assert ask(left, target, 4321)["original"] == [target, 4321]
    # Left alone: the mark, DNS, what is excluded.
    assert ask(left, target, 8000, mark=0x70696C)["arrived"] == [target, 8000]
    assert ask(left, target, 53)["arrived"] == [target, 53]
    assert ask(left, target, 2222)["arrived"] == [target, 2222]
    shown = json.loads(intercept(left, "show", "-o", "json").stdout)
    assert shown["outbound"]["connections"] == 2
    assert intercept(left, "down").returncode == 0
    assert ask(left, target, 8000)["arrived"] == [target, 8000]


def test_a_listener_for_ipv6_alone_recovers_it_too(pair: tuple[Namespace, Namespace]) -> None:
    left, right = pair
    listen(left, 15001, "v6")
    up(left)
    assert ask(left, right.ipv6, 80)["original"] == [right.ipv6, 80]


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
def test_inbound_reaches_the_listener_with_its_original_destination(
    pair: tuple[Namespace, Namespace], family: str
) -> None:
    left, right = pair
    target = getattr(right, family)
    listen(right, 15006)
    listen(right, 8000)
    listen(right, 8001)
    up(right, "--app-port", "8000")
    captured = ask(left, target, 8000)
    assert (captured["original"], captured["arrived"]) == ([target, 8000], [target, 15006])
    # Not an application's port; and the sidecar's own port, dialled as such, has itself for a destination.
    assert ask(left, target, 8001)["arrived"] == [target, 8001]
    direct = ask(left, target, 15006)
    assert direct["original"] in (direct["arrived"], None) and direct["arrived"] == [target, 15006]


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
def test_loopback_and_the_own_addresses_are_left_alone(left: Namespace, family: str) -> None:
    listen(left, 8000)
    listen(left, 15001)
    up(left, "--app-port", "8000")
    loopback = "127.0.0.1" if family == "ipv4" else "::1"
    for host in (loopback, getattr(left, family)):
        assert ask(left, host, 8000)["arrived"] == [host, 8000]
    direct = ask(left, loopback, 15001)
    assert direct["original"] in (direct["arrived"], None), "a connection to the sidecar itself must look like one"


def test_excluded_users_and_networks_are_left_alone(pair: tuple[Namespace, Namespace]) -> None:
    require_root("setpriv")
    left, right = pair
    listen(left, 15001)
    listen(right, 8000)
    up(left, "--exclude-uid", "4242", "--exclude-gid", "4243", "--exclude-cidr", f"{right.ipv6}/128")

    def arrived(host: str, *who: str) -> int:
        command = ["setpriv", *who, "--clear-groups", "/usr/bin/python3", "-c", CLIENT, host, "8000", "0"]
        done = left.run(command if who else [sys.executable, "-c", CLIENT, host, "8000", "0"])
        assert done.returncode == 0, done.stderr
        return int(json.loads(done.stdout)["arrived"][1])

    if Path("/usr/bin/python3").exists():
        assert arrived(right.ipv4, "--reuid=4242", "--regid=1") == 8000
        assert arrived(right.ipv4, "--reuid=1", "--regid=4243") == 8000
        assert arrived(right.ipv4, "--reuid=1", "--regid=1") == 15001
    assert arrived(right.ipv4) == 15001
    assert arrived(right.ipv6) == 8000


def enter(where: Namespace) -> None:
    """Move the calling thread into the namespace."""
    with Path(f"/run/netns/{where.name}").open() as handle:
        assert ctypes.CDLL(None, use_errno=True).setns(handle.fileno(), 0x40000000) == 0  # CLONE_NEWNET


def talk(pair: tuple[Namespace, Namespace], *steps: Callable[[], object], captured: bool) -> list[bytes]:
    """A connection from left to right, or captured on its way: what passes both ways at first and after each step."""
    left, right = pair
    heard: list[bytes] = []

    def connection() -> None:
        where, address = (left, ("127.0.0.1", 15001)) if captured else (right, (right.ipv4, 8000))
        enter(where)
        with socket.create_server(address) as listener:
            enter(left)
            with socket.create_connection((right.ipv4, 8000), timeout=2) as client:
                server, _ = listener.accept()
                with server:
                    server.settimeout(2)
                    for step in (lambda: None, *steps):
                        step()
                        client.sendall(b"there")
                        heard.append(server.recv(100))
                        server.sendall(b"back")
                        heard.append(client.recv(100))

    thread = threading.Thread(target=connection)
    thread.start()
    thread.join(30)
    return heard


def test_a_connection_older_than_the_table_goes_on(pair: tuple[Namespace, Namespace]) -> None:
    heard = talk(pair, lambda: up(pair[0]), lambda: intercept(pair[0], "down"), captured=False)
    assert heard == [b"there", b"back"] * 3


def test_a_captured_connection_outlives_a_replacement_of_the_table(pair: tuple[Namespace, Namespace]) -> None:
    left, _ = pair
    up(left)
    steps = (lambda: up(left), lambda: up(left, "--app-port", "8000", "--exclude-uid", "5"))
    assert talk(pair, *steps, captured=True) == [b"there", b"back"] * 3


def test_leftovers_of_a_killed_run_are_removed() -> None:
    require_root()
    code = """
import os
from support.netns import wired
with wired() as (left, right):
    print(left.name, right.name, flush=True)
    os.kill(os.getpid(), 9)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
    )
    names = done.stdout.split()
    assert len(names) == 2, done.stderr
    assert all(Path("/run/netns", name).exists() for name in names)
    remove_leftovers()
    assert not any(Path("/run/netns", name).exists() for name in names)
