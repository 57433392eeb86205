"""A float file against a quantized file or an engine, on the inputs of a real trajectory.

Both are fed the x_t of the float trajectory, so errors do not add up over time steps. Within a step
they do: a linear gets what its own model feeds it. The *first diverging* linear is the first in the
order of the network whose output has an SNR below `linear_db`, over the inputs at hand.

Each model is opened once: the reference samples the trajectory, and gives its linears' outputs on
the way. What is held beside the two models is what both give at one step.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial, reduce
from itertools import chain
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditas_export.artifact_files import atomic_path, differences
from ditas_export.diffusion.schedules import Time
from ditas_export.engine.metadata import metadata_of
from ditas_export.errors import VerificationError
from ditas_export.evaluation.inputs import trajectory_inputs
from ditas_export.evaluation.linear_outputs import comparable_part, linear_outputs
from ditas_export.evaluation.metrics import Difference
from ditas_export.evaluation.options import CompareOptions
from ditas_export.evaluation.polygraphy_runs import (
    Outputs,
    is_inputs_file,
    onnx_runner,
    opened,
    plan_runner,
    save_inputs,
)
from ditas_export.families.base import ModelConfig, ModelInputs
from ditas_export.families.registry import family_of, record_of
from ditas_export.figures import finite_or_none
from ditas_export.file_signs import PLAN_SUFFIXES, has_suffix
from ditas_export.job_files import JobFiles, Kind, Output, existing, json_kind
from ditas_export.onnx_export.external_data import plain_files, require_external_data
from ditas_export.onnx_export.file_facts import read_config, read_identity
from ditas_export.onnx_export.interface import OUTPUT_NAME as OUTPUT
from ditas_export.onnx_export.manifest import require_own_manifest
from ditas_export.runtime.checked_runner import CheckedRunner
from ditas_export.runtime.inputs import Feed, feed_of
from ditas_export.runtime.open_runner import onnxruntime_takes

Differences = Mapping[str, Difference]
"""Output or linear -> how far it is from the float model's."""

Names = Mapping[str, Sequence[str]]
"""Linear -> the values that hold its output, in order."""

OnProgress = Callable[[str, int, int], None]
"""Called with a stage, what of it is done, and the whole."""

KIND = "ditas-export comparison"
FORMAT = f"{KIND} 1"

REMEDY = "Write the reference of the same model with ditas-export --reference"
"""For files of two models."""

WORST = 5
"""Linears that are listed as the worst."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepComparison:
    """What was found at one time step."""

    timestep: Time  # of the full schedule, from 0; of a flow t, 0 to 1
    outputs: Differences
    linears: Differences  # in the order of the network; empty if none were compared


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What was found at all time steps; SNR in dB."""

    steps: tuple[StepComparison, ...]
    options: CompareOptions

    @property
    def outputs(self) -> Differences:
        """Every output, over all time steps."""
        return _joined([step.outputs for step in self.steps])

    @property
    def linears(self) -> Differences:
        """Every linear, over all time steps."""
        return _joined([step.linears for step in self.steps])

    @property
    def total_db(self) -> float:
        """SNR over all time steps, of the worst output."""
        return min(difference.snr_db for difference in self.outputs.values())

    @property
    def matches(self) -> bool | None:
        """Whether the total reaches the threshold; None where none was given."""
        if self.options.threshold_db is None:
            return None
        return self.total_db >= self.options.threshold_db

    @property
    def not_finite_timestep(self) -> Time | None:
        """The first time step at which an output is not finite, if any."""
        return next(
            (
                step.timestep
                for step in self.steps
                if not all(found.is_finite for found in step.outputs.values())
            ),
            None,
        )

    def first_diverging(self, linears: Differences) -> str | None:
        """Return the first linear below `linear_db`, in the order of the network, if any."""
        return next(
            (name for name, found in linears.items() if found.snr_db < self.options.linear_db),
            None,
        )

    def worst_linears(self) -> list[tuple[str, Difference]]:
        """Return the linears of lowest SNR over all time steps, worst first."""
        return sorted(self.linears.items(), key=lambda item: item[1].snr_db)[:WORST]

    def to_dict(self) -> dict[str, Any]:
        """Return the findings as JSON values; null for what is infinite or not a number."""
        settings = dataclasses.asdict(self.options)
        return {
            "options": {
                name: value if isinstance(value, int | float | None) else str(value)
                for name, value in settings.items()
            },
            "matches": self.matches,
            "total_snr_db": finite_or_none(self.total_db),
            "not_finite_timestep": self.not_finite_timestep,
            "outputs": _figures(self.outputs),
            "first_diverging_linear": self.first_diverging(self.linears),
            "linears": _figures(self.linears),
            "steps": [
                {
                    "timestep": step.timestep,
                    "outputs": _figures(step.outputs),
                    "first_diverging_linear": self.first_diverging(step.linears),
                    "linears": _figures(step.linears),
                }
                for step in self.steps
            ],
        }


