from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from ditas_export.calibration import solve
from ditas_export.calibration.methods import ALPHA_GRID, METHODS, method_named
from ditas_export.calibration.solve import (
    RIDGE,
    JointMoments,
    LinearInputs,
    LinearSettings,
    SolvedLinear,
    corrected_target,
    round_activations,
    sample_codes,
    sample_tokens,
    search_alpha,
    solve_linear,
)
from ditas_export.errors import CalibrationError
from ditas_export.quantization.integer import round_to_blocks
from ditas_export.quantization.rounding import (
    InputMoments,
    damped,
    ridge_of,
    upper_cholesky,
)
from ditas_export.quantization.smoothing import smoothing_scale

SETTINGS = LinearSettings(
    method=METHODS["ditas-plus"],
    weight_bits=4,
    activation_bits=8,
    ranges="token",
    block_size=16,
    rank=2,
    alpha_grid=(0.0, 0.25, 0.5, 0.75, 1.0),
)


def problem(
    seed: int = 0, outlier: float = 30.0, constant: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, LinearInputs]:
    """A linear with correlated inputs, one outlier channel, and a quantized stream that drifts.

    `constant` is added to one channel.
    """
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(12, 48, generator=generator)
    x_float = torch.randn(600, 12, generator=generator) @ mixing
    x_float += 0.3 * torch.randn(600, 48, generator=generator)
    x_float[:, 7] *= outlier
    x_float[:, 11] += constant
    drift = torch.randn(48, generator=generator) * 0.1
    x_quantized = x_float * 1.02 + drift + 0.05 * torch.randn(600, 48, generator=generator)
    weight = torch.randn(24, 48, generator=generator) / 7
    weight[:, 7] /= outlier
    bias = torch.randn(24, generator=generator)

    def batches(stride: int) -> Iterator[tuple[Tensor, Tensor]]:
        for x_f, x_q in zip(x_float.split(250), x_quantized.split(250), strict=True):
            yield x_f[::stride], x_q[::stride]

    maxima = torch.stack([part.abs().amax(0) for part in x_float.split(100)])
    return weight, bias, maxima, LinearInputs(tokens=600, batches=batches)


def all_tokens(inputs: LinearInputs) -> tuple[Tensor, Tensor]:
    parts = list(inputs.batches(1))
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def output_error(
    solved: SolvedLinear, weight: Tensor, bias: Tensor, maxima: Tensor, inputs: LinearInputs
) -> float:
    x_float, x_quantized = all_tokens(inputs)
    x_hat = round_activations(
        x_quantized / solved.smoothing_scale,
        activation_bits=8,
        ranges="token",
        static_range=0.0,
    )
    wanted = x_float @ weight.T + bias
    got = x_hat @ solved.matrix().T + solved.bias
    return float((got - wanted).square().sum() / wanted.square().sum())


