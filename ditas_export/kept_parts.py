"""Parts of a verification, kept so that no model samples the same twice.

In a folder until the export is done, so that an interrupted one goes on, and with the quantized
model, so that an export of the same numbers is proved in seconds.
"""

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


@dataclass(slots=True, kw_only=True, eq=False)
class KeptParts:
    """Parts of one verification by name, in memory, and in a folder of its own if it has one."""

    folder: Path | None = None
    parts: dict[str, Part] = field(default_factory=dict)

    def find(self, name: str) -> Part | None:
        """Return a part that there is, None if it is to be made."""
        if name not in self.parts and self.folder is not None:
            try:
                tensors, facts = load_tensors(
                    self._file(self.folder, name), file_format=PART_FORMAT
                )
            except ArtifactError:
                return None  # none, or damaged: made anew
            self.parts[name] = Part(tensors=tensors, facts=facts)
        return self.parts.get(name)

    def take(self, name: str, make: Callable[[], Part]) -> Part:
        """Return a part: found, or made and kept; see `make`."""
        found = self.find(name)
        return self.make(name, make) if found is None else found

    def make(self, name: str, make: Callable[[], Part]) -> Part:
        """Make a part, over one that there is.

        Raises:
            ArtifactError: it cannot be written.
        """
        part = self.parts[name] = make()
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
