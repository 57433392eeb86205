"""Layout int4 to layout int8, file to file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx
import pytest
import torch
from quantized_fixture import example_inputs, exported, fed

from ditas_export.errors import OnnxExportError
from ditas_export.onnx_export.expand import expand
from ditas_export.onnx_export.file_facts import read_config, read_form
from ditas_export.runtime.onnxruntime_runner import OnnxRuntimeRunner


@pytest.mark.parametrize(
    ("dtype", "ranges", "rank", "adaln_bits", "target"),
    [
        (torch.float32, "token", 4, 16, "portable"),
        (torch.float32, "static", 0, 4, "portable"),
        (torch.float16, "static", 4, 8, "portable"),
        (torch.float32, "token", 4, 16, "onnxruntime"),
        pytest.param(torch.float16, "token", 4, 16, "tensorrt", marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, "token", 4, 8, "portable", marks=pytest.mark.slow),
        (torch.bfloat16, "static", 4, 4, "tensorrt"),
    ],
)
def test_expanding_equals_exporting(
    tmp_path: Path, dtype: torch.dtype, ranges: str, rank: int, adaln_bits: int, target: str
) -> None:
    settings = {
        "dtype": dtype,
        "ranges": ranges,
        "rank": rank,
        "adaln_bits": adaln_bits,
        "target": target,
    }
    expanded = tmp_path / "expanded.onnx"
    expand(exported(layout="int4", **settings), expanded)
    assert expanded.read_bytes() == exported(layout="int8", **settings).read_bytes()


def test_the_expanded_file_runs_to_the_same_bits(tmp_path: Path) -> None:
    source, target = exported(layout="int4", ranges="token", rank=4), tmp_path / "int8.onnx"
    expand(source, target)
    outputs = []
    for path in (source, target):
        with OnnxRuntimeRunner(path, threads=2) as runner:
            outputs.append(runner(fed(*example_inputs())))
    assert torch.equal(*outputs)
    assert read_config(target) == read_config(source)
    assert read_form(target) == dataclasses.replace(read_form(source), layout="int8")
    graphs = [onnx.load(str(path)).graph for path in (source, target)]
    assert graphs[0].input == graphs[1].input
    assert graphs[0].output == graphs[1].output


def test_nothing_to_expand(tmp_path: Path) -> None:
    path = exported(layout="int8", ranges="token", rank=4)
    with pytest.raises(OnnxExportError, match="nothing to expand"):
        expand(path, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_a_file_of_another_origin_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.onnx"
    path.write_bytes(b"no protobuf")
    with pytest.raises(OnnxExportError, match="no readable ONNX file"):
        expand(path, tmp_path / "out.onnx")
