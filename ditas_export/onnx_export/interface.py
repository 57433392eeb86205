"""What a file says of its model, held against its graph: inputs, output, tables and blocks.

Metadata that do not fit the graph would be followed all the same: a model of ten classes said to
have nine takes the tenth for "no class".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import onnx
import torch

from ditas_export.families.base import ModelConfig, output_shape
from ditas_export.families.registry import family_of

OUTPUT_NAME = "model_output"

INPUT_PART, OUTPUT_PART = "input_", "output_"
"""How the names of nodes of one part go on after a linear's path, before the part's number."""

_TYPES = {torch.float32: onnx.TensorProto.FLOAT, torch.int64: onnx.TensorProto.INT64}
"""ONNX's names of the types that inputs have."""


def why_unlike(graph: onnx.GraphProto, config: ModelConfig) -> str | None:
    """Return in what a graph is not the model of a configuration, None where it is."""
    constants = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in constants]
    expected = {OUTPUT_NAME: (onnx.TensorProto.FLOAT, output_shape(config))}
    faults = [
        *_value_faults("inputs", inputs, input_types(config)),
        *_value_faults("outputs", graph.output, expected),
        *_table_faults(graph.initializer, config),
        *_depth_faults(graph.node, config),
    ]
    return faults[0] if faults else None


def input_types(config: ModelConfig) -> dict[str, tuple[int, tuple[int | str, ...]]]:
    """Return ONNX type and shape of every input of a model, in order; the batch is left out.

    What is dynamic has a name for its size.
    """
    return {
        each.name: (_TYPES[each.dtype], each.shape) for each in family_of(config).inputs(config)
    }


def _value_faults(
    what: str,
    values: Sequence[onnx.ValueInfoProto],
    expected: Mapping[str, tuple[int, tuple[int | str, ...]]],
) -> Iterator[str]:
    """Yield what is wrong with inputs or outputs; the first dimension is the batch's."""
    if [value.name for value in values] != list(expected):
        found = ", ".join(value.name[:40] for value in values[:8]) or "none"
        yield f"its {what} are {found}, expected {', '.join(expected)}"
        return
    for value in values:
        dtype, sizes = expected[value.name]
        tensor = value.type.tensor_type
        if tensor.elem_type != dtype:
            names = onnx.TensorProto.DataType
            found = names.Name(tensor.elem_type) if tensor.elem_type in names.values() else "none"
            yield f"{value.name} is of type {found}, expected {names.Name(dtype)}"
        found_sizes = [each.dim_value or each.dim_param for each in tensor.shape.dim][1:]
        if not tensor.HasField("shape") or len(tensor.shape.dim) != len(sizes) + 1:
            yield f"{value.name} has {len(tensor.shape.dim)} dimensions, expected {len(sizes) + 1}"
        elif any(
            isinstance(found, int) and found != size
            for found, size in zip(found_sizes, sizes, strict=True)
        ):
            yield f"{value.name} has rows of {tuple(found_sizes)}, its record says {sizes}"


def _table_faults(constants: Iterable[onnx.TensorProto], config: ModelConfig) -> Iterator[str]:
    """Yield which tables are not of the recorded sizes."""
    sizes = family_of(config).tables(config)
    found = {tensor.name: tuple(tensor.dims) for tensor in constants if tensor.name in sizes}
    for name, expected in sizes.items():
        if name not in found:
            yield f"it has no {name}"
        elif found[name] != expected:
            yield f"{name} is {found[name]}, its record says {expected}"


def _depth_faults(nodes: Iterable[onnx.NodeProto], config: ModelConfig) -> Iterator[str]:
    """Yield whether nodes are of another number of blocks; a tool may have dropped all names."""
    expected = {block.path for block in family_of(config).blocks(config)}
    lists = "|".join(sorted({re.escape(path.rpartition(".")[0]) for path in expected}))
    block = re.compile(rf"((?:{lists})\.[0-9]{{1,6}})[./]")
    found = {match[1] for node in nodes if (match := block.match(node.name))}
    if found and found != expected:
        yield f"its nodes are of {len(found)} blocks, its record says {len(expected)}"
