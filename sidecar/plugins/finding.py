"""Finds and imports the class that a policy names: a filter or a balancer.

A name is a built-in's, an entry point's (of the kind's group), or `module:Class`. The last is code chosen by whoever
writes the policy, so it is imported only under a prefix that this sidecar's own `--allow-filters` permits. Must not
know what the class is for. Invariants: nothing is imported before it is found to be allowed; whatever is wrong becomes
a PluginError with the place in the policy and what to do.
"""

import importlib
import inspect
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sidecar.model.source import Source

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


class PluginError(Exception):
    """A plug-in that cannot be used: `source` is the place in the policy, `text` what is wrong and what to do."""

    def __init__(self, source: Source, text: str) -> None:
        super().__init__(f"{source}: {text}")
        self.source = source
        self.text = text


@dataclass(frozen=True, slots=True)
class Kind:
    """`bases`: what its classes derive from, by public name."""

    noun: str
    group: str
    built_ins: Mapping[str, str]
    bases: Mapping[str, type]


def find_class(kind: Kind, name: str, source: Source, allow: Sequence[str]) -> Any:
    """The class of that name. Raises PluginError."""
    named = f'{kind.noun} "{name}"'
    if name in kind.built_ins:
        target = kind.built_ins[name]
    elif ":" in name:
        target = name
        _check_allowed(named, source, name.partition(":")[0], allow)
    else:
        target = _entry_point(kind, name, source).value
    module_name, _, path = target.partition(":")
    path = path.partition("[")[0].strip()  # an entry point may name extras
    module = _import(named, source, module_name.strip())
    found: Any = module
    for part in path.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise PluginError(source, f"{named}: {module_name} has no {path}{_near(path, module)}") from None
    if not isinstance(found, type) or not issubclass(found, tuple(kind.bases.values())):
        raise PluginError(
            source,
            f"{named} is not a {kind.noun}; {module_name}:{path} must be a class that derives from "
            f"{' or '.join(kind.bases)}",
        )
    if inspect.isabstract(found):
        raise PluginError(source, f"{named} is abstract: it leaves methods to a subclass; name that one")
    return found


def available(kind: Kind) -> dict[str, str]:
    """Everything of this kind that can be named without `--allow-filters`: name and where it comes from."""
    from importlib.metadata import entry_points  # late: it loads all of `email`, and most policies name built-ins

    found = {point.name: point.value for point in entry_points(group=kind.group)}
    return dict(sorted({**found, **kind.built_ins}.items()))


def describe(error: BaseException) -> str:
    """An exception in one line, with the line of code that raised it."""
    text = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    if isinstance(error, SyntaxError) and error.filename:
        return f"{text} ({error.filename}:{error.lineno})"
    place = _place(error.__traceback__)
    return f"{text} ({place})" if place else text


def _check_allowed(named: str, source: Source, module: str, allow: Sequence[str]) -> None:
    if any(module == prefix or module.startswith(prefix + ".") for prefix in allow):
        return
    allowed = f"it allows {', '.join(allow)}" if allow else "it allows none"
    raise PluginError(
        source,
        f"{named} is not allowed here: a policy may not choose what code a sidecar runs ({allowed}); "
        f"to permit it, start this sidecar with --allow-filters {module}",
    )


def _place(tb: TracebackType | None) -> str:
    """The innermost frame that is neither ours nor the import machinery's."""
    place = ""
    ours = __file__.rpartition("/")[0]
    for frame in traceback.extract_tb(tb):
        if (
            not frame.filename.startswith("<frozen")
            and frame.filename not in (__file__, f"{ours}/loader.py")
            and "importlib" not in frame.filename
        ):
            place = f"{frame.filename}:{frame.lineno}"
    return place


def _entry_point(kind: Kind, name: str, source: Source) -> "EntryPoint":
    from importlib.metadata import entry_points

    points = list(entry_points(group=kind.group, name=name))
    if not points:
        known = list(available(kind))
        close = get_close_matches(name, known, 1)
        hint = f'did you mean "{close[0]}"?' if close else f"known here: {', '.join(known)}"
        raise PluginError(
            source,
            f'no {kind.noun} "{name}" is installed; {hint} (a distribution offers one as an entry point of the group '
            f"{kind.group}; code of your own is named module:Class)",
        )
    if len({point.value for point in points}) > 1:
        offers = " and ".join(sorted(f"{point.value} ({point.dist.name if point.dist else '?'})" for point in points))
        raise PluginError(source, f'the {kind.noun} "{name}" is offered twice, by {offers}; uninstall one')
    return points[0]


def _import(named: str, source: Source, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(error.name + ".")):
            raise PluginError(
                source,
                f"{named}: no module named {error.name} is installed; install it beside pillion, or name "
                "its directory with --filter-path",
            ) from None
        raise PluginError(source, f"{named} does not import: {describe(error)}") from error
    except (Exception, SystemExit) as error:
        raise PluginError(source, f"{named} does not import: {describe(error)}") from error


def _near(path: str, module: Any) -> str:
    close = get_close_matches(path, [name for name in vars(module) if not name.startswith("_")], 1)
    return f'; did you mean "{close[0]}"?' if close else ""
