from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from quantized_fixture import example_inputs, quantized_tiny_dit, tiny_dit
from torch import nn
from torch.nn import functional

from ditas_export.calibration.adaln import quantize_adaln
from ditas_export.calibration.fold import SMALLEST_HALF_SCALE, fold_smoothing
from ditas_export.calibration.modules import FakeQuantLinear, fake_quantized_dit
from ditas_export.calibration.quantized_dit import QuantizedDiT, QuantizedLinear
from ditas_export.dit.model import DiT
from ditas_export.errors import QuantizationError
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


def unfolded_float64(model: DiT, quantized: QuantizedDiT) -> DiT:
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
    folded = fake_quantized_dit(fold_smoothing(quantized, dtype=torch.float64), ranges="token")
    latents, timesteps, labels = example_inputs(model.config, batch=3)
    inputs = (latents.double(), timesteps, labels)
    expected = unfolded_float64(model, quantized)(*inputs)
    assert relative_error(expected, folded(*inputs)) < 1e-10


@pytest.mark.parametrize("bits", [8, 4])
def test_folding_integer_modulation_is_exact_in_float64(bits: int) -> None:
    model = tiny_dit()
    quantized = quantize_adaln(quantized_tiny_dit(model, activation_bits=16), bits)
    folded = fake_quantized_dit(fold_smoothing(quantized, dtype=torch.float64), ranges="token")
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


def test_half_precision_row_scales_stay_normal_and_the_function_stays() -> None:
    model = tiny_dit()
    quantized = quantized_tiny_dit(model, activation_bits=16)
    small = {
        name: replace(
            linear,
            smoothing_scale=linear.smoothing_scale / 256,
            weight=replace(linear.weight, row_scale=linear.weight.row_scale / 256),
        )
        for name, linear in quantized.linears.items()
    }
    shrunk = replace(quantized, linears=small)
    folded = fold_smoothing(shrunk, dtype=torch.float16)
    for linear in folded.linears.values():
        assert linear.weight.row_scale.dtype == torch.float16
        assert linear.weight.row_scale.min() >= SMALLEST_HALF_SCALE
    inputs = example_inputs(model.config)
    expected = fake_quantized_dit(fold_smoothing(quantized), ranges="token")(*inputs)
    half = fake_quantized_dit(folded, ranges="token")(inputs[0].half(), *inputs[1:])
    # Ten significant bits through two blocks.
    assert relative_error(expected, half.float()) < 2e-2


def test_overflow_in_half_precision_is_refused() -> None:
    quantized = quantized_tiny_dit(tiny_dit())
    name = "blocks.0.attn.qkv"
    linear = quantized.linears[name]
    huge = replace(linear, weight=replace(linear.weight, row_scale=linear.weight.row_scale * 1e9))
    with pytest.raises(QuantizationError, match="use precision fp32"):
        fold_smoothing(
            replace(quantized, linears={**quantized.linears, name: huge}), dtype=torch.float16
        )
