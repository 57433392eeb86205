"""A PixArt as diffusers wrote it: a transformer's folder or a pipeline's, strictly checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditas_export.conditions.options import MICRO_CONDITIONED
from ditas_export.dit.diffusers_folder import CLASSES, PIXART, opened, transformer_folder
from ditas_export.dit.facts import Fact, merged
from ditas_export.dit.fitting import Wanted, complaint, faults_of
from ditas_export.dit.lora_files import with_lora
from ditas_export.dit.records import facts_of_hints
from ditas_export.dit.resolve import process_of
from ditas_export.dit.tensor_files import read_json, read_tensor_file
from ditas_export.dit.wrappings import choose_weights
from ditas_export.errors import CheckpointError
from ditas_export.families.pixart import PixArtFamily
from ditas_export.families.pixart_config import PixArtConfig
from ditas_export.family_model import ReadCheckpoint
from ditas_export.options import CheckpointHints

_ANCHOR = "pos_embed.proj.weight"
_BLOCK_WEIGHT = "transformer_blocks.0.attn1.to_q.weight"

_FIXED = {
    "norm_type": "ada_norm_single",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_type": "default",
    "norm_elementwise_affine": False,
}
"""Settings of diffusers' class that make it a PixArt."""

_DEFAULTS: dict[str, int | float | None] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "sample_size": 128,
    "patch_size": 2,
    "caption_channels": None,
    "norm_eps": 1e-6,
    "interpolation_scale": None,
    "use_additional_conditions": None,
}
"""Settings that may vary, and what diffusers takes where they are not written."""

_POSITIONS_SIDE = 64
"""Side of the latents at which positions are not scaled."""

_OF_CLASSES = ("--num-classes", "--no-null-class", "--family")
"""Options that say nothing of a PixArt."""


def read_pixart(
    path: Path, hints: CheckpointHints, what: str, *, vae: str | None = None
) -> ReadCheckpoint:
    """Read a PixArt; arguments and errors are those of `FolderReader`."""
    if odd := [flag for flag in hints.given if flag in _OF_CLASSES]:
        raise CheckpointError(f"{what} is a PixArt, which has no classes; leave {odd[0]} out")
    folder = transformer_folder(path)
    settings = _settings(folder / "config.json")
    heads = {"num_heads": Fact(settings["num_attention_heads"], "config.json num_attention_heads")}
    found = opened(path, folder, heads, norm_eps=settings["norm_eps"])
    facts = merged(found.facts, facts_of_hints(hints), where=what, remedy="leave the option out")
    channels = settings["in_channels"]
    is_fixed = settings["out_channels"] == channels
    process = process_of(
        facts,
        fixed_variance="fixed_small" if is_fixed else None,
        in_channels=channels,
        where=what,
    )
    try:
        config = PixArtConfig(**settings, process=process)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}; correct the record") from None
    weights = choose_weights(read_tensor_file(found.weights), (_ANCHOR,), where=what)
    adapted = with_lora(weights.tensors, hints)
    with torch.device("meta"):
        model = PixArtFamily().module(config)
    _require_tensors(adapted.tensors, model.state_dict(), where=what)
    state = {name: tensor.float() for name, tensor in adapted.tensors.items()}
    model.load_state_dict(state, assign=True)
    return ReadCheckpoint(
        model=model.eval().requires_grad_(requires_grad=False),
        source=f"{what} (diffusers)",
        dtype=weights.tensors[_BLOCK_WEIGHT].dtype,
        notes=(*found.notes, *weights.notes, *adapted.notes),
        vae=None if found.vae is None else vae or str(found.vae),
    )


def _require_tensors(
    tensors: Mapping[str, Tensor], asked: Mapping[str, Tensor], *, where: str
) -> None:
    """Raise one error that names all that is wrong with a checkpoint's tensors."""
    wanted = {name: Wanted(tuple(tensor.shape), dtype=None) for name, tensor in asked.items()}
    if found := complaint(faults_of(tensors, wanted)):
        raise CheckpointError(
            f"{where} is no sound PixArt checkpoint: {found}. Expected the {len(wanted)} tensors "
            f"that its config.json asks for, all finite; get the folder again"
        )


def _settings(path: Path) -> dict[str, Any]:
    """Return what `config.json` says of a PixArt, diffusers' defaults where it says nothing."""
    written = read_json(path)
    if written.get("_class_name") not in (PIXART, CLASSES[1]):
        raise CheckpointError(f"{path} describes a {written.get('_class_name')}, expected {PIXART}")
    for key, expected in _FIXED.items():
        if written.get(key, expected) != expected:
            raise CheckpointError(f"{path} has {key}={written[key]!r}; a PixArt has {expected!r}")
    settings = {key: written.get(key, default) for key, default in _DEFAULTS.items()}
    size = settings["sample_size"]
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        settings["sample_size"] = size = size[0]
    if isinstance(size, bool) or not isinstance(size, int):
        raise CheckpointError(f"{path} has sample_size={size!r}; expected a whole number")
    if settings["out_channels"] is None:
        settings["out_channels"] = settings["in_channels"]
    if settings["interpolation_scale"] is None:
        settings["interpolation_scale"] = max(size // _POSITIONS_SIDE, 1)
    if settings["use_additional_conditions"] is None:
        settings["use_additional_conditions"] = size == MICRO_CONDITIONED
    settings["interpolation_scale"] = _as_float(path, settings, "interpolation_scale")
    settings["norm_eps"] = _as_float(path, settings, "norm_eps")
    width = written.get("cross_attention_dim", 1152)
    heads, channels = settings["num_attention_heads"], settings["attention_head_dim"]
    if isinstance(heads, int) and isinstance(channels, int) and width != heads * channels:
        raise CheckpointError(
            f"{path} has cross_attention_dim={width!r}; a PixArt's is its width, {heads * channels}"
        )
    return settings


def _as_float(path: Path, settings: Mapping[str, Any], key: str) -> float:
    """Return a setting as a float."""
    value = settings[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(f"{path} has {key}={value!r}; expected a number")
    return float(value)
