from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditas_export.errors import QuantizationError
from ditas_export.quantization.integer import (
    MAX_CODE_4BIT,
    MAX_MULTIPLIER,
    IntegerWeight,
    LowRank,
    initial_row_scale,
    inner_codes,
    joined_rows,
    pack_int4,
    quantize_rows,
    round_to_blocks,
    round_to_rows,
    unpack_int4,
)

magnitudes = st.floats(min_value=1e-6, max_value=1e6)


def weight_of(rows: int, columns: int, magnitude: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * magnitude


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 9),
    blocks=st.integers(1, 5),
    block_size=st.sampled_from([2, 16, 48]),
    magnitude=magnitudes,
    seed=st.integers(0, 1000),
)
def test_block_rounding_errs_by_half_a_step_at_most(
    rows: int, blocks: int, block_size: int, magnitude: float, seed: int
) -> None:
    weight = weight_of(rows, blocks * block_size, magnitude, seed)
    before = weight.clone()
    rounded = round_to_blocks(weight, block_size=block_size)
    step = rounded.row_scale[:, None] * rounded.multipliers.repeat_interleave(block_size, 1)
    # Float32 division and product may each err by an ulp of the weight.
    slack = 4e-7 * weight.abs() + 1e-5 * step
    assert ((weight - rounded.dequantize()).abs() <= step / 2 + slack).all()
    assert rounded.codes.abs().max() <= MAX_CODE_4BIT
    assert 1 <= rounded.multipliers.min() <= rounded.multipliers.max() <= MAX_MULTIPLIER
    assert torch.equal(weight, before)


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 70), magnitude=magnitudes)
def test_row_rounding_errs_by_half_a_step_at_most(
    rows: int, columns: int, magnitude: float
) -> None:
    weight = weight_of(rows, columns, magnitude, 0)
    codes, scale = quantize_rows(weight)
    error = (weight - codes.float() * scale[:, None]).abs()
    assert (error <= scale[:, None] * (0.5 + 1e-4)).all()


def test_zero_is_exact_and_a_zero_row_has_scale_one() -> None:
    weight = weight_of(3, 96, 1.0, 1)
    weight[1] = 0.0
    weight[0, 5] = 0.0
    for rounded in (round_to_blocks(weight, block_size=48), round_to_rows(weight)):
        assert rounded.row_scale[1] == 1.0
        assert (rounded.dequantize()[1] == 0).all()
        assert rounded.dequantize()[0, 5] == 0


def test_int8_rows_are_the_products_and_fit_in_int8() -> None:
    weight = weight_of(8, 96, 1.0, 2)
    weight[:, 0] *= 100.0  # one block of multiplier 18, the rest small
    rounded = round_to_blocks(weight, block_size=16)
    wide = rounded.codes.int() * rounded.multipliers.int().repeat_interleave(16, dim=1)
    assert wide.abs().max() == 126
    assert torch.equal(rounded.int8_rows().int(), wide)
    assert torch.equal(rounded.dequantize(), wide.float() * rounded.row_scale[:, None])


def test_the_initial_row_scale_makes_the_largest_weight_126() -> None:
    weight = weight_of(5, 32, 3.0, 3)
    scale = initial_row_scale(weight)
    assert torch.allclose(weight.abs().amax(1) / scale, torch.full((5,), 126.0))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), rows=st.integers(1, 6))
def test_packing_is_lossless(seed: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (rows, 10), generator=generator, dtype=torch.int8)
    packed = pack_int4(codes)
    assert packed.numel() == codes.numel() // 2
    assert torch.equal(unpack_int4(packed, (rows, 10)), codes)


def test_packing_puts_the_first_code_in_the_low_half() -> None:
    assert pack_int4(torch.tensor([1, -1], dtype=torch.int8)).tolist() == [0xF1]


def test_packing_refuses_an_odd_count() -> None:
    with pytest.raises(QuantizationError, match="3 4-bit codes do not fill whole bytes"):
        pack_int4(torch.zeros(3, dtype=torch.int8))


def low_rank_parts() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "left_codes": torch.randint(-127, 128, (6, 2), generator=generator).to(torch.int8),
        "right_codes": torch.randint(-127, 128, (2, 5), generator=generator).to(torch.int8),
        "divisor": torch.tensor([3, 901], dtype=torch.int32),
    }


