from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx.external_data_helper import convert_model_to_external_data
from quantized_fixture import TINY, example_inputs, exported

from ditas_export.errors import RunnerError
from ditas_export.runtime.onnxruntime_runner import OnnxRuntimeRunner
from ditas_export.runtime.optimized_cache import default_cache, optimized_model

LINEARS = 4 * TINY.depth


@pytest.mark.parametrize("adaln_bits", [16, 4])
def test_the_kept_model_gives_the_same_bytes_with_the_same_kernels(
    tmp_path: Path, adaln_bits: int
) -> None:
    path = exported(adaln_bits=adaln_bits)
    inputs = example_inputs()
    with OnnxRuntimeRunner(path, threads=2) as runner:
        fresh = runner(*inputs)
    for _ in range(2):  # made, then found
        with OnnxRuntimeRunner(path, threads=2, cache=tmp_path) as runner:
            assert torch.equal(runner(*inputs), fresh)
            assert f"{2 * LINEARS} MatMulIntegerToFloat" in runner.description
    assert len(list(tmp_path.iterdir())) == 1


def test_the_norms_are_not_fused_with_the_sums_before_them(tmp_path: Path) -> None:
    with OnnxRuntimeRunner(exported(), threads=2, cache=tmp_path):
        (entry,) = tmp_path.iterdir()
        kinds = [node.op_type for node in onnx.load(str(entry / "model.onnx")).graph.node]
    assert "SkipLayerNormalization" not in kinds
    assert kinds.count("LayerNormalization") == 2 * TINY.depth + 1


def test_a_second_start_does_not_optimize(tmp_path: Path) -> None:
    targets: list[Path] = []

    def optimize(target: Path) -> None:
        targets.append(target)
        target.write_bytes(b"optimized")

    found = [optimized_model(exported(), tmp_path, {"version": 1}, optimize) for _ in range(2)]
    assert len(targets) == 1
    assert found[0] == found[1]
    assert found[0].read_bytes() == b"optimized"
    optimized_model(exported(), tmp_path, {"version": 2}, optimize)
    optimized_model(exported(rank=0), tmp_path, {"version": 1}, optimize)
    assert len(targets) == 3


def test_external_data_belongs_to_the_file(tmp_path: Path) -> None:
    model = onnx.load(str(exported()))
    convert_model_to_external_data(model, location="tensors.data", size_threshold=64)
    path = tmp_path / "model.onnx"
    onnx.save(model, str(path))
    calls: list[Path] = []

    def optimize(target: Path) -> None:
        calls.append(target)
        target.write_bytes(b"")

    optimized_model(path, tmp_path / "cache", {}, optimize)
    data = bytearray((tmp_path / "tensors.data").read_bytes())
    data[0] ^= 1
    (tmp_path / "tensors.data").write_bytes(data)
    optimized_model(path, tmp_path / "cache", {}, optimize)
    assert len(calls) == 2


def test_a_failed_optimization_leaves_nothing(tmp_path: Path) -> None:
    def fail(target: Path) -> None:
        target.write_bytes(b"half")
        raise RunnerError("refused")

    with pytest.raises(RunnerError, match="refused"):
        optimized_model(exported(), tmp_path / "cache", {}, fail)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunnerError, match=r"cannot keep .* set DITAS_EXPORT_CACHE"):
        optimized_model(exported(), tmp_path / "file", {}, lambda target: None)


def test_the_user_chooses_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert default_cache() == Path("/caches/ditas-export")
    monkeypatch.setenv("DITAS_EXPORT_CACHE", "/elsewhere")
    assert default_cache() == Path("/elsewhere")
