"""Error-compensated rounding of a weight to two-level integer codes (GPTQ-style).

Minimises `tr (Q − W) H (Q − W)ᵀ`, H the second moment of the quantized input, column by column:
each column's rounding error is pushed onto the columns not yet rounded, through the Cholesky factor
of H⁻¹ (Frantar et al., "GPTQ", ICLR 2023). What is ours is the grid: a block's multiplier, an
integer of 1 … 18, is chosen when its block is reached, by trying all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ditas_export.errors import QuantizationError
from ditas_export.quantization.integer import (
    MAX_CODE_4BIT,
    MAX_CODE_8BIT,
    MAX_MULTIPLIER,
    IntegerWeight,
    initial_row_scale,
    quantize_rows,
    require_block_size,
    require_finite,
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InputMoments:
    """What rounding needs to know of a linear's input, prepared once per linear."""

    moment: Tensor  # H + λI, (K, K), positive definite
    cholesky: Tensor  # L, lower: L Lᵀ = H + λI
    inverse_factor: Tensor  # U, upper: Uᵀ U = (H + λI)⁻¹

    @classmethod
    def from_second_moment(cls, second_moment: Tensor, *, damping: float) -> InputMoments:
        """Factor H + λI with λ = damping · mean diag H.

        Args:
            second_moment: H = E[x̂ x̂ᵀ], (K, K), symmetric; float64 is advised.
            damping: relative ridge, > 0.

        Raises:
            QuantizationError: the damped moment is not positive definite, as with NaN.
        """
        moment = damped(second_moment, damping)
        upper = upper_cholesky(moment)
        identity = torch.eye(moment.shape[0], dtype=moment.dtype, device=moment.device)
        return cls(
            moment=moment,
            cholesky=lower_cholesky(moment),
            inverse_factor=torch.linalg.solve_triangular(upper, identity, upper=True),
        )


def damped(second_moment: Tensor, damping: float) -> Tensor:
    """Return H + λI with λ = damping · mean diag H, (K, K)."""
    ridge = damping * second_moment.diagonal().mean().clamp(min=1e-30)
    moment = second_moment.clone()
    moment.diagonal().add_(ridge)
    return moment


def lower_cholesky(moment: Tensor) -> Tensor:
    """Return L, lower triangular, with L Lᵀ = moment; QuantizationError if there is none."""
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(moment)
    if int(info) or not factor.isfinite().all():
        raise QuantizationError(
            f"the second moment of an input is not positive definite (column {int(info)}); "
            f"check the checkpoint for NaN"
        )
    return factor


def upper_cholesky(moment: Tensor) -> Tensor:
    """Return R, upper triangular, with R Rᵀ = moment.

    `R_jj²` is the pivot of column j: what remains of it once all later columns have absorbed what
    they can. R⁻¹ is the upper factor U of `Uᵀ U = moment⁻¹` that compensation works with.
    """
    return lower_cholesky(moment.flip(0, 1)).flip(0, 1)


def quadratic_error(difference: Tensor, moments: InputMoments) -> float:
    """Return tr D (H + λI) Dᵀ for a weight difference D, (N, K)."""
    return float(((difference @ moments.cholesky) ** 2).sum())


