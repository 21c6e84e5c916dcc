import json

from control_plane.state.resources import BANS, BUNDLE, NAMES, Resources, callers_view
from sidecar.model.load import load_texts
from sidecar.model.snapshot import EndpointSpec, Service

MESH = """\
version: 1
services:
  web:
    calls: {reviews: {}}
  reviews:
    owners: [team]
    authz: {allow: [{from: [web]}]}
    rate_limit: {requests: 5, per: 1s}
    concurrency: {max: 8}
    routes:
      - {fallback: {service: ratings}, authz: {deny: [{from: [other]}]}}
  ratings: {}
  other: {}
"""


def services(text: str = MESH) -> dict[str, Service]:
    loaded = load_texts({"mesh.yaml": text})
    assert loaded.snapshot is not None, loaded.problems
    return dict(loaded.snapshot.services)


def names(resources: Resources, own: str, uses: tuple[str, ...] = (), everything: bool = False) -> list[str]:
    return [each.name for each in resources.of(own, uses, everything)]


def full() -> Resources:
    resources = Resources()
    resources.put(BUNDLE, {})
    resources.put(BANS, {})
    given = services()
    resources.put_services(given)
    for name in given:
        resources.put_endpoints(name, ())
    return resources


def test_a_sidecar_gets_its_own_what_it_calls_what_it_uses_and_their_fallbacks_in_usable_order() -> None:
    resources = full()
    assert names(resources, "web") == [
        "bundle",
        "bans",
        "names",
        "endpoints/ratings",
        "endpoints/reviews",
        "endpoints/web",
        "service/ratings",
        "service/reviews",
        "service/web",
    ]
    assert "service/other" in names(resources, "web", ("other", "unknown"))
    assert len(names(resources, "ratings")) == 5
    assert len(names(resources, "ratings", everything=True)) == 11
    assert names(resources, "unknown") == ["bundle", "bans", "names"]


def test_callers_are_not_told_what_the_callee_enforces() -> None:
    reviews = services()["reviews"]
    view = callers_view(reviews)
    assert view.authz == () and view.owners == () and all(not route.authz for route in view.routes)
    assert all(route.rate_limit is None for route in view.routes)
    assert reviews.concurrency is not None and view.concurrency is None
    own = next(each for each in full().of("reviews", (), False) if each.name == "service/reviews")
    other = next(each for each in full().of("web", (), False) if each.name == "service/reviews")
    assert b'"authz"' in own.line and b'"authz"' not in other.line
    assert json.loads(other.line)["data"]["name"] == "reviews"


def test_a_change_that_callers_do_not_see_is_none_for_them() -> None:
    resources = full()
    changed = resources.put_services(services(MESH.replace("from: [other]", "from: [web]")))
    assert changed == {"own/reviews"}


def test_versions_are_those_of_the_content_alone() -> None:
    one, two = full(), full()
    assert [each.version for each in one.of("web", (), True)] == [each.version for each in two.of("web", (), True)]
    assert one.put_endpoints("web", ()) is False
    assert one.put_endpoints("web", (EndpointSpec("10.0.0.1", 1),)) is True


def test_a_service_that_goes_takes_its_endpoints_along() -> None:
    resources = full()
    left = services()
    del left["other"]
    assert resources.put_services(left) == {"own/other", "service/other", "endpoints/other", NAMES}
    assert "endpoints/other" not in resources.held


def test_a_sidecar_gets_what_the_services_that_it_calls_mirror_to() -> None:
    text = MESH.replace("{fallback: {service: ratings}, ", "{mirror: {service: other}, ")
    resources = Resources()
    resources.put_services(services(text))
    assert resources.needed("web", (), False) == {"web", "reviews", "other"}
    reviews = callers_view(services(text)["reviews"])
    assert reviews.routes[0].mirror is not None and reviews.routes[0].mirror.service == "other"
