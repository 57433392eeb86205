from __future__ import annotations

import itertools

import pytest
import torch
from test_rounding import correlated_moment, quadratic_error, random_weight
from torch import Tensor

from ditas_export.errors import QuantizationError
from ditas_export.quantization.low_rank import (
    DIVISORS,
    Factors,
    SampledCodes,
    fit_output_error,
    fit_weight_error,
    integer_low_rank,
    truncated_svd,
)
from ditas_export.quantization.rounding import InputMoments

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
    moments = InputMoments.from_second_moment(correlated_moment(48), damping=0.01)
    values = torch.linalg.svdvals(matrix @ moments.cholesky)
    best = float(values[4:].square().sum())
    error = quadratic_error(
        matrix - fit_output_error(matrix @ moments.cholesky, moments, 4, EVEN).product(), moments
    )
    plain = quadratic_error(matrix - fit_weight_error(matrix, 4).product(), moments)
    # The moment's condition number amplifies the INT8 rounding of the input factor.
    assert best <= error < 1.05 * best
    assert error < plain


def test_left_is_solved_for_the_rounded_right() -> None:
    matrix = random_weight(20, 48)
    moments = InputMoments.from_second_moment(correlated_moment(48), damping=0.01)
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
    moments = InputMoments.from_second_moment(correlated_moment(48), damping=0.01)
    scale = torch.ones(20, dtype=torch.float64)
    scale[3:5] = 50.0
    plain = fit_output_error(matrix @ moments.cholesky, moments, 4, EVEN)
    scaled = fit_output_error(scale[:, None] * matrix @ moments.cholesky, moments, 4, 1 / scale)
    expected = plain.product() * scale[:, None]
    assert torch.allclose(scaled.product(), expected, rtol=1e-6, atol=1e-9)


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
    factors: Factors, row_scale: Tensor, sample: SampledCodes, divisor: Tensor
) -> Tensor:
    """The energy that each column of an integer branch of these divisors loses on the sample."""
    units = factors.left * factors.right_scale / row_scale[:, None]
    products = sample.codes.double() @ factors.right_codes.double().mT
    p, left = (products / divisor).round().clamp(-128, 127), (units * divisor).round()
    left = left.clamp(-127, 127)
    wanted = torch.einsum("tr,nr->rtn", products, units) * row_scale
    got = torch.einsum("tr,nr->rtn", p, left) * row_scale
    return ((got - wanted) * sample.ranges.double()).square().sum(dim=(1, 2))


def test_the_divisor_gives_the_branch_the_least_error() -> None:
    """Against a dense search over divisors, column by column, every product written out."""
    factors, row_scale, sample = fitted_and_sample()
    branch = integer_low_rank(factors, row_scale, torch.ones(200), sample, centred=False)
    assert torch.equal(branch.right_codes, factors.right_codes)
    got = branch_error(factors, row_scale, sample, branch.divisor)
    searched = torch.stack(
        [branch_error(factors, row_scale, sample, d * torch.ones(4)) for d in range(1, 4001, 8)]
    )
    # Four divisors to an octave; the full search also finds lucky ones between.
    assert (got < 1.1 * searched.amin(dim=0)).all()


def test_the_branch_is_the_factors_up_to_its_rounding() -> None:
    factors, row_scale, sample = fitted_and_sample()
    row_scale = row_scale * 16  # room for all of the output factor
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
