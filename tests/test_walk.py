from __future__ import annotations

from dataclasses import replace
from itertools import cycle
from typing import Any

import pytest
import torch
from quantized_fixture import snr_db, tiny_dit
from torch import Tensor

from ditas_export.calibration import walk as walk_module
from ditas_export.calibration.calibrate import QuantizationSettings, quantize_model
from ditas_export.calibration.fold import fold_smoothing
from ditas_export.calibration.methods import METHODS, Method
from ditas_export.calibration.modules import fake_quantized_model
from ditas_export.calibration.quantized_model import QuantizedLinear, linear_to_parts
from ditas_export.calibration.row_shares import row_batches
from ditas_export.calibration.solve import LinearInputs, LinearSettings
from ditas_export.calibration.states import (
    CalibrationSettings,
    CalibrationStates,
    collect_states,
    recorded_maxima,
    walk_states,
)
from ditas_export.calibration.walk import SettingsOf, walk
from ditas_export.diffusion.sampling import trajectory
from ditas_export.dit.model import DiT, DiTConfig
from ditas_export.errors import CalibrationError
from ditas_export.families.base import ModelInputs
from ditas_export.families.identity import ModelIdentity, identity_of
from ditas_export.families.outliers import plant_outliers
from ditas_export.families.registry import linear_names, linear_shapes
from ditas_export.quantization.ranges import Ranges
from ditas_export.runtime.torch_runner import TorchRunner


@pytest.fixture(scope="module")
def model() -> DiT:
    return tiny_dit()


@pytest.fixture(scope="module")
def states(model: DiT) -> CalibrationStates:
    settings = CalibrationSettings(steps=6, classes=(3, 7, 1, 4))
    return collect_states(model, settings, identity=identity_of(model))


def site_settings(method: Method) -> LinearSettings:
    return LinearSettings(
        method=method,
        weight_bits=4,
        activation_bits=8,
        ranges="token",
        block_size=48,
        rank=2,
        alpha_grid=(0.3, 0.5),
    )


LINEAR_KINDS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def walk_tiny(
    model: DiT,
    inputs: ModelInputs,
    states: CalibrationStates,
    settings_of: SettingsOf,
    known: dict[str, QuantizedLinear] | None = None,
) -> list[tuple[str, QuantizedLinear]]:
    """Every linear of a model, walked."""
    maxima = states.input_maxima
    return list(walk(model, model.config, inputs, maxima, settings_of, known=known or {}))


def test_the_walk_visits_every_linear_once_in_order(model: DiT, states: CalibrationStates) -> None:
    inputs = walk_states(states, count=12)
    settings = site_settings(METHODS["tas"])
    walked = walk_tiny(model, inputs, states, lambda _: settings)
    assert [name for name, _ in walked] == list(linear_names(model.config))


Streams = dict[str, list[tuple[Tensor, Tensor]]]


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    """Both streams' inputs to every linear of the walks of a test, by kind, in walk order."""
    seen: Streams = {kind: [] for kind in LINEAR_KINDS}
    solve = walk_module.solve_linear
    kinds = cycle(LINEAR_KINDS)

    def spy(*arguments: Any, **named: Any) -> Any:
        floats, quantized = zip(*arguments[3].batches(1), strict=True)
        seen[next(kinds)].append((torch.cat(floats), torch.cat(quantized)))
        return solve(*arguments, **named)

    monkeypatch.setattr(walk_module, "solve_linear", spy)
    return seen


@pytest.mark.parametrize("name", [name for name in METHODS if name != "ditas-plus"])
def test_without_target_correction_both_streams_are_the_float_model(
    model: DiT, states: CalibrationStates, streams: Streams, name: str
) -> None:
    settings = site_settings(METHODS[name])
    inputs = walk_states(states, count=4)
    walk_tiny(model, inputs, states, lambda _: settings)
    for kind, pairs in streams.items():
        assert len(pairs) == 2, kind
        assert all(torch.equal(x_float, x_quantized) for x_float, x_quantized in pairs), kind


