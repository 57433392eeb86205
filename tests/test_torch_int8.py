"""INT8 products in PyTorch against the fake-quantized forward, float64 and the exported file."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_fixture import (
    TINY,
    example_inputs,
    exported,
    fed,
    folded_linear,
    quantized_tiny_dit,
    snr_db,
    tiny_folded,
)
from torch import Tensor

from ditas_export.calibration.fold import FoldedLinear, fold_smoothing
from ditas_export.calibration.modules import FakeQuantLinear, fake_quantized_model
from ditas_export.errors import RunnerError
from ditas_export.families.load import load_model
from ditas_export.quantization.ranges import RANGE_FLOOR, Ranges
from ditas_export.runtime.onnxruntime_runner import OnnxRuntimeRunner
from ditas_export.runtime.torch_int8 import (
    Int8Runner,
    IntegerLinear,
    int8_model,
    integer_product,
    integer_rows,
)
from ditas_export.runtime.torch_runner import TorchRunner

K = 96

ROUNDINGS = {
    torch.float64: 1e-14,
    torch.float32: 1e-6,  # 96 products, summed in float32 by the fake-quantized forward
    torch.float16: 3 * 2.0**-11,
    torch.bfloat16: 3 * 2.0**-8,
}
"""Relative error of a linear: about three roundings of the float type, of sum, product and bias.

float64 has no such roundings on one side only, and shows that the formulas are the same.
"""

TIES_DB = 60.0
"""Least SNR of a tiny model's output in float32.

Float32 sums in another order move a few inputs over a rounding tie, each by one code of 127.
"""


def random_input(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 3) -> Tensor:
    return torch.randn(*shape, K, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative_error(out: Tensor, reference: Tensor) -> float:
    return float((out.double() - reference.double()).norm() / reference.double().norm())


def exact_output(linear: FoldedLinear, module: FakeQuantLinear, x: Tensor) -> Tensor:
    """Return x̂ (W + left right)ᵀ + bias in float64, for the codes of the fake-quantized forward."""
    codes, ranges = module.codes(x)
    x = codes.double() * module.scale.double() * (1.0 if ranges is None else ranges.double())
    weight = linear.weight.to(torch.float64).dequantize()
    if linear.low_rank is not None:
        weight = weight + linear.low_rank.dequantize(linear.weight.row_scale.double())
    return x @ weight.T + linear.bias.double()


def both(linear: FoldedLinear, ranges: Ranges) -> tuple[IntegerLinear, FakeQuantLinear]:
    return (
        IntegerLinear(linear, ranges=ranges),
        FakeQuantLinear(linear, ranges=ranges, activation_bits=8),
    )


# --- The product --------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 40), k=st.integers(1, 70), n=st.integers(1, 70), seed=st.integers(0, 99)
)
def test_the_product_is_exact(tokens: int, k: int, n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (tokens, k), generator=generator, dtype=torch.int8)
    weight = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
    product = integer_product(codes, integer_rows(weight))
    assert product.dtype == torch.int32
    assert torch.equal(product[:, :n].long(), codes.long() @ weight.long().T)
    assert not product[:, n:].any()


def test_the_longest_product_of_a_dit_is_exact() -> None:
    codes = torch.full((3, 4608), -128, dtype=torch.int8)
    weight = torch.full((2, 4608), -127, dtype=torch.int8)
    product = integer_product(codes, integer_rows(weight))
    assert product[:, :2].tolist() == 3 * [2 * [4608 * 128 * 127]]


@pytest.mark.parametrize("tokens", [1, 16, 17, 40])
@pytest.mark.parametrize(("k", "n"), [(96, 80), (12, 10), (7, 1)])
def test_a_gpu_takes_every_shape(
    tokens: int, k: int, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    multiply = torch._int_mm

    def as_on_a_gpu(codes: Tensor, rows: Tensor) -> Tensor:
        """The checks of `_int_mm_out_cuda` in PyTorch's Blas.cpp."""
        assert codes.shape[0] > 16
        assert codes.shape[1] > 0
        assert codes.shape[1] % 8 == 0
        assert codes.shape[1] == rows.shape[0]
        assert rows.shape[1] > 0
        assert rows.shape[1] % 8 == 0
        return multiply(codes, rows)

    monkeypatch.setattr(torch, "_int_mm", as_on_a_gpu)
    linear = folded_linear(k, n, block_size=k, rank=1)
    integer, fake = both(linear, "token")
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(0))
    assert relative_error(integer(x), fake(x)) < ROUNDINGS[torch.float32]


# --- One linear ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", ["token", "static"])
@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("dtype", list(ROUNDINGS), ids=str)
@pytest.mark.parametrize("multiplies_input", [False, True])
def test_a_linear_is_the_fake_quantized_one(
    ranges: Ranges, weight_bits: int, rank: int, dtype: torch.dtype, multiplies_input: bool
) -> None:
    linear = folded_linear(
        K, weight_bits=weight_bits, rank=rank, dtype=dtype, multiplies_input=multiplies_input
    )
    integer, fake = both(linear, ranges)
    x = random_input(3, 15, dtype=dtype)
    out = integer(x)
    assert out.shape == (3, 15, 80)
    assert out.dtype == dtype
    assert relative_error(out, fake(x)) < 2 * ROUNDINGS[dtype]
    scaled = x if linear.input_multiplier is None else x * linear.input_multiplier
    assert relative_error(out, exact_output(linear, fake, scaled)) < ROUNDINGS[dtype]


