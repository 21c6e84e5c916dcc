"""The compiled build beside the pure one in the benchmark's tables: ratios and verdicts are told apart."""

from bench.table import OURS, OURS_COMPILED, Bar, Group, Row, as_json, columns, markdown, verdict

ENVOYS = ("Envoy HTTP/1.1", "Envoy HTTP/2")


def row() -> Row:
    made = Row("mesh-cpu.32", "CPU a request", "µs", bars=(Bar(0.8, ENVOYS),), rivals=ENVOYS)
    for name, value in ((ENVOYS[0], 200.0), (OURS_COMPILED, 70.0), (ENVOYS[1], 100.0), (OURS, 110.0)):
        made.add(name, value)
    return made


def test_both_builds_stand_first_and_are_judged_by_the_better_rival() -> None:
    header, lines = columns(Group("title", [row()]))
    assert header[1:3] == [OURS, OURS_COMPILED]
    found = dict(zip(header, lines[0], strict=True))
    assert (found["÷ Envoy HTTP/2"], found["compiled ÷ Envoy HTTP/2"]) == ("1.10", "0.70")
    assert found["bar"] == "≤ 0.8 of the better: **missed** (1.10), compiled: met (0.70)"


def test_each_build_has_its_own_sum() -> None:
    said = verdict([Group("title", [row()])]).splitlines()
    assert said[0] == "0 of 1 bars met." and said[1].startswith("  MISSED  mesh-cpu.32: CPU a request: 1.10")
    assert said[2] == "pillion, compiled: 1 of 1 bars met." and said[3].startswith("  met     mesh-cpu.32")
    bar = as_json([Group("title", [row()])], {})["groups"][0]["rows"][0]["bars"][0]
    assert (bar["reached"], bar["reached_compiled"]) == (False, True)


def test_without_it_nothing_is_said_of_it() -> None:
    alone = row()
    del alone.series[OURS_COMPILED]
    groups = [Group("title", [alone])]
    assert "compiled" not in markdown(groups, []) + verdict(groups) + str(as_json(groups, {}))
