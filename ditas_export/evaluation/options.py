"""The options of `ditas-compare`, their defaults in one place. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ditas_export.errors import VerificationError
from ditas_export.options import LARGEST_SEED
from ditas_export.saved_records import Within, check_fields


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareOptions:
    """What `ditas-compare` is asked for; the fields are its options."""

    reference: Path
    model: Path
    classes: str = "random"
    images: Annotated[int, Within(1, 4096)] = 2
    steps: Annotated[int, Within(1, 100_000)] = 25
    cfg_scale: float | None = None  # CFG_SCALE; none where a model cannot be guided
    seed: Annotated[int, Within(0, LARGEST_SEED)] = 0
    linears: bool = True
    linear_db: Annotated[float, Within(-1e6, 1e6)] = 20.0
    threshold_db: Annotated[float, Within(-1e6, 1e6)] | None = None
    gen_inputs: Path | None = None
    embeddings: Path | None = None  # of the prompts that classes are then the numbers of

    def __post_init__(self) -> None:
        """Refuse thresholds that nothing can be held against.

        Raises:
            VerificationError: a threshold that is no finite number.
        """
        check_fields(self, VerificationError)
