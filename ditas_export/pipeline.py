"""The main job as one call: a checkpoint in, a verified ONNX file and its manifest out.

Everything that takes long is kept in OUT.onnx.work until the manifest is written, so that the same
command goes on wherever it was stopped: sampled batches, solved blocks, the modulation, the file
itself, and every seed of its verification. The file gets its name once it is verified.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ditas_export.artifact_files import sha256_of_file
from ditas_export.calibration.adaln import quantize_adaln
from ditas_export.calibration.calibrate import (
    QuantizationSettings,
    peak_bytes,
    quantize_model,
    solving_key,
)
from ditas_export.calibration.calibration_settings import CalibrationSettings, SamplingPrecision
from ditas_export.calibration.methods import ALPHA_GRID
from ditas_export.calibration.noise_check import NoiseCheck, check_noise
from ditas_export.calibration.quantized_model import QuantizedModel
from ditas_export.calibration.states import (
    CalibrationStates,
    collect_states,
    has_bfloat16_products,
    sampling_facts,
)
from ditas_export.diffusion.classes import parse_classes
from ditas_export.diffusion.guidance import resolved_cfg_scale
from ditas_export.distributed import SINGLE, Ranks
from ditas_export.errors import ArtifactError, CheckpointError
from ditas_export.evaluation.verify import Verification
from ditas_export.export_files import write_or_keep
from ditas_export.export_job import ExportJob, OnProgress, Solved, device_of, digest_of
from ditas_export.export_proofs import sample_beforehand
from ditas_export.families.base import Conditions
from ditas_export.families.identity import ModelIdentity
from ditas_export.families.load import LoadedModel, load_model
from ditas_export.families.registry import conditions_of, linear_names
from ditas_export.onnx_export.file_facts import FLOAT_TYPES
from ditas_export.options import (
    CFG_SCALE,
    DEFAULTS,
    FAST_WALK_TOKENS,
    WALK_TOKENS,
    ExportOptions,
)
from ditas_export.preflight import (
    check_artifact,
    check_calibration,
    check_files,
    check_model,
    check_states,
    job_files,
    require_states_fit,
)
from ditas_export.report.gather import Activations
from ditas_export.timings import Timings


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExportResult:
    """What an export gave."""

    quantized: QuantizedModel
    conditions: Conditions
    verification: Verification
    manifest: dict[str, Any]
    file: Path  # as asked for, or beside it where it does not compute what was calibrated


def export(
    options: ExportOptions,
    *,
    ranks: Ranks = SINGLE,
    on_progress: OnProgress = lambda *_: None,
    say: Callable[[str], None] = lambda _: None,
) -> ExportResult:
    """Do the main job, or go on with one that was interrupted.

    Args:
        options: what to do.
        ranks: the processes that share the calibration; rank 0 alone writes and verifies.
        on_progress: called as stages advance.
        say: called with one-line facts that a user wants to see as they come up.

    Raises:
        DitasExportError: bad input, found before the long work starts wherever it can be.
    """
    ranks.first(lambda: check_files(options))
    loaded = _load(options, ranks)
    ranks.together(lambda: device_of(options))
    ranks.first(lambda: check_model(options, loaded.model, FLOAT_TYPES[options.float_side]))
    say(f"model: {loaded.source}")
    for note in loaded.notes:
        say(f"  {note}")
    config = loaded.model.config
    conditions = ranks.together(lambda: conditions_of(config, options.embeddings))
    noise = ranks.first(lambda: _check_noise(options, loaded, conditions))
    if noise.warning is not None:
        say(f"warning: {noise.warning}")
    with ExitStack() as stack:
        work = ranks.first(lambda: stack.enter_context(job_files(options).working()))
        job = ExportJob(
            options=options,
            loaded=loaded,
            conditions=conditions,
            noise=noise,
            ranks=ranks,
            work=work,
            timings=Timings(),
            on_progress=on_progress,
            say=say,
        )
        solved = _with_modulation(job, _solved(job))
        verification, manifest = ranks.first(lambda: write_or_keep(job, solved))
        if verification.matches is not False:
            ranks.together(work.finish)
    return ExportResult(
        quantized=solved.quantized,
        conditions=conditions,
        verification=verification,
        manifest=manifest,
        file=options.rejected if verification.matches is False else options.output,
    )


def _load(options: ExportOptions, ranks: Ranks) -> LoadedModel:
    """Return the model, the same on every rank."""
    loaded = ranks.together(lambda: load_model(options.model, options.hints))
    if len(set(ranks.gather(loaded.identity.fingerprint))) > 1:
        raise CheckpointError(f"{options.model} is not the same checkpoint on every rank")
    return loaded


def _check_noise(options: ExportOptions, loaded: LoadedModel, conditions: Conditions) -> NoiseCheck:
    """Measure whether the model predicts noise, before any work is put into it."""
    try:
        return check_noise(loaded.model, conditions=conditions, device=device_of(options))
    finally:
        loaded.model.to("cpu")


def quantization_settings(options: ExportOptions) -> QuantizationSettings:
    """Return how the model is quantized: as asked, or by the defaults, those of `fast` its own."""
    walk_tokens = FAST_WALK_TOKENS if options.fast else WALK_TOKENS
    return QuantizationSettings(
        weight_bits=options.or_default("w"),
        activation_bits=options.or_default("a"),
        method=options.or_default("method"),
        rank=options.rank,
        block_size=options.block_size,
        ranges=options.ranges or "token",
        alpha_grid=ALPHA_GRID if options.alpha_grid is None else options.alpha_grid,
        walk_tokens=walk_tokens if options.walk_tokens is None else options.walk_tokens,
    )


def _solved(job: ExportJob) -> Solved:
    """Read the quantized model, take up the one of an interrupted run, or calibrate."""
    options, loaded, ranks = job.options, job.loaded, job.ranks
    artifact = options.artifact
    if artifact is not None:
        quantized = ranks.together(lambda: QuantizedModel.load(artifact, model=loaded.identity))
        check_artifact(artifact, options, quantized, job.conditions)
        ranks.first(lambda: quantized.require_parameters_of(loaded.model))
        key = sha256_of_file(artifact)
        return Solved(quantized=quantized, artifact=quantized, key=key, activations=None)
    settings = quantization_settings(options)
    config = loaded.model.config
    for note in settings.notes(config):
        job.say(note)
    device = device_of(options)
    loaded.model.to(device)
    with job.timings.part("sampling"):
        states = _states(job, settings)
        made_with = states.settings
        ranks.first(
            lambda: sample_beforehand(job, seed=made_with.seed, cfg_scale=made_with.cfg_scale)
        )
    key = solving_key(states, settings)
    folder = job.work.part("solved", key)
    kept = ranks.first(lambda: _kept_model(folder / _MODEL, loaded.identity))
    quantized = kept or _quantized(job, states, settings, folder)
    loaded.model.to("cpu")
    return Solved(
        quantized=quantized,
        artifact=quantized,
        key=key,
        activations=Activations(times=states.timesteps, maxima=states.input_maxima),
    )


_MODEL = "model.safetensors"
"""The solved model, in the folder of its blocks."""


def _kept_model(path: Path, identity: ModelIdentity) -> QuantizedModel | None:
    """Return a model that an interrupted run left, if any."""
    try:
        return QuantizedModel.load(path, model=identity)
    except ArtifactError:
        return None  # none, or damaged: made anew


def _quantized(
    job: ExportJob, states: CalibrationStates, settings: QuantizationSettings, folder: Path
) -> QuantizedModel:
    """Quantize what is not quantized yet, and keep it block by block."""
    config, ranks = job.loaded.model.config, job.ranks
    peak = peak_bytes(config, states.settings, settings, ranks)
    steps, samples = states.latents.shape[:2]
    walked = settings.walked_states(states.settings, config)
    job.say(
        f"calibration on {device_of(job.options)}: the walk sees {walked} of {steps * samples} "
        f"states, about {peak / 2**20:,.0f} MiB beside the model"
    )
    total = len(linear_names(config))
    job.on_progress("quantize", 0, total)
    done = 0

    def count(_name: str, _linear: object) -> None:
        nonlocal done
        done += 1
        job.on_progress("quantize", done, total)

    quantized = quantize_model(
        job.loaded.model,
        states,
        settings,
        conditions=job.conditions,
        progress=folder,
        ranks=ranks,
        on_linear=count,
        timings=job.timings,
    )
    ranks.first(lambda: quantized.save(folder / _MODEL))
    return quantized


def _with_modulation(job: ExportJob, solved: Solved) -> Solved:
    """Round the modulation as asked, or take it as an interrupted run left it.

    One whose integers are there already keeps them, unless other bits are asked for.
    """
    quantized, asked = solved.quantized, job.options.adaln
    bits = asked or (quantized.adaln_bits if quantized.adaln else DEFAULTS["adaln"])
    if bits == quantized.adaln_bits:
        return solved
    path = job.work.part("solved", solved.key) / f"adaln{bits}.safetensors"

    def rounded() -> QuantizedModel:
        kept = _kept_model(path, job.loaded.identity) if job.ranks.is_first else None
        made = kept or quantize_adaln(quantized, bits)
        if job.ranks.is_first and kept is None:
            made.save(path)
        return made

    shipped = job.ranks.together(rounded)
    return replace(solved, quantized=shipped, artifact=quantized if asked is None else shipped)


def _states(job: ExportJob, settings: QuantizationSettings) -> CalibrationStates:
    """Read the calibration states, take up those of an interrupted run, or sample them."""
    options, loaded, ranks = job.options, job.loaded, job.ranks
    config, path = loaded.model.config, options.calibration
    if path is not None:
        states = ranks.first(
            lambda: CalibrationStates.load(
                path, identity=loaded.identity, conditions=job.conditions
            )
        )
        check_states(path, options, states.settings, job.conditions)
        if options.fast and states.settings.precision == "fp32":
            job.say(f"--fast: {path} was sampled in float32, and is taken as it is")
        check_calibration(states.settings, settings, config, ranks)
    else:
        asked = _calibration_settings(job)
        ranks.together(lambda: check_calibration(asked, settings, config, ranks))
        states = _sampled_states(job, asked)
    if options.save_calibration is not None:
        kept_at = options.save_calibration
        ranks.first(lambda: states.save(kept_at))
    return states


def _calibration_settings(job: ExportJob) -> CalibrationSettings:
    """Return how the float model samples: as asked, or by the defaults."""
    options, config = job.options, job.loaded.model.config
    require_states_fit(options.or_default("steps"), options.or_default("samples"), config)
    return CalibrationSettings(
        steps=options.or_default("steps"),
        cfg_scale=resolved_cfg_scale(
            options.cfg_scale, default=CFG_SCALE, conditions=job.conditions
        ),
        classes=parse_classes(
            options.or_default("classes"),
            conditions=job.conditions,
            count=options.or_default("samples"),
            seed=options.or_default("seed"),
        ),
        seed=options.or_default("seed"),
        precision=sampling_precision(options, job.loaded.model.device, job.ranks),
        embeddings=job.conditions.identity,
    )


def _sampled_states(job: ExportJob, settings: CalibrationSettings) -> CalibrationStates:
    """Sample what an interrupted run has not sampled yet."""
    identity, ranks = job.loaded.identity, job.ranks
    folder = job.work.part("sampled", digest_of(sampling_facts(identity, settings)))
    whole = folder / "states.safetensors"
    kept = ranks.first(lambda: _kept_states(whole, identity))
    if kept is not None:
        return kept
    if job.options.fast:
        job.say(SAMPLES_IN[settings.precision])
    states = collect_states(
        job.loaded.model,
        settings,
        identity=identity,
        conditions=job.conditions,
        ranks=ranks,
        progress=folder,
        on_step=lambda done, total: job.on_progress("sample", done, total),
    )
    ranks.first(lambda: states.save(whole))
    return states


def _kept_states(path: Path, identity: ModelIdentity) -> CalibrationStates | None:
    """Return the states that an interrupted run left, if any."""
    try:
        return CalibrationStates.load(path, identity=identity)
    except ArtifactError:
        return None  # none, or damaged: put together anew


SAMPLES_IN: Mapping[SamplingPrecision, str] = {
    "bf16": "--fast: the float model samples in bfloat16",
    "fp32": "--fast: found no bfloat16 products (AVX512-BF16, or a GPU's) in every process; the "
    "float model samples in float32",
}
"""What is said of `fast`."""


def sampling_precision(
    options: ExportOptions, device: torch.device, ranks: Ranks = SINGLE
) -> SamplingPrecision:
    """Return what the float model samples in: with `fast` bfloat16 where every rank has it."""
    if options.fast and all(ranks.gather(has_bfloat16_products(device))):
        return "bf16"
    return "fp32"
