"""How a trajectory goes from noise to data: where its steps start, and what each of them does.

Which schedules a model has is said by its process: those of `diffusion_schedules.py`, or those of
`flow_schedules.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, get_args

import torch
from torch import Tensor

from ditas_export.diffusion.options import DiffusionSampler, FlowSampler, SamplerName
from ditas_export.errors import RunnerError
from ditas_export.process import FlowProcess, Process

Time = int | float
"""What a model is fed as time: a step of a diffusion's full schedule, or t of a flow."""

Predict = Callable[[Tensor, Time], Tensor]
"""Latents (N, C, H, W) and their time -> the model's output, guided as the step is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Where a step starts."""

    time: Time
    noise_level: float
    """0 data, 1 noise alone: σ of a flow, a diffusion's time step over the schedule's length. To
    six digits, which float32 has: so a level that was written down is met."""


class Schedule(Protocol):
    """The steps of one trajectory, noisiest first; they are taken in order, and once."""

    @property
    def moments(self) -> Sequence[Moment]:
        """Where each step starts."""
        ...

    def advance(
        self,
        index: int,
        latents: Tensor,
        output: Tensor,
        *,
        predict: Predict,
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """Take a step.

        Args:
            index: of the step.
            latents: (N, C, H, W) float32, where it starts.
            output: (N, 2C or C, H, W) float32, of the model there, guided.
            predict: asks the model again, for steps of more than one call.
            generators: of the noise, one per image.

        Returns:
            (N, C, H, W) float32, where the next step starts.
        """
        ...


def samplers_of(process: Process | FlowProcess) -> tuple[SamplerName, ...]:
    """Return the samplers that follow a process, the default first."""
    return get_args(FlowSampler if isinstance(process, FlowProcess) else DiffusionSampler)


def resolved_sampler(asked: SamplerName | None, process: Process | FlowProcess) -> SamplerName:
    """Return the sampler: as asked, else the default of the process.

    Raises:
        RunnerError: it is unknown, or follows other processes.
    """
    fitting = samplers_of(process)
    if asked is None:
        return fitting[0]
    if asked not in fitting:
        kind = "flow" if isinstance(process, FlowProcess) else "diffusion"
        raise RunnerError(
            f"sampler {asked!r} does not follow a {kind}, which this model is; choose one of "
            f"{', '.join(fitting)}"
        )
    return asked


def make_schedule(
    sampler: SamplerName | None,
    steps: int,
    process: Process | FlowProcess,
    *,
    shift: float | None = None,
) -> Schedule:
    """Return the schedule of one trajectory; imports diffusers, seconds' work.

    Args:
        sampler: its name; None is the default of the process.
        steps: how many are taken.
        process: that the model was trained with.
        shift: of a flow's times, see `flow_schedules.py`; None is none.

    Raises:
        RunnerError: a sampler that does not follow the process, a number of steps that it cannot
            take, or a shift where there is none.
    """
    name: Any = resolved_sampler(sampler, process)
    if isinstance(process, FlowProcess):
        from ditas_export.diffusion.flow_schedules import flow_schedule

        return flow_schedule(name, steps, process, shift=shift)
    from ditas_export.diffusion.diffusion_schedules import DiffusionSchedule

    if shift is not None:
        raise RunnerError(f"shift={shift}, but {name} has no shift of times; leave it out")
    return DiffusionSchedule(name, steps, process)


def time_words(time: Time) -> str:
    """Return a model's time for messages."""
    return f"time step {time}" if isinstance(time, int) else f"t = {time:.4g}"
