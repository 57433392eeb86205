from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import random_dit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ditas_export.calibration.literal import (
    LITERAL_PRESETS,
    LiteralLinear,
    literal_dit,
    literal_preset_named,
)
from ditas_export.calibration.states import CalibrationSettings, CalibrationStates, collect_states
from ditas_export.dit.model import DiT, DiTConfig
from ditas_export.errors import CalibrationError, QuantizationError
from ditas_export.evaluation.metrics import snr_db
from ditas_export.families.identity import identity_of
from ditas_export.families.outliers import plant_outliers
from ditas_export.families.registry import linear_names
from ditas_export.quantization.literal import (
    alternate_lora,
    fake_quantize_input_channels,
    fake_quantize_strided_blocks,
)

CONFIG = DiTConfig(
    input_size=8,
    patch_size=2,
    in_channels=4,
    hidden_size=64,
    depth=2,
    num_heads=4,
    num_classes=10,
)
"""Every output count is a multiple of 32, as strided blocks need."""

QUANTIZERS = [fake_quantize_input_channels, fake_quantize_strided_blocks]
ATOL = 1e-12  # float64, values of order 1


def random_weight(seed: int, rows: int = 96, columns: int = 5, *, offset: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight * torch.logspace(-2, 2, columns, dtype=torch.float64) + offset


def eq_3(x: np.ndarray, *, bits: int, divisor: int) -> np.ndarray:
    """q(x; s, z, b) = s [clamp(⌊x/s⌉ + z; 0, 2^b − 1) − z], its range holding 0."""
    low, high = min(x.min(), 0.0), max(x.max(), 0.0)
    s = (high - low) / divisor if high > low else 1.0
    z = np.rint(-low / s)
    return s * (np.clip(np.rint(x / s) + z, 0, 2**bits - 1) - z)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000), bits=st.sampled_from([2, 4, 8]), offset=st.floats(-300.0, 300.0)
)
def test_both_grids_are_equation_3_literally(seed: int, bits: int, offset: float) -> None:
    """Offsets up to one-signed channels; loops over channels and output channels."""
    weight = random_weight(seed, offset=offset)
    rows, columns = weight.shape
    per_channel, per_block = np.empty((2, rows, columns))
    for c in range(columns):
        channel = weight[:, c].numpy()
        per_channel[:, c] = eq_3(channel, bits=bits, divisor=2**bits - 1)
        for start in range(rows // 32):
            members = [start + step * (rows // 32) for step in range(32)]
            per_block[members, c] = eq_3(channel[members], bits=bits, divisor=2**bits)
    got = fake_quantize_input_channels(weight, bits=bits).numpy()
    assert np.allclose(got, per_channel, rtol=0, atol=ATOL * 600)
    got = fake_quantize_strided_blocks(weight, bits=bits).numpy()
    assert np.allclose(got, per_block, rtol=0, atol=ATOL * 600)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), bits=st.sampled_from([3, 4, 8]))
@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_what_every_literal_grid_keeps(quantize, seed: int, bits: int) -> None:  # type: ignore[no-untyped-def]
    weight = random_weight(seed)
    weight[::7] = 0.0
    before = weight.clone()
    rounded = quantize(weight, bits=bits)
    assert torch.equal(weight, before)
    assert (rounded[::7] == 0).all()
    widest = weight.clamp(min=0).amax(0) + (-weight).clamp(min=0).amax(0)
    # Half a step of rounding, half of the zero point's, and the clipped step of the divisor 2^b.
    assert ((rounded - weight).abs() <= 1.5 * widest / (2**bits - 1) * (1 + 1e-9)).all()
    if quantize is fake_quantize_input_channels:
        assert all(len(column.unique()) <= 2**bits for column in rounded.T)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), exponents=st.lists(st.integers(-8, 8), min_size=5, max_size=5))
@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_smoothing_a_weight_commutes_with_rounding_it(  # type: ignore[no-untyped-def]
    quantize, seed: int, exponents: list[int]
) -> None:
    """Q(W · s) = Q(W) · s, bit for bit where s is a power of two."""
    weight, s = random_weight(seed), 2.0 ** torch.tensor(exponents, dtype=torch.float64)
    assert torch.equal(quantize(weight * s, bits=4), quantize(weight, bits=4) * s)


def test_an_output_channel_touches_its_strided_block_alone() -> None:
    weight = random_weight(0, rows=128)
    changed = weight.clone()
    changed[6] *= 50
    moved = fake_quantize_strided_blocks(weight, bits=4) != fake_quantize_strided_blocks(
        changed, bits=4
    )
    assert set(moved.any(dim=1).nonzero().flatten().tolist()) <= set(range(2, 128, 4))
    assert moved[2::4].any()


