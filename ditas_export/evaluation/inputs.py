"""What a model is fed along a trajectory: real inputs to compare two models on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ditas_export.diffusion.classes import parse_classes
from ditas_export.diffusion.guidance import model_inputs, resolved_cfg_scale
from ditas_export.diffusion.runner import Runner
from ditas_export.diffusion.sampling import Step, trajectory
from ditas_export.diffusion.schedules import Time
from ditas_export.evaluation.options import CompareOptions
from ditas_export.families.base import Conditions, ModelConfig, ModelInputs
from ditas_export.families.registry import conditions_of
from ditas_export.options import CFG_SCALE
from ditas_export.runtime.inputs import Feed, feed_of


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepInputs:
    """What a model is fed at one time step."""

    timestep: Time  # of the full schedule, from 0; of a flow t, 0 to 1
    feed: Feed  # with guidance, the rows of the labels and then those of the null label


def inputs_at(
    step: Step, cfg_scale: float, config: ModelConfig, conditions: Conditions
) -> ModelInputs:
    """Return what the model was called with at a step of a trajectory."""
    return model_inputs(
        step.latents,
        step.timestep,
        step.labels,
        cfg_scale=cfg_scale,
        config=config,
        conditions=conditions,
    )


def trajectory_inputs(options: CompareOptions, runner: Runner) -> Iterator[StepInputs]:
    """Yield what the reference is fed at every step of a trajectory, once it has taken the step.

    Args:
        options: classes, steps, guidance, seed.
        runner: of the reference.

    Raises:
        RunnerError: classes, images or steps that cannot be sampled.
        ConditionsError: embeddings that are needed and missing, or do not fit.
    """
    config = runner.config
    conditions = conditions_of(config, options.embeddings)
    cfg_scale = resolved_cfg_scale(options.cfg_scale, default=CFG_SCALE, conditions=conditions)
    classes = parse_classes(
        options.classes, conditions=conditions, count=options.images, seed=options.seed
    )
    for step in trajectory(
        runner,
        classes=classes,
        conditions=conditions,
        steps=options.steps,
        cfg_scale=cfg_scale,
        seed=options.seed,
    ):
        given = inputs_at(step, cfg_scale, config, conditions)
        yield StepInputs(timestep=step.timestep, feed=feed_of(config, given))
