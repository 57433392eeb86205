from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from quantized_fixture import example_inputs, quantized_tiny_dit, snr_db, tiny_dit
from torch import nn
from torch.nn import functional

from ditas_export.calibration.adaln import quantize_adaln
from ditas_export.calibration.fold import fold_smoothing, require_representable
from ditas_export.calibration.modules import FakeQuantLinear, fake_quantized_model
from ditas_export.calibration.quantized_model import QuantizedLinear, QuantizedModel
from ditas_export.dit.model import DiT
from ditas_export.errors import QuantizationError
from ditas_export.families.dit import ADALN
from ditas_export.options import Target
from ditas_export.quantization.ranges import RANGE_FLOOR, Ranges


class UnfoldedLinear(nn.Module):
    """The definition: y = (x / s) ((codes · multipliers + left @ right) · row_scale)ᵀ + b."""

    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__()
        self.s = linear.smoothing_scale.double()
        self.matrix = linear.weight.to(torch.float64).dequantize()
        if linear.low_rank is not None:
            row_scale = linear.weight.row_scale.double()
            self.matrix = self.matrix + linear.low_rank.dequantize(row_scale)
        self.bias = linear.bias.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x / self.s, self.matrix, self.bias)


def unfolded_float64(model: DiT, quantized: QuantizedModel) -> DiT:
    model = copy.deepcopy(model).double()
    for name, linear in quantized.linears.items():
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent).add_module(child, UnfoldedLinear(linear))
    return model


