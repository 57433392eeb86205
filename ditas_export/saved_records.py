"""Saved records: every dataclass that a file or an option holds, checked by its own type hints.

A hint says the type, and `Annotated[int, Within(1, 64)]` the bounds; there is no second place for
either. A record that is made in the program is held against the same hints as one that is read.
Imports nothing heavy.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ditas_export.errors import CheckpointError, DitasExportError

Record = TypeVar("Record")

_LONGEST_TEXT = 4096
"""Characters of a text, and of a path."""

_LONGEST_LIST = 10_000_000
"""Values of a list."""

_SHOWN = 40
"""Characters of a value in a message."""


@dataclass(frozen=True, slots=True)
class Within:
    """Bounds of a number, or of every number of a list; both may be reached."""

    low: float
    high: float

    def __str__(self) -> str:
        """Return both."""
        return f"{_plain(self.low)} to {_plain(self.high)}"


@dataclass(frozen=True, slots=True)
class Above:
    """Bounds of a number of which the lower one is not reached."""

    low: float
    high: float

    def __str__(self) -> str:
        """Return both."""
        return f"more than {_plain(self.low)}, and {_plain(self.high)} at most"


@dataclass(frozen=True, slots=True)
class ReadBy:
    """Who reads a value whose class the record itself names: from what was recorded to the value.

    What is a value already is returned as it is.
    """

    read: Callable[[object], Any]


Bounds = Within | Above | None


class UnfitError(Exception):
    """A value is not as its hint asks; the message is what was expected."""


def from_record(
    kind: type[Record],
    values: object,
    *,
    where: str = "",
    error: type[DitasExportError] = CheckpointError,
) -> Record:
    """Return the dataclass that a file records; fields that it lacks have their defaults.

    Lists become tuples, whole numbers floats and texts paths where a hint asks for that, and
    mappings the dataclasses within.

    Args:
        kind: the dataclass.
        values: what the file says.
        where: what says it, for messages; empty where the caller names it.
        error: what is raised.

    Raises:
        DitasExportError: `error`: no mapping, an unknown or a missing name, a value of another type
            or beyond its bounds, or values that the dataclass itself refuses together.
    """
    before = f"{where}: " if where else ""
    if not isinstance(values, Mapping):
        raise error(
            f"{before}a {kind.__name__} is recorded as {type(values).__name__}, not as a mapping"
        )
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if odd := sorted(str(name) for name in values if name not in fields):
        raise error(f"{before}a {kind.__name__} has no {', '.join(odd)[:80]!r}")
    if lost := [name for name, field in fields.items() if _is_needed(field) and name not in values]:
        raise error(f"{before}a {kind.__name__} without {', '.join(lost)}")
    try:
        return kind(**{name: _fitted(kind, name, value) for name, value in values.items()})
    except UnfitError as unfit:
        raise error(f"{before}{unfit}") from None
    except DitasExportError as refused:
        raise error(f"{before}{refused}") from refused


def check_fields(record: object, error: type[DitasExportError]) -> None:
    """Hold a dataclass against its own hints; for its `__post_init__`, whoever makes it.

    Whole numbers become floats where a hint asks for that.

    Raises:
        DitasExportError: `error`, which names the first value that does not fit, and what would.
    """
    for field in dataclasses.fields(record):  # type: ignore[arg-type]
        try:
            value = _fitted(type(record), field.name, getattr(record, field.name))
        except UnfitError as unfit:
            raise error(str(unfit)) from None
        object.__setattr__(record, field.name, value)


def shown(value: object) -> str:
    """Return a value in a few characters, without writing all of a large one."""
    if isinstance(value, Mapping | list | tuple | set) and len(value) > _SHOWN:
        return f"{type(value).__name__} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"
    text = repr(value[: _SHOWN + 1] if isinstance(value, str | bytes) else value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


@functools.cache
def hints_of(kind: type) -> dict[str, Any]:
    """Return the type hints of a dataclass by field, bounds among them."""
    return get_type_hints(kind, include_extras=True)


def fitted(hint: Any, value: object, bounds: Bounds = None) -> Any:
    """Return a value as a hint asks for it.

    Raises:
        UnfitError: another type, or beyond the bounds.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated and isinstance(args[1], ReadBy):
        return args[1].read(value)
    if origin is Annotated:
        return fitted(args[0], value, args[1])
    if origin in (Union, UnionType):
        if value is None and NoneType in args:
            return None
        return fitted(_member(args, value), value, bounds)
    if origin is Literal:
        return _choice(args, value)
    if origin is tuple:
        return _items(args[0], value, bounds)
    if origin in (dict, Mapping):
        return _mapping(args[1], value)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else from_record(hint, value)
    return _plain_value(hint, value, bounds)


