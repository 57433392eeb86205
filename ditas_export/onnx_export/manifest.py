"""Where a file's bytes are, and the JSON that is written beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditas_export.artifact_files import atomic_path
from ditas_export.errors import OnnxExportError
from ditas_export.families.base import ModelConfig
from ditas_export.families.registry import family_of
from ditas_export.onnx_export.external_data import sha256_of_onnx
from ditas_export.paths import StrPath
from ditas_export.text_files import read_json

if TYPE_CHECKING:
    import onnx_ir as ir

MANIFEST_KIND = "ditas-export manifest"
MANIFEST_FORMAT = f"{MANIFEST_KIND} 2"

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


def tensor_bytes(model: ir.Model) -> dict[str, int]:
    """Return the bytes of a model's tensors, by name."""
    found: dict[str, int] = {}
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None  # an initializer holds a tensor
        found[name] = value.const_value.nbytes
    return found


def bytes_by_part(model: ir.Model, config: ModelConfig) -> dict[str, int]:
    """Return the bytes of a model's tensors, part by part; they add up to all of them.

    `codes` are the integers of the quantized linears, in layout int8 with the output factors of the
    branches that join them; `multipliers` and `row_scales` their scales,
    `adaln` all of the modulation linears, `other` biases, float weights and constants.
    """
    family = family_of(config)
    embedders = family.embedders()
    modulations = {*family.modulations(config)}
    sizes = dict.fromkeys(PARTS, 0)
    for name, count in tensor_bytes(model).items():
        module, _, leaf = name.rpartition("/") if "/" in name else name.rpartition(".")
        if name.startswith(embedders):
            part = "embedders"
        elif module in modulations:
            part = "adaln"
        else:
            part = _PART_OF_LEAF.get(leaf, "other")
        sizes[part] += count
    return sizes


def write_manifest(path: Path, content: Mapping[str, Any]) -> None:
    """Write a manifest as indented JSON, keys in the given order; atomic.

    Raises:
        ArtifactError: the file cannot be written.
    """
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_manifest(model: StrPath) -> dict[str, Any] | None:
    """Return the manifest beside an exported file, out.json of out.onnx; None where there is none.

    Another JSON of that name is none.
    """
    model = Path(model)
    try:
        found = read_json(model.with_suffix(".json"))
    except (OSError, ValueError):
        return None
    is_manifest = isinstance(found, dict) and str(found.get("format")).startswith(MANIFEST_KIND)
    return found if is_manifest else None


def require_own_manifest(model: StrPath, sha256: str | None = None) -> None:
    """Refuse an exported file beside which lies the manifest of another.

    Args:
        model: the ONNX file.
        sha256: `sha256_of_onnx(model)` where the caller has it.

    Raises:
        OnnxExportError: the manifest records another hash, or the file cannot be read.
    """
    model = Path(model)
    manifest = read_manifest(model)
    if manifest is None:
        return
    file = manifest.get("file")
    recorded = file.get("sha256") if isinstance(file, dict) else None
    if recorded != (sha256 or sha256_of_onnx(model)):
        raise OnnxExportError(
            f"{model.with_suffix('.json')} is the manifest of another file than {model}; run the "
            f"export again, put the two that belong together side by side, or remove the manifest"
        )