def compare(
    options: CompareOptions,
    *,
    report: Path | None = None,
    on_progress: OnProgress | None = None,
) -> Comparison:
    """Compare a model with the float model at every time step of a trajectory.

    Args:
        options: the two files, what is sampled, and the thresholds.
        report: a JSON to write all findings to.
        on_progress: called with a stage, what of it is done, and the whole.

    Raises:
        OnnxExportError: a file that this package did not write, or without the named linears.
        OtherModelError: files that record two different models.
        VerificationError: files of two different models or of other outputs, or a bf16 file, which
            ONNX Runtime does not run.
        EngineError: an engine that cannot run here.
        ConditionsError: embeddings that are needed and missing, or do not fit.
        RunnerError: settings that cannot be sampled, no GPU for an engine, or a refused file.
        ArtifactError: the inputs or the report cannot be written, or something else is there.
    """
    job_files(options, report).check()
    advance = on_progress or (lambda _stage, _done, _total: None)
    config = _common_config(options)
    _require_onnxruntime_files(options)
    for path in (options.reference, *([] if _is_plan(options.model) else [options.model])):
        require_own_manifest(path)
    with ExitStack() as stack:
        model, found_names = _open_model(options, config, stack)
        reference, wanted_names = _open_reference(options, config, stack, with_linears=found_names)
        feeds, steps = [], []
        for entry in trajectory_inputs(options, reference):
            wanted, found = reference.take_outputs(), model(entry.feed)
            steps.append(
                StepComparison(
                    timestep=entry.timestep,
                    outputs=_output_differences(options, wanted_names, wanted, found_names, found),
                    linears=_compare_linears(config, wanted_names, wanted, found_names, found),
                )
            )
            del wanted, found  # before the next step makes as much
            feeds.append(entry.feed)
            advance("Comparing", len(steps), options.steps)
    if options.gen_inputs is not None:
        save_inputs(options.gen_inputs, feeds)
    comparison = Comparison(steps=tuple(steps), options=options)
    if report is not None:
        text = json.dumps({"format": FORMAT, **comparison.to_dict()}, indent=2, allow_nan=False)
        with atomic_path(report) as partial:
            partial.write_text(text + "\n", encoding="utf-8")
    return comparison


def job_files(options: CompareOptions, report: Path | None = None) -> JobFiles:
    """Return the files of a comparison."""
    outputs: list[tuple[Path | None, str, Kind]] = [
        (options.gen_inputs, "inputs for Polygraphy", partial(_is_inputs_file, options)),
        (report, "comparison", json_kind(KIND)),
    ]
    return JobFiles(
        inputs={
            "FP32.onnx": options.reference,
            "MODEL": options.model,
            **existing(embeddings=options.embeddings),
        },
        outputs=tuple(
            Output(path=path, what=what, is_ours=kind)
            for path, what, kind in outputs
            if path is not None
        ),
    )


def _is_inputs_file(options: CompareOptions, path: Path) -> bool:
    """Return whether a file has inputs of the model that is compared."""
    config = read_config(options.reference)
    return is_inputs_file(path, [each.name for each in family_of(config).inputs(config)])


def _is_plan(model: Path) -> bool:
    """Return whether a file is an engine by its name; every other is taken for ONNX."""
    return has_suffix(model, PLAN_SUFFIXES)


def _common_config(options: CompareOptions) -> ModelConfig:
    """Return the model that both files hold; files that record their weights hold the same ones."""
    reference = read_config(options.reference)
    if _is_plan(options.model):
        model, made_from = metadata_of(options.model).model, None
    else:
        model, made_from = read_config(options.model), read_identity(options.model)
    recorded = read_identity(options.reference)
    if made_from is not None and recorded is not None:
        made_from.require_same(
            recorded,
            what=f"{options.model}, compared with {options.reference},",
            remedy=REMEDY,
        )
    elif odd := differences(record_of(model), record_of(reference)):
        raise VerificationError(
            f"{options.model} holds another model than {options.reference}: {'; '.join(odd)}. "
            f"{REMEDY}"
        )
    return reference