def test_zero_weights_stay_zero() -> None:
    zeros = torch.zeros(32, 3)
    for quantize in QUANTIZERS:
        assert torch.equal(quantize(zeros, bits=4), zeros)


def test_strided_blocks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(QuantizationError, match="block_size=32 does not divide out_features=40"):
        fake_quantize_strided_blocks(torch.ones(40, 3), bits=4)


@pytest.mark.parametrize("iterations", [1, 2, 10])
def test_lora_is_equation_10_alternated(iterations: int) -> None:
    weight = random_weight(3, rows=64, columns=24)
    w, ab = weight.numpy(), np.zeros(weight.shape)
    for _ in range(iterations):
        q = np.stack([eq_3(column, bits=4, divisor=15) for column in (w - ab).T], axis=1)
        u, values, v = np.linalg.svd(w - q)
        ab = u[:, :6] @ np.diag(values[:6]) @ v[:6]
    got = alternate_lora(
        weight, lambda x: fake_quantize_input_channels(x, bits=4), rank=6, iterations=iterations
    )
    # Two SVDs of float64 matrices of norm ~ 1000.
    assert np.allclose(got.quantized.numpy(), q, rtol=0, atol=1e-8)
    assert np.allclose(got.matrix().numpy(), q + ab, rtol=0, atol=1e-8)
    assert got.left.shape == (64, 6)
    assert got.right.shape == (6, 24)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), rank=st.sampled_from([1, 4, 24]))
def test_lora_lowers_the_weight_error(seed: int, rank: int) -> None:
    weight = random_weight(seed, rows=64, columns=24)

    def quantizer(x: Tensor) -> Tensor:
        return fake_quantize_input_channels(x, bits=4)

    alone = float((weight - quantizer(weight)).norm())
    helped = float((weight - alternate_lora(weight, quantizer, rank=rank).matrix()).norm())
    assert helped < alone
    if rank == 24:
        assert helped < 1e-9 * float(weight.norm())


def test_a_literal_linear_is_equation_5() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
    weight, bias = random_weight(1, rows=32), torch.randn(32, dtype=torch.float64)
    s = torch.linspace(0.2, 3.0, 5, dtype=torch.float64)
    x_hat = eq_3((x / s).numpy().ravel(), bits=8, divisor=255).reshape(12, 5)
    expected = x_hat @ np.diag(s.numpy()) @ weight.T.numpy() + bias.numpy()
    got = LiteralLinear(weight, bias, s, activation_bits=8)(x)
    assert np.allclose(got.reshape(12, 32).numpy(), expected, rtol=0, atol=1e-10)


def states_of(model: DiT) -> CalibrationStates:
    calibration = CalibrationSettings(steps=4, classes=(1, 5, 7), seed=3)
    return collect_states(model, calibration, identity=identity_of(model))


@pytest.fixture(scope="module")
def planted() -> tuple[DiT, CalibrationStates]:
    model = plant_outliers(random_dit(CONFIG), channels=2, gain=(100.0, 300.0))
    return model, states_of(model)


def literal_linear(model: DiT, name: str) -> LiteralLinear:
    linear = model.get_submodule(name)
    assert isinstance(linear, LiteralLinear)
    return linear


