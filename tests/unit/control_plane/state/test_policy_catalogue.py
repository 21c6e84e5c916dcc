"""The catalogue: what did not change is the same object, and every way to the same documents ends at one snapshot."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support.policies import policies

from control_plane.state.policy import Catalogue, cut
from control_plane.state.records import Document
from sidecar.model.load import load_texts
from sidecar.model.problems import Sink
from sidecar.model.snapshot import Level, Origin, Snapshot
from sidecar.model.source import Source

HEAD = "version: 1\n"


def documents(text: str, file: str = "mesh.yaml", change: int = 1) -> dict[str, Document]:
    sink = Sink()
    found = cut(text, file, sink)
    assert not sink.failed, sink.problems()
    return {n: Document(file, each.line, each.text, "ana", 1.0, change, each.whole) for n, each in found.items()}


def update(catalogue: Catalogue, found: Mapping[str, Document], **more: Any) -> Snapshot:
    services = {n.removeprefix("services/"): each for n, each in found.items() if n.startswith("services/")}
    catalogue.update(found.get("defaults"), found.get("enforced"), services, **more)
    return catalogue.snapshot


def codes(catalogue: Catalogue) -> dict[str, list[str]]:
    return {name: [each.code for each in problems] for name, problems in catalogue.broken.items()}


MESH = """\
version: 1
defaults:
  timeout: {total: 10s}
services:
  web:
    calls:
      api: {timeout: {total: 8s}}
  api:
    ports: {http: {port: 80}}
    routes:
      - fallback: {service: spare}
  spare: {}
  alone: {}
enforced:
  mtls: strict
"""


def test_it_gives_what_the_file_gives() -> None:
    catalogue = Catalogue()
    snapshot = update(catalogue, documents(MESH))
    loaded = load_texts({"mesh.yaml": MESH}).snapshot
    assert loaded is not None
    assert dict(snapshot.services) == dict(loaded.services)
    assert provenance(snapshot) == provenance(loaded)
    assert snapshot.services["web"].calls["api"].source == Source("mesh.yaml", 7, 7)
    assert catalogue.broken == {}


def provenance(snapshot: Snapshot) -> dict[str, list[Mapping[str, Origin]]]:
    return {
        name: [
            each.provenance,
            *(route.provenance for route in each.routes),
            *(c.provenance for c in each.calls.values()),
        ]
        for name, each in snapshot.services.items()
    }


def test_only_what_depends_on_a_change_is_new() -> None:
    catalogue = Catalogue()
    before = update(catalogue, documents(MESH))
    assert update(catalogue, documents(MESH)) is before
    after = update(catalogue, documents(MESH.replace("port: 80}", "port: 81}")))
    assert {name for name in after.services if after.services[name] is not before.services[name]} == {"api"}
    longer = MESH.replace("    ports:", "    timeout: {total: 3s}\n    ports:").replace(
        "\n  spare", "  # moved\n  spare"
    )
    services = documents(longer)
    for name in ("services/spare", "services/alone", "enforced"):
        services[name] = documents(MESH)[name]
    third = update(catalogue, services)
    assert {name for name in third.services if third.services[name] is not after.services[name]} == {"api", "web"}
    assert third.services["web"].calls["api"].total_s == 3.0


def test_defaults_reach_all() -> None:
    catalogue = Catalogue()
    before = update(catalogue, documents(MESH))
    after = update(catalogue, documents(MESH.replace("10s", "9s")))
    assert all(after.services[name] is not before.services[name] for name in after.services)
    assert after.services["alone"].timeouts.total_s == 9.0
    without = {name: each for name, each in documents(MESH).items() if name != "defaults"}
    assert update(catalogue, without).services["alone"].timeouts.total_s == 15.0


def test_services_without_a_document() -> None:
    catalogue = Catalogue()
    snapshot = update(catalogue, documents(MESH), implicit={"new"})
    new = snapshot.services["new"]
    assert new.name == "new" and new.timeouts.total_s == 10.0
    assert new.provenance["timeout.total"].level is Level.DEFAULTS
    again = update(catalogue, documents(MESH), implicit={"new", "other"})
    assert again.services["new"] is new and again.services["web"] is snapshot.services["web"]
    assert "new" not in update(catalogue, documents(MESH)).services
    named = update(
        catalogue, documents(MESH) | documents(HEAD + "services:\n  new: {mtls: strict}\n", "n.yaml"), implicit={"new"}
    )
    assert named.services["new"].source.file == "n.yaml"


def test_a_damaged_document_takes_no_other_down() -> None:
    catalogue = Catalogue()
    before = update(catalogue, documents(MESH))
    found = documents(MESH)
    found["services/api"] = Document("mesh.yaml", 8, "  api: {nonsense: [", "eve", 2.0, 2)
    after = update(catalogue, found)
    assert after.services.keys() == before.services.keys()
    assert after.services["api"] is before.services["api"]
    assert after.services["alone"] is before.services["alone"]
    assert codes(catalogue) == {"services/api": ["P0101"]}
    assert catalogue.broken["services/api"][0].source == Source("mesh.yaml", 9, 1)
    fresh = Catalogue()
    assert update(fresh, found).services.keys() == {"alone", "spare", "web"}
    assert codes(fresh) == {"services/api": ["P0101"]}
    assert update(catalogue, documents(MESH)) == before
    assert catalogue.broken == {}


@pytest.mark.parametrize(
    "text", ["", "- a\n", "  other: {}\n", "a: {}\nb: {}\n", "\x00", "&a b\n", "[" * 100, "  api: {\n", "api"]
)
def test_whatever_stands_there(text: str) -> None:
    catalogue = Catalogue()
    found = documents(MESH)
    for whole in (False, True):
        found["services/api"] = Document("mesh.yaml", 8, text, "eve", 2.0, 2, whole)
        assert update(catalogue, found).services.keys() == {"alone", "spare", "web"}
        assert list(catalogue.broken) == ["services/api"]


def test_what_the_store_cannot_give_is_no_absent_document() -> None:
    catalogue = Catalogue()
    before = update(catalogue, documents(MESH))
    found = documents(MESH)
    api, defaults = found.pop("services/api"), found.pop("defaults")
    damaged = {"services/api": "not JSON", "defaults": "not JSON"}
    after = update(catalogue, found, implicit={"api"}, damaged=damaged)
    assert dict(after.services) == dict(before.services)
    assert all(after.services[name] is before.services[name] for name in after.services)
    assert codes(catalogue) == {"services/api": ["P0100"], "defaults": ["P0100"]}
    fresh = Catalogue()
    assert update(fresh, found, damaged=damaged).services == {}  # a policy without its defaults would be another
    assert codes(fresh) == {"defaults": ["P0100"]}
    found["defaults"] = defaults
    assert update(fresh, found, damaged=damaged).services.keys() == {"alone", "spare", "web"}
    found["services/api"] = api
    assert update(fresh, found, damaged=damaged) == before
    assert fresh.broken == {}


def test_a_service_that_went_away() -> None:
    catalogue = Catalogue()
    before = update(catalogue, documents(MESH))
    found = documents(MESH)
    del found["services/api"]
    after = update(catalogue, found)
    assert codes(catalogue) == {"services/web": ["P0108"]}
    assert after.services["web"] is before.services["web"]
    assert "api" not in after.services
    before = update(catalogue, documents(MESH))
    found = documents(MESH)
    del found["services/spare"]
    assert update(catalogue, found).services["api"] is before.services["api"]
    assert codes(catalogue) == {"services/api": ["P0108"]}
    assert update(catalogue, documents(MESH)) == before


def test_levels_that_do_not_stand() -> None:
    catalogue = Catalogue()
    before = update(catalogue, documents(MESH))
    found = documents(MESH)
    found["enforced"] = Document("x.yaml", 1, "enforced: {mtls: sometimes}\n", "eve", 2.0, 2)
    found["services/alone"] = documents(MESH.replace("alone: {}", "alone: {mtls: permissive}"))["services/alone"]
    after = update(catalogue, found)
    assert codes(catalogue) == {"enforced": ["P0106"]}
    assert after.services["alone"].mtls.value == "strict"
    assert after.services["web"] is before.services["web"]


def test_circles() -> None:
    text = """\
