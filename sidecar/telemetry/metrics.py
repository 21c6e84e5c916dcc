"""The registry of metrics, and their text for Prometheus.

A slot is asked for once, when a plan is compiled; the scrape does the work, in steps short enough that the caller can
let other tasks run between them. Must not know what is counted: the names are in `catalogue`.
Invariants: one thread writes and renders; equal labels give the same slot, so numbers survive a change of policy; a
slot that the policy has not asked for since one hour is dropped.
"""

import re
from collections.abc import Callable, Iterator
from typing import TypeVar

from .slots import Counter, CounterSet, Gauge, Histogram, Labels, Level, Reading, RequestStats, Slot

SERIES_PER_STEP = 32

TEXT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"

_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*\Z")
_OPENMETRICS_HELP_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})
_HELP_ESCAPES = str.maketrans({"\\": "\\\\", "\n": "\\n"})

_S = TypeVar("_S", bound=Slot)


class _Family:
    """All series of one name."""

    __slots__ = ("help", "kind", "name", "slots")

    def __init__(self, name: str, kind: str, help_text: str) -> None:
        self.name = name
        self.kind = kind
        self.help = help_text
        self.slots: dict[tuple[tuple[str, str], ...], Slot] = {}

    def head(self, openmetrics: bool) -> str:
        name = self.name
        if openmetrics and self.kind == "counter":
            name = name.removesuffix("_total")
        help_text = self.help.translate(_OPENMETRICS_HELP_ESCAPES if openmetrics else _HELP_ESCAPES)
        return f"# HELP {name} {help_text}\n# TYPE {name} {self.kind}\n"

    def lines(self) -> Iterator[str]:
        for slot in tuple(self.slots.values()):
            yield from slot.series(self.name)


class _ActiveFamily(_Family):
    """The requests in flight: a second reading of the slots of a request family."""

    __slots__ = ("_requests",)

    def __init__(self, name: str, help_text: str, requests: _Family) -> None:
        super().__init__(name, "gauge", help_text)
        self._requests = requests

    def lines(self) -> Iterator[str]:
        for slot in tuple(self._requests.slots.values()):
            if isinstance(slot, RequestStats):
                yield slot.active_line(self.name)


