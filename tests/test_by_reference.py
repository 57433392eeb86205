"""Models read without their tensors' bytes: the same model, and references that find the bytes."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx.external_data_helper import convert_model_to_external_data
from quantized_fixture import exported

from ditas_export.onnx_export.by_reference import KEPT_BYTES, load_by_reference


def external(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def test_references_find_the_bytes_and_all_else_is_the_same() -> None:
    path = exported()
    whole, found = onnx.load(str(path)), load_by_reference(path)
    content = path.read_bytes()
    referenced = 0
    for tensor, expected in zip(found.graph.initializer, whole.graph.initializer, strict=True):
        if len(expected.raw_data) > KEPT_BYTES:
            entry = external(tensor)
            start = int(entry["offset"])
            assert entry["location"] == path.name
            assert content[start : start + int(entry["length"])] == expected.raw_data
            assert tensor.data_location == onnx.TensorProto.EXTERNAL
            referenced += 1
            del tensor.external_data[:]
            tensor.ClearField("data_location")
            tensor.raw_data = expected.raw_data
    assert found == whole
    assert referenced > 20


def test_little_is_left_in_the_model() -> None:
    path = exported()
    tensors = load_by_reference(path).graph.initializer
    assert all(len(tensor.raw_data) <= KEPT_BYTES for tensor in tensors)
    assert any(len(tensor.raw_data) for tensor in tensors)


def test_the_library_reads_the_references(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(exported().read_bytes())
    found = load_by_reference(path)
    onnx.external_data_helper.load_external_data_for_model(found, str(tmp_path))
    expected = onnx.load(str(path)).graph.initializer
    assert [t.raw_data for t in found.graph.initializer] == [t.raw_data for t in expected]


def test_what_lies_elsewhere_stays_there(tmp_path: Path) -> None:
    model = onnx.load(str(exported()))
    convert_model_to_external_data(model, location="tensors.data", size_threshold=64)
    onnx.save(model, str(tmp_path / "model.onnx"))
    found = load_by_reference(tmp_path / "model.onnx")
    assert found == onnx.load(str(tmp_path / "model.onnx"), load_external_data=False)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    content = exported().read_bytes()
    path = tmp_path / "model.onnx"
    graph_ends = len(content) - 2000  # what comes after it is metadata
    for size in (1, 17, 1000, len(content) // 2, graph_ends, len(content) - 3):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match="truncated"):
            load_by_reference(path)


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"no protobuf at all, but text"])
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ValueError, match=r"truncated|protobuf|empty"):
        load_by_reference(tmp_path / "model.onnx")
