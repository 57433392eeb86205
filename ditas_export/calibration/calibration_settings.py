"""How the float model samples for calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from ditas_export.diffusion.guidance import blends, require_guidance
from ditas_export.dit.model import DiTConfig
from ditas_export.dit.process import checked_fields
from ditas_export.errors import CalibrationError, RunnerError
from ditas_export.options import LARGEST_SEED

SamplingPrecision = Literal["fp32", "bf16"]
"""Float types that the model may sample in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSettings:
    """How the float model samples for calibration; the defaults are the paper's."""

    steps: int = 50
    cfg_scale: float = 1.5
    classes: tuple[int, ...] = ()  # one per sample
    seed: int = 0
    precision: SamplingPrecision = "fp32"  # of the model; the sampler's own arithmetic is float32

    def __post_init__(self) -> None:
        """Refuse settings that no sampler can follow."""
        numbers = (self.steps, self.seed, *self.classes)
        if any(isinstance(value, bool) or not isinstance(value, int) for value in numbers):
            raise CalibrationError("steps, seed and classes of a calibration are whole numbers")
        if isinstance(self.cfg_scale, bool) or not isinstance(self.cfg_scale, int | float):
            raise CalibrationError(f"cfg_scale={self.cfg_scale!r}; expected a number")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise CalibrationError(f"seed={self.seed}; pick 0 to {LARGEST_SEED}")
        if self.steps < 2:
            raise CalibrationError(f"steps={self.steps}; pick 2 or more")
        if not self.classes:
            raise CalibrationError("calibration needs at least one sample")
        if not self.cfg_scale >= 0:
            raise CalibrationError(f"cfg_scale={self.cfg_scale} is negative or no number")
        if self.precision not in get_args(SamplingPrecision):
            known = ", ".join(get_args(SamplingPrecision))
            raise CalibrationError(f"precision={self.precision!r} of sampling; pick one of {known}")

    @classmethod
    def from_dict(cls, values: object) -> CalibrationSettings:
        """Return the settings that `to_dict` gave.

        Raises:
            CheckpointError: no mapping, or an unknown name.
            CalibrationError: a value that no sampler can follow.
        """
        fields = checked_fields(cls, values)
        if isinstance(fields.get("classes"), list):
            fields["classes"] = tuple(fields["classes"])
        return cls(**fields)

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