class Registry:
    """All slots of one sidecar. `clock` is monotonic and only used to forget what is gone."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._families: dict[str, _Family] = {}
        self._requests = {
            "in": self._family("http_server_request_duration_seconds", "histogram", "Duration of inbound requests."),
            "out": self._family("http_client_request_duration_seconds", "histogram", "Duration of outbound requests."),
        }
        for side, word in (("in", "server"), ("out", "client")):
            name = f"http_{word}_active_requests"
            self._families[name] = _ActiveFamily(
                name, f"{side.capitalize()}bound requests in flight.", self._requests[side]
            )
        self._errors = self.counter("pillion_scrape_errors_total", "Gauges that could not be read.")

    def requests(self, *, side: str, service: str, route: str, version: str = "") -> RequestStats:
        """The slot of one side ("in" or "out"), service, route and version; to be asked for at compile time."""
        key = (("service", service), ("http_route", route), ("version", version))
        family = self._requests[side]
        slot = family.slots.get(key)
        if slot is None:
            slot = family.slots[key] = RequestStats(key, side)
        slot.ask()
        assert isinstance(slot, RequestStats)
        return slot

    def counter(self, name: str, help_text: str, /, *, expires: bool = False, **labels: str) -> Counter:
        """`expires`: the slot belongs to the policy and is asked for again at every compilation."""
        key = _label_key(labels)
        return self._slot(self._family(name, "counter", help_text), key, Counter, lambda: Counter(key, expires))

    def counters(self, name: str, help_text: str, label: str, /, *, expires: bool = False, **labels: str) -> CounterSet:
        """A counter for each value of `label`, which comes at run time: `slot.inc(value)`."""
        key = (*_label_key(labels), *_label_key({label: "*"}))
        fixed = key[:-1]
        family = self._family(name, "counter", help_text)
        return self._slot(family, key, CounterSet, lambda: CounterSet(fixed, expires, label))

    def level(self, name: str, help_text: str, /, *, expires: bool = False, **labels: str) -> Level:
        key = _label_key(labels)
        return self._slot(self._family(name, "gauge", help_text), key, Level, lambda: Level(key, expires))

    def gauge(self, name: str, help_text: str, read: Callable[[], Reading], /, **labels: str) -> None:
        """`read` is called by the scrape and gives a number, or pairs of labels and number. The last one stays."""
        key = _label_key(labels)
        family = self._family(name, "gauge", help_text)
        self._slot(family, key, Gauge, lambda: Gauge(key, read, self._errors)).read = read

    def reading_counter(self, name: str, help_text: str, read: Callable[[], Reading], /, **labels: str) -> None:
        """A counter that somebody else keeps; read like a gauge."""
        key = _label_key(labels)
        family = self._family(name, "counter", help_text)
        self._slot(family, key, Gauge, lambda: Gauge(key, read, self._errors)).read = read

    def histogram(
        self, name: str, help_text: str, bounds: tuple[float, ...], /, *, expires: bool = False, **labels: str
    ) -> Histogram:
        if list(bounds) != sorted(set(bounds)):
            raise ValueError(f"the bounds of {name} do not rise")
        key = _label_key(labels)
        family = self._family(name, "histogram", help_text)
        return self._slot(family, key, Histogram, lambda: Histogram(key, expires, bounds))

    def swapped(self) -> None:
        """A new policy has been compiled: slots that it did not ask for begin to age."""
        now_s = self._clock()
        for family in self._families.values():
            for slot in family.slots.values():
                slot.swapped(now_s)

    def render(self, *, openmetrics: bool = False) -> Iterator[bytes]:
        """The text, in steps of some 32 series (well under a millisecond each)."""
        self._forget_gone()
        for family in tuple(self._families.values()):
            lines: list[str] = []
            for index, line in enumerate(family.lines()):
                if index == 0:
                    lines.append(family.head(openmetrics))
                lines.append(line)
                if len(lines) >= SERIES_PER_STEP:
                    yield "".join(lines).encode("utf-8", "backslashreplace")
                    lines.clear()
            if lines:
                yield "".join(lines).encode("utf-8", "backslashreplace")
        if openmetrics:
            yield b"# EOF\n"

    def _forget_gone(self) -> None:
        now_s = self._clock()
        for family in self._families.values():
            for key in [key for key, slot in family.slots.items() if slot.is_over(now_s)]:
                del family.slots[key]

    def _family(self, name: str, kind: str, help_text: str) -> _Family:
        family = self._families.get(name)
        if family is None:
            if not _NAME.match(name):
                raise ValueError(f"not a metric name: {name!r}")
            if (kind == "counter") != name.endswith("_total"):
                raise ValueError(f"{name}: the names of counters, and only they, end in _total")
            family = self._families[name] = _Family(name, kind, help_text)
        if family.kind != kind or family.help != help_text:
            raise ValueError(f"{name} is already registered as a {family.kind}: {family.help}")
        return family

    @staticmethod
    def _slot(family: _Family, key: tuple[tuple[str, str], ...], kind: type[_S], make: Callable[[], _S]) -> _S:
        slot = family.slots.get(key)
        if slot is None:
            slot = family.slots[key] = make()
        if not isinstance(slot, kind):
            raise ValueError(f"{family.name}{dict(key)} is already registered as a {type(slot).__name__}")
        slot.ask()
        return slot


def _label_key(labels: Labels) -> tuple[tuple[str, str], ...]:
    for name in labels:
        if not _NAME.match(name) or name in ("le", "quantile") or name.startswith("__"):
            raise ValueError(f"not a label name: {name!r}")
    return tuple(sorted(labels.items()))
