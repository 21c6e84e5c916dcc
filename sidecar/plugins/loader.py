"""Finds, imports and checks the filters that a policy names.

A name is a built-in's, an entry point's (group `pillion.filters`), or `module:Class`. The last is code chosen by
whoever writes the policy, so it is imported only under a prefix that this sidecar's own `--allow-filters` permits.
Must not know requests or the proxy. Invariants: nothing is imported before it is found to be allowed; whatever a
filter's module or class does wrong becomes a FilterError with the place in the policy and what to do.
"""

import importlib
import inspect
import json
import sys
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from types import TracebackType
from typing import Any

from sidecar.api import HOOKS, AsyncFilter, ConfigError, Filter, FilterBase
from sidecar.model.snapshot import FilterUse
from sidecar.model.source import Source

from .builtin import BUILT_INS

GROUP = "pillion.filters"


class FilterError(Exception):
    """A filter that cannot be used: `source` is the place in the policy, `text` what is wrong and what to do."""

    def __init__(self, source: Source, text: str) -> None:
        super().__init__(f"{source}: {text}")
        self.source = source
        self.text = text


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
            raise FilterError(self.use.source, f"{self.name} could not be made: {describe(error)}") from error


class Loader:
    """`allow` are module prefixes (whole dotted components); `paths` are further directories to import from."""

    def __init__(self, allow: Iterable[str] = (), paths: Sequence[str] = ()) -> None:
        self.allow = tuple(allow)
        for path in paths:
            if path not in sys.path:
                sys.path.append(path)  # last, so that nothing in it can stand in for another module

    def prepare(self, use: FilterUse) -> Prepared:
        """Raises FilterError."""
        cls = self._class(use)
        name = f'filter "{use.use}"'
        self._check_class(use, cls, name)
        try:
            settings = cls.decode(use.config)
        except ConfigError as error:
            key = f"with.{error.key}" if error.key else "with"
            raise FilterError(use.source, f"{name}: {key}: {error.problem}") from error
        except Exception as error:
            raise FilterError(use.source, f"{name} could not read its settings: {describe(error)}") from error
        fails_open = (use.on_error or cls.on_error) == "open"
        key = json.dumps([use.use, use.config, use.side, fails_open, str(use.source)], sort_keys=True, default=repr)
        return Prepared(use.use, cls, settings, use, fails_open, key)

    def _class(self, use: FilterUse) -> type[FilterBase]:
        name = use.use
        if name in BUILT_INS:
            target = BUILT_INS[name]
        elif ":" in name:
            target = name
            self._check_allowed(use, name.partition(":")[0])
        else:
            target = _entry_point(use).value
        module_name, _, path = target.partition(":")
        path = path.partition("[")[0].strip()  # an entry point may name extras
        module = _import(use, module_name.strip())
        found: Any = module
        for part in path.split("."):
            try:
                found = getattr(found, part)
            except AttributeError:
                raise FilterError(
                    use.source, f'filter "{name}": {module_name} has no {path}{_near(path, module)}'
                ) from None
        if not isinstance(found, type) or not issubclass(found, Filter | AsyncFilter):
            raise FilterError(
                use.source,
                f'filter "{name}" is not a filter; {module_name}:{path} must be a class that derives from '
                "sidecar.api.Filter or sidecar.api.AsyncFilter",
            )
        return found

    def _check_allowed(self, use: FilterUse, module: str) -> None:
        if any(module == prefix or module.startswith(prefix + ".") for prefix in self.allow):
            return
        allowed = f"it allows {', '.join(self.allow)}" if self.allow else "it allows none"
        raise FilterError(
            use.source,
            f'filter "{use.use}" is not allowed here: a policy may not choose what code a sidecar runs ({allowed}); '
            f"to permit it, start this sidecar with --allow-filters {module}",
        )

    def _check_class(self, use: FilterUse, cls: type[FilterBase], name: str) -> None:
        if inspect.isabstract(cls):
            raise FilterError(use.source, f"{name} is abstract: it leaves methods to a subclass; name that one")
        if cls.side not in ("in", "out", "both") or cls.on_error not in ("closed", "open"):
            raise FilterError(
                use.source, f'{name}: its class must state side "in", "out" or "both", and on_error "closed" or "open"'
            )
        if cls.side not in (use.side, "both"):
            raise FilterError(use.source, f"{name} works on side {cls.side} only; write `side: {cls.side}`")
        for hook in HOOKS:
            waits = inspect.iscoroutinefunction(getattr(cls, hook))
            may_wait = issubclass(cls, AsyncFilter) and hook in ("on_request", "on_response")
            if waits and not may_wait:
                raise FilterError(
                    use.source,
                    f"{name}: {hook} must be a plain function"
                    + ("" if issubclass(cls, AsyncFilter) else "; one that waits belongs into an AsyncFilter"),
                )
            if may_wait and not waits:
                raise FilterError(
                    use.source,
                    f"{name}: {hook} of an AsyncFilter must be `async def`; one that never waits is a Filter",
                )


def available() -> dict[str, str]:
    """Every filter that can be named without `--allow-filters`: name and where it comes from."""
    found = {point.name: point.value for point in entry_points(group=GROUP)}
    return dict(sorted({**found, **BUILT_INS}.items()))


def describe(error: BaseException) -> str:
    """An exception in one line, with the line of code that raised it."""
    text = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    if isinstance(error, SyntaxError) and error.filename:
        return f"{text} ({error.filename}:{error.lineno})"
    place = _place(error.__traceback__)
    return f"{text} ({place})" if place else text


def _place(tb: TracebackType | None) -> str:
    """The innermost frame that is neither ours nor the import machinery's."""
    place = ""
    for frame in traceback.extract_tb(tb):
        if (
            not frame.filename.startswith("<frozen")
            and frame.filename != __file__
            and "importlib" not in frame.filename
        ):
            place = f"{frame.filename}:{frame.lineno}"
    return place


def _entry_point(use: FilterUse) -> EntryPoint:
    points = list(entry_points(group=GROUP, name=use.use))
    if not points:
        known = list(available())
        close = get_close_matches(use.use, known, 1)
        hint = f'did you mean "{close[0]}"?' if close else f"known here: {', '.join(known)}"
        raise FilterError(
            use.source,
            f'no filter "{use.use}" is installed; {hint} (a distribution offers one as an entry point of the group '
            f"{GROUP}; code of your own is named module:Class)",
        )
    if len({point.value for point in points}) > 1:
        offers = " and ".join(sorted(f"{point.value} ({point.dist.name if point.dist else '?'})" for point in points))
        raise FilterError(use.source, f'the filter "{use.use}" is offered twice, by {offers}; uninstall one')
    return points[0]


def _import(use: FilterUse, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(error.name + ".")):
            raise FilterError(
                use.source,
                f'filter "{use.use}": no module named {error.name} is installed; install it beside pillion, or name '
                "its directory with --filter-path",
            ) from None
        raise FilterError(use.source, f'filter "{use.use}" does not import: {describe(error)}') from error
    except (Exception, SystemExit) as error:
        raise FilterError(use.source, f'filter "{use.use}" does not import: {describe(error)}') from error


def _near(path: str, module: Any) -> str:
    close = get_close_matches(path, [name for name in vars(module) if not name.startswith("_")], 1)
    return f'; did you mean "{close[0]}"?' if close else ""
