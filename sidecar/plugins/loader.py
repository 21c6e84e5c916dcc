"""Makes what a policy names ready for use: filters and balancers, found, checked and with their settings accepted.

Must not know requests or the proxy. Invariant: whatever a plug-in's class or settings do wrong becomes a PluginError
with the place in the policy and what to do.
"""

import inspect
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from sidecar.api import BALANCER_HOOKS, HOOKS, AsyncFilter, Balancer, ConfigError, Filter, FilterBase
from sidecar.model.snapshot import Balancing as Stated
from sidecar.model.snapshot import FilterUse, Service
from sidecar.model.source import Source
from sidecar.policy.balancing import Arrange, Balancing

from .builtin import BUILT_IN_BALANCERS, BUILT_INS
from .finding import Kind, PluginError, describe, find_class
from .guard import Guard, Report

__all__ = ["BALANCERS", "FILTERS", "Loader", "PluginError", "Prepared", "PreparedBalancer", "describe"]

FILTERS = Kind(
    "filter",
    "pillion.filters",
    BUILT_INS,
    {"sidecar.api.Filter": Filter, "sidecar.api.AsyncFilter": AsyncFilter},
)
BALANCERS = Kind("balancer", "pillion.balancers", BUILT_IN_BALANCERS, {"sidecar.api.Balancer": Balancer})


@dataclass(frozen=True, slots=True)
class Prepared:
    """A filter that has been found and whose settings were accepted; `make` gives one that is not open yet.

    `key` is equal for equal uses at the same place: a running filter of that key may go on serving under a new policy.
    `fails_open` is the policy's `on_error`, or the filter's own.
    """

    name: str
    cls: type[FilterBase]
    settings: Any
    use: FilterUse
    fails_open: bool
    key: str

    def make(self) -> FilterBase:
        try:
            return self.cls(self.settings)
        except Exception as error:
            raise PluginError(self.use.source, f"{self.name} could not be made: {describe(error)}") from error


@dataclass(frozen=True, slots=True)
class PreparedBalancer:
    """A balancer that has been found and whose settings were accepted. `key` is equal for equal names and settings:
    a balancer of that key may go on serving under a new policy. `told`: it wants to hear of attempts."""

    name: str
    cls: type[Balancer]
    settings: Any
    source: Source
    key: str

    @property
    def told(self) -> bool:
        return any(getattr(self.cls, hook) is not getattr(Balancer, hook) for hook in BALANCER_HOOKS[:2])

    def make(self, report: Report) -> Balancing:
        """A built-in as it is; any other is watched by a Guard, which reports what it does wrong."""
        balancer = self._balancer()
        if self.name not in BUILT_IN_BALANCERS:
            balancer = Guard(balancer, report)
        # The contract sees of an endpoint less than there is, so its types are wider than the plan's.
        return Balancing(balancer, cast(Arrange, balancer.arrange), self.cls.keyed, self.told)

    def _balancer(self) -> Balancer:
        try:
            return self.cls(self.settings)
        except Exception as error:
            raise PluginError(self.source, f'balancer "{self.name}" could not be made: {describe(error)}') from error


class Loader:
    """`allow` are module prefixes (whole dotted components); `paths` are further directories to import from."""

    def __init__(self, allow: Iterable[str] = (), paths: Sequence[str] = ()) -> None:
        self.allow = tuple(allow)
        self._balancers: dict[str, type[Balancer]] = {}  # by name: found and fit
        for path in paths:
            if path not in sys.path:
                sys.path.append(path)  # last, so that nothing in it can stand in for another module

    def prepare(self, use: FilterUse) -> Prepared:
        """Raises PluginError."""
        cls: type[FilterBase] = find_class(FILTERS, use.use, use.source, self.allow)
        name = f'filter "{use.use}"'
        self._check_filter(use, cls, name)
        settings = _settings(cls, use.config, name, "with", use.source)
        fails_open = (use.on_error or cls.on_error) == "open"
        key = json.dumps([use.use, use.config, use.side, fails_open, str(use.source)], sort_keys=True, default=repr)
        return Prepared(use.use, cls, settings, use, fails_open, key)

    def balancer(self, service: Service) -> PreparedBalancer:
        """The service's balancer. Raises PluginError."""
        name, stated = service.balance, service.balancing
        words = f'balancer "{name}"'
        cls = self._balancers.get(name)
        if cls is None:
            cls = self._balancers[name] = self._find_balancer(name, words, stated)
        settings = _settings(cls, stated.config, words, "balance.with", stated.source)
        return PreparedBalancer(
            name, cls, settings, stated.source, json.dumps([name, stated.config], sort_keys=True, default=repr)
        )

    def _find_balancer(self, name: str, words: str, stated: Stated) -> type[Balancer]:
        cls: type[Balancer] = find_class(BALANCERS, name, stated.source, self.allow)
        for method in ("arrange", "pick", *BALANCER_HOOKS):
            if inspect.iscoroutinefunction(getattr(cls, method)):
                raise PluginError(stated.source, f"{words}: {method} must be a plain function; a balancer never waits")
        if cls.pick is Balancer.pick and cls.arrange is Balancer.arrange:
            raise PluginError(stated.source, f"{words} overrides neither pick nor arrange, so it picks nobody")
        return cls

    def _check_filter(self, use: FilterUse, cls: type[FilterBase], name: str) -> None:
        if cls.side not in ("in", "out", "both") or cls.on_error not in ("closed", "open"):
            raise PluginError(
                use.source, f'{name}: its class must state side "in", "out" or "both", and on_error "closed" or "open"'
            )
        if cls.side not in (use.side, "both"):
            raise PluginError(use.source, f"{name} works on side {cls.side} only; write `side: {cls.side}`")
        for hook in HOOKS:
            waits = inspect.iscoroutinefunction(getattr(cls, hook))
            may_wait = issubclass(cls, AsyncFilter) and hook in ("on_request", "on_response")
            if waits and not may_wait:
                raise PluginError(
                    use.source,
                    f"{name}: {hook} must be a plain function"
                    + ("" if issubclass(cls, AsyncFilter) else "; one that waits belongs into an AsyncFilter"),
                )
            if may_wait and not waits:
                raise PluginError(
                    use.source,
                    f"{name}: {hook} of an AsyncFilter must be `async def`; one that never waits is a Filter",
                )


def _settings(cls: Any, config: Any, name: str, under: str, source: Source) -> Any:
    try:
        return cls.decode(config)
    except ConfigError as error:
        key = f"{under}.{error.key}" if error.key else under
        raise PluginError(source, f"{name}: {key}: {error.problem}") from error
    except Exception as error:
        raise PluginError(source, f"{name} could not read its settings: {describe(error)}") from error
