"""What turns images into features, by name."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ditas_export.evaluation.digit_features import DigitFeatures
from ditas_export.evaluation.inception_features import InceptionFeatures
from ditas_export.evaluation.options import FeatureSource


class Extractor(Protocol):
    """A network that maps images to features."""

    @property
    def description(self) -> str:
        """What it is, in one line."""

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return pooled (N, D) and spatial (N, S) features, float32, on the images' device.

        Args:
            images: (N, C, H, W) uint8.
        """


def open_extractor(name: FeatureSource, *, device: str) -> Extractor:
    """Return an extractor by its name, `digits` or `inception`.

    Raises:
        EvaluationError: its package or its weights are not at hand, or damaged.
    """
    return DigitFeatures(device=device) if name == "digits" else InceptionFeatures(device=device)
