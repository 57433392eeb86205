"""Low-rank factors: of a weight's error (the paper's LoRA-AO) or of the output's error (ours)."""

from __future__ import annotations

import torch
from torch import Tensor

from ditas_export.errors import QuantizationError
from ditas_export.quantization.integer import LowRank, quantize_rows
from ditas_export.quantization.rounding import InputMoments


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return left (N, rank) and right (rank, K), the best rank-`rank` approximation left @ right.

    The singular values are in `left`; `right` has orthonormal rows.

    Raises:
        QuantizationError: the rank is not in 1 … min(N, K).
    """
    if not 1 <= rank <= min(matrix.shape):
        raise QuantizationError(
            f"rank={rank} of a {matrix.shape[0]}x{matrix.shape[1]} matrix; "
            f"pick 1 to {min(matrix.shape)}, or 0 for no low-rank branch"
        )
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank] * values[:rank], right[:rank]


def fit_weight_error(error: Tensor, rank: int) -> LowRank:
    """Return the factors that minimise ‖error − left @ right‖_F, `right` then rounded to INT8.

    Source: DiTAS, eq. 10 (the inner step of LoRA-AO).
    """
    left, right = truncated_svd(error, rank)
    return _with_integer_right(left, right)


def fit_output_error(
    error: Tensor, moments: InputMoments, rank: int, output_weights: Tensor
) -> LowRank:
    """Return the factors that minimise tr D (error − left @ right) H (error − left @ right)ᵀ D.

    The truncated SVD of `D @ error @ L`, D = diag(output_weights) and L Lᵀ = H, gives the optimum;
    `right` is rounded to INT8 and `left` solved again for the rounded factor, row by row:
    left = error H rightᵀ (right H rightᵀ)⁻¹.

    Args:
        error: (N, K), what codes alone leave of the target.
        moments: of the quantized input.
        rank: 1 … min(N, K).
        output_weights: (N,), > 0: what an error of each output channel counts.
    """
    left, whitened = truncated_svd(output_weights[:, None] * (error @ moments.cholesky), rank)
    right = torch.linalg.solve_triangular(moments.cholesky.mT, whitened.mT, upper=True).mT
    factors = _with_integer_right(left, right)
    seen = factors.right().to(error.dtype) @ moments.cholesky  # (rank, K)
    gram = seen @ seen.mT
    target = error @ moments.cholesky @ seen.mT  # (N, rank)
    gram.diagonal().add_(1e-10 * gram.diagonal().mean())
    return LowRank(
        left=torch.linalg.solve(gram, target.mT).mT.contiguous(),
        right_codes=factors.right_codes,
        right_scale=factors.right_scale,
    )


def _with_integer_right(left: Tensor, right: Tensor) -> LowRank:
    """Round `right` to INT8 rows of largest value 1; `left` takes over their magnitudes."""
    magnitude = right.abs().amax(dim=1)
    magnitude = torch.where(magnitude > 0, magnitude, torch.ones_like(magnitude))
    codes, scale = quantize_rows(right / magnitude[:, None])
    return LowRank(left=left * magnitude, right_codes=codes, right_scale=scale)