def test_with_target_correction_every_linear_sees_what_the_earlier_ones_lost(
    model: DiT, states: CalibrationStates, streams: Streams
) -> None:
    settings = site_settings(METHODS["ditas-plus"])
    inputs = walk_states(states, count=4)
    walk_tiny(model, inputs, states, lambda _: settings)
    found = [snr_db(*streams[kind][block]) for block in range(2) for kind in LINEAR_KINDS]
    assert found[0] == float("inf")  # nothing is quantized before it
    assert all(10 < decibels < 90 for decibels in found[1:]), found


def test_without_rounding_both_streams_are_the_model(
    model: DiT, states: CalibrationStates, streams: Streams
) -> None:
    """With 16-bit activations and exact 8-bit weights the quantized stream is the float stream.

    Weights are made integers beforehand, so that nothing is lost: any error would be the walk's.
    The method corrects its target, so the quantized stream is the walk's own.
    """
    exact = tiny_dit()
    for name in linear_names(exact.config):
        linear = exact.get_submodule(name)
        scale = linear.weight.abs().amax(dim=1, keepdim=True) / 127  # type: ignore[operator, union-attr]
        linear.weight.copy_((linear.weight / scale).round() * scale)  # type: ignore[operator, union-attr]
    method = replace(METHODS["linear"], name="linear, corrected", target_correction=True)
    settings = replace(site_settings(method), weight_bits=8, activation_bits=16)
    inputs = walk_states(states, count=12)
    for name, walked in walk_tiny(exact, inputs, states, lambda _: settings):
        assert walked.output_snr_db > 60, name
    for kind, pairs in streams.items():
        assert all(snr_db(*pair) > 60 for pair in pairs), kind


@pytest.mark.parametrize(
    ("activation_bits", "ranges", "bound"),
    [
        # A code that flips at a rounding tie: 60 dB and more; an unrounded inner product: 47.
        (8, "token", 55),
        (8, "static", 55),
        (16, "token", 110),  # float32
    ],
)
def test_the_quantized_stream_is_the_exported_model(
    model: DiT,
    states: CalibrationStates,
    monkeypatch: pytest.MonkeyPatch,
    activation_bits: int,
    ranges: Ranges,
    bound: float,
) -> None:
    """What the last linear puts out in the walk, it puts out in the fake-quantized model."""
    last = "blocks.1.mlp.fc2"
    walked: list[Tensor] = []
    measure = walk_module._WalkedLinear.measure

    def keep(linear: walk_module._WalkedLinear, y_float: Tensor, y_quantized: Tensor) -> None:
        measure(linear, y_float, y_quantized)
        if linear.name == last:
            walked.append(y_quantized)

    monkeypatch.setattr(walk_module._WalkedLinear, "measure", keep)
    settings = QuantizationSettings(
        rank=8, activation_bits=activation_bits, ranges=ranges, alpha_grid=(0.4, 0.5)
    )
    folded = fold_smoothing(quantize_model(model, states, settings))
    fake = fake_quantized_model(folded, ranges=ranges, target="onnxruntime")
    found: list[Tensor] = []
    fake.get_submodule(last).register_forward_hook(lambda _, inputs, y: found.append(y))
    inputs = walk_states(states, count=24)
    fake(*inputs.values())
    assert snr_db(torch.cat(walked), *found) > bound


def test_the_exported_model_shows_what_a_method_gains(
    model: DiT, states: CalibrationStates
) -> None:
    """The fake-quantized model's output on the walk's inputs against the float model's.

    For a method that corrects its target and one without.
    """
    inputs = walk_states(states, count=24)
    outputs = {}
    for name in ("linear", "ditas-plus"):
        quantized = quantize_model(
            model, states, QuantizationSettings(method=name, rank=2, alpha_grid=(0.4, 0.5))
        )
        fake = fake_quantized_model(fold_smoothing(quantized), ranges="token", target="onnxruntime")
        outputs[name] = fake(*inputs.values())
    wanted = model(*inputs.values())
    assert snr_db(wanted, outputs["ditas-plus"]) > snr_db(wanted, outputs["linear"]) + 3


