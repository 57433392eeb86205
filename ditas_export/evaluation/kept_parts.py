"""Parts of a verification that are kept until it is done, so that an interrupted one goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ditas_export.artifact_files import load_tensors, save_tensors
from ditas_export.errors import ArtifactError

PART_FORMAT = "ditas-export verification part 1"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """What a step of a verification found."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)  # JSON values


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptParts:
    """A folder of parts, of one verification alone; without a folder nothing is kept."""

    folder: Path | None = None

    def find(self, name: str) -> Part | None:
        """Return a part that an interrupted verification made, None if it is to be made."""
        if self.folder is None:
            return None
        try:
            tensors, facts = load_tensors(self._file(self.folder, name), file_format=PART_FORMAT)
        except ArtifactError:
            return None  # none, or damaged: made anew
        return Part(tensors=tensors, facts=facts)

    def take(self, name: str, make: Callable[[], Part]) -> Part:
        """Return a part: found, or made and kept.

        Raises:
            ArtifactError: it cannot be written.
        """
        found = self.find(name)
        if found is not None:
            return found
        part = make()
        if self.folder is not None:
            save_tensors(
                self._file(self.folder, name),
                part.tensors,
                file_format=PART_FORMAT,
                header=part.facts,
            )
        return part

    def _file(self, folder: Path, name: str) -> Path:
        """Return the file of a part."""
        return folder / f"{name}.safetensors"
