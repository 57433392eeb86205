"""Error-compensated rounding of a weight to two-level integer codes (GPTQ-style).

Minimises `tr (Q − W) H (Q − W)ᵀ`, H the second moment of the quantized input, column by column:
each column's rounding error is pushed onto the columns not yet rounded, through the Cholesky factor
of H⁻¹ (Frantar et al., "GPTQ", ICLR 2023). What is ours is the grid: a block's multiplier, an
integer of 1 … 18, is chosen when its block is reached, by trying all of them.

H is factored in float64, once; rounding is in float32, whose errors are far below a code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

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
    cholesky: Tensor  # R, upper: R Rᵀ = H + λI
    inverse_factor: Tensor  # U = R⁻¹, upper: Uᵀ U = (H + λI)⁻¹

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
        cholesky = upper_cholesky(moment)
        identity = torch.eye(moment.shape[0], dtype=moment.dtype, device=moment.device)
        return cls(
            moment=moment,
            cholesky=cholesky,
            inverse_factor=torch.linalg.solve_triangular(cholesky, identity, upper=True),
        )


def damped(second_moment: Tensor, damping: float) -> Tensor:
    """Return H + λI with λ = damping · mean diag H, (K, K)."""
    ridge = damping * second_moment.diagonal().mean().clamp(min=1e-30)
    moment = second_moment.clone()
    moment.diagonal().add_(ridge)
    return moment


def upper_cholesky(moment: Tensor) -> Tensor:
    """Return R, upper triangular, with R Rᵀ = moment.

    `R_jj²` is the pivot of column j: what remains of it once all later columns have absorbed what
    they can. R⁻¹ is the upper factor U of `Uᵀ U = moment⁻¹` that compensation works with.

    Raises:
        QuantizationError: the moment is not positive definite.
    """
    lower: Tensor
    lower, info = torch.linalg.cholesky_ex(moment.flip(0, 1))
    if int(info) or not lower.isfinite().all():
        raise QuantizationError(
            "the second moment of an input is not positive definite; check the checkpoint for NaN"
        )
    return lower.flip(0, 1)


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
    codes, multipliers = _compensate(
        weight / row_scale[:, None],
        moments.inverse_factor,
        block_size=block_size,
        max_code=MAX_CODE_4BIT,
        choose=_choose_multipliers,
    )
    rounded = IntegerWeight(codes=codes, multipliers=multipliers, row_scale=row_scale, bits=4)
    return refit_row_scale(rounded, weight, moments)


def compensated_rows(weight: Tensor, moments: InputMoments) -> IntegerWeight:
    """Round a weight to 8-bit codes, one scale per row, with error compensation."""
    _, row_scale = quantize_rows(weight)
    codes, multipliers = _compensate(
        weight / row_scale[:, None],
        moments.inverse_factor,
        block_size=ROW_STRIDE,
        max_code=MAX_CODE_8BIT,
        choose=lambda block, _: torch.ones_like(block[0]),
    )
    rounded = IntegerWeight(
        codes=codes, multipliers=multipliers[:, :1], row_scale=row_scale, bits=8
    )
    return refit_row_scale(rounded, weight, moments)


ROW_STRIDE = 64
"""Columns of an 8-bit weight whose updates to the rest are applied together."""


def _compensate(
    scaled: Tensor,
    inverse_factor: Tensor,
    *,
    block_size: int,
    max_code: int,
    choose: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Round column by column, each error pushed onto the columns that follow.

    A block's errors reach the rest of its block at once and later blocks in one product. The
    weight is worked on transposed: a column then lies in one piece.

    Args:
        scaled: (N, K), in units of the row scale.
        inverse_factor: U, (K, K).
        block_size: columns of a block; the last may have fewer.
        max_code: codes are ±max_code.
        choose: (block (columns, N), diagonal of its part of U) -> multipliers (N,), float.

    Returns:
        Codes (N, K) int8 and multipliers (N, blocks) int8.
    """
    remaining = scaled.to(torch.float32).mT.contiguous()  # (K, N)
    factor = inverse_factor.to(torch.float32)
    diagonal = factor.diagonal().tolist()
    codes = torch.empty_like(remaining, dtype=torch.int8)
    multipliers = []
    for start in range(0, remaining.shape[0], block_size):
        block = remaining[start : start + block_size]
        columns = slice(start, start + block.shape[0])
        local = factor[columns, columns]
        chosen = choose(block, local.diagonal())
        errors = torch.empty_like(block)
        for column, value in enumerate(block):
            code = (value / chosen).round_().clamp_(-max_code, max_code)
            torch.div(value - code * chosen, diagonal[start + column], out=errors[column])
            block[column + 1 :].addr_(local[column, column + 1 :], errors[column], alpha=-1)
            codes[start + column] = code
        multipliers.append(chosen.to(torch.int8))
        remaining[columns.stop :].addmm_(factor[columns, columns.stop :].mT, errors, alpha=-1)
    return codes.mT.contiguous(), torch.stack(multipliers, dim=1)


def refit_row_scale(rounded: IntegerWeight, weight: Tensor, moments: InputMoments) -> IntegerWeight:
    """Return the same integers with each row's best scale: (q H w) / (q H q), where positive."""
    integers = rounded.int8_rows().to(torch.float32)
    seen = integers @ moments.moment.to(torch.float32)
    power = (seen * integers).sum(dim=1, dtype=torch.float64)
    best = (seen * weight).sum(dim=1, dtype=torch.float64) / power
    usable = (power > 0) & (best > 0) & best.isfinite()
    row_scale = torch.where(usable, best.to(rounded.row_scale.dtype), rounded.row_scale)
    return replace(rounded, row_scale=row_scale)


def _choose_multipliers(block: Tensor, diagonal: Tensor) -> Tensor:
    """Return the multiplier of each row that rounds a block best, in float: (N,) of 1 … 18.

    The block (block_size, N) is in units of the row scale. A column's error counts as GPTQ counts
    it: divided by the diagonal of the factor of H⁻¹.
    """
    weights = diagonal**-2.0
    losses = []
    for multiplier in range(1, MAX_MULTIPLIER + 1):
        codes = (block / multiplier).round_().clamp_(-MAX_CODE_4BIT, MAX_CODE_4BIT)
        losses.append(weights @ torch.sub(block, codes, alpha=multiplier).square_())
    return torch.stack(losses).argmin(dim=0).to(block.dtype) + 1
