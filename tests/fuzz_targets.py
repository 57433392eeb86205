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
from safetensors.torch import save_file

from ditas_export.artifact_files import save_tensors
from ditas_export.calibration.quantized_model import ARTIFACT_FORMAT, QuantizedModel
from ditas_export.calibration.states import STATES_FORMAT, CalibrationStates
from ditas_export.cli import export as export_command
from ditas_export.cli.build_settings import merge_settings
from ditas_export.conditions.embeddings import EMBEDDINGS_FORMAT, PromptEmbeddings
from ditas_export.conditions.prompts import read_prompts
from ditas_export.dit.lora_files import CONFIG_NAME, read_lora
from ditas_export.engine.metadata import metadata_of
from ditas_export.families.identity import identity_of
from ditas_export.families.load import load_model
from ditas_export.family_model import Input
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


PROMPT = (
    Input(name="encoder_hidden_states", dtype=torch.float32, shape=("tokens", 4)),
    Input(name="encoder_attention_mask", dtype=torch.int64, shape=("tokens",)),
)


def _embeddings(folder: Path) -> bytes:
    rows = {PROMPT[0].name: torch.randn(2, 3, 4), PROMPT[1].name: torch.ones(2, 3).long()}
    nulls = {f"null.{name}": tensor[:1].clone() for name, tensor in rows.items()}
    return _saved(folder, rows | nulls, {"prompts": ["a", "b"]}, EMBEDDINGS_FORMAT)


def _lora(folder: Path) -> bytes:
    names = [f"transformer.blocks.0.attn.qkv.lora_{side}.weight" for side in "AB"]
    factors = {names[0]: torch.ones(2, 4), names[1]: torch.ones(12, 2)}
    path = folder / "sound"
    save_file(factors, path, metadata={"lora_adapter_metadata": '{"transformer.lora_alpha": 2}'})
    return path.read_bytes()


def _read_lora_config(path: Path) -> None:
    folder = path.with_suffix(".folder")
    folder.mkdir(exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(_lora(path.parent))
    (folder / CONFIG_NAME).write_bytes(path.read_bytes())
    read_lora(folder)


LORA_CONFIG = (
    b'{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_dora": false, "use_rslora": false, '
    b'"bias": "none", "rank_pattern": {}, "alpha_pattern": {"qkv": 3}, "target_modules": ["qkv"]}'
)

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
    "embeddings": Target(
        suffix=".safetensors",
        sound=_embeddings,
        read=lambda path: PromptEmbeddings.load(path, inputs=PROMPT),
    ),
    "prompts": Target(suffix=".txt", sound=lambda _: b"# mine\na red boat\n", read=read_prompts),
    "lora": Target(suffix=".safetensors", sound=_lora, read=read_lora),
    "lora config": Target(suffix=".json", sound=lambda _: LORA_CONFIG, read=_read_lora_config),
}
"""By name."""
