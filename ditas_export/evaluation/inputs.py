"""What a model is fed along a trajectory: real inputs to compare two models on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ditas_export.diffusion.classes import parse_classes
from ditas_export.diffusion.guidance import ModelInputs, model_inputs, resolved_cfg_scale
from ditas_export.diffusion.sampling import Step, trajectory
from ditas_export.dit.model import DiTConfig
from ditas_export.evaluation.options import CompareOptions
from ditas_export.options import CFG_SCALE
from ditas_export.runtime.inputs import Feed, feed_of
from ditas_export.runtime.onnxruntime_runner import OnnxRuntimeRunner


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepInputs:
    """What a model is fed at one time step."""

    timestep: int  # of the full schedule, from 0
    feed: Feed  # with guidance, the class rows and then the null-class rows


def inputs_at(step: Step, cfg_scale: float, config: DiTConfig) -> ModelInputs:
    """Return what the model was called with at a step of a trajectory."""
    return model_inputs(
        step.latents,
        step.timestep,
        step.class_labels,
        cfg_scale=cfg_scale,
        config=config,
    )


def trajectory_inputs(
    options: CompareOptions, *, on_step: Callable[[int, int], None] | None = None
) -> tuple[StepInputs, ...]:
    """Sample with the reference file and return what it was fed, step by step.

    Args:
        options: the reference, classes, steps, guidance, seed.
        on_step: called with (steps done, in all).

    Raises:
        RunnerError: classes, images or steps that cannot be sampled, or a file that ONNX Runtime
            refuses.
        OnnxExportError: a file of another origin.
    """
    gathered = []
    with OnnxRuntimeRunner(options.reference) as runner:
        config = runner.config
        cfg_scale = resolved_cfg_scale(options.cfg_scale, default=CFG_SCALE, config=config)
        classes = parse_classes(
            options.classes, num_labels=config.num_labels, count=options.images, seed=options.seed
        )
        for step in trajectory(
            runner,
            classes=classes,
            steps=options.steps,
            cfg_scale=cfg_scale,
            seed=options.seed,
        ):
            given = inputs_at(step, cfg_scale, config)
            feed = feed_of(given.latents, given.timesteps, given.class_labels)
            gathered.append(StepInputs(timestep=step.timestep, feed=feed))
            if on_step is not None:
                on_step(len(gathered), options.steps)
    return tuple(gathered)


def feeds_of(inputs: Sequence[StepInputs]) -> list[Feed]:
    """Return the feeds alone, in order: what Polygraphy loads and saves."""
    return [entry.feed for entry in inputs]
