"""Reloads that come while another one waits for its filters: one at a time, and the last text of the files wins.

The real App on files, with filters whose `open` waits until the test lets it go on.
"""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import trio
import trio.testing
from support.memory_net import Net, memory_world

from sidecar.api import Filter, FilterContext
from sidecar.app import App, Settings
from sidecar.assembly import Assembly
from sidecar.model.snapshot import Route, Service, Snapshot
from sidecar.plugins.loader import Loader
from sidecar.sources import Files

MODULE = "overlap_filters"
PLAIN = "version: 1\nservices: {web: {}}\n"
GATED = f"""\
version: 1
services:
  web:
    routes: [{{name: ROUTE, filters: [{{use: "{MODULE}:Gated"}}]}}]
"""
LIMIT_S = 20.0
CHANCE_S = 0.3  # for what must not happen


class Gated(Filter):
    """Opens when the gate does."""

    side = "in"
    made: "list[Gated]" = []
    opening: trio.Event
    gate: trio.Event

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.opened = self.closed = False
        Gated.made.append(self)

    async def open(self, context: FilterContext) -> None:
        Gated.opening.set()
        await Gated.gate.wait()
        self.opened = True

    async def aclose(self) -> None:
        self.closed = True

    def on_request(self, request: Any) -> None:
        return None


@pytest.fixture(autouse=True)
def _filters(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType(MODULE)
    module.Gated = Gated  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, MODULE, module)
    Gated.made = []
    Gated.opening, Gated.gate = trio.Event(), trio.Event()


class Bench:
    """An App that serves PLAIN, and its policy file."""

    def __init__(self, net: Net, path: Path) -> None:
        self.net, self.path = net, path
        loader = Loader((MODULE,))
        assembly = Assembly(net.world, loader, "web", {"": ("127.0.0.1", 8000)}, b"k" * 32)
        settings = Settings(service="web", policy=(path,), identity=path.parent)
        logs: Any = None  # only SIGHUP and admin ask for it
        self.app = App(settings, logs, net.world, assembly)
        self.files = self.app.source = Files(self.app)

    def write(self, text: str) -> None:
        self.path.write_text(text)

    def routes(self) -> list[str]:
        return [route.name for route in self.app.snapshot.services["web"].routes]

    def results(self) -> tuple[int, int]:
        meters = self.net.world.meters
        return meters.reloads_ok.value, meters.reloads_failed.value

    def serving(self) -> list[Any]:
        return [link.filter for chain in self.net.world.plans.chains for link in chain.links]


@asynccontextmanager
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    path = tmp_path / "mesh.yaml"
    path.write_text(PLAIN)
    with trio.fail_after(LIMIT_S):
        async with memory_world(Snapshot({"web": Service("web", routes=(Route("default"),))})) as net:
            bench = Bench(net, path)
            await bench.files.start()
            yield bench


async def overlap(bench: Bench, first: str, second: str, third: str | None = None) -> None:
    """Two reloads at once: the second begins, and has all the time it needs, while the first waits for its filter.
    `third` is written when the second has been asked for."""
    async with trio.open_nursery() as nursery:
        bench.write(first)
        nursery.start_soon(bench.files.offered)
        await Gated.opening.wait()
        bench.write(second)
        nursery.start_soon(bench.files.offered)
        await trio.sleep(CHANCE_S)
        assert bench.routes() == ["default"]  # neither is in force before the first has opened its filter
        if third is not None:
            bench.write(third)
        Gated.gate.set()


def gated(route: str) -> str:
    return GATED.replace("ROUTE", route)


async def test_a_reload_that_drops_the_filter_which_another_still_opens(tmp_path: Path) -> None:
    async with bench(tmp_path) as it:
        plain = PLAIN.replace("{}", "{timeout: {total: 5s}}")
        await overlap(it, gated("one"), plain)
        assert it.results() == (2, 0)
        assert it.routes() == ["default"] and it.serving() == []
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert [(each.opened, each.closed) for each in Gated.made] == [(True, True)]


async def test_a_reload_that_uses_the_filter_which_another_still_opens(tmp_path: Path) -> None:
    async with bench(tmp_path) as it:
        await overlap(it, gated("one"), gated("two"))
        assert it.results() == (2, 0)
        assert it.routes()[0] == "two"
        (only,) = Gated.made
        assert only.opened and not only.closed and only in it.serving()
        await it.app.assembly.aclose()
        assert only.closed


async def test_the_last_text_wins(tmp_path: Path) -> None:
    async with bench(tmp_path) as it:
        await overlap(it, gated("one"), gated("two"), gated("three"))
        assert it.results() == (2, 0) and it.routes()[0] == "three"
