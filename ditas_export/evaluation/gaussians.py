"""Fréchet distances: how far apart two sets of features are, taken for normal distributions.

FID is the distance of pooled features, sFID that of spatial ones. Sources: Heusel et al., "GANs
Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", NeurIPS 2017; Nash et
al., "Generating Images with Sparse Representations", ICML 2021 (sFID).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """Mean and covariance of D features."""

    mean: Tensor  # (D,) float64
    covariance: Tensor  # (D, D) float64, symmetric, no negative eigenvalue but for rounding

    @classmethod
    def of(cls, features: Tensor, counts: Tensor | None = None) -> Moments:
        """Return the moments of a set; the covariance is unbiased, over N − 1.

        Args:
            features: (N, D) float64, N of 2 and more.
            counts: (N,) float64, how often each row is in the set; once each if None.
        """
        if counts is None:
            counts = torch.ones(len(features), dtype=features.dtype, device=features.device)
        number = counts.sum()
        mean = counts @ features / number
        centred = features - mean
        covariance = (centred * counts[:, None]).T @ centred / (number - 1)
        return cls(mean=mean, covariance=covariance)

    @cached_property
    def root(self) -> Tensor:
        """A (D, D) with A Aᵀ = covariance."""
        values, vectors = torch.linalg.eigh(self.covariance)
        root: Tensor = vectors * values.clamp(min=0).sqrt()
        return root


def frechet_distance(first: Moments, second: Moments) -> float:
    """Return |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½).

    With Σᵢ = Aᵢ Aᵢᵀ the trace of (Σ₁ Σ₂)^½ is the sum of the singular values of A₁ᵀ A₂: those of
    covariances without full rank too, to float64's last digits.
    """
    shift = (first.mean - second.mean).square().sum()
    traces = first.covariance.trace() + second.covariance.trace()
    shared = torch.linalg.svdvals(first.root.T @ second.root).sum()
    return float(shift + traces - 2 * shared)
