"""The example balancer: short, loads as its text says, and does what it says."""

import random
import sys
from pathlib import Path

import pytest

from sidecar.model.snapshot import EndpointSpec, Service
from sidecar.plugins.loader import Loader
from sidecar.policy.endpoint import Endpoint
from sidecar.testing import check_balancer

EXAMPLES = Path(__file__).parents[3] / "examples"


def test_it_is_short_keeps_the_contract_and_prefers_what_is_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len((EXAMPLES / "balancer_cheapest.py").read_text().splitlines()) < 20
    monkeypatch.setattr(sys, "path", list(sys.path))
    found = Loader(["balancer_cheapest"], [str(EXAMPLES)]).balancer(Service("", balance="balancer_cheapest:Cheapest"))
    check_balancer(found.cls)
    endpoints = tuple(Endpoint(EndpointSpec(host, 1, {"price": price})) for host, price in (("a", "3"), ("b", "1.5")))
    pick = found.cls().arrange(endpoints)
    rnd = random.Random(1).random
    picked = []
    for _ in range(13):
        endpoint = pick(endpoints, None, 0.0, rnd)
        assert isinstance(endpoint, Endpoint)
        endpoint.active += 1
        picked.append(endpoint.host)
    assert "".join(picked) == "b" * 10 + "aaa"
