"""What stands where a linear was lowered: found again by name, and its integers read back exactly.

The portable form holds all of a linear's integers but three facts, which its metadata state: static
ranges where ranges are of tokens, and the divisors of the low-rank branch, whose reciprocals halves
round.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ditas_export.calibration.fold import FoldedLinear
from ditas_export.errors import OnnxExportError, QuantizationError
from ditas_export.onnx_export.patterns import array
from ditas_export.onnx_export.skeleton import PLACEHOLDER, PLACEHOLDER_DOMAIN
from ditas_export.quantization.integer import IntegerWeight, LowRank
from ditas_export.saved_records import Within, from_record
from ditas_export.text_files import TextError, parse_json

LINEARS_KEY = "ditas_export.linears"
"""Metadata entry of a portable file: module path -> `static_range`, and `divisor` of a branch."""

LARGEST_FLOAT = 3.5e38
"""Beyond every float32."""

GRAPH_KEY = "ditas_export.graph"
"""Metadata entry of a portable file: the hash of its nodes, by which a changed graph is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearRecord:
    """What a file states of a linear."""

    static_range: Annotated[float, Within(0, LARGEST_FLOAT)]
    divisor: tuple[Annotated[int, Within(1, 2**24)], ...] | None = None  # of a branch


def record_linears(model: ir.Model, linears: Mapping[str, FoldedLinear]) -> None:
    """State in a file what its graph does not hold of quantized linears, and which graph it is."""
    facts: dict[str, dict[str, Any]] = {}
    for module, linear in linears.items():
        facts[module] = {"static_range": linear.static_range}
        if linear.low_rank is not None:
            facts[module]["divisor"] = linear.low_rank.divisor.tolist()
    model.metadata_props[LINEARS_KEY] = json.dumps(facts, sort_keys=True)
    record_graph(model)


def recorded_linears(text: str, modules: Collection[str]) -> dict[str, LinearRecord]:
    """Return what `record_linears` stated, by module path.

    Args:
        text: the metadata entry.
        modules: the linears of the model; each of them is recorded, and nothing else.

    Raises:
        OnnxExportError: no such record.
    """
    try:
        found = parse_json(text)
    except TextError as error:
        raise OnnxExportError(f"the record of its linears is damaged: {error}") from error
    if not isinstance(found, Mapping) or found.keys() != set(modules):
        raise OnnxExportError("the record of its linears is not of the linears of its model")
    return {
        module: from_record(
            LinearRecord, found[module], where=f"the record of {module}", error=OnnxExportError
        )
        for module in modules
    }


def record_graph(model: ir.Model) -> None:
    """State in a file which graph it holds."""
    model.metadata_props[GRAPH_KEY] = digest_of_graph(model.graph)


def digest_of_graph(graph: ir.Graph) -> str:
    """Return the hex SHA-256 of a graph's nodes: operators, names, attributes, connections."""
    digest = hashlib.sha256()
    for node in graph:
        attributes = sorted((name, _written(value)) for name, value in node.attributes.items())
        values = [
            [None if value is None else value.name for value in each]
            for each in (node.inputs, node.outputs)
        ]
        digest.update(f"{node.domain} {node.op_type} {node.name} {attributes} {values};".encode())
    return digest.hexdigest()


def _written(attribute: ir.Attr) -> str:
    """Return an attribute's value as a file has it: floats in single precision."""
    value = attribute.value
    return str(np.float32(value)) if isinstance(value, float) else str(value)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Lowered:
    """The nodes of one linear in a graph, and where the rest of the graph meets them.

    `take_out` leaves a placeholder in their place, as a skeleton has it.
    """

    module: str
    nodes: Sequence[ir.Node]  # in graph order
    operands: Sequence[Sequence[ir.Value | None]]  # of each node, as they were found
    input: ir.Value
    output: ir.Value

    def constant(self, name: str) -> Tensor | None:
        """Return the initializer `<module>/<name>` that the nodes read, None if there is none."""
        for value in self._constants():
            if value.name == f"{self.module}/{name}":
                return _tensor(array(value))
        return None

    @property
    def has_branch(self) -> bool:
        """Whether the linear has low-rank factors."""
        return any(value.name == f"{self.module}/right_codes" for value in self._constants())

    def take_out(self) -> None:
        """Put a placeholder where the nodes are; constants that nothing else reads go with them."""
        graph = self.nodes[0].graph
        assert isinstance(graph, ir.Graph)  # they were found by walking a graph
        attributes = [ir.AttrString("module", self.module)]
        placeholder = ir.Node(
            PLACEHOLDER_DOMAIN, PLACEHOLDER, [self.input], attributes, name=f"{self.module}/Linear"
        )
        graph.insert_before(self.nodes[0], placeholder)
        self.output.replace_all_uses_with(placeholder.outputs[0])
        graph.remove(self.nodes, safe=True)
        for value in self._constants():
            if not value.uses():
                graph.initializers.pop(str(value.name), None)

    def put_back(self, before: ir.Node, x: ir.Value) -> ir.Value:
        """Put the nodes before another, for an input x, and return their output."""
        graph = before.graph
        assert isinstance(graph, ir.Graph)  # placeholders are found by walking a graph
        values = {id(self.input): x}
        for node, operands in zip(self.nodes, self.operands, strict=True):
            inputs = [values.get(id(value), value) for value in operands]
            copy = ir.Node(
                node.domain,
                node.op_type,
                inputs,
                list(node.attributes.values()),
                num_outputs=len(node.outputs),
                name=node.name,
            )
            for old, new in zip(node.outputs, copy.outputs, strict=True):
                new.name = old.name
                values[id(old)] = new
            graph.insert_before(before, copy)
        for value in self._constants():
            graph.initializers.setdefault(str(value.name), value)
        return values[id(self.output)]

    def _constants(self) -> list[ir.Value]:
        """Return the constants that the nodes read."""
        return [
            value
            for operands in self.operands
            for value in operands
            if value is not None and value.const_value is not None
        ]


