"""One linear's QDQ subgraph in ONNX Runtime against the fake-quantized module."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from quantized_fixture import folded_linear, run_linear, snr_db, write_linear
from torch import Tensor

from ditas_export.calibration.modules import FakeQuantLinear
from ditas_export.errors import OnnxExportError
from ditas_export.onnx_export.forms.tensorrt import shared_scale
from ditas_export.onnx_export.lowering import choose_form
from ditas_export.quantization.ranges import RANGE_FLOOR

K = 96
ACCURATE = {"session.qdq_matmulnbits_accuracy_level": "1"}
HALF_ROUNDING = 1e-3
"""Two roundings to half precision, 2⁻¹¹ each: what one linear may differ by in float16."""


TARGETS = [(0, "portable"), (4, "portable"), (4, "onnxruntime"), (4, "tensorrt")]
"""Ranks and targets: where a low-rank branch is, each target has a form of its own."""


def random_input(seed: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 5, K, generator=torch.Generator().manual_seed(seed)).to(dtype)


def input_on_the_grid(module: FakeQuantLinear) -> tuple[Tensor, Tensor]:
    """Return an input whose INT8 codes are known, far from every rounding tie, and the codes."""
    generator = torch.Generator().manual_seed(5)
    codes = torch.randint(-126, 127, (3, 5, K), generator=generator).float()
    codes[..., 0] = 127  # the token's maximum, so that r is its range
    if module.ranges == "token":
        ranges = 0.1 + torch.rand(3, 5, 1, generator=generator)
        return (codes / 127 * ranges).to(module.bias.dtype), codes
    return (codes * module.scale.float()).to(module.bias.dtype), codes


def relative_error(out: Tensor, reference: Tensor) -> float:
    return float((out.double() - reference.double()).norm() / reference.double().norm())


@pytest.mark.parametrize("layout", ["int4", "int8"])
@pytest.mark.parametrize("ranges", ["token", "static"])
@pytest.mark.parametrize(("rank", "target"), TARGETS)
@pytest.mark.parametrize("splits_output", [False, True])
def test_same_codes_give_the_same_numbers(
    tmp_path: Path, layout: str, ranges: str, rank: int, target: str, splits_output: bool
) -> None:
    linear = folded_linear(K, rank=rank)
    module = FakeQuantLinear(linear, ranges=ranges, activation_bits=8, target=target)
    path = tmp_path / "linear.onnx"
    write_linear(
        path,
        linear,
        layout=layout,
        ranges=ranges,
        activation_bits=8,
        splits_output=splits_output,
        target=target,
    )
    x, codes = input_on_the_grid(module)
    assert torch.equal(module.codes(x)[0], codes)
    # Both sum the same integers; float32 rounds the products and sums of either side.
    assert relative_error(run_linear(path, x), module(x)) < 1e-6


@pytest.mark.parametrize("layout", ["int4", "int8"])
@pytest.mark.parametrize("ranges", ["token", "static"])
@pytest.mark.parametrize("multiplies_input", [False, True])
def test_same_input_gives_the_same_numbers_but_for_ties(
    tmp_path: Path, layout: str, ranges: str, multiplies_input: bool
) -> None:
    linear = folded_linear(K, multiplies_input=multiplies_input)
    module = FakeQuantLinear(linear, ranges=ranges, activation_bits=8)
    path = tmp_path / "linear.onnx"
    write_linear(path, linear, layout=layout, ranges=ranges, activation_bits=8, splits_output=False)
    x = random_input()
    assert snr_db(module(x), run_linear(path, x)) > 70


@pytest.mark.parametrize("ranges", ["token", "static"])
@pytest.mark.parametrize(("rank", "target"), TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_layouts_agree_bit_for_bit(
    tmp_path: Path, ranges: str, rank: int, target: str, dtype: torch.dtype
) -> None:
    linear = folded_linear(K, rank=rank, dtype=dtype)
    x = random_input(dtype=dtype)
    outputs = []
    for layout in ("int4", "int8"):
        path = tmp_path / f"{layout}.onnx"
        write_linear(
            path,
            linear,
            layout=layout,
            ranges=ranges,
            activation_bits=8,
            splits_output=True,
            target=target,
        )
        outputs.append(run_linear(path, x))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("layout", ["int4", "int8"])
@pytest.mark.parametrize("ranges", ["token", "static"])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 3), (4, 1), (2, 2)])
def test_a_linear_in_parts_gives_the_same_bits(
    tmp_path: Path, layout: str, ranges: str, inputs: int, outputs: int
) -> None:
    """A range is over all parts of a token, and every channel has its own 1/s, row and bias."""
    linear = folded_linear(K, out_features=24, multiplies_input=True)
    form = {"layout": layout, "ranges": ranges, "activation_bits": 8, "target": "onnxruntime"}
    x = random_input()
    made = []
    for parts in ({}, {"inputs": inputs, "outputs": outputs}):
        path = tmp_path / f"{len(parts)}.onnx"
        write_linear(path, linear, splits_output=False, **form, **parts)
        made.append(run_linear(path, x))
    assert made[0].shape == (3, 5, 24)
    assert torch.equal(*made)


@pytest.mark.parametrize("layout", ["int4", "int8"])
@pytest.mark.parametrize("ranges", ["token", "static"])
@pytest.mark.parametrize("target", ["portable", "onnxruntime", "tensorrt"])
def test_half_precision_agrees_to_its_rounding(
    tmp_path: Path, layout: str, ranges: str, target: str
) -> None:
    linear = folded_linear(K, dtype=torch.float16)
    module = FakeQuantLinear(linear, ranges=ranges, activation_bits=8)
    path = tmp_path / "linear.onnx"
    write_linear(
        path,
        linear,
        layout=layout,
        ranges=ranges,
        activation_bits=8,
        splits_output=False,
        target=target,
    )
    x, codes = input_on_the_grid(module)
    assert torch.equal(module.codes(x)[0].float(), codes)
    assert relative_error(run_linear(path, x), module(x)) < HALF_ROUNDING
    # x / r rounds to half precision near ties: some codes differ by one.
    x = random_input(dtype=torch.float16)
    assert snr_db(module(x), run_linear(path, x)) > 45


@pytest.mark.parametrize(("bits", "layout"), [(4, "int4"), (4, "int8"), (8, "int8")])
@pytest.mark.parametrize("rank", [0, 4])
def test_float_activations(tmp_path: Path, bits: int, layout: str, rank: int) -> None:
    linear = folded_linear(K, weight_bits=bits, block_size=32, rank=rank)
    module = FakeQuantLinear(linear, ranges="token", activation_bits=16)
    path = tmp_path / "linear.onnx"
    write_linear(
        path, linear, layout=layout, ranges="token", activation_bits=16, splits_output=False
    )
    x = random_input()
    assert snr_db(module(x), run_linear(path, x, **ACCURATE)) > 70
    # By default ONNX Runtime quantizes the activations of weight-only kernels to 8 bits.
    assert snr_db(module(x), run_linear(path, x)) > 40


@pytest.mark.parametrize("ranges", ["token", "static"])
def test_eight_bit_weights(tmp_path: Path, ranges: str) -> None:
    linear = folded_linear(K, weight_bits=8)
    module = FakeQuantLinear(linear, ranges=ranges, activation_bits=8)
    path = tmp_path / "linear.onnx"
    write_linear(path, linear, layout="int8", ranges=ranges, activation_bits=8, splits_output=False)
    x = random_input()
    assert snr_db(module(x), run_linear(path, x)) > 70


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("target", ["portable", "onnxruntime"])
@pytest.mark.parametrize("magnitude", [0.0, RANGE_FLOOR / 8])
def test_a_vanishing_token_has_the_floor_as_its_range(
    tmp_path: Path, dtype: torch.dtype, target: str, magnitude: float
) -> None:
    linear = folded_linear(K, dtype=dtype)
    module = FakeQuantLinear(linear, ranges="token", activation_bits=8)
    path = tmp_path / "linear.onnx"
    write_linear(
        path,
        linear,
        layout="int4",
        ranges="token",
        activation_bits=8,
        splits_output=False,
        target=target,
    )
    x = random_input(dtype=dtype)
    x[0, 0] = magnitude
    out, reference = run_linear(path, x), module(x)
    assert out.isfinite().all()
    assert torch.allclose(out[0, 0], reference[0, 0], rtol=HALF_ROUNDING, atol=1e-6)
    if magnitude == 0:
        assert torch.equal(out[0, 0], linear.bias)


def test_eight_bit_weights_have_no_int4_layout(tmp_path: Path) -> None:
    linear = folded_linear(K, weight_bits=8)
    with pytest.raises(OnnxExportError, match="use layout int8"):
        write_linear(
            tmp_path / "linear.onnx",
            linear,
            layout="int4",
            ranges="token",
            activation_bits=8,
            splits_output=False,
        )


def test_a_block_without_a_weight_only_kernel_is_refused(tmp_path: Path) -> None:
    linear = folded_linear(K, block_size=48)
    with pytest.raises(OnnxExportError, match=r"block_size=48 .* 32, 64, 128"):
        write_linear(
            tmp_path / "linear.onnx",
            linear,
            layout="int4",
            ranges="token",
            activation_bits=16,
            splits_output=False,
        )


@pytest.mark.parametrize("layout", ["int4", "int8"])
def test_the_largest_products_of_a_wide_linear_fit_a_half(tmp_path: Path, layout: str) -> None:
    linear = folded_linear(4608, 8, rank=4, static_range=40.0, dtype=torch.float16)
    weight = linear.weight
    largest = replace(
        weight,
        codes=torch.full_like(weight.codes, 7),
        multipliers=torch.full_like(weight.multipliers, 18),
        row_scale=torch.full_like(weight.row_scale, 2.0**-12),
    )
    linear = replace(linear, weight=largest)
    path = tmp_path / "linear.onnx"
    write_linear(
        path,
        linear,
        layout=layout,
        ranges="static",
        activation_bits=8,
        splits_output=False,
        target="tensorrt",
    )
    module = FakeQuantLinear(linear, ranges="static", activation_bits=8, target="tensorrt")
    x = torch.full((3, 5, 4608), 40.0, dtype=torch.float16)
    assert relative_error(run_linear(path, x), module(x)) < HALF_ROUNDING
    # ONNX Runtime computes halves in float32 on CPUs; NumPy rounds every result to a half.
    (in_halves,) = ReferenceEvaluator(str(path)).run(None, {"x": x.numpy()})
    assert in_halves.dtype == np.float16
    assert relative_error(torch.from_numpy(in_halves), module(x)) < 4 * HALF_ROUNDING


@pytest.mark.parametrize("in_features", [96, 1152, 4608, 8192])
@pytest.mark.parametrize("input_scale", [1 / 127, 2.0**-21, 3.0 / 127, 40.0 / 127])
def test_no_product_under_a_shared_scale_leaves_half_a_half(
    in_features: int, input_scale: float
) -> None:
    """Codes of ±127 times rows of -128; the sum of linear and branch may be twice as much."""
    scale = shared_scale(in_features, input_scale)
    largest = in_features * 127 * 128 * input_scale * scale
    assert largest * 2 <= float(np.finfo(np.float16).max)
    assert largest * 16 > float(
        np.finfo(np.float16).max
    )  # and the scale is no smaller than need be
    assert np.log2(scale) == round(np.log2(scale))


@pytest.mark.parametrize(
    ("settings", "rank", "dtype", "form", "bias_rank"),
    [
        ({"target": "portable"}, 4, torch.float32, "portable", 1),
        ({"target": "portable"}, 0, torch.float32, "portable", 1),
        ({"target": "portable", "ranges": "static"}, 4, torch.float32, "portable", 1),
        ({"target": "portable", "ranges": "static"}, 0, torch.float32, "portable", 3),
        ({"target": "portable", "ranges": "static", "splits_output": True}, 0, torch.float32,
         "cut", 3),
        ({"target": "portable", "ranges": "static", "splits_output": True}, 4, torch.float32,
         "portable", 1),
        ({"target": "onnxruntime"}, 4, torch.float32, "joined", 3),
        ({"target": "onnxruntime"}, 0, torch.float32, "portable", 3),
        ({"target": "onnxruntime"}, 4, torch.float16, "portable", 1),
        ({"target": "tensorrt"}, 4, torch.float16, "shared scale", 1),
        ({"target": "tensorrt", "ranges": "static"}, 4, torch.bfloat16, "shared scale", 1),
        ({"target": "tensorrt"}, 0, torch.float16, "portable", 1),
        ({"target": "tensorrt", "activation_bits": 16}, 4, torch.float16, "float activations", 1),
        ({"target": "onnxruntime", "activation_bits": 16}, 0, torch.float32,
         "float activations", 3),
    ],
)  # fmt: skip
def test_the_form_that_is_chosen(
    settings: dict[str, Any], rank: int, dtype: torch.dtype, form: str, bias_rank: int
) -> None:
    asked: dict[str, Any] = {"ranges": "token", "activation_bits": 8, "splits_output": False}
    choice = choose_form(has_branch=rank > 0, dtype=dtype, **asked | settings)
    assert (choice.form, choice.bias_rank) == (form, bias_rank)
    assert choice.reason


def test_parts_are_for_the_joined_form_alone(tmp_path: Path) -> None:
    settings = {"layout": "int4", "ranges": "token", "activation_bits": 8, "splits_output": False}
    with pytest.raises(OnnxExportError, match="1 inputs and 3 outputs in the form 'portable'"):
        write_linear(tmp_path / "linear.onnx", folded_linear(K, 24), outputs=3, **settings)
