"""The options of `ditas-compare`, their defaults in one place. Imports nothing heavy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from ditas_export.errors import VerificationError
from ditas_export.paths import convert_path_fields


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareOptions:
    """What `ditas-compare` is asked for; the fields are its options."""

    reference: Path
    model: Path
    classes: str = "random"
    images: int = 2
    steps: int = 25
    cfg_scale: float | None = None  # CFG_SCALE; none where a model cannot be guided
    seed: int = 0
    linears: bool = True
    linear_db: float = 20.0
    threshold_db: float | None = None
    gen_inputs: Path | None = None

    def __post_init__(self) -> None:
        """Refuse thresholds that nothing can be held against.

        Raises:
            VerificationError: a threshold that is no finite number.
        """
        convert_path_fields(self)
        for name, value in (("linear-db", self.linear_db), ("threshold-db", self.threshold_db)):
            if value is not None and not math.isfinite(value):
                raise VerificationError(f"{name}={value}; give a number of decibels, such as 20")
