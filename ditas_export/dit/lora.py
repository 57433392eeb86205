"""A LoRA, merged into a checkpoint's tensors before anything else is done with them.

W + c B A, in float32: A (r, in) and B (out, r) are the adapter's factors, c its scale. What is left
is a plain checkpoint, so its fingerprint is that of the merged tensors. Source: Hu et al. 2022.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ditas_export.dit.tensor_files import abbreviated
from ditas_export.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Update:
    """What a LoRA adds to one weight: `scale · up @ down`."""

    down: Tensor  # A, (r, in)
    up: Tensor  # B, (out, r)
    scale: float  # alpha / r, or alpha / √r

    @property
    def rank(self) -> int:
        """How many directions it adds, r."""
        return len(self.down)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Lora:
    """A LoRA as it was read."""

    updates: Mapping[str, Update]  # by module, under the checkpoint's names
    source: str  # the file

    def merged(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint with W + scale · B A in place of W, in float32.

        Args:
            tensors: by the checkpoint's own names; left as they are.

        Raises:
            CheckpointError: a module that the checkpoint lacks, factors that are not as wide as its
                weight, or a sum that is not finite.
        """
        if lost := sorted(name for name in self.updates if f"{name}.weight" not in tensors):
            raise CheckpointError(
                f"{self.source} adapts {abbreviated(lost)}, expected linears of the checkpoint; "
                f"pass the LoRA of this model, without those of text encoders"
            )
        found = dict(tensors)
        for name, update in self.updates.items():
            weight = found[f"{name}.weight"]
            asked = (len(update.up), update.down.shape[1])
            if tuple(weight.shape) != asked:
                raise CheckpointError(
                    f"{self.source} adapts {name} as {asked}, but its weight is "
                    f"{tuple(weight.shape)}; pass the LoRA of this model"
                )
            merged = weight.float() + update.scale * (update.up.float() @ update.down.float())
            if not merged.isfinite().all():
                raise CheckpointError(
                    f"{self.source} makes NaN or infinity of {name}; get it again"
                )
            found[f"{name}.weight"] = merged
        return found

    @property
    def note(self) -> str:
        """What was merged, in one line."""
        ranks = sorted({update.rank for update in self.updates.values()})
        scales = sorted({update.scale for update in self.updates.values()})
        return (
            f"merged {self.source} into {len(self.updates)} linears: rank "
            f"{', '.join(map(str, ranks))}, scale {', '.join(f'{scale:g}' for scale in scales)}"
        )
