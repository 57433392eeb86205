"""A portable file in another target's form is the file that the exporter writes for that target."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from quantized_fixture import exported, exported_reference

from ditas_export.errors import OnnxExportError
from ditas_export.onnx_export.expand import expand
from ditas_export.onnx_export.file_facts import read_form
from ditas_export.onnx_export.lowered import LINEARS_KEY
from ditas_export.onnx_export.relower import relower

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

CASES = [
    {"target": target, "dtype": dtype, "ranges": ranges, "layout": layout}
    for target, dtype, ranges, layout in itertools.product(
        ("onnxruntime", "tensorrt"), DTYPES, ("token", "static"), ("int4", "int8")
    )
    if target == "tensorrt" or dtype == torch.float32
]
OTHERS = [
    {"target": "onnxruntime", "dtype": torch.float16},
    {"target": "onnxruntime", "rank": 0},
    {"target": "onnxruntime", "rank": 0, "ranges": "static"},
    {"target": "tensorrt", "rank": 0, "ranges": "static", "layout": "int8"},
    {"target": "onnxruntime", "activation_bits": 16, "block_size": 32},
    {"target": "onnxruntime", "activation_bits": 16, "layout": "int8"},
    {"target": "tensorrt", "activation_bits": 16, "block_size": 32, "dtype": torch.float16},
    {"target": "onnxruntime", "weight_bits": 8, "rank": 0, "layout": "int8"},
    {"target": "tensorrt", "weight_bits": 8, "rank": 4, "layout": "int8"},
    {"target": "onnxruntime", "adaln_bits": 8},
    {"target": "onnxruntime", "adaln_bits": 4, "layout": "int8"},
]


def without_metadata(path: Path) -> bytes:
    model = onnx.load(str(path))
    del model.metadata_props[:]
    return bytes(model.SerializeToString(deterministic=True))


@pytest.mark.parametrize("case", [*CASES, *OTHERS], ids=str)
def test_the_bytes_are_those_of_the_target(tmp_path: Path, case: dict[str, Any]) -> None:
    settings = dict(case)
    target = settings.pop("target")
    path = tmp_path / "relowered.onnx"
    relower(exported(**settings), path, target)
    wanted = exported(**settings, target=target)
    assert without_metadata(path) == without_metadata(wanted)
    assert read_form(path) == read_form(wanted)


def test_an_expanded_file_is_taken_too(tmp_path: Path) -> None:
    expand(exported(), tmp_path / "int8.onnx")
    relower(tmp_path / "int8.onnx", tmp_path / "relowered.onnx", "onnxruntime")
    wanted = exported(layout="int8", target="onnxruntime")
    assert without_metadata(tmp_path / "relowered.onnx") == without_metadata(wanted)


def changed(path: Path) -> None:
    model = onnx.load(str(exported()))
    next(node for node in model.graph.node if node.op_type == "Softmax").attribute[0].i = 1
    onnx.save(model, str(path))


def without_linears(path: Path) -> None:
    model = onnx.load(str(exported()))
    kept = [entry for entry in model.metadata_props if entry.key != LINEARS_KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    onnx.save(model, str(path))


def with_record(text: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        model = onnx.load(str(exported(rank=4)))
        (entry,) = (entry for entry in model.metadata_props if entry.key == LINEARS_KEY)
        entry.value = text
        onnx.save(model, str(path))

    return change


def with_facts(**changes: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        model = onnx.load(str(exported()))
        (entry,) = (entry for entry in model.metadata_props if entry.key == LINEARS_KEY)
        facts = json.loads(entry.value)
        facts["blocks.0.attn.proj"] |= changes
        entry.value = json.dumps(facts)
        onnx.save(model, str(path))

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: shutil.copy(exported_reference(), path), "it holds a float model"),
        (
            lambda path: shutil.copy(exported(target="tensorrt"), path),
            "form for tensorrt; only",
        ),
        (without_linears, "an earlier version wrote it, .*; export it again"),
        (changed, "its graph was changed since it was exported"),
        (
            with_facts(divisor=[3]),
            r"0\.attn\.proj cannot be read back .*do not fit",
        ),
        (with_facts(divisor=[2, 3, 5, 7]), "a divisor of the low-rank branch is even"),
        (with_facts(static_range="wide"), "static_range='wide'; expected a number"),
        (with_facts(static_range=float("nan")), "static_range=nan; expected a finite number"),
        (with_facts(static_range=-1), "static_range=-1; expected a number, 0 to"),
        (with_facts(divisor=None), "its branch has no divisor on record"),
        (with_facts(more=1), "has no 'more'"),
        (with_record("[]"), "record of its linears is not of the linears of its model"),
        (with_record("{"), "record of its linears is damaged: it is no JSON"),
        (with_record("[" * 1000), "record of its linears is damaged: its JSON is nested"),
        (with_record('{"blocks.0.attn.qkv": 5}'), "is not of the linears of its model"),
    ],
)
def test_what_is_refused(tmp_path: Path, write: Callable[[Path], None], message: str) -> None:
    write(tmp_path / "in.onnx")
    with pytest.raises(OnnxExportError, match=message) as caught:
        relower(tmp_path / "in.onnx", tmp_path / "out.onnx", "onnxruntime")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.onnx").exists()
