from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ditas_export.errors import QuantizationError
from ditas_export.quantization import rounding
from ditas_export.quantization.integer import IntegerWeight, round_to_blocks, round_to_rows
from ditas_export.quantization.rounding import (
    InputMoments,
    compensated_blocks,
    compensated_rows,
    damped,
    refit_row_scale,
    rounding_order,
    upper_cholesky,
)


def correlated_moment(size: int, seed: int = 0) -> Tensor:
    """A second moment of inputs that share directions, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size // 2, generator=generator, dtype=torch.float64)
    noise = 0.03 * torch.eye(size, dtype=torch.float64)
    return mixing @ mixing.T / size + noise


def random_weight(rows: int, columns: int, seed: int = 1) -> Tensor:
    return torch.randn(
        rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def quadratic_error(difference: Tensor, moments: InputMoments) -> float:
    """tr D (H + λI) Dᵀ of a weight difference D, (N, K)."""
    return float((difference @ moments.cholesky).square().sum())


def moments_of(moment: Tensor, *, damping: float) -> InputMoments:
    """What rounding needs to know of H + λI."""
    return InputMoments.from_cholesky(upper_cholesky(damped(moment, damping)))


def rounded_blocks(
    weight: Tensor, moments: InputMoments, *, block_size: int
) -> tuple[IntegerWeight, Tensor]:
    return compensated_blocks(weight, moments.whiten(weight), moments, block_size=block_size)


def test_factors_are_what_they_say() -> None:
    moment = correlated_moment(24)
    upper = upper_cholesky(moment)
    assert torch.equal(upper, upper.triu())
    assert torch.allclose(upper @ upper.T, moment, atol=1e-12)
    assert torch.allclose(
        damped(moment, 0.01), moment + 0.01 * moment.diagonal().mean() * torch.eye(24)
    )


def test_the_inverse_factor_is_the_inverse(monkeypatch: pytest.MonkeyPatch) -> None:
    """In panels that do not divide the columns; float32, against float64."""
    monkeypatch.setattr(rounding, "PANEL", 20)
    moments = moments_of(correlated_moment(48), damping=0.01)
    factor = moments.inverse_factor
    assert factor.dtype == torch.float32
    assert torch.equal(factor, factor.triu())
    exact = torch.linalg.inv(moments.cholesky)
    # Float32 times the condition number of R, below 100.
    assert (factor - exact).norm() < 1e-5 * exact.norm()


def test_a_whitened_error_has_the_energy_of_the_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """In panels that do not divide the columns; against the quadratic form in float64."""
    monkeypatch.setattr(rounding, "PANEL", 20)
    moments = moments_of(correlated_moment(48), damping=0.01)
    difference = random_weight(5, 48)
    whitened = moments.whiten(difference)
    assert whitened.dtype == torch.float32
    assert torch.allclose(whitened.double(), difference @ moments.cholesky, atol=1e-5)
    energy = float(whitened.square().sum())
    assert energy == pytest.approx(quadratic_error(difference, moments), rel=1e-5)


def unequal_moment(size: int, seed: int = 0) -> Tensor:
    """Correlated inputs of which some vary a hundred times as much as others."""
    spread = torch.logspace(-1, 1, size, dtype=torch.float64)
    spread = spread[torch.randperm(size, generator=torch.Generator().manual_seed(seed))]
    return damped(correlated_moment(size, seed) * spread[:, None] * spread, 0.01)


def conditional_variances(moment: Tensor, columns: list[int], given: list[int]) -> Tensor:
    """The diagonal of `H_aa − H_ag H_gg⁻¹ H_ga`."""
    explained = moment[columns][:, given] @ torch.linalg.inv(moment[given][:, given])
    left_over = moment[columns][:, columns] - explained @ moment[given][:, columns]
    return left_over.diagonal()


@pytest.mark.parametrize(("size", "block_size"), [(48, 1), (48, 8), (30, 10), (16, 16)])
def test_the_least_varying_columns_are_rounded_last(size: int, block_size: int) -> None:
    """Each choice, of a block and of a column in it, against variances by matrix inverses."""
    moment = unequal_moment(size)
    columns, factor = rounding_order(moment, block_size=block_size)
    assert torch.equal(factor, factor.triu())
    assert torch.allclose(factor @ factor.T, moment[columns][:, columns], rtol=1e-10, atol=1e-10)
    order = columns.tolist()
    assert sorted(order) == list(range(size))
    blocks = {start // block_size for start in range(0, size, block_size)}
    for end in range(size, 0, -block_size):
        placed, own = order[end:], order[end - block_size : end]
        means = {
            block: conditional_variances(
                moment, list(range(block * block_size, (block + 1) * block_size)), placed
            ).log().mean()
            for block in blocks
        }  # fmt: skip
        expected = min(means, key=lambda block: float(means[block]))
        assert {column // block_size for column in own} == {expected}
        blocks.remove(expected)
        for place in range(block_size - 1, -1, -1):
            free, after = own[: place + 1], own[place + 1 :] + placed
            assert int(conditional_variances(moment, free, after).argmin()) == place


@pytest.mark.parametrize("broken", [torch.inf, -torch.inf, torch.nan, -1.0])
def test_a_moment_that_is_not_positive_definite_is_refused_in_any_order(broken: float) -> None:
    for place in range(24):
        moment = unequal_moment(24)
        moment[place, place] = broken
        with pytest.raises(QuantizationError, match="check the checkpoint for NaN"):
            rounding_order(moment, block_size=8)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_order_lowers_the_error_of_compensation(seed: int) -> None:
    weight, moment = random_weight(64, 96, seed), unequal_moment(96, seed)
    order, _ = rounding_order(moment, block_size=16)
    errors = []
    for columns in (torch.arange(96), order, order.flip(0)):
        moments = moments_of(moment[columns][:, columns], damping=1e-9)
        rounded, _ = rounded_blocks(weight[:, columns], moments, block_size=16)
        difference = weight - rounded.take(columns.argsort()).dequantize()
        errors.append(float(((difference @ moment) * difference).sum()))
    as_given, ordered, reversed_ = errors
    assert ordered < 0.95 * as_given
    assert ordered < 0.95 * reversed_


def test_columns_are_taken_with_their_blocks() -> None:
    rounded = round_to_blocks(random_weight(5, 32), block_size=8)
    order = (torch.tensor([24, 8, 0, 16])[:, None] + torch.arange(8).roll(3)).flatten()
    taken = rounded.take(order)
    assert torch.equal(taken.dequantize(), rounded.dequantize()[:, order])
    assert torch.equal(taken.take(order.argsort()).multipliers, rounded.multipliers)


@pytest.mark.parametrize("block_size", [8, 16, 48])
def test_compensation_beats_nearest_on_the_output(block_size: int) -> None:
    weight = random_weight(32, 96)
    moments = moments_of(correlated_moment(96), damping=0.01)
    nearest = round_to_blocks(weight, block_size=block_size)
    compensated, _ = rounded_blocks(weight, moments, block_size=block_size)
    error_nearest = quadratic_error(weight - nearest.dequantize(), moments)
    error_compensated = quadratic_error(weight - compensated.dequantize(), moments)
    # The point of the algorithm; on such inputs the gain is several dB, not a few per cent.
    assert error_compensated < 0.5 * error_nearest


def test_compensation_beats_nearest_in_8_bits() -> None:
    weight = random_weight(32, 96)
    moments = moments_of(correlated_moment(96), damping=0.01)
    error_nearest = quadratic_error(weight - round_to_rows(weight).dequantize(), moments)
    compensated, _ = compensated_rows(weight, moments.whiten(weight), moments)
    assert compensated.bits == 8
    assert quadratic_error(weight - compensated.dequantize(), moments) < 0.5 * error_nearest


def round_column_by_column(
    weight: Tensor, moment: Tensor, *, scale: Tensor, block_size: int, multipliers: range, top: int
) -> Tensor:
    """A literal transcription, float64: fix one column, re-solve all later ones by least squares.

    At the start of a block every multiplier is tried on it; an error counts by its column's pivot,
    what the column leaves of H once all later ones have absorbed what they can.
    """
    remaining = weight / scale[:, None]
    inverses = [torch.linalg.inv(moment[column:, column:]) for column in range(len(moment))]
    chosen = torch.ones(len(weight), dtype=weight.dtype)
    values = torch.zeros_like(remaining)
    for column, inverse in enumerate(inverses):
        if column % block_size == 0:
            block = remaining[:, column : column + block_size]
            pivots = torch.stack([1 / inv[0, 0] for inv in inverses[column : column + block_size]])
            errors = [
                ((block - (block / m).round().clamp(-top, top) * m) ** 2 * pivots).sum(1)
                for m in multipliers
            ]
            chosen = torch.stack(errors).argmin(0).double() + multipliers.start
        values[:, column] = (remaining[:, column] / chosen).round().clamp(-top, top) * chosen
        error = remaining[:, column] - values[:, column]
        remaining[:, column:] -= error[:, None] * (inverse[0] / inverse[0, 0])
    return values


def test_8_bit_compensation_is_the_column_by_column_algorithm() -> None:
    weight = random_weight(3, 150)  # two and a part of the strides
    moments = moments_of(correlated_moment(150), damping=0.01)
    scale = weight.abs().amax(dim=1) / 127
    expected = round_column_by_column(
        weight,
        moments.cholesky @ moments.cholesky.T,
        scale=scale,
        block_size=150,
        multipliers=range(1, 2),
        top=127,
    )
    got, _ = compensated_rows(weight, moments.whiten(weight), moments)
    # Float32 against float64: a code may differ where both lie within 1e-4 of a tie, and what
    # follows in its row then differs too; no such tie is met here.
    assert torch.equal(got.codes, expected.to(torch.int8))


@pytest.mark.parametrize("block_size", [16, 48])
def test_4_bit_compensation_is_the_column_by_column_algorithm(block_size: int) -> None:
    weight = random_weight(8, 144)
    moments = moments_of(correlated_moment(144), damping=0.01)
    scale = weight.abs().amax(dim=1) / 126
    expected = round_column_by_column(
        weight,
        moments.cholesky @ moments.cholesky.T,
        scale=scale,
        block_size=block_size,
        multipliers=range(1, 19),
        top=7,
    )
    got, _ = rounded_blocks(weight, moments, block_size=block_size)
    assert torch.equal(got.int8_rows(), expected.to(torch.int8))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 100), rows=st.integers(1, 6))
def test_with_an_identity_moment_codes_are_the_nearest(seed: int, rows: int) -> None:
    weight = random_weight(rows, 32, seed)
    moments = moments_of(torch.eye(32, dtype=torch.float64), damping=1e-6)
    got, _ = compensated_rows(weight, moments.whiten(weight), moments)
    assert torch.equal(got.codes, round_to_rows(weight).codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_refitted_row_scale_is_the_best_one(bits: int) -> None:
    """Against (Q H w) / (Q H Q) in float64 and its neighbours; and what it leaves, whitened."""
    weight = random_weight(4, 144)
    moments = moments_of(correlated_moment(144), damping=0.01)
    rounded, left_over = (
        rounded_blocks(weight, moments, block_size=16)
        if bits == 4
        else compensated_rows(weight, moments.whiten(weight), moments)
    )
    integers = rounded.int8_rows().double()
    seen = integers @ moments.cholesky @ moments.cholesky.T
    expected = (seen * weight).sum(1) / (seen * integers).sum(1)
    # Q R is what float32 rounding leaves of W R less the errors: 1e-6 of W R.
    assert torch.allclose(rounded.row_scale, expected, rtol=1e-5, atol=0)
    exact = (weight - rounded.dequantize()) @ moments.cholesky
    # Float32: values of up to 127 steps against errors of a third of a step.
    assert (left_over - exact).norm() < 1e-4 * exact.norm()
    best = quadratic_error(weight - rounded.dequantize(), moments)
    for factor in (0.99, 1.01):
        other = integers * (rounded.row_scale * factor)[:, None]
        assert quadratic_error(weight - other, moments) > best


def test_a_row_scale_without_a_better_one_stays() -> None:
    """Rows of zeros, and integers that point away from their weight."""
    moments = moments_of(torch.eye(16, dtype=torch.float64), damping=1e-6)
    weight = random_weight(3, 16)
    weight[1] = 0
    rounded = round_to_blocks(weight, block_size=16)
    rounded = replace(rounded, codes=rounded.codes * torch.tensor([[-1], [1], [1]]).to(torch.int8))
    errors = moments.whiten(weight / rounded.row_scale[:, None] - rounded.int8_rows())
    refitted, _ = refit_row_scale(rounded, moments.whiten(weight), errors)
    assert torch.equal(refitted.row_scale[:2], rounded.row_scale[:2])
    assert refitted.row_scale[2] != rounded.row_scale[2]


def test_input_is_left_alone_and_a_zero_row_stays_zero() -> None:
    weight = random_weight(4, 32)
    weight[2] = 0
    before = weight.clone()
    moments = moments_of(correlated_moment(32), damping=0.01)
    rounded, _ = rounded_blocks(weight, moments, block_size=16)
    assert torch.equal(weight, before)
    assert (rounded.dequantize()[2] == 0).all()
    assert rounded.row_scale[2] == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("row", "column"), [(0, 0), (5, 3), (23, 0), (23, 22)])
def test_a_moment_that_is_not_finite_is_refused(bad: float, row: int, column: int) -> None:
    moment = correlated_moment(24)
    moment[row, column] = moment[column, row] = bad
    with pytest.raises(QuantizationError, match="not positive definite"):
        upper_cholesky(moment)


def test_refusals() -> None:
    moments = moments_of(correlated_moment(8), damping=0.01)
    with pytest.raises(QuantizationError, match="not positive definite"):
        moments_of(-torch.eye(4, dtype=torch.float64), damping=0.01)
    with pytest.raises(QuantizationError, match="does not divide"):
        rounded_blocks(random_weight(2, 8), moments, block_size=3)
    for bad in (float("nan"), float("inf"), -float("inf")):
        weight = random_weight(2, 8)
        weight[1, 5] = bad
        with pytest.raises(QuantizationError, match="NaN or infinity"):
            rounded_blocks(weight, moments, block_size=4)
