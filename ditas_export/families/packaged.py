"""Families of other packages: what they state beyond `Family`, and the checkpoints they read.

A family of one's own is a class below `PackagedFamily`; an entry point of the group
`ditas_export.families` names an instance of it, under the family's own name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ditas_export.artifact_files import load_tensors, save_tensors
from ditas_export.dit.fitting import Wanted, require_fits
from ditas_export.errors import CheckpointError
from ditas_export.families.base import Config, Family, FusedAttention, Model, Shapes, Wide
from ditas_export.family_model import FamilyModel, ReadCheckpoint
from ditas_export.paths import StrPath
from ditas_export.saved_records import from_record

CHECKPOINT_KIND = "ditas-export checkpoint"
CHECKPOINT_FORMAT = f"{CHECKPOINT_KIND} 1"


class PackagedFamily(Family[Config, Model], Protocol[Config, Model]):
    """A family that another package brings; what is left out here has to be stated."""

    def read(self, path: Path) -> ReadCheckpoint | None:
        """Return the model of a checkpoint, a file or a folder; None where it is not the family's.

        Unless a family reads others, it is what `save_checkpoint` wrote of it.

        Raises:
            DitasExportError: a checkpoint of the family that is damaged.
        """
        return read_checkpoint(self, path)

    def serves(self, config: Config) -> bool:
        """Return whether a model is of the family: all of its configurations' class are."""
        return isinstance(config, self.config_type)

    def tables(self, _config: Config) -> Shapes:
        """Return nothing: the record in a file is taken at its word."""
        return {}

    def sizes(self, _config: Config) -> Mapping[str, tuple[int, int, int]]:
        """Return nothing: the batch alone is dynamic."""
        return {}

    def attentions(self, _config: Config) -> Sequence[FusedAttention]:
        """Return nothing: attention stays as it was traced."""
        return ()

    def wides(self, _config: Config) -> Sequence[Wide]:
        """Return nothing: all is computed as a whole."""
        return ()


AnyPackagedFamily = PackagedFamily[Any, Any]
"""A family of another package, its configurations' class unknown."""


def save_checkpoint(family: AnyPackagedFamily, model: FamilyModel, path: StrPath) -> None:
    """Write a model as a checkpoint that its family reads: safetensors, and its configuration.

    Args:
        family: the model's.
        model: what was trained.
        path: the file.

    Raises:
        ArtifactError: it cannot be written.
    """
    header = {"family": family.name, "config": model.config.to_dict()}
    tensors = model.state_dict()
    save_tensors(Path(path), tensors, file_format=CHECKPOINT_FORMAT, header=header)


def read_checkpoint(family: AnyPackagedFamily, path: StrPath) -> ReadCheckpoint | None:
    """Return a model that `save_checkpoint` wrote; None for any other file, and other families'.

    Raises:
        ArtifactError: a damaged file.
        CheckpointError: a configuration that no model of the family has, or other tensors.
    """
    path = Path(path)
    if not _is_checkpoint(path):
        return None
    tensors, header = load_tensors(path, file_format=CHECKPOINT_FORMAT)
    if header.get("family") != family.name:
        return None
    config = from_record(family.config_type, header.get("config"), where=str(path))
    with torch.device("meta"):
        model = family.module(config)
    wanted = {name: Wanted(tuple(value.shape), None) for name, value in model.state_dict().items()}
    require_fits(tensors, wanted, error=CheckpointError, where=str(path))
    block = family.blocks(config)[0]
    dtype = tensors[f"{block.linears[0]}.weight"].dtype
    model.load_state_dict({name: tensors[name].float() for name in wanted}, assign=True)
    for module in model.modules():
        _require_on_a_device(module, str(path))
    model.eval().requires_grad_(requires_grad=False)
    return ReadCheckpoint(model=model, source=f"{path} ({family.name})", dtype=dtype)


def _is_checkpoint(path: Path) -> bool:
    """Return whether a file says that it is such a checkpoint."""
    try:
        with safe_open(path, framework="pt") as file:
            return any(key.startswith(f"{CHECKPOINT_KIND} ") for key in file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def _require_on_a_device(module: nn.Module, where: str) -> None:
    """Refuse buffers that no checkpoint has, for they have no values here."""
    if odd := [name for name, value in module.named_buffers(recurse=False) if value.is_meta]:
        raise CheckpointError(
            f"{where}: {type(module).__name__} has buffers that are in no checkpoint: "
            f"{', '.join(odd)}; make them in forward, or persistent"
        )
