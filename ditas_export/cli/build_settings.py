"""The settings of `ditas-build`: the command line over a build profile over the defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from ditas_export.cli.natural import natural_options
from ditas_export.cli.recipes import read_profile
from ditas_export.engine.options import (
    HIGHEST_OPT_LEVEL,
    MOST_ROWS,
    WORKSPACE,
    BatchRange,
    BuildOptions,
)
from ditas_export.engine.products import candidates
from ditas_export.errors import EngineError
from ditas_export.saved_records import Within, check_fields, from_record


@dataclass(frozen=True, slots=True, kw_only=True)
class _Profile:
    """What a build profile may set; the command line has the same under the same names."""

    backend: str = "auto"
    batch: tuple[Annotated[int, Within(1, MOST_ROWS)], ...] = (1, 2, 8)
    layout: Literal["int4", "int8"] | None = None
    as_is: bool = False
    workspace: Annotated[float, WORKSPACE] | None = None
    opt_level: Annotated[int, Within(0, HIGHEST_OPT_LEVEL)] | None = None
    compute_capability: tuple[str, ...] = ()
    timing_cache: Path | None = None
    version_compatible: bool = False
    refit: bool = False

    def __post_init__(self) -> None:
        """Refuse what is no range of batch sizes."""
        check_fields(self, EngineError)
        if len(self.batch) != 3:
            listed = ",".join(map(str, self.batch[:8]))
            raise EngineError(f"batch={listed!r}; give smallest, usual and largest, as 1,2,8")


SETTINGS = frozenset(field.name for field in fields(_Profile))
"""Names of what a build profile may set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildSettings:
    """What `ditas-build` is asked for, the paths aside."""

    backend: str
    layout: Literal["int4", "int8"] | None
    as_is: bool
    options: BuildOptions

    def __post_init__(self) -> None:
        """Refuse an unknown backend."""
        candidates(self.backend)


def merge_settings(profile: str | None, given: Mapping[str, Any]) -> BuildSettings:
    """Return the settings; values of None are not given.

    Raises:
        EngineError: no such profile, or a value that no product takes.
    """
    merged = read_profile(profile, SETTINGS) if profile is not None else {}
    merged |= {name: value for name, value in given.items() if value is not None}
    asked = from_record(_Profile, natural_options(_Profile, merged), error=EngineError)
    smallest, usual, largest = asked.batch
    return BuildSettings(
        backend=asked.backend,
        as_is=asked.as_is,
        layout=asked.layout,
        options=BuildOptions(
            batch=BatchRange(smallest=smallest, usual=usual, largest=largest),
            workspace_gib=asked.workspace,
            opt_level=asked.opt_level,
            compute_capabilities=asked.compute_capability,
            timing_cache=asked.timing_cache,
            version_compatible=asked.version_compatible,
            refit=asked.refit,
        ),
    )
