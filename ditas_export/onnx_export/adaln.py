"""Weight-only integers for the modulation linears, the cheapest bytes to save in a DiT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from ditas_export.calibration.fold import FoldedDiT
from ditas_export.dit.sites import adaln_name
from ditas_export.errors import OnnxExportError, QuantizationError
from ditas_export.quantization.weight_only import (
    WeightOnlyWeight,
    quantize_weight_only,
    widest_block,
)

AdalnBits = Literal[16, 8, 4]
"""Bits of the modulation weights: 16 keeps them float, 8 is one scale per row, 4 blocks of rows."""

FINAL_ADALN = "final_layer.adaLN_modulation.1"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedAdaln:
    """A folded model whose modulation weights are integers, and these integers."""

    folded: FoldedDiT  # its modulation weights are the dequantized integers
    weights: Mapping[str, WeightOnlyWeight]  # module path -> integers; empty for 16 bits


def adaln_paths(depth: int) -> tuple[str, ...]:
    """Return the module paths of every modulation linear, the final layer's last."""
    return (*(adaln_name(block) for block in range(depth)), FINAL_ADALN)


def quantize_adaln(folded: FoldedDiT, bits: int) -> QuantizedAdaln:
    """Round the modulation weights of a folded model; biases stay float.

    `fake_quantized_dit(result.folded, …)` is the reference of a file exported with these bits.

    Args:
        folded: left untouched.
        bits: 16 (nothing changes), 8 (one scale per output channel) or 4 (blocks of 128, 64 or 32
            input channels, the largest that divides the width).

    Raises:
        OnnxExportError: other bits, or 4 bits and a width that no block divides.
    """
    if bits == 16:
        return QuantizedAdaln(folded=folded, weights={})
    if bits not in (8, 4):
        raise OnnxExportError(f"adaLN weights have 16, 8 or 4 bits, not {bits}")
    width = folded.config.hidden_size
    try:
        block_size = width if bits == 8 else widest_block(width)
    except QuantizationError as error:
        raise OnnxExportError(f"adaLN weights in 4 bits: {error}") from error
    parameters = dict(folded.float_parameters)
    weights: dict[str, WeightOnlyWeight] = {}
    for path in adaln_paths(folded.config.depth):
        weights[path] = quantize_weight_only(
            parameters[f"{path}.weight"], bits=bits, block_size=block_size
        )
        parameters[f"{path}.weight"] = weights[path].dequantize()
    return QuantizedAdaln(folded=replace(folded, float_parameters=parameters), weights=weights)