def test_known_linears_are_passed_through(model: DiT, states: CalibrationStates) -> None:
    inputs = walk_states(states, count=12)
    settings = site_settings(METHODS["ditas-plus"])

    first = dict(walk_tiny(model, inputs, states, lambda _: settings))
    known = {name: linear for name, linear in first.items() if name.startswith("blocks.0")}
    second = dict(walk_tiny(model, inputs, states, lambda _: settings, known=known))
    for name, linear in first.items():
        parts, others = linear_to_parts(linear)[0], linear_to_parts(second[name])[0]
        assert list(parts) == list(others), name
        assert "low_rank.divisor" in parts
        for part, tensor in parts.items():
            assert torch.equal(tensor, others[part]), (name, part)
        assert (second[name] is linear) == (name in known)


def test_not_finite_outputs_are_named(model: DiT, states: CalibrationStates) -> None:
    broken = tiny_dit()
    broken.blocks[1].attn.proj.bias[3] = float("inf")  # type: ignore[union-attr, index, operator]
    inputs = walk_states(states, count=12)
    settings = site_settings(METHODS["linear"])
    with pytest.raises(CalibrationError, match=r"blocks\.1\.attn\.proj puts out NaN or infinity"):
        walk_tiny(broken, inputs, states, lambda _: settings)


def test_states_are_the_samplers_and_maxima_cover_them(
    model: DiT, states: CalibrationStates
) -> None:
    assert states.latents.shape == (6, 4, 3, 8, 8)
    assert states.timesteps.tolist() == sorted(states.timesteps.tolist(), reverse=True)
    for name, (_, columns) in linear_shapes(model.config).items():
        assert states.input_maxima[name].shape == (6, columns)
    # Batches are the sampler's affair: the noise of an image is that of its index in the whole set.
    first = next(trajectory(TorchRunner(model), classes=(3, 7, 1, 4), steps=6))
    assert torch.equal(states.latents[0], first.latents)
    # Step 2 again, by hand: the recorded maxima are those of the two guidance halves.
    with recorded_maxima(model) as maxima:
        x, t = states.latents[2], states.timesteps[2]
        labels = torch.tensor([3, 7, 1, 4, 10, 10, 10, 10])
        model(torch.cat([x, x]), t.expand(8), labels)
    for name, value in maxima.items():
        assert torch.allclose(value, states.input_maxima[name][2], rtol=1e-5, atol=1e-6), name
    assert not model.blocks[0].attn.qkv._forward_pre_hooks  # type: ignore[union-attr]


