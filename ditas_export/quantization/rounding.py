"""Error-compensated rounding of a weight to two-level integer codes (GPTQ-style).

Minimises `tr (Q − W) H (Q − W)ᵀ`, H the second moment of the quantized input, column by column
(those of 4 bits in `rounding_order`): each column's rounding error is pushed onto the columns not
yet rounded, through the Cholesky factor of H⁻¹ (Frantar et al., "GPTQ", ICLR 2023). What is ours is
the grid: a block's multiplier, an integer of 1 … 18, is chosen when its block is reached, by trying
all of them.

A column's error over its pivot is a column of the whitened error: with R Rᵀ = H and U = R⁻¹, what
is pushed on adds up to `W − Q = E U`, so `(W − Q) R = E`, and `tr (Q − W) H (Q − W)ᵀ = ‖E‖²`.

H is ordered and factored in float64, once. U and rounding are in float32, whose errors are far
below a code: with a ridge of 0.01, no two values of R are further apart than √(100 K).
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

    cholesky: Tensor  # R, (K, K), upper: R Rᵀ = H + λI
    float32_cholesky: Tensor
    inverse_factor: Tensor  # U = R⁻¹, upper, float32: Uᵀ U = (H + λI)⁻¹

    @classmethod
    def from_cholesky(cls, cholesky: Tensor) -> InputMoments:
        """Prepare what follows from R, upper; float64 is advised."""
        float32_cholesky = cholesky.to(torch.float32)
        return cls(
            cholesky=cholesky,
            float32_cholesky=float32_cholesky,
            inverse_factor=upper_inverse(float32_cholesky),
        )

    def whiten(self, matrix: Tensor) -> Tensor:
        """Return matrix @ R, (N, K) float32, a column in one piece.

        R's columns are taken in panels, each down to where its zeros begin.
        """
        columns_of, cholesky = matrix.to(torch.float32).mT, self.float32_cholesky
        whitened = torch.empty_like(columns_of, memory_format=torch.contiguous_format)
        for start in range(0, whitened.shape[0], PANEL):
            own = slice(start, start + PANEL)
            torch.mm(cholesky[: own.stop, own].mT, columns_of[: own.stop], out=whitened[own])
        return whitened.mT


PANEL = 512
"""Columns of a triangular factor that are worked on at once, each down to where its zeros begin."""


def ridge_of(second_moment: Tensor, damping: float) -> Tensor:
    """Return λ = damping · mean diag H, a scalar; damping > 0."""
    return damping * second_moment.diagonal().mean().clamp(min=1e-30)


def damped(second_moment: Tensor, damping: float) -> Tensor:
    """Return H + λI with λ = damping · mean diag H, (K, K)."""
    moment = second_moment.clone()
    moment.diagonal().add_(ridge_of(second_moment, damping))
    return moment


def upper_cholesky(moment: Tensor) -> Tensor:
    """Return R, upper triangular, with R Rᵀ = moment.

    `R_jj²` is the pivot of column j: what remains of it once all later columns have absorbed what
    they can. R⁻¹ is the upper factor U of `Uᵀ U = moment⁻¹` that compensation works with.

    Raises:
        QuantizationError: the moment is not positive definite, as with NaN.
    """
    lower: Tensor
    lower, info = torch.linalg.cholesky_ex(moment.flip(0, 1))
    # What is not finite in a row of the factor makes the row's pivot not finite.
    if int(info) or not lower.diagonal().isfinite().all():
        raise QuantizationError(
            "the second moment of an input is not positive definite; check the checkpoint for NaN"
        )
    return lower.flip(0, 1)


def upper_inverse(upper: Tensor) -> Tensor:
    """Return the inverse of an upper triangular matrix, (K, K)."""
    inverse = torch.eye(upper.shape[0], dtype=upper.dtype, device=upper.device)
    for start in range(0, upper.shape[0], PANEL):
        stop = start + PANEL
        panel = inverse[:stop, start:stop]
        panel.copy_(torch.linalg.solve_triangular(upper[:stop, :stop], panel, upper=True))
    return inverse


def rounding_order(moment: Tensor, *, block_size: int) -> tuple[Tensor, Tensor]:
    """Return the order in which to round the columns of a weight, and the moment's factor in it.

    The order keeps blocks whole: (K,) int64. The factor is R, (K, K), upper triangular, with R Rᵀ =
    moment[order][:, order].

    A column's error counts as its pivot: what its input varies by, given the inputs of the columns
    rounded after it. The product of all pivots is the same in every order; their sum is small where
    they are alike. A greedy choice, from the end: last comes the block whose inputs vary least (by
    the geometric mean of its columns' variances, given the blocks already placed), and within it
    the column. (Min-pivot order, Chen et al., "The Geometry of LLM Quantization", 2025, where
    blocks are single columns.)

    It is a Cholesky factorisation with pivots, from the end: of the moment given the blocks placed,
    only the diagonal is kept up to date, and the rows of a block are made when it is chosen.

    Args:
        moment: H + λI, (K, K), positive definite.
        block_size: consecutive columns that stay together; divides K.

    Raises:
        QuantizationError: the moment is not positive definite, as with NaN.
    """
    blocks = torch.arange(moment.shape[0], device=moment.device).reshape(-1, block_size)
    variances = moment.diagonal().clone().reshape(-1, block_size)  # given the blocks placed
    factor = torch.zeros_like(moment)  # Rᵀ: rows of the columns placed, columns as in `blocks`
    by_block = factor.reshape(-1, *blocks.shape)
    for last in reversed(range(blocks.shape[0])):
        start, end = last * block_size, (last + 1) * block_size
        chosen = int(variances[: last + 1].log().mean(dim=1).argmin())
        if chosen != last:
            for part in (blocks, variances, by_block[end:].transpose(0, 1)):
                part[[chosen, last]] = part[[last, chosen]]
        remaining = moment[blocks[last]][:, blocks[: last + 1].flatten()]
        remaining -= factor[end:, start:end].mT @ factor[end:, :end]
        order = _least_varying_last(remaining[:, start:])
        remaining = remaining[order]
        upper = upper_cholesky(remaining[:, start:][:, order])
        shared = torch.linalg.solve_triangular(upper, remaining[:, :start], upper=True)
        factor[start:end, :start], factor[start:end, start:end] = shared, upper.mT
        factor[end:, start:end] = factor[end:, start:end][:, order]
        variances[:last] -= shared.square().sum(dim=0).reshape(-1, block_size)
        blocks[last] = blocks[last, order]
    return blocks.flatten(), factor.mT


def _least_varying_last(moment: Tensor) -> Tensor:
    """Return (K,) columns, from the end each the one that varies least given those after it.

    On the CPU: every choice waits for the one before.
    """
    remaining = moment.to("cpu", copy=True)
    free = list(range(moment.shape[0]))
    order = []
    while free:
        column = free.pop(int(remaining.diagonal()[free].argmin()))
        order.append(column)
        seen = remaining[column].clone()
        remaining -= torch.outer(seen, seen / seen[column])
    return torch.tensor(order[::-1], device=moment.device)


def compensated_blocks(
    weight: Tensor, whitened: Tensor, moments: InputMoments, *, block_size: int
) -> tuple[IntegerWeight, Tensor]:
    """Round a weight to 4-bit codes with error compensation.

    Args:
        weight: W, (N, K) float, finite; left untouched.
        whitened: W R, (N, K) float.
        moments: of the quantized input, K × K.
        block_size: consecutive input channels that share a multiplier; divides K.

    Returns:
        Codes, multipliers, and the row scales that fit them best in the sense of the error; and the
        whitened error (W − Ŵ) R that they leave, (N, K) float.
    """
    require_finite("a weight", weight.sum(dim=1))  # a sum shows NaN and infinities
    require_block_size(weight.shape[1], block_size)
    row_scale = initial_row_scale(weight)
    codes, multipliers, errors = _compensate(
        weight,
        row_scale,
        moments.inverse_factor,
        block_size=block_size,
        max_code=MAX_CODE_4BIT,
        choose=_choose_multipliers,
    )
    rounded = IntegerWeight(codes=codes, multipliers=multipliers, row_scale=row_scale, bits=4)
    return refit_row_scale(rounded, whitened, errors)


def compensated_rows(
    weight: Tensor, whitened: Tensor, moments: InputMoments
) -> tuple[IntegerWeight, Tensor]:
    """Round a weight to 8-bit codes, one scale per row, with error compensation.

    Args:
        weight: W, (N, K) float, finite; left untouched.
        whitened: W R, (N, K) float.
        moments: of the quantized input, K × K.

    Returns:
        Codes and scales, and the whitened error (W − Ŵ) R that they leave, (N, K) float.
    """
    _, row_scale = quantize_rows(weight)
    codes, multipliers, errors = _compensate(
        weight,
        row_scale,
        moments.inverse_factor,
        block_size=ROW_STRIDE,
        max_code=MAX_CODE_8BIT,
        choose=lambda block, _: torch.ones_like(block[0]),
    )
    rounded = IntegerWeight(
        codes=codes, multipliers=multipliers[:, :1], row_scale=row_scale, bits=8
    )
    return refit_row_scale(rounded, whitened, errors)


ROW_STRIDE = 64
"""Columns of an 8-bit weight whose updates to the rest are applied together."""


def _compensate(
    weight: Tensor,
    row_scale: Tensor,
    inverse_factor: Tensor,
    *,
    block_size: int,
    max_code: int,
    choose: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Round column by column, each error pushed onto the columns that follow.

    Within a block errors are pushed on at once; all errors before a block reach it in one product.
    The weight is worked on transposed, so that a column lies in one piece, and a block in units of
    its codes; each column's place is then taken by its error.

    Args:
        weight: (N, K) float.
        row_scale: (N,): its unit.
        inverse_factor: U, (K, K) float32.
        block_size: columns of a block; the last may have fewer.
        max_code: codes are ±max_code.
        choose: (block (columns, N), diagonal of its part of U) -> multipliers (N,), float.

    Returns:
        Codes (N, K) int8, multipliers (N, blocks) int8, and the whitened error E = (W − Q) R in
        units of the row scale, (N, K) float32.
    """
    # Of what is not yet rounded: what remains.
    errors = torch.empty(weight.mT.shape, dtype=torch.float32, device=weight.device)
    torch.div(weight.mT, row_scale, out=errors)
    codes = torch.empty_like(errors, dtype=torch.int8)
    multipliers = []
    for start in range(0, errors.shape[0], block_size):
        block = errors[start : start + block_size]
        columns = slice(start, start + block.shape[0])
        block.addmm_(inverse_factor[:start, columns].mT, errors[:start], alpha=-1)
        local = inverse_factor[columns, columns]
        diagonal = local.diagonal()
        shares = local / diagonal[:, None]
        chosen = choose(block, diagonal)
        block /= chosen
        rounded = torch.empty_like(block)
        for column, (value, code) in enumerate(zip(block, rounded, strict=True)):
            torch.round(value, out=code).clamp_(-max_code, max_code)
            value -= code
            block[column + 1 :].addr_(shares[column, column + 1 :], value, alpha=-1)
        block *= chosen
        block /= diagonal[:, None]
        codes[columns] = rounded
        multipliers.append(chosen.to(torch.int8))
    return codes.mT.contiguous(), torch.stack(multipliers, dim=1), errors.mT


def refit_row_scale(
    rounded: IntegerWeight, whitened: Tensor, errors: Tensor
) -> tuple[IntegerWeight, Tensor]:
    """Give the same integers each row's best scale: (Q H w) / (Q H Q), where positive.

    Args:
        rounded: codes, multipliers, and the row scale r that they were made with.
        whitened: W R, (N, K); R Rᵀ = H.
        errors: (W / r − Q) R, (N, K).

    Returns:
        The integers, and the whitened error (W − Ŵ) R that they now leave, (N, K) float.
    """
    before = rounded.row_scale
    integers = (whitened / before[:, None]).sub_(errors)  # Q R
    power = torch.linalg.vector_norm(integers, dim=1).square()
    best = integers.mul_(whitened).sum(dim=1) / power
    usable = (power > 0) & (best > 0) & best.isfinite()
    row_scale = torch.where(usable, best.to(before.dtype), before)
    # Not W R less what the integers make of it: that would cost the digits of a small error.
    left_over = torch.mul(errors, row_scale[:, None], out=integers)
    left_over.addcmul_(whitened, ((before - row_scale) / before)[:, None])
    return replace(rounded, row_scale=row_scale), left_over


def _choose_multipliers(block: Tensor, diagonal: Tensor) -> Tensor:
    """Return the multiplier of each row that rounds a block best, in float: (N,) of 1 … 18.

    The block (block_size, N) is in units of the row scale. A column's error counts as GPTQ counts
    it: divided by the diagonal of the factor of H⁻¹.
    """
    weights = diagonal**-2.0
    error = torch.empty_like(block)
    best = torch.ones_like(block[0])
    least = torch.full_like(best, torch.inf)
    for multiplier in range(1, MAX_MULTIPLIER + 1):
        torch.div(block, multiplier, out=error).round_().clamp_(-MAX_CODE_4BIT, MAX_CODE_4BIT)
        torch.sub(block, error, alpha=multiplier, out=error).square_()
        loss = weights @ error
        best.masked_fill_(loss < least, multiplier)
        torch.minimum(loss, least, out=least)
    return best
