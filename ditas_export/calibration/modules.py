"""The fake-quantized forward: a DiT whose block linears compute what the exported file computes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ditas_export.calibration.fold import FoldedDiT, FoldedLinear
from ditas_export.dit.model import DiT
from ditas_export.quantization.ranges import (
    Ranges,
    quantize,
    static_scale,
    token_ranges,
    unit_scale,
)


class FakeQuantLinear(nn.Module):
    """A folded linear in float arithmetic, the same numbers as its ONNX subgraph.

    With q the INT8 codes of the input and r its range (token), or with a constant scale (static):
    `y = (q·scale Wᵀ + (q·scale rightᵀ) leftᵀ) · r + bias`. Without activation bits, q·scale = x.
    """

    weight: Tensor
    bias: Tensor
    input_multiplier: Tensor | None
    left: Tensor | None
    right: Tensor | None
    scale: Tensor

    def __init__(self, linear: FoldedLinear, *, ranges: Ranges, activation_bits: int) -> None:
        super().__init__()
        dtype = linear.bias.dtype
        self.ranges = ranges
        self.activation_bits = activation_bits
        self.register_buffer("weight", linear.weight.dequantize())
        self.register_buffer("bias", linear.bias)
        self.register_buffer("input_multiplier", linear.input_multiplier)
        low_rank = linear.low_rank
        self.register_buffer("left", low_rank.left if low_rank else None)
        self.register_buffer("right", low_rank.right() if low_rank else None)
        scale = unit_scale(dtype) if ranges == "token" else static_scale(linear.static_range, dtype)
        self.register_buffer("scale", scale)

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the INT8 codes of an input, as floats, and its token ranges (None if static).

        Args:
            x: (…, K), already multiplied by `input_multiplier`.
        """
        if self.ranges == "static":
            return quantize(x, self.scale), None
        ranges = token_ranges(x)
        return quantize(x / ranges, self.scale), ranges

    def forward(self, x: Tensor) -> Tensor:
        """Return (…, N) for x (…, K)."""
        if self.input_multiplier is not None:
            x = x * self.input_multiplier
        ranges = None
        if self.activation_bits == 8:
            codes, ranges = self.codes(x)
            x = codes * self.scale
        out = functional.linear(x, self.weight)
        if self.left is not None and self.right is not None:
            out = out + functional.linear(functional.linear(x, self.right), self.left)
        if ranges is not None:
            out = out * ranges
        return out + self.bias


def fake_quantized_dit(
    folded: FoldedDiT, *, ranges: Ranges, device: torch.device | str = "cpu"
) -> DiT:
    """Return a DiT in evaluation mode whose block linears are `FakeQuantLinear`.

    Its forward is the reference that every exported file is held against.
    """
    with torch.device("meta"):
        model = DiT(folded.config)
    for name, linear in folded.linears.items():
        module = FakeQuantLinear(linear, ranges=ranges, activation_bits=folded.activation_bits)
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent).add_module(child, module)
    missing, unexpected = model.load_state_dict(
        dict(folded.float_parameters), strict=False, assign=True
    )
    stray = [name for name in missing if name.rpartition(".")[0] not in folded.linears]
    assert not stray, stray  # QuantizedDiT checks the sites
    assert not unexpected, unexpected
    return model.to(device).eval().requires_grad_(requires_grad=False)
