"""The main job as one call: a DiT checkpoint in, a verified ONNX file and its manifest out."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from ditas_export import __version__
from ditas_export.artifact_files import require_writable
from ditas_export.calibration.adaln import adaln_block_size, quantize_adaln
from ditas_export.calibration.calibrate import (
    QuantizationSettings,
    peak_bytes,
    quantize_dit,
)
from ditas_export.calibration.fold import FoldedDiT, fold_smoothing
from ditas_export.calibration.methods import ALPHA_GRID
from ditas_export.calibration.modules import fake_quantized_dit
from ditas_export.calibration.quantized_dit import QuantizedDiT
from ditas_export.calibration.states import (
    CalibrationSettings,
    CalibrationStates,
    SamplingPrecision,
    collect_states,
    has_bfloat16_products,
)
from ditas_export.diffusion.classes import parse_classes
from ditas_export.diffusion.guidance import resolved_cfg_scale
from ditas_export.distributed import SINGLE, Ranks
from ditas_export.dit.checkpoint import LoadedDiT, load_dit
from ditas_export.dit.identity import ModelIdentity
from ditas_export.dit.sites import adaln_names
from ditas_export.errors import ArtifactError, CalibrationError, CheckpointError
from ditas_export.evaluation.verify import Verification, VerificationSettings, verify_file
from ditas_export.onnx_export.export import export_onnx, export_reference
from ditas_export.onnx_export.external_data import sha256_of_onnx
from ditas_export.onnx_export.form import Layout
from ditas_export.onnx_export.manifest import bytes_by_part, write_manifest
from ditas_export.onnx_export.vae import (
    export_vae_decoder,
    load_latent_decoder,
    require_same_channels,
)
from ditas_export.options import (
    CFG_SCALE,
    FAST_WALK_TOKENS,
    PREFERENCES,
    WALK_TOKENS,
    ExportOptions,
    Precision,
)
from ditas_export.quantization.ranges import Ranges
from ditas_export.timings import Timings

DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}

OnProgress = Callable[[str, int, int], None]
"""Called with a stage's name, what is done of it, and how much there is in all."""

