"""PixArt-α and -Σ: diffusers' model through the tables, the walk and the file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pixart_fixture import ALPHA, SIGMA, diffusers_model, pixart, pixart_inputs, prompts
from quantized_fixture import quantized_tiny_dit, snr_db
from torch import Tensor

from ditas_export.calibration import fold, fold_proof
from ditas_export.calibration.adaln import quantize_adaln
from ditas_export.calibration.calibrate import QuantizationSettings, quantize_model
from ditas_export.calibration.family_proof import prove_folds
from ditas_export.calibration.fold import ExactBlock, fold_block, fold_smoothing
from ditas_export.calibration.fold_proof import prove_model
from ditas_export.calibration.modules import fake_quantized_model
from ditas_export.calibration.quantized_model import QuantizedModel
from ditas_export.calibration.states import CalibrationSettings, collect_states
from ditas_export.errors import QuantizationError
from ditas_export.families.base import Block, ModelInputs
from ditas_export.families.identity import identity_of
from ditas_export.families.outliers import plant_outliers
from ditas_export.families.pixart import PixArtFamily
from ditas_export.families.pixart_config import PixArtConfig
from ditas_export.families.registry import config_of, record_of
from ditas_export.onnx_export.export import export_onnx, export_reference
from ditas_export.runtime.onnxruntime_runner import OnnxRuntimeRunner

EXACT = 1e-12
"""Relative error of a fold in float64: K at most 384, and s over five orders of magnitude."""


def diffusers_output(config: PixArtConfig, inputs: ModelInputs) -> Tensor:
    named = dict(inputs)
    micro = {name: named.pop(name) for name in ("resolution", "aspect_ratio") if name in named}
    output: Tensor = diffusers_model(config)(
        **named, added_cond_kwargs=micro or None, return_dict=False
    )[0]
    return output


@pytest.mark.parametrize("config", [SIGMA, ALPHA], ids=["sigma", "alpha"])
def test_the_model_is_diffusers_own(config: PixArtConfig) -> None:
    inputs = pixart_inputs(config)
    assert torch.equal(pixart(config)(**inputs), diffusers_output(config, inputs))


def test_a_record_names_its_family() -> None:
    assert config_of(record_of(ALPHA)) == ALPHA
    assert record_of(ALPHA)["family"] == "pixart"


@pytest.mark.parametrize("config", [SIGMA, ALPHA], ids=["sigma", "alpha"])
def test_its_tables_are_proved(config: PixArtConfig) -> None:
    proof = prove_folds(PixArtFamily(), pixart(config), bound=EXACT)
    assert len(proof.groups) == 2 * 7
    assert 0 < max(proof.groups.values()) < EXACT
    assert proof.stages < EXACT
    assert 0 < proof.output < EXACT


@pytest.mark.parametrize("row", range(6))
def test_a_table_that_is_folded_wrong_is_found(row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One channel of one row, by a thousandth; gates take nothing, and count all the same."""

    def wrong(quantized: QuantizedModel, block: Block, dtype: torch.dtype) -> ExactBlock:
        exact = fold_block(quantized, block, dtype)
        exact.parameters[f"{block.path}.scale_shift_multiplier"][row, 5] *= 1.001
        return exact

    for module in (fold, fold_proof):
        monkeypatch.setattr(module, "fold_block", wrong)
    with pytest.raises(QuantizationError, match="the tables change what the model computes"):
        prove_folds(PixArtFamily(), pixart())


def calibrated(config: PixArtConfig = SIGMA, **changes: Any) -> QuantizedModel:
    model, asked = pixart(config), prompts(config)
    settings = CalibrationSettings(steps=4, classes=(0, 3, 4), embeddings=asked.identity)
    states = collect_states(model, settings, identity=identity_of(model), conditions=asked)
    wanted = replace(QuantizationSettings(rank=4, alpha_grid=(0.4, 0.5), block_size=24), **changes)
    return quantize_model(model, states, wanted, conditions=asked)


@pytest.fixture(scope="module")
def quantized() -> QuantizedModel:
    return quantize_adaln(calibrated(), 8)


def test_the_walk_quantizes_it(quantized: QuantizedModel) -> None:
    assert len(quantized.linears) == 2 * 10
    assert min(linear.output_snr_db for linear in quantized.linears.values()) > 15
    assert prove_model(quantized).relative_error < EXACT
    model = fake_quantized_model(fold_smoothing(quantized), ranges="token")
    inputs = pixart_inputs()
    assert snr_db(pixart()(**inputs), model(**inputs)) > 15


def test_outliers_are_planted_by_its_tables() -> None:
    model = pixart()
    twin = plant_outliers(model, seed=3)
    inputs = pixart_inputs()
    assert snr_db(model(**inputs), twin(**inputs)) > 90
    for path in ("attn1.to_q", "attn1.to_out.0", "attn2.to_out.0", "ff.net.0.proj"):
        before, after = (
            each.get_submodule(f"transformer_blocks.1.{path}").weight for each in (model, twin)
        )
        assert not torch.equal(before, after), path


@pytest.mark.parametrize("config", [SIGMA, ALPHA], ids=["sigma", "alpha"])
def test_the_float_file_is_diffusers_forward(config: PixArtConfig, tmp_path: Path) -> None:
    path = tmp_path / "fp32.onnx"
    export_reference(pixart(config), path)
    with OnnxRuntimeRunner(path, threads=2) as runner:
        for batch, tokens in ((3, 7), (1, 2)):
            inputs = pixart_inputs(config, batch=batch, tokens=tokens)
            expected = diffusers_output(config, inputs)
            error = (runner(inputs) - expected).norm() / expected.norm()
            assert error < 1e-4


@pytest.mark.parametrize(
    ("layout", "ranges", "target"),
    [("int4", "token", "portable"), ("int8", "static", "portable"),
     ("int4", "static", "onnxruntime"), ("int8", "token", "onnxruntime")],
)  # fmt: skip
def test_a_file_computes_what_was_calibrated(
    layout: Any, ranges: Any, target: Any, quantized: QuantizedModel, tmp_path: Path
) -> None:
    folded = fold_smoothing(quantized)
    path = tmp_path / "out.onnx"
    export_onnx(folded, path, layout=layout, ranges=ranges, target=target)
    expected = fake_quantized_model(folded, ranges=ranges, target=target)
    with OnnxRuntimeRunner(path, threads=2, as_is=True) as runner:
        for batch, tokens in ((3, 7), (1, 2)):
            inputs = pixart_inputs(batch=batch, tokens=tokens)
            assert snr_db(expected(**inputs), runner(inputs)) > 45  # rounding ties


def test_folds_of_random_factors_are_exact() -> None:
    quantized = quantize_adaln(quantized_tiny_dit(pixart(), block_size=24), 4)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert prove_model(quantized, dtype).relative_error < EXACT
