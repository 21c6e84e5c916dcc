"""The control plane's benchmark: the mesh that it simulates, its reader of answers, the forms of its results."""

import json

import pytest
from bench.control.http1 import Answers, Broken, Lines, post
from bench.control.plan import USED, Plan, Sizes
from bench.control.report import BEGIN, END, Column, as_json, from_json, markdown, replace_between_marks, terminal
from hypothesis import given
from hypothesis import strategies as st

from sidecar.model.load import load_texts

WHOLE = Plan(Sizes(1000, 1000, 10_000))


def test_the_mesh_is_of_the_size_asked_for() -> None:
    assert sum(len(WHOLE.addresses(service)) for service in range(1000)) == 9000
    assert {len(WHOLE.used_by(sidecar)) for sidecar in range(1000)} <= {USED, USED - 1}
    assert all(WHOLE.service_of(sidecar) not in WHOLE.used_by(sidecar) for sidecar in range(1000))
    assert len({WHOLE.address_of(sidecar) for sidecar in range(1000)}) == 1000
    assert (len(WHOLE.users[1]), len(WHOLE.users[2])) == (100, 999)
    assert {len(WHOLE.users[service]) for service in WHOLE.ordinary()} <= set(range(USED - 2, USED + 1))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (4, 2, 9), (30, 10, 30), (60, 60, 600)])
def test_any_size_gives_a_valid_policy(sizes: tuple[int, int, int]) -> None:
    plan = Plan(Sizes(*sizes))
    loaded = load_texts(plan.files(services_a_file=7))
    assert loaded.problems == ()
    assert loaded.snapshot is not None and len(loaded.snapshot.services) == sizes[1]
    static = sum(len(service.endpoints) for service in loaded.snapshot.services.values())
    assert static + sizes[0] == sizes[2]
    for sidecar in range(sizes[0]):
        called = plan.called_by(plan.service_of(sidecar))
        assert {*called, *plan.asked_by(sidecar)} == {*called, *plan.used_by(sidecar)}


@pytest.mark.parametrize("sizes", [(0, 0, 0), (5, 6, 10), (5, 5, 4)])
def test_sizes_that_make_no_mesh_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="at least"):
        Sizes(*sizes)


STREAM = (
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nab\nc\r\n5;x=y\r\nd\n\r\ne\r\n0\r\nt: 1\r\n\r\n"
    b"HTTP/1.1 503 Unavailable\r\ncontent-length: 0\r\n\r\n"
    b"HTTP/1.1 410 Gone\r\nCONTENT-LENGTH: 3\r\n\r\nabc"
)


@given(st.lists(st.integers(1, 40)))
def test_answers_do_not_depend_on_how_they_are_cut(cuts: list[int]) -> None:
    said: list[object] = []
    body: list[bytes] = []

    def end() -> None:
        said.append(b"".join(body))
        body.clear()

    answers = Answers(said.append, body.append, end)
    at = 0
    for size in [*cuts, len(STREAM)]:
        answers.feed(STREAM[at : at + size])
        at += size
    assert said == [200, b"{}", 200, b"ab\ncd\n\r\ne", 503, b"", 410, b"abc"]


@pytest.mark.parametrize("data", [b"nonsense\r\n\r\n", b"x" * 70_000])
def test_what_is_no_answer_is_said_to_be_none(data: bytes) -> None:
    with pytest.raises(Broken):
        Answers(lambda status: None, lambda data: None, lambda: None).feed(data)


@given(st.lists(st.binary(max_size=5)))
def test_lines_do_not_depend_on_how_they_are_cut(pieces: list[bytes]) -> None:
    lines = Lines()
    found = [line for piece in pieces for line in lines.feed(piece)]
    assert found == b"".join(pieces).split(b"\n")[:-1]


def test_a_request_is_whole() -> None:
    assert post("/v1/ack", "a.mesh", b"{}").endswith(b"\r\ncontent-length: 2\r\n\r\n{}")


COLUMNS = [
    Column("embedded", 250, {"change.p99": 2000.0, "memory": 100.0}, {}),
    Column("embedded", 1000, {"change.p99": 1500.0, "memory": 250.0, "restart": 3.0}, {"restart": ["two are missing"]}),
    Column("etcd", 1000, {"change.p99": 120.0, "memory": 250.0}, {"reconnect": ["nobody came"]}, ["3 times a stream"]),
]


def test_the_largest_mesh_is_held_against_the_bars() -> None:
    text = markdown(COLUMNS, ["a note"])
    assert "| an endpoint, any change: p99, ms | 2\N{NO-BREAK SPACE}000 | 1\N{NO-BREAK SPACE}500 | 120 | ≤ 1" in text
    assert "≤ 300: reached" in text
    assert "3.00 (!)" in text
    said = terminal(COLUMNS, [])
    assert "embedded, 1\N{NO-BREAK SPACE}000: an endpoint, any change: p99" in said
    assert "embedded, 250: an endpoint" not in said
    for wrong in ("restart: two are missing", "reconnect: nobody came", "3 times a stream"):
        assert wrong in said


def test_results_survive_being_written() -> None:
    assert from_json(json.loads(json.dumps(as_json(COLUMNS, {})))) == COLUMNS


def test_only_what_is_between_the_marks_is_replaced() -> None:
    page = f"before\n{BEGIN}\nold\n{END}\nafter"
    assert replace_between_marks(page, "new") == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter"
    with pytest.raises(ValueError, match="once each"):
        replace_between_marks("no marks", "new")
