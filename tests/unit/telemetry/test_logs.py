"""The sidecar's own log: its two forms, what is redacted, and the limits on floods."""

import json
import logging
import os
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.telemetry.logs import MESSAGE_CHARS_MAX, ONCE_KEYS_MAX, TRACE_CHARS_MAX, Formatter, Logs, OncePer, redact

PEM = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIA\n-----END PRIVATE KEY-----"
JWT = "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJ4In0.c2lnbmF0dXJl"  # a made-up one


def record(message: str, *args: object, level: int = logging.INFO) -> logging.LogRecord:
    made = logging.LogRecord("sidecar.proxy", level, "reactor.py", 7, message, args, None)
    made.created = 1_700_000_000.5
    return made


def failed(message: str) -> logging.LogRecord:
    made = record("it failed", level=logging.ERROR)
    try:
        raise RuntimeError(message)
    except RuntimeError as error:
        made.exc_info = (type(error), error, error.__traceback__)
    return made


def test_a_text_line() -> None:
    line = Formatter("text").line(record("listening on %s", "127.0.0.1:80"))
    assert line == b"2023-11-14T22:13:20.500Z info    sidecar.proxy: listening on 127.0.0.1:80\n"


def test_a_json_line() -> None:
    fields = json.loads(Formatter("json").line(record("grüße\n%d", 1)))
    assert fields == {
        "time": "2023-11-14T22:13:20.500Z",
        "level": "info",
        "logger": "sidecar.proxy",
        "message": "grüße\n1",
    }


def test_a_traceback_follows_indented_or_as_a_field() -> None:
    text = Formatter("text").line(failed("boom\nforged 2023-11-14 line\x1b[2J")).decode()
    first, *others = text.splitlines()
    assert first.endswith("error   sidecar.proxy: it failed")
    assert others
    assert all(other.startswith("    ") for other in others)
    assert "\x1b" not in text
    assert "boom" in json.loads(Formatter("json").line(failed("boom")))["exception"]


@given(st.text(max_size=100))
def test_a_message_is_one_line_whatever_it_holds(message: str) -> None:
    for style in ("text", "json"):
        line = Formatter(style).line(record("%s", message)).decode()
        assert len(line.splitlines()) == 1
        assert line.endswith("\n")
        assert not any(ord(char) < 0x20 or 0x7F <= ord(char) < 0xA0 for char in line[:-1])


def test_huge_messages_and_tracebacks_are_cut() -> None:
    for made in (record("x" * 10**6), failed("y" * 10**6)):
        assert len(Formatter("json").line(made)) < MESSAGE_CHARS_MAX + TRACE_CHARS_MAX


@pytest.mark.parametrize(
    ("text", "secret", "rest"),
    [
        (f"key {PEM} of web", "MC4CAQAwBQYDK2VwBCIEIA", "key [PRIVATE KEY redacted] of web"),
        (f"key {PEM[:45]}", "MC4C", "key [PRIVATE KEY redacted]"),
        (PEM[30:] + " of web", "MC4CAQAwBQYDK2VwBCIEIA", "[PEM block redacted]PRIVATE KEY----- of web"),
        (repr(PEM), "MC4CAQAwBQYDK2VwBCIEIA", "'[PRIVATE KEY redacted]'"),
        (f"got {JWT}!", "c2lnbmF0dXJl", "got [token redacted]!"),
        ("Authorization: Bearer abc.def-123456", "abc.def-123456", "Authorization: Bearer [redacted]"),
        ("basic dXNlcjpwYXNz", "dXNlcjpwYXNz", "basic [redacted]"),
        ("join_token=hunter2 for web", "hunter2", "join_token=[redacted] for web"),
        ("{'password': 'hunter2', 'a': 1}", "hunter2", "{'password': '[redacted]', 'a': 1}"),
        ('{"token": "hunter2"}', "hunter2", '{"token": "[redacted]"}'),
        ("GET /?api_key=hunter2&b=c", "hunter2", "GET /?api_key=[redacted]&b=c"),
    ],
)
def test_secrets_are_redacted(text: str, secret: str, rest: str) -> None:
    assert redact(text) == rest
    for style in ("text", "json"):
        assert secret.encode() not in Formatter(style).line(record("%s", text))
        assert secret.encode() not in Formatter(style).line(failed(text))


