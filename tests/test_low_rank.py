from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from quantized_fixture import folded_linear
from test_rounding import correlated_moment, moments_of, quadratic_error, random_weight
from torch import Tensor

from ditas_export.calibration.modules import FakeQuantLinear
from ditas_export.errors import QuantizationError
from ditas_export.quantization.low_rank import (
    DIVISORS,
    ROUNDING_WEIGHT,
    Factors,
    SampledCodes,
    fit_output_error,
    fit_weight_error,
    integer_low_rank,
    truncated_svd,
)

EVEN = torch.ones(20, dtype=torch.float64)


def with_singular_values(values: Tensor, rows: int, columns: int) -> Tensor:
    """A random matrix of these singular values, float64."""
    left = torch.linalg.qr(random_weight(rows, len(values), seed=2)).Q
    right = torch.linalg.qr(random_weight(columns, len(values), seed=3)).Q
    return left * values @ right.T


SPECTRA = {
    "flat": random_weight(60, 90),
    "equal": with_singular_values(torch.ones(60), 60, 90),
    "steep": with_singular_values(10.0 ** -torch.arange(60), 60, 90),
    "planted": random_weight(60, 90) + 100 * random_weight(60, 5) @ random_weight(5, 90),
    "pairs": with_singular_values(torch.arange(30.0).repeat_interleave(2), 60, 90),
    "zero": torch.zeros(60, 90, dtype=torch.float64),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tall", [False, True], ids=["wide", "tall"])
def test_truncated_svd_is_the_best_approximation(name: str, dtype: torch.dtype, tall: bool) -> None:
    """Against the exact SVD in float64; the bound on the energy is the docstring's."""
    matrix = (SPECTRA[name].T if tall else SPECTRA[name]).to(dtype)
    values = torch.linalg.svdvals(matrix.double())
    energy = float(values.square().sum())
    for rank in (1, 4, 32, 59, 60):
        left, right = truncated_svd(matrix, rank)
        assert left.dtype == right.dtype == dtype
        assert left.shape == (matrix.shape[0], rank)
        error = float((matrix.double() - left.double() @ right.double()).square().sum())
        best = float(values[rank:].square().sum())
        assert best - 1e-12 * energy <= error <= best + 2 * rank * torch.finfo(dtype).eps * energy
        basis = left if left.shape[0] <= right.shape[1] else right.mT
        unit = torch.eye(rank, dtype=dtype)
        assert torch.allclose(basis.mT @ basis, unit, atol=8 * torch.finfo(dtype).eps)


LARGE_SPECTRA = {
    "flat": random_weight(600, 800),
    "square": random_weight(600, 600),
    "equal": with_singular_values(torch.ones(600), 600, 800),
    "steep": with_singular_values(10.0 ** -torch.arange(600).clamp(max=60), 600, 800),
    "slow": with_singular_values((torch.arange(600.0) + 1) ** -0.5, 600, 800),
    "planted": random_weight(600, 800) + 100 * random_weight(600, 5) @ random_weight(5, 800),
    "pairs": with_singular_values(torch.arange(300.0).repeat_interleave(2), 600, 800),
    "zero": torch.zeros(600, 800, dtype=torch.float64),
    "tiny": 1e-14 * random_weight(600, 800),
    "huge": 1e14 * random_weight(600, 800),
    "step": with_singular_values(torch.where(torch.arange(600) < 32, 1.0, 0.98), 600, 800),
}

SHORTFALL = {"step": 0.04}
"""What may be missing of the best energy, where it is more than a thousandth: squares of 0.98."""


@pytest.mark.parametrize("name", LARGE_SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_large_truncated_svd_has_nearly_all_of_the_best_energy(
    name: str, dtype: torch.dtype
) -> None:
    """Where the subspace is iterated; against singular values in float64, by the docstring."""
    wide = LARGE_SPECTRA[name].to(dtype)
    values = torch.linalg.svdvals(wide.double())
    energy = float(values.square().sum())
    for rank, matrix in ((1, wide), (4, wide.T), (32, wide), (32, wide.T)):
        left, right = truncated_svd(matrix, rank)
        assert left.dtype == right.dtype == dtype
        error = float((matrix.double() - left.double() @ right.double()).square().sum())
        best = float(values[rank:].square().sum())
        short = SHORTFALL.get(name, 1e-3) * float(values[:rank].square().sum())
        assert best - 1e-12 * energy <= error
        assert error <= best + short + 2 * rank * torch.finfo(dtype).eps * energy
        basis = left if left.shape[0] <= right.shape[1] else right.mT
        # Two orthonormal factors multiplied, each of a few roundings.
        unit = torch.eye(rank, dtype=dtype)
        assert torch.allclose(basis.mT @ basis, unit, atol=32 * torch.finfo(dtype).eps)
        again = truncated_svd(matrix, rank)
        assert torch.equal(left, again[0])
        assert torch.equal(right, again[1])


def test_the_weight_fit_is_the_best_up_to_the_rounding_of_its_factor() -> None:
    matrix = random_weight(20, 48)
    values = torch.linalg.svdvals(matrix)
    best = float(values[4:].square().sum())
    factors = fit_weight_error(matrix, 4)
    error = float((matrix - factors.product()).square().sum())
    # INT8 rows err by 1/254 of their largest value: well under one per cent of the total.
    assert best <= error < 1.01 * best


def test_the_output_fit_is_the_best_in_the_moment_and_beats_the_weight_fit() -> None:
    matrix = random_weight(20, 48)
    moments = moments_of(correlated_moment(48), damping=0.01)
    values = torch.linalg.svdvals(matrix @ moments.cholesky)
    best = float(values[4:].square().sum())
    error = quadratic_error(
        matrix - fit_output_error(matrix @ moments.cholesky, moments, 4, EVEN).product(), moments
    )
    plain = quadratic_error(matrix - fit_weight_error(matrix, 4).product(), moments)
    # The moment's condition number amplifies the INT8 rounding of the input factor.
    assert best <= error < 1.05 * best
    assert error < plain


def test_an_error_of_nothing_has_factors_of_nothing() -> None:
    moments = moments_of(correlated_moment(48), damping=0.01)
    factors = fit_output_error(torch.zeros(20, 48), moments, 3, EVEN.float())
    assert torch.equal(factors.product(), torch.zeros_like(factors.product()))


def test_left_is_solved_for_the_rounded_right() -> None:
    matrix = random_weight(20, 48)
    moments = moments_of(correlated_moment(48), damping=0.01)
    factors = fit_output_error(matrix @ moments.cholesky, moments, 3, EVEN)
    error = quadratic_error(matrix - factors.product(), moments)
    for sign in (-1, 1):
        moved = (factors.left * (1 + sign * 1e-3)) @ factors.right()
        assert quadratic_error(matrix - moved, moments) > error


def test_ranks_that_do_not_exist_are_refused() -> None:
    for rank in (0, 7):
        with pytest.raises(QuantizationError, match=f"rank={rank} of a 6x9 matrix"):
            truncated_svd(random_weight(6, 9), rank)


def test_output_weights_spend_the_rank_where_errors_count() -> None:
    """Scaling rows up and their weights down is no change at all: the fit is the same."""
    matrix = random_weight(20, 48)
    moments = moments_of(correlated_moment(48), damping=0.01)
    scale = torch.ones(20, dtype=torch.float64)
    scale[3:5] = 50.0
    plain = fit_output_error(matrix @ moments.cholesky, moments, 4, EVEN)
    scaled = fit_output_error(scale[:, None] * matrix @ moments.cholesky, moments, 4, 1 / scale)
    expected = plain.product() * scale[:, None]
    assert torch.allclose(scaled.product(), expected, rtol=1e-6, atol=1e-9)


EVERY_ROW = torch.ones(200, dtype=torch.float64)


def sampled(mean: Tensor) -> SampledCodes:
    """Codes of 200 normal tokens about a mean, (K,) or (200, K), each in its own range."""
    x = torch.randn(200, mean.shape[-1], generator=torch.Generator().manual_seed(1)) + mean
    ranges = x.abs().amax(dim=1, keepdim=True)
    return SampledCodes(codes=(x / ranges * 127).round().to(torch.int8), ranges=ranges)


def fitted_and_sample(seed: int = 0) -> tuple[Factors, torch.Tensor, SampledCodes]:
    """Factors of a weight error, the row scales they meet, and inputs: columns of uneven size."""
    generator = torch.Generator().manual_seed(seed)
    factors = fit_weight_error(
        random_weight(200, 48) @ torch.diag(torch.logspace(-2, 0, 48)).double(), 4
    )
    row_scale = 0.02 * torch.rand(200, generator=generator, dtype=torch.float64) + 0.005
    x = torch.randn(200, 48, generator=generator)
    codes = (x / x.abs().amax(dim=1, keepdim=True) * 127).round().to(torch.int8)
    ranges = torch.rand(200, 1, generator=generator) + 0.5
    return factors, row_scale, SampledCodes(codes=codes, ranges=ranges)


def branch_error(
    factors: Factors,
    row_scale: Tensor,
    sample: SampledCodes,
    divisor: Tensor,
    *,
    output_weights: Tensor = EVERY_ROW,
    centred: bool = False,
) -> Tensor:
    """The weighed energy that each column of an integer branch loses on the sample.

    Where `centred`, less the mean that the bias mends: of what the branch would lose if its inner
    product were not rounded.
    """
    units = factors.left * factors.right_scale / row_scale[:, None]
    products = sample.codes.double() @ factors.right_codes.double().mT
    p, left = (products / divisor).round().clamp(-128, 127), (units * divisor).round()
    left = left.clamp(-127, 127)
    unrounded = torch.einsum("tr,nr->rtn", products / divisor, left)
    by_left = (unrounded - torch.einsum("tr,nr->rtn", products, units)) * sample.ranges.double()
    by_rounding = (torch.einsum("tr,nr->rtn", p, left) - unrounded) * sample.ranges.double()
    if centred:
        by_left -= by_left.mean(dim=1, keepdim=True)
    energy = by_left.square() + ROUNDING_WEIGHT * by_rounding.square()
    return (energy * (row_scale * output_weights).square()).sum(dim=(1, 2))


def least_branch_error(
    factors: Factors,
    row_scale: Tensor,
    sample: SampledCodes,
    *,
    output_weights: Tensor = EVERY_ROW,
    centred: bool = False,
) -> Tensor:
    """The least `branch_error` of a dense search over divisors, column by column."""
    return torch.stack(
        [
            branch_error(
                factors,
                row_scale,
                sample,
                divisor * torch.ones(4),
                output_weights=output_weights,
                centred=centred,
            )
            for divisor in range(1, 1001, 4)
        ]
    ).amin(dim=0)


NEARLY = 1.1
"""Four divisors to an octave; the dense search also finds lucky ones between."""


def test_the_divisor_gives_the_branch_the_least_error() -> None:
    """Against a dense search over divisors, column by column, every product written out."""
    factors, row_scale, sample = fitted_and_sample()
    branch = integer_low_rank(factors, row_scale, EVERY_ROW, sample, centred=False)
    assert torch.equal(branch.right_codes, factors.right_codes)
    got = branch_error(factors, row_scale, sample, branch.divisor)
    assert (got < NEARLY * least_branch_error(factors, row_scale, sample)).all()


def test_a_mean_that_the_bias_mends_does_not_choose_the_divisor() -> None:
    """With a constant channel: what is chosen for the whole error loses more of what is left."""
    factors, row_scale, sample = fitted_and_sample()
    row_scale = row_scale * 8  # coarse output codes, which are wrong for the mean first
    sample = sampled(torch.zeros(48).index_fill(0, torch.tensor(44), 30.0))
    branch, other = (
        integer_low_rank(factors, row_scale, EVERY_ROW, sample, centred=centred)
        for centred in (True, False)
    )
    got, uncentred = (
        branch_error(factors, row_scale, sample, each.divisor, centred=True)
        for each in (branch, other)
    )
    # Codes that hardly change from token to token share a rounding error: luckier ones are to find.
    assert (got < 1.3 * least_branch_error(factors, row_scale, sample, centred=True)).all()
    assert (uncentred > 1.5 * got).all()


def test_errors_of_an_output_count_by_its_weight() -> None:
    """Half of the outputs are ten times as large, and count a hundredth."""
    factors, row_scale, sample = fitted_and_sample()
    size = torch.where(torch.arange(200) < 100, 10.0, 1.0).double()
    factors = replace(factors, left=factors.left * size[:, None])
    weights = 1 / size**2
    branch, other = (
        integer_low_rank(factors, row_scale, each, sample, centred=False)
        for each in (weights, EVERY_ROW)
    )
    got, unweighted = (
        branch_error(factors, row_scale, sample, each.divisor, output_weights=weights)
        for each in (branch, other)
    )
    least = least_branch_error(factors, row_scale, sample, output_weights=weights)
    assert (got < NEARLY * least).all()
    assert (unweighted > 3 * got).all()


def test_errors_of_a_token_count_by_its_range() -> None:
    """Half of the tokens have a hundred times the range, and small codes but for one channel."""
    factors, row_scale, _ = fitted_and_sample()
    loud = torch.zeros(200, 48)
    loud[:100, 0] = 30.0
    ranges = torch.where(torch.arange(200) < 100, 100.0, 1.0)[:, None]
    sample = replace(sampled(loud), ranges=ranges)
    even = replace(sample, ranges=torch.ones(200, 1))
    branch, other = (
        integer_low_rank(factors, row_scale, EVERY_ROW, each, centred=False)
        for each in (sample, even)
    )
    got, of_even = (
        branch_error(factors, row_scale, sample, each.divisor) for each in (branch, other)
    )
    assert (got < 1.2 * least_branch_error(factors, row_scale, sample)).all()
    assert (of_even > 3 * got).all()


def test_a_column_that_rounds_to_nothing_overflows_nowhere() -> None:
    """Three of four columns fit no error: their codes are noise, of any size, times nothing."""
    linear = folded_linear(96, rank=0, static_range=40.0, dtype=torch.float16)
    row_scale = linear.weight.row_scale.double()
    factors = fit_weight_error(row_scale[:, None] * random_weight(1, 96), 4)
    assert (factors.right_codes.abs().amax(dim=1) == 127).all()
    branch = integer_low_rank(
        factors, row_scale, torch.ones(80), sampled(torch.zeros(96)), centred=False
    )
    nothing = ~branch.left_codes.any(dim=0)
    assert nothing.sum() == 3
    assert (branch.divisor[nothing] == DIVISORS[-1]).all()
    linear = replace(linear, low_rank=branch)
    module = FakeQuantLinear(linear, ranges="static", activation_bits=8)
    aligned = 40.0 * branch.right_codes.sign().half()
    largest = 40.0 * branch.right_codes.float().abs().sum(dim=1)
    assert (largest[nothing] > torch.finfo(torch.float16).max).all()  # with a divisor of 1
    assert module(aligned).isfinite().all()


def test_the_branch_is_the_factors_up_to_its_rounding() -> None:
    factors, row_scale, sample = fitted_and_sample()
    row_scale = row_scale * 64  # room for all of the output factor
    branch = integer_low_rank(factors, row_scale, torch.ones(200), sample, centred=False)
    assert branch.left_codes.abs().amax() < 127
    # Half a unit of the output factor, times the input factor.
    bound = 0.5 * row_scale[:, None] * branch.right(torch.float64).abs().sum(dim=0)
    assert ((branch.dequantize(row_scale) - factors.product()).abs() <= 1.001 * bound).all()


def test_the_divisors_are_odd_with_normal_halves_as_reciprocals() -> None:
    assert all(divisor % 2 == 1 for divisor in DIVISORS)
    assert DIVISORS[0] == 1
    assert 1 / DIVISORS[-1] >= torch.finfo(torch.float16).tiny
    ratios = [after / before for before, after in itertools.pairwise(DIVISORS[8:])]
    assert max(ratios) < 1.3
