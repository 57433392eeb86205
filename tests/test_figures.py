from __future__ import annotations

import math

import pytest

from ditas_export.figures import confidence_interval


@pytest.mark.parametrize(
    ("count", "quantile"), [(4, 3.1824), (8, 2.3646), (12, 2.2010), (32, 2.0395), (101, 1.9840)]
)
def test_intervals_have_students_quantiles(count: int, quantile: float) -> None:
    """Against the printed table, two-sided 95 %."""
    values = [float(index) for index in range(count)]
    mean = (count - 1) / 2
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    low, high = confidence_interval(values)
    assert low + high == pytest.approx(2 * mean)
    assert (high - low) / 2 == pytest.approx(quantile * deviation / math.sqrt(count), rel=0.01)


@pytest.mark.parametrize("values", [[], [3.0], [3.0, math.inf], [math.nan, 3.0]])
def test_a_mean_that_cannot_be_known(values: list[float]) -> None:
    assert confidence_interval(values) == (-math.inf, math.inf)


def test_what_strata_differ_by_is_not_chance() -> None:
    """Two classes 10 dB apart, four rounds: the variance within them, six degrees of freedom."""
    values = [30.0, 40.0, 31.0, 41.0, 32.0, 42.0, 33.0, 43.0]
    low, high = confidence_interval(values, strata=2)
    within = math.sqrt(2 * 5.0 / 6)  # Σ (x − mean)² of 0, 1, 2, 3 is 5
    assert (low + high) / 2 == pytest.approx(36.5)
    assert (high - low) / 2 == pytest.approx(2.4469 * within / math.sqrt(8), rel=0.01)
    assert high - low < 0.3 * (lambda wide: wide[1] - wide[0])(confidence_interval(values))


def test_equal_values_are_sure() -> None:
    assert confidence_interval([2.0] * 5) == (2.0, 2.0)
