"""What an engine build is asked for. Imports nothing heavy."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from ditas_export.errors import EngineError

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
        if not 1 <= self.smallest <= self.usual <= self.largest:
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
        if self.workspace_gib is not None and not self.workspace_gib * 2**10 >= 1:
            raise EngineError(f"workspace={self.workspace_gib:g} GiB; give 1 MiB (0.001) or more")
        if self.opt_level is not None and not 0 <= self.opt_level <= HIGHEST_OPT_LEVEL:
            raise EngineError(f"opt-level={self.opt_level}; give 0 to {HIGHEST_OPT_LEVEL}")
        for number in self.compute_capabilities:
            if re.fullmatch(r"\d+\.\d", number) is None:
                raise EngineError(f"compute-capability={number!r}; give numbers, as 8.9,12.0")

    @property
    def workspace_bytes(self) -> int | None:
        """Scratch memory that a layer may take."""
        return None if self.workspace_gib is None else round(self.workspace_gib * GIB)
