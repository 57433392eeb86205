"""A checkpoint by its name, to the model of whichever family recognises it.

Files are told by their tensors, which are DiT's; folders by the class that their config.json names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from ditas_export.dit.checkpoint import BUNDLED_FLOW as BUNDLED_FLOW
from ditas_export.dit.checkpoint import BUNDLED_MODEL as BUNDLED_MODEL
from ditas_export.dit.checkpoint import (
    BUNDLED_PIXART,
    bundled_path,
    is_bundled,
    read_bundled,
    read_file,
    read_folder,
)
from ditas_export.dit.diffusers_folder import (
    CLASSES,
    HUB_ID,
    HUB_PATTERNS,
    PIXART,
    class_of,
    find_weights,
    transformer_folders,
)
from ditas_export.errors import CheckpointError, DitasExportError, UnrecognizedError
from ditas_export.families.base import FamilyModel
from ditas_export.families.entry_points import all_families, family_named, one_line
from ditas_export.families.identity import ModelIdentity, identity_of
from ditas_export.families.packaged import AnyPackagedFamily
from ditas_export.families.pixart_folder import read_pixart
from ditas_export.families.registry import known_names
from ditas_export.family_model import ReadCheckpoint
from ditas_export.options import NO_HINTS, CheckpointHints


class FolderReader(Protocol):
    """Reads a folder that diffusers wrote, of the transformer or of a whole pipeline."""

    def __call__(
        self, path: Path, hints: CheckpointHints, what: str, *, vae: str | None = None
    ) -> ReadCheckpoint:
        """Return what a folder holds.

        Args:
            path: of the transformer, or of a pipeline.
            hints: what the checkpoint does not say.
            what: the folder in messages.
            vae: how a pipeline's VAE is named; by its folder if not given.

        Raises:
            CheckpointError: a damaged folder, or one that contradicts itself or the hints.
        """
        ...


FOLDERS: Mapping[str, FolderReader] = {
    **dict.fromkeys(CLASSES, read_folder),
    PIXART: read_pixart,
}
"""By the class of diffusers that a transformer's config.json names."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadedModel:
    """A checkpoint, ready to run."""

    model: FamilyModel  # float32, evaluation mode, no gradients; tensors may be mapped from a file
    source: str  # one line: what was read
    identity: ModelIdentity  # the same for the same numbers and configuration, whatever the file
    dtype: torch.dtype  # float type of the block linears in the file
    notes: tuple[str, ...] = ()  # one line each: what was chosen, stripped, left out or guessed
    vae: str | None = None  # the VAE of a pipeline: its folder, or the hub's id


def load_model(
    source: str | Path,
    hints: CheckpointHints = NO_HINTS,
    *,
    num_heads: int | None = None,
) -> LoadedModel:
    """Load a model of any family.

    Args:
        source: `digits`, `digits-sit` or `digits-pixart` for a bundled model; a file with the
            published names of a DiT, safetensors or written by torch.save (of a training
            checkpoint, the averaged weights); a folder written by diffusers, of the transformer or
            of a whole pipeline; such a folder's id on the Hugging Face hub; or what a family of
            another package reads.
        hints: what the checkpoint does not say.
        num_heads: the same as `hints.num_heads`.

    Raises:
        CheckpointError: nothing there, a damaged file, a model of no known family, tensors that do
            not make the model, records that contradict them, each other or the hints, a process
            that is not followed, or an unknown number of heads.
    """
    if num_heads is not None:
        hints = replace(hints, num_heads=num_heads)
    read = _read(source, hints)
    return LoadedModel(
        model=read.model,
        source=read.source,
        identity=identity_of(read.model),
        dtype=read.dtype,
        notes=read.notes,
        vae=read.vae,
    )


def _read(source: str | Path, hints: CheckpointHints) -> ReadCheckpoint:
    """Let the family read that a checkpoint is of."""
    if hints.family is not None and hints.family not in known_names():
        family = family_named(hints.family, known=known_names())
        return _require_read(_read_by(family, Path(source), hints), family.name, str(source))
    if is_bundled(source):
        return read_bundled(str(source), hints)
    if source == BUNDLED_PIXART:
        return _read_folder(bundled_path(BUNDLED_PIXART), hints, f"{source} (bundled)")
    path = Path(source)
    try:
        return _read_known(source, path, hints)
    except UnrecognizedError as error:
        return _read_by_another(path, hints, error)


def _read_known(source: str | Path, path: Path, hints: CheckpointHints) -> ReadCheckpoint:
    """Let a family of this package read what lies at a path, or on the hub."""
    if path.is_dir():
        return _read_folder(path, hints, str(source))
    if path.is_file():
        return read_file(path, hints, str(source))
    if isinstance(source, str) and HUB_ID.fullmatch(source):
        return _read_folder(_download(source), hints, source, vae=source)
    raise CheckpointError(
        f"{source}: no such file or folder; expected `{BUNDLED_MODEL}`, `{BUNDLED_FLOW}`, "
        f"`{BUNDLED_PIXART}`, a checkpoint file, a diffusers folder, or a hub id such as "
        f"facebook/DiT-XL-2-256"
    )


def _read_folder(
    path: Path, hints: CheckpointHints, what: str, *, vae: str | None = None
) -> ReadCheckpoint:
    """Let the reader of the folder's class read it; DiT's says what is wrong with any other."""
    read = FOLDERS.get(class_of(path) or "", read_folder)
    return read(path, hints, what, vae=vae)


def _read_by_another(
    path: Path, hints: CheckpointHints, error: UnrecognizedError
) -> ReadCheckpoint:
    """Let the families of other packages look at what none of this one recognised.

    Raises:
        UnrecognizedError: theirs is it not either; names the families that were left out.
    """
    families, left_out = all_families(known_names())
    for family in families:
        if (read := _read_by(family, path, NO_HINTS)) is not None:
            _refuse_hints(family.name, hints)
            return read
    if left_out:
        raise UnrecognizedError("; left out: ".join((str(error), *left_out))) from error
    raise error


def _read_by(
    family: AnyPackagedFamily, path: Path, hints: CheckpointHints
) -> ReadCheckpoint | None:
    """Let a family of another package read what lies at a path; its faults are ours."""
    _refuse_hints(family.name, hints)
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such file or folder; expected a checkpoint of the family {family.name}"
        )
    try:
        return family.read(path)
    except DitasExportError:
        raise
    except Exception as error:  # whatever a package of others raises
        raise CheckpointError(
            f"the family {family.name} cannot read {path}: {one_line(error)}"
        ) from error


def _refuse_hints(name: str, hints: CheckpointHints) -> None:
    """Refuse what is said of a checkpoint whose family is not told such things."""
    if more := [flag for flag in hints.given if flag != "--family"]:
        raise CheckpointError(
            f"{' and '.join(more)} say nothing to the family {name}; leave them out"
        )


def _require_read(read: ReadCheckpoint | None, name: str, source: str) -> ReadCheckpoint:
    """Return what a family read, which it was asked to."""
    if read is None:
        raise CheckpointError(
            f"{source} is no checkpoint of the family {name}, as its package says; leave --family "
            f"out, or pass such a checkpoint"
        )
    return read


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
