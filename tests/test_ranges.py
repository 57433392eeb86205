from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditas_export.quantization.ranges import (
    RANGE_FLOOR,
    activation_codes,
    fake_quantize_tensor_asymmetric,
    quantize,
    static_scale,
    token_ranges,
    unit_scale,
)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Return x on the INT8 grid of each token's own range."""
    codes, steps = activation_codes(x, ranges="token", static_range=1.0)
    return codes * steps


@settings(max_examples=50, deadline=None)
@given(magnitude=st.floats(1e-3, 1e4), seed=st.integers(0, 1000))
def test_token_rounding_errs_by_half_a_code(magnitude: float, seed: int) -> None:
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(seed)) * magnitude
    before = x.clone()
    error = (rounded(x) - x).abs()
    assert (error <= token_ranges(x) / 254 * 1.0001).all()
    assert torch.equal(x, before)


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    x = torch.randn(4, 16)
    assert torch.equal(rounded(x)[2], rounded(x[2:3])[0])


def test_the_floor_keeps_zero_tokens_finite() -> None:
    x = torch.zeros(2, 8)
    assert torch.equal(token_ranges(x), torch.full((2, 1), RANGE_FLOOR))
    assert torch.equal(rounded(x), x)


def test_quantize_rounds_ties_to_even_and_clamps_like_onnx() -> None:
    x = torch.tensor([0.5, 1.5, -0.5, -2.5, 1000.0, -1000.0])
    expected = np.clip(np.rint(x.numpy()), -128, 127)
    assert quantize(x, torch.tensor(1.0)).tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scales_are_normal_positive_numbers_of_the_type(dtype: torch.dtype) -> None:
    for scale in (unit_scale(dtype), static_scale(0.0, dtype), static_scale(3.0, dtype)):
        assert scale.dtype == dtype
        assert scale > 0
        if dtype == torch.float16:
            assert scale >= torch.finfo(torch.float16).smallest_normal
    assert abs(float(static_scale(127.0, dtype)) - 1.0) < 1e-6


@settings(max_examples=50, deadline=None)
@given(low=st.floats(-100, 100), high=st.floats(-100, 100), bits=st.sampled_from([4, 8]))
def test_asymmetric_rounding_is_equation_3(low: float, high: float, bits: int) -> None:
    x = torch.linspace(low, high, 37, dtype=torch.float64)
    bottom, top = min(low, high, 0.0), max(low, high, 0.0)
    scale = max((top - bottom) / (2**bits - 1), np.finfo(np.float64).tiny)
    zero = np.rint(-bottom / scale)
    expected = scale * (np.clip(np.rint(x.numpy() / scale) + zero, 0, 2**bits - 1) - zero)
    got = fake_quantize_tensor_asymmetric(x, bits=bits)
    # The same float64 operations: equal to the last bits.
    assert np.allclose(got.numpy(), expected, rtol=1e-12, atol=0)
