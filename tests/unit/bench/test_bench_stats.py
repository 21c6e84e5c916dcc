"""The benchmark's arithmetic, its readers of other programs' output, and the forms of its results. Nothing is timed."""

import json

import pytest
from bench import envoy, policy, stage
from bench.bulk import body_length
from bench.open_loop import is_whole
from bench.rows import SECTIONS, Context, in_turn
from bench.stats import (
    Summary,
    Unreadable,
    WrkReport,
    better_of,
    lost_or_repeated,
    paired_ratios,
    parse_proc_stat,
    parse_proc_status,
    parse_stub_status,
    parse_wrk,
    percentile,
    summarize,
)
from bench.table import BEGIN, END, Bar, Group, Row, as_json, from_json, markdown, replace_between_marks, terminal

from sidecar.model.load import load_texts

WRK = """Running 2s test @ http://127.0.0.1:8080/
  1 threads and 32 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     1.31ms  310.15us   9.55ms   90.84%
    Req/Sec    24.57k     1.07k   26.00k    85.00%
  48897 requests in 2.00s, 8.63MB read
Requests/sec:  24437.31
Transfer/sec:      4.31MB
"""


def test_a_summary_is_the_median_and_the_ends() -> None:
    assert summarize([3.0, 1.0, 8.0]) == Summary(3.0, 1.0, 8.0, 3)
    assert summarize([4.0, None, 2.0]) == Summary(3.0, 2.0, 4.0, 2)
    assert summarize([]) is None and summarize([None]) is None


def test_ratios_are_taken_within_a_round() -> None:
    # The machine was twice as slow in the second round; the ratio does not notice.
    assert paired_ratios([50.0, 100.0], [100.0, 200.0]) == [0.5, 0.5]
    assert paired_ratios([50.0, None, 30.0], [None, 10.0, 60.0]) == [0.5]
    assert paired_ratios([1.0, 1.0], [0.0, -2.0]) == []


def test_the_better_rival_is_that_with_the_better_median() -> None:
    series: dict[str, list[float | None]] = {"a": [9.0, 2.0, 3.0], "b": [4.0, 4.0, 4.0], "c": [None]}
    assert better_of(series, ["a", "b"], lower=True) == "a"
    assert better_of(series, ["a", "b"], lower=False) == "b"
    assert better_of(series, ["c", "d"], lower=True) is None


@pytest.mark.parametrize(("percent", "value"), [(50, 50), (99, 99), (100, 100), (0, 1), (0.5, 1)])
def test_a_percentile_is_a_value_that_was_seen(percent: float, value: float) -> None:
    assert percentile(list(range(100, 0, -1)), percent) == value


def test_what_wrk_prints() -> None:
    assert parse_wrk(WRK) == WrkReport(48897, 0, 0)
    bad = WRK + "  Socket errors: connect 1, read 20, write 300, timeout 4000\n  Non-2xx or 3xx responses: 7\n"
    assert parse_wrk(bad) == WrkReport(48897, 7, 4321)
    assert parse_wrk(bad).errors == 4328
    with pytest.raises(Unreadable, match="unable to connect"):
        parse_wrk("unable to connect to 127.0.0.1:1 Connection refused\n")


def test_the_kernels_accounts() -> None:
    stat = "4711 (odd) name (x)) S " + " ".join(str(number) for number in range(1, 50))
    assert parse_proc_stat(stat, 100) == (0.11, 0.12)
    memory = parse_proc_status("Name:\tx\nVmPeak:\t 900 kB\nVmHWM:\t  30 kB\nVmRSS:\t   20 kB\n")
    assert (memory.resident, memory.peak) == (20480, 30720)
    with pytest.raises(Unreadable):
        parse_proc_stat("1 (x) S", 100)
    with pytest.raises(Unreadable):
        parse_proc_status("Name: a zombie has no memory\n")


def test_what_nginx_counts() -> None:
    text = "Active connections: 3 \nserver accepts handled requests\n 12 12 3456 \nReading: 0 Writing: 1 Waiting: 2 \n"
    assert parse_stub_status(text) == 3456
    with pytest.raises(Unreadable):
        parse_stub_status("404 Not Found")


@pytest.mark.parametrize(
    ("requests", "bad", "served", "odd"),
    [
        (1000, 0, 1000, 0),
        (1000, 0, 1032, 0),  # stopped in the middle of 32
        (1000, 0, 1100, 36),  # more than that were sent twice
        (1000, 0, 990, 10),  # answered by somebody else
        (1000, 10, 990, 0),  # refusals are counted as such already
    ],
)
def test_requests_that_the_backend_has_not_seen_once(requests: int, bad: int, served: int, odd: int) -> None:
    assert lost_or_repeated(WrkReport(requests, bad, 0), served, 32) == odd


def groups() -> list[Group]:
    envoys = ("Envoy HTTP/1.1", "Envoy HTTP/2")
    cpu = Row("mesh-cpu.32", "CPU a request", "µs", bars=(Bar(0.9, envoys[:1]), Bar(0.8, envoys)), rivals=envoys)
    for ours, http1, http2 in ((60.0, 80.0, 50.0), (54.0, 72.0, 60.0), (63.0, 84.0, 70.0)):
        for name, value in (("Envoy HTTP/1.1", http1), ("Envoy HTTP/2", http2), ("pillion", ours)):
            cpu.add(name, value)
    ready = Row("start.1.ready", "ready", "ms", digits=0, bars=(Bar(300.0),))
    ready.add("pillion", 1234.5)
    ready.add("Envoy", None, errors=3)
    return [Group("Two hops", [cpu], "A note."), Group("Start", [ready])]


