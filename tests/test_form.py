"""The record of a file's form: what is read is what was written, and nothing else."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
from quantized_fixture import exported, exported_reference

from ditas_export.errors import OnnxExportError
from ditas_export.onnx_export.file_facts import FORM_KEY, read_form, require_form_for_tensorrt
from ditas_export.onnx_export.form import FileForm

QUANTIZED: dict[str, Any] = {
    "float_type": "fp32", "weight_bits": 4, "activation_bits": 8, "adaln_bits": 16,
    "layout": "int4", "ranges": "token", "activation_codes": "int8", "target": "portable",
}  # fmt: skip


def test_what_is_recorded_is_read() -> None:
    for values in (QUANTIZED, {"float_type": "bf16"}):
        assert FileForm.from_dict(values).to_dict() == values


def test_what_an_earlier_file_lacks() -> None:
    """Files had a form before they said what their codes, modulation and target are."""
    lacking = ("adaln_bits", "activation_codes", "target")
    values = {name: value for name, value in QUANTIZED.items() if name not in lacking}
    form = FileForm.from_dict(values)
    assert (form.adaln_bits, form.activation_codes, form.target) == (16, None, None)
    assert form.fits_tensorrt


@pytest.mark.parametrize(
    "values",
    [
        None,
        [],
        "fp32",
        {},
        {"layout": "int4"},
        {"float_type": "fp8"},
        {"float_type": None},
        {"float_type": ["fp32"]},
        {"float_type": "fp32", "layout": "int4"},  # of a float file
        {"float_type": "fp32", "adaln_bits": 8},
        *(QUANTIZED | {name: "other"} for name in QUANTIZED),
        *(QUANTIZED | {name: True} for name in QUANTIZED),
        *(QUANTIZED | {name: 4.0} for name in QUANTIZED),
        *(QUANTIZED | {name: None} for name in ("activation_bits", "adaln_bits", "layout")),
        QUANTIZED | {"colour": 3},
    ],
    ids=str,
)
def test_what_no_file_has_is_refused(values: object) -> None:
    with pytest.raises(OnnxExportError) as caught:
        FileForm.from_dict(values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("record", ["{", "3", '{"float_type": "fp8"}', '{"float_type": 1e999}'])
def test_a_damaged_record_is_named(tmp_path: Any, record: str) -> None:
    path = tmp_path / "damaged.onnx"
    model = onnx.load(str(exported_reference()))
    for entry in model.metadata_props:
        if entry.key == FORM_KEY:
            entry.value = record
    onnx.save(model, str(path))
    with pytest.raises(OnnxExportError, match=r"damaged\.onnx has a damaged record of its form"):
        read_form(path)


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({}, True),
        ({"target": "onnxruntime"}, False),
        ({"target": "onnxruntime", "float_type": "fp16"}, True),
        ({"target": "onnxruntime", "activation_codes": "uint8"}, False),
        ({"target": None, "activation_codes": "uint8"}, False),
        ({"target": "tensorrt"}, True),
    ],
)
def test_the_form_that_tensorrt_does_not_take(changes: dict[str, Any], fits: bool) -> None:
    assert FileForm.from_dict(QUANTIZED | changes).fits_tensorrt is fits


def test_files_of_onnxruntimes_form_are_refused() -> None:
    require_form_for_tensorrt(exported())
    with pytest.raises(OnnxExportError, match="was exported for onnxruntime"):
        require_form_for_tensorrt(exported(target="onnxruntime"))
