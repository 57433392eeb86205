"""Writing the nodes and constants of one module into a graph, named by its path."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

from ditas_export.quantization.integer import pack_int4

_DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.int8: ir.DataType.INT8,
    torch.uint8: ir.DataType.UINT8,
    torch.int64: ir.DataType.INT64,
}


class Subgraph:
    """Puts named nodes before a node of a graph; every name starts with one module's path."""

    def __init__(self, before: ir.Node, path: str) -> None:
        graph = before.graph
        assert isinstance(graph, ir.Graph)  # placeholders are found by walking a graph
        self._graph = graph
        self._before = before
        self._path = path

    @property
    def before(self) -> ir.Node:
        """The node that all is put before."""
        return self._before

    def below(self, name: str) -> Subgraph:
        """Return the same place under the path `<path>/<name>`."""
        return Subgraph(self._before, f"{self._path}/{name}")

    def constant(self, name: str, tensor: Tensor) -> ir.Value:
        """Add an initializer `<path>/<name>` and return it; the tensor is copied when written."""
        full_name = f"{self._path}/{name}"
        dtype = _DTYPES[tensor.dtype]

        def evaluate() -> ir.TensorProtocol:
            return TorchTensor(tensor.detach().cpu().contiguous(), name=full_name)

        shape = ir.Shape(tensor.shape)
        return self._register(full_name, ir.LazyTensor(evaluate, dtype, shape, name=full_name))

    def int4_constant(self, name: str, codes: Tensor) -> ir.Value:
        """Add an INT4 initializer of int8 codes in −8 … 7, packed two a byte, and return it."""
        full_name = f"{self._path}/{name}"
        packed = pack_int4(codes.detach().cpu()).numpy()
        tensor = ir.PackedTensor(packed, ir.DataType.INT4, shape=tuple(codes.shape), name=full_name)
        return self._register(full_name, tensor)

    def scalar(self, name: str, value: float, dtype: torch.dtype) -> ir.Value:
        """Add a scalar initializer in `dtype` and return it."""
        return self.constant(name, torch.tensor(value, dtype=torch.float64).to(dtype))

    def axes(self, name: str, axes: Iterable[int]) -> ir.Value:
        """Add a list of axes as an initializer and return it."""
        return self.constant(name, torch.tensor(list(axes), dtype=torch.int64))

    def node(
        self,
        op_type: str,
        inputs: Iterable[ir.Value],
        *,
        name: str | None = None,
        **attributes: int | list[int],
    ) -> ir.Value:
        """Add a node `<path>/<name>` of the default domain and return its output.

        Args:
            op_type: ONNX operator; also the name, where that is free.
            inputs: its operands.
            name: the name under the path.
            attributes: integers and lists of integers.
        """
        node = ir.Node(
            "",
            op_type,
            list(inputs),
            [_attribute(key, value) for key, value in attributes.items()],
            name=f"{self._path}/{name or op_type}",
        )
        node.outputs[0].name = f"{node.name}_output_0"
        self._graph.insert_before(self._before, node)
        return node.outputs[0]

    def split(self, x: ir.Value, parts: int) -> list[ir.Value]:
        """Add a Split of a value's last axis into equal parts and return them."""
        node = ir.Node(
            "",
            "Split",
            [x],
            [_attribute("axis", -1), _attribute("num_outputs", parts)],
            num_outputs=parts,
            name=f"{self._path}/Split",
        )
        for index, value in enumerate(node.outputs):
            value.name = f"{node.name}_output_{index}"
        self._graph.insert_before(self._before, node)
        return list(node.outputs)

    def _register(self, name: str, tensor: ir.LazyTensor | ir.PackedTensor[Any]) -> ir.Value:
        """Make an initializer of a tensor."""
        value = ir.Value(
            name=name,
            type=ir.TensorType(tensor.dtype),
            shape=tensor.shape,
            const_value=tensor,
        )
        self._graph.register_initializer(value)
        return value


def _attribute(name: str, value: int | list[int]) -> ir.Attr:
    """Return an attribute of one integer or of a list of them."""
    return ir.AttrInt64(name, value) if isinstance(value, int) else ir.AttrInt64s(name, value)
