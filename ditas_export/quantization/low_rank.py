"""Low-rank factors: of a weight's error (the paper's LoRA-AO) or of the output's error (ours).

They are fitted with a float output factor, then made integers once, for the inputs that they see.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ditas_export.errors import QuantizationError
from ditas_export.quantization.integer import (
    MAX_CODE_8BIT,
    LowRank,
    inner_codes,
    quantize_rows,
)
from ditas_export.quantization.rounding import InputMoments

DIVISORS = tuple(sorted({2 * round(2 ** (power / 4 - 1)) + 1 for power in range(53)}))
"""What the divisors of a branch are chosen from: odd, four to an octave, with normal halves as
reciprocals."""
ROUNDING_WEIGHT = 1 / 16
"""What the error of a rounded inner product counts beside that of the output factor. It is another
at every token and step, and averages out along a trajectory, where a wrong weight adds up; and it
is there in files for ONNX Runtime alone. On the bundled model's twin, before columns were ordered,
1/16 gave 39.6 dB (six calibration seeds) where 1 gave 39.0 (eight; 0.6 from seed to seed)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Factors:
    """left @ right, as fitted: the input factor in INT8 rows, the output factor still float."""

    left: Tensor  # (N, rank) float
    right_codes: Tensor  # (rank, K) int8, |codes| <= 127
    right_scale: Tensor  # (rank,) float, finite, > 0

    def right(self) -> Tensor:
        """Return the input factor (rank, K) in the scale's float type."""
        return self.right_codes.to(self.right_scale.dtype) * self.right_scale[:, None]

    def product(self) -> Tensor:
        """Return left @ right, (N, K)."""
        return self.left @ self.right()

    def take(self, columns: Tensor) -> Factors:
        """Return the factors with the input factor's columns in another order, (K,)."""
        return replace(self, right_codes=self.right_codes[:, columns])

    def to(self, dtype: torch.dtype) -> Factors:
        """Return the factors with their floats in another type."""
        return replace(self, left=self.left.to(dtype), right_scale=self.right_scale.to(dtype))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampledCodes:
    """A sample of a linear's quantized input: each token's INT8 codes in its own range."""

    codes: Tensor  # (tokens, K) int8
    ranges: Tensor  # (tokens, 1) float


def integer_low_rank(
    factors: Factors,
    row_scale: Tensor,
    output_weights: Tensor,
    sample: SampledCodes,
    *,
    centred: bool,
) -> LowRank:
    """Round the output factor to INT8 in units of the row scales.

    With P = q right_codesᵀ and ℓ the output factor for P in those units, a column gives p ℓ̂ᵀ with
    p = P / divisor and ℓ̂ = ℓ · divisor, both rounded and clamped to INT8: a small divisor makes ℓ̂
    coarse and clamps p, a large one the reverse. Each column takes the divisor with the least error

        Σ over tokens and rows of (P ℓ̂ / divisor − P ℓ)² + w ((p − P / divisor) ℓ̂)²,

    on the sample, w = ROUNDING_WEIGHT; the largest of equal ones.

    Args:
        factors: as fitted, in any float type.
        row_scale: of the weight that they are added to, (N,) float.
        output_weights: (N,), > 0: what an error of each output channel counts.
        sample: of the input.
        centred: the bias mends the mean of the first error.
    """
    units = factors.left.double() * factors.right_scale.double() / row_scale.double()[:, None]
    products = sample.codes.double() @ factors.right_codes.double().mT  # (tokens, rank), integers
    seen = sample.ranges.double() * products
    energy = (seen - seen.mean(dim=0) if centred else seen).square().sum(dim=0)
    rows = (output_weights.double() * row_scale.double()).square()[:, None]
    divisor = torch.ones(units.shape[1], dtype=torch.int32, device=units.device)
    least = torch.full_like(divisor, torch.inf, dtype=torch.float64)
    for candidate in DIVISORS:
        left = _left_codes(units, candidate)
        inner = inner_codes(products, torch.full_like(divisor, candidate))
        lost = sample.ranges.double() * (inner - products / candidate)
        error = energy * (rows * (left / candidate - units).square()).sum(dim=0)
        error += ROUNDING_WEIGHT * lost.square().sum(dim=0) * (rows * left.square()).sum(dim=0)
        # A column that rounds to nothing is the same with all: its inner product is to be small.
        better = error <= least
        divisor[better], least[better] = candidate, error[better]
    return LowRank(
        left_codes=_left_codes(units, divisor).to(torch.int8),
        right_codes=factors.right_codes,
        divisor=divisor,
    )


