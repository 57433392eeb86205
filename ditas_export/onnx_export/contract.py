"""What a file must be for ONNX Runtime, TensorRT and OpenVINO to run it fast and right.

Every rule has a name, and the reason for which a file that breaks it is refused; `rules/` has a
file for each form. The reasons are observations on real runtimes: ONNX Runtime 1.24.1 and 1.31.1,
the builder of TensorRT for RTX 1.7, and the documented limits of TensorRT 10 and 11.
"""

from __future__ import annotations

import onnx_ir as ir

from ditas_export.errors import OnnxExportError
from ditas_export.onnx_export.rules import graph, int4, joined, quantizers, signed

RULES = (*graph.RULES, *quantizers.RULES, *int4.RULES, *signed.RULES, *joined.RULES)
"""All rules, in the order in which violations are listed."""

MAX_LISTED = 20
"""Violations spelled out in an error; the rest are counted."""


def check_contract(model: ir.Model) -> None:
    """Raise OnnxExportError, naming every broken rule, unless the runtimes can take the model.

    Args:
        model: a whole model, as exported or as loaded from a file.
    """
    broken = [
        f"{rule.name}: {where}: found {found}, expected {expected} ({rule.reason})"
        for rule in RULES
        for where, found, expected in rule.check(model)
    ]
    if not broken:
        return
    if len(broken) > MAX_LISTED:
        broken = [*broken[:MAX_LISTED], f"and {len(broken) - MAX_LISTED} more"]
    raise OnnxExportError("the graph breaks rules of the runtimes: " + "; ".join(broken))
