"""Weights that grow, in virtual time."""

import math
import random
from collections import Counter
from typing import Any

from support.balancers import LEAST_REQUEST, ROUND_ROBIN

from sidecar.model.snapshot import CircuitBreaker, EndpointSpec, Limits, Retry
from sidecar.policy.balancing import Subset
from sidecar.policy.cluster import Cluster


def told(cluster: Cluster, hosts: str, now: float, window_s: float = 10.0, weight: int = 1) -> dict[str, float]:
    specs = [EndpointSpec(host, 80, weight=weight) for host in hosts]
    cluster.update(specs, CircuitBreaker(), {}, "", "", now=now, slow_start_s=window_s)
    return weights(cluster)


def weights(cluster: Cluster) -> dict[str, float]:
    return {endpoint.host: round(endpoint.weight, 6) for endpoint in cluster.endpoints.values()}


def make(window_s: float = 10.0) -> Cluster:
    cluster = Cluster("shop", "out", Limits(), Retry(), 0.0)
    told(cluster, "ab", 0.0, window_s)
    return cluster


def subset(cluster: Cluster, arrange: Any = LEAST_REQUEST, *, keyed: bool = False) -> Subset:
    return Subset("", tuple(cluster.endpoints.values()), arrange, warmup=cluster.warmup, keyed=keyed)


def test_those_that_were_there_first_are_warm() -> None:
    cluster = make()
    assert weights(cluster) == {"a": 1, "b": 1} and cluster.warmup.due == math.inf


def test_one_that_appears_grows_in_steps_from_a_tenth() -> None:
    cluster = make()
    assert told(cluster, "abc", 100.0) == {"a": 1, "b": 1, "c": 0.1}
    found = {}
    for now in (100.5, 101.0, 102.5, 105.0, 109.9, 110.0):
        cluster.warmup.step(now)
        found[now] = weights(cluster)["c"]
    assert found == {100.5: 0.1, 101.0: 0.1, 102.5: 0.25, 105.0: 0.5, 109.9: 0.99, 110.0: 1.0}
    assert cluster.warmup.since == {} and cluster.warmup.due == math.inf


def test_policy_changes_in_between_do_not_begin_anew() -> None:
    cluster = make()
    told(cluster, "abc", 100.0)
    assert told(cluster, "abc", 105.0) == {"a": 1, "b": 1, "c": 0.5}
    assert told(cluster, "abc", 105.0, weight=4) == {"a": 4, "b": 4, "c": 2}
    assert told(cluster, "abc", 106.0, window_s=0.0) == {"a": 1, "b": 1, "c": 1}
    assert cluster.warmup.since == {}


def test_one_that_leaves_is_forgotten_and_is_new_when_it_comes_back() -> None:
    cluster = make()
    told(cluster, "abc", 100.0)
    told(cluster, "ab", 101.0)
    assert cluster.warmup.since == {}
    assert told(cluster, "abc", 200.0)["c"] == 0.1


def test_where_all_are_new_nobody_is_slower() -> None:
    cluster = make()
    assert told(cluster, "xyz", 100.0) == {"x": 1, "y": 1, "z": 1}


def test_picks_move_the_weights_and_settle() -> None:
    cluster = make()
    told(cluster, "abc", 100.0)
    for arrange in (ROUND_ROBIN, LEAST_REQUEST):
        told(cluster, "ab", 100.0)
        told(cluster, "abc", 100.0)
        picks = subset(cluster, arrange)
        rnd = random.Random(1).random
        shares: list[int] = []
        for second in range(12):
            found: Counter[str] = Counter()
            for n in range(2100):
                endpoint: Any = picks.pick(100.0 + second + n / 2100, (), rnd)
                found[endpoint.host] += 1
            shares.append(found["c"])
        if arrange is ROUND_ROBIN:
            assert shares[0] < 110 and 300 < shares[5] < 500 and shares[11] == 700
        assert weights(cluster) == {"a": 1, "b": 1, "c": 1}
        assert picks.pick is picks._settled


def test_hashing_keeps_its_keys() -> None:
    cluster = make()
    told(cluster, "abc", 100.0)
    picks = subset(cluster, keyed=True)
    assert picks.pick is picks._settled