def compensated_blocks(weight: Tensor, moments: InputMoments, *, block_size: int) -> IntegerWeight:
    """Round a weight to 4-bit codes with error compensation.

    Args:
        weight: (N, K) float, finite; left untouched.
        moments: of the quantized input, K × K.
        block_size: consecutive input channels that share a multiplier; divides K.

    Returns:
        Codes, multipliers, and the row scales that fit them best in the sense of the error.
    """
    require_finite("a weight", weight)
    require_block_size(weight.shape[1], block_size)
    row_scale = initial_row_scale(weight)
    remaining = weight / row_scale[:, None]
    factor = moments.inverse_factor.to(weight.dtype)
    codes = torch.empty_like(weight, dtype=torch.int8)
    multipliers = torch.empty(
        weight.shape[0], weight.shape[1] // block_size, dtype=torch.int8, device=weight.device
    )
    for index in range(multipliers.shape[1]):
        columns = slice(index * block_size, (index + 1) * block_size)
        chosen = _choose_multipliers(remaining[:, columns], factor[columns, columns])
        errors = torch.empty_like(remaining[:, columns])
        block = remaining[:, columns].clone()
        local = factor[columns, columns]
        for column in range(block_size):
            value = block[:, column]
            code = (value / chosen).round().clamp(-MAX_CODE_4BIT, MAX_CODE_4BIT)
            error = (value - code * chosen) / local[column, column]
            block[:, column:] -= error[:, None] * local[column, column:]
            codes[:, columns.start + column] = code.to(torch.int8)
            errors[:, column] = error
        multipliers[:, index] = chosen.to(torch.int8)
        remaining[:, columns.stop :] -= errors @ factor[columns, columns.stop :]
    rounded = IntegerWeight(codes=codes, multipliers=multipliers, row_scale=row_scale, bits=4)
    return refit_row_scale(rounded, weight, moments)


def compensated_rows(weight: Tensor, moments: InputMoments) -> IntegerWeight:
    """Round a weight to 8-bit codes, one scale per row, with error compensation."""
    _, row_scale = quantize_rows(weight)
    remaining = weight / row_scale[:, None]
    factor = moments.inverse_factor.to(weight.dtype)
    codes = torch.empty_like(weight, dtype=torch.int8)
    stride = 64  # columns whose updates to the rest are applied together
    for start in range(0, weight.shape[1], stride):
        columns = slice(start, min(start + stride, weight.shape[1]))
        block = remaining[:, columns].clone()
        local = factor[columns, columns]
        errors = torch.empty_like(block)
        for column in range(block.shape[1]):
            value = block[:, column]
            code = value.round().clamp(-MAX_CODE_8BIT, MAX_CODE_8BIT)
            error = (value - code) / local[column, column]
            block[:, column:] -= error[:, None] * local[column, column:]
            codes[:, start + column] = code.to(torch.int8)
            errors[:, column] = error
        remaining[:, columns.stop :] -= errors @ factor[columns, columns.stop :]
    ones = torch.ones(weight.shape[0], 1, dtype=torch.int8, device=weight.device)
    rounded = IntegerWeight(codes=codes, multipliers=ones, row_scale=row_scale, bits=8)
    return refit_row_scale(rounded, weight, moments)


def refit_row_scale(rounded: IntegerWeight, weight: Tensor, moments: InputMoments) -> IntegerWeight:
    """Return the same integers with each row's best scale: (q H w) / (q H q), where positive."""
    integers = rounded.int8_rows().to(weight.dtype) @ moments.cholesky.to(weight.dtype)
    target = weight @ moments.cholesky.to(weight.dtype)
    power = (integers**2).sum(dim=1)
    best = (integers * target).sum(dim=1) / power.clamp(min=torch.finfo(power.dtype).tiny)
    usable = (power > 0) & (best > 0) & best.isfinite()
    return IntegerWeight(
        codes=rounded.codes,
        multipliers=rounded.multipliers,
        row_scale=torch.where(usable, best, rounded.row_scale),
        bits=rounded.bits,
    )


def _choose_multipliers(block: Tensor, factor: Tensor) -> Tensor:
    """Return the multiplier of each row that rounds a block best, in float: (N,) of 1 … 18.

    The block (N, block_size) is in units of the row scale. A column's error counts as GPTQ counts
    it: divided by the diagonal of the factor of H⁻¹.
    """
    weights = factor.diagonal() ** -2.0
    best_error = torch.full_like(block[:, 0], float("inf"))
    best = torch.ones_like(block[:, 0])
    for multiplier in range(1, MAX_MULTIPLIER + 1):
        codes = (block / multiplier).round().clamp(-MAX_CODE_4BIT, MAX_CODE_4BIT)
        error = ((block - codes * multiplier) ** 2 * weights).sum(dim=1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, torch.full_like(best, multiplier), best)
    return best
