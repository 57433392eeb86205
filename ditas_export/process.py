"""The process that a model was trained on, as its checkpoint records it: a diffusion or a flow.

The process travels with the model's shape: what samples a model reads it there, wherever the model
lies. Sources: Ho, Jain and Abbeel 2020 (ε, linear betas, fixed variances); Nichol and Dhariwal 2021
(cosine betas, learned variance); the names are diffusers' schedulers'. Flows: Ma et al. 2024 (SiT),
Yu et al. 2025 (REPA), whose signs and time differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from ditas_export.errors import CheckpointError
from ditas_export.saved_records import Above, Within, check_fields, from_record

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
"""Noise schedules that are followed; `scaled_linear` is linear in √β."""

Variance = Literal["learned_range", "fixed_small", "fixed_large"]
"""Variance of a DDPM step: interpolated by the model, or the posterior's or β's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeFactors:
    """How latents of the model's own VAE are scaled: `z = latents / scaling_factor + shift_factor`.

    As `AutoencoderKL` records them.
    """

    scaling_factor: Annotated[float, Above(0, 1e6)]
    shift_factor: Annotated[float, Within(-1e6, 1e6)] = 0.0

    def __post_init__(self) -> None:
        """Refuse factors that no latent survives."""
        check_fields(self, CheckpointError)

    def __str__(self) -> str:
        """Return both, for messages."""
        return f"scaling factor {self.scaling_factor:g} and shift {self.shift_factor:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """What a model predicts, and the schedule that it was trained with; the defaults are DiT's."""

    beta_schedule: BetaSchedule = "linear"
    beta_start: Annotated[float, Above(0, 1)] = 1e-4
    beta_end: Annotated[float, Above(0, 1)] = 0.02
    train_timesteps: Annotated[int, Within(2, 100_000)] = 1000
    prediction: Literal["epsilon"] = "epsilon"
    variance: Variance = "learned_range"
    vae: VaeFactors | None = None  # None where nothing records one

    def __post_init__(self) -> None:
        """Refuse a process that is not followed, naming the value."""
        check_fields(self, CheckpointError)
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise CheckpointError(
                f"betas from {self.beta_start} to {self.beta_end}; expected "
                f"0 < beta_start <= beta_end < 1"
            )

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
        return from_record(cls, values)

    @property
    def time_dtype(self) -> torch.dtype:
        """Type of what the network is fed as time: steps are whole."""
        return torch.int64

    @property
    def times(self) -> tuple[float, float]:
        """First and last time that the network was trained at."""
        return 0, self.train_timesteps - 1


FlowEnd = Literal["data", "noise"]
"""Either end of a flow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowProcess:
    """A velocity on straight paths x = (1 − σ) data + σ noise, σ from 0 to 1.

    SiT has "data" for both ends: t = 1 − σ, v = data − noise. REPA has "noise": t = σ,
    v = noise − data. The network is fed t as it is, in float32.
    """

    prediction: Literal["velocity"] = "velocity"
    time_ends_at: FlowEnd = "data"  # what there is at t = 1
    velocity_towards: FlowEnd = "data"
    vae: VaeFactors | None = None  # None where nothing records one

    def __post_init__(self) -> None:
        """Refuse a flow that is not followed, naming the value."""
        check_fields(self, CheckpointError)

    def __str__(self) -> str:
        """Return all of it in one line."""
        vae = f", VAE of {self.vae}" if self.vae is not None else ""
        return (
            f"predicts the velocity towards {self.velocity_towards}, t from 0 to 1 at "
            f"{self.time_ends_at}{vae}"
        )

    @property
    def time_dtype(self) -> torch.dtype:
        """Type of what the network is fed as time."""
        return torch.float32

    @property
    def times(self) -> tuple[float, float]:
        """First and last time that the network was trained at."""
        return 0.0, 1.0


DIT_PROCESS = Process()
"""That of every published DiT."""
