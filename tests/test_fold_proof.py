"""The proof of the folds fails where one smoothing is folded wrong, and only there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_fixture import quantized_tiny_dit, tiny_dit

from ditas_export import export_files
from ditas_export.calibration import fold, fold_proof
from ditas_export.calibration.adaln import quantize_adaln
from ditas_export.calibration.fold_proof import BOUND, prove_model
from ditas_export.calibration.quantized_model import QuantizedModel
from ditas_export.errors import QuantizationError
from ditas_export.families.base import Block
from ditas_export.families.dit import FINAL_ADALN
from ditas_export.families.registry import family_of
from ditas_export.options import ExportOptions
from ditas_export.pipeline import export

TYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("adaln", [16, 8, 4])
@pytest.mark.parametrize("rank", [0, 4])
def test_folds_are_exact(dtype: torch.dtype, adaln: int, rank: int) -> None:
    quantized = quantize_adaln(quantized_tiny_dit(tiny_dit(), rank=rank), adaln)
    seen: list[tuple[int, int]] = []
    proof = prove_model(quantized, dtype, on_block=lambda *done: seen.append(done))
    assert 0 < proof.relative_error < 1e-13  # float64, K at most 384
    assert seen == [(1, 2), (2, 2)]


def test_a_power_of_two_that_goes_elsewhere_is_proved_too() -> None:
    """V rows so small that proj's s alone would take them below the smallest normal half."""
    quantized = quantized_tiny_dit(tiny_dit())
    linears = dict(quantized.linears)
    name = "blocks.0.attn.proj"
    linears[name] = replace(linears[name], smoothing_scale=linears[name].smoothing_scale * 1e3)
    quantized = replace(quantized, linears=linears)
    first = family_of(quantized.config).blocks(quantized.config)[0]
    assert not torch.equal(
        fold.fold_block(quantized, first, torch.float16).linears[name].smoothing_scale,
        fold.fold_block(quantized, first, torch.float32).linears[name].smoothing_scale,
    )
    assert prove_model(quantized, torch.float16).relative_error < 1e-13


def folded_wrong(quantized: QuantizedModel, block: Block, dtype: torch.dtype, name: str) -> Any:
    """A block whose one linear's s is a hundredth too large in one channel where it is folded."""
    linear = quantized.linears[name]
    s = linear.smoothing_scale.clone()
    s[3] *= 1.01
    wrong = {**quantized.linears, name: replace(linear, smoothing_scale=s)}
    return fold.fold_block(replace(quantized, linears=wrong), block, dtype)


def planted(kind: str) -> Callable[[QuantizedModel, Block, torch.dtype], fold.ExactBlock]:
    """Folds as it should, but for one linear's s in one place."""
    right = fold.fold_block

    def fold_wrong(quantized: QuantizedModel, block: Block, dtype: torch.dtype) -> fold.ExactBlock:
        exact = right(quantized, block, dtype)
        wrong = folded_wrong(quantized, block, dtype, block.name(kind))
        if kind == "mlp.fc2":
            return replace(exact, multipliers=wrong.multipliers)
        if kind == "attn.proj":
            values = block.name("attn.qkv")
            return replace(exact, linears={**exact.linears, values: wrong.linears[values]})
        return replace(exact, modulations=wrong.modulations)

    return fold_wrong


@pytest.mark.parametrize("kind", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("adaln", [16, 8])
def test_one_channel_that_is_folded_wrong_by_a_hundredth_is_found(
    kind: str, dtype: torch.dtype, adaln: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized = quantize_adaln(quantized_tiny_dit(tiny_dit()), adaln)
    monkeypatch.setattr(fold_proof, "fold_block", planted(kind))
    with pytest.raises(QuantizationError, match=rf"changed what the model computes: \S*{kind}"):
        prove_model(quantized, dtype)


@pytest.mark.parametrize("adaln", [16, 8])
def test_a_one_that_is_missing_in_the_last_modulation_is_found(
    adaln: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = fold.plain_modulation

    def wrong(quantized: QuantizedModel, name: str) -> fold.ExactModulation:
        plain = right(quantized, name)
        plain.bias[-1] -= 1
        return plain

    monkeypatch.setattr(fold_proof, "plain_modulation", wrong)
    with pytest.raises(QuantizationError, match=FINAL_ADALN):
        prove_model(quantize_adaln(quantized_tiny_dit(tiny_dit()), adaln))


def test_a_multiplication_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fold.fold_block

    def wrong(*arguments: Any) -> fold.ExactBlock:
        exact = right(*arguments)
        (name,) = exact.multipliers
        return replace(exact, multipliers={name: exact.multipliers[name] * (1 + 10 * BOUND)})

    monkeypatch.setattr("ditas_export.calibration.fold_proof.fold_block", wrong)
    with pytest.raises(QuantizationError, match=r"mlp\.fc2 differs by 1\.0e-09"):
        prove_model(quantized_tiny_dit(tiny_dit()))


def test_nothing_is_written_where_a_fold_is_wrong(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fold_proof, "fold_block", planted("attn.proj"))
    monkeypatch.setattr(export_files, "export_onnx", lambda *_, **__: pytest.fail("written"))
    asked = ExportOptions(
        output=tmp_path / "out.onnx",
        model=str(checkpoint),
        steps=2,
        samples=1,
        alpha_grid=(0.5,),
        walk_tokens=32,
    )
    with pytest.raises(QuantizationError, match=r"proj differs .* nothing was written"):
        export(asked)
    assert not asked.output.exists()
