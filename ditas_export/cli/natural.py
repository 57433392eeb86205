"""Options as people write them, in the types that the options have.

YAML reads `classes: 5` as a number, `classes: [1, 2]` as a list and `cfg-scale: 1e1` as a text;
whose meaning is plain is taken for what it means, and all else is left for the options to refuse.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from ditas_export.saved_records import hints_of

_WHOLE = re.compile(r"[-+]?[0-9]{1,19}")
_NUMBER = re.compile(r"[-+]?(?:[0-9]{1,19}\.?[0-9]{0,19}|\.[0-9]{1,19})(?:[eE][-+]?[0-9]{1,3})?")


def natural_options(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return options in the types of a dataclass's fields; values of nothing are not given."""
    hints = hints_of(kind)
    return {
        name: _natural(hints[name], value) for name, value in values.items() if value is not None
    }


def _natural(hint: Any, value: Any) -> Any:
    """Return a value in the type of a hint where its meaning is plain, else as it is."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _natural(args[0], value)
    if origin in (Union, UnionType):
        return _natural(next(each for each in args if each is not NoneType), value)
    if isinstance(value, bool):
        return value
    if origin is tuple:
        return [_natural(args[0], each) for each in _listed(value)]
    if hint is str and isinstance(value, int | float | list):
        return ",".join(map(str, _listed(value)))
    if isinstance(value, str) and hint is int and _WHOLE.fullmatch(value):
        return int(value)
    if isinstance(value, str) and hint is float and _NUMBER.fullmatch(value):
        return float(value)
    return value


def _listed(value: Any) -> list[Any]:
    """Return the values of a list, of a comma-separated text, or the only one."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return list(value) if isinstance(value, list | tuple) else [value]
