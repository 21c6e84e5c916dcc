"""Apply and rollback: what they write, what they refuse, and what they say."""

import random

import pytest
from support.policy_shelf import Shelf

from control_plane.state.policy import (
    Catalogue,
    Difference,
    NotAllowed,
    PolicyConflict,
    PolicyInvalid,
    plan_apply,
    provenance_of,
    settle,
    unified_diff,
)
from control_plane.state.policy.history import HISTORY_MAX
from control_plane.state.policy.plan import DIRECT_MAX
from control_plane.state.records import Document, change_key, encode
from control_plane.store.base import Conflict, Delete, Put
from sidecar.model.problems import render
from sidecar.model.snapshot import Snapshot

MESH = """\
version: 1
defaults:
  timeout: {total: 10s}
services:
  # The pages.
  web:
    calls:
      api: {}
  api:
    ports: {http: {port: 80}}
"""


def shelf(**files: str) -> Shelf:
    made = Shelf()
    made.apply({f"{name}.yaml": text for name, text in (files or {"mesh": MESH}).items()})
    return made


def one(name: str, rest: str = "{}") -> str:
    return f"version: 1\nservices:\n  {name}: {rest}\n"


def test_an_apply() -> None:
    made = Shelf()
    plan = made.apply({"mesh.yaml": MESH}, message="first")
    assert plan.change == 1 and plan.problems == ()
    assert [each.document for each in plan.diff] == ["defaults", "services/api", "services/web"]
    assert plan.diff[1] == Difference("services/api", None, "  api:\n    ports: {http: {port: 80}}\n", "", "mesh.yaml")
    assert plan.snapshot.services == made.catalogue.snapshot.services
    assert made.policy.documents["services/web"].record == Document(
        "mesh.yaml", 5, "  # The pages.\n  web:\n    calls:\n      api: {}\n", "ana", 1.0, 1
    )
    change = made.policy.changes[1].record
    assert (change.author, change.message, change.source) == ("ana", "first", "apply")
    assert change.before == dict.fromkeys(change.after)
    assert made.policy.settled == 1


def test_what_is_the_same_is_not_touched() -> None:
    made = shelf()
    again = made.apply({"mesh.yaml": MESH})
    assert again.operations == () and again.diff == () and again.change == 1
    moved = made.apply({"mesh.yaml": "# longer\n" + MESH.replace("port: 80", "port: 81")})
    assert [each.document for each in moved.diff] == ["services/api"]
    assert {each.key for each in moved.operations} == {"policy/services/api", change_key(2), "policy/settled"}
    assert {each.key for each in moved.compares} == {"policy/services/api", change_key(2)}
    assert made.policy.documents["services/web"].record.change == 1
    renamed = made.apply({"shop.yaml": "# longer\n" + MESH.replace("port: 80", "port: 81")})
    assert len(renamed.diff) == 3
    assert unified_diff(renamed.diff[:1]) == "--- defaults (mesh.yaml)\n+++ defaults (shop.yaml)\n"


def test_an_apply_leaves_what_it_does_not_name() -> None:
    made = shelf(mesh=MESH)
    made.apply({"more.yaml": one("more")})
    assert made.catalogue.snapshot.services.keys() == {"api", "more", "web"}
    with pytest.raises(PolicyInvalid):
        made.apply({"more.yaml": one("more", "{calls: {nobody: {}}}")})


def test_prune() -> None:
    made = shelf(mesh=MESH, more=one("more"))
    plan = made.apply({"mesh.yaml": "version: 1\nservices:\n  api: {}\n"}, prune=True)
    assert [(each.document, each.after is None) for each in plan.diff] == [
        ("services/api", False), ("services/more", True), ("services/web", True)
    ]  # fmt: skip
    assert made.policy.documents.keys() == {"defaults", "services/api"}
    assert Delete("policy/services/more") in plan.operations


