"""Low-rank factors: of a weight's error (the paper's LoRA-AO) or of the output's error (ours)."""

from __future__ import annotations

import torch
from torch import Tensor

from ditas_export.errors import QuantizationError
from ditas_export.quantization.integer import LowRank, quantize_rows
from ditas_export.quantization.rounding import InputMoments


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return left (N, rank) and right (rank, K), the best rank-`rank` approximation left @ right.

    The matrix is projected on the leading eigenvectors of the smaller of its two Gram matrices: a
    product and an eigenproblem of size min(N, K), a tenth of an SVD's time. Squaring costs digits:
    ‖left @ right‖² falls short of the best by at most 2 · rank · ε · ‖matrix‖², ε the precision of
    the matrix's float type (Ky Fan). The factor on the smaller side is orthonormal.

    Raises:
        QuantizationError: the rank is not in 1 … min(N, K).
    """
    if not 1 <= rank <= min(matrix.shape):
        raise QuantizationError(
            f"rank={rank} of a {matrix.shape[0]}x{matrix.shape[1]} matrix; "
            f"pick 1 to {min(matrix.shape)}, or 0 for no low-rank branch"
        )
    if matrix.shape[0] > matrix.shape[1]:
        left, right = truncated_svd(matrix.mT, rank)
        return right.mT, left.mT
    gram = matrix @ matrix.mT
    leading = torch.linalg.eigh(gram).eigenvectors[:, -rank:]
    return leading, leading.mT @ matrix


def fit_weight_error(error: Tensor, rank: int) -> LowRank:
    """Return the factors that minimise ‖error − left @ right‖_F, `right` then rounded to INT8.

    Source: DiTAS, eq. 10 (the inner step of LoRA-AO).
    """
    left, right = truncated_svd(error, rank)
    return _with_integer_right(left, right)


def fit_output_error(
    whitened_error: Tensor, moments: InputMoments, rank: int, output_weights: Tensor
) -> LowRank:
    """Return the factors that minimise tr D (error − left @ right) H (error − left @ right)ᵀ D.

    The truncated SVD of `D @ error @ R`, D = diag(output_weights) and R Rᵀ = H, gives the optimum;
    `right` is rounded to INT8 and `left` solved again for the rounded factor, row by row:
    left = error H rightᵀ (right H rightᵀ)⁻¹.

    Args:
        whitened_error: error @ R, (N, K) float; the error is what codes alone leave of the target.
        moments: of the quantized input.
        rank: 1 … min(N, K).
        output_weights: (N,), > 0: what an error of each output channel counts.

    Returns:
        Factors in the moments' float type.
    """
    left, whitened = truncated_svd(output_weights[:, None] * whitened_error, rank)
    dtype = moments.moment.dtype
    factors = _with_integer_right(left.to(dtype), whitened.to(dtype) @ moments.inverse_factor)
    seen = factors.right() @ moments.cholesky  # (rank, K)
    gram = seen @ seen.mT
    target = whitened_error.to(dtype) @ seen.mT  # (N, rank)
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
