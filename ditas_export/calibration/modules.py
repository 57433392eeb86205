"""The fake-quantized forward: a model whose linears compute what the exported file computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from ditas_export.calibration.fold import FoldedLinear, FoldedModel
from ditas_export.families.base import FamilyModel
from ditas_export.families.registry import family_of
from ditas_export.options import Target
from ditas_export.quantization.integer import inner_codes, joined_rows
from ditas_export.quantization.ranges import (
    Ranges,
    quantize,
    static_scale,
    token_codes,
    unit_scale,
)


def in_onnxruntime_form(target: Target, dtype: torch.dtype) -> bool:
    """Return whether a file has the form that is ONNX Runtime's own.

    There low-rank branches are part of the linears' integer products and attention is one operator.
    ONNX Runtime gains by it, and has no such kernels with half-precision scales on CPUs. TensorRT
    multiplies the output factor in float, which costs it less.

    Args:
        target: the runtime whose form is written.
        dtype: of the float side.
    """
    return target == "onnxruntime" and dtype == torch.float32


class FakeQuantLinear(nn.Module):
    """A folded linear in float arithmetic, the same numbers as its ONNX subgraph.

    With q the INT8 codes of the input, r its range (token) or 1 (static), and p the low-rank inner
    product, `y = ([q | p] · scale [rows | left_codes]ᵀ · row_scale) · r + bias`. Where the branch
    joins the linear's integer product, p are codes too; elsewhere p = q rightᵀ as it is. Without
    activation bits, q · scale = x.
    """

    weight: Tensor
    bias: Tensor
    input_multiplier: Tensor | None
    right: Tensor | None
    right_codes: Tensor | None
    divisor: Tensor | None
    scale: Tensor

    def __init__(
        self,
        linear: FoldedLinear,
        *,
        ranges: Ranges,
        activation_bits: int,
        target: Target = "portable",
    ) -> None:
        super().__init__()
        dtype = linear.bias.dtype
        self.ranges = ranges
        self.activation_bits = activation_bits
        low_rank, row_scale = linear.low_rank, linear.weight.row_scale
        joined = low_rank if activation_bits == 8 and in_onnxruntime_form(target, dtype) else None
        rows = joined_rows(linear.weight, low_rank).to(dtype)
        scale = unit_scale(dtype) if ranges == "token" else static_scale(linear.static_range, dtype)
        buffers = {
            "weight": rows * row_scale[:, None],
            "bias": linear.bias,
            "input_multiplier": linear.input_multiplier,
            "right": low_rank.right(dtype) if low_rank else None,
            "right_codes": joined.right_codes.to(dtype) if joined else None,
            "divisor": joined.divisor if joined else None,
            "scale": scale,
        }
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor, persistent=False)

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the INT8 codes of an input, as floats, and its token ranges (None if static).

        Args:
            x: (…, K), already multiplied by `input_multiplier`.
        """
        if self.ranges == "token":
            return token_codes(x)
        return quantize(x, self.scale), None

    def forward(self, x: Tensor) -> Tensor:
        """Return (…, N) for x (…, K)."""
        if self.input_multiplier is not None:
            x = x * self.input_multiplier
        ranges = codes = None
        if self.activation_bits == 8:
            codes, ranges = self.codes(x)
            x = codes * self.scale
        if codes is not None and self.right_codes is not None and self.divisor is not None:
            products = functional.linear(codes, self.right_codes)
            inner = inner_codes(products, self.divisor) * self.scale
            x = torch.cat([x, inner], dim=-1)
        elif self.right is not None:
            x = torch.cat([x, functional.linear(x, self.right)], dim=-1)
        out = functional.linear(x, self.weight)
        if ranges is not None:
            out = out * ranges
        return out + self.bias


def fake_quantized_model(
    folded: FoldedModel,
    *,
    ranges: Ranges,
    target: Target = "portable",
    device: torch.device | str = "cpu",
) -> FamilyModel:
    """Return a model in evaluation mode whose quantized linears are `FakeQuantLinear`.

    Its forward is the reference that every exported file is held against.
    """
    make = partial(
        FakeQuantLinear, ranges=ranges, activation_bits=folded.activation_bits, target=target
    )
    return model_of_linears(folded, make).to(device)


def model_of_linears(folded: FoldedModel, make: Callable[[FoldedLinear], nn.Module]) -> FamilyModel:
    """Return a model in evaluation mode whose quantized linears are what `make` makes of them.

    Args:
        folded: its float parameters are shared.
        make: gives a module whose state dict is empty: the quantized model is the file to keep.
    """
    with torch.device("meta"):
        model: FamilyModel = family_of(folded.config).module(folded.config, folded=True)
    for name, linear in folded.linears.items():
        model.set_submodule(name, make(linear))
    model.load_state_dict(dict(folded.float_parameters), assign=True)
    return model.eval().requires_grad_(requires_grad=False)
