"""What an export leaves for its report, put together from what its steps handed on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ditas_export.evaluation.held_out import FAKE, FILE, FLOAT
from ditas_export.export_job import ExportJob, Solved
from ditas_export.kept_parts import KeptParts
from ditas_export.report.gather import (
    activation_maps,
    block_names,
    linear_stats,
    pictures_of,
    weight_pictures,
)
from ditas_export.report.stats import ExportStats, PictureKind, Samples, StatsHeader
from ditas_export.vae.decoder import open_decoder

NO_ACTIVATIONS = (
    "activations before smoothing: a quantized model that was kept has none; export it from its "
    "calibration states"
)
LONGEST_TEXT = 2000
"""Characters of a note or of a word of the command: enough for both, and no file grows by them."""

NO_SAMPLES = "samples: the final latents are not finite"


def export_stats(
    job: ExportJob,
    solved: Solved,
    manifest: Mapping[str, Any],
    floats: KeptParts,
    kept: KeptParts,
) -> ExportStats:
    """Return what a report shows beside the manifest; the same whenever it is put together.

    Args:
        job: the export.
        solved: the quantized model.
        manifest: of the file.
        floats: what the float model sampled.
        kept: what the file, or its fake-quantized forward, sampled.
    """
    quantized, activations, config = solved.quantized, solved.activations, job.loaded.model.config
    linears = linear_stats(quantized, activations)
    pictures = _pictures(job, manifest, floats, kept)
    count = 0 if pictures is None else len(pictures[1].reference)
    verified = manifest["verification"]
    missing = [NO_ACTIVATIONS] * (activations is None) + [NO_SAMPLES] * (pictures is None)
    header = StatsHeader(
        file_sha256=manifest["file"]["sha256"],
        command=tuple(map(_bounded, job.options.command)),
        notes=tuple(map(_bounded, job.loaded.notes)),
        blocks=block_names(config),
        times=() if activations is None else tuple(activations.times.tolist()),
        pictures=None if pictures is None else pictures[0],
        labels=tuple((verified["classes"] * len(verified["seeds"]))[:count]),
        missing=tuple(missing),
    )
    return ExportStats(
        header=header,
        linears=linears,
        maps=activation_maps(linears, activations, config),
        weights=weight_pictures(quantized, job.loaded.model.state_dict()),
        samples=None if pictures is None else pictures[1],
    )


def _pictures(
    job: ExportJob, manifest: Mapping[str, Any], floats: KeptParts, kept: KeptParts
) -> tuple[PictureKind, Samples] | None:
    """Return what verification sampled as pictures, decoded where a VAE was exported beside."""
    verified, config = manifest["verification"], job.loaded.model.config
    judged = FAKE if verified["runtime"] is None else FILE
    seeds = verified["seeds"]
    reference, quantized = (
        _finals(parts, name, seeds) for parts, name in ((floats, FLOAT), (kept, judged))
    )
    if job.options.vae_path is None:
        return pictures_of(reference, quantized, None)
    decoder = open_decoder(job.options.vae_path, config=config, device="cpu")
    assert decoder is not None  # a file was named
    with decoder:
        return pictures_of(reference, quantized, decoder)


def _bounded(text: str) -> str:
    """Return a text of bounded length."""
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}…"


def _finals(parts: KeptParts, name: str, seeds: list[int]) -> list[Tensor]:
    """Return the final latents of a backend by seed."""
    found = [parts.find(f"{name}-{seed}") for seed in seeds]
    return [part.tensors["final"] for part in found if part is not None]
