"""The bundled digit classifier, whose last features judge digits.

`scripts/train_digit_features.py` trained it.
Features of another network than Inception give other distances: they compare models of these digits
with each other, and with no published figure.
"""

from __future__ import annotations

import importlib.resources

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from ditas_export.errors import EvaluationError

SIDE = 16
"""Height and width of the digits, in pixels."""

SHAPES = ((SIDE, SIDE, 1), (SIDE, SIDE, 3))
"""Of images: grey, as one channel or, as `ditas-sample` writes them, as three."""

WIDTHS = (32, 64, 64)
"""Channels of its three convolutions; the last are the features."""

FILE = "digit-features.safetensors"


class DigitClassifier(nn.Module):
    """Three convolutions, the image halved before the last two; their means; ten logits."""

    def __init__(self) -> None:
        super().__init__()
        inputs = (1, *WIDTHS)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(inputs[index], width, kernel_size=3, padding=1)
            for index, width in enumerate(WIDTHS)
        )
        self.head = nn.Linear(WIDTHS[-1], 10)

    def features(self, images: Tensor) -> Tensor:
        """Return (N, 64) features of (N, 1, 16, 16) float images, −1 black, 1 white."""
        x = images
        for index, convolution in enumerate(self.convolutions):
            x = functional.relu(convolution(functional.max_pool2d(x, 2) if index else x))
        return x.mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Return (N, 10) logits."""
        logits: Tensor = self.head(self.features(images))
        return logits


def load_digit_classifier() -> DigitClassifier:
    """Return the bundled classifier, float32, in evaluation mode."""
    folder = importlib.resources.files("ditas_export.evaluation") / "bundled"
    with importlib.resources.as_file(folder / FILE) as path:
        state = load_file(path)
    model = DigitClassifier()
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return model.eval().requires_grad_(requires_grad=False)


class DigitFeatures:
    """The classifier as an extractor; it has no spatial features."""

    def __init__(self, *, device: str = "cpu") -> None:
        self._model = load_digit_classifier().to(device)

    description = f"the bundled digit classifier, {WIDTHS[-1]} features"

    def __call__(self, images: Tensor) -> tuple[Tensor, None]:
        """Return (N, 64) features of (N, 1, 16, 16) uint8 images, or of three equal channels.

        Raises:
            EvaluationError: channels that differ.
        """
        grey = images[:, :1]
        if not bool((images == grey).all()):
            raise EvaluationError(
                "images in colour, and the digit classifier takes grey ones; others take "
                "--features inception"
            )
        return self._model.features((grey.to(torch.float32) - 127.5) / 127.5), None
