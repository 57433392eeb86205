"""How the float model samples for calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from ditas_export.diffusion.guidance import blends, require_guidance
from ditas_export.errors import CalibrationError, ConditionsError, RunnerError
from ditas_export.families.base import Conditions, ModelConfig
from ditas_export.families.registry import conditions_of
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
    embeddings: str | None = None  # SHA-256 of what the labels name; None: the model's own classes

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

    def require_model(self, config: ModelConfig) -> None:
        """Refuse guidance or classes that a model cannot follow.

        Of settings with embeddings, which are not at hand, see `require_conditions`.

        Raises:
            CalibrationError: see `require_conditions`; or a model that needs embeddings.
        """
        if self.embeddings is None:
            try:
                conditions = conditions_of(config)
            except ConditionsError as error:
                raise CalibrationError(str(error)) from error
            self.require_conditions(conditions)

    def require_conditions(self, conditions: Conditions) -> None:
        """Refuse what the labels cannot name.

        Raises:
            CalibrationError: other embeddings; a scale that means nothing, or nothing with these
                conditions; or a label that names none of them.
        """
        if self.embeddings != conditions.identity:
            raise CalibrationError(
                f"sampled with embeddings {_short(self.embeddings)}, now "
                f"{_short(conditions.identity)}"
            )
        try:
            require_guidance(float(self.cfg_scale), conditions)
        except RunnerError as error:
            raise CalibrationError(str(error)) from error
        last = conditions.count - 1
        if odd := [label for label in self.classes if not 0 <= label <= last]:
            has = "the model has" if conditions.identity is None else f"{conditions.source} has"
            raise CalibrationError(f"{has} no {conditions.what} {odd[0]}; it has 0 to {last}")

    @property
    def rows_per_state(self) -> int:
        """Rows of the model's batch for each x_t: with and without class where both are blended."""
        return 2 if blends(self.cfg_scale) else 1

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values; embeddings where there are any."""
        values: dict[str, Any] = {
            "steps": self.steps,
            "cfg_scale": self.cfg_scale,
            "classes": list(self.classes),
            "seed": self.seed,
            "precision": self.precision,
        }
        return values if self.embeddings is None else {**values, "embeddings": self.embeddings}


def _short(sha256: str | None) -> str:
    """Return the beginning of a hash, for messages."""
    return "none" if sha256 is None else f"{sha256[:12]}…"