def test_what_one_author_brought() -> None:
    made = shelf()
    files = {"a.yaml": one("a") + "enforced:\n  mtls: strict\n", "b.yaml": one("b")}
    made.apply(files, author="folder:/etc/p", source="folder", prune_author="folder:/etc/p")
    assert made.policy.changes[2].record.source == "folder"
    made.apply({"b.yaml": one("b"), "c.yaml": one("web")}, author="folder:/etc/p", prune_author="folder:/etc/p")
    assert made.policy.documents.keys() == {"defaults", "services/api", "services/b", "services/web"}
    made.apply({"b.yaml": one("b")}, author="folder:/etc/p", prune_author="folder:/etc/p")
    assert made.policy.documents.keys() == {"defaults", "services/api", "services/b"}


def test_all_problems_at_once_at_their_places() -> None:
    made = shelf()
    files = {"a.yaml": one("a", "{x: 1}"), "b.yaml": "version: 1\nservices: [\n"}
    with pytest.raises(PolicyInvalid) as caught:
        made.apply(files)
    assert [(each.code, str(each.source)) for each in caught.value.problems] == [
        ("P0104", "a.yaml:3"),
        ("P0101", "b.yaml:3"),
    ]
    files = {"a.yaml": one("a", "{calls: {x: {}}, routes: [{to: v1}]}"), "b.yaml": one("b", "{calls: {a: {port: y}}}")}
    with pytest.raises(PolicyInvalid) as caught:
        made.apply(files)
    assert sorted(each.code for each in caught.value.problems) == ["P0107", "P0108", "P0108"]
    assert "unknown version" in render(caught.value.problems, caught.value.texts)
    with pytest.raises(PolicyInvalid) as caught:
        made.apply({"a.yaml": one("a"), "b.yaml": one("a")})
    assert [each.code for each in caught.value.problems] == ["P0113"]
    for bad in ({}, {"": MESH}, {"a\nb": MESH}, {"a.yaml": ""}, {"a.yaml": "  - [" * 9}):
        with pytest.raises(PolicyInvalid):
            made.apply(bad)
    assert made.policy.latest == 1


def test_a_change_that_breaks_others_names_both_places() -> None:
    made = shelf(mesh=MESH, store=one("store", "{ports: {web: {port: 80}}}"))
    made.apply({"shop.yaml": one("shop", "{calls: {store: {port: web}}}")})
    with pytest.raises(PolicyInvalid) as caught:
        made.apply({"store.yaml": "# moved\n" + one("store")})
    assert (
        render(caught.value.problems, caught.value.texts)
        == """\
error[P0108]: unknown port "web"
 --> shop.yaml (change 2):3:32
3 |   shop: {calls: {store: {port: web}}}
  |                                ^^^ `store` declares no ports; services/store is changed (store.yaml:4)
"""
    )
    with pytest.raises(PolicyInvalid) as caught:
        made.apply({"shop.yaml": one("shop", "{calls: {store: {port: web}}}")}, prune=True)
    (problem,) = caught.value.problems
    assert str(problem.source) == "shop.yaml:3" and problem.code == "P0108"
    with pytest.raises(PolicyInvalid) as caught:
        made.apply({"store.yaml": one("store", "{ports: {web: {port: 80}}, calls: {api: {}}}")}, prune=True)
    assert [(str(each.source), each.label) for each in caught.value.problems] == [("store.yaml:3", "")]
    made.apply({"web.yaml": one("web"), "a.yaml": one("alone")})
    made.apply({"shop.yaml": one("shop", "{routes: [{fallback: {service: store}}]}")})
    with pytest.raises(PolicyInvalid) as caught:
        made.apply({"store.yaml": one("store", "{routes: [{fallback: {service: shop}}]}")})
    assert [(each.message, str(each.source), each.label) for each in caught.value.problems] == [
        (
            "fallbacks in a circle: store -> shop -> store",
            "shop.yaml (change 4):3",
            "services/store is changed (store.yaml:3)",
        ),
        ("fallbacks in a circle: shop -> store -> shop", "store.yaml:3", ""),
    ]