def float_inputs(model: DiT, states: CalibrationStates, name: str) -> list[Tensor]:
    """X_t of one linear, (rows, T, K) each, the null class's rows included."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda _module, inputs: seen.append(inputs[0])
    )
    labels = torch.tensor([1, 5, 7, 10, 10, 10])
    for x, t in zip(states.latents, states.timesteps, strict=True):
        model(torch.cat([x, x]), t.expand(6), labels)
    hook.remove()
    return seen


@pytest.mark.parametrize("name", ["paper", "published"])
def test_algorithm_1_on_the_weight_that_ships(
    planted: tuple[DiT, CalibrationStates], name: str
) -> None:
    """α of every linear of the full recipe against a search that loops as the paper does.

    With 4-bit activations: these grids round W · s alike for every s, so α moves them alone.
    """
    model, states = planted
    quantized = literal_dit(model, states, LITERAL_PRESETS[name], activation_bits=4, rank=3)
    quantize = QUANTIZERS[name == "published"]
    spread = 1.0
    for name in linear_names(CONFIG):
        linear = model.get_submodule(name)
        w_hat = alternate_lora(linear.weight, lambda x: quantize(x, bits=4), rank=3).matrix()
        inputs = float_inputs(model, states, name)
        a = torch.stack([x.abs().amax((0, 1)) for x in inputs]).amax(0)
        b = linear.weight.abs().amax(0)
        losses, scales = [], []
        for m in range(21):
            alpha = 0.05 * m
            s = a**alpha / b ** (1 - alpha)
            loss = 0.0
            for x in inputs:
                x_hat = eq_3((x / s).numpy().ravel(), bits=4, divisor=15)
                got = torch.from_numpy(x_hat).reshape(x.shape) * s @ w_hat.T
                loss += float(((got - x @ linear.weight.T) ** 2).sum())
            losses.append(loss)
            scales.append(s)
        found = literal_linear(quantized, name)
        # Float32 powers; neighbouring α differ by percents.
        chosen = [torch.allclose(found.smoothing_scale, s, rtol=1e-4) for s in scales]
        assert sum(chosen) == 1
        s, loss = scales[chosen.index(True)], losses[chosen.index(True)]
        # Two α may be as good but for float32 sums.
        assert loss <= min(losses) * 1.001
        spread = max(spread, max(losses) / min(losses))
        assert torch.allclose(found.smoothed_weight, w_hat * s, rtol=1e-3, atol=1e-5)
        assert torch.equal(found.bias, linear.bias)
    assert spread > 1.5  # a search that has something to find


@pytest.mark.parametrize("family", ["paper", "published"])
def test_the_steps_of_the_ablation(planted: tuple[DiT, CalibrationStates], family: str) -> None:
    model, states = planted
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = "blocks.1.mlp.fc1"
    weight = model.get_submodule(name).weight
    quantize = QUANTIZERS[family == "published"]
    plain = literal_linear(literal_dit(model, states, LITERAL_PRESETS[f"{family}-linear"]), name)
    assert torch.equal(plain.smoothing_scale, torch.ones(64))
    assert torch.equal(plain.smoothed_weight, quantize(weight, bits=4))
    tas = literal_linear(literal_dit(model, states, LITERAL_PRESETS[f"{family}-tas"]), name)
    s = (states.input_maxima[name].amax(0) / weight.abs().amax(0)).sqrt()
    assert torch.allclose(tas.smoothing_scale, s, rtol=1e-5)
    assert torch.allclose(tas.smoothed_weight, quantize(weight, bits=4) * s, rtol=1e-5)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key


@pytest.mark.parametrize("family", ["paper", "published"])
def test_each_lever_helps_on_outliers(planted: tuple[DiT, CalibrationStates], family: str) -> None:
    """The order of the paper's Table 4, as mean SNR of the linears' outputs on the float inputs."""
    model, states = planted
    names = list(linear_names(CONFIG))
    inputs = {name: float_inputs(model, states, name)[1] for name in names}

    def mean_snr(preset: str, weight_bits: int = 4) -> float:
        quantized = literal_dit(
            model, states, LITERAL_PRESETS[preset], weight_bits=weight_bits, rank=8
        )
        found = [
            snr_db(model.get_submodule(name)(x), quantized.get_submodule(name)(x))
            for name, x in inputs.items()
        ]
        return sum(found) / len(found)

    linear, tas, search, full = (
        mean_snr(family + step) for step in ("-linear", "-tas", "-tas-search", "")
    )
    assert linear + 6 < tas
    assert tas < search + 0.1
    assert search + 1 < full
    assert full + 6 < mean_snr(family, weight_bits=8)


def test_the_default_rank_is_the_papers_share(planted: tuple[DiT, CalibrationStates]) -> None:
    model, states = planted
    preset, name = LITERAL_PRESETS["paper"], "blocks.0.attn.proj"
    default, explicit = (literal_dit(model, states, preset, rank=rank) for rank in (None, 2))
    assert torch.equal(
        literal_linear(default, name).smoothed_weight,
        literal_linear(explicit, name).smoothed_weight,
    )


def test_calibration_without_guidance_and_progress() -> None:
    model = random_dit(CONFIG)
    calibration = CalibrationSettings(steps=2, cfg_scale=1.0, classes=(1,), seed=3)
    states = collect_states(model, calibration, identity=identity_of(model))
    steps: list[tuple[int, int]] = []
    literal_dit(
        model, states, LITERAL_PRESETS["paper-tas-search"], on_step=lambda *s: steps.append(s)
    )
    assert steps == [(1, 2), (2, 2)]


def test_an_unknown_preset_is_refused_by_name() -> None:
    assert literal_preset_named("paper") is LITERAL_PRESETS["paper"]
    with pytest.raises(CalibrationError, match="no preset 'best'; pick one of paper-linear,"):
        literal_preset_named("best")
