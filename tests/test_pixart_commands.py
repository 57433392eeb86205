"""A PixArt's pipeline folder through the commands, and what stands in padding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import Result
from conftest import random_vae
from diffusers import DPMSolverMultistepScheduler
from pixart_fixture import ALPHA, SIGMA, diffusers_model, pixart, pixart_inputs, prompts
from quantized_fixture import quantized_tiny_dit
from typer.testing import CliRunner

from ditas_export.calibration.calibrate import QuantizationSettings, quantize_model
from ditas_export.calibration.fold import fold_smoothing
from ditas_export.calibration.quantized_model import QuantizedModel
from ditas_export.calibration.states import (
    CalibrationSettings,
    CalibrationStates,
    collect_states,
)
from ditas_export.cli.export import app as export_app
from ditas_export.cli.sample import app as sample_app
from ditas_export.conditions.embeddings import PromptEmbeddings
from ditas_export.families.base import ModelInputs
from ditas_export.families.identity import identity_of
from ditas_export.families.pixart_config import PixArtConfig
from ditas_export.families.registry import family_of
from ditas_export.onnx_export import export
from ditas_export.onnx_export.export import export_onnx, export_reference
from ditas_export.runtime.onnxruntime_runner import OnnxRuntimeRunner

STATES, MASK = "encoder_hidden_states", "encoder_attention_mask"
PADDED = 10.0
"""Size of what is put into padding, beside tokens of size 1. The model's mask takes 10 000 off a
score: past that (100 here, late in sampling) padding is heard, in diffusers' own forward too."""


def run(app: Any, *words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def pipeline_folder(folder: Path, config: PixArtConfig) -> Path:
    """What diffusers writes of a pipeline, its text encoder left out."""
    diffusers_model(config).save_pretrained(folder / "transformer")
    DPMSolverMultistepScheduler().save_pretrained(folder / "scheduler")
    random_vae().save_pretrained(folder / "vae")
    return folder


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(SIGMA, id="sigma"),
        pytest.param(ALPHA, marks=pytest.mark.slow, id="alpha"),
    ],
)
def test_from_a_pipelines_folder_to_pictures(config: PixArtConfig, tmp_path: Path) -> None:
    """Both commands; the pictures are of the prompts' numbers, through the pipeline's own VAE."""
    pipeline = pipeline_folder(tmp_path / "pipeline", config)
    path, asked = tmp_path / "out.onnx", tmp_path / "embeddings.safetensors"
    prompts(config).save(asked)
    quick = ["--steps", 3, "--samples", 2, "--rank", 2, "--block-size", 24]
    exported = run(export_app, path, "--model", pipeline, "--embeddings", asked, *quick, "--json")
    assert exported.exit_code == 0, exported.output
    read = PromptEmbeddings.load(asked, inputs=family_of(config).inputs(config)[2:])
    assert read.identity in exported.stdout
    images = tmp_path / "images"
    wanted = ["--classes", "1,4", "--steps", 2, "--sampler", "dpm++", "--runtime", "onnxruntime"]
    words = [path, "--embeddings", asked, *wanted, "--vae", pipeline / "vae", "-o", images]
    sampled = run(sample_app, *words)
    assert sampled.exit_code == 0, sampled.output
    with np.load(images / "samples.npz") as content:
        first, second = content["arr_0"]
    assert first.shape == (32, 32, 3)  # 4 pixels for one of the latents'
    assert not np.array_equal(first, second)
    facts = json.loads((images / "samples.json").read_text())
    assert facts["embeddings_sha256"] == read.identity
    assert facts["settings"]["classes"] == [1, 4]
    assert facts["settings"]["sampler"] == "dpm++"


def test_embeddings_are_asked_for(tmp_path: Path) -> None:
    pipeline = pipeline_folder(tmp_path / "pipeline", SIGMA)
    result = run(export_app, tmp_path / "out.onnx", "--model", pipeline)
    assert result.exit_code == 2
    assert "ditas-embed PIPELINE" in " ".join(result.stderr.split())
    assert not (tmp_path / "out.onnx").exists()


def filled(inputs: ModelInputs) -> ModelInputs:
    """The inputs with something large in padding."""
    states, padding = inputs[STATES].clone(), inputs[MASK] == 0
    assert padding.any()
    random = torch.Generator().manual_seed(9)
    states[padding] = PADDED * torch.randn(states[padding].shape, generator=random)
    return inputs.replaced({STATES: states})


@pytest.mark.parametrize("target", ["float", "portable", "onnxruntime"])
def test_what_stands_in_padding_changes_no_bit_of_a_file(target: Any, tmp_path: Path) -> None:
    path = tmp_path / "out.onnx"
    if target == "float":
        export_reference(pixart(), path)
    else:
        folded = fold_smoothing(quantized_tiny_dit(pixart(), block_size=24, rank=4))
        export_onnx(folded, path, target=target)
    inputs = pixart_inputs()
    heard = inputs[STATES].clone()
    heard[:, 0] += 1
    with OnnxRuntimeRunner(path, threads=1, as_is=True) as runner:
        found = runner(inputs)
        assert torch.equal(runner(filled(inputs)), found)
        assert not torch.equal(runner(inputs.replaced({STATES: heard})), found)


def test_linears_of_one_input_read_the_same_codes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of q, k and v, and of the caption's k and v: the same bits as with codes of their own."""
    folded = fold_smoothing(quantized_tiny_dit(pixart(), block_size=24, rank=4))
    found, quantizers = [], []
    for name in ("shared", "apart"):
        path = tmp_path / f"{name}.onnx"
        export_onnx(folded, path, target="onnxruntime")
        nodes = onnx.load(path).graph.node
        quantizers.append({node.name for node in nodes if node.name.endswith("/input_Quantize")})
        with OnnxRuntimeRunner(path, threads=1, as_is=True) as runner:
            found.append(runner(pixart_inputs()))
        monkeypatch.setattr(export, "share_inputs", lambda *_: None)
    assert torch.equal(*found)
    assert len(quantizers[1]) == 2 * 10
    assert quantizers[1] - quantizers[0] == {
        f"transformer_blocks.{block}.{path}/input_Quantize"
        for block in range(2)
        for path in ("attn1.to_k", "attn1.to_v", "attn2.to_v")
    }


def calibrated(asked: PromptEmbeddings) -> tuple[CalibrationStates, QuantizedModel]:
    model = pixart()
    settings = CalibrationSettings(steps=3, classes=(0, 3), embeddings=asked.identity)
    states = collect_states(model, settings, identity=identity_of(model), conditions=asked)
    wanted = QuantizationSettings(rank=2, alpha_grid=(0.4, 0.5), block_size=24)
    return states, quantize_model(model, states, wanted, conditions=asked)


def test_what_stands_in_padding_changes_no_number_of_calibration() -> None:
    """No maximum, no moment: the same states, and the same codes, s and ranges of all linears."""
    asked, dirty = prompts(), prompts()
    dirty.tensors[STATES][:] = filled(ModelInputs(asked.tensors))[STATES]  # past what clears it
    assert not torch.equal(dirty.inputs(torch.arange(5))[STATES], asked.tensors[STATES][:5])
    (states, clean), (others, found) = calibrated(asked), calibrated(dirty)
    assert torch.equal(states.latents, others.latents)
    for name, linear in clean.linears.items():
        other = found.linears[name]
        assert torch.equal(states.input_maxima[name], others.input_maxima[name]), name
        assert torch.equal(linear.weight.codes, other.weight.codes), name
        assert torch.equal(linear.smoothing_scale, other.smoothing_scale), name
        assert torch.equal(linear.step_ranges, other.step_ranges), name
