"""Models with dead parts quantize, fold and export as any other: every 0 / 0 has a meaning."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_fixture import TINY, example_inputs, fed, snr_db, tiny_dit
from torch import Tensor

from ditas_export.calibration.adaln import quantize_adaln
from ditas_export.calibration.calibrate import QuantizationSettings, quantize_model
from ditas_export.calibration.fold import fold_smoothing
from ditas_export.calibration.modules import fake_quantized_model
from ditas_export.calibration.quantized_model import QuantizedModel
from ditas_export.calibration.solve import JointMoments
from ditas_export.calibration.states import CalibrationSettings, collect_states
from ditas_export.dit.model import DiT, initialize_adaln_zero
from ditas_export.evaluation.metrics import Difference
from ditas_export.families.identity import identity_of
from ditas_export.figures import decibels
from ditas_export.onnx_export.export import export_onnx
from ditas_export.runtime.onnxruntime_runner import OnnxRuntimeRunner

WIDTH = TINY.hidden_size


def silent_linear(kind: str) -> Callable[[Any], None]:
    def change(block: Any) -> None:
        linear = block.get_submodule(kind)
        linear.weight.zero_()
        linear.bias.zero_()

    return change


def constant_attention(block: Any) -> None:
    block.attn.qkv.weight.zero_()


def dead_channels(block: Any) -> None:
    """Two channels of qkv's and fc1's inputs are always zero, and one row each puts out nothing."""
    modulation = block.adaLN_modulation[1]
    for first in (0, 3 * WIDTH):
        for channel in (1, 2):
            shift, scale = first + channel, first + WIDTH + channel
            modulation.weight[[shift, scale]] = 0.0
            modulation.bias[shift], modulation.bias[scale] = 0.0, -1.0
    for linear in (block.attn.qkv, block.mlp.fc1):
        linear.weight[5], linear.bias[5] = 0.0, 0.0
    block.mlp.fc2.weight[:, 7] = 0.0


def everything(block: Any) -> None:
    for parameter in block.parameters():
        parameter.zero_()


CHANGES: dict[str, Callable[[Any], None]] = {
    **{f"silent {kind}": silent_linear(kind) for kind in ("attn.qkv", "attn.proj", "mlp.fc1")},
    "constant attention": constant_attention,
    "dead channels": dead_channels,
    "a block of zeros": everything,
}


def freshly_initialised() -> DiT:
    model = DiT(TINY).eval().requires_grad_(requires_grad=False)
    initialize_adaln_zero(model, seed=0)
    return model


def with_first_block(change: Callable[[Any], None]) -> DiT:
    model = tiny_dit()
    change(model.blocks[0])
    return model


MODELS = {"fresh": freshly_initialised} | {
    name: lambda change=change: with_first_block(change)  # type: ignore[misc]
    for name, change in CHANGES.items()
}


def quantized(model: DiT, **settings: Any) -> QuantizedModel:
    states = collect_states(
        model, CalibrationSettings(steps=2, classes=(1,)), identity=identity_of(model)
    )
    return quantize_model(model, states, QuantizationSettings(alpha_grid=(0.0, 0.5), **settings))


@pytest.mark.parametrize(
    ("name", "method"), [*((name, "ditas-plus") for name in MODELS), ("a block of zeros", "ditas")]
)
def test_models_with_dead_parts_export_like_any_other(
    name: str, method: str, tmp_path: Path
) -> None:
    model = MODELS[name]()
    made = quantize_adaln(quantized(model, method=method), 4)
    assert all(not math.isnan(linear.output_snr_db) for linear in made.linears.values())
    made.save(tmp_path / "kept")
    again = QuantizedModel.load(tmp_path / "kept", model=identity_of(model))
    latents, timesteps, labels = example_inputs()
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        fake = fake_quantized_model(fold_smoothing(again, dtype=dtype), ranges="token")
        expected = fake(latents.to(dtype), timesteps, labels)
        assert expected.isfinite().all(), dtype
    if method == "ditas":
        return
    export_onnx(fold_smoothing(again), tmp_path / "out.onnx")
    with OnnxRuntimeRunner(tmp_path / "out.onnx", threads=1) as runner:
        found = runner(fed(latents, timesteps, labels))
    assert snr_db(expected, found) > 45 or torch.equal(expected, found)


def test_a_linear_that_puts_out_nothing_loses_nothing() -> None:
    made = quantized(with_first_block(silent_linear("mlp.fc1")))
    assert made.linears["blocks.0.mlp.fc1"].output_snr_db == math.inf
    assert math.isfinite(made.linears["blocks.1.mlp.fc1"].output_snr_db)


@pytest.mark.parametrize(
    ("signal", "noise", "expected"),
    [
        (100.0, 1.0, 20.0),
        (0.0, 0.0, math.inf),
        (1.0, 0.0, math.inf),
        (0.0, 1.0, -math.inf),
        (1.0, math.nan, -math.inf),
        (math.inf, math.inf, -math.inf),
    ],
)
def test_every_ratio_has_a_meaning(signal: float, noise: float, expected: float) -> None:
    assert decibels(signal, noise) == expected


def test_nothing_against_nothing_is_equal() -> None:
    zeros = Difference.between(torch.zeros(3), torch.zeros(3))
    assert (zeros.snr_db, zeros.relative) == (math.inf, 0.0)
    assert Difference.between(torch.zeros(3), torch.ones(3)).relative == math.inf


@pytest.mark.parametrize("constant", [1e3, 1e5])
def test_moments_keep_their_digits_beside_a_large_constant(constant: float) -> None:
    """A channel of 10⁵ standard deviations: H and C to float32's digits of what varies."""
    generator = torch.Generator().manual_seed(0)
    x: Tensor = torch.randn(800, 12, generator=generator, dtype=torch.float64)
    x[:, 5] += constant
    x = x.float().double()
    weight = torch.randn(20, 12, generator=generator, dtype=torch.float64)
    batches = [(part.float(), part.float()) for part in x.split(250)]
    moments = JointMoments.accumulate(weight.float(), batches)
    centred = x - x.mean(dim=0)
    exact = centred.T @ centred / 800
    assert (moments.quantized - exact).abs().max() < 1e-4 * exact.abs().max()
    cross = weight.float().double() @ exact
    assert (moments.cross - cross).abs().max() < 1e-4 * cross.abs().max()
    assert torch.allclose(moments.quantized_mean, x.mean(dim=0), rtol=1e-6, atol=1e-6)


def test_what_is_saved_is_strict_json(tmp_path: Path) -> None:
    made = quantized(with_first_block(everything))
    made.save(tmp_path / "kept")
    header = (tmp_path / "kept").read_bytes()
    length = int.from_bytes(header[:8], "little")
    (text,) = json.loads(header[8 : 8 + length])["__metadata__"].values()

    def refuse(name: str) -> None:
        raise AssertionError(name)

    json.loads(text, parse_constant=refuse)
