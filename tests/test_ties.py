"""How much of a file's noise is rounding: right files pass, one wrong s does not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from quantized_fixture import TINY, fed, quantized_tiny_dit, tiny_dit
from torch import Tensor

from ditas_export.calibration.adaln import quantize_adaln
from ditas_export.calibration.fold import FoldedModel, fold_smoothing
from ditas_export.calibration.modules import fake_quantized_model
from ditas_export.diffusion.runner import Runner
from ditas_export.evaluation.ties import (
    DISTURBANCE,
    DRAWS,
    FEW_FLIPS,
    FLIP_ENERGY,
    MOST_EXCESS_DB,
    DisturbedRunner,
    Match,
    match_of,
)
from ditas_export.onnx_export.export import export_onnx
from ditas_export.runtime.onnxruntime_runner import OnnxRuntimeRunner
from ditas_export.runtime.openvino_runner import OpenVINORunner
from ditas_export.runtime.torch_runner import TorchRunner

WIDTH = TINY.hidden_size
TYPES = [torch.float32, torch.float16, torch.bfloat16]


@cache
def folded(dtype: torch.dtype) -> FoldedModel:
    return fold_smoothing(quantize_adaln(quantized_tiny_dit(tiny_dit()), 8), dtype=dtype)


def answers(runner: Runner) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    side = TINY.input_size
    found = []
    for time in (900, 500, 100):
        latents = torch.randn(8, TINY.in_channels, side, side, generator=generator)
        found.append(runner(fed(latents, torch.full((8,), time), torch.arange(8))))
    return found


@cache
def wanted(dtype: torch.dtype) -> tuple[list[Tensor], list[list[Tensor]]]:
    fake = TorchRunner(fake_quantized_model(folded(dtype), ranges="token"))
    size = DISTURBANCE[dtype]
    draws = [answers(DisturbedRunner(fake, size=size, seed=seed)) for seed in DRAWS]
    return answers(fake), draws


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    """A right file of each float type."""
    folder = tmp_path_factory.mktemp("files")
    written = {dtype: folder / f"{str(dtype)[6:]}.onnx" for dtype in TYPES}
    for dtype, path in written.items():
        export_onnx(folded(dtype), path)
    return written


def match(path: Path, dtype: torch.dtype) -> Match:
    """How a file matches the right model's forward."""
    open_file = OpenVINORunner if dtype == torch.bfloat16 else OnnxRuntimeRunner
    with open_file(path, as_is=True) as runner:
        found = answers(runner)
    expected, disturbed = wanted(dtype)
    numbers = len(expected[0]) * TINY.num_tokens * WIDTH
    return match_of(expected, found, disturbed, numbers=numbers)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_right_file_has_the_noise_of_ties(
    files: dict[torch.dtype, Path], dtype: torch.dtype
) -> None:
    found = match(files[dtype], dtype)
    assert found.is_right
    assert abs(found.excess_db) < 2


MODULATION, QKV = "blocks.0.adaLN_modulation.1", "blocks.0.attn.qkv"
PLACES = {
    "attn.qkv": ((f"{MODULATION}/row_scale", f"{MODULATION}/bias"), slice(0, 2 * WIDTH)),
    "attn.proj": (
        (f"{QKV}/row_scale", f"{QKV}/bias", f"{QKV}/left"),
        slice(2 * WIDTH, 3 * WIDTH),
    ),
    "mlp.fc1": ((f"{MODULATION}/row_scale", f"{MODULATION}/bias"), slice(3 * WIDTH, 5 * WIDTH)),
    "mlp.fc2": (("blocks.0.mlp.fc2/input_multiplier",), slice(None)),
}
"""Where the s of a linear lies in the file: tensors, and which of their last channels."""


def written_wrong(right: Path, wrong: Path, place: str, factor: float) -> None:
    """Write a file in which one linear's s is wrong by a factor."""
    model = ir.load(right)
    names, channels = PLACES[place]
    for name in names:
        value = model.graph.initializers[name]
        assert value.const_value is not None
        numbers = value.const_value.numpy().copy()
        numbers[..., channels] = (numbers[..., channels] * factor).astype(numbers.dtype)
        value.const_value = ir.Tensor(numbers, dtype=value.const_value.dtype, name=name)
    ir.save(model, wrong)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("place", PLACES)
def test_one_wrong_s_in_the_file_is_found_where_it_costs_five_decibels(
    files: dict[torch.dtype, Path], place: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """The least of doubled errors that costs that much, in one linear of eight."""
    right, wrong = match(files[dtype], dtype), tmp_path / "wrong.onnx"
    for power in range(12):
        written_wrong(files[dtype], wrong, place, 1 + 2.0**power / 1000)
        found = match(wrong, dtype)
        if found.excess_db - right.excess_db >= 5:
            break
    assert 5 <= found.excess_db - right.excess_db < 12  # no more than a doubling past five
    assert not found.is_right


NUMBERS = 10**6


def match_of_noises(found: Sequence[float], ties: Sequence[float]) -> Match:
    """The match of probes whose noise is so many times the signal."""
    one = torch.ones(4, dtype=torch.float64)
    return match_of(
        [one for _ in found],
        [one + noise**0.5 for noise in found],
        [[one + noise**0.5 for noise in ties]],
        numbers=NUMBERS,
    )


def test_the_excess_is_of_the_mean_ratio() -> None:
    found = match_of_noises([3e-5, 1e-4], [1e-5, 1e-4])
    assert found.db == pytest.approx(40)
    assert found.ties_db == pytest.approx(40)
    assert found.excess_db == pytest.approx(10 * math.log10(2))


def test_a_few_flips_are_no_excess() -> None:
    """Some in the file, none in the disturbed forward."""
    few = FEW_FLIPS * FLIP_ENERGY / NUMBERS
    assert match_of_noises([few / 2], [0.0]).excess_db == pytest.approx(0)
    assert match_of_noises([few * 4], [0.0]).excess_db > MOST_EXCESS_DB


def test_nothing_finite_is_no_match() -> None:
    assert not match_of_noises([math.nan], [1e-6]).is_right
    assert not match_of_noises([1e-6], [math.nan]).is_right
