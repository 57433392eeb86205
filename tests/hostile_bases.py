"""One sound file of every kind, of the smallest model: what hostile ones are made from."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import torch
from quantized_fixture import (
    TINY,
    exported,
    exported_reference,
    quantized_tiny_dit,
    save_checkpoint,
    tiny_dit,
)
from safetensors.torch import save_file
from torch import Tensor

from ditas_export.artifact_files import load_tensors, sha256_of_file
from ditas_export.calibration.calibration_settings import CalibrationSettings
from ditas_export.calibration.quantized_model import ARTIFACT_FORMAT
from ditas_export.calibration.states import STATES_FORMAT, CalibrationStates
from ditas_export.dit.layouts import DIFFUSERS
from ditas_export.engine.metadata import EngineMetadata, Gpu
from ditas_export.engine.options import BuildOptions
from ditas_export.families.identity import identity_of
from ditas_export.families.registry import linear_shapes
from ditas_export.onnx_export.form import FileForm

CONFIG = {
    "_class_name": "Transformer2DModel",
    "num_attention_heads": TINY.num_heads,
    "attention_head_dim": TINY.hidden_size // TINY.num_heads,
    "in_channels": TINY.in_channels,
    "out_channels": TINY.out_channels,
    "num_layers": TINY.depth,
    "sample_size": TINY.input_size,
    "patch_size": TINY.patch_size,
    "num_embeds_ada_norm": TINY.num_classes,
    "norm_type": "ada_norm_zero",
}
SCHEDULER = {
    "_class_name": "DDPMScheduler", "beta_schedule": "linear", "beta_start": 1e-4,
    "beta_end": 0.02, "num_train_timesteps": 1000, "variance_type": "learned_range",
    "prediction_type": "epsilon",
}  # fmt: skip


def state_dict() -> dict[str, Tensor]:
    """Return the parameters of the tiny model, contiguous, under the published names."""
    return {name: value.clone() for name, value in tiny_dit().state_dict().items()}


def checkpoint(folder: Path) -> Path:
    """Write the tiny model as safetensors."""
    path = folder / "model.safetensors"
    save_checkpoint(path, tiny_dit())
    return path


def diffusers_tensors() -> dict[str, Tensor]:
    """Return the parameters of the tiny model as diffusers names and splits them."""
    ours, found = state_dict(), {}
    for slot in DIFFUSERS.slots(TINY.depth):
        value = ours[slot.name]
        found[slot.file_name] = (
            value if slot.third is None else value.chunk(3)[slot.third]
        ).clone()
    return found


def pipeline(folder: Path) -> Path:
    """Write the tiny model as a pipeline's folder."""
    for name, content in (
        ("transformer/config.json", CONFIG),
        ("scheduler/scheduler_config.json", SCHEDULER),
        ("vae/config.json", {"_class_name": "AutoencoderKL", "scaling_factor": 0.18215}),
    ):
        path = folder / "pipeline" / name
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(content))
    weights = folder / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(diffusers_tensors(), weights)
    return folder / "pipeline"


@cache
def _artifact_bytes() -> tuple[dict[str, Tensor], dict[str, Any]]:
    path = exported().with_suffix(".artifact")
    quantized_tiny_dit(tiny_dit()).save(path)
    return load_tensors(path, file_format=ARTIFACT_FORMAT)


def artifact() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and header of a quantized model."""
    tensors, header = _artifact_bytes()
    return {name: value.clone() for name, value in tensors.items()}, json.loads(json.dumps(header))


@cache
def _states_bytes() -> tuple[dict[str, Tensor], dict[str, Any]]:
    steps, side = 4, TINY.input_size
    states = CalibrationStates(
        latents=torch.zeros(steps, 2, TINY.in_channels, side, side),
        timesteps=torch.tensor([750, 500, 250, 0]),
        input_maxima={
            name: torch.ones(steps, columns) for name, (_, columns) in linear_shapes(TINY).items()
        },
        settings=CalibrationSettings(steps=steps, classes=(1, 2)),
        identity=identity_of(tiny_dit()),
    )
    path = exported().with_suffix(".states")
    states.save(path)
    return load_tensors(path, file_format=STATES_FORMAT)


def states() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and header of calibration states."""
    tensors, header = _states_bytes()
    return {name: value.clone() for name, value in tensors.items()}, json.loads(json.dumps(header))


@cache
def _model_bytes() -> bytes:
    return exported().read_bytes()


def onnx_model() -> onnx.ModelProto:
    """Return the tiny quantized model as ONNX."""
    return onnx.load_from_string(_model_bytes())


def reference() -> Path:
    """Return the tiny float model's file; never write to it."""
    return exported_reference()


def plan(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Write what stands for a plan; return it and its metadata."""
    path = folder / "out.plan"
    path.write_bytes(b"a plan")
    known = EngineMetadata(
        product="tensorrt",
        version="10.13.3.9",
        plan_sha256=sha256_of_file(path),
        plan_bytes=6,
        onnx_name="out.onnx",
        onnx_sha256="0" * 64,
        model=TINY,
        form=FileForm(float_type="fp16"),
        options=BuildOptions(),
        gpu=Gpu(name="a GPU", compute_capability="8.9"),
        layers=None,
    )
    beside = path.with_name("out.plan.json")
    known.save(beside)
    return path, json.loads(beside.read_text())


def replaced(values: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    """Return nested values with the one at a dotted place replaced, or taken out by `DROP`."""
    *outer, last = place.split("/")
    changed = json.loads(json.dumps(values))
    inner = changed
    for name in outer:
        inner = inner[name]
    if value is DROP:
        del inner[last]
    else:
        inner[last] = value
    return changed


DROP = dataclasses.make_dataclass("Drop", [])()
"""Stands for no value at all."""
