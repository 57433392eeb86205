"""A float file against a quantized file or an engine, on the inputs of a real trajectory.

Both are fed the x_t of the float trajectory, so errors do not add up over time steps. Within a step
they do: a linear gets what its own model feeds it. The *first diverging* linear is the first in the
order of the network whose output has an SNR below `linear_db`, over the inputs at hand.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import chain
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ditas_export.artifact_files import atomic_path, differences
from ditas_export.dit.model import DiTConfig
from ditas_export.engine.metadata import EngineMetadata, metadata_path
from ditas_export.errors import VerificationError
from ditas_export.evaluation.inputs import StepInputs, feeds_of, trajectory_inputs
from ditas_export.evaluation.linear_outputs import (
    comparable_part,
    linear_outputs,
    output_bytes,
)
from ditas_export.evaluation.metrics import Difference
from ditas_export.evaluation.options import CompareOptions
from ditas_export.evaluation.polygraphy_runs import (
    Outputs,
    is_inputs_file,
    onnx_runner,
    onnx_runner_with_outputs,
    plan_runner,
    run_both,
    save_inputs,
)
from ditas_export.figures import finite_or_none
from ditas_export.file_signs import PLAN_SUFFIXES, has_suffix
from ditas_export.job_files import JobFiles, Output, json_kind
from ditas_export.onnx_export.export import read_config, read_identity
from ditas_export.onnx_export.external_data import require_external_data
from ditas_export.onnx_export.manifest import require_own_manifest
from ditas_export.runtime.open_runner import onnxruntime_takes

Differences = Mapping[str, Difference]
"""Output or linear -> how far it is from the float model's."""

OnProgress = Callable[[str, int, int], None]
"""Called with a stage, what of it is done, and the whole."""

KIND = "ditas-export comparison"
FORMAT = f"{KIND} 1"

HELD_BYTES = 2**29
"""Outputs of linears of one model that are held at once, unless those of one step take more."""

REMEDY = "Write the reference of the same model with ditas-export --reference"
"""For files of two models."""

WORST = 5
"""Linears that are listed as the worst."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepComparison:
    """What was found at one time step."""

    timestep: int  # of the full schedule, from 0
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
    def not_finite_timestep(self) -> int | None:
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
        VerificationError: files of two different DiTs or of other outputs, or a bf16 file, which
            ONNX Runtime does not run.
        EngineError: an engine that cannot run here.
        RunnerError: settings that cannot be sampled, no GPU for an engine, or a refused file.
        ArtifactError: the inputs or the report cannot be written, or something else is there.
    """
    job_files(options, report).check()
    advance = on_progress or (lambda _stage, _done, _total: None)
    config = _common_config(options)
    _require_onnxruntime_files(options)
    for path in (options.reference, *([] if _is_plan(options.model) else [options.model])):
        require_own_manifest(path)
    is_plan = _is_plan(options.model)
    # An engine that cannot run here is refused before anything is sampled.
    model = plan_runner(options.model) if is_plan else onnx_runner(options.model)
    inputs = trajectory_inputs(
        options, on_step=lambda done, total: advance("Sampling in float", done, total)
    )
    if options.gen_inputs is not None:
        save_inputs(options.gen_inputs, feeds_of(inputs))
    advance("Comparing outputs", 0, 1)
    outputs = [
        _output_differences(options, wanted, found)
        for wanted, found in run_both(onnx_runner(options.reference), model, feeds_of(inputs))
    ]
    advance("Comparing outputs", 1, 1)
    linears: Sequence[Differences] = [{} for _ in inputs]
    if options.linears and not is_plan:
        linears = _compare_linears(options, config, inputs, advance)
    steps = tuple(
        StepComparison(timestep=entry.timestep, outputs=of_outputs, linears=of_linears)
        for entry, of_outputs, of_linears in zip(inputs, outputs, linears, strict=True)
    )
    comparison = Comparison(steps=steps, options=options)
    if report is not None:
        text = json.dumps({"format": FORMAT, **comparison.to_dict()}, indent=2, allow_nan=False)
        with atomic_path(report) as partial:
            partial.write_text(text + "\n", encoding="utf-8")
    return comparison