def _left_codes(units: Tensor, divisor: Tensor | int) -> Tensor:
    """Return clamp(round(units · divisor), −127, 127), (N, rank)."""
    return (units * divisor).round().clamp(-MAX_CODE_8BIT, MAX_CODE_8BIT)


OVERSAMPLING = 32
"""Dimensions of the subspace that is iterated, beside the rank: in a flat spectrum, what sets the
leading values apart from the rest."""
SUBSPACE_STEPS = 14
"""Steps of the subspace iteration, of two products each. Of a random 1152 x 4608 matrix, as flat a
spectrum as occurs here, they leave 0.0005 of the leading 32 values' energy; 12 leave 0.001."""
EXACT_RATIO = 8
"""A Gram matrix of more than this many subspaces' size is iterated, for less time than its whole
eigenproblem takes."""


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return left (N, rank) and right (rank, K), the best rank-`rank` approximation left @ right.

    The matrix is projected on the leading eigenvectors of the smaller of its two Gram matrices, a
    tenth of an SVD's time. ‖left @ right‖² falls short of the best by at most

    - 2 · rank · ε · ‖matrix‖², ε the precision of the matrix's float type, as squaring costs digits
      (Ky Fan), and
    - where min(N, K) is more than 8 · (rank + 32), a thousandth of itself: subspace iteration stops
      short (Halko, Martinsson, Tropp, "Finding structure with randomness", SIAM Review 2011,
      algorithm 4.4). That is for spectra no flatter than a random 1:8 matrix's, half of it for 1:4.
      Where values just behind the rank are a few per cent smaller than those before it, it may be
      as many per cent: of values so alike it matters little which are taken.

    The factor on the smaller side is orthonormal. The same matrix gives the same factors.

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
    leading = _leading_eigenvectors(matrix @ matrix.mT, rank)
    return leading, leading.mT @ matrix


def _leading_eigenvectors(gram: Tensor, rank: int) -> Tensor:
    """Return orthonormal vectors (size, rank) that span the largest eigenvalues of a Gram matrix.

    Of a large one by subspace iteration from a fixed random start, then Rayleigh-Ritz.
    """
    size, width = gram.shape[0], rank + OVERSAMPLING
    if size <= EXACT_RATIO * width:
        exact: Tensor = torch.linalg.eigh(gram).eigenvectors
        return exact[:, -rank:]
    # Of size 1: its square is neither too large nor too small for a float.
    gram = gram / gram.diagonal().amax().clamp(min=torch.finfo(gram.dtype).tiny)
    start = torch.randn(size, width, generator=torch.Generator().manual_seed(0), dtype=gram.dtype)
    basis = torch.linalg.qr(start.to(gram.device)).Q
    for _ in range(SUBSPACE_STEPS):
        basis = torch.linalg.qr(gram @ (gram @ basis)).Q
    leading: Tensor = basis @ torch.linalg.eigh(basis.mT @ gram @ basis).eigenvectors[:, -rank:]
    return leading


def fit_weight_error(error: Tensor, rank: int) -> Factors:
    """Return the factors that minimise ‖error − left @ right‖_F, `right` then rounded to INT8.

    Source: DiTAS, eq. 10 (the inner step of LoRA-AO).
    """
    left, right = truncated_svd(error, rank)
    return _with_integer_right(left, right)


def fit_output_error(
    whitened_error: Tensor, moments: InputMoments, rank: int, output_weights: Tensor
) -> Factors:
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
    fitted = _with_integer_right(left, whitened @ moments.inverse_factor.to(whitened.dtype))
    seen = moments.whiten(fitted.right()).to(whitened.dtype)  # (rank, K)
    target = whitened_error @ seen.mT  # (N, rank)
    seen = seen.to(moments.cholesky.dtype)
    gram = seen @ seen.mT
    gram.diagonal().add_(1e-10 * gram.diagonal().mean().clamp(min=1e-30))  # an error of nothing
    left = torch.linalg.solve(gram, target.to(gram.dtype).mT).mT.contiguous()
    return replace(fitted, left=left, right_scale=fitted.right_scale.to(gram.dtype))


def _with_integer_right(left: Tensor, right: Tensor) -> Factors:
    """Round `right` to INT8 rows of largest value 1; `left` takes over their magnitudes."""
    magnitude = right.abs().amax(dim=1)
    magnitude = torch.where(magnitude > 0, magnitude, torch.ones_like(magnitude))
    codes, scale = quantize_rows(right / magnitude[:, None])
    return Factors(left=left * magnitude, right_codes=codes, right_scale=scale)
