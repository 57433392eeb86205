"""The paper's own weight quantizers and its LoRA-AO, to the letter; for comparison in PyTorch only.

No runtime has a kernel for them: they have zero points and scales along the summed dimension. The
activations' counterpart is `ranges.fake_quantize_tensor_asymmetric`.

Every scale here belongs to one input channel, so smoothing cannot help a weight: with s > 0,
`Q(W · s) = Q(W) · s` exactly (in real arithmetic), which is how DiTAS (section 4.1) merges s into
the scales.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ditas_export.errors import QuantizationError
from ditas_export.quantization.low_rank import truncated_svd

STRIDED_BLOCK_SIZE = 32
"""Output channels that share a scale in the published code."""

LORA_ITERATIONS = 10
"""Alternations of LoRA-AO (DiTAS, section 4.1)."""

WeightQuantizer = Callable[[Tensor], Tensor]
"""A weight (N, K) to the same weight on its grid."""


def fake_quantize_input_channels(weight: Tensor, *, bits: int) -> Tensor:
    """Return a weight rounded on one asymmetric range per input channel.

    `scale = (max − min) / (2^b − 1)`, codes 0 … 2^b − 1; the range is widened to hold 0.

    Args:
        weight: (N, K) float, finite; left untouched.
        bits: b, 2 to 8.

    Source: DiTAS, eq. 3 and section 4.1.
    """
    return _fake_quantize(weight, bits=bits, divisor=2**bits - 1)


def fake_quantize_strided_blocks(
    weight: Tensor, *, bits: int, block_size: int = STRIDED_BLOCK_SIZE
) -> Tensor:
    """Return a weight rounded on asymmetric ranges of strided blocks inside an input channel.

    Block j of a channel holds the output channels j, j + N/32, j + 2N/32, …, and its range is
    divided by 2^b: the block's largest value lies one step above the largest code, and is clipped.

    Args:
        weight: (N, K) float, finite; left untouched.
        bits: b, 2 to 8.
        block_size: output channels in a block; divides N.

    Raises:
        QuantizationError: `block_size` does not divide N.

    Source: what the published code of DiTAS computes, which is not what its paper says.
    """
    rows = weight.shape[0]
    if rows % block_size:
        raise QuantizationError(
            f"block_size={block_size} does not divide out_features={rows}; pick a divisor"
        )
    blocks = weight.reshape(block_size, -1)  # one column per block and input channel
    return _fake_quantize(blocks, bits=bits, divisor=2**bits).reshape(weight.shape)


def _fake_quantize(columns: Tensor, *, bits: int, divisor: int) -> Tensor:
    """Round each column of a matrix on its own range, widened to hold 0 (DiTAS, eq. 3)."""
    low = columns.amin(dim=0).clamp(max=0.0)
    high = columns.amax(dim=0).clamp(min=0.0)
    scale = ((high - low) / divisor).clamp(min=torch.finfo(columns.dtype).tiny)
    zero_point = (-low / scale).round()
    codes = ((columns / scale).round() + zero_point).clamp(0, 2**bits - 1)
    return (codes - zero_point) * scale


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoraWeight:
    """What LoRA-AO makes of a weight: W ≈ quantized + left @ right."""

    quantized: Tensor  # Q, (N, K)
    left: Tensor  # B, (N, rank)
    right: Tensor  # Aᵀ, (rank, K)

    def matrix(self) -> Tensor:
        """Return quantized + left @ right, (N, K)."""
        return self.quantized + self.left @ self.right


def alternate_lora(
    weight: Tensor,
    quantizer: WeightQuantizer,
    *,
    rank: int,
    iterations: int = LORA_ITERATIONS,
) -> LoraWeight:
    """Return the last iterate of LoRA-AO, which lowers ‖W − Q(W) − B Aᵀ‖_F.

    `Q ← quantizer(W − B Aᵀ)`, then `B Aᵀ ←` the truncated SVD of `W − Q`, from B Aᵀ = 0.

    Args:
        weight: W, (N, K) float, left untouched.
        quantizer: Q.
        rank: 1 … min(N, K).
        iterations: at least 1.

    Raises:
        QuantizationError: the rank does not fit.

    Source: DiTAS, eq. 10.
    """
    addition = torch.zeros_like(weight)
    for _ in range(iterations):
        quantized = quantizer(weight - addition)
        left, right = truncated_svd(weight - quantized, rank)
        addition = left @ right
    return LoraWeight(quantized=quantized, left=left, right=right)