@pytest.mark.parametrize("ranges", ["token", "static"])
@pytest.mark.parametrize("dtype", list(ROUNDINGS), ids=str)
def test_codes_are_those_of_the_fake_quantized_forward(ranges: Ranges, dtype: torch.dtype) -> None:
    integer, fake = both(folded_linear(K, dtype=dtype), ranges)
    x = random_input(500, dtype=dtype)
    x[0], x[1], x[2] = 0.0, RANGE_FLOOR / 2, 1e4  # nothing, below the floor, beyond a static range
    codes, token_ranges = integer.codes(x)
    expected, expected_ranges = fake.codes(x)
    assert codes.dtype == torch.int8
    assert torch.equal(codes.to(dtype), expected)
    assert (token_ranges is None) == (expected_ranges is None) == (ranges == "static")
    if token_ranges is not None and expected_ranges is not None:
        assert torch.equal(token_ranges, expected_ranges)


@pytest.mark.parametrize("ranges", ["token", "static"])
@pytest.mark.parametrize("shape", [(1,), (16,), (17,), (1, 1), (2, 16), (2, 3, 5)])
def test_any_number_of_tokens(ranges: Ranges, shape: tuple[int, ...]) -> None:
    integer, fake = both(folded_linear(K), ranges)
    x = random_input(*shape)
    before = x.clone()
    out = integer(x)
    assert out.shape == (*shape, 80)
    assert relative_error(out, fake(x)) < ROUNDINGS[torch.float32]
    assert torch.equal(x, before)


@pytest.mark.parametrize("ranges", ["token", "static"])
def test_a_token_of_zeros_gives_the_bias(ranges: Ranges) -> None:
    linear = folded_linear(K)
    x = random_input(40)
    x[7] = 0
    assert torch.equal(IntegerLinear(linear, ranges=ranges)(x)[7], linear.bias)


def test_a_static_range_at_the_floor() -> None:
    linear = folded_linear(K, static_range=0.0)
    integer, fake = both(linear, "static")
    x = random_input(40) * RANGE_FLOOR
    assert relative_error(integer(x), fake(x)) < ROUNDINGS[torch.float32]


def test_half_precision_does_not_overflow() -> None:
    """127 · 126 · 4608 is a thousand times what a half holds."""
    linear = folded_linear(4608, dtype=torch.float16)
    out = IntegerLinear(linear, ranges="token")(torch.ones(40, 4608, dtype=torch.float16))
    fake = FakeQuantLinear(linear, ranges="token", activation_bits=8)
    exact = exact_output(linear, fake, torch.ones(40, 4608, dtype=torch.float16))
    assert relative_error(out, exact) < ROUNDINGS[torch.float16]


