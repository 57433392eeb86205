"""Weight-only integers: ranges, errors, and the modulation linears."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from quantized_fixture import TINY, quantized_tiny_dit, tiny_dit

from ditas_export.calibration.adaln import (
    adaln_block_size,
    quantize_adaln,
)
from ditas_export.calibration.fold import fold_smoothing
from ditas_export.calibration.quantized_model import QuantizedModel
from ditas_export.errors import ArtifactError, QuantizationError
from ditas_export.families.registry import family_of
from ditas_export.quantization.integer import round_to_blocks
from ditas_export.quantization.weight_only import (
    WeightOnlyWeight,
    divide_rows,
    from_integer_weight,
    widest_block,
)


def modulation_inputs(quantized: QuantizedModel) -> torch.Tensor:
    """What the model's modulation linears read, by its family."""
    config = quantized.config
    return family_of(config).modulation_inputs(config, quantized.float_parameters)


def random_weight(rows: int = 24, columns: int = 128, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def to_nearest(weight: torch.Tensor, *, bits: int, block_size: int) -> WeightOnlyWeight:
    """Each block rounded to nearest, under the scale that covers it."""
    most = 7 if bits == 4 else 127
    blocks = weight.reshape(weight.shape[0], -1, block_size)
    scale = blocks.abs().amax(-1, keepdim=True) / most
    codes = (blocks / scale).round().flatten(1).to(torch.int8)
    return WeightOnlyWeight(codes=codes, scale=scale.squeeze(-1), bits=bits)


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
        ({"codes": torch.full((24, 128), 8, dtype=torch.int8)}, "outside -7 … 7"),
        ({"codes": torch.full((24, 128), -128, dtype=torch.int8)}, "outside -7 … 7"),
        ({"codes": torch.zeros(24, 128, dtype=torch.int16)}, "are torch.int16, not torch.int8"),
        ({"scale": torch.zeros(24, 4)}, "not all finite and positive"),
        ({"scale": torch.ones(24, 4, dtype=torch.int8)}, "not floats"),
    ],
)
def test_impossible_weights_are_refused(change: dict[str, object], message: str) -> None:
    good = to_nearest(random_weight(), bits=4, block_size=32)
    fields = {"codes": good.codes, "scale": good.scale, "bits": 4, **change}
    with pytest.raises(QuantizationError, match=message):
        WeightOnlyWeight(**fields)  # type: ignore[arg-type]


