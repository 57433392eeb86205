"""Checkpoints of every kind to the same `DiT`, strictly checked.

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
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ditas_export.dit.diffusers_folder import (
    HUB_ID,
    HUB_PATTERNS,
    find_weights,
    open_folder,
    transformer_folders,
)
from ditas_export.dit.facts import Fact, Facts, merged
from ditas_export.dit.flow_tensors import velocity_alone, without_projectors
from ditas_export.families.identity import ModelIdentity, identity_of
from ditas_export.dit.layouts import DIFFUSERS, OFFICIAL, Geometry, assemble, infer_geometry
from ditas_export.dit.model import DiT, DiTConfig
from ditas_export.process import DIT_PROCESS
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
from ditas_export.options import NO_HINTS, CheckpointHints

BUNDLED_MODEL = "digits"
"""Name of the small trained DiT that comes with the package; write `./digits` for a path."""

BUNDLED_FLOW = "digits-sit"
"""Name of its counterpart that was trained by flow matching, as SiTs are."""

_BUNDLED: Mapping[str, Facts] = {
    BUNDLED_MODEL: {
        "num_classes": Fact(10, "the package"),
        "family": Fact("dit", "the package"),
    },
    BUNDLED_FLOW: {},
}
"""Bundled models, and what their files do not say."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadedDiT:
    """A checkpoint, ready to run."""

    model: DiT  # float32, evaluation mode, no gradients; tensors may be mapped from the file
    source: str  # one line: what was read
    identity: ModelIdentity  # the same for the same numbers and configuration, whatever the file
    dtype: torch.dtype  # float type of the block linears in the file
    notes: tuple[str, ...] = ()  # one line each: what was chosen, stripped, left out or guessed
    vae: str | None = None  # the VAE of a pipeline: its folder, or the hub's id


def load_dit(
    source: str | Path,
    hints: CheckpointHints = NO_HINTS,
    *,
    num_heads: int | None = None,
) -> LoadedDiT:
    """Load a DiT.

    Args:
        source: `digits` or `digits-sit` for a bundled model; a file with the published names,
            safetensors or written by torch.save (of a training checkpoint, the averaged weights); a
            folder written by diffusers, of the transformer or of a whole pipeline; or such a
            folder's id on the Hugging Face hub.
        hints: what the checkpoint does not say.
        num_heads: the same as `hints.num_heads`.

    Raises:
        CheckpointError: nothing there, a damaged file, another kind of model, tensors that do not
            make a DiT, records that contradict them, each other or the hints, a process that is not
            followed, or an unknown number of heads.
    """
    if num_heads is not None:
        hints = replace(hints, num_heads=num_heads)
    if source in _BUNDLED:
        folder = importlib.resources.files("ditas_export.dit") / "bundled"
        with importlib.resources.as_file(folder / f"{source}.safetensors") as path:
            return _load_file(path, hints, f"{source} (bundled)", known=_BUNDLED[str(source)])
    path = Path(source)
    if path.is_dir():
        return _load_diffusers(path, hints, str(source))
    if path.is_file():
        return _load_file(path, hints, str(source))
    if isinstance(source, str) and HUB_ID.fullmatch(source):
        return _load_diffusers(_download(source), hints, source, vae=source)
    raise CheckpointError(
        f"{source}: no such file or folder; expected `{BUNDLED_MODEL}`, `{BUNDLED_FLOW}`, a "
        f"checkpoint file, a diffusers folder, or a hub id such as facebook/DiT-XL-2-256"
    )


def _load_file(
    path: Path, hints: CheckpointHints, what: str, *, known: Mapping[str, Fact] | None = None
) -> LoadedDiT:
    """Load a file with the published names."""
    file = read_tensor_file(path)
    parts = tuple(record_parts(file.content))
    anchors = (OFFICIAL.patch_weight, DIFFUSERS.patch_weight)
    weights = choose_weights(file, anchors, where=what, read=places_read(parts))
    if DIFFUSERS.patch_weight in weights.tensors:
        raise CheckpointError(
            f"{path} has diffusers' tensor names; pass its folder, whose config.json is needed"
        )
    network = without_projectors(weights.tensors, where=what)
    record = merged(
        known or {},
        facts_of_metadata(file.metadata, where=what),
        facts_of_training(parts, where=what),
        network.facts,
        where=what,
    )
    geometry = infer_geometry(network.tensors, OFFICIAL, where=what)
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
        notes=(*weights.notes, *network.notes, *notes),
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


def _load_diffusers(
    path: Path, hints: CheckpointHints, what: str, *, vae: str | None = None
) -> LoadedDiT:
    """Load a folder written by diffusers; its VAE goes by a name, or by the pipeline's folder."""
    opened = open_folder(path)
    file = read_tensor_file(opened.weights)
    weights = choose_weights(file, (DIFFUSERS.patch_weight,), where=what)
    config, notes = resolve(
        Source(
            geometry=infer_geometry(weights.tensors, DIFFUSERS, where=what),
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
        assemble(weights.tensors, DIFFUSERS, config, where=what),
        source=f"{what} (diffusers)",
        dtype=weights.tensors[DIFFUSERS.fc1_weight].dtype,
        notes=(*opened.notes, *weights.notes, *notes),
        vae=None if opened.vae is None else vae or str(opened.vae),
    )


def _download(hub_id: str) -> Path:
    """Return the local copy of a hub model: its transformer, and what is written of its process."""
    import huggingface_hub

    folder = Path()
    try:
        for patterns in HUB_PATTERNS:
            fetched = huggingface_hub.snapshot_download(hub_id, allow_patterns=list(patterns))
            folder = Path(fetched)
            if find_weights(transformer_folders(folder)[0]):
                break
    except Exception as error:  # the hub client raises its own, httpx's and the system's errors
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{hub_id} is no file here and could not be had from the hub ({reason}); check the "
            f"name and the network, or download it and pass the folder"
        ) from error
    return folder


def _loaded(
    config: DiTConfig,
    state: dict[str, Tensor],
    *,
    source: str,
    dtype: torch.dtype,
    notes: tuple[str, ...],
    vae: str | None,
) -> LoadedDiT:
    """Put checked tensors into a model, without copying them."""
    with torch.device("meta"):
        model = DiT(config)
    model.load_state_dict(state, assign=True)
    model.eval().requires_grad_(requires_grad=False)
    return LoadedDiT(
        model=model,
        source=source,
        identity=identity_of(model),
        dtype=dtype,
        notes=notes,
        vae=vae,
    )