def test_the_walks_share_is_even(states: CalibrationStates) -> None:
    for half in (24, 12, 6):
        inputs = walk_states(states, count=half)
        assert inputs.latents.shape[0] == 2 * half
        assert torch.equal(inputs.latents[:half], inputs.latents[half:])
        assert (inputs["class_labels"][half:] == 10).all()
        counts = torch.bincount(inputs["class_labels"][:half], minlength=10)
        assert set(counts[[3, 7, 1, 4]].tolist()) <= {half // 4, half // 4 + 1}
    for count in (0, 25):
        with pytest.raises(CalibrationError, match=rf"a walk over {count} of 24 states"):
            walk_states(states, count=count)


@pytest.mark.parametrize("half", [600, 599, 333, 300, 266, 150, 37, 15, 1])
def test_the_walks_share_of_the_papers_setting_is_even(half: int) -> None:
    """Steps and samples are each seen equally often, and no state twice."""
    steps, samples = 50, 12
    config = DiTConfig(
        input_size=1, patch_size=1, in_channels=1, hidden_size=4, depth=1, num_heads=1
    )
    states = CalibrationStates(
        latents=torch.arange(600.0).reshape(steps, samples, 1, 1, 1),
        timesteps=torch.arange(steps).flip(0),
        input_maxima={
            name: torch.ones(steps, columns) for name, (_, columns) in linear_shapes(config).items()
        },
        settings=CalibrationSettings(classes=tuple(range(samples))),
        identity=ModelIdentity(tensors_sha256="0" * 64, config=config),
    )
    inputs = walk_states(states, count=half)
    assert len(inputs.timesteps) == 2 * half
    assert len(set(inputs.latents[:half].flatten().tolist())) == half
    for labels, count in (
        (inputs.timesteps[:half], steps),
        (inputs["class_labels"][:half], samples),
    ):
        seen = torch.bincount(labels, minlength=count)
        assert seen.max() - seen.min() <= 1
    period = -(-steps // max(1, half // samples))
    for sample in range(samples) if half >= samples else ():
        own = inputs.timesteps[:half][inputs["class_labels"][:half] == sample]
        assert own.max() - own.min() >= steps - 2 * period  # all along the trajectory


def test_long_rows_go_fewer_at_a_time() -> None:
    assert [rows.stop - rows.start for rows in row_batches(40, 64)] == [16, 16, 8]
    assert [rows.stop - rows.start for rows in row_batches(10, 256)] == [4, 4, 2]
    assert [rows.stop - rows.start for rows in row_batches(2, 5000)] == [1, 1]


def test_every_stride_sees_every_position(
    model: DiT, states: CalibrationStates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A linear's sampled inputs are every third token, in turn from the first, second and third."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def look(*arguments: Any) -> None:
        inputs: LinearInputs = arguments[3]
        assert inputs.tokens == 48 * 16
        whole, sampled = ([x for x, _ in inputs.batches(stride)] for stride in (1, 3))
        seen.extend(zip(whole, sampled, strict=True))
        raise CalibrationError("seen")

    monkeypatch.setattr(walk_module, "solve_linear", look)
    inputs = walk_states(states, count=24)
    settings = site_settings(METHODS["ditas-plus"])
    with pytest.raises(CalibrationError, match="seen"):
        walk_tiny(model, inputs, states, lambda _: settings)
    assert len(seen) == 3
    for number, (whole, sampled) in enumerate(seen):
        expected = whole.unflatten(0, (16, 16))[:, number % 3 :: 3].flatten(0, 1)
        assert torch.allclose(sampled, expected, atol=1e-6)


def test_unguided_states_have_one_half(model: DiT) -> None:
    settings = CalibrationSettings(steps=2, classes=(1, 2), cfg_scale=1.0)
    states = collect_states(model, settings, identity=identity_of(model))
    assert walk_states(states, count=4).latents.shape[0] == 4


def test_walk_states_of_one_row_batch_equal_many(
    model: DiT, states: CalibrationStates, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = site_settings(METHODS["tas"])
    inputs = walk_states(states, count=12)
    results = []
    for rows in (5, 100):
        monkeypatch.setattr("ditas_export.calibration.row_shares.ROWS_PER_BATCH", rows)
        results.append(dict(walk_tiny(model, inputs, states, lambda _: settings)))
    for name, linear in results[0].items():
        assert torch.equal(linear.weight.codes, results[1][name].weight.codes)
        assert abs(linear.output_snr_db - results[1][name].output_snr_db) < 0.01


def test_planted_outliers_change_next_to_nothing(model: DiT, states: CalibrationStates) -> None:
    """`ditas-plus` sees through rescaled channels: the twin computes the same and loses the same.

    Plain rounding loses many times more on the twin, so there is something to see through.
    """
    twin = plant_outliers(model, seed=3)
    twin_states = collect_states(twin, states.settings, identity=identity_of(twin))
    inputs = walk_states(states, count=24)
    arguments = tuple(inputs.values())
    wanted = model(*arguments)

    def loss(method: str, subject: DiT, seen: CalibrationStates) -> float:
        settings = QuantizationSettings(method=method, rank=2, alpha_grid=(0.3, 0.4, 0.5))
        quantized = quantize_model(subject, seen, settings)
        fake = fake_quantized_model(fold_smoothing(quantized), ranges="token")
        return snr_db(wanted, fake(*arguments))

    assert loss("linear", model, states) > loss("linear", twin, twin_states) + 3
    # Rounding falls differently, the problem is the same.
    difference = loss("ditas-plus", model, states) - loss("ditas-plus", twin, twin_states)
    assert abs(difference) < 1.0
