"""How the instances of a service divide a rate limit that they keep together. Pure.

A share is the part of the limit that one instance may use. Each has a floor, a tenth of an equal share; the rest goes
by demand, half of the way there in each round, so that one odd report moves little. Demand does not depend on shares
(an instance reports what was asked of it, not what it allowed), so nothing swings. Must not know who reports, how, or
what the limit is. Invariants: shares sum to at most 1; none is below the floor; with demands that stand still the
shares stand still after a few rounds, each within a twentieth of its aim (or of an equal share).
"""

import math
from collections.abc import Collection, Mapping

FLOOR = 0.1  # of an equal share
STEP = 0.5  # of the way to the aim, in a round
STILL = 0.05  # of a share, or of an equal one: a division that moves none by more is not made
_DIGITS = 1_000_000


def divide(
    held: Mapping[str, float], demands: Mapping[str, float], instances: Collection[str], step: float = STEP
) -> dict[str, float]:
    """The shares after one round; `held` itself where they stay.

    An instance that is new begins with an equal share. Where the demand of one is not known, its weight stays. What an
    instance that has gone held goes to the others, in proportion.
    """
    count = len(instances)
    if not count:
        return {}
    floor = FLOOR / count
    weights = _weights(held, instances, floor)
    aims = _aims(weights, demands)
    rest = 1.0 - count * floor
    if held.keys() == set(instances) and all(
        abs(floor + rest * aims[each] - share) <= STILL * max(share, 1.0 / count) for each, share in held.items()
    ):
        return dict(held)
    return {
        each: _down(floor + rest * (weight + step * (aims[each] - weight))) for each, weight in sorted(weights.items())
    }


def _weights(held: Mapping[str, float], instances: Collection[str], floor: float) -> dict[str, float]:
    """What each has above the floor, as parts of 1. Who is new has as much as the mean."""
    known = {each: max(0.0, held[each] - floor) for each in sorted(instances) if each in held}
    total = math.fsum(known.values())
    for_known = len(known) / len(instances)
    if total <= 0.0:
        return dict.fromkeys(sorted(instances), 1.0 / len(instances))
    return {
        each: known[each] / total * for_known if each in known else 1.0 / len(instances) for each in sorted(instances)
    }


def _aims(weights: Mapping[str, float], demands: Mapping[str, float]) -> dict[str, float]:
    """Among those whose demand is known, their weights are divided anew by demand; equally, where nobody asks."""
    told = {each: max(0.0, demands[each]) for each in weights if each in demands}
    if not told:
        return dict(weights)
    ours = math.fsum(weights[each] for each in told)
    total = math.fsum(told.values())
    return {
        each: weight if each not in told else ours * (told[each] / total if total > 0.0 else 1.0 / len(told))
        for each, weight in weights.items()
    }


def _down(share: float) -> float:
    return math.floor(share * _DIGITS) / _DIGITS