def test_a_row_is_held_against_its_bars() -> None:
    row = groups()[0].rows[0]
    easy, hard = row.bars
    assert row.reached(easy) is True and row.reached(hard) is False
    assert row.ratio("Envoy HTTP/1.1") == Summary(0.75, 0.75, 0.75, 3)
    assert row.judged_by(hard) == row.ratio("Envoy HTTP/2")
    assert Row("x", "x", "", bars=(easy,)).reached(easy) is None
    fast = Row("x", "x", "", lower_is_better=False, bars=(Bar(0.9, ("a",)),))
    fast.add("pillion", 95.0)
    fast.add("a", 100.0)
    assert fast.reached(fast.bars[0]) is True


def test_the_table_in_markdown() -> None:
    lines = markdown(groups(), ["somewhere"]).splitlines()
    assert lines[0] == "- somewhere"
    assert (
        "| | pillion | Envoy HTTP/1.1 | Envoy HTTP/2 | ÷ Envoy HTTP/1.1 | ÷ Envoy HTTP/2 | bar |".replace(
            "| |", "|  |", 1
        )
        in lines
    )
    row = next(line for line in lines if line.startswith("| CPU a request, µs"))
    assert "| 60.0 (54.0\N{EN DASH}63.0) |" in row and "0.75 (0.75\N{EN DASH}0.75)" in row
    assert "≤ 0.9 of Envoy HTTP/1.1: reached; ≤ 0.8 of the better: **missed**" in row
    start = next(line for line in lines if line.startswith("| ready"))
    assert "| 1\N{NO-BREAK SPACE}234 | failed (3 errors!) | ≤ 300: **missed** |" in start


def test_the_terminal_says_where_it_falls_short_and_what_failed() -> None:
    text = terminal(groups(), [])
    assert "1 of 3 bars reached." in text
    assert "mesh-cpu.32: CPU a request: 0.90, the bar is ≤ 0.8 of the better" in text
    assert "start.1.ready: ready: 1\N{NO-BREAK SPACE}234 ms, the bar is ≤ 300 ms" in text
    assert "start.1.ready: ready: 3 through Envoy" in text


def test_results_survive_json() -> None:
    before = groups()
    text = json.dumps(as_json(before, {"cores": 2}), allow_nan=False)
    after = from_json(json.loads(text))
    assert markdown(after, []) == markdown(before, [])


def test_tables_are_replaced_between_the_marks_only() -> None:
    page = f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n"
    assert replace_between_marks(page, "new\n") == f"before\n\n{BEGIN}\n\nnew\n\n{END}\n\nafter\n"
    for broken in ("", BEGIN, f"{END}{BEGIN}", f"{page}{page}"):
        with pytest.raises(ValueError, match="once each"):
            replace_between_marks(broken, "new")


def test_every_round_begins_with_another_contender() -> None:
    assert [in_turn(["a", "b", "c"], number) for number in range(4)] == [
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
        ["a", "b", "c"],
    ]


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [("", True), ("mesh-cpu", True), ("mesh-cpu.32", True), ("mesh-cpu.32.rate", True), ("mesh-cpu.3", False)],
)
def test_rows_are_chosen_by_name(asked: str, wanted: bool) -> None:
    context = Context(None, None, None, None, (asked,) if asked else ())  # type: ignore[arg-type]
    assert context.wants("mesh-cpu.32") is wanted
    assert set(SECTIONS) >= {"mesh-cpu", "bulk", "start"}


def test_missing_programs_are_all_named_with_what_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = (stage.Tool("no-such-program", "apt-get install it"), stage.Tool("nor-this-one", "pip install that"))
    monkeypatch.setattr(stage, "TOOLS", missing)
    with pytest.raises(stage.BenchError) as caught:
        stage.find_tools()
    assert "no-such-program: apt-get install it" in str(caught.value)
    assert "nor-this-one: pip install that" in str(caught.value)


def test_responses_are_recognized_when_whole() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n"
    assert [is_whole(head[:-1]), is_whole(head + b"ab"), is_whole(head + b"abc")] == [False, False, True]
    assert body_length(b"PUT / HTTP/1.1\r\ncontent-length: 12") == 12
    assert body_length(b"GET / HTTP/1.1\r\nHost: x") == 0


def test_pillion_accepts_the_policy_without_a_warning() -> None:
    services = policy.many_services(policy.Service("reviews", (("127.0.0.1", 80),), mesh=False), 20, 10)
    texts = {f"{number}.yaml": text for number, text in enumerate(policy.pillion(services))}
    loaded = load_texts(texts)
    assert not loaded.problems and loaded.snapshot is not None
    assert len(loaded.snapshot.services) == 21  # and the caller


def test_envoy_is_configured_with_as_many_services(tmp_path: object) -> None:
    services = policy.many_services(policy.Service("reviews", (("127.0.0.1", 80),), mesh=False), 20, 10)
    config = envoy.outbound(8080, services, stage.Path("/nowhere"), "web")["static_resources"]
    assert len(config["clusters"]) == 20
    assert ["transport_socket" in cluster for cluster in config["clusters"]] == [False, *([True] * 19)]
    hosts = config["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]["route_config"]["virtual_hosts"]
    assert [len(host["routes"]) for host in hosts] == [2] * 20
