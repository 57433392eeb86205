"""Where a file's bytes are, and the JSON that is written beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ditas_export.artifact_files import atomic_path

PARTS = (
    "codes",
    "multipliers",
    "row_scales",
    "low_rank",
    "adaln",
    "embedders",
    "other",
)
"""Parts of a file, in the order in which they are listed; every tensor is in exactly one."""

_PART_OF_LEAF = {
    "codes": "codes",
    "int8_codes": "codes",
    "multipliers": "multipliers",
    "block_scale": "multipliers",
    "row_scale": "row_scales",
    "left": "low_rank",
    "left_codes": "low_rank",
    "right_codes": "low_rank",
    "right_scale": "low_rank",
}

_EMBEDDERS = ("x_embedder", "t_embedder", "y_embedder", "pos_embed")


def bytes_by_part(model: ir.Model) -> dict[str, int]:
    """Return the bytes of a model's tensors, part by part; they add up to all of them.

    `codes` are the integers of the blocks' linears, in layout int8 with the output factors of the
    branches that join them; `multipliers` and `row_scales` their scales,
    `adaln` all of the modulation linears, `other` biases, float weights and constants.
    """
    sizes = dict.fromkeys(PARTS, 0)
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None  # an initializer holds a tensor
        sizes[_part(name)] += value.const_value.nbytes
    return sizes


def write_manifest(path: Path, content: Mapping[str, Any]) -> None:
    """Write a manifest as indented JSON, keys in the given order; atomic.

    Raises:
        ArtifactError: the file cannot be written.
    """
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _part(name: str) -> str:
    """Return the part that an initializer belongs to, by its name."""
    if name.startswith(_EMBEDDERS):
        return "embedders"
    if ".adaLN_modulation." in name:
        return "adaln"
    return _PART_OF_LEAF.get(name.rpartition("/")[2], "other")