def test_removing_what_others_need() -> None:
    made = shelf(mesh=MESH, shop=one("shop"))
    made.apply({"shop.yaml": one("shop", "{calls: {web: {}}}")}, author="bob")
    with pytest.raises(PolicyInvalid) as caught:
        made.apply({"x.yaml": "version: 1\n"}, prune_author="ana")
    assert [(each.message, str(each.source), each.label) for each in caught.value.problems] == [
        (
            'unknown service "web"',
            "shop.yaml (change 2):3",
            "services/web is removed (it is at mesh.yaml:6, change 1 by ana)",
        )
    ]


def test_a_stored_document_that_never_stood_blocks_nobody() -> None:
    made = shelf()
    made.put("policy/services/odd", b'{"format":1,"file":"o.yaml","line":1,"text":"  odd: {nonsense: 1}\\n",'
                                    b'"author":"eve","applied":1.0,"change":1}')  # fmt: skip
    made.put("policy/services/lost", b"\x00")
    made.put("policy/changes/0000000009", b"\x00")
    plan = made.apply({"more.yaml": one("more", "{calls: {api: {}}}")})
    assert plan.change == 10
    assert made.catalogue.broken.keys() == {"services/odd", "services/lost"}
    made.apply({"o.yaml": one("odd"), "l.yaml": one("lost")})
    assert made.catalogue.broken == {}
    assert made.policy.damaged == {}


def test_warnings_are_those_of_what_is_named() -> None:
    noisy = "{routes: [{respond: {status: 200}}, {name: x, respond: {status: 201}}], tls: plain}"
    made = Shelf()
    plan = made.apply({"noisy.yaml": one("noisy", noisy)})
    assert [(each.code, str(each.source)) for each in plan.problems] == [
        ("P0301", "noisy.yaml:3"),
        ("P0305", "noisy.yaml:3"),
    ]
    assert made.apply({"more.yaml": one("more")}).problems == ()
    plan = made.plan({"noisy.yaml": "\n" + one("noisy", noisy)})
    assert plan.operations == ()
    assert [str(each.source) for each in plan.problems] == ["noisy.yaml:4", "noisy.yaml:4"]
    plan = made.plan({"other.yaml": one("other", "{authz: {allow: [{from: [stranger]}]}}")})
    assert [each.code for each in plan.problems] == ["P0307"]


def test_who_may() -> None:
    made = Shelf()
    asked: dict[str, tuple[object, object]] = {}

    def may(document: str, before: object, after: object) -> str | None:
        asked[document] = before, after
        return None if document == "services/b" else f"not {document}"

    files = {"a.yaml": one("a", "{owners: [x]}") + "  b: {}\ndefaults: {}\n"}
    with pytest.raises(NotAllowed) as caught:
        made.apply(files, may=may)
    assert caught.value.refusals == {"services/a": "not services/a", "defaults": "not defaults"}
    assert asked == {"services/a": (None, ("x",)), "services/b": (None, ()), "defaults": (None, ())}
    made.apply(files)
    made.put("policy/services/odd", b"\x00")
    asked.clear()
    made.plan({"b.yaml": one("b", "{owners: [y]}")}, may=may)
    with pytest.raises(NotAllowed):
        made.plan({"o.yaml": one("odd")}, prune=True, may=may)
    assert asked == {"services/b": ((), None), "services/a": (("x",), None), "services/odd": ((), ())}


def test_conflicts() -> None:
    made = shelf()
    base = made.revision
    made.apply({"mesh.yaml": MESH.replace("port: 80", "port: 81")}, author="bob")
    made.apply({"other.yaml": one("other")}, author="bob", base=base)
    with pytest.raises(PolicyConflict) as caught:
        made.apply({"mesh.yaml": MESH.replace("port: 80", "port: 82")}, base=base)
    (clash,) = caught.value.clashes
    assert (clash.document, clash.author, clash.change, clash.base_known) == ("services/api", "bob", 2, True)
    assert [text.split("port: ")[1][:2] for text in (clash.base, clash.theirs, clash.yours) if text] == [
        "80",
        "81",
        "82",
    ]
    made.apply({"mesh.yaml": MESH.replace("port: 80", "port: 81")}, base=base)  # it is so already
    with pytest.raises(PolicyConflict):
        made.apply({"mesh.yaml": MESH}, base=base)  # would undo what bob did
    made.apply({"mesh.yaml": MESH.replace("port: 80", "port: 82")}, base=made.revision)
    assert made.policy.latest == 4