@pytest.mark.parametrize(
    "text",
    [
        "token bucket is full",
        "reading token_file=/run/token",
        "basic checks passed",
        "the bearer of this has no rights",
        "a secret was read from /etc/x",
    ],
)
def test_ordinary_messages_stay(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize(
    "piece", ["a-", "eyJ-", "eyJaaaaa.", "token ", "token=[", "bearer ", "-----BEGIN A-----", "-----BEGIN ", "\n"]
)
def test_no_text_makes_redaction_slow(piece: str) -> None:
    text = f"token secret {piece * 16_384}"[:16_384]
    begun = time.process_time()
    redact(text)
    assert time.process_time() - begun < 0.25  # quadratic ones take seconds


def test_once_per_counts_what_it_swallows() -> None:
    now = [0.0]
    once_per = OncePer(lambda: now[0])
    assert once_per("a", 10) == 1
    assert [once_per("a", 10) for _ in range(5)] == [0] * 5
    assert once_per("b", 10) == 1
    now[0] = 9.9
    assert once_per("a", 10) == 0
    now[0] = 10.0
    assert once_per("a", 10) == 7
    assert once_per("a", 10) == 0
    now[0] = 20.0
    assert once_per("a", 10) == 2


def test_once_per_remembers_a_bounded_number_of_keys() -> None:
    once_per = OncePer(lambda: 0.0)
    for number in range(5 * ONCE_KEYS_MAX):
        assert once_per(str(number), 10) == 1
    assert len(once_per._seen) == ONCE_KEYS_MAX


def make_logs(path: Path, *, style: str = "text", level: str = "info") -> tuple[Logs, logging.Logger]:
    root = logging.Logger("root")  # a tree of its own: the process's is pytest's
    root.manager = logging.Manager(root)  # type: ignore[arg-type]
    return Logs(clock=lambda: 0.0, target=str(path), style=style, level=level, root=root), root


def test_the_level_changes_at_run_time_and_libraries_stay_quiet(tmp_path: Path) -> None:
    logs, root = make_logs(tmp_path / "log")
    own, library = root.getChild("sidecar").getChild("proxy"), root.getChild("httpx")
    own.debug("one")
    library.info("two")
    logs.set_level("debug")
    own.debug("three")
    library.info("four")
    logs.set_level("ERROR")
    own.warning("five")
    library.warning("six")
    with pytest.raises(ValueError, match="give one of debug, info, warning, error"):
        logs.set_level("loud")
    assert logs.level == "error"
    assert logs.close(10)
    assert [line.rpartition(" ")[2] for line in (tmp_path / "log").read_text().splitlines()] == ["three", "six"]
    assert not root.handlers


def test_arguments_that_do_not_fit_name_the_place_and_raise_nothing(tmp_path: Path) -> None:
    logs, root = make_logs(tmp_path / "log")
    root.getChild("sidecar").warning("%d", "not a number")
    assert logs.close(10)
    assert "could not be rendered" in (tmp_path / "log").read_text()
    assert "test_logs.py:" in (tmp_path / "log").read_text()


def test_drops_are_counted_and_told_of() -> None:
    reading, writing = os.pipe()
    root = logging.Logger("root")
    root.manager = logging.Manager(root)  # type: ignore[arg-type]
    logs = Logs(clock=lambda: 0.0, target=writing, root=root, style="json")
    logger = root.getChild("sidecar")
    while not logs.dropped:
        logger.warning("x" * 2000)
    received = bytearray()

    def read_all() -> None:
        while part := os.read(reading, 65_536):
            received.extend(part)

    reader = threading.Thread(target=read_all)
    reader.start()
    assert logs.close(10)
    os.close(writing)
    reader.join()
    os.close(reading)
    messages = [json.loads(line)["message"] for line in received.splitlines()]
    assert [message for message in messages if "x" not in message] == [
        "log records dropped: 1; nobody reads the log fast enough"
    ]


def test_settings_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give text or json"):
        make_logs(tmp_path / "log", style="xml")
    with pytest.raises(ValueError, match="unknown log level 'loud'"):
        make_logs(tmp_path / "log", level="loud")
