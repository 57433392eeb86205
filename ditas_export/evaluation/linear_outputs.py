"""The outputs of the block linears as outputs of the graph, in a copy of an exported file.

Float and quantized files name the nodes of a linear after its path, `blocks.3.attn.qkv/…`; the last
of them gives what the linear gives, bias and low-rank branch included. Where a linear gives its
output in parts, the last nodes of `blocks.3.attn.qkv/output_0/…` and those after it do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import onnx
import torch
from torch import Tensor

from ditas_export.errors import OnnxExportError
from ditas_export.families.base import ModelConfig, Rows
from ditas_export.families.registry import family_of, linear_shapes
from ditas_export.onnx_export.interface import OUTPUT_PART


def linear_outputs(path: Path, config: ModelConfig) -> dict[str, list[str]]:
    """Return linear -> names of the values it gives, in the order of the network.

    Several values are equal parts of its output channels, in order. A linear of which nothing can
    be compared is left out: see `comparable_part`.

    Raises:
        OnnxExportError: a linear that has no nodes of its own in the file.
    """
    last: dict[str, dict[str, str]] = defaultdict(dict)
    for node in onnx.load(str(path), load_external_data=False).graph.node:
        linear, _, place = node.name.partition("/")
        part = place.partition("/")[0] if place.startswith(OUTPUT_PART) else ""
        last[linear][part] = node.output[0]
    linears = [
        name
        for name, (rows, _) in linear_shapes(config).items()
        if bool(_comparable_rows(name, rows, config).any())
    ]
    if absent := [name for name in linears if name not in last]:
        raise OnnxExportError(
            f"{path} has no nodes named {absent[0]}/…; compare files as ditas-export wrote them, "
            f"or use --no-linears"
        )
    return {name: _parts_or_whole(last[name]) for name in linears}


def _parts_or_whole(last: dict[str, str]) -> list[str]:
    """Return the parts' values in order (nodes are in the graph's), or the only one."""
    return [value for part, value in last.items() if part] or [last[""]]


def with_outputs(path: Path, values: Sequence[str]) -> bytes:
    """Return an ONNX file that gives more values after its own outputs.

    Tensors in a file of their own stay there: the bytes refer to it by its name.
    """
    model = onnx.load(str(path), load_external_data=False)
    model.graph.output.extend(onnx.ValueInfoProto(name=value) for value in values)
    content: bytes = model.SerializeToString()
    return content


def comparable_part(linear: str, output: Tensor, config: ModelConfig) -> Tensor:
    """Return the part of a linear's output that folding leaves as it is in the float model.

    Rows into which another linear's smoothing folds carry its 1/s in the quantized file, as V's do;
    what becomes of them shows in the output of that linear.

    Args:
        linear: its path.
        output: (N, T, out).
        config: of the model.
    """
    return output[..., _comparable_rows(linear, output.shape[-1], config)]


def _comparable_rows(linear: str, rows: int, config: ModelConfig) -> Tensor:
    """Return which of a linear's outputs folding leaves as they are, (rows,) of bools."""
    kept = torch.ones(rows, dtype=torch.bool)
    for block in family_of(config).blocks(config):
        for fold in (fold for group in block.groups() for fold in group.folds):
            if isinstance(fold, Rows) and block.name(fold.linear) == linear:
                kept[fold.rows] = False
    return kept
