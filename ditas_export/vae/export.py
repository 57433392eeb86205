"""A VAE's decoder as an ONNX file."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import onnx_ir as ir
import torch

from ditas_export import __version__
from ditas_export.artifact_files import require_writable
from ditas_export.onnx_export.export import write_model
from ditas_export.onnx_export.skeleton import IR_VERSION, OPSET, strip_metadata, tidy_exporter
from ditas_export.paths import StrPath
from ditas_export.vae.load import LatentDecoder, load_latent_decoder
from ditas_export.vae.shape import IMAGES_NAME, LATENTS_NAME, VAE_KEY


def export_vae_decoder(name: str, path: StrPath) -> None:
    """Write a VAE's decoder as ONNX: opset 21, the default domain only.

    Input `latents` (N, C, h, w) float32, as the sampler leaves them; output `images`
    (N, 3, H, W) float32 in [-1, 1]. N, h and w are free. Past 2 GB the tensors go to
    `<path>.<digest>.data`.

    Args:
        name: what `load_latent_decoder` takes.
        path: the file.

    Raises:
        RunnerError: see `load_latent_decoder`.
        OnnxExportError: the graph is no valid ONNX.
        ArtifactError: the file cannot be written.
    """
    path = Path(path)
    require_writable(path)
    decoder = load_latent_decoder(name)
    model = _trace(decoder)
    strip_metadata(model)
    model.graph.name = "VAE decoder"
    model.ir_version = IR_VERSION
    model.producer_name = "ditas-export"
    model.producer_version = __version__
    model.metadata_props[VAE_KEY] = json.dumps(asdict(decoder.shape), sort_keys=True)
    write_model(model, path)


def _trace(decoder: LatentDecoder) -> ir.Model:
    """Export the decoder; no two of the example's dimensions are equal, and none is fixed."""
    free = {0: "N", 2: "h", 3: "w"}
    dimensions = {axis: torch.export.Dim(name, min=1) for axis, name in free.items()}
    with tidy_exporter():
        program = torch.onnx.export(
            decoder,
            (torch.zeros(2, decoder.shape.in_channels, 6, 10),),
            dynamo=True,
            opset_version=OPSET,
            input_names=(LATENTS_NAME,),
            output_names=(IMAGES_NAME,),
            dynamic_shapes=(dimensions,),
            verbose=False,
        )
    assert program is not None  # dynamo=True always returns one
    return program.model
