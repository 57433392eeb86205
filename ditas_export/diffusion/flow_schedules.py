"""Schedules of flows: x = (1 − σ) data + σ noise, from σ = 1 down to 0.

`euler` and `heun` follow dx/dσ = noise − data with diffusers' schedulers. A shift s moves the
times: σ' = s σ / (1 + (s − 1) σ); above 1 more steps are spent where there is much noise. Without
one, steps are even, as published: `euler` is SiT's and REPA's, `heun` REPA's, whose last step is
Euler's as well.

`euler-maruyama` is the published sampler of the SDE with SiT's "sigma" coefficient, in our own
words: with v = noise − data, dx = (v − σ s) dσ + √(2σ) dw, and the score s = −((1 − σ) v + x) / σ,
so that the drift is (2 − σ) v + x. Steps are even from σ = 1 to 0.04; the last, from there to 0,
adds no noise. Published with 250 steps.

Sources: Ma et al., "SiT", 2024 (`transport/` in github.com/willisma/SiT: `sample_sde`, last step
"Mean" of 0.04); Yu et al., "REPA", 2025 (`samplers.py` in github.com/sihyun-yu/REPA:
`euler_sampler`, `euler_maruyama_sampler`); Esser et al. 2024 (shift).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditas_export.diffusion.options import FlowSampler
from ditas_export.diffusion.schedules import Moment, Predict, Schedule
from ditas_export.errors import RunnerError
from ditas_export.process import FlowProcess

MOST_STEPS = 10_000
"""More would be nearer to each other than float32 tells apart, where times are shifted."""

SHIFTS = (0.01, 100.0)
"""Least and largest shift."""

LAST_STEP = 0.04
"""σ from which the last step of `euler-maruyama` goes: one of 25 steps of even size."""


def flow_schedule(
    sampler: FlowSampler, steps: int, process: FlowProcess, *, shift: float | None
) -> Schedule:
    """Return the schedule of one trajectory.

    Args:
        sampler: its name.
        steps: how many are taken; all but the last of `heun` call the model twice.
        process: that the model was trained with.
        shift: of the times; None is 1, which is none.

    Raises:
        RunnerError: a number of steps that the sampler cannot take, a shift that is out of range,
            or one of `euler-maruyama`, whose times are the published ones.
    """
    fewest = 2 if sampler == "euler-maruyama" else 1
    if not fewest <= steps <= MOST_STEPS:
        raise RunnerError(f"{sampler} takes {fewest} to {MOST_STEPS} steps, not {steps}")
    if sampler == "euler-maruyama":
        if shift is not None:
            raise RunnerError(
                f"shift={shift}, but {sampler} keeps to the published times; leave it out, or take "
                f"euler or heun"
            )
        return EulerMaruyamaSchedule(steps, process)
    shift = 1.0 if shift is None else shift
    if not SHIFTS[0] <= shift <= SHIFTS[1]:
        raise RunnerError(f"shift={shift}; expected {SHIFTS[0]:g} to {SHIFTS[1]:g}; 1 is none")
    return (HeunSchedule if sampler == "heun" else EulerSchedule)(steps, process, shift=shift)


class EulerSchedule:
    """`FlowMatchEulerDiscreteScheduler` as a `Schedule`; one call of the model per step."""

    def __init__(self, steps: int, process: FlowProcess, *, shift: float) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=shift)  # type: ignore[no-untyped-call]
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())
        scheduler.set_begin_index(0)
        self._scheduler, self._process = scheduler, process
        self.moments = _moments(scheduler.sigmas[:-1], process)

    def advance(
        self,
        index: int,
        latents: Tensor,
        output: Tensor,
        *,
        predict: Predict,
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """Take a step; see `Schedule`."""
        velocity = _towards_noise(output, self._process)
        return _moved(self._scheduler, index, velocity, latents)


class HeunSchedule:
    """`FlowMatchHeunDiscreteScheduler` as a `Schedule`; two calls per step, one in the last."""

    def __init__(self, steps: int, process: FlowProcess, *, shift: float) -> None:
        from diffusers import FlowMatchHeunDiscreteScheduler

        scheduler: Any = FlowMatchHeunDiscreteScheduler(  # type: ignore[no-untyped-call]
            num_train_timesteps=steps, shift=shift
        )
        # It shifts what it sets, and takes the ends of that from attributes that it has shifted.
        scheduler.sigma_max, scheduler.sigma_min = 1.0, 1 / steps
        scheduler.set_timesteps(steps)
        scheduler.set_begin_index(0)
        self._scheduler, self._process = scheduler, process
        self.moments = _moments(scheduler.sigmas[:-1:2], process)

    def advance(
        self,
        index: int,
        latents: Tensor,
        output: Tensor,
        *,
        predict: Predict,
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """Take a step; see `Schedule`."""
        velocity = _towards_noise(output, self._process)
        reached = _moved(self._scheduler, 2 * index, velocity, latents)
        if index + 1 == len(self.moments):
            return reached
        there = _towards_noise(predict(reached, self.moments[index + 1].time), self._process)
        return _moved(self._scheduler, 2 * index + 1, there, reached)


class EulerMaruyamaSchedule:
    """The published sampler of the SDE as a `Schedule`; one call of the model per step."""

    def __init__(self, steps: int, process: FlowProcess) -> None:
        self._process = process
        sigmas = np.linspace(1, LAST_STEP, steps).tolist()
        self._ends = list(pairwise([*sigmas, 0.0]))
        self.moments = _moments(sigmas, process)

    def advance(
        self,
        index: int,
        latents: Tensor,
        output: Tensor,
        *,
        predict: Predict,
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """Take a step; see `Schedule`."""
        from diffusers.utils.torch_utils import randn_tensor

        (sigma, following), velocity = self._ends[index], _towards_noise(output, self._process)
        drift = (2 - sigma) * velocity + latents
        mean: Tensor = latents + (following - sigma) * drift
        if following == 0:
            return mean
        noise = randn_tensor(
            latents.shape, generator=list(generators), device=latents.device, dtype=latents.dtype
        )
        return mean.add(noise, alpha=math.sqrt(2 * sigma * (sigma - following)))


def _moments(sigmas: Sequence[float] | Tensor, process: FlowProcess) -> list[Moment]:
    """Return where steps start, by σ."""
    return [
        Moment(
            time=1 - sigma if process.time_ends_at == "data" else sigma,
            noise_level=round(sigma, 6),
        )
        for sigma in (min(1.0, float(each)) for each in sigmas)  # shifted in float32, it may pass 1
    ]


def _towards_noise(output: Tensor, process: FlowProcess) -> Tensor:
    """Return noise − data of what a model puts out."""
    return output if process.velocity_towards == "noise" else output.neg()


def _moved(scheduler: Any, call: int, velocity: Tensor, latents: Tensor) -> Tensor:
    """Return what a scheduler makes of one call of the model."""
    moved: Tensor = scheduler.step(velocity, scheduler.timesteps[call], latents).prev_sample
    return moved
