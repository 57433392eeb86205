"""Weight-only integers for the modulation linears, the cheapest bytes to save in a DiT.

They are made of the unfolded model, so that an artefact that keeps them and one that keeps floats
export to the same file: folding divides whole rows, which takes no more than their scales.
"""

from __future__ import annotations

from dataclasses import replace

from ditas_export.calibration.quantized_dit import QuantizedDiT
from ditas_export.dit.sites import adaln_names
from ditas_export.errors import ArtifactError, QuantizationError
from ditas_export.quantization.weight_only import quantize_weight_only, widest_block


def adaln_block_size(width: int, bits: int) -> int:
    """Return how many input channels share a scale: all for 8 bits, the widest block for 4.

    Raises:
        QuantizationError: other bits, or 4 bits and a width that no block divides.
    """
    if bits not in (8, 4):
        raise QuantizationError(f"adaLN weights have 16, 8 or 4 bits, not {bits}")
    try:
        return width if bits == 8 else widest_block(width)
    except QuantizationError as error:
        raise QuantizationError(f"adaLN weights in 4 bits: {error}") from error


def quantize_adaln(quantized: QuantizedDiT, bits: int) -> QuantizedDiT:
    """Round the modulation weights of an unfolded model to integers; biases stay float.

    Args:
        quantized: left untouched.
        bits: 16 (float), 8 (one scale per output channel) or 4 (blocks of 128, 64 or 32 input
            channels, the largest that divides the width).

    Returns:
        The model itself if its modulation weights have these bits already.

    Raises:
        QuantizationError: other bits, or 4 bits and a width that no block divides.
        ArtifactError: the modulation weights are integers of other bits.
    """
    if bits == quantized.adaln_bits:
        return quantized
    if quantized.adaln:
        raise ArtifactError(
            f"the quantized model keeps its modulation weights in {quantized.adaln_bits} bits, and "
            f"{bits} were asked for; leave out --adaln, or take an artefact made without it"
        )
    block_size = adaln_block_size(quantized.config.hidden_size, bits)
    parameters = dict(quantized.float_parameters)
    adaln = {
        path: quantize_weight_only(
            parameters.pop(f"{path}.weight"), bits=bits, block_size=block_size
        )
        for path in adaln_names(quantized.config.depth)
    }
    return replace(quantized, float_parameters=parameters, adaln=adaln)