def row_divisors(rows: int = 24, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.exp(torch.randn(rows, generator=generator)).double()


@pytest.mark.parametrize(("bits", "size"), [(4, 32), (8, 128)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dividing_rows_divides_scales_and_leaves_codes(
    bits: int, size: int, dtype: torch.dtype
) -> None:
    weight = to_nearest(random_weight(), bits=bits, block_size=size)
    divisor = row_divisors()
    divided = divide_rows(weight, divisor, dtype, name="w")
    assert torch.equal(divided.codes, weight.codes)
    assert divided.scale.dtype == dtype
    exact = weight.scale.double() / divisor[:, None]
    # One rounding to nearest.
    torch.testing.assert_close(
        divided.scale.double(), exact, rtol=torch.finfo(dtype).eps / 2, atol=0
    )


def test_blocks_below_half_precision_are_rounded_anew() -> None:
    weight = to_nearest(random_weight(), bits=8, block_size=128)
    divisor = torch.ones(24, dtype=torch.float64)
    divisor[5] = 2000.0  # a scale of about 10⁻⁵; the smallest normal half is 6.1 · 10⁻⁵
    divided = divide_rows(weight, divisor, torch.float16, name="w")
    exact = weight.dequantize().double() / divisor[:, None]
    step = 2.0**-14
    assert divided.scale[5] == step
    assert (divided.dequantize().double()[5] - exact[5]).abs().max() <= step / 2
    assert divided.codes[5].abs().max() > 5  # not rounded away
    kept = torch.arange(24) != 5
    assert torch.equal(divided.codes[kept], weight.codes[kept])


def test_a_scale_that_overflows_is_refused() -> None:
    weight = to_nearest(random_weight(), bits=8, block_size=128)
    divisor = torch.full((24,), 1e-7, dtype=torch.float64)
    with pytest.raises(QuantizationError, match=r"w holds .*, and float16 ends at 6.55e"):
        divide_rows(weight, divisor, torch.float16, name="w")


@pytest.mark.parametrize("bits", [8, 4])
def test_adaln_weights_become_integers(bits: int) -> None:
    quantized = quantized_tiny_dit(tiny_dit())
    result = quantize_adaln(quantized, bits)
    assert (quantized.adaln_bits, result.adaln_bits) == (16, bits)
    paths = tuple(family_of(quantized.config).modulations(quantized.config))
    assert list(result.adaln) == list(paths)
    weights = {f"{path}.weight" for path in paths}
    assert result.float_parameters.keys() == quantized.float_parameters.keys() - weights
    biases = {f"{path}.bias" for path in paths}
    for name, after in result.float_parameters.items():
        assert (after is quantized.float_parameters[name]) == (name not in biases), name
    for path, weight in result.adaln.items():
        assert weight.block_size == adaln_block_size(quantized.config.hidden_size, bits), path


def test_modulation_inputs_are_those_of_the_model() -> None:
    """Every time step and every class, the null class at each step, as a block hands them on."""
    model = tiny_dit()
    found = modulation_inputs(quantized_tiny_dit(model)).reshape(1000, 8, -1)
    linear = model.blocks[0].adaLN_modulation[1]
    seen: list[torch.Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    config, steps = model.config, torch.arange(1000)
    latents = torch.zeros(1000, config.in_channels, config.input_size, config.input_size)
    with torch.no_grad():
        for index in range(7):
            model(latents, steps, (7 * steps + index) % config.num_classes)
        model(latents, steps, torch.full((1000,), config.null_class))
    handle.remove()
    torch.testing.assert_close(found, torch.stack(seen, dim=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [8, 4])
def test_modulation_is_rounded_for_its_inputs(bits: int) -> None:
    """Against weights rounded to nearest, by the output over all time steps and classes."""
    quantized = quantized_tiny_dit(tiny_dit())
    inputs = modulation_inputs(quantized).double()
    result = quantize_adaln(quantized, bits)
    for path, weight in result.adaln.items():
        before, bias = (
            quantized.float_parameters[f"{path}.{name}"].double() for name in ("weight", "bias")
        )
        nearest = to_nearest(before.float(), bits=bits, block_size=weight.block_size)
        wanted = inputs @ before.T + bias
        got = inputs @ weight.dequantize().double().T
        got += result.float_parameters[f"{path}.bias"].double()
        least = (inputs @ nearest.dequantize().double().T + bias - wanted).norm()
        assert (got - wanted).norm() < 0.5 * least, path
        # Float32 biases.
        assert (got - wanted).mean(dim=0).abs().max() < 1e-6 * wanted.abs().max(), path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
def test_folding_keeps_the_integers_and_their_values(bits: int, dtype: torch.dtype) -> None:
    quantized = quantize_adaln(quantized_tiny_dit(tiny_dit()), bits)
    folded = fold_smoothing(quantized, dtype=dtype)
    assert folded.adaln_bits == bits
    assert list(folded.adaln) == list(quantized.adaln)
    for name, weight in quantized.adaln.items():
        assert torch.equal(folded.adaln[name].codes, weight.codes)
        assert folded.adaln[name].scale.dtype == dtype
        values = folded.float_parameters[f"{name}.weight"]
        assert torch.equal(values, folded.adaln[name].dequantize())


def test_folded_integers_are_the_folded_weights_rounded() -> None:
    """Against the weights folded as floats and rounded then, for the same inputs."""
    quantized = quantized_tiny_dit(tiny_dit())
    integers = fold_smoothing(quantize_adaln(quantized, 8), dtype=torch.float64)
    floats = fold_smoothing(quantized).float_parameters
    again = quantize_adaln(replace(quantized, float_parameters=floats), 8).adaln
    for name, weight in integers.adaln.items():
        # Float32 arithmetic: a code next to a tie, and what its error moves.
        assert (again[name].codes != weight.codes).float().mean() < 0.02
        torch.testing.assert_close(again[name].scale.double(), weight.scale, rtol=2e-3, atol=0)


def test_the_same_bits_change_nothing() -> None:
    quantized = quantized_tiny_dit(tiny_dit())
    assert quantize_adaln(quantized, 16) is quantized
    four = quantize_adaln(quantized, 4)
    assert quantize_adaln(four, 4) is four


def test_adaln_refusals() -> None:
    quantized = quantized_tiny_dit(tiny_dit())
    with pytest.raises(QuantizationError, match="16, 8 or 4 bits, not 5"):
        quantize_adaln(quantized, 5)
    narrow = quantized_tiny_dit(tiny_dit(replace(TINY, hidden_size=48)), rank=0)
    with pytest.raises(QuantizationError, match="adaLN weights in 4 bits: no block size"):
        quantize_adaln(narrow, 4)
    assert adaln_block_size(48, 8) == 48
    four = quantize_adaln(quantized, 4)
    for bits in (16, 8):
        with pytest.raises(ArtifactError, match=f"modulation weights in 4 bits, and {bits} were"):
            quantize_adaln(four, bits)
    incomplete = dict([next(iter(four.adaln.items()))])
    with pytest.raises(ArtifactError, match="of all linears or none"):
        replace(four, adaln=incomplete)
