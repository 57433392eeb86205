"""Figures of pairs: how far an image is from the one that the same noise gave.

Sources: Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity",
IEEE TIP 2004 (SSIM: Gaussian windows of 11 pixels with σ = 1.5, K₁ = 0.01, K₂ = 0.03).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import conv2d

WHITE = 255.0
"""The largest value of a pixel."""

WINDOW = 11
"""Side of SSIM's window; smaller images have none."""

_SIGMA = 1.5
_C1 = (0.01 * WHITE) ** 2
_C2 = (0.03 * WHITE) ** 2


def squared_errors(images: Tensor, reference: Tensor) -> Tensor:
    """Return the mean squared error of each image, (N,) float64.

    Args:
        images: (N, C, H, W), 0 to 255, any type.
        reference: the same shape.
    """
    return (images.double() - reference.double()).square().flatten(1).mean(1)


def psnr_db(squared_error: float) -> float:
    """Return 10 · log10(255² / mean squared error) in dB; infinity where all pixels are equal."""
    return 10 * math.log10(WHITE**2 / squared_error) if squared_error else math.inf


def structural_similarities(images: Tensor, reference: Tensor) -> Tensor:
    """Return the SSIM of each image, (N,) float64: the mean over channels and over whole windows.

    Args:
        images: (N, C, H, W), 0 to 255, any type; H and W of `WINDOW` and more.
        reference: the same shape.
    """
    x, y = (each.double().flatten(0, 1)[:, None] for each in (images, reference))
    maps = torch.cat([x, y, x * x, y * y, x * y])
    mean_x, mean_y, square_x, square_y, product = _windowed(maps).chunk(5)
    variance_x, variance_y = square_x - mean_x**2, square_y - mean_y**2
    covariance = product - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    structure = (2 * covariance + _C2) / (variance_x + variance_y + _C2)
    return (luminance * structure).reshape(len(images), -1).mean(1)


def _windowed(maps: Tensor) -> Tensor:
    """Return the Gaussian-weighted mean of every whole window, (N, 1, H − 10, W − 10)."""
    offsets = torch.arange(WINDOW, dtype=maps.dtype, device=maps.device) - WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights /= weights.sum()
    rows = conv2d(maps, weights.reshape(1, 1, WINDOW, 1))
    return conv2d(rows, weights.reshape(1, 1, 1, WINDOW))
