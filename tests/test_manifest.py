"""Bytes by part, and the manifest file."""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as ir
import pytest
from quantized_fixture import TINY, exported

from ditas_export.errors import ArtifactError
from ditas_export.onnx_export.form import Layout
from ditas_export.onnx_export.manifest import PARTS, bytes_by_part, write_manifest


def test_every_byte_is_in_one_part() -> None:
    path = exported(adaln_bits=8, block_size=48, rank=4)
    sizes = bytes_by_part(ir.load(path), TINY)
    width, depth = TINY.hidden_size, TINY.depth
    weights, outputs, inputs = 12 * width**2, 9 * width, 7 * width  # per block
    assert tuple(sizes) == PARTS
    assert sizes["codes"] == depth * weights // 2
    assert sizes["multipliers"] == depth * weights // 48 * 2
    assert sizes["row_scales"] == depth * outputs * 4
    assert sizes["low_rank"] == depth * (4 * outputs * 4 + 4 * inputs + 4 * 4 * 4)
    modulation = (6 * depth + 2) * width
    assert sizes["adaln"] == modulation * width + 2 * 4 * modulation  # codes; scales and biases
    assert sizes["embedders"] > 0
    total = path.stat().st_size
    assert 0 < total - sum(sizes.values()) < 80_000  # the nodes


@pytest.mark.parametrize("layout", ["int4", "int8"])
def test_the_factors_of_a_branch_that_joins_its_linear(layout: Layout) -> None:
    """INT8 output factors: a part of their own beside INT4 codes, and rows of INT8 codes."""
    path = exported(layout=layout, ranges="token", rank=4, target="onnxruntime")
    sizes = bytes_by_part(ir.load(path), TINY)
    width, depth = TINY.hidden_size, TINY.depth
    weights, outputs, inputs = 12 * width**2, 9 * width, 7 * width  # per block
    left, right = 4 * outputs, 4 * inputs + 4 * 4 * 4  # right: codes, and four scales of floats
    codes = weights // 2 if layout == "int4" else weights + left
    assert sizes["codes"] == depth * codes
    assert sizes["low_rank"] == depth * (right + (left if layout == "int4" else 0))
    assert sizes["row_scales"] == depth * outputs * 4


def test_a_manifest_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    content = {"z": 1, "a": {"snr_db": [1.5, 2.5]}}
    write_manifest(path, content)
    assert json.loads(path.read_text()) == content
    assert list(json.loads(path.read_text())) == ["z", "a"]
    with pytest.raises(ArtifactError, match="does not exist"):
        write_manifest(tmp_path / "no" / "out.json", content)
    with pytest.raises(ValueError, match="JSON compliant"):
        write_manifest(path, {"snr_db": float("nan")})
    assert json.loads(path.read_text()) == content
