from __future__ import annotations

import re
from pathlib import Path

import onnx
import pytest
import torch
from quantized_fixture import TINY, example_inputs, exported

from ditas_export.errors import OnnxExportError, RunnerError
from ditas_export.onnx_export.external_data import sha256_of_onnx
from ditas_export.runtime.onnxruntime_runner import OnnxRuntimeRunner
from ditas_export.runtime.optimized_cache import default_cache, optimized_model

LINEARS = 4 * TINY.depth
HASH = "a" * 64


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


def prepared(entry: Path) -> onnx.ModelProto:
    return onnx.load(str(entry / "model.onnx"), load_external_data=False)


def packed(model: onnx.ModelProto) -> dict[str, int]:
    """Return where the packed weights of each tensor begin in the file beside the model."""
    return {
        tensor.name: int(entry.value.rpartition("|")[2].partition(";")[0])
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key.startswith("prepacked")
    }


@pytest.mark.parametrize("adaln_bits", [16, 4])
def test_weights_are_kept_packed_where_kernels_can_use_them(
    tmp_path: Path, adaln_bits: int
) -> None:
    with OnnxRuntimeRunner(exported(adaln_bits=adaln_bits), threads=2, cache=tmp_path):
        (entry,) = tmp_path.iterdir()
        offsets = packed(prepared(entry))
        if Path("/proc/self/maps").exists():
            assert str(entry / "model.data") in Path("/proc/self/maps").read_text()
    assert offsets
    # onnxruntime aligns what it packs itself to 64 bytes; its kernels crash on less.
    assert [name for name, offset in offsets.items() if offset % 64] == []


def test_int4_weights_are_expanded_once(tmp_path: Path) -> None:
    path = exported(layout="int4")
    with OnnxRuntimeRunner(path, threads=2, cache=tmp_path):
        (entry,) = tmp_path.iterdir()
        tensors = prepared(entry).graph.initializer
    kept = [t for t in tensors if t.name.endswith("/int8_codes") and len(t.dims) == 2]
    assert len(kept) == LINEARS
    assert {tensor.data_type for tensor in kept} == {onnx.TensorProto.INT8}
    assert {file.name for file in entry.iterdir()} == {"model.onnx", "model.data"}


def test_a_hash_that_is_given_is_the_one_that_is_looked_for(tmp_path: Path) -> None:
    for sha256 in (None, sha256_of_onnx(exported())):
        with OnnxRuntimeRunner(exported(), threads=2, cache=tmp_path, sha256=sha256):
            pass
    assert len(list(tmp_path.iterdir())) == 1


def test_a_refused_file_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    model = onnx.load(str(exported()))
    next(node for node in model.graph.node if node.op_type == "Softmax").op_type = "NoSuchOp"
    path = tmp_path / "broken.onnx"
    onnx.save(model, str(path))
    with pytest.raises(RunnerError, match=re.escape(f"refuses {path}: ")):
        OnnxRuntimeRunner(path, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_norms_are_not_fused_with_the_sums_before_them(tmp_path: Path) -> None:
    with OnnxRuntimeRunner(exported(), threads=2, cache=tmp_path):
        (entry,) = tmp_path.iterdir()
        kinds = [node.op_type for node in prepared(entry).graph.node]
    assert "SkipLayerNormalization" not in kinds
    assert kinds.count("LayerNormalization") == 2 * TINY.depth + 1


def test_a_second_start_does_not_optimize(tmp_path: Path) -> None:
    targets: list[Path] = []

    def optimize(target: Path) -> None:
        targets.append(target)
        target.write_bytes(b"optimized")

    found = [optimized_model(HASH, tmp_path, {"version": 1}, optimize) for _ in range(2)]
    assert len(targets) == 1
    assert found[0] == found[1]
    assert found[0].read_bytes() == b"optimized"
    optimized_model(HASH, tmp_path, {"version": 2}, optimize)
    optimized_model("b" * 64, tmp_path, {"version": 1}, optimize)
    assert len(targets) == 3


def test_a_failed_optimization_leaves_nothing(tmp_path: Path) -> None:
    def fail(target: Path) -> None:
        target.write_bytes(b"half")
        raise RunnerError("refused")

    with pytest.raises(RunnerError, match="refused"):
        optimized_model(HASH, tmp_path / "cache", {}, fail)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunnerError, match=r"cannot keep .* set DITAS_EXPORT_CACHE"):
        optimized_model(HASH, tmp_path / "file", {}, lambda target: None)


def test_the_user_chooses_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert default_cache() == Path("/caches/ditas-export")
    monkeypatch.setenv("DITAS_EXPORT_CACHE", "/elsewhere")
    assert default_cache() == Path("/elsewhere")


def test_a_link_is_opened_as_its_file(tmp_path: Path) -> None:
    """A hub's snapshots are links to files elsewhere."""
    link = tmp_path / "snapshot" / "out.onnx"
    link.parent.mkdir()
    link.symlink_to(exported())
    inputs = example_inputs()
    outputs = []
    for path in (exported(), link):
        with OnnxRuntimeRunner(path, threads=2, cache=tmp_path / path.parent.name) as runner:
            outputs.append(runner(*inputs))
    assert torch.equal(*outputs)


def test_tensors_beyond_the_end_of_their_file_are_one_line(tmp_path: Path) -> None:
    model = onnx.load(str(exported()))
    path = tmp_path / "out.onnx"
    onnx.save(
        model, str(path), save_as_external_data=True, location="out.data", size_threshold=4096
    )
    data = tmp_path / "out.data"
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(OnnxExportError, match="it was cut short; copy it again") as caught:
        OnnxRuntimeRunner(path, threads=2, cache=tmp_path / "cache")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()
