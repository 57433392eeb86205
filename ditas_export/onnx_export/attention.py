"""Attention as the one operator that opset 23 has for it, in a skeleton.

ONNX Runtime runs `Attention` on CPUs in less time than the products, softmax and transposes that
it stands for. It is for files of ONNX Runtime's form alone: opset 21 has none, and
NVIDIA's builder fuses the parts by itself.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ditas_export.onnx_export.skeleton import PLACEHOLDER_DOMAIN
from ditas_export.onnx_export.subgraph import Subgraph

OPSET = 23
"""The first opset with `Attention`."""

IR_VERSION = 11
"""The IR version that came with it."""


def fuse_attention(model: ir.Model, num_heads: int) -> None:
    """Put one `Attention` between every block's qkv and proj, in place of what lay there.

    Args:
        model: a skeleton, its linears placeholders; becomes opset 23.
        num_heads: of every block.
    """
    linears = {
        node.attributes["module"].as_string(): node
        for node in model.graph
        if node.domain == PLACEHOLDER_DOMAIN
    }
    for module, proj in linears.items():
        if not module.endswith("attn.proj"):
            continue
        path = module.removesuffix(".proj")
        graph = Subgraph(proj, path)
        parts = graph.split(linears[f"{path}.qkv"].outputs[0], 3)
        fused = graph.node("Attention", parts, q_num_heads=num_heads, kv_num_heads=num_heads)
        proj.replace_input_with(0, fused)
    RemoveUnusedNodesPass()(model)
    model.graph.opset_imports[""] = OPSET
    model.ir_version = IR_VERSION
