"""Whether a run keeps what a scenario asks for. Pure; must not know how a verdict is shown."""

from collections.abc import Sequence
from dataclasses import dataclass

from .fields import AT_LEAST
from .record import Edge, percentile
from .results import Result, amplification, share
from .scenario import Objective


@dataclass(frozen=True, slots=True)
class Verdict:
    """`value` has the unit of the objective's bound."""

    objective: Objective
    value: float
    holds: bool


def judge(objectives: Sequence[Objective], result: Result) -> tuple[Verdict, ...]:
    return tuple(_judge(objective, result) for objective in objectives)


def _judge(objective: Objective, result: Result) -> Verdict:
    value = _value(objective, result)
    holds = value >= objective.bound if objective.metric in AT_LEAST else value <= objective.bound
    return Verdict(objective, value, holds)


def _value(objective: Objective, result: Result) -> float:
    service = objective.service
    metric = objective.metric
    if metric == "openings":
        return float(sum(each.openings for each in result.endpoints if service in (None, each.service)))
    edges = [edge for edge in result.records if (edge.root if service is None else edge.to == service)]
    if metric == "amplification":
        return result.worst_amplification if service is None else amplification(edges)
    if metric == "success_actual":
        return share(sum(edge.good_attempts for edge in edges), sum(edge.attempts for edge in edges))
    took, good = _within(edges, objective)
    if metric == "success_effective":
        return share(good, len(took))
    return percentile(took, 0.5 if metric == "p50" else 0.99)


def _within(edges: Sequence[Edge], objective: Objective) -> tuple[list[float], int]:
    took: list[float] = []
    good = 0
    for edge in edges:
        some, well = edge.within(objective.after_s, objective.before_s)
        took += some
        good += well
    return (sorted(took) if len(edges) > 1 else took), good
