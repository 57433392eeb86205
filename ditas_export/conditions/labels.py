"""Classes as conditions: a label is a row of the model's own table."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ditas_export.dit.model import DiTConfig
from ditas_export.family_model import ModelInputs

CLASS_LABELS = "class_labels"
"""Name of the input of the models' files."""


@dataclass(frozen=True, slots=True)
class ClassLabels:
    """The classes of a model, and its null class where it has both."""

    config: DiTConfig

    @property
    def what(self) -> str:
        """What a label names."""
        return "class"

    @property
    def source(self) -> str:
        """The model itself."""
        return "this model"

    @property
    def count(self) -> int:
        """Classes, or 1 where the table has one row alone."""
        return self.config.num_labels

    @property
    def null(self) -> int | None:
        """The null class; None without one, or without classes."""
        return self.config.null_class if self.config.is_guidable else None

    @property
    def lack(self) -> str:
        """What a model lacks that cannot be guided."""
        return "classes" if self.config.null_row else "null class"

    @property
    def identity(self) -> None:
        """None: the model's own tensors say what a class is."""
        return

    def inputs(self, labels: Tensor) -> dict[str, Tensor]:
        """Return the labels, (N,) int64, as the input that they are."""
        return {CLASS_LABELS: labels}


def labelled_inputs(latents: Tensor, timesteps: Tensor, class_labels: Tensor) -> ModelInputs:
    """Return what a model of classes is fed.

    Args:
        latents: (N, C, H, W), any float type.
        timesteps: (N,) of whole numbers, steps of the full schedule, from 0; of a flow (N,) of
            floats, t from 0 to 1.
        class_labels: (N,) of whole numbers, rows of the label table.
    """
    return ModelInputs({"latents": latents, "timesteps": timesteps, CLASS_LABELS: class_labels})
