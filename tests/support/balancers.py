"""Balancers for tests of what asks them: found and made as a sidecar does it."""

from sidecar.model.snapshot import Service
from sidecar.plugins.loader import Loader
from sidecar.policy.balancing import Balancing


def unexpected(text: str) -> None:
    raise AssertionError(text)


def balancer_of(service: Service) -> Balancing:
    """The balancer that a service names."""
    return Loader().balancer(service).make(unexpected)


LEAST_REQUEST = balancer_of(Service("")).arrange
ROUND_ROBIN = balancer_of(Service("", balance="round-robin")).arrange
