"""What is said of a run: objectives, numbers, text, JSON and picture."""

import json
from xml.etree import ElementTree

import pytest
from support.scenarios import pair, read, run

from sidecar.simulate.objectives import judge
from sidecar.simulate.picture import svg_of
from sidecar.simulate.record import Change, open_spans, percentile, share_open
from sidecar.simulate.report import comparison, json_of, percent, seconds, sparkline, text_of

OUTAGE = pair(
    "{retry: {max_retries: 0}}",
    "{latency: {p50: 10ms, p99: 40ms}, endpoints: 2}",
    "{from: web, to: reviews, rate: 100}",
    [
        "outages: [{at: 20s, for: 10s, service: reviews, endpoint: reviews-1, errors: {rate: 100%}}]",
        "objectives:",
        "  - {success_effective: 90%, success_actual: 90%, p50: 50ms, p99: 1s, amplification: 1, openings: 100}",
        "  - {success_effective: 100%, after: 45s}",
        "  - {success_effective: 100%, after: 20s, before: 30s}",
        "  - {p99: 1ms, service: reviews}",
        "  - {openings: 0, service: web}",
    ],
)


def test_objectives_are_judged_as_a_whole_in_part_and_by_service() -> None:
    scenario = read(OUTAGE).scenario
    assert scenario is not None
    verdicts = judge(scenario.objectives, run(OUTAGE))
    assert [each.holds for each in verdicts] == [True, True, True, True, True, True, True, False, False, True]
    assert verdicts[4].value == 1.0 and verdicts[6].value == 1.0
    assert 0.5 < verdicts[7].value < 1.0


def test_numbers_add_up() -> None:
    result = run(OUTAGE)
    (edge,) = result.edges
    assert sum(count for _, count in edge.outcomes) == sum(count for _, count in edge.statuses) == edge.requests
    assert sum(each.attempts for each in result.endpoints) == edge.attempts
    assert 0 <= edge.attempts - sum(result.series.attempts) < 10  # after the load has ended
    assert [each.openings for each in result.endpoints] == [result.openings, 0]
    assert result.series.open_breakers[:20] == (0.0,) * 20
    assert result.series.open_breakers[25] == pytest.approx(1.0)


def test_the_same_result_gives_the_same_text_and_a_sound_picture() -> None:
    scenario = read(OUTAGE).scenario
    assert scenario is not None
    results = [run(OUTAGE) for _ in range(2)]
    verdicts = [judge(scenario.objectives, each) for each in results]
    texts = [text_of(scenario, result, verdict, 3) for result, verdict in zip(results, verdicts, strict=True)]
    assert texts[0] == texts[1]
    for words in ("web → reviews", "EFFECTIVE", "BROKEN", "reviews-1", "and ", "outage 1"):
        assert words in texts[0]
    data = json_of(scenario, 1, results, verdicts)
    assert json.loads(json.dumps(data)) == data and data["kept"] is False
    assert data["runs"][0] == data["runs"][1]
    assert "BROKEN" in comparison(results, verdicts)
    for pictures in (results[:1], results):
        picture = svg_of(scenario, pictures)
        assert picture == svg_of(scenario, pictures)
        assert "prefers-color-scheme:dark" in picture
        assert ElementTree.fromstring(picture).tag.endswith("svg")


def test_percentiles_are_by_nearest_rank() -> None:
    assert percentile([], 0.99) == 0.0
    assert percentile([1.0], 0.5) == 1.0
    hundred = [float(number) for number in range(1, 101)]
    assert [percentile(hundred, share) for share in (0.0, 0.5, 0.99, 1.0)] == [1.0, 50.0, 99.0, 100.0]


def test_spans_of_open_breakers() -> None:
    changes = [
        Change(1.0, "web-1", "reviews", "r-1", "open for 1.0 s: 7 consecutive failures"),
        Change(2.0, "web-1", "reviews", "r-1", "half-open: one request probes"),
        Change(2.5, "web-1", "reviews", "r-1", "closed: the probe succeeded"),
        Change(3.0, "web-1", "reviews", "r-1", "open for 1.0 s: 7 consecutive failures"),
        Change(3.5, "web-1", "reviews", "r-2", "open for 1.0 s: 7 consecutive failures"),
        Change(3.75, "web-1", "reviews", "r-2", "gone: callers no longer know the endpoint"),
    ]
    spans = open_spans(changes, 5.0)
    assert spans == {("web-1", "r-1"): [(1.0, 2.5), (3.0, 5.0)], ("web-1", "r-2"): [(3.5, 3.75)]}
    assert share_open(spans["web-1", "r-1"], 1.0, 5) == [0.0, 1.0, 0.5, 1.0, 1.0]


def test_how_numbers_are_shown() -> None:
    assert [seconds(value) for value in (0.0123, 0.25, 3.0)] == ["12.3ms", "250ms", "3.00s"]
    assert [percent(value) for value in (1.0, 0.99999, 0.5)] == ["100.00%", "99.99%", "50.00%"]
    assert sparkline([None, 0.0, 0.5, 0.99, 1.0], 1.0) == " ·▄▇█"
