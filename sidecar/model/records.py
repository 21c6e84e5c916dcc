"""Frozen dataclasses that are cheap to define and cheap to make.

A start defines a hundred of them and a large policy makes a hundred thousand, and the standard decorator pays for both:
it compiles six functions for each class, and a frozen `__init__` stores each field through `object.__setattr__`. So for
mypy `record` is `dataclass`, and it is mypy that keeps others from assigning; at run time `record` compiles `__init__`
alone, which stores plainly, and the rest are closures. `fields`, `replace` and `asdict` of `dataclasses` work as usual.

Must not know what is recorded. Invariant: equality, hash and order are by the fields that compare, as with `dataclass`.
"""

from typing import TYPE_CHECKING

__all__ = ["record"]

if TYPE_CHECKING:
    from dataclasses import dataclass as record
else:
    from collections.abc import Callable
    from dataclasses import MISSING, dataclass, fields
    from operator import attrgetter
    from typing import Any

    def record(*, frozen: bool, slots: bool = False, order: bool = False) -> Callable[[type], type]:
        """As `dataclass(frozen=True, ...)`."""
        assert frozen

        def make(cls: type) -> type:
            if cls.__doc__ is None:
                cls.__doc__ = cls.__name__  # else the decorator works out a signature to put there
            made = dataclass(init=False, repr=False, eq=False, slots=slots)(cls)
            made.__init__ = _init(made)
            _by_value(made, order)
            return made

        return make

    def _init(cls: type) -> Callable[..., None]:
        names: dict[str, Any] = {"MISSING": MISSING}
        parameters, lines = ["self"], []
        for each in fields(cls):
            name, value = each.name, each.name
            if each.default is not MISSING:
                names[f"default_{name}"] = each.default
                parameters.append(f"{name}=default_{name}")
            elif each.default_factory is not MISSING:
                names[f"make_{name}"] = each.default_factory
                parameters.append(f"{name}=MISSING")
                value = f"make_{name}() if {name} is MISSING else {name}"
            else:
                parameters.append(name)
            lines.append(f" self.{name} = {value}\n")
        exec(f"def __init__({', '.join(parameters)}):\n{''.join(lines) or ' pass'}", names)  # noqa: S102 - as dataclass does
        init: Callable[..., None] = names["__init__"]
        init.__qualname__ = f"{cls.__qualname__}.__init__"
        return init

    def _by_value(cls: type, order: bool) -> None:
        compared = [each.name for each in fields(cls) if each.compare]
        shown = [each.name for each in fields(cls) if each.repr]
        key = attrgetter(*compared) if compared else lambda self: ()

        def __eq__(self: Any, other: Any) -> Any:
            return key(self) == key(other) if other.__class__ is self.__class__ else NotImplemented

        def __hash__(self: Any) -> int:
            return hash(key(self))

        def __lt__(self: Any, other: Any) -> Any:
            return key(self) < key(other) if other.__class__ is self.__class__ else NotImplemented

        def __le__(self: Any, other: Any) -> Any:
            return key(self) <= key(other) if other.__class__ is self.__class__ else NotImplemented

        def __repr__(self: Any) -> str:
            inside = ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)
            return f"{self.__class__.__qualname__}({inside})"

        cls.__eq__, cls.__hash__ = __eq__, __hash__
        if order:
            cls.__lt__, cls.__le__ = __lt__, __le__  # the other two are these, reflected
        if "__repr__" not in cls.__dict__:
            cls.__repr__ = __repr__
