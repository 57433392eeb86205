"""What an engine build is asked for. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ditas_export.dit.process import checked_fields
from ditas_export.errors import CheckpointError, EngineError
from ditas_export.paths import convert_path_fields

HIGHEST_OPT_LEVEL = 5

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRange:
    """Batch sizes that an engine takes, and the one that it is tuned for."""

    smallest: int = 1
    usual: int = 2
    largest: int = 8

    def __post_init__(self) -> None:
        """Refuse a range that is not one."""
        sizes = (self.smallest, self.usual, self.largest)
        whole = all(type(size) is int for size in sizes)
        if not (whole and 1 <= self.smallest <= self.usual <= self.largest):
            raise EngineError(
                f"batch sizes {self.smallest}, {self.usual}, {self.largest}: give the smallest, "
                f"the usual and the largest, from 1 up"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """How to build; None and empty leave the choice to the product."""

    batch: BatchRange = field(default_factory=BatchRange)
    workspace_gib: float | None = None
    opt_level: int | None = None
    compute_capabilities: tuple[str, ...] = ()  # GPUs to build for, such as "8.9"
    timing_cache: Path | None = None
    version_compatible: bool = False
    refit: bool = False

    def __post_init__(self) -> None:
        """Refuse values that no product takes.

        Raises:
            EngineError: a workspace of nothing, an unknown level, or what is no compute capability.
        """
        convert_path_fields(self)
        workspace, level = self.workspace_gib, self.opt_level
        if workspace is not None and not (_is_number(workspace) and workspace * 2**10 >= 1):
            size = f"{workspace:g}" if isinstance(workspace, float) else workspace
            raise EngineError(f"workspace={size} GiB; give 1 MiB (0.001) or more")
        if level is not None and not (type(level) is int and 0 <= level <= HIGHEST_OPT_LEVEL):
            raise EngineError(f"opt-level={level}; give 0 to {HIGHEST_OPT_LEVEL}")
        for name in ("version_compatible", "refit"):
            if not isinstance(value := getattr(self, name), bool):
                raise EngineError(f"{name}={value!r}; expected true or false")
        for number in self.compute_capabilities:
            if re.fullmatch(r"\d+\.\d", str(number)) is None:
                raise EngineError(f"compute-capability={number!r}; give numbers, as 8.9,12.0")

    @property
    def workspace_bytes(self) -> int | None:
        """Scratch memory that a layer may take."""
        return None if self.workspace_gib is None else round(self.workspace_gib * GIB)

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON values; a timing cache by its name."""
        timings = None if self.timing_cache is None else self.timing_cache.name
        listed = list(self.compute_capabilities)
        values = dataclasses.asdict(self)
        return {**values, "compute_capabilities": listed, "timing_cache": timings}

    @classmethod
    def from_dict(cls, values: object) -> BuildOptions:
        """Return the options that `to_dict` made `values` of; what they lack has its default.

        Raises:
            EngineError: no mapping, an unknown name, or a value that no product takes.
        """
        try:
            fields = checked_fields(cls, values, nested={"batch": BatchRange})
        except CheckpointError as error:
            raise EngineError(str(error)) from error
        listed, timings = fields.get("compute_capabilities", []), fields.get("timing_cache")
        if not isinstance(listed, list) or not isinstance(timings, str | None):
            raise EngineError(
                "options whose compute capabilities are no list, or the cache no name"
            )
        fields["compute_capabilities"] = tuple(listed)
        fields["timing_cache"] = None if timings is None else Path(timings)
        return cls(**fields)


def _is_number(value: object) -> bool:
    """Return whether a value is a finite number."""
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
