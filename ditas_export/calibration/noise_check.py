"""Whether a model returns the noise it is fed, as one that predicts noise does.

Tensors do not tell what a network was trained to predict. At the noisiest step x is noise but for a
trace of image, so a trained ε-model nearly returns its input; one that predicts the image, a
velocity, the opposite sign, or from time steps on another scale does not. The figure is
`10·log10(Σx² / Σ(ε̂ − x)²)`: 39 dB for the bundled model, −3.5 for a random one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ditas_export.diffusion.sampling import image_generator, initial_noise, make_scheduler
from ditas_export.dit.model import DiT
from ditas_export.figures import decibels, finite_or_none

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

    timestep: int  # the first of the schedule that sampling visits
    class_db: float
    null_db: float | None  # None where there is no null class beside the classes
    finding: str  # what the output looks like instead; empty where it is the noise

    @property
    def worst_db(self) -> float:
        """The lower figure."""
        return self.class_db if self.null_db is None else min(self.class_db, self.null_db)

    @property
    def passes(self) -> bool:
        """Whether the model is one that predicts noise, as far as this tells."""
        return self.worst_db >= LEAST_DB

    @property
    def warning(self) -> str | None:
        """One line where it does not pass."""
        if self.passes:
            return None
        return (
            f"fed pure noise at step {self.timestep}, the model returns it to "
            f"{self.worst_db:.1f} dB only (trained to predict noise: more than {LEAST_DB:.0f}): "
            f"{self.finding}. The file will compute what the model does; its pictures may be none"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values; null for what is infinite or no number."""
        return {
            "timestep": self.timestep,
            "class_db": finite_or_none(self.class_db),
            "null_class_db": None if self.null_db is None else finite_or_none(self.null_db),
            "least_db": LEAST_DB,
            "passes": self.passes,
            "finding": self.finding or None,
        }


def check_noise(model: DiT, *, device: str | torch.device = "cpu") -> NoiseCheck:
    """Feed a model noise at its noisiest step.

    Args:
        model: float32; moved to `device`.
        device: where it runs.
    """
    model.to(device)
    config = model.config
    timestep = int(make_scheduler("ddpm", _FEW_STEPS, config.process).timesteps[0])
    noise = initial_noise(config, [image_generator(_NOISE_SEED, row) for row in range(ROWS)])
    classes = torch.arange(ROWS) * max(1, config.num_labels // ROWS) % config.num_labels
    labels = [classes]
    if config.is_guidable:
        labels.append(torch.full_like(classes, config.null_class))
    outputs = [_predicted(model, noise, timestep, each) for each in labels]
    figures = [_match_db(noise, output) for output in outputs]
    failing = [index for index, figure in enumerate(figures) if not figure >= LEAST_DB]
    finding = ""
    if failing:
        fraction = timestep / config.process.train_timesteps
        finding = _finding(
            noise,
            outputs[failing[0]],
            at_zero=_predicted(model, noise, 0, labels[failing[0]]),
            at_fraction=_predicted(model, noise, fraction, labels[failing[0]]),
        )
    return NoiseCheck(
        timestep=timestep,
        class_db=figures[0],
        null_db=figures[1] if config.is_guidable else None,
        finding=finding,
    )


@torch.no_grad()
def _predicted(model: DiT, noise: Tensor, timestep: float, labels: Tensor) -> Tensor:
    """Return the channels of ε, (N, C, H, W) on the CPU; of a time step between whole ones too."""
    device = model.pos_embed.device
    timesteps = torch.full((len(noise),), timestep, device=device)
    output: Tensor = model(noise.to(device), timesteps, labels.to(device))
    return output[:, : noise.shape[1]].cpu()


def _match_db(noise: Tensor, output: Tensor) -> float:
    """Return 10·log10(Σx² / Σ(ε̂ − x)²), infinite where they are equal."""
    x = noise.double()
    error = output.double() - x
    return decibels(float(x.square().sum()), float(error.square().sum()))


def _finding(noise: Tensor, output: Tensor, *, at_zero: Tensor, at_fraction: Tensor) -> str:
    """Return what an output that is not the noise looks like.

    Args:
        noise: (N, C, H, W), what was fed at the noisiest step.
        output: the same shape, what came back.
        at_zero: the same, at time step 0, where a model that predicts images returns what it is
            fed.
        at_fraction: the same, at the noisiest step of a schedule from 0 to 1.
    """
    if not bool(output.isfinite().all()):
        return "it puts out NaN or infinity"
    if _match_db(noise, -output) >= LEAST_DB:
        return "it puts out the noise with the opposite sign"
    if _match_db(noise, at_zero) >= LEAST_DB:
        return "it returns what it is fed at step 0 instead, as where the image (x0) is predicted"
    if _match_db(noise, at_fraction) >= LEAST_DB:
        return "it does so where time steps run from 0 to 1: it was trained on another time scale"
    x, y = noise.double(), output.double()
    share = float((x * y).sum() / x.square().sum())
    if abs(share) < _SOME:
        return (
            "hardly any of the noise is in its output, as where the image (x0) or v is predicted, "
            "or nothing was trained"
        )
    return (
        f"its output is {share:+.1f} times the noise and something else, as where a velocity (flow "
        f"matching) is predicted"
    )
