"""INT8 in PyTorch alone: the block linears of a folded model as integer matrix products.

With q the INT8 codes of an input, r its range (1 where ranges are static), W and R the integer rows
of the weight and of the low-rank input factor, and every scale folded into one per row,

    [p | b] = (q [W; R]ᵀ) · scales,   y = (p + b leftᵀ) · r + bias,

the same numbers as `FakeQuantLinear`: the codes bit for bit, the rest to float rounding. The
product is exact: K products of INT8 values stay below 2³¹ for every K up to 132 104.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from ditas_export.calibration.fold import FoldedLinear, FoldedModel
from ditas_export.calibration.modules import model_of_linears
from ditas_export.errors import RunnerError
from ditas_export.families.base import FamilyModel
from ditas_export.quantization.ranges import (
    Ranges,
    quantize,
    static_scale,
    token_ranges,
    unit_scale,
)
from ditas_export.runtime.torch_runner import TorchRunner

SHAPE_MULTIPLE = 8
"""K and N of a product on a GPU are multiples of this: `_int_mm_out_cuda` in PyTorch's
`aten/src/ATen/native/cuda/Blas.cpp` refuses others. On a CPU any shape works."""

FEWEST_TOKENS = 32
"""Fewer tokens are filled up with zeros: the same function refuses 16 and fewer."""


def integer_rows(*parts: Tensor) -> Tensor:
    """Stack integer matrices and fill rows and columns up with zeros for `integer_product`.

    Args:
        parts: (N_i, K) int8 each.

    Returns:
        (ΣN_i, K) int8, both sizes rounded up to multiples of 8.
    """
    rows = torch.cat(parts)
    height, width = rows.shape
    return functional.pad(rows, (0, -width % SHAPE_MULTIPLE, 0, -height % SHAPE_MULTIPLE))


def integer_product(codes: Tensor, rows: Tensor) -> Tensor:
    """Return codes @ rowsᵀ, exact.

    Args:
        codes: (tokens, K) int8.
        rows: what `integer_rows` made of (N, K) int8. Read as a transposed view: cuBLAS has its
            fast INT8 kernels for this layout.

    Returns:
        (tokens, rows) int32; columns past N are zero.
    """
    tokens, width = codes.shape
    missing_tokens, missing_columns = max(FEWEST_TOKENS - tokens, 0), rows.shape[1] - width
    if missing_tokens or missing_columns:
        codes = functional.pad(codes, (0, missing_columns, 0, missing_tokens))
    return torch._int_mm(codes, rows.t())[:tokens]


class IntegerLinear(nn.Module):
    """A folded linear of INT8 weights and INT8 activations, as one integer matrix product.

    Nothing here is saved with a state dict: the quantized model is the file to keep.
    """

    rows: Tensor
    row_scale: Tensor
    scale: Tensor
    bias: Tensor
    input_multiplier: Tensor | None
    left: Tensor | None

    def __init__(self, linear: FoldedLinear, *, ranges: Ranges) -> None:
        super().__init__()
        dtype = linear.bias.dtype
        self.ranges = ranges
        self.out_features = linear.bias.shape[0]
        scale = unit_scale(dtype) if ranges == "token" else static_scale(linear.static_range, dtype)
        low_rank = linear.low_rank
        # In float32 at least: halves overflow at 65 504, and sums of products go far beyond.
        wide = torch.promote_types(dtype, torch.float32)
        parts, row_scales = [linear.weight.int8_rows()], [linear.weight.row_scale.to(wide)]
        if low_rank is not None:
            parts.append(low_rank.right_codes)
            row_scales.append(low_rank.right_scale(wide))
        rows = integer_rows(*parts)
        row_scale = torch.cat(row_scales) * scale.to(wide)
        unused = rows.shape[0] - row_scale.shape[0]
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("row_scale", functional.pad(row_scale, (0, unused)), persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("bias", linear.bias, persistent=False)
        self.register_buffer("input_multiplier", linear.input_multiplier, persistent=False)
        left = low_rank.left(linear.weight.row_scale) if low_rank else None
        self.register_buffer("left", left, persistent=False)

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the codes of an input, int8, and its token ranges (None if static).

        Args:
            x: (tokens, K), already multiplied by `input_multiplier`.
        """
        if self.ranges == "static":
            return quantize(x, self.scale).to(torch.int8), None
        ranges = token_ranges(x)
        return quantize(x / ranges, self.scale).to(torch.int8), ranges

    def forward(self, x: Tensor) -> Tensor:
        """Return (…, N) for x (…, K), both in the float type of the bias."""
        tokens = x.flatten(0, -2)
        if self.input_multiplier is not None:
            tokens = tokens * self.input_multiplier
        codes, ranges = self.codes(tokens)
        product = (integer_product(codes, self.rows) * self.row_scale).to(x.dtype)
        out = product[:, : self.out_features]
        if self.left is not None:
            branch = product[:, self.out_features : self.out_features + self.left.shape[1]]
            out = torch.addmm(out, branch, self.left.t())
        out = out + self.bias if ranges is None else torch.addcmul(self.bias, out, ranges)
        return out.reshape(*x.shape[:-1], self.out_features)


def int8_model(folded: FoldedModel, *, ranges: Ranges) -> FamilyModel:
    """Return a model in evaluation mode whose block linears are `IntegerLinear`.

    Args:
        folded: a model of 8-bit activations, in any float type; its tensors are shared.
        ranges: of the activations.

    Raises:
        RunnerError: a model of float activations, which no integer product computes.
    """
    if folded.activation_bits != 8:
        raise RunnerError(
            f"INT8 products take 8-bit activations, and this model has {folded.activation_bits}; "
            f"run it fake-quantized"
        )
    return model_of_linears(folded, partial(IntegerLinear, ranges=ranges))


def compile_for_gpu(model: FamilyModel) -> None:
    """Compile a model's forward pass, in place, when it first sees a batch size.

    Inductor fuses what lies between two products into Triton kernels, picks each product's kernel
    by timing, and replays the pass as a CUDA graph. Quotients are not rounded to the float type
    before they become codes, so that codes next to a rounding tie may differ by one.
    """
    model.compile(mode="max-autotune", dynamic=False)


class Int8Runner(TorchRunner):
    """Runs a folded model by INT8 products: as it is on a CPU, compiled on a GPU."""

    def __init__(
        self, folded: FoldedModel, *, ranges: Ranges, device: str | torch.device = "cpu"
    ) -> None:
        super().__init__(int8_model(folded, ranges=ranges), device=device)
        if self.device.type == "cuda":
            compile_for_gpu(self.model)

    @property
    def description(self) -> str:
        """Backend, version, device, float type, and what the linears are."""
        return f"{super().description}, linears in INT8"
