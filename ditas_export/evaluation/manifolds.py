"""Precision and recall: images of one set that lie within the other's manifold, as balls show it.

A set's manifold is the union of balls around its images, each as large as the distance to its k-th
nearest neighbour. Source: Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing
Generative Models", NeurIPS 2019; k = 3 as in ADM's evaluator. That evaluator computes distances in
float16 where they do not overflow; these are float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ditas_export.evaluation.row_blocks import row_blocks

NEIGHBOURS = 3
"""Which neighbour's distance is a ball's radius."""

_ROUNDING = 1e-12
"""Of squared norms in float64: what sums of some thousand products may lose."""

OnBlock = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Membership:
    """Which images lie within the other set's manifold."""

    samples: Tensor  # (M,) bool: precision is their mean
    reference: Tensor  # (N,) bool: recall is theirs


def memberships(
    samples: Tensor, reference: Tensor, on_block: OnBlock = lambda *_: None
) -> Membership:
    """Return which images of either set lie in a ball of the other.

    Args:
        samples: (M, D) float64, more than `NEIGHBOURS` rows.
        reference: (N, D) likewise.
        on_block: called with (blocks done, in all).
    """
    pairs = ((samples, samples), (reference, reference), (samples, reference))
    total, done = sum(len(row_blocks(*pair)) for pair in pairs), 0

    def distances(left: Tensor, right: Tensor, rows: slice) -> Tensor:
        nonlocal done
        done += 1
        on_block(done, total)
        return squared_distances(left[rows], right)

    def radii(features: Tensor) -> Tensor:
        """The k-th nearest neighbour but oneself, at 0, is the (k + 1)-th smallest."""
        nearest = [
            distances(features, features, rows).kthvalue(NEIGHBOURS + 1, dim=1).values
            for rows in row_blocks(features, features)
        ]
        return torch.cat(nearest)

    sample_radii, reference_radii = radii(samples), radii(reference)
    within_reference = []
    within_samples = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for rows in row_blocks(samples, reference):
        found = distances(samples, reference, rows)
        within_reference.append((found <= reference_radii).any(1))
        within_samples |= (found <= sample_radii[rows, None]).any(0)
    return Membership(samples=torch.cat(within_reference), reference=within_samples)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Return |xᵢ − yⱼ|² = |xᵢ|² − 2 xᵢᵀ yⱼ + |yⱼ|², (M, N), of (M, D) and (N, D) in float64.

    What equal rows leave by rounding is 0, so that they lie within each other's ball of radius 0.
    """
    norms = x.square().sum(1)[:, None] + y.square().sum(1)
    distances = norms - 2 * x @ y.T
    return distances.masked_fill(distances <= _ROUNDING * norms, 0.0)