def lowered_linears(graph: ir.Graph, modules: Iterable[str]) -> dict[str, Lowered]:
    """Return what stands for each of some linears, by module path.

    Raises:
        OnnxExportError: a graph without one of them, or one that meets the rest of the graph
            elsewhere than at one input and one output.
    """
    nodes: dict[str, list[ir.Node]] = {module: [] for module in modules}
    for node in graph:
        module = str(node.name).partition("/")[0]
        if module in nodes:
            nodes[module].append(node)
    return {module: _lowered(module, found) for module, found in nodes.items()}


def _lowered(module: str, nodes: Sequence[ir.Node]) -> Lowered:
    """Return a linear's nodes with its input and output."""
    made = {id(value) for node in nodes for value in node.outputs}
    inputs = {
        id(value): value
        for node in nodes
        for value in node.inputs
        if value is not None and value.const_value is None and id(value) not in made
    }
    inside = set(map(id, nodes))
    outputs = [
        value
        for node in nodes
        for value in node.outputs
        if value.is_graph_output() or any(id(use.node) not in inside for use in value.uses())
    ]
    if len(inputs) != 1 or len(outputs) != 1:
        raise OnnxExportError(
            f"the graph has no linear {module} of one input and one output; it is not as "
            f"ditas-export wrote it: export it again"
        )
    return Lowered(
        module=module,
        nodes=nodes,
        operands=[tuple(node.inputs) for node in nodes],
        input=next(iter(inputs.values())),
        output=outputs[0],
    )


def read_linear(lowered: Lowered, record: LinearRecord) -> FoldedLinear:
    """Return the linear that was lowered to the portable form, INT8 activations; the same integers.

    An INT8 row is read as 8-bit codes of multiplier 1, whatever they were before.

    Args:
        lowered: of `lowered_linears`.
        record: of this linear.

    Raises:
        OnnxExportError: a constant that is missing or no linear's.
    """
    try:
        row_scale = _required(lowered, "row_scale")
        if lowered.constant("half") is not None:
            row_scale = row_scale / 2  # the form "cut" doubles them
        multiplier = lowered.constant("input_multiplier")
        return FoldedLinear(
            weight=_weight(lowered, row_scale),
            low_rank=_low_rank(lowered, row_scale, record),
            bias=_required(lowered, "bias").flatten(),
            input_multiplier=multiplier,
            static_range=record.static_range,
        )
    except (TypeError, ValueError, QuantizationError, OnnxExportError) as error:
        raise OnnxExportError(
            f"the linear {lowered.module} cannot be read back ({error}); export the file again"
        ) from error


def _weight(lowered: Lowered, row_scale: Tensor) -> IntegerWeight:
    """Return the integers of a weight, of either layout."""
    rows = lowered.constant("int8_codes")
    if rows is not None:
        codes = rows.T.contiguous()
        ones = torch.ones(codes.shape[0], 1, dtype=torch.int8)
        return IntegerWeight(codes=codes, multipliers=ones, row_scale=row_scale, bits=8)
    multipliers = _required(lowered, "multipliers").to(torch.int8)
    codes = _required(lowered, "codes")
    return IntegerWeight(codes=codes, multipliers=multipliers, row_scale=row_scale, bits=4)


def _low_rank(lowered: Lowered, row_scale: Tensor, record: LinearRecord) -> LowRank | None:
    """Return the branch's integers; its float factor is left codes times row scales, rounded."""
    right_codes, left = lowered.constant("right_codes"), lowered.constant("left")
    if right_codes is None or left is None:
        return None
    if record.divisor is None:
        raise OnnxExportError("its branch has no divisor on record")
    codes = (left.T.double() / row_scale.double()[:, None]).round()
    return LowRank(
        left_codes=codes.to(torch.int8).contiguous(),
        right_codes=right_codes.T.contiguous(),
        divisor=torch.tensor(record.divisor, dtype=torch.int32),
    )


def _required(lowered: Lowered, name: str) -> Tensor:
    """Return a constant that every such linear has."""
    found = lowered.constant(name)
    if found is None:
        raise OnnxExportError(f"it has no constant {name}")
    return found


def _tensor(values: np.ndarray[Any, Any] | None) -> Tensor | None:
    """Return an initializer's values; INT4 as int8."""
    if values is None:
        return None
    if values.dtype.name == "bfloat16":
        return torch.from_numpy(values.view(np.int16).copy()).view(torch.bfloat16)
    if values.dtype.name == "int4":
        return torch.from_numpy(values.astype(np.int8))
    return torch.from_numpy(np.array(values))
