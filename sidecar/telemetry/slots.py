"""The slots that the hot path adds to, and their lines of text.

Plain integers, no locks, no label look-ups: a slot is asked for once, when a plan is compiled, and is then only added
to. Must not know where slots are kept (that is the registry's, in `metrics`), nor HTTP beyond methods and statuses.
Invariant: the number of series of one slot is bounded whatever peers send.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping

KEEP_GONE_S = 3600.0
CELLS_MAX = 128  # combinations of method, status and reason in one RequestStats
VALUES_MAX = 128  # label values in one CounterSet
LABEL_CHARS_MAX = 256

# The buckets that OpenTelemetry advises for http.server.request.duration and http.client.request.duration.
DURATION_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)

# OpenTelemetry's known methods: RFC 9110, PATCH (RFC 5789), QUERY. Everything else is counted as _OTHER.
METHODS = frozenset({b"CONNECT", b"DELETE", b"GET", b"HEAD", b"OPTIONS", b"PATCH", b"POST", b"PUT", b"QUERY", b"TRACE"})
OTHER = "_OTHER"

# The gRPC statuses that OpenTelemetry counts as errors of a server.
SERVER_ERRORS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})

Labels = Mapping[str, str]
Reading = float | Iterable[tuple[Labels, float]]

_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})


def label_text(labels: Iterable[tuple[str, str]]) -> str:
    """`a="b",c="d"`, escaped; empty values are left out (to Prometheus they are the same as absent ones)."""
    return ",".join(f'{name}="{value[:LABEL_CHARS_MAX].translate(_ESCAPES)}"' for name, value in labels if value)


def number_text(value: float) -> str:
    if value != value:
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(value)


def _sample(name: str, labels: str, value: float) -> str:
    return f"{name}{{{labels}}} {number_text(value)}\n" if labels else f"{name} {number_text(value)}\n"


def _histogram(name: str, labels: str, bounds: tuple[str, ...], cell: list[float]) -> str:
    comma = "," if labels else ""
    lines = []
    total = 0
    for bound, count in zip(bounds, cell, strict=False):  # the last element of a cell is its sum
        total += int(count)
        lines.append(f'{name}_bucket{{{labels}{comma}le="{bound}"}} {total}\n')
    lines.append(_sample(f"{name}_sum", labels, cell[-1]))
    lines.append(_sample(f"{name}_count", labels, total))
    return "".join(lines)


def _bound_texts(bounds: tuple[float, ...]) -> tuple[str, ...]:
    return (*(repr(float(bound)) for bound in bounds), "+Inf")


_DURATION_BOUND_TEXTS = _bound_texts(DURATION_BOUNDS_S)


class Slot:
    """What all series have in common: their labels, and whether a policy still wants them."""

    __slots__ = ("_asked", "_expires", "_gone_s", "_labels", "_seen")

    def __init__(self, labels: tuple[tuple[str, str], ...], expires: bool) -> None:
        self._labels = labels
        self._expires = expires
        self._asked = True
        self._gone_s: float | None = None
        self._seen: float = 0

    def activity(self) -> float:
        """A number that changes whenever the slot is used."""
        raise NotImplementedError

    def series(self, name: str) -> Iterator[str]:
        """The lines of each series, one string a series."""
        raise NotImplementedError

    def ask(self) -> None:
        self._asked = True
        self._gone_s = None

    def swapped(self, now_s: float) -> None:
        if not self._asked and self._gone_s is None and self._expires:
            self._gone_s = now_s
            self._seen = self.activity()
        self._asked = False

    def is_over(self, now_s: float) -> bool:
        if self._gone_s is None or now_s - self._gone_s < KEEP_GONE_S:
            return False
        if self.activity() == self._seen:
            return True
        self._gone_s = now_s  # a request of the old policy was still running
        self._seen = self.activity()
        return False


class Counter(Slot):
    """A number that only grows. The hot path may write `slot.value += 1` itself."""

    __slots__ = ("value",)

    def __init__(self, labels: tuple[tuple[str, str], ...], expires: bool) -> None:
        super().__init__(labels, expires)
        self.value = 0

    def inc(self, n: int = 1) -> None:
        self.value += n

    def activity(self) -> float:
        return self.value

    def series(self, name: str) -> Iterator[str]:
        yield _sample(name, label_text(self._labels), self.value)


class Level(Slot):
    """A number that rises and falls, set by whoever holds it: `level.value = 2`, `level.value += 1`."""

    __slots__ = ("value",)

    def __init__(self, labels: tuple[tuple[str, str], ...], expires: bool) -> None:
        super().__init__(labels, expires)
        self.value: float = 0

    def activity(self) -> float:
        return self.value

    def series(self, name: str) -> Iterator[str]:
        yield _sample(name, label_text(self._labels), self.value)


class Gauge(Slot):
    """A number, or a number for each set of labels, that is read when somebody asks."""

    __slots__ = ("_errors", "read")

    def __init__(self, labels: tuple[tuple[str, str], ...], read: Callable[[], Reading], errors: Counter) -> None:
        super().__init__(labels, False)
        self.read = read
        self._errors = errors

    def activity(self) -> float:
        return 0

    def series(self, name: str) -> Iterator[str]:
        try:
            reading = self.read()
            if isinstance(reading, int | float):
                texts = {label_text(self._labels): float(reading)}
            else:  # by text: a series that occurs twice would make Prometheus refuse the whole scrape
                texts = {label_text((*self._labels, *labels.items())): float(value) for labels, value in reading}
        except Exception:  # one broken source must not hide all the others
            self._errors.value += 1
            return
        for text, value in texts.items():
            yield _sample(name, text, value)


class CounterSet(Slot):
    """Counters that differ in one label whose values come at run time; beyond VALUES_MAX they share `_OTHER`."""

    __slots__ = ("_name", "_values")

    def __init__(self, labels: tuple[tuple[str, str], ...], expires: bool, name: str) -> None:
        super().__init__(labels, expires)
        self._name = name
        self._values: dict[str, int] = {}

    def inc(self, value: str, n: int = 1) -> None:
        values = self._values
        if value not in values and len(values) >= VALUES_MAX:
            value = OTHER
        values[value] = values.get(value, 0) + n

    def get(self, value: str) -> int:
        return self._values.get(value, 0)

    def activity(self) -> float:
        return sum(self._values.values())

    def series(self, name: str) -> Iterator[str]:
        merged: dict[str, int] = {}  # values may become equal by truncation
        for value, count in self._values.items():
            text = label_text((*self._labels, (self._name, value)))
            merged[text] = merged.get(text, 0) + count
        for text, count in merged.items():
            yield _sample(name, text, count)


class Histogram(Slot):
    """Observations by size. `observe` costs one bisection."""

    __slots__ = ("_bounds", "_cell", "_texts")

    def __init__(self, labels: tuple[tuple[str, str], ...], expires: bool, bounds: tuple[float, ...]) -> None:
        super().__init__(labels, expires)
        self._bounds = bounds
        self._texts = _bound_texts(bounds)
        self._cell: list[float] = [0] * (len(bounds) + 2)

    def observe(self, value: float) -> None:
        cell = self._cell
        cell[bisect_left(self._bounds, value)] += 1
        cell[-1] += value

    def activity(self) -> float:
        return sum(self._cell[:-1])

    def series(self, name: str) -> Iterator[str]:
        yield _histogram(name, label_text(self._labels), self._texts, self._cell)


class RequestStats(Slot):
    """Durations of the requests of one side, service, route and version, by method, status, reason and, of gRPC calls,
    gRPC status.

    `active` counts what is in flight: the driver adds and subtracts. `record` makes no object but the look-up's key
    once a combination has been seen.
    """

    __slots__ = ("_cells", "_side", "active")

    def __init__(self, labels: tuple[tuple[str, str], ...], side: str) -> None:
        super().__init__(labels, True)
        self._side = side
        self._cells: dict[tuple[bytes, int, str, str], list[float]] = {}
        self.active = 0

    def record(self, method: bytes, status: int, reason: str, duration_s: float, grpc_status: str = "") -> None:
        try:
            cell = self._cells[method, status, reason, grpc_status]
        except KeyError:
            cell = self._new_cell(method, status, reason, grpc_status)
        cell[bisect_left(DURATION_BOUNDS_S, duration_s)] += 1
        cell[-1] += duration_s

    def _new_cell(self, method: bytes, status: int, reason: str, grpc_status: str) -> list[float]:
        if method not in METHODS:
            method = b"_OTHER"
        if not 100 <= status <= 999:
            status = 0
        key = (method, status, reason, grpc_status)
        cells = self._cells
        if key not in cells and len(cells) >= CELLS_MAX:
            key = (b"", -1, "", "")  # the overflow series
        return cells.setdefault(key, [0] * (len(DURATION_BOUNDS_S) + 2))

    def activity(self) -> float:
        return self.active + sum(sum(cell[:-1]) for cell in self._cells.values())

    def series(self, name: str) -> Iterator[str]:
        for key, cell in tuple(self._cells.items()):
            yield _histogram(name, self._cell_text(*key), _DURATION_BOUND_TEXTS, cell)

    def active_line(self, name: str) -> str:
        return _sample(name, label_text(self._labels), self.active)

    def _cell_text(self, method: bytes, status: int, reason: str, grpc_status: str) -> str:
        if status < 0:
            return label_text((*self._labels, ("otel_metric_overflow", "true")))
        return label_text(
            (
                *self._labels,
                ("http_request_method", method.decode("ascii")),
                ("http_response_status_code", str(status) if status else ""),
                ("grpc_status", grpc_status),
                ("reason", reason),
                ("error_type", _error_type(self._side, status, reason, grpc_status)),
            )
        )


def _error_type(side: str, status: int, reason: str, grpc_status: str) -> str:
    """OpenTelemetry's error.type: a client counts 4xx and 5xx as errors, a server 5xx only; no answer is an error. Of a
    gRPC call the status decides: a client counts all but OK, a server those that are its own doing."""
    if grpc_status:
        if grpc_status == "OK" or (side != "out" and grpc_status not in SERVER_ERRORS):
            return ""
        return grpc_status if reason in ("ok", "responded") else reason
    if status != 0 and status < (400 if side == "out" else 500):
        return ""
    return str(status) if reason in ("ok", "responded") and status else reason
