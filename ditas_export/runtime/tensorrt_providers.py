"""What ONNX Runtime's TensorRT providers are told: the batches to build for, and where to keep it.

Without shapes they build anew for every batch size that they meet; without a folder, at every
start. No precision is named: the network is strongly typed then, and the file decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch

from ditas_export.engine.build import input_shapes, shape_words
from ditas_export.engine.metadata import Gpu
from ditas_export.engine.options import BatchRange
from ditas_export.families.base import ModelConfig
from ditas_export.runtime.rtx_provider import NAME as RTX_PROVIDER

TENSORRT_PROVIDER = "TensorrtExecutionProvider"

BATCH = BatchRange(smallest=1, usual=8, largest=64)
"""Rows that the providers build for, guidance included."""

_CACHE_OPTIONS: Mapping[str, tuple[str, ...]] = {
    TENSORRT_PROVIDER: ("trt_engine_cache", "trt_timing_cache"),
    RTX_PROVIDER: ("nv_runtime_cache",),
}
_PREFIXES = {TENSORRT_PROVIDER: "trt", RTX_PROVIDER: "nv"}


def provider_options(provider: str, config: ModelConfig, folder: Path | None) -> dict[str, str]:
    """Return the options of a provider beside its device; none where it is not TensorRT's.

    Args:
        provider: its name in ONNX Runtime.
        config: of the model that it is to run.
        folder: for what it builds, this model's alone; None builds at every start.
    """
    if provider not in _PREFIXES:
        return {}
    prefix, shapes = _PREFIXES[provider], input_shapes(config, BATCH)
    options = {
        f"{prefix}_profile_{bound}_shapes": shape_words(shapes, index)
        for index, bound in enumerate(("min", "opt", "max"))
    }
    if folder is None:
        return options
    for name in _CACHE_OPTIONS[provider]:
        options[f"{name}_path"] = str(folder)
        if provider == TENSORRT_PROVIDER:
            options[f"{name}_enable"] = "1"
    return options


def builder_facts(device_id: int) -> dict[str, object]:
    """Return what an engine depends on beside the model: installed packages, and the GPU."""
    installed = {
        str(distribution.metadata["Name"]).lower(): distribution.version
        for distribution in metadata.distributions()
    }
    kept = {
        name: version
        for name, version in installed.items()
        if name.startswith(("tensorrt", "onnxruntime"))
    }
    if device_id >= torch.cuda.device_count():
        return {"packages": kept, "gpu": device_id}
    gpu = Gpu.at(torch.device("cuda", device_id))
    return {"packages": kept, "gpu": [gpu.name, gpu.compute_capability]}
