"""Whether a model returns the noise it is fed, as one that predicts noise or a velocity does.

Tensors do not tell what a network was trained to predict. At the noisiest step x is noise but for a
trace of image, so a trained ε-model nearly returns its input; one that predicts the image, a
velocity, the opposite sign, or from time steps on another scale does not. The figure is
`10·log10(Σx² / Σ(ε̂ − x)²)`: 39 dB for the bundled model, −3.5 for a random one. Of flows see
`velocity_check`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ditas_export.calibration.velocity_check import (
    ENDS,
    LEAST_VELOCITY_DB,
    likeness,
    likest_flow,
    velocity_db,
)
from ditas_export.diffusion.guidance import plain_inputs
from ditas_export.diffusion.sampling import image_generator, initial_noise, make_scheduler
from ditas_export.families.base import Conditions, FamilyModel
from ditas_export.families.registry import conditions_of
from ditas_export.figures import decibels, finite_or_none
from ditas_export.process import DIT_PROCESS, FlowProcess, Process

ROWS = 8
"""Images of noise, each fed with a class and without."""

LEAST_DB = 15.0
"""Below this a model is not taken for a trained one that predicts noise."""

_SOME = 0.5
"""Share of the noise in an output, above which it is taken to be there."""

_NOISE_SEED = 0
_FEW_STEPS = 2  # the first step is the same for any number of them


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseCheck:
    """How nearly a model returns noise; dB, minus infinity where its output is no number."""

    timestep: float  # the first of the schedule that sampling visits; of a flow, 0 or 1
    class_db: float
    null_db: float | None  # None where there is no null class beside the classes
    finding: str  # what the output looks like instead; empty where it is the noise
    is_velocity: bool = False  # whether the noise is looked for in a flow's velocity

    @property
    def worst_db(self) -> float:
        """The lower figure."""
        return self.class_db if self.null_db is None else min(self.class_db, self.null_db)

    @property
    def least_db(self) -> float:
        """What a trained model has at least."""
        return LEAST_VELOCITY_DB if self.is_velocity else LEAST_DB

    @property
    def passes(self) -> bool:
        """Whether the model is one of its process, as far as this tells."""
        return not self.finding

    @property
    def warning(self) -> str | None:
        """One line where it does not pass."""
        if self.passes:
            return None
        if self.is_velocity:
            where, what = f"at t = {self.timestep:g}", "a trained velocity"
        else:
            where, what = f"at step {self.timestep}", "trained to predict noise"
        return (
            f"fed pure noise {where}, the model returns it to {self.worst_db:.1f} dB only ({what}: "
            f"more than {self.least_db:.0f}): {self.finding}. The file will compute what the model "
            f"does; its pictures may be none"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values; null for what is infinite or no number."""
        return {
            "timestep": self.timestep,
            "class_db": finite_or_none(self.class_db),
            "null_class_db": None if self.null_db is None else finite_or_none(self.null_db),
            "least_db": self.least_db,
            "passes": self.passes,
            "finding": self.finding or None,
        }


