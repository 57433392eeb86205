"""Where the error comes from: a model on every rung from float32 to what runs it.

All rungs sample the same noise, and answer what float32 was fed at every time step of its first
trajectory. Each is held against float32; what runs the quantized numbers is held against the
fake-quantized forward of the same form too, which is what it must compute. Beside them stand
float32 and the fake-quantized forward against themselves, the latents of every call changed by
10⁻⁶: what last bits alone do, in rounding's ties too.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial, reduce
from importlib.metadata import version
from operator import add
from pathlib import Path
from typing import Any

import torch

from ditas_export import __version__
from ditas_export.artifact_files import atomic_path, differences
from ditas_export.calibration.fold import fold_smoothing
from ditas_export.calibration.modules import fake_quantized_model
from ditas_export.calibration.quantized_model import QuantizedModel
from ditas_export.diffusion.classes import parse_classes
from ditas_export.diffusion.guidance import resolved_cfg_scale
from ditas_export.diffusion.runner import Runner
from ditas_export.diffusion.schedules import Time
from ditas_export.dit.model import DiTConfig
from ditas_export.engine.metadata import metadata_of
from ditas_export.errors import VerificationError
from ditas_export.evaluation.held_out import (
    FLOAT,
    FinalLatents,
    HeldOut,
    Probed,
    Sampled,
    VerificationSettings,
    opened,
)
from ditas_export.evaluation.metrics import Difference, psnr_db
from ditas_export.evaluation.options import LadderOptions
from ditas_export.evaluation.ties import DISTURBANCE, DisturbedRunner
from ditas_export.families.base import FamilyModel
from ditas_export.families.load import load_model
from ditas_export.families.registry import conditions_of, record_of
from ditas_export.figures import finite_or_none
from ditas_export.job_files import JobFiles, Output, existing, json_kind
from ditas_export.kept_parts import KeptParts
from ditas_export.onnx_export.export import export_onnx
from ditas_export.onnx_export.form import Layout
from ditas_export.options import CFG_SCALE, NO_HINTS, CheckpointHints, Target
from ditas_export.quantization.weight_only import BLOCK_SIZES
from ditas_export.runtime.fastest_form import FASTEST
from ditas_export.runtime.onnxruntime_runner import OnnxRuntimeRunner
from ditas_export.runtime.openvino_runner import INSTALL, OpenVINORunner
from ditas_export.runtime.tensorrt_runner import TensorRTRunner
from ditas_export.runtime.torch_runner import TorchRunner
from ditas_export.temporary_files import temporary_folder

OnProgress = Callable[[str, int, int], None]
"""Called with a stage, what of it is done, and the whole."""

KIND = "ditas-export ladder"
FORMAT = f"{KIND} 1"

FLOAT32 = "float32"
"""The rung that all others are held against."""

FAKE = "fake-quantized"
"""What files must compute that run as they are, and engines."""

FAKE_CPU_FORM = f"{FAKE}, CPU form"
"""The same in the form that our runners run on CPUs."""

SEEDS = 2
"""Of noise; single steps are those of the first."""

LAST_BITS = "last bits alone"
"""What is said of a rung that is held against itself, disturbed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """How far a rung is from another."""

    steps: tuple[Difference, ...]  # single steps, at what float32 was fed; in the ladder's order
    final: FinalLatents
    final_psnr_db: float  # of all images together, by the range of the other's latents

    @property
    def single_step_db(self) -> float:
        """SNR over all single steps."""
        return reduce(add, self.steps).snr_db

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values, null for what is infinite or no number."""
        return {
            "single_step_snr_db": finite_or_none(self.single_step_db),
            "single_step_snr_db_by_step": [finite_or_none(each.snr_db) for each in self.steps],
            "final_latents_snr_db_mean": finite_or_none(self.final.mean_db),
            "final_latents_snr_db_interval": [
                finite_or_none(bound) for bound in self.final.interval_db
            ],
            "final_latents_snr_db_by_image": [
                finite_or_none(value) for value in self.final.images_db
            ],
            "final_latents_psnr_db": finite_or_none(self.final_psnr_db),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One way of computing the model."""

    name: str
    runtime: str
    from_float: Distance | None  # None of the fake-quantized forward against itself
    must_compute: str | None  # the rung that differs from it by rounding alone, if one does
    from_that: Distance | None
    not_finite: str | None  # where it put out NaN or infinity

    def to_dict(self) -> dict[str, Any]:
        """Return the findings as JSON values."""
        return {
            "name": self.name,
            "runtime": self.runtime,
            "from_float32": self.from_float and self.from_float.to_dict(),
            "must_compute": self.must_compute,
            "from_what_it_must_compute": self.from_that and self.from_that.to_dict(),
            "not_finite": self.not_finite,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder:
    """What was found, from float to what runs the model."""

    options: LadderOptions
    source: str
    fingerprint: str  # of the float model
    timesteps: tuple[Time, ...]  # of the single steps
    rungs: tuple[Rung, ...]
    missing: tuple[str, ...]  # a line for each rung that is not there

    def to_dict(self) -> dict[str, Any]:
        """Return the findings as JSON values."""
        settings = dataclasses.asdict(self.options)
        return {
            "options": {
                name: str(value) if isinstance(value, Path) else value
                for name, value in settings.items()
            },
            "source": self.source,
            "fingerprint": self.fingerprint,
            "timesteps": list(self.timesteps),
            "rungs": [rung.to_dict() for rung in self.rungs],
            "missing": list(self.missing),
            "versions": {"ditas-export": __version__, "torch": version("torch")},
        }


def ladder(
    options: LadderOptions,
    *,
    report: Path | None = None,
    on_progress: OnProgress | None = None,
) -> Ladder:
    """Sample with every rung, one after the other.

    Args:
        options: the float model, its quantized model, an engine of it if there is one, and what is
            sampled.
        report: a JSON to write all findings to.
        on_progress: called with a stage, what of it is done, and the whole.

    Raises:
        OtherModelError: a quantized model of another float model.
        VerificationError: an engine of another one.
        NonFiniteError: the float model itself puts out NaN or infinity.
        RunnerError: settings that cannot be sampled, or no GPU for an engine.
        ConditionsError: embeddings that are needed and missing, or do not fit.
        ArtifactError: the report cannot be written, or something else is there; or no room for the
            files that are run.
        DitasExportError: a model that cannot be read.
    """
    job_files(options, report).check()
    quantized = QuantizedModel.load(options.artifact)
    loaded = load_model(options.model, _hints(quantized))
    remedy = "Name the float model that it was made from"
    quantized.identity.require_same(loaded.identity, what=str(options.artifact), remedy=remedy)
    _require_engine_of(options.plan, quantized)
    conditions = conditions_of(quantized.config, options.embeddings)
    settings = VerificationSettings(
        seeds=tuple(range(options.seed, options.seed + SEEDS)),
        classes=parse_classes(
            options.classes, conditions=conditions, count=options.images, seed=options.seed
        ),
        steps=options.steps,
        cfg_scale=resolved_cfg_scale(options.cfg_scale, default=CFG_SCALE, conditions=conditions),
    )
    held_out = HeldOut(
        settings=settings,
        config=quantized.config,
        conditions=conditions,
        floats=KeptParts(),
        others=KeptParts(),
        probes=options.steps,
    )
    advance = on_progress or (lambda _stage, _done, _total: None)
    with temporary_folder(room=3 * options.artifact.stat().st_size) as folder:
        planned, missing = _planned(options, loaded.model, quantized, folder)
        rungs = list(_climb(held_out, planned, advance))
    found = Ladder(
        options=options,
        source=loaded.source,
        fingerprint=loaded.identity.fingerprint,
        timesteps=tuple(inputs.timesteps[0].item() for inputs in held_out.inputs),
        rungs=tuple(rungs),
        missing=tuple(missing),
    )
    if report is not None:
        text = json.dumps({"format": FORMAT, **found.to_dict()}, indent=2, allow_nan=False)
        with atomic_path(report) as partial_file:
            partial_file.write_text(text + "\n", encoding="utf-8")
    return found


def job_files(options: LadderOptions, report: Path | None = None) -> JobFiles:
    """Return the files of a ladder."""
    outputs = (
        [] if report is None else [Output(path=report, what="ladder", is_ours=json_kind(KIND))]
    )
    return JobFiles(
        inputs={
            "MODEL": Path(options.model),
            "ARTEFACT": options.artifact,
            **({} if options.plan is None else {"PLAN": options.plan}),
            **existing(embeddings=options.embeddings),
        },
        outputs=tuple(outputs),
    )


def _hints(quantized: QuantizedModel) -> CheckpointHints:
    """Return what the checkpoint need not say, since its quantized model does."""
    config = quantized.config
    return (
        CheckpointHints(num_heads=config.num_heads) if isinstance(config, DiTConfig) else NO_HINTS
    )


def _require_engine_of(plan: Path | None, quantized: QuantizedModel) -> None:
    """Refuse an engine of another model, as far as its configuration says.

    Raises:
        VerificationError: such an engine.
    """
    if plan is None:
        return
    found, wanted = record_of(metadata_of(plan).model), record_of(quantized.config)
    if odd := differences(found, wanted):
        raise VerificationError(
            f"{plan} holds another model than the quantized one: {'; '.join(odd)}. Build it of a "
            f"file that was exported from it"
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Planned:
    """A rung before it is climbed."""

    name: str
    open: Callable[[], Runner]
    must_compute: str | None = None
    is_disturbed: bool = False  # whether it is held against itself too


def _planned(
    options: LadderOptions, model: FamilyModel, quantized: QuantizedModel, folder: Path
) -> tuple[list[_Planned], list[str]]:
    """Return the rungs, each opened when it is climbed, and why others are missing."""
    ranges = quantized.settings["ranges"]
    folded = cache(partial(fold_smoothing, quantized, dtype=torch.float32))

    @cache
    def file(layout: Layout) -> Path:
        path = folder / f"{layout}.onnx"
        export_onnx(folded(), path, layout=layout, ranges=ranges)
        return path

    def in_torch(
        name: str, make: Callable[[], FamilyModel], *, is_disturbed: bool = False
    ) -> _Planned:
        return _Planned(name=name, open=lambda: TorchRunner(make()), is_disturbed=is_disturbed)

    def fake(target: Target) -> FamilyModel:
        return fake_quantized_model(folded(), ranges=ranges, target=target)

    def half(dtype: torch.dtype) -> FamilyModel:
        return copy.deepcopy(model).to(dtype)

    def in_onnxruntime(layout: Layout, *, as_is: bool) -> Runner:
        return OnnxRuntimeRunner(file(layout), as_is=as_is)

    layouts, missing = _layouts(quantized), []
    rungs = [
        in_torch(FLOAT32, lambda: model, is_disturbed=True),
        in_torch("float16", partial(half, torch.float16)),
        in_torch("bfloat16", partial(half, torch.bfloat16)),
        in_torch(FAKE, partial(fake, "portable"), is_disturbed=True),
        in_torch(FAKE_CPU_FORM, partial(fake, FASTEST)),
    ]
    for layout in layouts:
        rungs.append(
            _Planned(
                name=f"onnxruntime, {layout}",
                open=partial(in_onnxruntime, layout, as_is=True),
                must_compute=FAKE,
            )
        )
    on_cpu: dict[str, Callable[[], Runner]] = {
        "onnxruntime": partial(in_onnxruntime, layouts[0], as_is=False)
    }
    if importlib.util.find_spec("openvino") is not None:
        on_cpu["OpenVINO"] = lambda: OpenVINORunner(file(layouts[0]))
    else:
        missing.append(f"no OpenVINO: it is not installed; {INSTALL}")
    for runtime, open_file in on_cpu.items():
        name = f"{runtime}, CPU form"
        rungs.append(_Planned(name=name, open=open_file, must_compute=FAKE_CPU_FORM))
    if options.plan is not None:
        open_engine = partial(TensorRTRunner, options.plan)
        rungs.append(_Planned(name="engine", open=open_engine, must_compute=FAKE))
    else:
        missing.append("no engine: no PLAN was given (ditas-build makes one)")
    return rungs, missing


def _layouts(quantized: QuantizedModel) -> tuple[Layout, ...]:
    """Return the layouts that a quantized model can be written in."""
    weight = next(iter(quantized.linears.values())).weight
    has_int4 = weight.bits == 4
    if quantized.activation_bits != 8:
        has_int4 = has_int4 and weight.block_size in BLOCK_SIZES
    return ("int4", "int8") if has_int4 else ("int8",)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Climbed:
    """What a rung sampled and answered."""

    sampled: Sampled
    probed: Probed

    @classmethod
    def of(cls, held_out: HeldOut, name: str, runner: Callable[[], Runner]) -> _Climbed:
        """Sample and answer."""
        sampled = held_out.sampled(name, runner, held_out.settings.seeds)
        return cls(sampled=sampled, probed=held_out.probed(name, runner))

    def distance(self, other: _Climbed) -> Distance:
        """Return how far this is from another."""
        pairs = zip(other.probed.outputs, self.probed.outputs, strict=True)
        return Distance(
            steps=tuple(Difference.between(*pair) for pair in pairs),
            final=FinalLatents.between(other.sampled, self.sampled),
            final_psnr_db=psnr_db(torch.cat(other.sampled.finals), torch.cat(self.sampled.finals)),
        )

    @property
    def not_finite(self) -> str | None:
        """Where it put out NaN or infinity."""
        return self.sampled.not_finite or self.probed.not_finite


def _climb(held_out: HeldOut, planned: Sequence[_Planned], advance: OnProgress) -> Iterator[Rung]:
    """Yield what was found of every rung, and after those that are disturbed what that does."""
    settings = held_out.settings
    climbs = len(planned) + sum(each.is_disturbed for each in planned)
    done, total = 0, climbs * len(settings.seeds) * settings.steps

    def count(steps: int) -> None:
        nonlocal done
        done += steps
        advance("Climbing the ladder", done, total)

    held_out.count = count
    climbed: dict[str, _Climbed] = {}
    for rung in planned:
        key = FLOAT if rung.name == FLOAT32 else rung.name
        with opened(rung.open) as runner:
            found = climbed[rung.name] = _Climbed.of(held_out, key, runner)
            if rung.name != FLOAT32:
                other = rung.must_compute
                yield Rung(
                    name=rung.name,
                    runtime=found.probed.runtime,
                    from_float=found.distance(climbed[FLOAT32]),
                    must_compute=other,
                    from_that=None if other is None else found.distance(climbed[other]),
                    not_finite=found.not_finite,
                )
            if rung.is_disturbed:
                disturbed = _Climbed.of(held_out, f"{key}-disturbed", partial(_disturbed, runner))
                distance = disturbed.distance(found)
                yield Rung(
                    name=f"{rung.name}, {LAST_BITS}",
                    runtime=found.probed.runtime,
                    from_float=distance if rung.name == FLOAT32 else None,
                    must_compute=rung.name,
                    from_that=distance,
                    not_finite=disturbed.not_finite,
                )


def _disturbed(runner: Callable[[], Runner]) -> Runner:
    """Return a runner whose latents are changed at every call by what float32 rounds."""
    return DisturbedRunner(runner(), size=DISTURBANCE[torch.float32], seed=0)
