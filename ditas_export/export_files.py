"""The last steps of an export: the file written, verified, and given its name with its manifest.

Each is kept in the working folder as it is done, and done once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ditas_export.artifact_files import atomic_path
from ditas_export.calibration.fold import fold_smoothing
from ditas_export.calibration.fold_proof import prove_model
from ditas_export.calibration.modules import fake_quantized_model
from ditas_export.calibration.quantized_model import QuantizedModel
from ditas_export.errors import ArtifactError, DitasExportError
from ditas_export.evaluation.verify import Verification, verify_file
from ditas_export.export_job import ExportJob, Solved, device_of, digest_of
from ditas_export.export_manifest import manifest_of, versions
from ditas_export.export_proofs import Proofs
from ditas_export.kept_parts import KeptParts
from ditas_export.onnx_export.export import export_onnx, export_reference
from ditas_export.onnx_export.external_data import (
    install,
    remove_other_data,
    rename_pair,
    sha256_of_onnx,
)
from ditas_export.onnx_export.file_facts import FLOAT_TYPES
from ditas_export.onnx_export.form import Layout
from ditas_export.onnx_export.manifest import write_manifest
from ditas_export.options import PREFERENCES, ExportOptions
from ditas_export.runtime.fastest_form import FASTEST, is_rewritten
from ditas_export.text_files import read_json
from ditas_export.vae.export import export_vae_decoder


def _layout(options: ExportOptions, quantized: QuantizedModel) -> Layout:
    """Return the layout: as asked, or the one that fits the weights and the target."""
    if options.layout is not None:
        return options.layout
    if quantized.weight_bits == 8:
        return "int8"
    return PREFERENCES[options.target].layout if quantized.activation_bits == 8 else "int4"


def write_or_keep(job: ExportJob, solved: Solved) -> tuple[Verification, dict[str, Any]]:
    """Write every file; where that is refused, say what is kept and how to go on.

    Raises:
        DitasExportError: as `_written` raised it, with that added.
    """
    try:
        return _written(job, solved)
    except DitasExportError as error:
        if job.options.artifact is not None:
            raise
        raise type(error)(
            f"{error}. The solved model is kept in {job.work.path}: the same command, with that "
            f"mended, goes on from it"
        ) from error


def _written(job: ExportJob, solved: Solved) -> tuple[Verification, dict[str, Any]]:
    """Write every file that was asked for; return the proof and the manifest."""
    options, quantized = job.options, solved.quantized
    layout = _layout(options, quantized)
    ranges = options.ranges or quantized.settings["ranges"]
    proofs = Proofs.of(job, solved, ranges)
    settings = proofs.settings
    facts = {
        "solved": solved.key,
        "adaln": quantized.adaln_bits,
        "form": [layout, ranges, options.target, options.float_side],
        "verification": asdict(settings),
        "versions": versions(),
    }
    folder = job.work.part("written", digest_of(facts))
    candidate, kept_manifest = folder / options.output.name, folder / "manifest.json"
    kept = KeptParts(folder=folder, parts=dict(proofs.known))
    dtype = FLOAT_TYPES[options.float_side]
    with job.timings.part("fold proof"):
        fold_proof = prove_model(
            quantized, dtype, on_block=lambda *done: job.on_progress("prove", *done)
        )
    folded = fold_smoothing(quantized, dtype=dtype)
    job.on_progress("export", 0, 1)
    with job.timings.part("export"):
        _forget_what_is_gone(options, candidate, kept_manifest)
        if not candidate.exists() and not kept_manifest.exists():
            export_onnx(folded, candidate, layout=layout, ranges=ranges, target=options.target)
        _write_companions(job, folder)
    job.on_progress("export", 1, 1)
    with job.timings.part("verification"):
        verification = verify_file(
            job.loaded.model,
            fake_quantized_model(folded, ranges=ranges, target=options.target),
            candidate,
            settings,
            fake_quantized_fastest=partial(
                fake_quantized_model, folded, ranges=ranges, target=FASTEST
            )
            if is_rewritten(options.target, options.float_side)
            else None,
            weight_only=quantized.adaln_bits != 16 or quantized.activation_bits == 16,
            conditions=job.conditions,
            device=device_of(options),
            floats=proofs.floats,
            kept=kept,
            on_step=lambda done, total: job.on_progress("verify", done, total),
        )
    if options.save_artifact is not None:
        is_proved = verification.matches is not False
        artifact = proofs.kept_with(solved.artifact, kept) if is_proved else solved.artifact
        artifact.save(options.save_artifact)
    if not kept_manifest.exists():
        if verification.matches is False:
            candidate = rename_pair(candidate, options.rejected.name)
        manifest = manifest_of(
            candidate,
            options,
            source=job.loaded.source,
            quantized=quantized,
            layout=layout,
            ranges=ranges,
            verification=verification,
        )
        manifest["verification"]["kept_with_artifact"] = list(proofs.taken)
        manifest["fold_proof"] = fold_proof.to_dict()
        manifest["noise_check"] = job.noise.to_dict()
        seconds = job.timings.seconds.items()
        manifest["seconds"] = {part: round(value, 1) for part, value in seconds}
        write_manifest(kept_manifest, manifest)
    manifest = read_json(kept_manifest)
    _install(folder / manifest["file"]["name"], options.output.parent, manifest)
    if verification.matches is False:
        job.work.remove("written")
    return verification, manifest


def _forget_what_is_gone(options: ExportOptions, candidate: Path, kept_manifest: Path) -> None:
    """Remove a kept manifest whose file is neither beside it nor installed: written anew."""
    if not kept_manifest.exists():
        return
    manifest = read_json(kept_manifest)
    name, recorded = manifest["file"]["name"], manifest["file"]["sha256"]
    installed = options.output.with_name(name)
    if candidate.with_name(name).exists():
        return
    if not installed.exists() or sha256_of_onnx(installed) != recorded:
        kept_manifest.unlink()


def _write_companions(job: ExportJob, folder: Path) -> None:
    """Write the float model and the VAE's decoder, where an interrupted run has not."""
    options, loaded = job.options, job.loaded
    if options.reference is not None:
        reference = options.reference
        _once(
            folder / "reference.json",
            reference,
            lambda: export_reference(loaded.model, reference, identity=loaded.identity),
        )
    if options.vae is not None and options.vae_path is not None:
        name, path = options.vae, options.vae_path
        _once(folder / "decoder.json", path, lambda: export_vae_decoder(name, path))


def _once(marker: Path, path: Path, write: Callable[[], None]) -> None:
    """Write an ONNX file unless `marker` says that this job has, and it is still there."""
    if marker.exists() and path.exists():
        recorded = read_json(marker)
        if recorded == [str(path.absolute()), sha256_of_onnx(path)]:
            return
    write()
    with atomic_path(marker) as partial:
        partial.write_text(json.dumps([str(path.absolute()), sha256_of_onnx(path)]), "utf-8")


def _install(candidate: Path, folder: Path, manifest: Mapping[str, Any]) -> None:
    """Give a file its final name, then its manifest; a killed process may have begun."""
    final = folder / candidate.name
    try:
        if candidate.exists():
            install(candidate, final)
        else:
            remove_other_data(final)
    except OSError as error:
        raise ArtifactError(f"could not write {final}: {error}") from error
    write_manifest(final.with_suffix(".json"), manifest)
