from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditas_export.errors import QuantizationError
from ditas_export.quantization.smoothing import SMALLEST_SCALE, channel_maxima, smoothing_scale


@settings(max_examples=50, deadline=None)
@given(alpha=st.floats(0, 1), seed=st.integers(0, 1000))
def test_smoothing_leaves_the_product_alone(alpha: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(7, 12, generator=generator, dtype=torch.float64) * 5
    weight = torch.randn(4, 12, generator=generator, dtype=torch.float64)
    s = smoothing_scale(x.abs().amax(0), channel_maxima(weight), alpha)
    # Float64: both sides agree to a few ulps of the sum's terms.
    assert torch.allclose((x / s) @ (weight * s).T, x @ weight.T, rtol=1e-12, atol=1e-12)


def test_equation_4_literally() -> None:
    a, b = torch.tensor([4.0, 9.0]), torch.tensor([0.25, 0.5])
    expected = torch.tensor([4.0**0.3 / 0.25**0.7, 9.0**0.3 / 0.5**0.7])
    assert torch.allclose(smoothing_scale(a, b, 0.3), expected)


def test_the_ends_move_all_difficulty_to_one_side() -> None:
    a, b = torch.tensor([4.0, 9.0]), torch.tensor([0.25, 0.5])
    assert torch.allclose(a / smoothing_scale(a, b, 1.0), torch.ones(2))
    assert torch.allclose(b * smoothing_scale(a, b, 0.0), torch.ones(2))


def test_dead_channels_stay_finite_and_positive() -> None:
    zero = torch.zeros(3)
    for alpha in (0.0, 0.5, 1.0):
        s = smoothing_scale(zero, zero, alpha)
        assert (s.isfinite() & (s >= SMALLEST_SCALE)).all()


def test_channel_maxima() -> None:
    assert channel_maxima(torch.tensor([[1.0, -3.0], [-2.0, 2.0]])).tolist() == [2.0, 3.0]


def test_refusals() -> None:
    ones = torch.ones(2)
    with pytest.raises(QuantizationError, match=r"alpha=1.5 lies outside \[0, 1\]"):
        smoothing_scale(ones, ones, 1.5)
    with pytest.raises(QuantizationError, match="NaN or infinity"):
        smoothing_scale(ones * float("nan"), ones, 0.5)
