"""The options of `ditas-compare` and `ditas-eval`, their defaults in one place.

Imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from ditas_export.errors import EvaluationError, VerificationError
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


@dataclass(frozen=True, slots=True, kw_only=True)
class LadderOptions:
    """What `ditas-compare --ladder` is asked for; the fields are its options."""

    model: str
    artifact: Path
    plan: Path | None = None
    classes: str = "random"
    images: Annotated[int, Within(1, 4096)] = 2  # of each of two seeds
    steps: Annotated[int, Within(1, 100_000)] = 25
    cfg_scale: float | None = None  # CFG_SCALE; none where a model cannot be guided
    seed: Annotated[int, Within(0, LARGEST_SEED - 1)] = 1000  # calibration takes 0 by default
    embeddings: Path | None = None  # of the prompts that classes are then the numbers of

    def __post_init__(self) -> None:
        """Refuse values that nothing takes.

        Raises:
            VerificationError: one beyond its bounds.
        """
        check_fields(self, VerificationError)


FeatureSource = Literal["auto", "given", "digits", "inception"]
"""What the features are of: those in the files, or a network's by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions:
    """What `ditas-eval` is asked for; the fields are its options."""

    samples: Path
    reference: Path
    features: FeatureSource = "auto"
    paired: bool | None = None  # where ditas-sample wrote both files, of one shape
    resamples: Annotated[int, Within(0, 10_000)] = 100
    seed: Annotated[int, Within(0, LARGEST_SEED)] = 0
    device: Literal["cpu", "cuda"] = "cpu"

    def __post_init__(self) -> None:
        """Refuse values that nothing takes.

        Raises:
            EvaluationError: an unknown value, or one beyond its bounds.
        """
        check_fields(self, EvaluationError)
