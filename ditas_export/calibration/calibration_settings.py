"""How the float model samples for calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from ditas_export.diffusion.guidance import blends, require_guidance
from ditas_export.dit.model import DiTConfig
from ditas_export.errors import CalibrationError, RunnerError
from ditas_export.options import LARGEST_SEED
from ditas_export.saved_records import Within, check_fields, from_record

SamplingPrecision = Literal["fp32", "bf16"]
"""Float types that the model may sample in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSettings:
    """How the float model samples for calibration; the defaults are the paper's."""

    steps: Annotated[int, Within(2, 100_000)] = 50
    cfg_scale: Annotated[float, Within(0, 1e6)] = 1.5
    classes: tuple[Annotated[int, Within(0, 10_000_000)], ...] = ()  # one per sample
    seed: Annotated[int, Within(0, LARGEST_SEED)] = 0
    precision: SamplingPrecision = "fp32"  # of the model; the sampler's own arithmetic is float32

    def __post_init__(self) -> None:
        """Refuse settings that no sampler can follow."""
        check_fields(self, CalibrationError)
        if not self.classes:
            raise CalibrationError("calibration needs at least one sample")

    @classmethod
    def from_dict(cls, values: object) -> CalibrationSettings:
        """Return the settings that `to_dict` gave.

        Raises:
            CalibrationError: no mapping, an unknown name, or a value that no sampler can follow.
        """
        return from_record(cls, values, error=CalibrationError)

    def require_model(self, config: DiTConfig) -> None:
        """Refuse guidance or classes that a model cannot follow.

        Raises:
            CalibrationError: a scale that means nothing, or nothing for this model; or a class that
                it does not have.
        """
        try:
            require_guidance(float(self.cfg_scale), config)
        except RunnerError as error:
            raise CalibrationError(str(error)) from error
        last = config.num_labels - 1
        if odd := [label for label in self.classes if not 0 <= label <= last]:
            raise CalibrationError(f"the model has no class {odd[0]}; it has 0 to {last}")

    @property
    def rows_per_state(self) -> int:
        """Rows of the model's batch for each x_t: with and without class where both are blended."""
        return 2 if blends(self.cfg_scale) else 1

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return {
            "steps": self.steps,
            "cfg_scale": self.cfg_scale,
            "classes": list(self.classes),
            "seed": self.seed,
            "precision": self.precision,
        }
