"""Layout int4 to layout int8, file to file."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from quantized_fixture import example_inputs, quantized_tiny_dit, tiny_dit

from ditas_export.calibration.fold import FoldedDiT, fold_smoothing
from ditas_export.errors import OnnxExportError
from ditas_export.onnx_export.expand import expand
from ditas_export.onnx_export.export import export_onnx, read_config, read_form
from ditas_export.runtime.onnxruntime_runner import OnnxRuntimeRunner


def folded_dit(dtype: torch.dtype = torch.float32, *, rank: int = 4) -> FoldedDiT:
    return fold_smoothing(quantized_tiny_dit(tiny_dit(), rank=rank), dtype=dtype)


@pytest.mark.parametrize(
    ("dtype", "ranges", "rank", "adaln_bits"),
    [
        (torch.float32, "token", 4, 16),
        (torch.float32, "static", 0, 4),
        (torch.float16, "static", 4, 8),
    ],
)
def test_expanding_equals_exporting(
    tmp_path: Path, dtype: torch.dtype, ranges: str, rank: int, adaln_bits: int
) -> None:
    folded = folded_dit(dtype, rank=rank)
    paths = [tmp_path / f"{name}.onnx" for name in ("int4", "int8", "expanded")]
    for layout, path in zip(("int4", "int8"), paths[:2], strict=True):
        export_onnx(folded, path, layout=layout, ranges=ranges, adaln_bits=adaln_bits)
    expand(paths[0], paths[2])
    assert paths[2].read_bytes() == paths[1].read_bytes()


def test_the_expanded_file_runs_to_the_same_bits(tmp_path: Path) -> None:
    source, target = tmp_path / "int4.onnx", tmp_path / "int8.onnx"
    export_onnx(folded_dit(), source)
    expand(source, target)
    outputs = []
    for path in (source, target):
        with OnnxRuntimeRunner(path, threads=2) as runner:
            outputs.append(runner(*example_inputs()))
    assert torch.equal(*outputs)
    assert read_config(target) == read_config(source)
    assert read_form(target) == {**read_form(source), "layout": "int8"}
    graphs = [onnx.load(str(path)).graph for path in (source, target)]
    assert graphs[0].input == graphs[1].input
    assert graphs[0].output == graphs[1].output


def test_nothing_to_expand(tmp_path: Path) -> None:
    path = tmp_path / "int8.onnx"
    export_onnx(folded_dit(), path, layout="int8")
    with pytest.raises(OnnxExportError, match="nothing to expand"):
        expand(path, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_a_file_of_another_origin_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.onnx"
    path.write_bytes(b"no protobuf")
    with pytest.raises(OnnxExportError, match="no readable ONNX file"):
        expand(path, tmp_path / "out.onnx")