def test_low_rank_is_the_product_of_its_factors() -> None:
    low_rank, row_scale = LowRank(**low_rank_parts()), torch.rand(6, dtype=torch.float64)
    assert low_rank.rank == 2
    parts = {name: part.double() for name, part in low_rank_parts().items()}
    expected = torch.einsum("n,nr,r,rk->nk", row_scale, parts["left_codes"],
                            1 / parts["divisor"], parts["right_codes"])  # fmt: skip
    assert torch.allclose(low_rank.dequantize(row_scale), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("left_codes", torch.zeros(6, 3, dtype=torch.int8), "do not fit together"),
        ("divisor", torch.tensor([3, 900], dtype=torch.int32), "is even"),
        ("divisor", torch.tensor([3, -1], dtype=torch.int32), "outside 1 … 16777216"),
        ("divisor", torch.tensor([3, 2**24 + 1], dtype=torch.int32), "outside 1 … 16777216"),
        ("divisor", torch.tensor([3, 5]), "divisors are torch.int64, not torch.int32"),
        ("left_codes", torch.full((5, 2), -128, dtype=torch.int8), "outside -127 … 127"),
        ("right_codes", torch.full((2, 7), -128, dtype=torch.int8), "outside -127 … 127"),
        ("right_codes", torch.zeros(2, dtype=torch.int8), "do not fit together"),
    ],
)
def test_low_rank_refuses_what_no_runtime_computes(
    name: str, value: torch.Tensor, message: str
) -> None:
    with pytest.raises(QuantizationError, match=message):
        LowRank(**low_rank_parts() | {name: value})


@given(st.integers(0, 2**13), st.integers(-(2**23), 2**23), st.sampled_from([-2, -1, 0, 1, 2]))
def test_no_inner_product_lies_on_a_tie(half: int, product: int, ulps: int) -> None:
    """What runtimes make of the scale, a few ulps off, does not change the code."""
    divisor = 2 * half + 1
    products = torch.tensor([product], dtype=torch.float32)
    exact = min(max(round(Fraction(product, divisor)), -128), 127)
    assert inner_codes(products, torch.tensor([divisor])).item() == exact
    scale = torch.tensor([1 / divisor]) * (1 + ulps * 2.0**-24)
    assert (products * scale).round().clamp(-128, 127).item() == exact


def test_a_branch_is_more_columns_of_the_rows() -> None:
    weight = round_to_blocks(torch.randn(6, 16, dtype=torch.float64), block_size=16)
    low_rank = LowRank(**low_rank_parts())
    joined = joined_rows(weight, low_rank)
    assert torch.equal(joined[:, :16], weight.int8_rows())
    assert torch.equal(joined[:, 16:], low_rank.left_codes)
    assert torch.equal(joined_rows(weight, None), weight.int8_rows())


def valid_parts() -> dict[str, torch.Tensor]:
    return {
        "codes": torch.zeros(2, 8, dtype=torch.int8),
        "multipliers": torch.ones(2, 2, dtype=torch.int8),
        "row_scale": torch.ones(2),
    }


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("codes", torch.full((2, 8), 8, dtype=torch.int8), "outside -7 … 7"),
        ("codes", torch.full((2, 8), -128, dtype=torch.int8), "outside -7 … 7"),
        ("codes", torch.zeros(2, 8), "codes are torch.float32, not torch.int8"),
        ("codes", torch.zeros(2, 0, dtype=torch.int8), "there are no codes"),
        ("codes", torch.zeros(16, dtype=torch.int8), "do not fit together"),
        ("multipliers", torch.full((2, 2), 19, dtype=torch.int8), "outside 1 … 18"),
        ("multipliers", torch.ones(2, 3, dtype=torch.int8), "do not fit together"),
        ("multipliers", torch.zeros(2, 0, dtype=torch.int8), "do not fit together"),
        ("row_scale", torch.tensor([1, 1]), "row scales are torch.int64, not floats"),
        ("row_scale", torch.ones(2, 1), "do not fit together"),
        ("row_scale", torch.tensor([1.0, 0.0]), "finite and positive"),
        ("row_scale", torch.tensor([1.0, float("nan")]), "finite and positive"),
    ],
)
def test_an_integer_weight_refuses_impossible_parts(
    part: str, value: torch.Tensor, message: str
) -> None:
    parts = valid_parts() | {part: value}
    with pytest.raises(QuantizationError, match=message):
        IntegerWeight(**parts, bits=4)


def test_other_bit_widths_are_refused() -> None:
    with pytest.raises(QuantizationError, match="4 or 8, not 6"):
        IntegerWeight(**valid_parts(), bits=6)


def test_not_finite_weights_and_odd_blocks_are_refused() -> None:
    weight = torch.ones(2, 8)
    with pytest.raises(QuantizationError, match="does not divide in_features=8"):
        round_to_blocks(weight, block_size=3)
    weight[0, 0] = float("inf")
    with pytest.raises(QuantizationError, match="NaN or infinity"):
        round_to_blocks(weight, block_size=4)
    with pytest.raises(QuantizationError, match="NaN or infinity"):
        quantize_rows(weight)
