"""Every loader by one call, and the sound file of the smallest model that fuzzing begins with."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hostile_bases as bases
import torch
from quantized_fixture import exported

from ditas_export.artifact_files import save_tensors
from ditas_export.calibration.quantized_model import ARTIFACT_FORMAT, QuantizedModel
from ditas_export.calibration.states import STATES_FORMAT, CalibrationStates
from ditas_export.cli import export as export_command
from ditas_export.cli.build_settings import merge_settings
from ditas_export.engine.metadata import metadata_of
from ditas_export.families.identity import identity_of
from ditas_export.families.load import load_model
from ditas_export.generation.wanted import read_wanted
from ditas_export.onnx_export.external_data import load_mapped
from ditas_export.onnx_export.file_facts import read_config, read_form, read_identity
from ditas_export.onnx_export.relower import why_not_relowerable
from ditas_export.pipeline import quantization_settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A loader, and a file that it takes."""

    suffix: str
    sound: Callable[[Path], bytes]
    read: Callable[[Path], Any]


def _pickled(_folder: Path) -> bytes:
    buffer = io.BytesIO()
    args = {"num_heads": 6, "class_dropout_prob": 0.1}
    torch.save({"ema": bases.state_dict(), "args": args}, buffer)
    return buffer.getvalue()


def _saved(folder: Path, tensors: Any, header: Any, file_format: str) -> bytes:
    path = folder / "sound"
    save_tensors(path, tensors, file_format=file_format, header=header)
    return path.read_bytes()


def _read_onnx(path: Path) -> None:
    read_config(path), read_form(path), read_identity(path)
    why_not_relowerable(load_mapped(path))


def _read_plan(path: Path) -> None:
    plan = path.with_suffix("")
    plan.write_bytes(b"a plan")
    metadata_of(plan)


def _read_recipe(path: Path) -> None:
    quantization_settings(export_command._merge(Path("out.onnx"), str(path), {}))


RECIPE = (
    b"model: digits\nw: 4\na: 8\nmethod: ditas-plus\nclasses: [1, 2]\ncfg-scale: 1e1\nseed: 3\n"
)
PROFILE = b"backend: tensorrt\nworkspace: 4\nopt-level: 3\nbatch: 2,8,16\n"

TARGETS: Mapping[str, Target] = {
    "checkpoint": Target(
        suffix=".safetensors",
        sound=lambda folder: bases.checkpoint(folder).read_bytes(),
        read=lambda path: load_model(str(path)),
    ),
    "pickle": Target(suffix=".pt", sound=_pickled, read=lambda path: load_model(str(path))),
    "onnx": Target(suffix=".onnx", sound=lambda _: exported().read_bytes(), read=_read_onnx),
    "artifact": Target(
        suffix=".safetensors",
        sound=lambda folder: _saved(folder, *bases.artifact(), ARTIFACT_FORMAT),
        read=QuantizedModel.load,
    ),
    "states": Target(
        suffix=".safetensors",
        sound=lambda folder: _saved(folder, *bases.states(), STATES_FORMAT),
        read=lambda path: CalibrationStates.load(path, identity=identity_of(bases.tiny_dit())),
    ),
    "plan": Target(
        suffix=".plan.json",
        sound=lambda folder: (bases.plan(folder)[0].with_name("out.plan.json")).read_bytes(),
        read=_read_plan,
    ),
    "recipe": Target(suffix=".yaml", sound=lambda _: RECIPE, read=_read_recipe),
    "profile": Target(
        suffix=".yaml", sound=lambda _: PROFILE, read=lambda path: merge_settings(str(path), {})
    ),
    "list": Target(suffix=".txt", sound=lambda _: b"3 17\n4 18\n", read=read_wanted),
}
"""By name."""
