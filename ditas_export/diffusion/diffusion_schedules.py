"""Schedules of diffusions; the schedulers come from diffusers.

The default, `ddpm`, is the published DiT sampler: time steps spread evenly over the schedule that
the model was trained on, no clipping, the variance learned where the model learned it. `ddim` and
`dpm++` get ε only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ditas_export.diffusion.options import DiffusionSampler
from ditas_export.diffusion.schedules import Moment, Predict, resolved_sampler
from ditas_export.errors import RunnerError
from ditas_export.process import DIT_PROCESS, Process


class DiffusionSchedule:
    """A scheduler of diffusers as a `Schedule`.

    Raises:
        RunnerError: see `make_scheduler`.
    """

    def __init__(self, sampler: DiffusionSampler, steps: int, process: Process) -> None:
        self._scheduler = make_scheduler(sampler, steps, process)
        self._takes_variance = sampler == "ddpm" and process.variance == "learned_range"
        self.moments = [
            Moment(time=time, noise_level=round(time / process.train_timesteps, 6))
            for time in self._scheduler.timesteps.tolist()
        ]

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
        fed = output if self._takes_variance else output[:, : latents.shape[1]]
        timestep = self._scheduler.timesteps[index]
        step = self._scheduler.step(fed, timestep, latents, generator=generators)
        moved: Tensor = step.prev_sample
        return moved


def make_scheduler(sampler: DiffusionSampler, steps: int, process: Process = DIT_PROCESS) -> Any:
    """Return a diffusers scheduler whose time steps are set.

    `ddim` takes leading time steps and a count that divides the schedule's: diffusers strides by
    1000 // steps, which is exact for those alone. Past half of the schedule, `dpm++` would visit
    time steps twice and divide by zero.

    Args:
        sampler: its name.
        steps: how many are taken.
        process: that the model was trained with.

    Raises:
        RunnerError: an unknown sampler, or a number of steps that it cannot take.
    """
    resolved_sampler(sampler, process)
    trained = process.train_timesteps
    most = trained // 2 if sampler == "dpm++" else trained
    if not 2 <= steps <= most:
        raise RunnerError(f"{sampler} takes 2 to {most} steps, not {steps}")
    if sampler == "ddim" and trained % steps:
        raise RunnerError(
            f"ddim takes a number of steps that divides {trained}, not {steps}; "
            f"the nearest is {_nearest_divisor(steps, trained)}"
        )
    scheduler = _new_scheduler(sampler, process)
    scheduler.set_timesteps(steps)
    return scheduler


def _new_scheduler(sampler: DiffusionSampler, process: Process) -> Any:
    """Return an unset scheduler of a process; imports diffusers, seconds' work."""
    trained = {
        "num_train_timesteps": process.train_timesteps,
        "beta_schedule": process.beta_schedule,
        "beta_start": process.beta_start,
        "beta_end": process.beta_end,
        "prediction_type": process.prediction,
    }
    if sampler == "ddpm":
        from diffusers import DDPMScheduler

        return DDPMScheduler(  # type: ignore[no-untyped-call]
            **trained,
            variance_type=process.variance,
            timestep_spacing="linspace",
            clip_sample=False,
        )
    if sampler == "ddim":
        from diffusers import DDIMScheduler

        return DDIMScheduler(  # type: ignore[no-untyped-call]
            **trained, timestep_spacing="leading", clip_sample=False
        )
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(  # type: ignore[no-untyped-call]
        **trained, timestep_spacing="linspace"
    )


def _nearest_divisor(steps: int, trained: int) -> int:
    """Return the divisor of the schedule's length, 2 or more, that is nearest to `steps`."""
    divisors = (d for d in range(2, trained + 1) if trained % d == 0)
    return min(divisors, key=lambda divisor: abs(divisor - steps))
