"""The diffusion process that a model was trained on, as its checkpoint records it.

The process travels with the model's shape: what samples a model reads it there, wherever the model
lies. Sources: Ho, Jain and Abbeel 2020 (ε, linear betas, fixed variances); Nichol and Dhariwal 2021
(cosine betas, learned variance); the names are diffusers' schedulers'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ditas_export.errors import CheckpointError

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
"""Noise schedules that are followed; `scaled_linear` is linear in √β."""

Variance = Literal["learned_range", "fixed_small", "fixed_large"]
"""Variance of a DDPM step: interpolated by the model, or the posterior's or β's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeFactors:
    """How latents of the model's own VAE are scaled: `z = latents / scaling_factor + shift_factor`.

    As `AutoencoderKL` records them.
    """

    scaling_factor: float
    shift_factor: float = 0.0

    def __post_init__(self) -> None:
        """Refuse factors that no latent survives."""
        for name in ("scaling_factor", "shift_factor"):
            object.__setattr__(self, name, _number(self, name))
        if not self.scaling_factor > 0:
            raise CheckpointError(f"scaling_factor={self.scaling_factor}; expected more than 0")

    def __str__(self) -> str:
        """Return both, for messages."""
        return f"scaling factor {self.scaling_factor:g} and shift {self.shift_factor:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """What a model predicts, and the schedule that it was trained with; the defaults are DiT's."""

    beta_schedule: BetaSchedule = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    train_timesteps: int = 1000
    prediction: Literal["epsilon"] = "epsilon"
    variance: Variance = "learned_range"
    vae: VaeFactors | None = None  # None where nothing records one

    def __post_init__(self) -> None:
        """Refuse a process that is not followed, naming the value."""
        for name, choices in (
            ("beta_schedule", get_args(BetaSchedule)),
            ("prediction", ("epsilon",)),
            ("variance", get_args(Variance)),
        ):
            if (value := getattr(self, name)) not in choices:
                raise CheckpointError(f"{name}={value!r}; expected one of {', '.join(choices)}")
        for name in ("beta_start", "beta_end"):
            object.__setattr__(self, name, _number(self, name))
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise CheckpointError(
                f"betas from {self.beta_start} to {self.beta_end}; expected "
                f"0 < beta_start <= beta_end < 1"
            )
        steps = self.train_timesteps
        if isinstance(steps, bool) or not isinstance(steps, int) or not 2 <= steps <= 100_000:
            raise CheckpointError(f"train_timesteps={steps!r}; expected 2 to 100000")
        if not isinstance(self.vae, VaeFactors | None):
            raise CheckpointError(f"vae={self.vae!r}; expected scaling and shift factors, or none")

    def __str__(self) -> str:
        """Return all of it in one line."""
        ends = f" {self.beta_start:g} to {self.beta_end:g}"
        betas = self.beta_schedule + ("" if self.beta_schedule == "squaredcos_cap_v2" else ends)
        vae = f", VAE of {self.vae}" if self.vae is not None else ""
        return (
            f"predicts {self.prediction}, betas {betas}, {self.train_timesteps} steps, variance "
            f"{self.variance}{vae}"
        )

    @classmethod
    def from_dict(cls, values: object) -> Process:
        """Return the process that `dataclasses.asdict` made `values` of.

        Raises:
            CheckpointError: no mapping, an unknown name, or a value that is not followed.
        """
        return cls(**checked_fields(cls, values, nested={"vae": VaeFactors}))


def checked_fields(
    kind: type, values: object, *, nested: Mapping[str, type] | None = None
) -> dict[str, Any]:
    """Return the fields of a dataclass as read from a file; its own checks see to the values.

    Args:
        kind: the dataclass.
        values: what the file says; fields that it lacks keep their defaults.
        nested: dataclasses that a field holds, None allowed.

    Raises:
        CheckpointError: no mapping, or a name that `kind` does not have.
    """
    if not isinstance(values, Mapping):
        raise CheckpointError(f"a {kind.__name__} is recorded as {_kind(values)}, not as a mapping")
    known: Mapping[str, Any] = kind.__dataclass_fields__  # type: ignore[attr-defined]
    if odd := sorted(str(name) for name in values if name not in known):
        raise CheckpointError(f"a {kind.__name__} has no {', '.join(odd)[:80]}")
    fields = dict(values)
    for name, inner in (nested or {}).items():
        if fields.get(name) is not None:
            fields[name] = inner(**checked_fields(inner, fields[name]))
    return fields


def _number(holder: object, name: str) -> float:
    """Return a field as a finite float."""
    value = getattr(holder, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CheckpointError(f"{name}={str(value)[:40]!r}; expected a finite number")
    return float(value)


def _kind(value: object) -> str:
    """Return a value's type by name."""
    return type(value).__name__


DIT_PROCESS = Process()
"""That of every published DiT."""
