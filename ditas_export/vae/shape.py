"""What a VAE's decoder takes and gives, as its file says, and which models it fits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ditas_export.dit.model import DiTConfig
from ditas_export.dit.process import VaeFactors, checked_fields
from ditas_export.errors import CheckpointError, OnnxExportError, RunnerError
from ditas_export.onnx_export.export import file_metadata
from ditas_export.paths import StrPath

VAE_KEY = "ditas_export.vae"
"""Metadata entry of a decoder's file; it holds a `VaeShape`."""

LATENTS_NAME = "latents"
IMAGES_NAME = "images"


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeShape:
    """What a VAE's decoder takes and gives."""

    in_channels: int  # of the latents
    scale: int  # pixels per latent pixel, along one side
    factors: VaeFactors | None = None  # None in files of earlier versions, which do not say


def require_fitting_vae(
    name: str, *, in_channels: int, factors: VaeFactors | None, config: DiTConfig
) -> None:
    """Refuse a VAE of other latents than a model's.

    Args:
        name: of the VAE, for messages.
        in_channels: channels of the latents that it takes.
        factors: its own; None where its file does not say, which passes.
        config: of the model.

    Raises:
        RunnerError: other channels, or factors that are not the recorded ones; names both.
    """
    if config.in_channels != in_channels:
        raise RunnerError(
            f"the model makes {config.in_channels}-channel latents, {name} takes {in_channels}; "
            f"pass the VAE that the model was trained with"
        )
    recorded = config.process.vae
    if recorded is not None and factors is not None and recorded != factors:
        raise RunnerError(
            f"the model was trained on latents of {recorded}, {name} has {factors}; pass the VAE "
            f"that the model was trained with"
        )


def read_vae_shape(path: StrPath) -> VaeShape:
    """Return the shape of the decoder in a file that `export_vae_decoder` wrote.

    Raises:
        OnnxExportError: no ONNX file, or one of another origin.
    """
    path = Path(path)
    try:
        written = json.loads(file_metadata(path)[VAE_KEY])
        return VaeShape(**checked_fields(VaeShape, written, nested={"factors": VaeFactors}))
    except (KeyError, TypeError, ValueError, CheckpointError) as error:
        raise OnnxExportError(
            f"{path} does not say which VAE it decodes for ({error!r}); write it with "
            f"ditas-export --vae"
        ) from error


def is_decoder_file(path: StrPath) -> bool:
    """Return whether `export_vae_decoder` wrote a file."""
    path = Path(path)
    try:
        return VAE_KEY in file_metadata(path)
    except OnnxExportError:
        return False