version: 1
services:
  a: {routes: [{fallback: {service: b}}]}
  b: {routes: [{fallback: {service: c}}]}
  c: {}
  d: {routes: [{fallback: {service: a}}]}
"""
    catalogue = Catalogue()
    before = update(catalogue, documents(text))
    broken = documents(text.replace("c: {}", "c: {routes: [{fallback: {service: a}}]}"))
    after = update(catalogue, broken)
    assert codes(catalogue) == {f"services/{name}": ["P0117"] for name in "abc"}
    assert catalogue.broken["services/b"][0].message == "fallbacks in a circle: c -> a -> b -> c"
    assert catalogue.broken["services/b"][0].source.line == 4
    assert dict(after.services) == dict(before.services)
    assert update(Catalogue(), broken).services.keys() == {"d"}
    assert update(catalogue, documents(text)) == before
    assert catalogue.broken == {}


def test_a_mirror_is_judged_again_when_the_service_that_it_names_comes_or_goes() -> None:
    text = "version: 1\nservices:\n  a: {routes: [{mirror: {service: b}}]}\n  b: {}\n"
    catalogue = Catalogue()
    update(catalogue, documents(text.replace("  b: {}\n", "")))
    assert codes(catalogue) == {"services/a": ["P0108"]}
    snapshot = update(catalogue, documents(text))
    assert catalogue.broken == {} and snapshot.services["a"].routes[0].mirror is not None
    update(catalogue, documents(text.replace("b: {}", "b: {ports: {sql: {port: 1, protocol: tcp}}}")))
    assert codes(catalogue) == {"services/a": ["P0111"]}


VALID = st.lists(policies(), min_size=2, max_size=4)


@settings(max_examples=40, deadline=None)
@given(VALID, st.randoms(use_true_random=False))
def test_every_way_to_the_same_documents(steps: list[Any], random: Any) -> None:
    """In any order, in one step or many, whole or in parts: equal snapshots, and those of the file itself."""
    texts = [yaml.safe_dump(json.loads(json.dumps(each)), width=9999) for each in steps]
    catalogue = Catalogue()
    for text in texts:
        target = documents(text)
        known = dict(target)
        for name in random.sample(sorted(known), random.randrange(len(known))):
            del known[name]  # on the way there, documents are missing
        update(catalogue, known, implicit=set(random.sample(["web", "db", "x"], random.randrange(3))))
        incremental = update(catalogue, target)
        names = sorted(target)
        random.shuffle(names)
        scratch = Catalogue()
        fresh = update(scratch, {name: target[name] for name in names})
        loaded = load_texts({"mesh.yaml": text}).snapshot
        assert catalogue.broken == scratch.broken == {}
        assert incremental == fresh
        assert loaded is not None and dict(fresh.services) == dict(loaded.services)
        assert provenance(incremental) == provenance(fresh) == provenance(loaded)
        assert list(fresh.services) == sorted(fresh.services)
