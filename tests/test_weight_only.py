"""Weight-only integers: ranges, errors, the clipping search, and the modulation linears."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_fixture import quantized_tiny_dit, tiny_dit

from ditas_export.calibration.fold import fold_smoothing
from ditas_export.dit.model import DiTConfig
from ditas_export.errors import OnnxExportError, QuantizationError
from ditas_export.onnx_export.adaln import adaln_paths, quantize_adaln
from ditas_export.quantization.integer import round_to_blocks
from ditas_export.quantization.weight_only import (
    WeightOnlyWeight,
    from_integer_weight,
    quantize_weight_only,
    widest_block,
)


def random_weight(rows: int = 24, columns: int = 128, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def covering_error(weight: torch.Tensor, bits: int, block_size: int) -> float:
    """Squared error of the scale that covers each block whole."""
    max_code = 7 if bits == 4 else 127
    blocks = weight.reshape(weight.shape[0], -1, block_size)
    scale = blocks.abs().amax(-1, keepdim=True) / max_code
    return float(((blocks / scale).round() * scale - blocks).square().sum())


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.sampled_from([4, 8]), st.sampled_from([32, 64, 128]))
def test_the_search_never_loses_to_covering_the_block(seed: int, bits: int, size: int) -> None:
    weight = random_weight(seed=seed)
    before = weight.clone()
    rounded = quantize_weight_only(weight, bits=bits, block_size=size)
    error = float((rounded.dequantize() - weight).square().sum())
    assert error <= covering_error(weight, bits, size) * (1 + 1e-5)  # float32 sums
    assert torch.equal(weight, before)
    assert rounded.block_size == size


def test_clipping_pays_where_a_block_has_an_outlier() -> None:
    weight = random_weight()
    weight[:, 0] = 6.0
    rounded = quantize_weight_only(weight, bits=4, block_size=128)
    error = float((rounded.dequantize() - weight).square().sum())
    assert error < 0.95 * covering_error(weight, 4, 128)


def test_zero_rows_and_half_precision_stay_finite() -> None:
    weight = random_weight().half()
    weight[3] = 0
    weight[4] = 1e-7
    rounded = quantize_weight_only(weight, bits=4, block_size=32)
    assert rounded.scale.dtype == torch.float16
    assert torch.equal(rounded.dequantize()[3], torch.zeros(128, dtype=torch.float16))
    assert (rounded.scale >= 2.0**-14).all()


def test_two_scales_become_one() -> None:
    weight = round_to_blocks(random_weight(), block_size=32)
    single = from_integer_weight(weight)
    # code · (m · s) against (code · m) · s: one rounding more.
    assert torch.allclose(single.dequantize(), weight.dequantize(), rtol=1e-6, atol=0)


def test_the_widest_block_that_divides() -> None:
    assert [widest_block(width) for width in (1152, 192, 96)] == [128, 64, 32]
    with pytest.raises(QuantizationError, match="no block size of 128, 64, 32 divides"):
        widest_block(48)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "weight bits are 4 or 8"),
        ({"scale": torch.ones(23, 4)}, "do not fit together"),
        ({"codes": torch.full((24, 128), 8, dtype=torch.int8)}, "lies outside ±7"),
        ({"scale": torch.zeros(24, 4)}, "not finite and positive"),
    ],
)
def test_impossible_weights_are_refused(change: dict[str, object], message: str) -> None:
    good = quantize_weight_only(random_weight(), bits=4, block_size=32)
    fields = {"codes": good.codes, "scale": good.scale, "bits": 4, **change}
    with pytest.raises(QuantizationError, match=message):
        WeightOnlyWeight(**fields)  # type: ignore[arg-type]


def test_nan_is_refused() -> None:
    weight = random_weight()
    weight[0, 0] = float("nan")
    with pytest.raises(QuantizationError, match="NaN or infinity"):
        quantize_weight_only(weight, bits=8, block_size=128)


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.01), (4, 0.12)])
def test_adaln_weights_are_replaced_by_their_integers(bits: int, bound: float) -> None:
    folded = fold_smoothing(quantized_tiny_dit(tiny_dit()))
    result = quantize_adaln(folded, bits)
    assert list(result.weights) == list(adaln_paths(folded.config.depth))
    for name, before in folded.float_parameters.items():
        after = result.folded.float_parameters[name]
        path = name.removesuffix(".weight")
        if path == name or path not in result.weights:
            assert after is before
            continue
        assert torch.equal(after, result.weights[path].dequantize())
        # A uniform error of one step over √12, the step a 127th or 7th of some 2.5 deviations.
        assert (after - before).norm() < bound * before.norm()


def test_sixteen_bits_change_nothing() -> None:
    folded = fold_smoothing(quantized_tiny_dit(tiny_dit()))
    result = quantize_adaln(folded, 16)
    assert result.folded is folded
    assert not result.weights


def test_adaln_refusals() -> None:
    folded = fold_smoothing(quantized_tiny_dit(tiny_dit()))
    with pytest.raises(OnnxExportError, match="16, 8 or 4 bits, not 5"):
        quantize_adaln(folded, 5)
    narrow = replace(folded, config=DiTConfig(hidden_size=48, num_heads=4, depth=2))
    with pytest.raises(OnnxExportError, match="adaLN weights in 4 bits: no block size"):
        quantize_adaln(narrow, 4)