def test_weights_are_kept_once_as_bytes() -> None:
    integer = IntegerLinear(folded_linear(K, rank=4), ranges="token")
    matrices = [tensor for tensor in integer.buffers() if tensor.ndim == 2]
    assert sorted((tuple(m.shape), m.dtype) for m in matrices if m.dtype == torch.int8) == [
        ((88, K), torch.int8)  # 80 + 4 rows, filled up to a multiple of 8
    ]
    assert [tuple(m.shape) for m in matrices if m.dtype != torch.int8] == [(80, 4)]  # left
    assert not integer.state_dict()


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler")
@pytest.mark.parametrize("ranges", ["token", "static"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_it_gives_the_same_numbers(ranges: Ranges, dtype: torch.dtype) -> None:
    integer = IntegerLinear(folded_linear(K, dtype=dtype), ranges=ranges)
    # On the grid, far from every tie: compiled quotients are not rounded to bfloat16.
    codes = torch.randint(-126, 127, (40, K), generator=torch.Generator().manual_seed(5))
    codes[:, 0] = 127
    x = (codes * integer.scale.float() * (2.0 if ranges == "token" else 1.0)).to(dtype)
    compiled = torch.compile(integer, dynamic=False)
    with torch.no_grad():
        assert relative_error(compiled(x), integer(x)) < 2 * ROUNDINGS[dtype]


# --- The whole model ----------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", ["token", "static"])
@pytest.mark.parametrize(("weight_bits", "rank"), [(4, 4), (4, 0), (8, 4)])
def test_a_model_is_the_fake_quantized_one(ranges: Ranges, weight_bits: int, rank: int) -> None:
    folded = tiny_folded(weight_bits=weight_bits, rank=rank)
    inputs = example_inputs()
    expected = TorchRunner(fake_quantized_model(folded, ranges=ranges))(fed(*inputs))
    assert snr_db(expected, Int8Runner(folded, ranges=ranges)(fed(*inputs))) > TIES_DB


def test_a_model_in_float64_is_exactly_the_fake_quantized_one() -> None:
    """No tie is near enough for float64 to move it, so the whole model agrees to its rounding."""
    folded = tiny_folded(dtype=torch.float64)
    latents, timesteps, labels = example_inputs()
    inputs = latents.double(), timesteps, labels
    expected = fake_quantized_model(folded, ranges="token")(*inputs)
    assert relative_error(int8_model(folded, ranges="token")(*inputs), expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_model_with_a_half_precision_side(dtype: torch.dtype) -> None:
    folded = tiny_folded(dtype=dtype)
    inputs = example_inputs()
    with Int8Runner(folded, ranges="token") as runner:
        out = runner(fed(*inputs))
    exact = TorchRunner(fake_quantized_model(tiny_folded(), ranges="token"))(fed(*inputs))
    fake = TorchRunner(fake_quantized_model(folded, ranges="token"))(fed(*inputs))
    assert out.dtype == torch.float32
    # As near to the float32 side as the fake-quantized forward in the same type, within 1 dB.
    assert snr_db(exact, out) > snr_db(exact, fake) - 1


@pytest.mark.parametrize("ranges", ["token", "static"])
def test_a_model_is_the_exported_file(ranges: Ranges) -> None:
    inputs = example_inputs(batch=4)
    with OnnxRuntimeRunner(exported(ranges=ranges), as_is=True, threads=1) as file:
        expected = file(fed(*inputs))
    assert snr_db(expected, Int8Runner(tiny_folded(), ranges=ranges)(fed(*inputs))) > TIES_DB


def test_the_bundled_model_is_the_fake_quantized_one() -> None:
    model = load_model("digits").model
    folded = fold_smoothing(quantized_tiny_dit(model, block_size=48, rank=4))
    inputs = example_inputs(model.config)
    expected = TorchRunner(fake_quantized_model(folded, ranges="token"))(fed(*inputs))
    # Five blocks carry ties on: 61 to 68 dB over six seeds.
    assert snr_db(expected, Int8Runner(folded, ranges="token")(fed(*inputs))) > 50


def test_integer_modulation_is_dequantized_once() -> None:
    folded = tiny_folded(adaln_bits=8)
    inputs = example_inputs()
    expected = TorchRunner(fake_quantized_model(folded, ranges="token"))(fed(*inputs))
    assert snr_db(expected, Int8Runner(folded, ranges="token")(fed(*inputs))) > TIES_DB


def test_every_block_linear_is_an_integer_one() -> None:
    model = int8_model(tiny_folded(), ranges="token")
    assert sum(isinstance(module, IntegerLinear) for module in model.modules()) == 4 * TINY.depth
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_description_says_int8() -> None:
    runner = Int8Runner(tiny_folded(), ranges="token")
    assert runner.description == f"PyTorch {torch.__version__} on cpu, float32, linears in INT8"


def test_float_activations_are_refused() -> None:
    with pytest.raises(RunnerError, match="take 8-bit activations, and this model has 16; run it"):
        int8_model(tiny_folded(activation_bits=16), ranges="token")


def test_an_output_is_not_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph writes every output to the same place."""
    runner = Int8Runner(tiny_folded(), ranges="token")
    inputs = example_inputs()
    forward: Callable[..., Tensor] = runner.model.forward
    place = torch.empty_like(forward(*inputs))
    monkeypatch.setattr(runner.model, "forward", lambda **given: place.copy_(forward(**given)))
    first = runner(fed(*inputs))
    kept = first.clone()
    runner(fed(inputs[0] + 1, *inputs[1:]))
    assert torch.equal(first, kept)


# --- On a GPU -----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("ranges", ["token", "static"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 17, 256])
def test_a_gpu_gives_the_same_linear(ranges: Ranges, dtype: torch.dtype, tokens: int) -> None:
    linear = folded_linear(K, dtype=dtype)
    integer, fake = both(linear, ranges)
    x = random_input(tokens, dtype=dtype).cuda()
    integer, fake = integer.cuda(), fake.cuda()
    assert torch.equal(integer.codes(x)[0].to(dtype), fake.codes(x)[0])
    assert relative_error(integer(x), fake(x)) < 2 * ROUNDINGS[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "least_db"), [(torch.float32, 40.0), (torch.float16, 35.0), (torch.bfloat16, 20.0)]
)
def test_compiled_on_a_gpu_it_is_the_same_model(dtype: torch.dtype, least_db: float) -> None:
    runner = Int8Runner(tiny_folded(dtype=dtype), ranges="token", device="cuda")
    exact = TorchRunner(fake_quantized_model(tiny_folded(), ranges="token"))
    outputs, expected = [], []
    for seed in range(3):  # a CUDA graph replays from the second or third pass on
        inputs = [tensor.cuda() for tensor in example_inputs(seed=seed)]
        outputs.append(runner(fed(*inputs)))
        expected.append(exact(fed(*inputs)))
    for out, reference in zip(outputs, expected, strict=True):
        assert snr_db(reference.cpu(), out.cpu()) > least_db
