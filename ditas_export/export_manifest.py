"""What the manifest of an export says: versions, hashes, settings, linears, bytes, the proof."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from ditas_export import __version__
from ditas_export.calibration.quantized_model import QuantizedModel
from ditas_export.evaluation.verify import Verification
from ditas_export.families.registry import family_of
from ditas_export.figures import finite_or_none
from ditas_export.onnx_export.external_data import sha256_of_onnx
from ditas_export.onnx_export.form import Layout
from ditas_export.onnx_export.manifest import MANIFEST_FORMAT, bytes_by_part
from ditas_export.options import ExportOptions
from ditas_export.quantization.ranges import Ranges


def manifest_of(
    file: Path,
    options: ExportOptions,
    *,
    source: str,
    quantized: QuantizedModel,
    layout: Layout,
    ranges: Ranges,
    verification: Verification,
) -> dict[str, Any]:
    """Return what `out.json` says, but for the seconds; JSON values.

    Args:
        file: what was written and verified, wherever it lies.
        options: what was asked for.
        source: where the float model came from.
        quantized: the model in the file.
        layout: of the file.
        ranges: of the file.
        verification: what was found.
    """
    sizes = bytes_by_part(ir.load(file), quantized.config)
    linears = {
        name: {
            "alpha": linear.alpha,
            "block_size": linear.weight.block_size,
            "rank": linear.low_rank.rank if linear.low_rank else 0,
            "static_range": linear.static_range,
            "output_snr_db": finite_or_none(linear.output_snr_db),
            "smoothing_scale": [
                float(linear.smoothing_scale.amin()),
                float(linear.smoothing_scale.amax()),
            ],
        }
        for name, linear in quantized.linears.items()
    }
    return {
        "format": MANIFEST_FORMAT,
        "versions": versions(),
        "model": {
            "source": source,
            "fingerprint": quantized.identity.fingerprint,
            **quantized.identity.to_dict(),
        },
        "file": {
            "name": file.name,
            "sha256": sha256_of_onnx(file),
            "layout": layout,
            "ranges": ranges if quantized.activation_bits == 8 else None,
            "precision": options.float_side,
            "target": options.target,
            "adaln_bits": quantized.adaln_bits,
        },
        "verified": verification.matches is True,
        "far_from_float": verification.is_far_from_float,
        "not_verified_because": _why_unverified(options, verification),
        "vae_decoder": _vae_entry(options),
        "settings": json.loads(json.dumps(quantized.settings, sort_keys=True)),  # as a file has it
        "bytes_by_part": sizes,
        "bits_per_weight": bits_per_weight(sizes, quantized),
        "float_linears": _float_linears(quantized),
        "linears": linears,
        "verification": verification.to_dict(),
    }


def _why_unverified(options: ExportOptions, verification: Verification) -> str | None:
    """Return why a file is not verified, None if it is."""
    if verification.matches is None:
        return f"no runtime that is installed runs a file of {options.float_side}"
    if verification.matches is False:
        reason = verification.file and verification.file.not_finite
        return reason or "it does not compute what was calibrated"
    return None


def _vae_entry(options: ExportOptions) -> dict[str, str] | None:
    """Return what `out.json` says of the VAE's decoder, None where there is none."""
    if options.vae is None or options.vae_path is None:
        return None
    return {
        "name": options.vae_path.name,
        "sha256": sha256_of_onnx(options.vae_path),
        "source": options.vae,
    }


def bits_per_weight(sizes: Mapping[str, int], quantized: QuantizedModel) -> float:
    """Return bits per weight of the block linears, codes, scales and low-rank factors counted."""
    weights = sum(linear.weight.codes.numel() for linear in quantized.linears.values())
    counted = ("codes", "multipliers", "row_scales", "low_rank")
    return 8 * sum(sizes[part] for part in counted) / weights


def _float_linears(quantized: QuantizedModel) -> list[str]:
    """Return the linears whose weights stay float, by name."""
    config = quantized.config
    integer = {*quantized.linears, *quantized.adaln}
    with torch.device("meta"):
        modules = family_of(config).module(config).named_modules()
    linears = [name for name, module in modules if isinstance(module, nn.Linear)]
    return [name for name in linears if name not in integer]


def versions() -> dict[str, str]:
    """Return the versions of what makes a file."""
    packages = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "diffusers", "numpy")
    found = {"ditas-export": __version__, "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # onnxruntime-gpu has another name
            continue
    return found