def _require_onnxruntime_files(options: CompareOptions) -> None:
    """Refuse files that lack data, or of a float type for which ONNX Runtime has no kernels."""
    files = [options.reference] + [options.model] * (not _is_plan(options.model))
    for path in files:
        require_external_data(path)
    if refused := [path for path in files if not onnxruntime_takes(path)]:
        raise VerificationError(
            f"{refused[0]} is bf16, and onnxruntime, in which files are compared, has no bfloat16 "
            f"kernels on CPUs; compare an engine of it (ditas-build), or the same model in fp16"
        )


class _Reference(CheckedRunner):
    """The float model as what samples; of its last call all outputs can be taken."""

    def __init__(self, config: ModelConfig, outputs_of: Callable[[Feed], Outputs]) -> None:
        super().__init__(config)
        self._backend = outputs_of
        self._outputs: Outputs = {}

    @property
    def description(self) -> str:
        """The runtime."""
        return "the float reference in onnxruntime"

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def take_outputs(self) -> Outputs:
        """Return all outputs of the last call, and keep none of them."""
        taken, self._outputs = self._outputs, {}
        return taken

    def _infer(self, backend: Any, inputs: ModelInputs) -> Tensor:
        """Run the file."""
        self._outputs = backend(feed_of(self._config, inputs))
        return torch.from_numpy(self._outputs[OUTPUT])


def _open_model(
    options: CompareOptions, config: ModelConfig, stack: ExitStack
) -> tuple[Callable[[Feed], Outputs], Names]:
    """Open the model that is compared; return what feeds it, and the values of its linears."""
    if _is_plan(options.model):
        return stack.enter_context(opened(plan_runner(options.model))), {}
    names = linear_outputs(options.model, config) if options.linears else {}
    path = stack.enter_context(plain_files(options.model))
    runner = onnx_runner(path, list(chain.from_iterable(names.values())))
    return stack.enter_context(opened(runner)), names


def _open_reference(
    options: CompareOptions, config: ModelConfig, stack: ExitStack, *, with_linears: Names
) -> tuple[_Reference, Names]:
    """Open the float model, and return the values of its linears where the other gives its own."""
    names = linear_outputs(options.reference, config) if with_linears else {}
    path = stack.enter_context(plain_files(options.reference))
    runner = onnx_runner(path, list(chain.from_iterable(names.values())))
    return _Reference(config, stack.enter_context(opened(runner))), names


def _compare_linears(
    config: ModelConfig, wanted_names: Names, wanted: Outputs, found_names: Names, found: Outputs
) -> Differences:
    """Return the difference of every block linear at one step, where its outputs are comparable."""
    return {
        name: Difference.between(
            _linear(name, wanted, values, config), _linear(name, found, found_names[name], config)
        )
        for name, values in wanted_names.items()
    }


def _linear(name: str, outputs: Outputs, values: Sequence[str], config: ModelConfig) -> Tensor:
    """Return a linear's output, which is in parts, where it is comparable."""
    whole = torch.from_numpy(np.concatenate([outputs[value] for value in values], axis=-1))
    return comparable_part(name, whole, config)


def _output_differences(
    options: CompareOptions,
    wanted_names: Names,
    wanted: Outputs,
    found_names: Names,
    found: Outputs,
) -> Differences:
    """Return the differences of every output at one step; refuse outputs that are not the same."""
    pairs = ((wanted_names, wanted), (found_names, found))
    debug = [set(chain.from_iterable(names.values())) for names, _ in pairs]
    shapes = [
        {name: value.shape for name, value in outputs.items() if name not in values}
        for values, (_, outputs) in zip(debug, pairs, strict=True)
    ]
    if shapes[0] != shapes[1]:
        raise VerificationError(
            f"{options.model} gives {shapes[1]} where {options.reference} gives {shapes[0]}; "
            f"export it again with ditas-export"
        )
    return {
        name: Difference.between(torch.from_numpy(wanted[name]), torch.from_numpy(found[name]))
        for name in shapes[0]
    }


def _joined(steps: Sequence[Differences]) -> Differences:
    """Return the differences over all steps, name by name."""
    return {name: reduce(add, (step[name] for step in steps)) for name in steps[0]}


def _figures(differences: Differences) -> dict[str, dict[str, float | None]]:
    """Return the figures of differences as JSON values."""
    return {
        name: {
            "snr_db": finite_or_none(found.snr_db),
            "max_abs": finite_or_none(found.max_abs),
            "mean_abs": finite_or_none(found.mean_abs),
            "relative": finite_or_none(found.relative),
        }
        for name, found in differences.items()
    }
