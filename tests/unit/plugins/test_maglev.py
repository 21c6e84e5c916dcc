"""The table of Maglev: the paper's own example, evenness, and how little moves."""

from collections import Counter
from typing import Any

from sidecar.api import stable_hash
from sidecar.plugins.maglev import TABLE_SIZE, Maglev, Table, fill
from sidecar.testing import check_balancer, make_endpoints

KEYS = [stable_hash(b"user-%d" % n) for n in range(4000)]


def low() -> float:
    return 0.0


def test_it_keeps_the_contract() -> None:
    check_balancer(Maglev, moved_max=0.02)


def test_each_owns_the_same_number_of_entries_give_or_take_one() -> None:
    for count in (1, 3, 10):
        shares = Counter(fill([f"10.0.0.{n}:80" for n in range(count)], [1.0] * count))
        assert sum(shares.values()) == TABLE_SIZE
        assert max(shares.values()) - min(shares.values()) <= 1


def test_entries_go_by_weight() -> None:
    shares = Counter(fill(["a", "b", "c"], [1.0, 2.0, 5.0], 8009))
    assert shares == {0: 1001, 1: 2002, 2: 5006}


def test_the_table_is_the_same_in_every_process() -> None:
    """Any other answer would move every key of every mesh at an update."""
    owners = fill([f"10.0.0.{n}:80" for n in range(3)], [1.0] * 3)
    assert owners[:12] == [0, 1, 1, 2, 0, 1, 2, 0, 2, 1, 2, 2]


def test_a_small_table_is_filled_as_the_permutations_say() -> None:
    """Section 3.4, by hand: each takes the next entry of its own permutation that is free."""
    keys, size = ["a", "b", "c"], 7
    from hashlib import blake2b

    permutations = []
    for key in keys:
        digest = blake2b(key.encode(), digest_size=16).digest()
        offset = int.from_bytes(digest[:8], "little") % size
        skip = int.from_bytes(digest[8:], "little") % (size - 1) + 1
        permutations.append([(offset + n * skip) % size for n in range(size)])
    assert all(sorted(each) == list(range(size)) for each in permutations)
    expected: dict[int, int] = {}
    while len(expected) < size:
        for owner, permutation in enumerate(permutations):
            free = next((entry for entry in permutation if entry not in expected), None)
            if free is not None:
                expected[free] = owner
    assert fill(keys, [1.0] * 3, size) == [expected[entry] for entry in range(size)]


def test_hardly_any_other_key_moves_when_one_leaves() -> None:
    keys = [f"10.0.0.{n}:80" for n in range(10)]
    before, after = fill(keys, [1.0] * 10), fill(keys[:-1], [1.0] * 9)
    moved = sum(a != b and a != 9 for a, b in zip(before, after, strict=True))
    assert moved / TABLE_SIZE < 0.01


def test_a_full_endpoint_hands_on() -> None:
    endpoints = tuple(make_endpoints(3))
    table = Table(endpoints, 125.0)
    home: Any = table.pick(endpoints, KEYS[0], 0.0, low)
    for total in range(1, 61):
        endpoint: Any = table.pick(endpoints, KEYS[0], 0.0, low)
        endpoint.active += 1
        assert endpoint.active <= -(-125 * total // 300)
    assert home.active == 25