def job_files(options: CompareOptions, report: Path | None = None) -> JobFiles:
    """Return the files of a comparison."""
    outputs = [
        (options.gen_inputs, "inputs for Polygraphy", is_inputs_file),
        (report, "comparison", json_kind(KIND)),
    ]
    return JobFiles(
        inputs={"FP32.onnx": options.reference, "MODEL": options.model},
        outputs=tuple(
            Output(path=path, what=what, is_ours=kind)
            for path, what, kind in outputs
            if path is not None
        ),
    )


def _is_plan(model: Path) -> bool:
    """Return whether a file is an engine by its name; every other is taken for ONNX."""
    return has_suffix(model, PLAN_SUFFIXES)


def _common_config(options: CompareOptions) -> DiTConfig:
    """Return the DiT that both files hold; files that record their weights hold the same ones."""
    reference = read_config(options.reference)
    if _is_plan(options.model):
        model, made_from = EngineMetadata.load(metadata_path(options.model)).dit, None
    else:
        model, made_from = read_config(options.model), read_identity(options.model)
    recorded = read_identity(options.reference)
    if made_from is not None and recorded is not None:
        made_from.require_same(
            recorded,
            what=f"{options.model}, compared with {options.reference},",
            remedy=REMEDY,
        )
    elif odd := differences(model.to_dict(), reference.to_dict()):
        raise VerificationError(
            f"{options.model} holds another DiT than {options.reference}: {'; '.join(odd)}. "
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


def _compare_linears(
    options: CompareOptions, config: DiTConfig, inputs: Sequence[StepInputs], advance: OnProgress
) -> Sequence[Differences]:
    """Return the differences of every block linear, step by step.

    As many steps at once as `HELD_BYTES` allow: Polygraphy holds what the first model gives until
    the second has run.
    """
    wanted_names = linear_outputs(options.reference, config)
    found_names = linear_outputs(options.model, config)
    reference, model = (
        onnx_runner_with_outputs(path, list(chain.from_iterable(names.values())))
        for path, names in ((options.reference, wanted_names), (options.model, found_names))
    )
    feeds = feeds_of(inputs)
    at_once = max(1, HELD_BYTES // output_bytes(config, rows=len(feeds[0]["latents"])))
    found_steps: list[Differences] = []
    for start in range(0, len(feeds), at_once):
        for wanted, found in run_both(reference, model, feeds[start : start + at_once]):
            found_steps.append(
                {
                    name: _linear_difference(
                        name,
                        [wanted[value] for value in values],
                        [found[value] for value in found_names[name]],
                        config,
                    )
                    for name, values in wanted_names.items()
                }
            )
        advance("Comparing linears", len(found_steps), len(feeds))
    return found_steps


def _output_differences(options: CompareOptions, wanted: Outputs, found: Outputs) -> Differences:
    """Return the differences of every output at one step; refuse outputs that are not the same."""
    shapes = [{name: value.shape for name, value in each.items()} for each in (wanted, found)]
    if shapes[0] != shapes[1]:
        raise VerificationError(
            f"{options.model} gives {shapes[1]} where {options.reference} gives {shapes[0]}; "
            f"export it again with ditas-export"
        )
    return {name: _difference(value, found[name]) for name, value in wanted.items()}


def _difference(wanted: Any, found: Any) -> Difference:
    """Return the difference of two arrays."""
    return Difference.between(torch.from_numpy(wanted), torch.from_numpy(found))


def _linear_difference(
    name: str, wanted: Sequence[Any], found: Sequence[Any], config: DiTConfig
) -> Difference:
    """Return the difference of a linear's outputs, each in parts, where they are comparable."""
    wholes = (torch.from_numpy(np.concatenate(parts, axis=-1)) for parts in (wanted, found))
    return Difference.between(
        *(comparable_part(name, whole, config.hidden_size) for whole in wholes)
    )


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
