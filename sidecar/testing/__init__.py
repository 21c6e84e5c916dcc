"""A kit for the tests of filters and balancers.

from sidecar.testing import check_filter, make_request

def test_it_keeps_the_contract():
    check_filter(AddTenant, {"header": "x-tenant"})

def test_it_names_the_caller():
    request = make_request(caller_service="web")
    AddTenant(AddTenant.decode({})).on_request(request)
    assert request.headers.get("x-tenant") == "web"

def test_the_balancer_keeps_its_contract():
    check_balancer(Cheapest, {"label": "price"})
"""

from .balancing import check_balancer, make_endpoints
from .checking import acheck_filter, check_filter
from .making import CountedUp, Surroundings, make_context, make_request, make_response

__all__ = [
    "CountedUp",
    "Surroundings",
    "acheck_filter",
    "check_balancer",
    "check_filter",
    "make_context",
    "make_endpoints",
    "make_request",
    "make_response",
]