def joined_error(solved: SolvedLinear, weight: Tensor, bias: Tensor, inputs: LinearInputs) -> float:
    """`output_error` with the low-rank inner product rounded, as where it joins the linear's."""
    x_float, x_quantized = (part.double() for part in all_tokens(inputs))
    smooth = x_quantized / solved.smoothing_scale
    ranges = smooth.abs().amax(dim=1, keepdim=True)
    codes = (smooth / ranges * 127).round()
    branch = solved.low_rank
    assert branch is not None
    inner = (codes @ branch.right_codes.double().T / branch.divisor).round().clamp(-128, 127)
    integers = codes @ solved.weight.int8_rows().double().T + inner @ branch.left_codes.double().T
    got = integers * solved.weight.row_scale * ranges / 127 + solved.bias
    wanted = x_float @ weight.double().T + bias
    return float((got - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("rows", [24, 80])
def test_moments_are_the_centred_averages(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer outputs than inputs, and more; the Gram matrix in panels that do not divide it."""
    monkeypatch.setattr(solve, "PRODUCT_PANEL", 20)
    weight = torch.randn(rows, 48, generator=torch.Generator().manual_seed(5))
    _, _, _, inputs = problem()
    x_float, x_quantized = (part.double() for part in all_tokens(inputs))
    moments = JointMoments.accumulate(weight, inputs.batches(1))
    outputs = x_float @ weight.double().T
    centred = x_quantized - x_quantized.mean(0)
    gram = centred.T @ centred / 600
    cross = (outputs - outputs.mean(0)).T @ centred / 600
    # Float32 products of values up to ~400, summed over 600 tokens.
    assert torch.allclose(moments.quantized, gram, rtol=1e-4, atol=1e-2)
    assert torch.equal(moments.quantized, moments.quantized.T)
    assert (moments.cross - cross).norm() < 1e-5 * cross.norm()
    assert torch.allclose(moments.output_mean, outputs.mean(0), atol=1e-3)
    assert torch.allclose(moments.quantized_mean, x_quantized.mean(0), atol=1e-4)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rounding_and_the_branch_alternate_and_the_best_is_kept(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is fitted to what the other leaves of the target; errors are counted by their output."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(24, 48, generator=generator)
    mixing = torch.randn(48, 60, generator=generator, dtype=torch.float64)
    moments = InputMoments.from_cholesky(upper_cholesky(mixing @ mixing.T))
    output_weights = 10 ** torch.linspace(-2, 2, 24)
    rounded, fitted = [], []
    blocks, fit = solve.compensated_blocks, solve.fit_output_error

    def round_blocks(weight: Tensor, *args: Any, **options: Any) -> Any:
        product = fitted[-1].product() if fitted else torch.zeros(24, 48, dtype=torch.float64)
        assert torch.allclose(weight.double(), target - product, atol=1e-5)
        rounded.append(blocks(weight, *args, **options))
        return rounded[-1]

    def fit_error(whitened: Tensor, *args: Any) -> Any:
        exact = (target - rounded[-1][0].dequantize()).double() @ moments.cholesky
        assert (whitened - exact).norm() < 1e-4 * exact.norm()  # float32
        fitted.append(fit(whitened, *args))
        return fitted[-1]

    monkeypatch.setattr(solve, "compensated_blocks", round_blocks)
    monkeypatch.setattr(solve, "fit_output_error", fit_error)
    best, _ = solve._round_to_target(target, moments, output_weights, SETTINGS)
    errors = []
    for (integers, _), factors in zip(rounded, fitted, strict=True):
        left_over = target - integers.dequantize() - factors.product()
        errors.append(float((output_weights[:, None] * (left_over @ moments.cholesky)).norm()))
    assert len(errors) == solve.LOW_RANK_ITERATIONS
    assert best is rounded[errors.index(min(errors))][0]


def test_8_bit_weights_are_rounded_as_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Tensor:
        raise AssertionError("8-bit weights and plain rounding have no order")

    monkeypatch.setattr(solve, "rounding_order", refuse)
    weight, bias, maxima, inputs = problem()
    plain = replace(METHODS["ditas-plus"], compensated_rounding=False)
    for changes in ({"weight_bits": 8, "rank": 0}, {"method": plain}):
        settings = replace(SETTINGS, **changes)  # type: ignore[arg-type]
        solve_linear(weight, bias, maxima, inputs, torch.ones(24), settings)


def test_the_target_minimises_the_ridge_problem() -> None:
    """W* against ordinary least squares on the tokens themselves, with λ as extra rows."""
    weight, _, _, inputs = problem(outlier=1.0)
    x_float, x_quantized = (part.double() for part in all_tokens(inputs))
    doubles = [(a.double(), b.double()) for a, b in inputs.batches(1)]
    moments = JointMoments.accumulate(weight.double(), doubles)
    cholesky = upper_cholesky(damped(moments.quantized, RIDGE))
    s = torch.linspace(0.5, 2.0, 48, dtype=torch.float64)
    ridge = ridge_of(moments.quantized, RIDGE)
    got = corrected_target(weight * s, moments.cross, ridge, cholesky)
    anchor = ridge**0.5 * torch.eye(48, dtype=torch.float64)
    rows = torch.cat([(x_quantized - x_quantized.mean(0)) / 600**0.5, anchor])
    wanted = torch.cat(
        [
            (x_float - x_float.mean(0)) / 600**0.5 @ weight.double().T,
            anchor @ (weight.double() * s).T,
        ]
    )
    expected = torch.linalg.lstsq(rows, wanted).solution.T
    assert torch.allclose(got, expected, rtol=1e-8, atol=1e-8)


def test_lora_ao_keeps_its_best_iterate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equation 10 alternates; of ten iterates the one of least weight error is kept."""
    fitted = []
    fit = solve.fit_weight_error

    def keep(error_left: Tensor, rank: int) -> Any:
        fitted.append((error_left, fit(error_left, rank)))
        return fitted[-1][1]

    monkeypatch.setattr(solve, "fit_weight_error", keep)
    lasts = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        smoothed = torch.randn(24, 48, generator=generator)
        fitted.clear()
        weight, factors = solve._round_to_weight(smoothed, SETTINGS)
        assert factors is not None
        errors = [
            float((left_over - found.product().double()).square().sum())
            for left_over, found in fitted
        ]
        assert len(errors) == solve.LOW_RANK_ITERATIONS
        kept = (smoothed - weight.dequantize()).double() - factors.product().double()
        assert float(kept.square().sum()) == pytest.approx(min(errors), rel=1e-5)  # float32
        lasts.append(errors.index(min(errors)) == len(errors) - 1)
    assert not all(lasts)  # the last is not always the best: there is something to keep


def test_the_search_counts_outputs_by_their_weights() -> None:
    """Two halves of the outputs want another α each; which half counts decides."""
    weight, _, maxima, inputs = problem(seed=1)
    weight = weight.clone()
    weight[12:, 7] *= 3000.0  # here the outlier channel has the largest weights as well
    chosen = []
    for counts in (slice(None, 12), slice(12, None)):
        output_weights = torch.full((24,), 1e-6)
        output_weights[counts] = 1.0
        chosen.append(
            search_alpha(weight, maxima.amax(0), maxima, inputs, output_weights, SETTINGS)
        )
        losses = {}
        x_float, x_quantized = all_tokens(inputs)
        relative = weight / weight.abs().amax(dim=1, keepdim=True)
        for alpha in SETTINGS.alpha_grid:
            s = smoothing_scale(maxima.amax(0), relative.abs().amax(0), alpha)
            x = x_quantized / s
            r = x.abs().amax(1, keepdim=True)
            x_hat = (x / r * 127).round() / 127 * r
            w_hat = round_to_blocks(weight * s, block_size=16).dequantize()
            error = (x_hat @ w_hat.T - x_float @ weight.T) * output_weights
            losses[alpha] = float(error.double().square().sum())
        assert chosen[-1] == min(losses, key=lambda alpha: losses[alpha])
    assert chosen[0] != chosen[1]


@pytest.mark.parametrize(
    ("grid", "roundings"), [(SETTINGS.alpha_grid, 5), (ALPHA_GRID, 21 + 5)], ids=["short", "long"]
)
def test_algorithm_1_literally(
    grid: Sequence[float], roundings: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """α as the paper searches it: every α, every token, nearest rounding, the float output.

    Of a long grid only the best are tried on every token.
    """
    counted = Mock(side_effect=solve._round_once)
    monkeypatch.setattr(solve, "_round_once", counted)
    weight, _, maxima, inputs = problem(seed=1)
    settings = replace(SETTINGS, method=METHODS["tas-search"], alpha_grid=grid)
    x_float, x_quantized = all_tokens(inputs)
    losses = {}
    for alpha in settings.alpha_grid:
        s = smoothing_scale(maxima.amax(0), weight.abs().amax(0), alpha)
        x = x_quantized / s
        r = x.abs().amax(1, keepdim=True)
        x_hat = (x / r * 127).round() / 127 * r
        w_hat = round_to_blocks(weight * s, block_size=16).dequantize()
        losses[alpha] = float((x_hat @ w_hat.T - x_float @ weight.T).square().sum())
    expected = min(losses, key=lambda alpha: losses[alpha])
    assert (
        search_alpha(weight, maxima.amax(0), maxima, inputs, torch.ones(24), settings) == expected
    )
    assert counted.call_count == roundings
    assert 0.0 < expected < 1.0  # a case in which the search has something to find


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_lever_lowers_the_output_error(seed: int) -> None:
    """The reason why the methods exist, on the output of one linear with an outlier channel."""
    weight, bias, maxima, inputs = problem(seed)
    errors = {}
    for name in METHODS:
        settings = replace(SETTINGS, method=METHODS[name])
        solved = solve_linear(weight, bias, maxima, inputs, torch.ones(24), settings)
        errors[name] = output_error(solved, weight, bias, maxima, inputs)
    assert errors["tas"] < errors["linear"]
    assert errors["tas-search"] <= errors["tas"] * 1.01  # nearest rounding is not monotone
    assert errors["ditas"] < errors["tas-search"]
    assert errors["ditas-plus"] < 0.5 * errors["ditas"]


def test_columns_are_rounded_in_the_order_that_costs_least(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over a few problems: in a single small one rounding may be lucky in any order."""

    def mean_error() -> float:
        errors = []
        for seed in range(6):
            weight, bias, maxima, inputs = problem(seed)
            solved = solve_linear(weight, bias, maxima, inputs, torch.ones(24), SETTINGS)
            errors.append(output_error(solved, weight, bias, maxima, inputs))
        return sum(errors) / len(errors)

    ordered = mean_error()
    monkeypatch.setattr(
        solve,
        "rounding_order",
        lambda moment, block_size: (torch.arange(48), upper_cholesky(moment)),
    )
    assert ordered < 0.95 * mean_error()


@pytest.mark.parametrize("corrected", [True, False])
def test_the_bias_absorbs_the_drift_of_the_means(corrected: bool) -> None:
    weight, bias, maxima, inputs = problem()
    method = replace(METHODS["ditas-plus"], target_correction=corrected)
    settings = replace(SETTINGS, method=method)
    solved = solve_linear(weight, bias, maxima, inputs, torch.ones(24), settings)
    x_float, x_quantized = all_tokens(inputs)
    x_hat = round_activations(
        x_quantized / solved.smoothing_scale, activation_bits=8, ranges="token", static_range=0.0
    )
    error = x_hat @ solved.matrix().T + solved.bias - x_float @ weight.T - bias
    assert error.mean(0).abs().max() < 1e-3 * error.std()


@pytest.mark.parametrize(
    ("seed", "constant", "rank", "alpha"), [(0, 3000.0, 8, 0.7), (1, 1000.0, 2, 0.3)]
)
def test_a_constant_channel_does_not_coarsen_the_branch(
    seed: int, constant: float, rank: int, alpha: float
) -> None:
    """Rounding the inner product is to cost little where its mean is hundreds of times its spread.

    Of the first fit's 25 dB it takes 1.4, with divisors that mind the mean, which the bias mends,
    7.7. In the second, an inner product that is clamped at every token would lose 39 dB: its mean
    the bias does not mend.
    """
    weight, bias, maxima, inputs = problem(seed, constant=constant)
    settings = replace(SETTINGS, rank=rank, alpha_grid=(alpha,))
    solved = solve_linear(weight, bias, maxima, inputs, torch.ones(24), settings)
    unrounded = output_error(solved, weight, bias, maxima, inputs)
    assert 10 * math.log10(joined_error(solved, weight, bias, inputs) / unrounded) < 2.0


def test_the_sampled_codes_are_those_of_the_smoothed_quantized_stream() -> None:
    _, _, _, inputs = problem()
    smoothing = torch.linspace(0.5, 2.0, 48)
    sample = sample_codes(inputs, smoothing)
    smooth = all_tokens(inputs)[1] / smoothing
    assert torch.equal(sample.ranges, smooth.abs().amax(dim=1, keepdim=True))
    assert sample.codes.dtype == torch.int8
    steps = sample.ranges / 127
    # Half a step, and the float32 rounding of a code of up to 127.
    assert ((sample.codes * steps - smooth).abs() <= 0.5001 * steps).all()


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.parametrize("bits", [4, 8])
def test_what_each_method_gives(name: str, bits: int) -> None:
    weight, bias, maxima, inputs = problem()
    before = weight.clone()
    method = method_named(name)
    settings = replace(SETTINGS, method=method, weight_bits=bits)
    solved = solve_linear(weight, bias, maxima, inputs, torch.ones(24), settings)
    assert torch.equal(weight, before)
    assert solved.weight.bits == bits
    assert solved.weight.row_scale.dtype == torch.float32
    assert (solved.low_rank is not None) == (method.low_rank != "none")
    assert (solved.alpha is None) == (method.smoothing == "none")
    if method.smoothing == "none":
        assert torch.equal(solved.smoothing_scale, torch.ones(48))


def test_smoothquant_looks_at_one_time_step_only() -> None:
    weight, bias, maxima, inputs = problem()
    solved = solve_linear(
        weight,
        bias,
        maxima,
        inputs,
        torch.ones(24),
        replace(SETTINGS, method=METHODS["smoothquant"]),
    )
    middle = maxima[maxima.shape[0] // 2]
    assert torch.equal(solved.smoothing_scale, smoothing_scale(middle, weight.abs().amax(0), 0.5))


def test_float_activations_pass_unrounded() -> None:
    x = torch.randn(3, 4)
    assert torch.equal(
        round_activations(x, activation_bits=16, ranges="token", static_range=1.0), x
    )
    static = round_activations(x, activation_bits=8, ranges="static", static_range=2.0)
    codes = (x / (2.0 / 127)).round().clamp(-128, 127)
    assert torch.allclose(static, codes * (2.0 / 127))


def test_the_token_sample_is_bounded() -> None:
    x = torch.arange(10_000.0)[:, None]
    asked = []

    def batches(stride: int) -> Iterator[tuple[Tensor, Tensor]]:
        asked.append(stride)
        yield x[:5000:stride], -x[:5000:stride]
        yield x[5000::stride], -x[5000::stride]

    sample, other = sample_tokens(LinearInputs(tokens=10_000, batches=batches))
    assert asked == [3]
    assert torch.equal(sample, -other)
    assert torch.equal(sample, torch.cat([x[:5000:3], x[5000::3]]))


def test_an_unknown_method_is_refused_by_name() -> None:
    with pytest.raises(CalibrationError, match="no method 'best'; pick one of linear,"):
        method_named("best")