def test_a_document_removed_or_made_meanwhile() -> None:
    made = shelf(mesh=MESH, gone=one("gone"))
    base = made.revision
    made.apply({"mesh.yaml": MESH, "new.yaml": one("new", "{mtls: off}")}, prune=True, author="bob")
    with pytest.raises(PolicyConflict) as caught:
        made.apply({"gone.yaml": one("gone", "{mtls: off}"), "new.yaml": one("new")}, base=base)
    assert [(each.document, each.base, each.theirs) for each in caught.value.clashes] == [
        ("services/gone", "  gone: {}\n", None), ("services/new", None, "  new: {mtls: off}\n")
    ]  # fmt: skip


def test_two_at_once() -> None:
    made = shelf()
    first, second = made.plan({"a.yaml": one("a")}), made.plan({"b.yaml": one("b", "{calls: {web: {}}}")})
    made.do(first)
    with pytest.raises(Conflict):
        made.do(second)
    made.do(made.plan({"b.yaml": one("b", "{calls: {web: {}}}")}))
    assert made.policy.documents.keys() == {"defaults", "services/a", "services/api", "services/b", "services/web"}


def test_a_dry_run_is_a_plan() -> None:
    made = shelf()
    before = dict(made.entries)
    plan = made.plan({"a.yaml": one("a")})
    assert plan.diff and made.entries == before
    made.follow()
    assert "a" not in made.catalogue.snapshot.services


def fresh(made: Shelf, implicit: tuple[str, ...] = ()) -> Snapshot:
    """What somebody makes of the same documents who has seen nothing before."""
    catalogue, policy = Catalogue(), made.policy
    catalogue.update(policy.defaults, policy.enforced, policy.services, implicit, policy.damaged)
    return catalogue.snapshot


def test_what_was_planned_is_not_resolved_again_when_it_comes() -> None:
    made = shelf()
    for files in (
        {"defaults.yaml": "version: 1\ndefaults:\n  timeout: {total: 9s}\n"},
        {"more.yaml": one("more", "{calls: {web: {}}}")},
    ):
        before = made.catalogue.snapshot
        plan = made.apply(files)
        assert made.catalogue.snapshot is plan.snapshot
        assert made.catalogue.snapshot == fresh(made) != before
    made.follow()
    assert made.catalogue.snapshot is plan.snapshot


def test_what_was_planned_and_did_not_come_counts_for_nothing() -> None:
    made = shelf()
    made.plan({"mesh.yaml": one("api", "{ports: {http: {port: 81}}}")})
    made.follow()
    assert made.catalogue.snapshot.services["api"].ports[0].number == 80
    first, second = made.plan({"a.yaml": one("a")}), made.plan({"b.yaml": one("b")})
    made.do(first)  # the other one was foreseen
    assert made.catalogue.snapshot == fresh(made) and second.snapshot != first.snapshot
    planned = made.plan({"c.yaml": one("c")})
    made.commit(planned.operations, planned.compares)
    made.follow(["lonely"])  # somebody may join as it meanwhile
    assert {"c", "lonely"} <= made.catalogue.snapshot.services.keys()
    assert made.catalogue.snapshot == fresh(made, ("lonely",))
    # The last good service stays, not one that was only tried.
    tried = made.plan({"a.yaml": one("a", "{ports: {http: {port: 7}}}")})
    made.put("policy/services/a", encode(Document("a.yaml", 3, "  a: {nonsense: 1}\n", "ana", 1.0, 9)))
    made.follow()
    assert tried.snapshot.services["a"].ports and made.catalogue.snapshot.services["a"].ports == ()