def _member(members: tuple[Any, ...], value: object) -> Any:
    """Return which hint of a union a value is of: of dataclasses, the one whose literals fit it."""
    kinds = [each for each in members if each is not NoneType]
    if isinstance(value, Mapping):
        for kind in kinds[1:]:
            literals = {name: hint for name, hint in hints_of(kind).items() if _is_literal(hint)}
            told = {name: value[name] for name in literals if name in value}
            if told and all(said in get_args(literals[name]) for name, said in told.items()):
                return kind
    return next((kind for kind in kinds if type(value) is kind), kinds[0])


def _is_literal(hint: Any) -> bool:
    """Return whether a hint names a few values."""
    return get_origin(hint) is Literal


def _fitted(kind: type, name: str, value: object) -> Any:
    """Return the value of a field; name it where it does not fit."""
    try:
        return fitted(hints_of(kind)[name], value)
    except UnfitError as unfit:
        raise UnfitError(f"{name}={shown(value)}; expected {unfit}") from None
    except DitasExportError as refused:
        raise UnfitError(f"{name}: {refused}") from None


def _is_needed(field: dataclasses.Field[Any]) -> bool:
    """Return whether a field has no default."""
    return field.default is field.default_factory is dataclasses.MISSING


def _choice(choices: tuple[object, ...], value: object) -> object:
    """Return one of a few values, of its very type: True is not 1."""
    for choice in choices:
        if type(value) is type(choice) and value == choice:
            return choice
    raise UnfitError(f"one of {', '.join(map(str, choices))}")


def _items(hint: Any, value: object, bounds: Bounds) -> tuple[Any, ...]:
    """Return the values of a list."""
    if not isinstance(value, list | tuple) or len(value) > _LONGEST_LIST:
        raise UnfitError(f"a list of {_LONGEST_LIST} values at most")
    return tuple(fitted(hint, each, bounds) for each in value)


def _mapping(hint: Any, value: object) -> Mapping[str, Any]:
    """Return values by name."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise UnfitError("values by name")
    return {name: fitted(hint, inner) for name, inner in value.items()}


def _plain_value(hint: Any, value: object, bounds: Bounds) -> Any:
    """Return a value of a plain type."""
    if hint is Any:
        return value
    if hint in (int, float):
        return _number(hint, value, bounds)
    if hint is bool:
        if isinstance(value, bool):
            return value
        raise UnfitError("true or false")
    if isinstance(value, Path):  # a field that is a name is given one, such as a model's
        return hint(value)
    if not isinstance(value, str) or len(value) > _LONGEST_TEXT or "\0" in value:
        raise UnfitError(f"a text of {_LONGEST_TEXT} characters at most")
    return hint(value)


def _number(hint: type[int] | type[float], value: object, bounds: Bounds) -> float:
    """Return a finite number within its bounds; a whole one where the hint is `int`."""
    kind = "a whole number" if hint is int else "a number"
    expected = f"{kind}, {bounds}" if bounds is not None else kind
    if isinstance(value, bool) or not isinstance(value, int if hint is int else int | float):
        raise UnfitError(expected)
    if isinstance(value, float) and not math.isfinite(value):
        raise UnfitError(f"a finite number, {bounds}" if bounds else "a finite number")
    if bounds is not None and not bounds.low <= value <= bounds.high:
        raise UnfitError(expected)
    if isinstance(bounds, Above) and value == bounds.low:
        raise UnfitError(expected)
    try:
        return hint(value)
    except OverflowError:
        raise UnfitError(expected) from None


def _plain(number: float) -> str:
    """Return a bound without the dot of whole numbers."""
    return str(number) if isinstance(number, int) else f"{number:g}"
