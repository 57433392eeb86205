from __future__ import annotations

import pytest
import torch
from test_rounding import correlated_moment, random_weight

from ditas_export.errors import QuantizationError
from ditas_export.quantization.low_rank import fit_output_error, fit_weight_error, truncated_svd
from ditas_export.quantization.rounding import InputMoments, quadratic_error

EVEN = torch.ones(20, dtype=torch.float64)


def test_truncated_svd_is_exact_at_full_rank_and_errs_less_with_rank() -> None:
    matrix = random_weight(6, 9)
    errors = []
    for rank in range(1, 7):
        left, right = truncated_svd(matrix, rank)
        errors.append(float((matrix - left @ right).norm()))
        assert torch.allclose(right @ right.T, torch.eye(rank, dtype=torch.float64), atol=1e-12)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-12


def test_the_weight_fit_is_the_best_up_to_the_rounding_of_its_factor() -> None:
    matrix = random_weight(20, 48)
    values = torch.linalg.svdvals(matrix)
    best = float(values[4:].square().sum())
    factors = fit_weight_error(matrix, 4)
    error = float((matrix - factors.dequantize()).square().sum())
    # INT8 rows err by 1/254 of their largest value: well under one per cent of the total.
    assert best <= error < 1.01 * best


def test_the_output_fit_is_the_best_in_the_moment_and_beats_the_weight_fit() -> None:
    matrix = random_weight(20, 48)
    moments = InputMoments.from_second_moment(correlated_moment(48), damping=0.01)
    values = torch.linalg.svdvals(matrix @ moments.cholesky)
    best = float(values[4:].square().sum())
    error = quadratic_error(
        matrix - fit_output_error(matrix, moments, 4, EVEN).dequantize(), moments
    )
    plain = quadratic_error(matrix - fit_weight_error(matrix, 4).dequantize(), moments)
    # The moment's condition number amplifies the INT8 rounding of the input factor.
    assert best <= error < 1.05 * best
    assert error < plain


def test_left_is_solved_for_the_rounded_right() -> None:
    matrix = random_weight(20, 48)
    moments = InputMoments.from_second_moment(correlated_moment(48), damping=0.01)
    factors = fit_output_error(matrix, moments, 3, EVEN)
    error = quadratic_error(matrix - factors.dequantize(), moments)
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
    plain = fit_output_error(matrix, moments, 4, EVEN)
    scaled = fit_output_error(matrix * scale[:, None], moments, 4, 1 / scale)
    expected = plain.dequantize() * scale[:, None]
    assert torch.allclose(scaled.dequantize(), expected, rtol=1e-6, atol=1e-9)
