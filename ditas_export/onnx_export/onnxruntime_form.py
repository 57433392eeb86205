"""What ONNX Runtime's form has otherwise than the skeleton that all forms begin with.

Attention is the one operator that opset 23 has for it: ONNX Runtime runs it on CPUs in less time
than the products, softmax and transposes that it stands for. And where linears are integer products
with their branches joined, a wide output is made in parts as wide as the hidden states: what lies
between two products then stays in the processor's cache, and q, k and v come out apart. Linears
that read one input, as to_q, to_k and to_v of others do, read the same range and codes of it.

It is for files of that form alone: opset 21 has no `Attention`, and NVIDIA's builder fuses by
itself.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ditas_export.errors import OnnxExportError
from ditas_export.families.base import ModelConfig
from ditas_export.families.registry import family_of
from ditas_export.onnx_export.skeleton import PLACEHOLDER_DOMAIN
from ditas_export.onnx_export.subgraph import Subgraph

OPSET = 23
"""The first opset with `Attention`."""

IR_VERSION = 11
"""The IR version that came with it."""

_TO_CODES = ("Mul", "ReduceMax", "ReduceMin", "Neg", "Max", "Div", "QuantizeLinear")
"""What the joined form makes of an input until it is codes: 1/s, the range, the codes."""


def to_onnxruntime_form(model: ir.Model, config: ModelConfig, *, in_parts: bool) -> None:
    """Put one `Attention` where attention is, and cut what is wide; in place.

    Args:
        model: a skeleton, its linears placeholders; becomes opset 23 where attention is fused.
        config: of the model, whose family says where attention and wide activations are.
        in_parts: what gives q, k and v, or a wide activation, gives several outputs, and what
            reads the activation several inputs, in the order of their channels.

    Raises:
        OnnxExportError: an activation of several operators, of an untested PyTorch.
    """
    linears = {
        node.attributes["module"].as_string(): node
        for node in model.graph
        if node.domain == PLACEHOLDER_DOMAIN
    }
    family = family_of(config)
    attentions = family.attentions(config)
    for attention in attentions:
        reads, feeds = linears[attention.reads], linears[attention.feeds]
        graph = Subgraph(feeds, attention.feeds.rpartition(".")[0])
        parts = _cut(reads, 3) if in_parts else graph.split(reads.outputs[0], 3)
        heads = attention.heads
        fused = graph.node("Attention", parts, q_num_heads=heads, kv_num_heads=heads)
        feeds.replace_input_with(0, fused)
    for wide in family.wides(config) if in_parts else ():
        if wide.parts > 1:
            _cut_wide(linears[wide.makes], linears[wide.reads], wide.parts)
    RemoveUnusedNodesPass()(model)
    if attentions:
        model.graph.opset_imports[""] = OPSET
        model.ir_version = IR_VERSION


def share_inputs(model: ir.Model, config: ModelConfig) -> None:
    """Let linears of a group that read one value share its range and its codes; in place.

    Nodes of theirs that compute the same become one, down to the codes: unsigned ones are read by
    any number of products. Nothing that is computed changes.

    Args:
        model: its linears in the joined form.
        config: of the model, whose family says which linears are of one group.
    """
    siblings: dict[str, tuple[str, ...]] = {}
    for block in family_of(config).blocks(config):
        for group in block.groups():
            paths = tuple(map(block.name, group.linears))
            if len(paths) > 1 and group.reads_one_input:
                siblings |= dict.fromkeys(paths, paths)
    if not siblings:
        return
    first: dict[Hashable, ir.Node] = {}
    for node in list(model.graph):
        readers = siblings.get(str(node.name).partition("/")[0])
        if readers is None or node.op_type not in _TO_CODES:
            continue
        operands = [None if value is None else _content(value) for value in node.inputs]
        attributes = sorted((name, str(each.value)) for name, each in node.attributes.items())
        same = first.setdefault((readers, node.op_type, *operands, *attributes), node)
        if same is not node:
            node.outputs[0].replace_all_uses_with(same.outputs[0])
    RemoveUnusedNodesPass()(model)


def _content(value: ir.Value) -> Hashable:
    """Return what tells a value from others: of a constant its numbers."""
    tensor = value.const_value
    if tensor is None:
        return id(value)
    return tensor.dtype, tuple(tensor.shape), tensor.tobytes()


def _cut_wide(makes: ir.Node, reads: ir.Node, parts: int) -> None:
    """Let one linear give its output in parts, its activation take each, and one read them all."""
    activation = reads.inputs[0].producer() if reads.inputs[0] else None
    if activation is None or activation.inputs[0] is not makes.outputs[0]:
        raise OnnxExportError(
            f"this PyTorch ({torch.__version__}) exports what lies between {makes.name} and "
            f"{reads.name} as more than one operator; export --target portable, or use a tested "
            f"version (constraints.txt)"
        )
    activated = [
        _copy(activation, [part], f"{activation.name}_{index}").outputs[0]
        for index, part in enumerate(_cut(makes, parts))
    ]
    whole = _copy(reads, activated, str(reads.name))
    reads.outputs[0].replace_all_uses_with(whole.outputs[0])


def _cut(linear: ir.Node, parts: int) -> Sequence[ir.Value]:
    """Put a placeholder of several outputs before one of a single output, and return them."""
    return _copy(linear, list(linear.inputs), str(linear.name), outputs=parts).outputs


def _copy(
    node: ir.Node, inputs: Sequence[ir.Value | None], name: str, *, outputs: int = 1
) -> ir.Node:
    """Put a node's like before it, with other inputs, name and number of outputs."""
    copy = ir.Node(
        node.domain,
        node.op_type,
        inputs,
        list(node.attributes.values()),
        num_outputs=outputs,
        name=name,
    )
    for index, value in enumerate(copy.outputs):
        value.name = f"{name}_output_{index}"
    assert isinstance(node.graph, ir.Graph)  # nodes are found by walking a graph
    node.graph.insert_before(node, copy)
    return copy
