"""Kernel distance (KID): the squared maximum mean discrepancy of two sets of features.

The unbiased estimate over all images at once. What others print is a mean over random subsets: an
estimate of this same number, with the chance of the subsets in it. Source: Bińkowski et al.,
"Demystifying MMD GANs", ICLR 2018, section 4.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ditas_export.evaluation.row_blocks import row_blocks


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Return k(x, y) = (xᵀ y / D + 1)³, (M, N), of rows (M, D) and (N, D)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def kernel_distances(
    x: Tensor,
    y: Tensor,
    x_counts: Tensor,
    y_counts: Tensor,
    on_block: Callable[[int, int], None] = lambda *_: None,
) -> Tensor:
    """Return the unbiased squared MMD of two sets, and of resamples of them.

    Σ_{i≠j} k(xᵢ, xⱼ) / M(M − 1) + Σ_{i≠j} k(yᵢ, yⱼ) / N(N − 1) − 2 Σ_{ij} k(xᵢ, yⱼ) / M N

    An image that is drawn twice is two of them.

    Args:
        x: (M, D) float64, M of 2 and more.
        y: (N, D).
        x_counts: (R, M) float64, how often each row is in each of R sets; rows sum to M.
        y_counts: (R, N).
        on_block: called with (blocks done, in all).

    Returns:
        (R,) float64.
    """
    pairs = ((x, x, x_counts, x_counts), (y, y, y_counts, y_counts), (x, y, x_counts, y_counts))
    total = sum(len(row_blocks(*pair[:2])) for pair in pairs)
    done, sums = 0, []
    for left, right, left_counts, right_counts in pairs:
        joint = torch.zeros(len(left_counts), dtype=left.dtype, device=left.device)
        for rows in row_blocks(left, right):
            kernel = polynomial_kernel(left[rows], right)
            joint += ((left_counts[:, rows] @ kernel) * right_counts).sum(1)
            done += 1
            on_block(done, total)
        sums.append(joint)
    m, n = len(x), len(y)
    within_x = (sums[0] - x_counts @ _own_kernel(x)) / (m * (m - 1))
    within_y = (sums[1] - y_counts @ _own_kernel(y)) / (n * (n - 1))
    return within_x + within_y - 2 * sums[2] / (m * n)


def _own_kernel(x: Tensor) -> Tensor:
    """Return k(xᵢ, xᵢ) of every row."""
    return (x.square().sum(1) / x.shape[1] + 1) ** 3
