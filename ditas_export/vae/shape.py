"""What a VAE's decoder takes and gives, as its file says, and which models it fits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ditas_export.errors import CheckpointError, OnnxExportError, RunnerError
from ditas_export.families.base import ModelConfig, is_image
from ditas_export.onnx_export.file_facts import file_metadata, metadata_entry
from ditas_export.paths import StrPath
from ditas_export.process import VaeFactors
from ditas_export.saved_records import Within, check_fields, from_record
from ditas_export.text_files import TextError, parse_json

VAE_KEY = "ditas_export.vae"
"""Metadata entry of a decoder's file; it holds a `VaeShape`."""

LATENTS_NAME = "latents"
IMAGES_NAME = "images"


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeShape:
    """What a VAE's decoder takes and gives."""

    in_channels: Annotated[int, Within(1, 4096)]  # of the latents
    scale: Annotated[int, Within(1, 1024)]  # pixels per latent pixel, along one side
    factors: VaeFactors | None = None  # None in files of earlier versions, which do not say

    def __post_init__(self) -> None:
        """Refuse what no decoder has."""
        check_fields(self, CheckpointError)


def require_fitting_vae(
    name: str, *, in_channels: int, factors: VaeFactors | None, config: ModelConfig
) -> None:
    """Refuse a VAE of other latents than a model's.

    Args:
        name: of the VAE, for messages.
        in_channels: channels of the latents that it takes.
        factors: its own; None where its file does not say, which passes.
        config: of the model.

    Raises:
        RunnerError: a model of something else than images, other channels, or factors that are not
            the recorded ones; names both.
    """
    if not is_image(config):
        raise RunnerError(
            f"the model makes {config.latent_shape}, no latents of images; leave the VAE {name} out"
        )
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
        return from_record(VaeShape, parse_json(metadata_entry(path, VAE_KEY)))
    except (TextError, CheckpointError) as error:
        raise OnnxExportError(
            f"{path} does not say which VAE it decodes for ({error}); write it with "
            f"ditas-export --vae"
        ) from error


def is_decoder_file(path: StrPath) -> bool:
    """Return whether `export_vae_decoder` wrote a file."""
    path = Path(path)
    try:
        return VAE_KEY in file_metadata(path)
    except OnnxExportError:
        return False
