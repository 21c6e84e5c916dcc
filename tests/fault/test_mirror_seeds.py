"""Random lives with copies of nearly every request: whatever happens to either, each ends once and leaves nothing.

The lives are those of `support.lives`, with the same faults on the way of copies as on that of originals; what holds
for originals is checked there. To replay one: `SEED=123 pytest tests/fault/test_mirror_seeds.py`.
"""

import gc
import os
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from support.lives import Life, live
from support.lives_http2 import Http2Life

from sidecar.model.snapshot import Mirror, Snapshot
from sidecar.proxy import mirror as mirror_module

CORE, LONG, BLOCK = 20, 400, 20
SEEDS = [int(os.environ["SEED"])] if "SEED" in os.environ else list(range(CORE))


@pytest.fixture(scope="module", autouse=True)
def _nothing_of_others() -> None:
    gc.collect()


class MirroredLife(Life):
    """Of two services some mirror to a version, some to each other; some callers bring copies themselves."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.shadows = random.Random(seed + 3_000_000)
        self.copies: list[mirror_module.Copy] = []
        self.counted: Counter[str] = Counter()

    def policy(self) -> Snapshot:
        found, shadows = super().policy(), self.shadows
        services = {}
        for name, service in found.services.items():
            other = {"shop": "spare", "spare": "shop"}.get(name)
            mirrors = [Mirror(version="v2"), Mirror(service=other, percent=shadows.choice([100.0, 50.0])), None]
            chosen = replace(shadows.choice(mirrors) or Mirror(version="v1"), writes=shadows.random() < 0.7)
            routes = tuple(replace(route, mirror=chosen) for route in service.routes)
            services[name] = replace(service, routes=routes) if other is not None else service
        return Snapshot(services)

    def ties(self, inbound: bool) -> bytes:
        fields = super().ties(inbound)
        return fields + b"x-pillion-mirror: 77\r\n" if self.shadows.random() < 0.1 else fields

    async def run(self, seed: int) -> None:
        life = self

        class WatchedCopy(mirror_module.Copy):
            def __init__(self, *args: Any) -> None:
                life.copies.append(self)
                super().__init__(*args)

        def count(copies: mirror_module.Copies, service: str, result: str) -> None:
            life.counted[result] += 1

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mirror_module, "Copy", WatchedCopy)
            patch.setattr(mirror_module.Copies, "count", count)
            if seed % 4 == 0:
                patch.setattr(mirror_module, "UNDER_WAY_MAX", 2)
                patch.setattr(mirror_module, "HELD_BYTES_MAX", 70_000)
            if seed % 4 == 1:
                patch.setattr(mirror_module, "ANSWER_BYTES_MAX", 1000)
            await super().run(seed)

    def check_quiet(self) -> None:
        super().check_quiet()
        copies = self.net.world.copies
        assert not copies.servings and not copies.traces and copies.held_bytes == 0
        assert self.counted.total() == len(self.copies), "a copy was counted twice or never"
        for copy in self.copies:
            assert not copy.open and copy.held_bytes == 0 and copy.chunks == []
            if copy.serving is not None:
                ex = copy.serving.ex
                assert copy.serving.over and ex is not None and ex.finished and ex.endpoint is None
                assert ex.cluster.side == "mirror" and ex.cluster.active == 0 and ex.attempt == 0


class MirroredHttp2Life(MirroredLife, Http2Life):
    pass


def run_block(seeds: list[int], kind: type[MirroredLife]) -> None:
    lives = [live(seed, kind) for seed in seeds]
    if len(seeds) == BLOCK:
        counted = sum((life.counted for life in lives), Counter())
        assert counted["2xx"] and counted.total() > BLOCK, counted


@pytest.mark.parametrize("kind", [MirroredLife, MirroredHttp2Life])
def test_seeds_with_copies(kind: type[MirroredLife]) -> None:
    run_block(SEEDS, kind)


@pytest.mark.long
@pytest.mark.parametrize("first", range(CORE, CORE + LONG, 100))
@pytest.mark.parametrize("kind", [MirroredLife, MirroredHttp2Life])
def test_many_more_seeds_with_copies(first: int, kind: type[MirroredLife]) -> None:
    for block in range(first, first + 100, BLOCK):
        run_block(list(range(block, block + BLOCK)), kind)


@pytest.mark.parametrize(
    ("where", "name", "planted"),
    [
        (mirror_module.Copy, "release", lambda self: None),
        (mirror_module.Copies, "ended", lambda self, trace_id: None),
        (mirror_module.Copy, "drop", lambda self, result="": self.release()),
    ],
)
def test_planted_mistakes_are_found(where: type, name: str, planted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(where, name, planted)
    with pytest.raises(BaseExceptionGroup) as caught:
        [live(seed, MirroredLife) for seed in range(40)]
    assert caught.group_contains(AssertionError)
