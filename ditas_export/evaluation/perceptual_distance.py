"""LPIPS: the distance of two images as people see it, by the package lpips where it is installed.

Neither the package nor AlexNet's weights come with ditas-export, and nothing is downloaded. Source:
Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PACKAGE = "lpips"

WEIGHTS = "alexnet-owt-7be5be79.pth"
"""AlexNet's weights, as torchvision names them."""

LEAST_SIDE = 32
"""Pixels of the smallest image that AlexNet takes."""


def why_absent() -> str | None:
    """Return in one line what is missing; None where all is at hand."""
    if importlib.util.find_spec(PACKAGE) is None:
        return "LPIPS needs the package lpips, which is not installed"
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if not (folder / WEIGHTS).is_file():
        return f"LPIPS needs AlexNet's weights: put torchvision's {WEIGHTS} into {folder}"
    return None


class PerceptualDistance:
    """LPIPS by AlexNet."""

    def __init__(self, *, device: str) -> None:
        network: Any = importlib.import_module(PACKAGE).LPIPS(net="alex", verbose=False)
        self._network = network.to(device).eval()

    def __call__(self, images: Tensor, reference: Tensor) -> Tensor:
        """Return the distance of each pair, (N,) float64.

        Args:
            images: (N, 1 or 3, H, W) uint8, of `LEAST_SIDE` pixels and more.
            reference: the same shape.
        """
        pair = (each.float().expand(-1, 3, -1, -1) / 127.5 - 1 for each in (images, reference))
        with torch.inference_mode():
            distances: Tensor = self._network(*pair)
        return distances.flatten().double()
