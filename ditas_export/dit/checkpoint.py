"""Checkpoints of DiT's tensors, of every kind, to the same `DiT`, strictly checked.

Files are told by their content (`tensor_files`), weights found in what training wrote around them
(`wrappings`), shapes inferred from the tensors (`layouts`). What these do not show is read where
the checkpoint says it (`records`, `diffusers_folder`), and all is held against each other
(`resolve`).

A diffusers folder keeps diffusers' constants (time-step frequencies over 127 instead of 128, and
the second norm's eps), so the model computes what `DiTTransformer2DModel` computes.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ditas_export.dit.diffusers_folder import open_folder
from ditas_export.dit.facts import Fact, Facts, merged
from ditas_export.dit.flow_tensors import velocity_alone, without_projectors
from ditas_export.dit.layouts import DIFFUSERS, OFFICIAL, Geometry, assemble, infer_geometry
from ditas_export.dit.lora_files import with_lora
from ditas_export.dit.model import DiT, DiTConfig
from ditas_export.dit.record_parts import record_parts
from ditas_export.dit.records import (
    facts_of_hints,
    facts_of_metadata,
    facts_of_training,
    places_read,
)
from ditas_export.dit.resolve import Source, resolve
from ditas_export.dit.tensor_files import read_tensor_file
from ditas_export.dit.wrappings import choose_weights
from ditas_export.errors import CheckpointError
from ditas_export.family_model import ReadCheckpoint
from ditas_export.options import CheckpointHints
from ditas_export.process import DIT_PROCESS

BUNDLED_MODEL = "digits"
"""Name of the small trained DiT that comes with the package; write `./digits` for a path."""

BUNDLED_FLOW = "digits-sit"
"""Name of its counterpart that was trained by flow matching, as SiTs are."""

BUNDLED_PIXART = "digits-pixart"
"""Name of a small PixArt of the same digits, asked for in words: a folder as diffusers writes them,
and the name of its embeddings."""

_BUNDLED: Mapping[str, Facts] = {
    BUNDLED_MODEL: {
        "num_classes": Fact(10, "the package"),
        "family": Fact("dit", "the package"),
    },
    BUNDLED_FLOW: {},
}
"""Bundled models, and what their files do not say."""


def is_bundled(name: str | Path) -> bool:
    """Return whether a name is that of a bundled model."""
    return name in _BUNDLED


def read_bundled(name: str, hints: CheckpointHints) -> ReadCheckpoint:
    """Read a bundled model by name."""
    path = bundled_path(f"{name}.safetensors")
    return read_file(path, hints, f"{name} (bundled)", known=_BUNDLED[name])


def bundled_path(name: str) -> Path:
    """Return where a bundled file or folder lies."""
    return Path(str(importlib.resources.files("ditas_export.dit") / "bundled" / name))


def embeddings_path(asked: Path | None) -> Path | None:
    """Return the file of embeddings: as asked for, or the bundled one by its name."""
    if asked is None or str(asked) != BUNDLED_PIXART or asked.is_file():
        return asked
    return bundled_path(BUNDLED_PIXART) / "embeddings.safetensors"


def read_file(
    path: Path, hints: CheckpointHints, what: str, *, known: Mapping[str, Fact] | None = None
) -> ReadCheckpoint:
    """Read a file with the published names; `what` names it, `known` is not in the file."""
    file = read_tensor_file(path)
    parts = tuple(record_parts(file.content))
    anchors = (OFFICIAL.patch_weight, DIFFUSERS.patch_weight)
    weights = choose_weights(file, anchors, where=what, read=places_read(parts))
    if DIFFUSERS.patch_weight in weights.tensors:
        raise CheckpointError(
            f"{path} has diffusers' tensor names; pass its folder, whose config.json is needed"
        )
    adapted = with_lora(weights.tensors, hints)
    network = without_projectors(adapted.tensors, where=what)
    geometry = infer_geometry(network.tensors, OFFICIAL, where=what)
    record = merged(
        known or {},
        facts_of_metadata(file.metadata, where=what),
        facts_of_training(parts, where=what),
        network.facts,
        where=what,
    )
    config, notes = resolve(
        Source(
            geometry=geometry,
            positions=network.tensors.get("pos_embed"),
            record=record,
            hints=facts_of_hints(hints),
            where=what,
            mlp_norm_eps=1e-6,
            frequency_shift=0,
            fixed_variance="fixed_large",
        )
    )
    return _loaded(
        config,
        _official_state(network.tensors, geometry, config, where=what),
        source=f"{what}, part {weights.part!r}" if weights.part else what,
        dtype=weights.tensors[OFFICIAL.fc1_weight].dtype,
        notes=(*weights.notes, *adapted.notes, *network.notes, *notes),
        vae=None,
    )


def _official_state(
    tensors: Mapping[str, Tensor], geometry: Geometry, config: DiTConfig, *, where: str
) -> dict[str, Tensor]:
    """Return the checked state of a model whose file may have more output than it: a flow's."""
    if geometry.learn_sigma == config.learn_sigma:
        return assemble(tensors, OFFICIAL, config, where=where)
    written = replace(config, learn_sigma=True, process=DIT_PROCESS)
    return velocity_alone(assemble(tensors, OFFICIAL, written, where=where), config)


def read_folder(
    path: Path, hints: CheckpointHints, what: str, *, vae: str | None = None
) -> ReadCheckpoint:
    """Read a folder written by diffusers; its VAE goes by a name, or by the pipeline's folder."""
    opened = open_folder(path)
    file = read_tensor_file(opened.weights)
    weights = choose_weights(file, (DIFFUSERS.patch_weight,), where=what)
    adapted = with_lora(weights.tensors, hints)
    config, notes = resolve(
        Source(
            geometry=infer_geometry(adapted.tensors, DIFFUSERS, where=what),
            positions=None,
            record=opened.facts,
            hints=facts_of_hints(hints),
            where=what,
            mlp_norm_eps=opened.norm_eps,
            frequency_shift=1,
            fixed_variance="fixed_small",
        )
    )
    return _loaded(
        config,
        assemble(adapted.tensors, DIFFUSERS, config, where=what),
        source=f"{what} (diffusers)",
        dtype=weights.tensors[DIFFUSERS.fc1_weight].dtype,
        notes=(*opened.notes, *weights.notes, *adapted.notes, *notes),
        vae=None if opened.vae is None else vae or str(opened.vae),
    )


def _loaded(
    config: DiTConfig,
    state: dict[str, Tensor],
    *,
    source: str,
    dtype: torch.dtype,
    notes: tuple[str, ...],
    vae: str | None,
) -> ReadCheckpoint:
    """Put checked tensors into a model, without copying them."""
    with torch.device("meta"):
        model = DiT(config)
    model.load_state_dict(state, assign=True)
    model.eval().requires_grad_(requires_grad=False)
    return ReadCheckpoint(model=model, source=source, dtype=dtype, notes=notes, vae=vae)