VERIFICATION_SEEDS = 3
VERIFICATION_IMAGES = 4
VERIFICATION_SEED_OFFSET = 1000
"""Verification samples noise that calibration did not see."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExportResult:
    """What an export gave."""

    quantized: QuantizedDiT
    verification: Verification
    manifest: dict[str, Any]


def export(
    options: ExportOptions,
    *,
    ranks: Ranks = SINGLE,
    on_progress: OnProgress = lambda *_: None,
    say: Callable[[str], None] = lambda _: None,
) -> ExportResult:
    """Do the main job.

    Args:
        options: what to do.
        ranks: the processes that share the calibration; rank 0 alone writes and verifies.
        on_progress: called as stages advance.
        say: called with one-line facts that a user wants to see as they come up.

    Raises:
        DitasExportError: bad input, found before the long work starts wherever it can be.
    """
    ranks.first(lambda: _check_paths(options))
    loaded = _load(options, ranks)
    ranks.first(lambda: _check_vae(options, loaded))
    ranks.first(lambda: _check_adaln(options, loaded))
    say(f"model: {loaded.source}")
    timings = Timings()
    calibrated = _quantized(options, loaded, ranks, timings, on_progress, say)
    quantized = ranks.together(
        lambda: quantize_adaln(calibrated, options.adaln or calibrated.adaln_bits)
    )
    verification, manifest = ranks.first(
        lambda: _write(options, loaded, quantized, timings, on_progress)
    )
    return ExportResult(quantized=quantized, verification=verification, manifest=manifest)


def _write(
    options: ExportOptions,
    loaded: LoadedDiT,
    quantized: QuantizedDiT,
    timings: Timings,
    on_progress: OnProgress,
) -> tuple[Verification, dict[str, Any]]:
    """Write every file that was asked for; return the proof and the manifest."""
    if options.save_artifact is not None:
        quantized.save(options.save_artifact)
    layout = _layout(options, quantized)
    ranges = options.ranges or quantized.settings["ranges"]
    folded = fold_smoothing(quantized, dtype=DTYPES[options.float_side])
    on_progress("export", 0, 1)
    with timings.part("export"):
        export_onnx(
            folded,
            options.output,
            layout=layout,
            ranges=ranges,
            target=options.target,
        )
        if options.reference is not None:
            export_reference(loaded.model, options.reference, identity=loaded.identity)
        if options.vae is not None and options.vae_path is not None:
            export_vae_decoder(options.vae, options.vae_path)
    on_progress("export", 1, 1)
    with timings.part("verification"):
        verification = _verify(options, loaded, quantized, folded, ranges, on_progress)
    manifest = _manifest(options, loaded, quantized, layout, ranges, verification)
    manifest["seconds"] = {part: round(value, 1) for part, value in timings.seconds.items()}
    write_manifest(options.manifest_path, manifest)
    return verification, manifest


def _check_paths(options: ExportOptions) -> None:
    """Refuse outputs that cannot be written, before any work."""
    require_writable(options.output)
    outputs = [
        options.output,
        options.manifest_path,
        options.save_calibration,
        options.save_artifact,
        options.reference,
        options.vae_path,
    ]
    written = [path for path in outputs if path is not None]
    for path in written:
        require_writable(path)
    if len({path.absolute() for path in written}) < len(written):
        raise ArtifactError(f"two outputs have one name: {', '.join(map(str, written))}")
    if options.artifact is not None and options.calibration is not None:
        raise ArtifactError("--artifact needs no --calibration: it is quantized already")


def _load(options: ExportOptions, ranks: Ranks) -> LoadedDiT:
    """Return the model, the same on every rank."""
    loaded = ranks.together(lambda: load_dit(options.model, num_heads=options.num_heads))
    if len(set(ranks.gather(loaded.identity.fingerprint))) > 1:
        raise CheckpointError(f"{options.model} is not the same checkpoint on every rank")
    return loaded


def _check_vae(options: ExportOptions, loaded: LoadedDiT) -> None:
    """Refuse a VAE that cannot be loaded or takes other latents, before any work."""
    if options.vae is not None:
        taken = load_latent_decoder(options.vae).shape.in_channels
        require_same_channels(options.vae, made=loaded.model.config.in_channels, taken=taken)


def _check_adaln(options: ExportOptions, loaded: LoadedDiT) -> None:
    """Refuse bits that the modulation of this width cannot have, before any work."""
    if options.adaln in (8, 4):
        adaln_block_size(loaded.model.config.hidden_size, options.adaln)


def _device(options: ExportOptions) -> torch.device:
    """Return the device that calibration runs on."""
    if options.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise CalibrationError(
            f"--device cuda, but this PyTorch ({torch.__version__}) sees no CUDA GPU; "
            f"use --device cpu or install a CUDA build of torch"
        )
    return torch.device(options.device)


def quantization_settings(options: ExportOptions) -> QuantizationSettings:
    """Return how the model is quantized: as asked, or by the defaults, those of `fast` its own."""
    walk_tokens = FAST_WALK_TOKENS if options.fast else WALK_TOKENS
    return QuantizationSettings(
        weight_bits=options.w,
        activation_bits=options.a,
        method=options.method,
        rank=options.rank,
        block_size=options.block_size,
        ranges=options.ranges or "token",
        alpha_grid=ALPHA_GRID if options.alpha_grid is None else options.alpha_grid,
        walk_tokens=walk_tokens if options.walk_tokens is None else options.walk_tokens,
    )


def _quantized(
    options: ExportOptions,
    loaded: LoadedDiT,
    ranks: Ranks,
    timings: Timings,
    on_progress: OnProgress,
    say: Callable[[str], None],
) -> QuantizedDiT:
    """Read the quantized model, or calibrate and quantize."""
    artifact = options.artifact
    if artifact is not None:
        return ranks.together(lambda: _kept_artifact(artifact, loaded))
    settings = quantization_settings(options)
    config = loaded.model.config
    for note in settings.notes(config):
        say(note)
    device = _device(options)
    loaded.model.to(device)
    with timings.part("sampling"):
        states = _states(options, loaded, ranks, on_progress, say)
    peak = peak_bytes(config, states.settings, settings, ranks)
    steps, samples = states.latents.shape[:2]
    walked = settings.walked_states(states.settings, config)
    say(
        f"calibration on {device}: the walk sees {walked} of {steps * samples} states, "
        f"about {peak / 2**20:,.0f} MiB beside the model"
    )
    total = 4 * config.depth
    on_progress("quantize", 0, total)
    done = 0

    def count(_name: str, _linear: object) -> None:
        nonlocal done
        done += 1
        on_progress("quantize", done, total)

    quantized = quantize_dit(
        loaded.model,
        states,
        settings,
        progress_file=options.progress_path,
        ranks=ranks,
        on_linear=count,
        timings=timings,
    )
    ranks.first(lambda: options.states_path.unlink(missing_ok=True))
    loaded.model.to("cpu")
    return quantized


def _kept_artifact(path: Path, loaded: LoadedDiT) -> QuantizedDiT:
    """Read a quantized model, refusing that of another checkpoint."""
    return QuantizedDiT.load(path, model=loaded.identity)


def _states(
    options: ExportOptions,
    loaded: LoadedDiT,
    ranks: Ranks,
    on_progress: OnProgress,
    say: Callable[[str], None],
) -> CalibrationStates:
    """Read the calibration states, take up those of an interrupted run, or sample them."""
    path = options.calibration
    if path is not None:
        return ranks.first(lambda: CalibrationStates.load(path, identity=loaded.identity))
    settings = CalibrationSettings(
        steps=options.steps,
        cfg_scale=resolved_cfg_scale(
            options.cfg_scale, default=CFG_SCALE, config=loaded.model.config
        ),
        classes=parse_classes(
            options.classes,
            num_labels=loaded.model.config.num_labels,
            count=options.samples,
            seed=options.seed,
        ),
        seed=options.seed,
        precision=sampling_precision(options, loaded.model.pos_embed.device, ranks),
    )
    kept = ranks.first(lambda: _interrupted_states(options.states_path, settings, loaded.identity))
    if kept is not None:
        return kept
    if options.fast:
        say(SAMPLES_IN[settings.precision])
    states = collect_states(
        loaded.model,
        settings,
        identity=loaded.identity,
        ranks=ranks,
        progress_file=options.states_path,
        on_step=lambda done, total: on_progress("sample", done, total),
    )
    ranks.first(lambda: _save_states(options, states))
    return states


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


def _save_states(options: ExportOptions, states: CalibrationStates) -> None:
    """Keep the states until the model is quantized, and for good if asked."""
    states.save(options.states_path)
    if options.save_calibration is not None:
        states.save(options.save_calibration)


def _interrupted_states(
    path: Path, settings: CalibrationSettings, identity: ModelIdentity
) -> CalibrationStates | None:
    """Return the states that an interrupted run of the same settings left, if any."""
    if not path.is_file():
        return None
    try:
        states = CalibrationStates.load(path, identity=identity)
    except ArtifactError:
        return None  # of another run: sampled and written anew
    return states if states.settings == settings else None


def _layout(options: ExportOptions, quantized: QuantizedDiT) -> Layout:
    """Return the layout: as asked, or the one that fits the weights and the target."""
    if options.layout is not None:
        return options.layout
    if quantized.weight_bits == 8:
        return "int8"
    return PREFERENCES[options.target].layout if quantized.activation_bits == 8 else "int4"


def _verify(
    options: ExportOptions,
    loaded: LoadedDiT,
    quantized: QuantizedDiT,
    folded: FoldedDiT,
    ranges: Ranges,
    on_progress: OnProgress,
) -> Verification:
    """Hold the written file against the float and the fake-quantized model."""
    fake_quantized = fake_quantized_dit(folded, ranges=ranges, target=options.target)
    classes = parse_classes(
        "random",
        num_labels=loaded.model.config.num_labels,
        count=VERIFICATION_IMAGES,
        seed=options.seed + VERIFICATION_SEED_OFFSET,
    )
    first = options.seed + VERIFICATION_SEED_OFFSET
    settings = VerificationSettings(
        seeds=tuple(range(first, first + VERIFICATION_SEEDS)),
        classes=classes,
        cfg_scale=quantized.settings["calibration"]["cfg_scale"],
    )
    return verify_file(
        loaded.model,
        fake_quantized,
        options.output,
        settings,
        device=_device(options),
        on_step=lambda done, total: on_progress("verify", done, total),
    )


def _manifest(
    options: ExportOptions,
    loaded: LoadedDiT,
    quantized: QuantizedDiT,
    layout: Layout,
    ranges: Ranges,
    verification: Verification,
) -> dict[str, Any]:
    """Return what `out.json` says: versions, hashes, settings, every linear, bytes, the proof."""
    sizes = bytes_by_part(ir.load(options.output))
    linears = {
        name: {
            "alpha": linear.alpha,
            "block_size": linear.weight.block_size,
            "rank": linear.low_rank.rank if linear.low_rank else 0,
            "static_range": linear.static_range,
            "output_snr_db": linear.output_snr_db,
            "smoothing_scale": [
                float(linear.smoothing_scale.amin()),
                float(linear.smoothing_scale.amax()),
            ],
        }
        for name, linear in quantized.linears.items()
    }
    return {
        "format": "ditas-export manifest 1",
        "versions": _versions(),
        "model": {
            "source": loaded.source,
            "fingerprint": quantized.identity.fingerprint,
            **quantized.identity.to_dict(),
        },
        "file": {
            "name": options.output.name,
            "sha256": sha256_of_onnx(options.output),
            "layout": layout,
            "ranges": ranges if quantized.activation_bits == 8 else None,
            "precision": options.float_side,
            "target": options.target,
            "adaln_bits": quantized.adaln_bits,
        },
        "vae_decoder": _vae_entry(options),
        "settings": dict(quantized.settings),
        "bytes_by_part": sizes,
        "bits_per_weight": bits_per_weight(sizes, quantized),
        "float_linears": _float_linears(quantized),
        "linears": linears,
        "verification": verification.to_dict(),
    }


def _vae_entry(options: ExportOptions) -> dict[str, str] | None:
    """Return what `out.json` says of the VAE's decoder, None where there is none."""
    if options.vae is None or options.vae_path is None:
        return None
    return {
        "name": options.vae_path.name,
        "sha256": sha256_of_onnx(options.vae_path),
        "source": options.vae,
    }


def bits_per_weight(sizes: Mapping[str, int], quantized: QuantizedDiT) -> float:
    """Return bits per weight of the block linears, codes, scales and low-rank factors counted."""
    weights = sum(linear.weight.codes.numel() for linear in quantized.linears.values())
    counted = ("codes", "multipliers", "row_scales", "low_rank")
    return 8 * sum(sizes[part] for part in counted) / weights


def _float_linears(quantized: QuantizedDiT) -> list[str]:
    """Return the linears whose weights stay float, by name."""
    embedders = ["t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear"]
    modulation = [] if quantized.adaln else adaln_names(quantized.config.depth)
    return [*embedders, *modulation]


def _versions() -> dict[str, str]:
    """Return the versions of what made the file."""
    packages = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "diffusers", "numpy")
    found = {"ditas-export": __version__, "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # onnxruntime-gpu has another name
            continue
    return found