def test_rollback() -> None:
    made = shelf()
    first = made.texts()
    made.apply({"mesh.yaml": MESH.replace("port: 80", "port: 81"), "more.yaml": one("more")})
    second = made.texts()
    made.apply({"more.yaml": one("more", "{mtls: off}")}, prune=True)
    plan = made.rollback(1, author="bob")
    assert made.texts() == first
    assert plan.change == 4
    record = made.policy.documents["services/api"].record
    assert (record.author, record.change, record.file, record.line) == ("bob", 4, "mesh.yaml", 9)
    assert made.policy.changes[4].record.source == "rollback"
    made.rollback(2)
    assert made.texts() == second
    made.rollback(4)
    assert made.texts() == first
    made.rollback(0)
    assert made.texts() == {}
    assert made.catalogue.snapshot.services == {}
    assert made.rollback(5).operations != ()
    for unknown in (99, -1):
        with pytest.raises(LookupError):
            made.rollback(unknown)


def test_a_rollback_is_judged_like_an_apply() -> None:
    made = shelf()
    base = made.revision
    made.apply({"more.yaml": one("more")})
    made.apply({"more.yaml": one("more", "{mtls: off}")}, author="bob")
    with pytest.raises(PolicyConflict):
        made.rollback(1, base=base + 1)
    with pytest.raises(NotAllowed):
        made.rollback(1, may=lambda *_: "no")
    made.apply({"last.yaml": one("last", "{calls: {more: {}}}")})
    made.put("policy/changes/0000000004", b"\x00")
    with pytest.raises(LookupError, match="no longer known"):
        made.rollback(1)


def test_history_is_bounded() -> None:
    made = Shelf()
    for number in range(HISTORY_MAX + 30):
        made.apply({"a.yaml": one("a", f"{{max_connection_age: {number + 1}s}}")})
    assert len(made.policy.changes) == HISTORY_MAX
    assert max(made.policy.changes) == HISTORY_MAX + 30
    with pytest.raises(LookupError, match="oldest change kept is 31"):
        made.rollback(3)
    made.rollback(31)


def test_a_document_without_history_conflicts_by_its_revision() -> None:
    made = shelf()
    made.commit([Delete(change_key(1))])
    with pytest.raises(PolicyConflict) as caught:
        made.apply({"mesh.yaml": MESH.replace("80", "81")}, base=0)
    assert caught.value.clashes[0].base_known is False


def big(count: int) -> str:
    """Some 300 bytes a service."""
    lines = [
        f"  svc-{n}:\n    # {'about ' * 30}{n}\n    {{calls: {{svc-{(n + 1) % count}: {{}}}}, owners: [team]}}\n"
        for n in range(count)
    ]
    return "version: 1\nservices:\n" + "".join(lines)


def test_a_thousand_services_at_once() -> None:
    made = shelf()
    text = big(1000)
    plan = made.plan({"big.yaml": text})
    assert [each.key for each in plan.operations] == [change_key(2)]
    made.do(plan)
    assert len(made.policy.documents) == 1003 and len(made.catalogue.snapshot.services) == 1002
    full = made.texts()
    made.apply({"more.yaml": one("svc-7", "{}") + "  extra: {}\n"})  # on top of what is not settled
    after = made.texts()
    assert after == full | {"services/svc-7": "  svc-7: {}\n", "services/extra": "  extra: {}\n"}
    snapshot = made.catalogue.snapshot
    steps = 0
    while True:
        assert made.texts() == after and made.policy.latest == 3
        made.follow()
        assert made.catalogue.snapshot is snapshot
        step = settle(made.policy)
        if step is None:
            break
        made.commit(step.operations, step.compares)
        steps += 1
    assert 1000 / 60 < steps < 1000 / 40
    assert made.policy.settled == 3 and len(made.policy.own) == 1004
    removed = made.apply({"mesh.yaml": MESH}, prune=True)
    assert len(removed.diff) == 1001 and len(made.policy.documents) == 3
    made.settle()
    assert len(made.policy.own) == 3
    made.rollback(3)
    assert made.texts() == after


