"""The settings of `ditas-build`: the command line over a build profile over the defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from ditas_export.cli.recipes import read_profile
from ditas_export.engine.options import BatchRange, BuildOptions
from ditas_export.engine.products import candidates
from ditas_export.errors import EngineError

SETTINGS = frozenset(
    (
        "backend",
        "batch",
        "layout",
        "as_is",
        "workspace",
        "opt_level",
        "compute_capability",
        "timing_cache",
        "version_compatible",
        "refit",
    )
)
"""What a build profile may set; the command line has the same under the same names."""

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildSettings:
    """What `ditas-build` is asked for, the paths aside."""

    backend: str
    layout: Literal["int4", "int8"] | None
    as_is: bool
    options: BuildOptions

    def __post_init__(self) -> None:
        """Refuse an unknown backend or layout."""
        candidates(self.backend)
        if self.layout not in (None, "int4", "int8"):
            raise EngineError(f"layout={self.layout!r}; choose one of int4, int8")


def merge_settings(profile: str | None, given: Mapping[str, Any]) -> BuildSettings:
    """Return the settings; values of None are not given.

    Raises:
        EngineError: no such profile, or a value that no product takes.
    """
    merged = read_profile(profile, SETTINGS) if profile is not None else {}
    merged |= {name: value for name, value in given.items() if value is not None}
    options = BuildOptions(
        batch=_batch(_parts(merged.get("batch", "1,2,8"))),
        workspace_gib=_convert(merged, "workspace", float, "a number of GiB"),
        opt_level=_convert(merged, "opt_level", int, "0 to 5"),
        compute_capabilities=tuple(_parts(merged.get("compute_capability", ""))),
        timing_cache=_convert(merged, "timing_cache", Path, "a file"),
        version_compatible=_switch(merged, "version_compatible"),
        refit=_switch(merged, "refit"),
    )
    return BuildSettings(
        backend=merged.get("backend", "auto"),
        as_is=_switch(merged, "as_is"),
        layout=cast('Literal["int4", "int8"] | None', merged.get("layout")),
        options=options,
    )


def _parts(value: object) -> list[str]:
    """Return the parts of a comma-separated text, a YAML list or a YAML number."""
    if isinstance(value, list):
        return [str(part) for part in value]
    return [part.strip() for part in str(value).split(",") if part.strip()]


def _batch(parts: list[str]) -> BatchRange:
    """Return a range of batch sizes."""
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        raise EngineError(f"batch={','.join(parts)!r}; give smallest, usual and largest, as 1,2,8")
    smallest, usual, largest = (int(part) for part in parts)
    return BatchRange(smallest=smallest, usual=usual, largest=largest)


def _convert(
    merged: Mapping[str, Any], name: str, kind: Callable[[Any], Value], wanted: str
) -> Value | None:
    """Return a setting in its type, None where it is not set."""
    value = merged.get(name)
    if value is None:
        return None
    try:
        return kind(value)
    except (TypeError, ValueError):
        raise EngineError(f"{name.replace('_', '-')}={value!r}; give {wanted}") from None


def _switch(merged: Mapping[str, Any], name: str) -> bool:
    """Return a setting that is on or off."""
    value = merged.get(name, False)
    if not isinstance(value, bool):
        raise EngineError(f"{name.replace('_', '-')}={value!r}; give true or false")
    return value
