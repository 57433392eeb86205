"""What an engine build is asked for. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from ditas_export.errors import EngineError
from ditas_export.saved_records import Within, check_fields, from_record

HIGHEST_OPT_LEVEL = 5

GIB = 2**30

WORKSPACE = Within(0.001, 65_536)
"""GiB of scratch memory."""

MOST_ROWS = 65_536
"""Rows of a batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRange:
    """Batch sizes that an engine takes, and the one that it is tuned for."""

    smallest: Annotated[int, Within(1, MOST_ROWS)] = 1
    usual: Annotated[int, Within(1, MOST_ROWS)] = 2
    largest: Annotated[int, Within(1, MOST_ROWS)] = 8

    def __post_init__(self) -> None:
        """Refuse a range that is not one."""
        check_fields(self, EngineError)
        if not self.smallest <= self.usual <= self.largest:
            raise EngineError(
                f"batch sizes {self.smallest}, {self.usual}, {self.largest}: give the smallest, "
                f"the usual and the largest, from 1 up"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """How to build; None and empty leave the choice to the product."""

    batch: BatchRange = field(default_factory=BatchRange)
    workspace_gib: Annotated[float, WORKSPACE] | None = None
    opt_level: Annotated[int, Within(0, HIGHEST_OPT_LEVEL)] | None = None
    compute_capabilities: tuple[str, ...] = ()  # GPUs to build for, such as "8.9"
    timing_cache: Path | None = None
    version_compatible: bool = False
    refit: bool = False

    def __post_init__(self) -> None:
        """Refuse values that no product takes.

        Raises:
            EngineError: a workspace of nothing, an unknown level, or what is no compute capability.
        """
        check_fields(self, EngineError)
        for number in self.compute_capabilities:
            if re.fullmatch(r"[0-9]{1,3}\.[0-9]", number) is None:
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
        return from_record(cls, values, error=EngineError)
