"""One hash for an ONNX file and the files that its tensors lie in."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from quantized_fixture import exported_reference

from ditas_export.artifact_files import sha256_of_file
from ditas_export.errors import DitasExportError, OnnxExportError
from ditas_export.onnx_export.external_data import external_files, sha256_of_onnx
from ditas_export.runtime.open_runner import open_runner
from ditas_export.runtime.options import Runtime


def write_sum(path: Path, *locations: str) -> None:
    """Write the sum of two constants, each inside the file or, by name, beside it."""
    tensors = [
        numpy_helper.from_array(np.full(4, value, dtype=np.float32), name)
        for name, value in (("a", 1.0), ("b", 2.0))
    ]
    for tensor, location in zip(tensors, locations, strict=False):
        onnx.external_data_helper.set_external_data(tensor, location)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    graph = helper.make_graph([helper.make_node("Add", ["a", "b"], ["y"])], "sum", [], [y], tensors)
    onnx.save(helper.make_model(graph), str(path))


def test_a_file_of_its_own_has_the_hash_of_its_bytes(tmp_path: Path) -> None:
    write_sum(tmp_path / "sum.onnx")
    assert external_files(tmp_path / "sum.onnx") == []
    assert sha256_of_onnx(tmp_path / "sum.onnx") == sha256_of_file(tmp_path / "sum.onnx")


def test_every_file_beside_it_counts(tmp_path: Path) -> None:
    path, files = tmp_path / "sum.onnx", [tmp_path / "a.data", tmp_path / "b.data"]
    write_sum(path, "b.data", "a.data")
    assert external_files(path) == files
    lines = [hashlib.sha256(file.read_bytes()).hexdigest() for file in (path, *files)]
    found = sha256_of_onnx(path)
    assert found == hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
    for file in files:
        kept = file.read_bytes()
        file.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        assert sha256_of_onnx(path) != found, file
        file.write_bytes(kept)
    write_sum(tmp_path / "one.onnx", "both.data", "both.data")
    assert external_files(tmp_path / "one.onnx") == [tmp_path / "both.data"]


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "sum.onnx"
    write_sum(path, "a.data")
    (tmp_path / "a.data").unlink()
    with pytest.raises(OnnxExportError) as caught:
        sha256_of_onnx(path)
    assert str(caught.value) == (
        f"{path} keeps tensors in {tmp_path / 'a.data'}, which cannot be read (No such file or "
        f"directory); put that file beside it, or export again"
    )
    path.write_bytes(b"no model")
    with pytest.raises(OnnxExportError, match=r"sum\.onnx is no readable ONNX file"):
        external_files(path)


def test_changed_data_are_another_model_to_sample_from(tmp_path: Path) -> None:
    path, data = tmp_path / "large.onnx", tmp_path / "large.onnx.data"
    model = onnx.load(str(exported_reference()))
    onnx.save(model, str(path), save_as_external_data=True, location=data.name)
    before = open_runner(str(path), runtime="onnxruntime", cache=tmp_path / "cache")
    assert before.sha256 == sha256_of_onnx(path)
    content = data.read_bytes()
    data.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    after = open_runner(str(path), runtime="onnxruntime", cache=tmp_path / "cache")
    assert after.sha256 != before.sha256
    after.runner.close()
    before.runner.close()


@pytest.mark.parametrize("runtime", ["auto", "onnxruntime", "openvino"])
def test_a_file_that_is_not_there_is_one_line(tmp_path: Path, runtime: Runtime) -> None:
    folder = tmp_path / "folder.onnx"
    folder.mkdir()
    for path in (tmp_path / "missing.onnx", folder):
        with pytest.raises(OnnxExportError, match="is no readable ONNX file"):
            sha256_of_onnx(path)
        with pytest.raises(DitasExportError) as caught:
            open_runner(str(path), runtime=runtime)
        assert str(path) in str(caught.value)
