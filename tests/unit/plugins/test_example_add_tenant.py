"""The example filter: under 20 lines, loads as its text says, and does what it says."""

import sys
from pathlib import Path

import pytest

from sidecar.api import Filter
from sidecar.model.snapshot import FilterUse
from sidecar.plugins.loader import Loader
from sidecar.testing import check_filter, make_request

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture
def add_tenant(monkeypatch: pytest.MonkeyPatch) -> type[Filter]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    prepared = Loader(["filter_add_tenant"], [str(EXAMPLES)]).prepare(FilterUse("filter_add_tenant:AddTenant"))
    assert issubclass(prepared.cls, Filter)
    return prepared.cls


def test_it_is_short() -> None:
    assert len((EXAMPLES / "filter_add_tenant.py").read_text().splitlines()) < 20


def test_it_keeps_the_contract(add_tenant: type[Filter]) -> None:
    check_filter(add_tenant)
    check_filter(add_tenant, {"header": "x-team"})


def test_it_names_the_caller(add_tenant: type[Filter]) -> None:
    filter_ = add_tenant(add_tenant.decode({"header": "x-team"}))
    request = make_request(headers={"x-team": "forged"}, caller_service="web")
    filter_.on_request(request)
    assert request.headers.get_all("x-team") == ["web"]
    stranger = make_request(caller="", caller_service="")
    filter_.on_request(stranger)
    assert stranger.headers.get("x-team") == "unknown"
