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
from ditas_export.calibration import fold
from ditas_export.calibration.adaln import quantize_adaln
from ditas_export.calibration.fold_proof import BOUND, prove_folds
from ditas_export.errors import QuantizationError
from ditas_export.options import ExportOptions
from ditas_export.pipeline import export

TYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("adaln", [16, 8, 4])
@pytest.mark.parametrize("rank", [0, 4])
def test_folds_are_exact(dtype: torch.dtype, adaln: int, rank: int) -> None:
    quantized = quantize_adaln(quantized_tiny_dit(tiny_dit(), rank=rank), adaln)
    seen: list[tuple[int, int]] = []
    proof = prove_folds(quantized, dtype, on_block=lambda *done: seen.append(done))
    assert 0 < proof.relative_error < 1e-13  # float64, K at most 384
    assert seen == [(1, 2), (2, 2)]


def test_a_power_of_two_that_goes_elsewhere_is_proved_too() -> None:
    """V rows so small that proj's s alone would take them below the smallest normal half."""
    quantized = quantized_tiny_dit(tiny_dit())
    linears = dict(quantized.linears)
    name = "blocks.0.attn.proj"
    linears[name] = replace(linears[name], smoothing_scale=linears[name].smoothing_scale * 1e3)
    quantized = replace(quantized, linears=linears)
    assert not torch.equal(
        fold.fold_block(quantized, 0, torch.float16).linears[name].smoothing_scale,
        fold.fold_block(quantized, 0, torch.float32).linears[name].smoothing_scale,
    )
    assert prove_folds(quantized, torch.float16).relative_error < 1e-13


Mutation = Callable[[Any], Any]


def _wrong_modulation(branch: str) -> tuple[str, Mutation]:
    def mutate(right: Any) -> Any:
        def folded(bias: Any, qkv: Any, fc1: Any, width: int) -> Any:
            wrong = qkv if branch == "msa" else fc1
            s = wrong.smoothing_scale.clone()
            s[3] *= 1.01
            wrong = replace(wrong, smoothing_scale=s)
            return right(bias, *((wrong, fc1) if branch == "msa" else (qkv, wrong)), width)

        return folded

    return "_folded_modulation", mutate


def _wrong_values(right: Any) -> Any:
    def divided(linear: Any, s: torch.Tensor, width: int) -> Any:
        s = s.clone()
        s[3] *= 1.01
        return right(linear, s, width)

    return divided


MUTATIONS: dict[str, tuple[str, Mutation]] = {
    "attn.qkv": _wrong_modulation("msa"),
    "mlp.fc1": _wrong_modulation("mlp"),
    "attn.proj": ("_divide_value_rows", _wrong_values),
    "final_layer": (
        "final_scale_rows",
        lambda right: lambda width: slice(right(width).start + 1, right(width).stop),
    ),
}


@pytest.mark.parametrize("kind", MUTATIONS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("adaln", [16, 8])
def test_one_channel_that_is_folded_wrong_by_a_hundredth_is_found(
    kind: str, dtype: torch.dtype, adaln: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized = quantize_adaln(quantized_tiny_dit(tiny_dit()), adaln)
    name, mutate = MUTATIONS[kind]
    monkeypatch.setattr(fold, name, mutate(getattr(fold, name)))
    with pytest.raises(QuantizationError, match=rf"changed what the model computes: \S*{kind}"):
        prove_folds(quantized, dtype)


def test_a_multiplication_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fold.fold_block

    def wrong(*args: Any) -> fold.ExactBlock:
        exact = right(*args)
        (name,) = exact.multipliers
        return replace(exact, multipliers={name: exact.multipliers[name] * (1 + 10 * BOUND)})

    monkeypatch.setattr("ditas_export.calibration.fold_proof.fold_block", wrong)
    with pytest.raises(QuantizationError, match=r"mlp\.fc2 differs by 1\.0e-09"):
        prove_folds(quantized_tiny_dit(tiny_dit()))


def test_nothing_is_written_where_a_fold_is_wrong(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fold, "_divide_value_rows", _wrong_values(fold._divide_value_rows))
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