def test_settling_and_applying_do_not_overwrite_each_other() -> None:
    made = shelf()
    made.apply({"big.yaml": big(DIRECT_MAX + 40)})
    step = settle(made.policy)
    assert step is not None
    plan = made.plan({"x.yaml": one("svc-3", "{mtls: off}")})
    made.do(plan)
    with pytest.raises(Conflict):
        made.commit(step.operations, step.compares)
    step = settle(made.policy)
    assert step is not None
    plan = made.plan({"x.yaml": one("svc-3", "{mtls: permissive}")})
    made.commit(step.operations, step.compares)
    try:
        made.do(plan)
    except Conflict:
        made.do(made.plan({"x.yaml": one("svc-3", "{mtls: permissive}")}))
    made.settle()
    assert made.texts()["services/svc-3"] == "  svc-3: {mtls: permissive}\n"
    assert made.catalogue.snapshot.services["svc-3"].mtls.value == "permissive"


def test_a_change_too_large_for_the_store_is_refused() -> None:
    made = Shelf()
    noise = random.Random(1)
    letters = [chr(code) for code in range(0x4E00, 0x9000)]
    lines = []
    for number in range(200):
        words = "".join(noise.choices(letters, k=4000))
        lines.append(f"  s{number}: {{}}  # {words}\n")
    with pytest.raises(PolicyInvalid) as caught:
        made.plan({"a.yaml": "version: 1\nservices:\n" + "".join(lines)})
    assert [(each.code, each.help) for each in caught.value.problems] == [("P0114", "apply it in several parts")]


def test_a_lost_document_is_found_in_the_history() -> None:
    made = shelf()
    before = made.texts()
    made.put("policy/services/api", b"damaged")
    made.follow()
    assert made.texts() == before and made.catalogue.broken == {}
    assert list(made.state.problems) == ["policy/services/api"]
    made.apply({"mesh.yaml": MESH.replace("80", "81")})
    assert list(made.state.problems) == []


def test_defaults_that_nobody_can_read_hold_up_changes_until_they_are_replaced() -> None:
    made = shelf()
    for name in list(made.entries):
        if "changes" in name:
            made.commit([Delete(name)])
    made.put("policy/defaults", b"damaged")
    with pytest.raises(PolicyInvalid) as caught:
        plan_apply(made.policy, {"a.yaml": one("a")}, author="ana", at=1.0)
    assert caught.value.problems[0].code == "P0100"
    plan = plan_apply(made.policy, {"a.yaml": "version: 1\ndefaults: {}\n"}, author="ana", at=1.0)
    made.do(plan)
    assert made.catalogue.broken == {}


def test_provenance() -> None:
    made = shelf()
    documents = made.policy.documents
    assert provenance_of(documents["services/web"].record) == "mesh.yaml:6, change 1 by ana"
    assert provenance_of(documents["defaults"].record) == "mesh.yaml:2, change 1 by ana"


def test_the_diff() -> None:
    made = shelf()
    plan = made.plan({"mesh.yaml": MESH.replace("port: 80", "port: 81"), "n.yaml": one("n")})
    assert (
        unified_diff(plan.diff)
        == """\
--- services/api (mesh.yaml)
+++ services/api (mesh.yaml)
@@ -1,2 +1,2 @@
   api:
-    ports: {http: {port: 80}}
+    ports: {http: {port: 81}}
--- /dev/null
+++ services/n (n.yaml)
@@ -0,0 +1 @@
+  n: {}
"""
    )


def test_operations_fit_into_a_transaction() -> None:
    made = Shelf()
    for _ in range(HISTORY_MAX + 5):
        made.apply({"a.yaml": one("a", f"{{max_connection_age: {made.revision + 1}s}}")})
    plan = made.apply({"big.yaml": big(DIRECT_MAX)})
    assert sum(isinstance(each, Put) for each in plan.operations) == DIRECT_MAX + 2
    assert len(plan.operations) + len(plan.compares) < 128