def relative_error(expected: torch.Tensor, got: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_folding_is_exact_in_float64(rank: int, seed: int) -> None:
    model = tiny_dit(seed=seed)
    quantized = quantized_tiny_dit(model, activation_bits=16, rank=rank, seed=seed)
    folded = fake_quantized_model(fold_smoothing(quantized, dtype=torch.float64), ranges="token")
    latents, timesteps, labels = example_inputs(model.config, batch=3)
    inputs = (latents.double(), timesteps, labels)
    expected = unfolded_float64(model, quantized)(*inputs)
    assert relative_error(expected, folded(*inputs)) < 1e-10


@pytest.mark.parametrize("bits", [8, 4])
def test_folding_integer_modulation_is_exact_in_float64(bits: int) -> None:
    model = tiny_dit()
    quantized = quantize_adaln(quantized_tiny_dit(model, activation_bits=16), bits)
    folded = fake_quantized_model(fold_smoothing(quantized, dtype=torch.float64), ranges="token")
    unfolded = unfolded_float64(model, quantized)
    for name, weight in quantized.adaln.items():
        module = unfolded.get_submodule(name)
        assert isinstance(module, nn.Linear)
        exact = replace(weight, scale=weight.scale.double()).dequantize()
        module.weight = nn.Parameter(exact, requires_grad=False)
        bias = quantized.float_parameters[f"{name}.bias"].double()  # 4 bits change it
        module.bias = nn.Parameter(bias, requires_grad=False)
    latents, timesteps, labels = example_inputs(model.config, batch=3)
    inputs = (latents.double(), timesteps, labels)
    assert relative_error(unfolded(*inputs), folded(*inputs)) < 1e-10


def test_a_factor_keeps_its_digits_in_halves() -> None:
    """(1 + scale) / s as a float16 graph makes it, against float64."""
    model = tiny_dit()
    quantized = quantized_tiny_dit(model)
    name, width = f"blocks.0.{ADALN}", model.config.hidden_size
    rows = slice(4 * width, 5 * width)
    c = functional.silu(torch.randn(16, model.config.hidden_size)).half()

    def factors(dtype: torch.dtype) -> torch.Tensor:
        parameters = fold_smoothing(quantized, dtype=dtype).float_parameters
        weight, bias = (parameters[f"{name}.{part}"][rows] for part in ("weight", "bias"))
        return functional.linear(c.to(dtype), weight, bias).double()

    error = (factors(torch.float16) / factors(torch.float64) - 1).abs()
    # The result is rounded once, by 2e-4 in the median, the bias before it; a 1 that is added apart
    # rounds (1 + scale) / s - 1 as well, which is larger where s is small.
    assert float(error.median()) < 3.5e-4


def test_folding_does_change_the_parameters_it_should() -> None:
    """Without this the test above could pass on a fold that does nothing with s = 1."""
    quantized = quantized_tiny_dit(tiny_dit(), activation_bits=16)
    folded = fold_smoothing(quantized, dtype=torch.float64)
    name = "blocks.0.adaLN_modulation.1.weight"
    assert relative_error(quantized.float_parameters[name], folded.float_parameters[name]) > 0.01
    gates = slice(2 * 96, 3 * 96)
    assert torch.equal(
        quantized.float_parameters[name][gates].double(), folded.float_parameters[name][gates]
    )
    assert folded.linears["blocks.0.mlp.fc2"].input_multiplier is not None
    for kind in ("attn.qkv", "attn.proj", "mlp.fc1"):
        assert folded.linears[f"blocks.0.{kind}"].input_multiplier is None


def test_folding_leaves_codes_and_its_input_alone() -> None:
    quantized = quantized_tiny_dit(tiny_dit())
    before = copy.deepcopy(quantized.float_parameters)
    folded = fold_smoothing(quantized)
    for name, linear in quantized.linears.items():
        assert torch.equal(linear.weight.codes, folded.linears[name].weight.codes)
        assert torch.equal(linear.weight.multipliers, folded.linears[name].weight.multipliers)
    for name, tensor in before.items():
        assert torch.equal(tensor, quantized.float_parameters[name])


@pytest.mark.parametrize("ranges", ["token", "static"])
@pytest.mark.parametrize("target", ["portable", "onnxruntime"])
def test_the_float32_forward_rounds_activations_on_the_grid(ranges: Ranges, target: Target) -> None:
    """The module against its formula, written out in float64 from the same codes."""
    folded = fold_smoothing(quantized_tiny_dit(tiny_dit()))
    linear = folded.linears["blocks.1.mlp.fc2"]
    module = FakeQuantLinear(linear, ranges=ranges, activation_bits=8, target=target)
    x = torch.randn(2, 5, 384)
    smooth = x * linear.input_multiplier
    codes, token = module.codes(smooth)
    if ranges == "token":
        expected_range = smooth.abs().amax(-1, keepdim=True).clamp(min=RANGE_FLOOR)
        assert torch.equal(token, expected_range)
        scale = expected_range.double() / 127
    else:
        assert token is None
        scale = torch.tensor(linear.static_range / 127, dtype=torch.float64)
    branch, row_scale = linear.low_rank, linear.weight.row_scale.double()
    assert branch is not None
    products = codes.long() @ branch.right_codes.long().T
    inner = products.double() / branch.divisor
    if target == "onnxruntime":
        inner = inner.round().clamp(-128, 127)
    integers = codes.double() @ linear.weight.int8_rows().double().T
    integers = integers + inner @ branch.left_codes.double().T
    expected = integers * scale * row_scale + linear.bias.double()
    # Float32 GEMMs of 384 terms, their scales rounded once.
    assert relative_error(expected, module(x).double()) < 1e-6
    assert (smooth / scale - codes).abs().max() < 0.51 or ranges == "static"


ROWS = {
    "q": ("attn.qkv", 7),
    "k": ("attn.qkv", 96 + 7),
    "v": ("attn.qkv", 192 + 7),
    "proj": ("attn.proj", 7),
    "fc1": ("mlp.fc1", 7),
    "fc2": ("mlp.fc2", 7),
}
"""A row of each kind of linear, of each use of its output."""


def changed(quantized: QuantizedModel, name: str, **changes: object) -> QuantizedModel:
    linear = replace(quantized.linears[name], **changes)
    return replace(quantized, linears={**quantized.linears, name: linear})


def half_db(
    quantized: QuantizedModel, ranges: Ranges, *, exact: QuantizedModel | None = None
) -> float:
    """SNR of the float16 forward against the float32 forward of the same integers, or of others."""
    latents, timesteps, labels = example_inputs(batch=4)
    whole = fake_quantized_model(fold_smoothing(exact or quantized), ranges=ranges)
    half = fake_quantized_model(fold_smoothing(quantized, dtype=torch.float16), ranges=ranges)
    return snr_db(whole(latents, timesteps, labels),
                  half(latents.half(), timesteps, labels).float())  # fmt: skip


@pytest.mark.parametrize(("bits", "ranges"), [(4, "token"), (4, "static"), (8, "token")])
@pytest.mark.parametrize("row", ROWS)
def test_a_row_that_is_nearly_dead_costs_halves_nothing(
    row: str, bits: int, ranges: Ranges
) -> None:
    """One row times 1e-2 … 1e-8: within 1 dB of the model before."""
    quantized = quantized_tiny_dit(tiny_dit(), weight_bits=bits)
    before = half_db(quantized, ranges)
    kind, index = ROWS[row]
    name = f"blocks.0.{kind}"
    weight = quantized.linears[name].weight
    for factor in (1e-2, 1e-4, 1e-6, 1e-8):
        row_scale = weight.row_scale.clone()
        row_scale[index] *= factor
        small = changed(quantized, name, weight=replace(weight, row_scale=row_scale))
        assert half_db(small, ranges) > before - 1, factor
        folded = fold_smoothing(small, dtype=torch.float16).linears[name].weight
        assert folded.row_scale.amin() >= RANGE_FLOOR
        kept = torch.arange(len(row_scale)) != index
        assert torch.equal(folded.codes[kept], weight.codes[kept])
        s = fold_smoothing(small, dtype=torch.float16).linears["blocks.0.mlp.fc2"]
        expected = quantized.linears["blocks.0.mlp.fc2"].smoothing_scale.double().reciprocal()
        assert torch.equal(s.input_multiplier, expected.half())  # s stays


@pytest.mark.parametrize(("bits", "rank"), [(4, 4), (8, 4), (4, 0)])
def test_a_raised_row_is_rounded_anew_and_its_branch_with_it(bits: int, rank: int) -> None:
    quantized = quantized_tiny_dit(tiny_dit(), weight_bits=bits, rank=rank)
    linear = quantized.linears["blocks.0.mlp.fc1"]
    row_scale = linear.weight.row_scale.clone()
    row_scale[5] = 2.0**-14 / 3
    small = replace(linear, weight=replace(linear.weight, row_scale=row_scale))
    folded = fold_smoothing(
        changed(quantized, "blocks.0.mlp.fc1", weight=small.weight), dtype=torch.float16
    ).linears["blocks.0.mlp.fc1"]
    assert folded.weight.row_scale[5] == 2.0**-14
    wanted = small.weight.int8_rows()[5].double() / 3
    found = folded.weight.int8_rows()[5].double()
    # 8 bits: half a unit. 4 bits: half a step of the old grid, which the new one is as fine as.
    bound = 0.5 if bits == 8 else 0.5 * float(small.weight.multipliers[5].max()) / 3 + 1
    assert (found - wanted).abs().max() <= bound
    assert found.abs().max() > 20
    if linear.low_rank is not None:
        assert folded.low_rank is not None
        before = linear.low_rank.left_codes.double()
        before[5] /= 3
        assert torch.equal(folded.low_rank.left_codes.double(), before.round())


@pytest.mark.parametrize("ranges", ["token", "static"])
def test_values_keep_their_digits_where_projs_smoothing_is_large(ranges: Ranges) -> None:
    """s of one channel takes V's row below what halves hold; proj's row scales have room for it."""
    quantized = quantized_tiny_dit(tiny_dit())
    name = "blocks.0.attn.proj"
    linear = quantized.linears[name]
    s = linear.smoothing_scale.clone()
    s *= 200.0  # V's row scales are about 2e-3 here, and 2^-14 is 6e-5
    large = changed(
        quantized, name, smoothing_scale=s,
        weight=replace(linear.weight, row_scale=linear.weight.row_scale * 200.0),
        step_ranges=linear.step_ranges / 200.0,
    )  # fmt: skip
    folded = fold_smoothing(large, dtype=torch.float16)
    plain = quantized.linears["blocks.0.attn.qkv"].weight
    assert torch.equal(folded.linears["blocks.0.attn.qkv"].weight.codes, plain.codes)
    power = float(folded.linears[name].static_range / linear.static_range * 200)
    assert power == pytest.approx(2.0 ** round(math.log2(power)), rel=1e-5)  # float32 ranges
    assert power > 1
    assert half_db(large, ranges, exact=quantized) > half_db(quantized, ranges) - 1


def test_a_bias_over_a_tiny_smoothing_scale_is_named() -> None:
    quantized = quantized_tiny_dit(tiny_dit())
    proj = quantized.linears["blocks.0.attn.proj"]
    s = proj.smoothing_scale.clone()
    s[3] = 1e-4
    quantized = changed(quantized, "blocks.0.attn.proj", smoothing_scale=s)
    bias = quantized.linears["blocks.0.attn.qkv"].bias.clone()
    bias[192 + 3] = 7.0
    quantized = changed(quantized, "blocks.0.attn.qkv", bias=bias)
    named = r"^blocks\.0\.attn\.qkv's bias holds 7e\+04, and float16 .*--precision bf16 or fp32"
    with pytest.raises(QuantizationError, match=named):
        fold_smoothing(quantized, dtype=torch.float16)
    fold_smoothing(quantized, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("blocks.0.mlp.fc1", "bias", 1e6, "fc1's bias holds 1e\\+06"),
        ("blocks.0.mlp.fc2", "step_ranges", 1e6, "fc2's input range holds 1e\\+06"),
        ("blocks.1.mlp.fc2", "smoothing_scale", 1e-6, r"1 / s of blocks\.1\.mlp\.fc2 holds 1e"),
    ],
)
def test_every_folded_float_is_looked_at(name: str, field: str, value: float, message: str) -> None:
    quantized = quantized_tiny_dit(tiny_dit())
    tensor = torch.full_like(getattr(quantized.linears[name], field), value)
    with pytest.raises(QuantizationError, match=message):
        fold_smoothing(changed(quantized, name, **{field: tensor}), dtype=torch.float16)


def test_parameters_that_are_not_folded_are_known_beforehand() -> None:
    model = tiny_dit()
    require_representable(model.config, model.state_dict(), torch.float16)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.bias[0] = 1e5  # type: ignore[index, operator, union-attr]
    require_representable(
        model.config, model.state_dict(), torch.float16
    )  # it is folded: what ships is not known yet
    with torch.no_grad():
        model.final_layer.linear.bias[0] = 1e5
    named = r"final_layer\.linear\.bias holds 1e\+05, and float16 ends at 6.55e\+04"
    with pytest.raises(QuantizationError, match=named):
        require_representable(model.config, model.state_dict(), torch.float16)
    require_representable(model.config, model.state_dict(), torch.bfloat16)


def test_overflow_in_half_precision_is_refused() -> None:
    quantized = quantized_tiny_dit(tiny_dit())
    name = "blocks.0.attn.qkv"
    linear = quantized.linears[name]
    huge = replace(linear, weight=replace(linear.weight, row_scale=linear.weight.row_scale * 1e9))
    with pytest.raises(QuantizationError, match=r"qkv's row scales holds .*use --precision"):
        fold_smoothing(
            replace(quantized, linears={**quantized.linears, name: huge}), dtype=torch.float16
        )