def check_noise(
    model: FamilyModel,
    *,
    conditions: Conditions | None = None,
    device: str | torch.device = "cpu",
) -> NoiseCheck:
    """Feed a model noise at its noisiest step.

    Args:
        model: float32; moved to `device`.
        conditions: what it is asked for; its own classes if not given.
        device: where it runs.
    """
    model.to(device)
    process = model.config.process
    asked = _Asked(model, conditions_of(model.config) if conditions is None else conditions)
    if isinstance(process, FlowProcess):
        return _check_velocity(asked, process)
    return _check_epsilon(asked, process)


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """A model, and what it is asked for."""

    model: FamilyModel
    conditions: Conditions

    @property
    def noise(self) -> Tensor:
        """What is fed, (N, C, H, W), the same every time."""
        generators = [image_generator(_NOISE_SEED, row) for row in range(ROWS)]
        return initial_noise(self.model.config, generators)

    @property
    def one_label(self) -> Tensor:
        """A label in the middle for every row."""
        return torch.full((ROWS,), self.conditions.count // 2)

    @property
    def many_labels(self) -> Tensor:
        """A label for every row, evenly spread."""
        count = self.conditions.count
        return torch.arange(ROWS) * max(1, count // ROWS) % count

    def with_null(self, labels: Tensor) -> list[Tensor]:
        """Return the labels, and the null label where guidance has one."""
        null = self.conditions.null
        return [labels] if null is None else [labels, torch.full_like(labels, null)]

    @torch.no_grad()
    def predicted(self, noise: Tensor, timestep: float, labels: Tensor) -> Tensor:
        """Return the channels of ε, (N, C, H, W) on the CPU; of a time between whole ones too."""
        config, conditions = self.model.config, self.conditions
        inputs = plain_inputs(noise, 0, labels, config=config, conditions=conditions)
        times = torch.full((len(noise),), timestep)
        fed = inputs.with_timesteps(times).to(self.model.device)
        output: Tensor = self.model(**fed)
        return output[:, : noise.shape[1]].cpu()

    def at_ends(self, noise: Tensor, labels: Tensor) -> dict[float, Tensor]:
        """Return the output at either end of a flow, by time."""
        return {time: self.predicted(noise, time, labels) for time in ENDS.values()}


def _check_epsilon(asked: _Asked, process: Process) -> NoiseCheck:
    """Look for the noise in ε; a label for every row."""
    timestep, noise = _first_step(process), asked.noise
    labels = asked.with_null(asked.many_labels)
    outputs = [asked.predicted(noise, timestep, each) for each in labels]
    figures = [_match_db(noise, output) for output in outputs]
    failing = [index for index, figure in enumerate(figures) if not figure >= LEAST_DB]
    finding = ""
    if failing:
        fraction = timestep / process.train_timesteps
        finding = _finding(
            noise,
            outputs[failing[0]],
            at_zero=asked.predicted(noise, 0, labels[failing[0]]),
            at_fraction=asked.predicted(noise, fraction, labels[failing[0]]),
            at_ends=asked.at_ends(noise, asked.one_label),
        )
    return NoiseCheck(
        timestep=timestep,
        class_db=figures[0],
        null_db=figures[1] if len(figures) > 1 else None,
        finding=finding,
    )


def _check_velocity(asked: _Asked, process: FlowProcess) -> NoiseCheck:
    """Look for the noise in a velocity; one label for all rows, see `velocity_check`."""
    noise = asked.noise
    labels = asked.with_null(asked.one_label)
    outputs = [asked.at_ends(noise, each) for each in labels]
    figures = [velocity_db(noise, each, process) for each in outputs]
    findings = [_velocity_finding(asked, noise, each, process) for each in outputs]
    return NoiseCheck(
        timestep=ENDS[process.time_ends_at],
        class_db=figures[0],
        null_db=figures[1] if len(figures) > 1 else None,
        finding=next(filter(None, findings), ""),
        is_velocity=True,
    )


def _velocity_finding(
    asked: _Asked, noise: Tensor, outputs: Mapping[float, Tensor], process: FlowProcess
) -> str:
    """Return what a velocity looks like instead of its process's; empty where it is likest that.

    Args:
        asked: a model, for another process's output, where it has no flow's.
        noise: (N, C, H, W), what was fed.
        outputs: the same shape, what came back, by time.
        process: the model's.
    """
    output = outputs[ENDS[process.time_ends_at]]
    if not bool(output.isfinite().all()):
        return "it puts out NaN or infinity"
    flow, figure = likest_flow(noise, outputs)
    if figure >= LEAST_VELOCITY_DB:
        return "" if flow == replace(process, vae=None) else likeness(flow)
    step = _first_step(DIT_PROCESS)
    if _match_db(noise, asked.predicted(noise, step, asked.one_label)) >= LEAST_DB:
        return f"it returns the noise at step {step}, as with --family dit"
    return (
        f"its output is {_share(noise, output):+.1f} times the noise, as where nothing was trained"
    )


def _first_step(process: Process) -> int:
    """Return the noisiest step that sampling visits."""
    return int(make_scheduler("ddpm", _FEW_STEPS, process).timesteps[0])


def _match_db(noise: Tensor, output: Tensor) -> float:
    """Return 10·log10(Σx² / Σ(ε̂ − x)²), infinite where they are equal."""
    x = noise.double()
    error = output.double() - x
    return decibels(float(x.square().sum()), float(error.square().sum()))


def _share(noise: Tensor, output: Tensor) -> float:
    """Return how many times the noise there is in an output."""
    x, y = noise.double(), output.double()
    return float((x * y).sum() / x.square().sum())


def _finding(
    noise: Tensor,
    output: Tensor,
    *,
    at_zero: Tensor,
    at_fraction: Tensor,
    at_ends: Mapping[float, Tensor],
) -> str:
    """Return what an output that is not the noise looks like.

    Args:
        noise: (N, C, H, W), what was fed at the noisiest step.
        output: the same shape, what came back.
        at_zero: the same, at time step 0, where a model that predicts images returns what it is
            fed.
        at_fraction: the same, at the noisiest step of a schedule from 0 to 1.
        at_ends: the same of one class, at either end of a flow.
    """
    if not bool(output.isfinite().all()):
        return "it puts out NaN or infinity"
    if _match_db(noise, -output) >= LEAST_DB:
        return "it puts out the noise with the opposite sign"
    if _match_db(noise, at_zero) >= LEAST_DB:
        return "it returns what it is fed at step 0 instead, as where the image (x0) is predicted"
    if _match_db(noise, at_fraction) >= LEAST_DB:
        return "it does so where time steps run from 0 to 1: it was trained on another time scale"
    flow, figure = likest_flow(noise, at_ends)
    if figure >= LEAST_VELOCITY_DB:
        return likeness(flow)
    share = _share(noise, output)
    if abs(share) < _SOME:
        return (
            "hardly any of the noise is in its output, as where the image (x0) or v is predicted, "
            "or nothing was trained"
        )
    return (
        f"its output is {share:+.1f} times the noise and something else, as where a velocity (flow "
        f"matching) is predicted: for SiT's or REPA's pass --family sit or --family repa"
    )
