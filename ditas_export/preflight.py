"""What can be refused before an export samples: files, options that contradict, what does not fit.

Everything here takes seconds, and what it refuses would else be found after an hour.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ditas_export.artifact_files import require_writable
from ditas_export.calibration.adaln import adaln_block_size
from ditas_export.calibration.calibrate import QuantizationSettings, peak_bytes
from ditas_export.calibration.calibration_settings import CalibrationSettings
from ditas_export.calibration.fold import require_representable
from ditas_export.calibration.quantized_model import ARTIFACT_KIND, QuantizedModel
from ditas_export.calibration.states import STATES_KIND
from ditas_export.diffusion.classes import parse_classes
from ditas_export.diffusion.schedules import make_schedule
from ditas_export.distributed import Ranks
from ditas_export.dit.diffusers_folder import HUB_ID
from ditas_export.errors import ArtifactError, CalibrationError
from ditas_export.families.base import Conditions, FamilyModel, ModelConfig
from ditas_export.job_files import JobFiles, Kind, Output, existing, json_kind, tensors_kind
from ditas_export.onnx_export.file_facts import is_float_file, is_quantized_file
from ditas_export.onnx_export.manifest import MANIFEST_KIND
from ditas_export.options import FAST_WALK_TOKENS, ExportOptions, stats_path_of
from ditas_export.report.page_file import is_report_file, require_matplotlib
from ditas_export.report.stats import STATS_KIND
from ditas_export.vae.load import load_latent_decoder
from ditas_export.vae.shape import is_decoder_file, require_fitting_vae

CHECKPOINT_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".sft", ".tar")
"""Names that no exported file has."""


def job_files(options: ExportOptions) -> JobFiles:
    """Return the files of an export, implicit ones among them."""
    manifest, stats = json_kind(MANIFEST_KIND), tensors_kind(STATS_KIND)
    kinds: list[tuple[Path | None, str, Kind]] = [
        (options.output, "exported model", is_quantized_file),
        (options.manifest_path, "manifest", manifest),
        (options.stats_path, "statistics", stats),
        (options.rejected, "rejected model", is_quantized_file),
        (options.rejected.with_suffix(".json"), "manifest of a rejected model", manifest),
        (stats_path_of(options.rejected), "statistics of a rejected model", stats),
        (options.save_calibration, "calibration states", tensors_kind(STATES_KIND)),
        (options.save_artifact, "quantized model", tensors_kind(ARTIFACT_KIND)),
        (options.reference, "float model", is_float_file),
        (options.vae_path, "VAE decoder", is_decoder_file),
        (options.report, "report", is_report_file),
    ]
    return JobFiles(
        inputs=existing(
            model=options.model,
            calibration=options.calibration,
            artifact=options.artifact,
            vae=options.vae,
            embeddings=options.embeddings,
            lora=options.lora,
        ),
        outputs=tuple(
            Output(path=path, what=what, is_ours=kind)
            for path, what, kind in kinds
            if path is not None
        ),
        keeps_work=True,
    )


def check_files(options: ExportOptions) -> None:
    """Refuse outputs that must not or cannot be written, and requests that exclude each other.

    Raises:
        ArtifactError: see `JobFiles.check`.
    """
    output = options.output
    if not output.name or output.name == "..":
        require_writable(output)
    is_checkpoint = output.suffix.lower() in CHECKPOINT_SUFFIXES
    is_strange = output.exists() and not is_quantized_file(output)
    if options.model == "digits" and (is_checkpoint or is_strange):
        raise ArtifactError(
            f"{output} is the file to write, and "
            f"{'is there already' if is_strange else 'has the name of a checkpoint'}; did you mean "
            f"--model {output}? Else name another, such as out.onnx"
        )
    looks_like_hub = HUB_ID.fullmatch(str(output)) and not output.suffix
    if options.model == "digits" and looks_like_hub and not output.parent.exists():
        raise ArtifactError(
            f"{output} is the file to write, and looks like a hub id; did you mean --model "
            f"{output}? Else make the folder {output.parent} first"
        )
    job_files(options).check()
    if options.report is not None:
        require_matplotlib()
    if options.artifact is not None and options.calibration is not None:
        raise ArtifactError("--artifact needs no --calibration: it is quantized already")
    if options.artifact is not None and options.save_calibration is not None:
        raise ArtifactError("--artifact keeps no calibration states; leave out --save-calibration")


def check_model(options: ExportOptions, model: FamilyModel, dtype: torch.dtype) -> None:
    """Refuse a VAE, bits of the modulation or a float type that do not fit the model.

    Raises:
        DitasExportError: what does not fit, and what would.
    """
    config = model.config
    if options.vae is not None:
        shape = load_latent_decoder(options.vae).shape
        require_fitting_vae(
            f"the VAE {options.vae}",
            in_channels=shape.in_channels,
            factors=shape.factors,
            config=config,
        )
    if options.adaln in (8, 4):
        adaln_block_size(config.hidden_size, options.adaln)
    require_representable(model.config, model.state_dict(), dtype)


def check_calibration(
    calibration: CalibrationSettings,
    settings: QuantizationSettings,
    config: ModelConfig,
    ranks: Ranks,
) -> None:
    """Refuse what would be found while sampling or walking.

    Raises:
        RunnerError: steps that the sampler does not take.
        QuantizationError: a rank or block size that does not fit.
        CalibrationError: more processes than batches of states.
    """
    make_schedule(None, calibration.steps, config.process)
    settings.require_fits(config)
    peak_bytes(config, calibration, settings, ranks)


def require_states_fit(steps: int, samples: int, config: ModelConfig) -> None:
    """Refuse calibration states that the memory of this machine cannot hold.

    Raises:
        CalibrationError: says how many bytes they take.
    """
    wanted = 4 * steps * samples * math.prod(config.latent_shape)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if wanted > there:
        raise CalibrationError(
            f"--samples {samples} with --steps {steps} keeps states of {wanted:,} bytes, and this "
            f"machine has {there:,} of memory; ask for fewer"
        )


def check_states(
    path: Path, options: ExportOptions, found: CalibrationSettings, conditions: Conditions
) -> None:
    """Refuse options that contradict the calibration states that are taken.

    Raises:
        ArtifactError: names every such option, with both values.
    """
    _require_agreement(path, options, _calibration_facts(options, found.to_dict(), conditions))


def check_artifact(
    path: Path, options: ExportOptions, quantized: QuantizedModel, conditions: Conditions
) -> None:
    """Refuse options that contradict the quantized model that is taken.

    Raises:
        ArtifactError: names every such option, with both values; other embeddings; or an artefact
            that does not say how it was calibrated.
    """
    settings, linears = quantized.settings, quantized.linears.values()
    if not isinstance(settings.get("calibration"), dict):
        raise ArtifactError(f"{path} does not say how it was calibrated; calibrate again")
    grid = settings.get("alpha_grid")
    facts: dict[str, Any] = {
        "w": quantized.weight_bits,
        "a": quantized.activation_bits,
        "method": settings.get("method"),
        "alpha_grid": None if grid is None else tuple(grid),
        "walk_tokens": settings.get("walk_tokens"),
        "rank": _common({linear.low_rank.rank if linear.low_rank else 0 for linear in linears}),
        "block_size": _common({linear.weight.block_size for linear in linears}),
    }
    try:
        CalibrationSettings.from_dict(settings["calibration"]).require_conditions(conditions)
    except CalibrationError as error:
        raise ArtifactError(f"{path}: {error}; pass its own, or calibrate again") from error
    facts |= _calibration_facts(options, settings["calibration"], conditions)
    _require_agreement(path, options, facts)


def _calibration_facts(
    options: ExportOptions, found: Mapping[str, Any], conditions: Conditions
) -> dict[str, Any]:
    """Return what states were made with, by option; classes in the words that were asked with."""
    made_of = list(found["classes"])
    facts = {name: found[name] for name in ("steps", "cfg_scale", "seed")}
    facts |= {"samples": len(made_of), "classes": ",".join(map(str, made_of))}
    if options.classes is not None:
        asked = parse_classes(
            options.classes,
            conditions=conditions,
            count=len(made_of),
            seed=found["seed"],
        )
        if list(asked) == made_of:
            facts["classes"] = options.classes
    return facts


def _common(values: set[int]) -> int | str:
    """Return the one value that there is, or all of them as text."""
    return values.pop() if len(values) == 1 else " and ".join(map(str, sorted(values)))


def _require_agreement(path: Path, options: ExportOptions, found: Mapping[str, Any]) -> None:
    """Refuse options that are given and differ from what was found."""
    asked = {name: getattr(options, name) for name in found}
    if options.fast and asked.get("walk_tokens", 0) is None:
        asked["walk_tokens"] = FAST_WALK_TOKENS
    odd = [
        f"--{name.replace('_', '-')} {_text(value)}, but it was made with {_text(found[name])}"
        for name, value in asked.items()
        if value is not None and value != found[name]
    ]
    if odd:
        raise ArtifactError(
            f"{path} contradicts what is asked for: {'; '.join(odd)}; leave the option out, or "
            f"calibrate again"
        )


def _text(value: object) -> str:
    """Return a value as the command line has it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
