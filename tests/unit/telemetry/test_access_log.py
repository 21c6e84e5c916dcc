"""The access log's lines: what they hold, that no value can forge one, and that the queue stays small."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.telemetry.access_log import (
    CROWDED_RECORDS,
    PATH_BYTES_MAX,
    TEXT_BYTES_MAX,
    AccessLog,
    HttpRecord,
    Renderer,
    TcpRecord,
)
from sidecar.telemetry.writer import QUEUE_MAX, SinkError

TIME_S = 1_700_000_000.0456


def http_record(
    *,
    path: bytes = b"/reviews/7",
    method: bytes = b"GET",
    user_agent: bytes = b"curl/8",
    request_id: bytes = b"r-1",
    version: str = "v2",
    caller: str = "spiffe://mesh/service/web",
    rule: str = "services.reviews.authz.allow[0] (mesh.yaml:37)",
    grpc_status: str = "",
) -> HttpRecord:
    return (
        "in", "reviews", "canary", version, rule, caller, "10.0.0.9:4711", method, path, 200, "ok", 1, 0.0123456,
        10, 36, b"0af7651916cd43dd8448eb211c80319c", request_id, "127.0.0.1:8000", user_agent, grpc_status,
    )  # fmt: skip


TCP: TcpRecord = (
    "out", "redis", "", "spiffe://mesh/service/web", "127.0.0.1:5000", "ok", 2.5, 100, 200, "10.0.0.1:6379",
)  # fmt: skip


def test_the_fields_of_a_request() -> None:
    line = Renderer()((TIME_S, http_record(), ()))
    assert line.endswith(b"}\n")
    assert list(json.loads(line).items()) == [
        ("time", "2023-11-14T22:13:20.045Z"),
        ("protocol", "http"),
        ("side", "in"),
        ("service", "reviews"),
        ("route", "canary"),
        ("version", "v2"),
        ("rule", "services.reviews.authz.allow[0] (mesh.yaml:37)"),
        ("caller", "spiffe://mesh/service/web"),
        ("peer", "10.0.0.9:4711"),
        ("method", "GET"),
        ("path", "/reviews/7"),
        ("status", 200),
        ("reason", "ok"),
        ("attempts", 1),
        ("duration_ms", 12.346),
        ("request_bytes", 10),
        ("response_bytes", 36),
        ("trace_id", "0af7651916cd43dd8448eb211c80319c"),
        ("request_id", "r-1"),
        ("upstream", "127.0.0.1:8000"),
        ("user_agent", "curl/8"),
    ]


def test_a_grpc_call_has_its_status_behind_that_of_http() -> None:
    fields = list(json.loads(Renderer()((TIME_S, http_record(grpc_status="NOT_FOUND"), ()))).items())
    at = fields.index(("grpc_status", "NOT_FOUND"))
    assert fields[at - 1] == ("status", 200) and fields[at + 1] == ("reason", "ok")


def test_the_fields_of_a_tcp_connection() -> None:
    assert list(json.loads(Renderer()((TIME_S, TCP))).items()) == [
        ("time", "2023-11-14T22:13:20.045Z"),
        ("protocol", "tcp"),
        ("side", "out"),
        ("service", "redis"),
        ("caller", "spiffe://mesh/service/web"),
        ("peer", "127.0.0.1:5000"),
        ("reason", "ok"),
        ("duration_ms", 2500.0),
        ("request_bytes", 100),
        ("response_bytes", 200),
        ("upstream", "10.0.0.1:6379"),
    ]


def test_absent_texts_are_left_out_and_queries_do_not_appear() -> None:
    fields = json.loads(Renderer()((0.0, http_record(user_agent=b"", version="", path=b"/a?token=s"), ())))
    assert "user_agent" not in fields
    assert "version" not in fields
    assert fields["path"] == "/a"
    assert json.loads(Renderer(with_query=True)((0.0, http_record(path=b"/a?b=c"), ())))["path"] == "/a?b=c"


@given(st.binary(max_size=50), st.binary(max_size=50), st.text(max_size=50))
def test_no_value_can_forge_a_line(path: bytes, user_agent: bytes, caller: str) -> None:
    renderer = Renderer(with_query=True)
    record = http_record(path=path, user_agent=user_agent, caller=caller)
    for _ in range(2):  # the second time from what is known already
        line = renderer((TIME_S, record, ()))
        assert all(0x20 <= byte < 0x7F for byte in line[:-1])
        assert line[-1:] == b"\n"
        fields = json.loads(line, object_pairs_hook=lambda pairs: pairs)
        names = [name for name, _ in fields]
        assert len(names) == len(set(names))
        assert dict(fields).get("path", "") == path.decode("utf-8", "backslashreplace")
        assert dict(fields).get("caller", "") == caller
        assert dict(fields)["status"] == 200


def test_controls_and_invalid_utf8_are_escaped() -> None:
    line = Renderer()((0.0, http_record(path=b'/a\r\n{"x":1}\x1b[2J\xff\xe2\x80\xae"'), ()))
    assert line.count(b"\n") == 1
    assert b"\x1b" not in line
    assert json.loads(line)["path"] == '/a\r\n{"x":1}\x1b[2J\\xff\u202e"'


def test_what_is_remembered_is_bounded() -> None:
    renderer = Renderer()
    for number in range(10_000):
        fields = json.loads(renderer((0.0, http_record(user_agent=b"%d" % number), ())))
        assert fields["user_agent"] == str(number)
    assert len(renderer._known) <= 2048


def read_lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_huge_values_are_cut_and_the_line_says_so(tmp_path: Path) -> None:
    access = AccessLog(str(tmp_path / "log"), lambda: TIME_S)
    access.http(http_record(path=b"/" + b"p" * 8000, user_agent=b"u" * 60_000, request_id=b"i" * 9000))
    access.http(http_record(path=b"/" + b"p" * 300))
    access.http(http_record(method=b"M" * 5000))
    access.tcp(TCP)
    assert access.close(10)
    first, second, third, fourth = read_lines(tmp_path / "log")
    assert first["path"] == "/" + "p" * (PATH_BYTES_MAX - 1)
    assert first["user_agent"] == "u" * TEXT_BYTES_MAX
    assert first["request_id"] == "i" * TEXT_BYTES_MAX
    assert first["truncated"] == ["path", "request_id", "user_agent"]
    assert second["path"] == "/" + "p" * 300
    assert "truncated" not in second
    assert third["method"] == "M" * 32
    assert fourth["protocol"] == "tcp"
    assert access.dropped == 0


def test_a_queue_that_nobody_empties_is_bounded_in_records_and_bytes() -> None:
    reading, writing = os.pipe()
    access = AccessLog(writing, lambda: TIME_S)
    huge = http_record(path=b"/" + b"p" * 8000, user_agent=b"u" * 60_000)
    sent = 0
    while access.dropped < 10:
        access.http(huge)
        sent += 1
    assert len(access._queue) <= QUEUE_MAX
    queued = [entry for entry in access._queue.copy() if len(entry) == 3]  # a copy: the writer's thread is at work
    held = sum(len(entry[1][8]) + len(entry[1][18]) for entry in queued)
    assert held < 8e6
    assert sum(len(entry[1][8]) > TEXT_BYTES_MAX for entry in queued) <= CROWDED_RECORDS
    assert not access.close(0.1)
    os.close(writing)
    written = 0
    while part := os.read(reading, 65_536):
        written += part.count(b"\n")
    assert written + access.dropped == sent
    os.close(reading)


def test_the_setting_of_the_command_line(tmp_path: Path) -> None:
    off = AccessLog.of("off", lambda: 0.0)
    assert not off.enabled
    off.http(http_record())
    off.tcp(TCP)
    off.reopen()
    assert off.dropped == 0
    assert off.close()
    file = AccessLog.of(str(tmp_path / "log"), lambda: 0.0)
    assert file.enabled
    file.http(http_record())
    file.reopen()
    assert file.close(10)
    assert len(read_lines(tmp_path / "log")) == 1
    with pytest.raises(SinkError, match="stdout, or off"):
        AccessLog.of("", lambda: 0.0)
    with pytest.raises(SinkError, match="cannot open"):
        AccessLog.of(str(tmp_path), lambda: 0.0)
