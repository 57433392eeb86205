"""Literal numpy transcription, in float64, of the figures by which sets of images are judged.

Sources: ADM's evaluator (guided-diffusion, evaluations/evaluator.py: Fréchet distance by the matrix
square root, `mu` and `sigma` over rows with N − 1, k-nearest-neighbour manifolds with k = 3, radii
and distances squared, a point on a surface within its ball); Kynkäänniemi et al. 2019, eq. 1, 2;
Bińkowski et al. 2018 (the cubic kernel, the unbiased MMD²); Wang et al. 2004, eq. 13 (SSIM).
"""

from __future__ import annotations

import math

import numpy as np
from scipy import linalg

Array = np.ndarray


def frechet(first: Array, second: Array) -> float:
    """Return the Fréchet distance of two sets of rows."""
    return frechet_of_moments(
        first.mean(0), np.cov(first, rowvar=False), second.mean(0), np.cov(second, rowvar=False)
    )


def frechet_of_moments(mu_1: Array, sigma_1: Array, mu_2: Array, sigma_2: Array) -> float:
    """Return |μ₁ − μ₂|² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁ Σ₂)^½, the root by Schur's decomposition."""
    root = linalg.sqrtm(sigma_1 @ sigma_2)
    shift = mu_1 - mu_2
    return float(shift @ shift + np.trace(sigma_1) + np.trace(sigma_2) - 2 * np.trace(root).real)


def kernel(x: Array, y: Array) -> float:
    """Return (xᵀ y / D + 1)³."""
    return float((x @ y / len(x) + 1) ** 3)


def kernel_distance(first: Array, second: Array) -> float:
    """Return the unbiased MMD², pair by pair."""
    m, n = len(first), len(second)
    within_first = sum(kernel(first[i], first[j]) for i in range(m) for j in range(m) if i != j) / (
        m * (m - 1)
    )
    within_second = sum(
        kernel(second[i], second[j]) for i in range(n) for j in range(n) if i != j
    ) / (n * (n - 1))
    between = sum(kernel(x, y) for x in first for y in second) / (m * n)
    return within_first + within_second - 2 * between


def radii(rows: Array, k: int = 3) -> list[float]:
    """Return the squared distance of every row to its k-th nearest neighbour."""
    return [sorted(float(((row - other) ** 2).sum()) for other in rows)[k] for row in rows]


def is_within(point: Array, rows: Array, squared_radii: list[float]) -> bool:
    """Return whether a point lies in one of the balls."""
    return any(
        float(((point - row) ** 2).sum()) <= radius
        for row, radius in zip(rows, squared_radii, strict=True)
    )


def precision_recall(reference: Array, samples: Array) -> tuple[float, float]:
    """Return the share of samples in the reference's manifold, and the reverse."""
    reference_radii, sample_radii = radii(reference), radii(samples)
    precision = [is_within(point, reference, reference_radii) for point in samples]
    recall = [is_within(point, samples, sample_radii) for point in reference]
    return float(np.mean(precision)), float(np.mean(recall))


def ssim(x: Array, y: Array) -> float:
    """Return the mean SSIM over the whole windows of one channel, (H, W), window by window."""
    weights = np.array(
        [
            [math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for j in range(11)]
            for i in range(11)
        ]
    )
    weights /= weights.sum()
    c_1, c_2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    found = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            a, b = (each[top : top + 11, left : left + 11].astype(np.float64) for each in (x, y))
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
            shared = (weights * (a - mean_a) * (b - mean_b)).sum()
            found.append(
                (2 * mean_a * mean_b + c_1) * (2 * shared + c_2)
                / ((mean_a**2 + mean_b**2 + c_1) * (var_a + var_b + c_2))
            )  # fmt: skip
    return float(np.mean(found))
