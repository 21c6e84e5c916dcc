"""Finding and importing filters: what is allowed, and what is said of everything that goes wrong."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar.model.snapshot import FilterUse
from sidecar.model.source import Source
from sidecar.plugins.finding import PluginError, available
from sidecar.plugins.headers import HeaderEdit
from sidecar.plugins.loader import FILTERS, Loader

PLACE = Source("mesh.yaml", 12, 7)
GOOD = """
from dataclasses import dataclass
from sidecar.api import AsyncFilter, Filter

@dataclass(frozen=True)
class Settings:
    header: str = "x"

class Good(Filter):
    Config = Settings
    side = "in"
    on_error = "open"
    class Inner(Filter):
        pass

class Waits(Filter):
    async def on_request(self, request):
        pass

class NeverWaits(AsyncFilter):
    def on_request(self, request):
        pass

class Clumsy(Filter):
    @classmethod
    def decode(cls, config):
        return config["header"]

class Bursts(Filter):
    def __init__(self, config):
        raise RuntimeError("no disk")

class Odd(Filter):
    side = "left"

class Plain:
    pass

thing = 5
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A directory for modules; what is imported from it is forgotten afterwards."""
    paths, modules = list(sys.path), set(sys.modules)
    (tmp_path / "team_filters").mkdir()
    (tmp_path / "team_filters" / "__init__.py").write_text("")
    (tmp_path / "team_filters" / "good.py").write_text(GOOD)
    yield tmp_path
    sys.path[:] = paths
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def error_of(loader: Loader, name: str, config: dict[str, object] | None = None, **more: str) -> str:
    with pytest.raises(PluginError) as caught:
        loader.prepare(FilterUse(name, config or {}, source=PLACE, **more)).make()
    assert caught.value.source is PLACE
    assert str(caught.value) == f"mesh.yaml:12: {caught.value.text}"
    return caught.value.text


def test_a_built_in_needs_no_permission() -> None:
    prepared = Loader().prepare(FilterUse("headers", {"request": {"set": {"x-a": "1"}}}, side="out"))
    assert prepared.cls is HeaderEdit and isinstance(prepared.make(), HeaderEdit)
    assert not prepared.fails_open


def test_a_class_under_an_allowed_prefix(folder: Path) -> None:
    for allow in ("team_filters", "team_filters.good"):
        loader = Loader([allow], [str(folder)])
        prepared = loader.prepare(FilterUse("team_filters.good:Good", {"header": "x-a"}))
        assert prepared.make().config.header == "x-a"
        assert prepared.fails_open
    assert Loader(["team_filters"]).prepare(FilterUse("team_filters.good:Good.Inner")).cls.__name__ == "Inner"


def test_policy_decides_on_error_over_the_class(folder: Path) -> None:
    loader = Loader(["team_filters"], [str(folder)])
    assert not loader.prepare(FilterUse("team_filters.good:Good", on_error="closed")).fails_open
    assert loader.prepare(FilterUse("headers", on_error="open")).fails_open


def test_prefixes_are_whole_components_and_nothing_is_imported_before(folder: Path) -> None:
    for allow in ([], ["team"], ["team_filters.go"], ["team_filters.good.Good"], ["TEAM_FILTERS"]):
        text = error_of(Loader(allow, [str(folder)]), "team_filters.good:Good")
        assert "is not allowed here" in text
        assert "start this sidecar with --allow-filters team_filters.good" in text
    assert "team_filters" not in sys.modules
    assert "not allowed" in error_of(Loader(), "os:system")


def test_keys_are_equal_for_equal_uses_only(folder: Path) -> None:
    loader = Loader(["team_filters"], [str(folder)])
    first = loader.prepare(FilterUse("team_filters.good:Good", {"header": "a"}, source=PLACE))
    same = loader.prepare(FilterUse("team_filters.good:Good", {"header": "a"}, source=Source("mesh.yaml", 12, 7)))
    other = loader.prepare(FilterUse("team_filters.good:Good", {"header": "b"}, source=PLACE))
    assert first.key == same.key != other.key


def test_what_does_not_import_says_the_exception_and_its_line(folder: Path) -> None:
    (folder / "broken.py").write_text("x = 1\n1 / 0\n")
    (folder / "needy.py").write_text("import no_such_library\n")
    (folder / "garbled.py").write_text("x = 1\ndef (:\n")
    (folder / "leaver.py").write_text("raise SystemExit(3)\n")
    loader = Loader(["broken", "needy", "garbled", "leaver", "absent", "team_filters"], [str(folder)])
    text = error_of(loader, "broken:A")
    assert f"does not import: ZeroDivisionError: division by zero ({folder}/broken.py:2)" in text
    assert f"No module named 'no_such_library' ({folder}/needy.py:1)" in error_of(loader, "needy:A")
    assert f"SyntaxError: invalid syntax ({folder}/garbled.py:2)" in error_of(loader, "garbled:A")
    assert "SystemExit: 3" in error_of(loader, "leaver:A")
    assert "no module named absent is installed" in error_of(loader, "absent.deep:A")
    assert "--filter-path" in error_of(loader, "absent:A")
    assert "no module named team_filters.bad" in error_of(loader, "team_filters.bad:A")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Goot", 'team_filters.good has no Goot; did you mean "Good"?'),
        ("Plain", "must be a class that derives from sidecar.api.Filter or sidecar.api.AsyncFilter"),
        ("thing", "must be a class that derives"),
        ("Waits", "on_request must be a plain function; one that waits belongs into an AsyncFilter"),
        ("NeverWaits", "on_request of an AsyncFilter must be `async def`"),
        ("Odd", 'must state side "in", "out" or "both"'),
        ("Clumsy", "could not read its settings: KeyError: 'header'"),
        ("Bursts", "could not be made: RuntimeError: no disk"),
    ],
)
def test_what_is_no_proper_filter_is_told_so(folder: Path, name: str, says: str) -> None:
    assert says in error_of(Loader(["team_filters"], [str(folder)]), f"team_filters.good:{name}")


def test_wrong_settings_name_the_key(folder: Path) -> None:
    loader = Loader(["team_filters"], [str(folder)])
    text = error_of(loader, "team_filters.good:Good", {"header": 1})
    assert text == 'filter "team_filters.good:Good": with.header: must be a string, not a whole number'
    assert 'with.haeder: unknown key; did you mean "header"?' in error_of(
        loader, "team_filters.good:Good", {"haeder": "a"}
    )


def test_the_wrong_side_is_refused(folder: Path) -> None:
    text = error_of(Loader(["team_filters"], [str(folder)]), "team_filters.good:Good", side="out")
    assert "works on side in only; write `side: in`" in text


def test_an_unknown_name_is_told_what_there_is() -> None:
    assert 'did you mean "headers"?' in error_of(Loader(), "header")
    assert "known here: fault-abort, fault-delay, headers, rate-limit" in error_of(Loader(), "zzz")


def install(folder: Path, name: str, entries: str) -> None:
    """As pip leaves it: a directory of metadata beside the code."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[pillion.filters]\n{entries}\n")


def test_an_entry_point_loads_without_permission(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(folder, "team", "tenant = team_filters.good:Good")
    monkeypatch.syspath_prepend(str(folder))
    assert Loader().prepare(FilterUse("tenant")).cls.__name__ == "Good"
    assert available(FILTERS)["tenant"] == "team_filters.good:Good"
    assert available(FILTERS)["headers"] == "sidecar.plugins.headers:HeaderEdit"


def test_an_entry_point_that_is_offered_twice_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(folder, "team", "tenant = team_filters.good:Good")
    install(folder, "rival", "tenant = elsewhere:Good")
    monkeypatch.syspath_prepend(str(folder))
    text = error_of(Loader(), "tenant")
    assert "offered twice, by elsewhere:Good (rival) and team_filters.good:Good (team)" in text


def test_a_filter_path_cannot_stand_in_for_other_modules(folder: Path) -> None:
    before = list(sys.path)
    Loader(paths=[str(folder), str(folder)])
    assert sys.path == [*before, str(folder)]
